"""What to learn from labelled domains. One method is one file; this file holds what all of them are scheduled by.

A method file has ``Config``, a subclass of ``Schedule`` with ``kind`` = the module's name. Its methods are the contract:

``extra(domains, tail) -> Params``
    learnable tensors of the objective that are not part of the model (may be empty)
``losses(model, batch, generator) -> dict[str, Tensor]``
    weighted loss terms by name, scalars; ``pipeline.fit`` adds them up and owns the only ``backward()``
``after_step(extra) -> None``
    in-place projection after each optimizer step (may do nothing)
"""

from __future__ import annotations

from pydantic import Field

from pipeline.types import Section


class Schedule(Section):
    """Fields of section ``source`` that every method shares, so that comparisons are fair."""

    kind: str
    steps: int = Field(default=700, ge=1, description="optimizer steps")
    batch: int = Field(default=48, ge=4, description="samples per step over all workers, equal per domain x class")
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    seed: int = 0
    augment: bool = Field(default=True, description="sensor augmentation: gamma, gain, offset, noise, blur, depth flip")
