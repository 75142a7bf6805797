"""Class-balanced risk minimisation: the baseline that every other source method has to beat.

The logistic loss of the radial heads with equal mass per class, no domain label, the same trunk, tail, sampler,
augmentation and (if switched on) modality dropout as the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source import Schedule

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Params = dict[str, Tensor]


class Batch(NamedTuple):
    """A labelled batch, stratified domain x class."""

    frames: Tensor  # [B, 5, S, S] float, augmented and prepared for the trunk
    present: Tensor  # [B, M] bool
    label: Tensor  # [B] 1 bona fide, 0 attack
    domain: Tensor  # [B] index of the domain
    progress: float  # share of the schedule that is done, for annealing


class Model(Protocol):
    """What a method sees of the objective."""

    @property
    def tail(self) -> Params: ...
    @property
    def extra(self) -> Params: ...
    def trunk_features(self, frames: Tensor, present: Tensor) -> Tensor: ...


class SourceMethod(Protocol):
    """What a source method's Config offers (``pipeline.source``) besides the schedule's fields."""

    kind: str
    steps: int
    batch: int
    lr: float
    weight_decay: float
    seed: int
    augment: bool

    def extra(self, domains: int, tail: Params) -> Params: ...
    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]: ...
    def after_step(self, extra: Params) -> None: ...


class Config(Schedule):
    """``source.kind: erm``."""

    kind: Literal["erm"] = "erm"  # pyright: ignore[reportIncompatibleVariableOverride]
    heads: float = Field(default=0.3, ge=0, description="weight of the single-modality heads")
    dropout: float = Field(default=0.0, ge=0, le=1, description="share of samples that lose one or two modalities")

    def extra(self, domains: int, tail: Params) -> Params:
        return {}

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        present = drop_modalities(batch.present, self.dropout, generator)
        read = tails.read(model.tail, z, present)
        per_head = [
            class_balanced(read.logit[:, v], batch.label, seen)
            for v, seen in enumerate(heads_seen(present).unbind(dim=1))
        ]
        return {"risk": per_head[tails.FUSED], "heads": self.heads * torch.stack(per_head[: tails.FUSED]).sum()}

    def after_step(self, extra: Params) -> None:
        return None


def class_balanced(logit: Tensor, label: Tensor, used: Tensor) -> Tensor:
    """Mean logistic loss per class over the rows in ``used`` [B], then the mean of both: class priors do not matter."""
    per_class = [
        masked_mean(torch.nn.functional.softplus(-logit), used & (label == 1)),
        masked_mean(torch.nn.functional.softplus(logit), used & (label == 0)),
    ]
    return 0.5 * torch.stack(per_class).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B] over mask [B]; zero (with a gradient path) where nothing is selected."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def heads_seen(present: Tensor) -> Tensor:
    """[B, V]: a modality's head has an opinion only where the modality is there; the fused head always."""
    return torch.cat([present, present.any(dim=1, keepdim=True)], dim=1)


def drop_modalities(present: Tensor, share: float, generator: Generator) -> Tensor:
    """Take D, I, both, or RGB away from ``share`` of the samples (odds .25 .25 .25 .1); never the last modality."""
    kept = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    count = present.shape[0]
    pattern = torch.multinomial(torch.tensor([0.25, 0.25, 0.25, 0.1]), count, replacement=True, generator=generator)
    hit = (torch.rand(count, generator=generator) < share)[:, None]
    dropped = present & torch.where(hit, kept[pattern], True).to(present.device)
    return torch.where(dropped.any(dim=1, keepdim=True), dropped, present)
