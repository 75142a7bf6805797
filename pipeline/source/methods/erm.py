"""Minimises the class-balanced logistic loss of all heads: the baseline of every comparison.

The logistic loss of all heads with equal mass per class, no domain label. With ``model.tail.head: linear`` it
is plain cross entropy on a linear head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import drop_modalities, head_mask, logistic_loss, masked_mean, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model


class Config(SourceMethod):
    """``source.kind: erm``."""

    kind: str = "erm"
    dropout: float = Field(
        default=0.0, ge=0, le=1, description="share of samples that lose one or two modalities"
    )

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        present = drop_modalities(batch.present, self.dropout, generator)
        read = tails.forward(model.tail, z, present)
        per_head = [
            class_balanced(
                logistic_loss(read.logit[:, v], batch.label, smoothing=batch.smoothing), batch.label, seen
            )
            for v, seen in enumerate(head_mask(present).unbind(dim=1))
        ]
        return risk_terms(self, torch.stack(per_head))


def class_balanced(loss: Tensor, label: Tensor, used: Tensor) -> Tensor:
    """Returns the mean over classes of the mean ``loss`` over ``used`` rows [B].

    Class priors do not matter.
    """
    per_class = [masked_mean(loss, used & (label == 1)), masked_mean(loss, used & (label == 0))]
    return 0.5 * torch.stack(per_class).sum()
