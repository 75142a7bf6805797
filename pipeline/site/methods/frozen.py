"""Scores with the source model and never learns: the reference of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.models import tail as tails
from pipeline.site.contract import SiteMethod
from pipeline.site.trust import sane
from pipeline.types import Outcome

if TYPE_CHECKING:
    from pipeline.site.contract import Params, State
    from pipeline.types import Features


class Config(SiteMethod):
    """Nothing to set."""

    kind: str = "frozen"

    def init(self, tail: Params) -> State:
        """The movable tensors, which never move."""
        return {k: v.clone() for k, v in tails.site_state(tail).items()}

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Score the batch."""
        batch = sane(batch)
        score = tails.score(tails.with_site_state(tail, state), batch.z, batch.present)
        zero = torch.zeros((), dtype=score.dtype)
        unused = torch.full_like(score, -1, dtype=torch.int8)
        return state, Outcome(
            score, unused, torch.zeros_like(score), zero, zero, torch.zeros((), dtype=torch.bool)
        )
