"""Adapts by CoTTA: a student learns from its slow mean, the teacher, and is partly restored by chance.

Wang et al., CVPR 2022.

What had to change: all that a site may learn stands in for all weights. There is nothing to colour or crop in
a feature, so the augmentations of the averaged prediction are the sample itself and the sample without each
one of its sensors, where it has two or more; a single sensor's sample keeps the plain prediction, and so does
one the source is sure of, row by row instead of by the batch's mean. The coins of the stochastic restore are
an integer hash of a counter. The teacher serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site.adam import adam, moments
from pipeline.site.contract import SiteMethod
from pipeline.site.trust import sane
from pipeline.types import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.site.contract import Params, State
    from pipeline.types import Features

WORD = 2**32 - 1
PUBLISHED: dict[str, object] = {
    "lr": 1e-3,  # Adam, CIFAR-10-C
    "teacher": 0.999,  # MT
    "restore": 0.01,  # RST
    "sure": 0.92,  # AP for CIFAR-10-C
}


class Config(SiteMethod):
    """Settings of the baseline; the published ones hold for two classes too."""

    kind: str = "cotta"
    lr: float = Field(default=1e-3, gt=0, description="learning rate of Adam")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    teacher: float = Field(default=0.999, ge=0, lt=1, description="momentum of the teacher, per step")
    restore: float = Field(
        default=0.01, ge=0, le=1, description="share of the student's entries sent back, per step"
    )
    sure: float = Field(
        default=0.92, ge=0.5, le=1, description="confidence of the source that needs no averaging"
    )

    def init(self, tail: Params) -> State:
        """Returns the teacher (movable names), the student with its Adam moments, and the step counter."""
        student = {f"student.{k}": tail[k].clone() for k in tails.LEARNED}
        return {
            **{k: v.clone() for k, v in tails.site_state(tail).items()},
            **student,
            **moments(student, tuple(student)),
            "step": torch.zeros((), dtype=torch.int64),
        }

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Scores with the teacher, teaches the student, moves the teacher, restores some of the student."""
        batch = sane(batch)
        served = tails.with_site_state(tail, state)
        score = tails.score(served, batch.z, batch.present)
        target = self._target(tail, served, score, batch)

        def loss(student: Params) -> Tensor:
            learned = {k: student[f"student.{k}"] for k in tails.LEARNED}
            logit = tails.forward({**served, **learned}, batch.z, batch.present).logit[:, tails.FUSED]
            each = torch.nn.functional.softplus(logit) - target * logit
            return (each * batch.valid).sum() / batch.valid.sum().clamp(min=1)

        grads = torch.func.grad(loss)({f"student.{k}": state[f"student.{k}"] for k in tails.LEARNED})
        state = adam(state, grads, lr=self.lr, clip=self.clip, when=batch.valid.any())
        state = self._settle(tail, state, when=batch.valid.any())
        pseudo = torch.where(batch.valid, (target >= 0.5).to(torch.int8), -1)
        zero = torch.zeros(())
        return state, Outcome(score, pseudo, torch.zeros_like(score), zero + 1, zero, zero > 1)

    def _target(self, tail: Params, served: Params, score: Tensor, batch: Features) -> Tensor:
        """Returns the student's targets [B]: the teacher's score, averaged over missing sensors in doubt."""
        total, count = score, torch.ones_like(score)
        several = batch.present.sum(dim=-1) >= 2
        for m in range(tails.MODALITIES):
            dropped = batch.present & (torch.arange(tails.MODALITIES) != m)
            usable = several & batch.present[:, m]
            total = total + torch.where(usable, tails.score(served, batch.z, dropped), 0.0)
            count = count + usable
        source = tails.score(tail, batch.z, batch.present)
        return torch.where(torch.maximum(source, 1 - source) < self.sure, total / count, score)

    def _settle(self, tail: Params, state: State, *, when: Tensor) -> State:
        """Moves the teacher one step towards the student, then restores some entries of the student."""
        new: State = {"step": torch.where(when, state["step"] + 1, state["step"])}
        offset = 0
        for name in tails.LEARNED:
            teacher, student = state[name], state[f"student.{name}"]
            back = when & _coins(state["step"], offset, student.shape, share=self.restore)
            new[name] = torch.where(when, teacher + (1 - self.teacher) * (student - teacher), teacher)
            new[f"student.{name}"] = torch.where(back, tail[name], student)
            offset += student.numel()
        return {**state, **new}


def _coins(step: Tensor, offset: int, shape: torch.Size, *, share: float) -> Tensor:
    """Returns a bool tensor of ``shape``, True with probability ``share``; every entry has its own coin."""
    index = torch.arange(offset, offset + shape.numel())
    return (_mix(_mix(step + 1) ^ index) < share * (WORD + 1)).view(shape)


def _mix(x: Tensor) -> Tensor:
    """Returns a 32-bit integer hash in int64, by two rounds of xor-shift and multiply.

    From Wellons' hash prospector (public domain).
    """
    x = x & WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & WORD
    return x ^ (x >> 15)
