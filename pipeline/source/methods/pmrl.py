"""Trains like PMRL: the modalities of a sample align along one leading direction, without an anchor.

Liu et al., "Principled Multimodal Representation Learning", 2025 (arXiv 2507.17343). From the abstract: full
alignment is a Gram matrix of rank 1, so the dominant singular value of the modalities' representations is
raised by a softmax over the singular values; contrast between the instances' leading eigenvectors prevents
collapse. A reconstruction from the abstract, beside the class-balanced risk that all methods have. Our
reading: the representations are the intrinsic features at unit length; the coefficients by which modalities
form the leading vector get no gradient, because theirs is unbounded where two singular values meet; instances
are contrasted with themselves, so the contrast only keeps them apart. Opposite directions have rank 1 too:
the risk has to tell them apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import head_risks, masked_mean, mean_over_domains, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model

FLOOR = 1e-6  # smallest squared singular value that has a gradient


class Config(SourceMethod):
    """``source.kind: pmrl``."""

    kind: str = "pmrl"
    align: float = Field(default=0.1, ge=0, description="weight of the leading singular value")
    temperature: float = Field(default=0.3, gt=0, description="temperature over the singular values")
    separate: float = Field(default=0.05, ge=0, description="weight of the contrast between samples")
    contrast: float = Field(default=0.1, gt=0, description="temperature of the contrast between samples")

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        read = tails.forward(model.tail, z, batch.present)
        risk = head_risks(read.logit, batch, batch.present)
        unit = unit_rows(read.intrinsic, batch.present)
        several = batch.present.sum(dim=1) > 1
        spread = mean_over_domains(dominance_loss(unit, batch.present, self.temperature), batch, several)
        apart = separation(leading_direction(unit), batch.present.any(dim=1), self.contrast)
        return {**risk_terms(self, risk), "align": self.align * spread, "separate": self.separate * apart}


def unit_rows(intrinsic: Tensor, present: Tensor) -> Tensor:
    """Returns the features [B, M, D] at unit length, zero where a modality is absent."""
    unit = intrinsic / tails.norm(intrinsic)[..., None]
    return torch.where(present[..., None], unit, 0.0)


def dominance_loss(unit: Tensor, present: Tensor, temperature: float) -> Tensor:
    """Returns [B] the cross entropy of the largest singular value among those of the present modalities.

    It is least for parallel features and log k for k orthogonal ones. An absent modality adds a zero to the
    lowest end of the spectrum, which is left out.
    """
    values = torch.linalg.eigvalsh(unit @ unit.mT).clamp(min=FLOOR).sqrt()  # ascending
    order = torch.arange(tails.MODALITIES, device=unit.device)
    counted = order >= tails.MODALITIES - present.sum(dim=1, keepdim=True)
    log_p = torch.log_softmax(torch.where(counted, values / temperature, -1e9), dim=-1)
    return -log_p[:, -1]


def leading_direction(unit: Tensor) -> Tensor:
    """Returns the leading right singular vector [B, D] of each sample, on the side of its modalities."""
    with torch.no_grad():
        coefficient = torch.linalg.eigh(unit @ unit.mT).eigenvectors[..., -1]  # [B, M]
        side = torch.where(coefficient.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    leading = ((side * coefficient)[..., None] * unit).sum(dim=1)
    return leading / tails.norm(leading)[..., None]


def separation(direction: Tensor, used: Tensor, temperature: float) -> Tensor:
    """Returns the mean contrast of each of the ``used`` rows [B] of unit length with itself."""
    both = used[:, None] & used[None]
    similarity = torch.where(both, direction @ direction.T / temperature, -1e9)
    return masked_mean(-torch.log_softmax(similarity, dim=1).diagonal(), used)
