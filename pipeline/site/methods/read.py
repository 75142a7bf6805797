"""Adapts by READ: the fusion learns with a loss that gives up on doubtful samples.

Multi-modal reliability bias, Yang et al., ICLR 2024.

What had to change: there is no attention between modality tokens to adapt; the complement gates and one
factor per modality (site.gamma, moved by the mean of its gradient over the features) stand in for it. The
loss p ln(e gamma / p) of a confidence p rises up to gamma and falls beyond: samples above it grow surer,
samples below less sure. Two classes: a confidence is at least one half, so the published gamma = 1/e never
bends, and the balance term asks for half attacks in every batch: off.
"""

from __future__ import annotations

import math
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

LEARNED = ("gate", "site.gamma")
PUBLISHED: dict[str, object] = {
    "lr": 1e-4,  # Adam
    "confidence": math.exp(-1),  # gamma
    "balance": 1.0,  # weight of the negative entropy of the mean prediction
}


class Config(SiteMethod):
    """Settings of the baseline."""

    kind: str = "read"
    lr: float = Field(default=1e-3, gt=0, description="learning rate of Adam")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    confidence: float = Field(
        default=0.75, gt=0, lt=1, description="gamma; a sample below it becomes less sure"
    )
    balance: float = Field(default=0.0, ge=0, description="weight of -H(mean prediction)")

    def init(self, tail: Params) -> State:
        """Returns the movable tensors and the Adam moments of the fusion."""
        return {**{k: v.clone() for k, v in tails.site_state(tail).items()}, **moments(tail, LEARNED)}

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Scores the batch, then takes one step on the robust loss of its valid rows."""
        batch = sane(batch)

        def loss(learned: Params) -> tuple[Tensor, Tensor]:
            score = tails.score({**tails.with_site_state(tail, state), **learned}, batch.z, batch.present)
            count = batch.valid.sum().clamp(min=1)
            robust = (_robust(torch.maximum(score, 1 - score), self.confidence) * batch.valid).sum() / count
            return robust - self.balance * entropy((score * batch.valid).sum() / count), score

        grads, score = torch.func.grad(loss, has_aux=True)({k: state[k] for k in LEARNED})
        factor = grads["site.gamma"].mean(dim=-1, keepdim=True)
        grads = {**grads, "site.gamma": factor.expand_as(grads["site.gamma"])}
        state = adam(state, grads, lr=self.lr, clip=self.clip, when=batch.valid.any())
        sure = batch.valid & (torch.maximum(score, 1 - score) > self.confidence)
        pseudo = torch.where(sure, (score >= 0.5).to(torch.int8), -1)
        zero = torch.zeros(())
        return state, Outcome(score, pseudo, torch.zeros_like(score), zero + 1, zero, zero > 1)


def _robust(p: Tensor, gamma: float) -> Tensor:
    """Returns p ln(e gamma / p) of a confidence p; its slope ln(gamma / p) changes sign at gamma."""
    return p * (1 + math.log(gamma) - torch.log(p))
