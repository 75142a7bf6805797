"""Declares what a source method implements, the settings that all share, and the labelled batch.

A method is a module of ``pipeline/source/methods`` with a ``Config``, a subclass of ``SourceMethod`` whose
``kind`` is the module's name. Trunk, tail, augmentation, sampler, schedule, threshold rule and
single-modality heads are the same for all methods. This file imports no torch, so that a configuration is
read at once.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from pydantic import Field

from pipeline.types import Method

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Params = dict[str, Tensor]


class SourceMethod(Method):
    """Section ``source``: the settings that every method shares, and the loss that a method computes.

    Shared settings keep comparisons fair.
    """

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    batch: int = Field(
        default=48, ge=4, description="samples per step over all workers, equal per domain x class"
    )
    lr: float = Field(default=5e-4, gt=0, description="highest learning rate")
    weight_decay: float = Field(default=1e-4, ge=0, description="weight decay of AdamW")
    seed: int = Field(default=0, description="seed of weights, batches and augmentation")
    start: str | None = Field(
        default=None, description="folder of a stored fit to begin from; palisade pretrain makes one"
    )
    augment: bool = Field(
        default=True, description="augment: geometry, gamma, gain, offset, noise, blur, depth flip"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="number format of the trunk in training; auto: bfloat16 where the hardware has it",
    )
    smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="label smoothing: share of a label that counts as the other class",
    )
    heads: float = Field(default=0.3, ge=0, description="weight of the single-modality heads in the risk")

    def extra(self, domains: int, tail: Params) -> Params:
        """Returns learnable tensors of the objective that are not part of the model; none by default.

        One that is named after a tensor of the tail stands in for it during the fit, with a row per domain;
        the model gets the mean.
        """
        return {}

    @abstractmethod
    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """Returns weighted loss terms by name, scalars.

        ``pipeline.source.fit`` adds them up and owns the only ``backward()``.
        """

    def after_step(self, extra: Params) -> None:
        """Projects ``extra`` in place after each optimizer step; does nothing by default."""
        return


class Batch(NamedTuple):
    """A labelled batch, stratified domain x class."""

    frames: Tensor  # [B, 5, H, W] float, augmented and prepared for the trunk, or its stem's maps of them
    present: Tensor  # [B, M] bool
    label: Tensor  # [B] 1 bona fide, 0 attack
    domain: Tensor  # [B] index of the domain
    progress: float  # share of the schedule that is done, for annealing
    smoothing: float = 0.0  # share of a label that counts as the other class


class Model(Protocol):
    """The part of the objective that a method sees."""

    @property
    def tail(self) -> Params: ...
    @property
    def extra(self) -> Params: ...
    def trunk_features(self, frames: Tensor, present: Tensor) -> Tensor: ...
