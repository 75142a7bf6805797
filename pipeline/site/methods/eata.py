"""Adapts by EATA: entropy minimisation on reliable samples, anchored by the Fisher information.

Niu et al., ICML 2022.

What had to change: gamma and beta of the site adapter stand in for batch-normalisation affines; Adam for SGD
with momentum; the Fisher diagonal is the mean square over single source features, as the paper writes it (its
code squares means of 64 gradients, for unrelated ones 1/64 of that, and its weight 2000 goes with the code).
Two classes: E0 is 0.4 ln 2. The cosine of a prediction to a running mean of (1/2, 1/2) is at least 0.7071,
and to a confident mean it is below the published 0.05 only for a confident prediction of the other class: the
redundancy filter would learn from nothing but contradictions; off.
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

LEARNED = ("site.gamma", "site.beta")
PUBLISHED: dict[str, object] = {
    "redundancy": 0.05,  # d_margin for ImageNet-C
    "margin": 0.4,  # E0 / ln C
    "anchor": 2000 / 64,  # fisher_alpha for ImageNet-C, on the scale of single samples
    "momentum": 0.9,  # of the mean prediction; the learning rate 2.5e-4 is one of SGD and is not taken over
}


class Config(SiteMethod):
    """Settings of the baseline."""

    kind: str = "eata"
    lr: float = Field(default=1e-3, gt=0, description="learning rate of Adam")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    margin: float = Field(
        default=0.4, gt=0, le=1, description="E0 in units of ln 2; a sample above it is not used"
    )
    redundancy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="cosine to the mean prediction a sample must stay below; null: off",
    )
    anchor: float = Field(
        default=30.0, ge=0, description="weight of the Fisher-weighted distance to the source"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the mean prediction, per step")

    def init(self, tail: Params) -> State:
        """Returns the movable tensors, Adam moments, the source's Fisher diagonal and the mean prediction."""
        return {
            **{k: v.clone() for k, v in tails.site_state(tail).items()},
            **moments(tail, LEARNED),
            **{f"fisher.{k}": v for k, v in _fisher(tail).items()},
            "mean": torch.zeros(()),
            "counted": torch.zeros((), dtype=torch.bool),
        }

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Scores the batch, then takes one step on the weighted entropy of the selected rows."""
        batch = sane(batch)

        def loss(learned: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            score = tails.score({**tails.with_site_state(tail, state), **learned}, batch.z, batch.present)
            h, used = entropy(score), self._selected(state, score.detach(), batch.valid)
            weight = torch.exp(self.margin * math.log(2) - h.detach()) * used
            apart = torch.stack(
                [(state[f"fisher.{k}"] * (v - tail[k]) ** 2).sum() for k, v in learned.items()]
            ).sum()
            return (weight * h).sum() / used.sum().clamp(min=1) + self.anchor * apart, (score, used)

        grads, (score, used) = torch.func.grad(loss, has_aux=True)({k: state[k] for k in LEARNED})
        state = adam(state, grads, lr=self.lr, clip=self.clip, when=used.any())
        state = self._count(state, score, used)
        pseudo = torch.where(used, (score >= 0.5).to(torch.int8), -1)
        zero = torch.zeros(())
        return state, Outcome(score, pseudo, torch.zeros_like(score), zero + 1, zero, zero > 1)

    def _selected(self, state: State, score: Tensor, valid: Tensor) -> Tensor:
        """Returns [B] bool: reliable, and unlike the mean of the rows that were learned from."""
        reliable = valid & (entropy(score) < self.margin * math.log(2))
        if self.redundancy is None:
            return reliable
        return reliable & (~state["counted"] | (_cosine(score, state["mean"]) < self.redundancy))

    def _count(self, state: State, score: Tensor, used: Tensor) -> State:
        """Moves the mean prediction with the rows that were learned from."""
        now = (score * used).sum() / used.sum().clamp(min=1)
        mean = torch.where(state["counted"], self.momentum * state["mean"] + (1 - self.momentum) * now, now)
        mean = torch.where(used.any(), mean, state["mean"])
        return {**state, "mean": mean, "counted": state["counted"] | used.any()}


def _fisher(tail: Params) -> Params:
    """Returns the mean squared gradient of the pseudo-label loss over the source features; else zeros.

    Zeros where a model carries no source features.
    """
    learned = {k: tail[k] for k in LEARNED}
    if "replay.z" not in tail:
        return {k: torch.zeros_like(v) for k, v in learned.items()}

    def loss(movable: Params, z: Tensor, present: Tensor) -> Tensor:
        logit = tails.forward({**tail, **movable}, z[None], present[None]).logit[0, tails.FUSED]
        return torch.nn.functional.softplus(-logit.abs())  # cross entropy with its own call

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    each = gradients(learned, tail["replay.z"], tail["replay.present"])
    return {k: g.square().mean(dim=0) for k, g in each.items()}


def _cosine(p: Tensor, q: Tensor) -> Tensor:
    """Returns the cosine between the two-class distributions (p, 1 - p) [B] and (q, 1 - q) []."""
    return (p * q + (1 - p) * (1 - q)) * torch.rsqrt((p**2 + (1 - p) ** 2) * (q**2 + (1 - q) ** 2))
