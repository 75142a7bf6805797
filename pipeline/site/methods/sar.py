"""Adapts by SAR: sharpness-aware entropy minimisation on reliable samples, with recovery.

Niu et al., ICLR 2023.

What had to change: gamma and beta of the site adapter stand in for the affines of normalisation layers; Adam
for SGD inside SAM. Two classes: E0 is 0.4 ln 2, and reliable samples then have a mean entropy below the
published recovery constant 0.2 from the first step on, so that the model would never leave the source; scaled
with E0 it is 0.02. The mean loss starts anew after a recovery, as the paper has it.
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
    "margin": 0.4,  # E0 / ln C
    "rho": 0.05,  # radius of SAM
    "recover": 0.2,  # e_m, for 1000 classes; the learning rates 2.5e-4 and 1e-3 are of SGD and left out
    "momentum": 0.9,
}


class Config(SiteMethod):
    """Settings of the baseline."""

    kind: str = "sar"
    lr: float = Field(default=1e-3, gt=0, description="learning rate of Adam")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    margin: float = Field(
        default=0.4, gt=0, le=1, description="E0 in units of ln 2; a sample above it is not used"
    )
    rho: float = Field(default=0.05, ge=0, description="how far uphill the gradient is taken")
    recover: float = Field(
        default=0.02, ge=0, description="nats; a running loss below it brings the source back"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the running loss, per step")

    def init(self, tail: Params) -> State:
        """Returns the movable tensors, Adam moments and the running loss."""
        return {
            **{k: v.clone() for k, v in tails.site_state(tail).items()},
            **moments(tail, LEARNED),
            "loss": torch.zeros(()),
            "counted": torch.zeros((), dtype=torch.bool),
        }

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Scores the batch, climbs to the worst neighbour, learns from the gradient there, and recovers.

        It recovers the source where the running loss leaves nothing to learn.
        """
        batch = sane(batch)

        def reliable(learned: Params, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            score = tails.score({**tails.with_site_state(tail, state), **learned}, batch.z, batch.present)
            h = entropy(score)
            used = rows & (h.detach() < self.margin * math.log(2))
            return (h * used).sum() / used.sum().clamp(min=1), (score, used)

        learnable = {k: state[k] for k in LEARNED}
        uphill, (score, first) = torch.func.grad(reliable, has_aux=True)(learnable, batch.valid)
        norm = torch.sqrt(torch.stack([g.square().sum() for g in uphill.values()]).sum())
        worst = {k: v + self.rho * uphill[k] / (norm + 1e-12) for k, v in learnable.items()}
        grads, (loss, (_, used)) = torch.func.grad_and_value(reliable, has_aux=True)(worst, first)
        measured = used.any() & torch.isfinite(loss)
        state = adam(state, grads, lr=self.lr, clip=self.clip, when=measured)
        state, restored = self._recover(tail, state, loss, measured=measured)
        pseudo = torch.where(used, (score >= 0.5).to(torch.int8), -1)
        zero = torch.zeros(())
        return state, Outcome(score, pseudo, torch.zeros_like(score), zero + 1, zero, restored)

    def _recover(self, tail: Params, state: State, loss: Tensor, *, measured: Tensor) -> tuple[State, Tensor]:
        """Follows the loss; below ``recover`` it goes back to the source with clean Adam moments."""
        running = torch.where(
            state["counted"], self.momentum * state["loss"] + (1 - self.momentum) * loss, loss
        )
        running = torch.where(measured, running, state["loss"])
        restored = measured & (running < self.recover)
        new: State = {
            "loss": running,
            "counted": (state["counted"] | measured) & ~restored,
            "adam.t": torch.where(restored, 0.0, state["adam.t"]),
        }
        for name in LEARNED:
            new[name] = torch.where(restored, tail[name], state[name])
            for moment in ("adam1", "adam2"):
                new[f"{moment}.{name}"] = torch.where(restored, 0.0, state[f"{moment}.{name}"])
        return {**state, **new}, restored
