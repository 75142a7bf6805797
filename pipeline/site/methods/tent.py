"""Adapts by TENT: minimises the prediction's entropy over the affine part of the site adapter.

Wang et al., ICLR 2021.

The paper adapts batch-normalisation affines with batch statistics; there are none here, so gamma and beta of
the site adapter take their place. Kept as a baseline: it has nothing that protects a one-class stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site.adam import adam, moments
from pipeline.site.contract import SiteMethod
from pipeline.site.trust import entropy, sane
from pipeline.types import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.site.contract import Params, State
    from pipeline.types import Features

LEARNED = ("site.gamma", "site.beta")


class Config(SiteMethod):
    """Settings of the baseline."""

    kind: str = "tent"
    lr: float = Field(default=1e-3, gt=0, description="learning rate of Adam")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")

    def init(self, tail: Params) -> State:
        """Returns the movable tensors and the Adam moments of the affine part."""
        return {**{k: v.clone() for k, v in tails.site_state(tail).items()}, **moments(tail, LEARNED)}

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Scores the batch, then takes one step on the mean entropy of its valid rows."""
        batch = sane(batch)

        def loss(learned: Params) -> tuple[Tensor, Tensor]:
            score = tails.score({**tails.with_site_state(tail, state), **learned}, batch.z, batch.present)
            mean = (entropy(score) * batch.valid).sum() / batch.valid.sum().clamp(min=1)
            return mean, score

        grads, score = torch.func.grad(loss, has_aux=True)({k: state[k] for k in LEARNED})
        state = adam(state, grads, lr=self.lr, clip=self.clip, when=batch.valid.any())
        pseudo = torch.where(
            batch.valid, (score >= 0.5).to(torch.int8), torch.full_like(score, -1, dtype=torch.int8)
        )
        zero = torch.zeros_like(score).sum()
        return state, Outcome(score, pseudo, torch.zeros_like(score), zero + 1, zero, zero > 1)
