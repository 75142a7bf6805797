"""Adapts by DRM: weighs the source domains' boundaries by their certainty, without a gradient.

Domain-specific risk minimisation of Zhang et al., KDD 2023.

What had to change: instead of a classifier per source domain there is the boundary at which that domain's own
errors are equal, on one shared coordinate; the weights are a softmax of the running mean entropy under each
boundary, since what serves must be fixed before a sample is seen, while the paper weighs each sample by its
own. No gradient. Until a sample was seen the source's own boundary serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site.contract import SiteMethod
from pipeline.site.trust import entropy, sane
from pipeline.types import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.site.contract import Params, State
    from pipeline.types import Features

PUBLISHED: dict[str, object] = {
    "momentum": 0.0  # a sample's own entropies decide, here of the latest one
}


class Config(SiteMethod):
    """Settings of the baseline."""

    kind: str = "drm"
    temperature: float = Field(
        default=0.05, gt=0, description="nats of mean entropy between weights that differ by e"
    )
    momentum: float = Field(default=0.98, ge=0, lt=1, description="of the mean entropies, per sample")

    def init(self, tail: Params) -> State:
        """Returns the movable tensors and the mean entropy under every source domain's boundary."""
        if "reference.boundary" not in tail or tail["reference.boundary"].numel() == 0:
            raise ValueError(
                "site.kind: 'drm' needs a source model with a boundary per domain; train it again"
            )
        return {
            **{k: v.clone() for k, v in tails.site_state(tail).items()},
            "entropy": torch.zeros_like(tail["reference.boundary"]),
            "seen": torch.zeros((), dtype=torch.int64),
        }

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Scores the batch, updates the mean entropies, and sets the fused boundary to the weighted mean."""
        batch = sane(batch)
        before = tails.forward(tails.with_site_state(tail, state), batch.z, batch.present)
        each = _entropies(tail, before.radius[:, tails.FUSED], batch.present)
        mean, seen = state["entropy"], state["seen"]
        for i in range(batch.valid.shape[0]):
            rate = torch.clamp(1 / (seen + 1), min=1 - self.momentum)
            mean = torch.where(batch.valid[i], mean + rate * (each[i] - mean), mean)
            seen = seen + batch.valid[i]
        boundary = (torch.softmax(-mean / self.temperature, dim=-1) * tail["reference.boundary"]).sum()
        fused = torch.arange(tails.HEADS) == tails.FUSED
        log_rho = torch.where(fused & batch.valid.any(), boundary, state["log_rho"])
        score = torch.sigmoid(before.logit[:, tails.FUSED])
        unused = torch.full_like(score, -1, dtype=torch.int8)
        zero = torch.zeros(())
        outcome = Outcome(score, unused, torch.zeros_like(score), zero, zero, zero > 1)
        return {**state, "log_rho": log_rho, "entropy": mean, "seen": seen}, outcome


def _entropies(tail: Params, radius: Tensor, present: Tensor) -> Tensor:
    """Returns the entropy [B, E], in nats, of ``radius`` [B] under each source domain's boundary."""
    at = tail["reference.boundary"] + tail["pattern"][tails.pattern_index(present)][:, None]
    at = at if "linear" in tail else torch.exp(at)
    return entropy(torch.sigmoid(tails.KAPPA * (at - radius[:, None])))
