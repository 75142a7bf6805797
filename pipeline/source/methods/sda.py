"""Trains like VIRM: IRMv1 on features that are moved as the samples of their class vary.

Zhu et al., "Invariance Principle Meets Vicinal Risk Minimization", 2024 (arXiv 2407.05765). From the
abstract: invariant risk minimization struggles where domains differ in diversity; a semantic data
augmentation that domains share adds diversity and keeps labels. A reconstruction from the abstract. Our
reading: a sample's vicinity is a Gaussian around its trunk features, with the covariance of its class within
domains, pooled over the domains, so that no direction leads from one domain or class to another; ISDA (Wang
et al., NeurIPS 2019) draws from the covariance of a class, and its strength grows with the schedule as here.
Modalities move together, because their features are one vector. IRMv1 is that of ``irm``, on the moved
features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import head_risks, irm_penalty, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model


class Config(SourceMethod):
    """``source.kind: sda``."""

    kind: str = "sda"
    vicinal: float = Field(default=1.0, ge=0, description="weight of the risk on moved features")
    strength: float = Field(
        default=0.5, ge=0, description="share of its class's covariance by which a sample moves at the end"
    )
    penalty: float = Field(default=10.0, ge=0, description="weight of IRMv1 after the annealing")
    anneal: float = Field(
        default=0.5, ge=0, le=1, description="share of the schedule in which that weight is at most 1"
    )

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        risk = head_risks(tails.forward(model.tail, z, batch.present).logit, batch, batch.present)
        noise = torch.randn(len(z), len(z), generator=generator).to(z.device)
        moved = z + (self.strength * batch.progress) ** 0.5 * vicinal_steps(z.detach(), batch, noise)
        logit = tails.forward(model.tail, moved, batch.present).logit
        weight = self.penalty if batch.progress >= self.anneal else min(1.0, self.penalty)
        return {
            **risk_terms(self, risk),
            "vicinal": self.vicinal * head_risks(logit, batch, batch.present)[tails.FUSED],
            "vicinal_irm": weight * irm_penalty(logit[:, tails.FUSED], batch),
        }


def vicinal_steps(z: Tensor, batch: Batch, noise: Tensor) -> Tensor:
    """Returns a step [B, M, F] per sample, whose covariance over ``noise`` [B, B] is that of its class.

    ``noise`` is standard normal. A normal combination of deviations has their covariance, so no matrix of
    M F x M F is formed. The deviations are those from the mean of a sample's own class and domain, in the
    modalities that it has; a class whose samples are all alone in their domains does not move.
    """
    cell = 2 * batch.domain + batch.label.long()
    peers = (cell[:, None] == cell[None]).to(z.dtype)  # [B, B]
    seen = batch.present[..., None].to(z.dtype)
    z = torch.where(batch.present[..., None], z, 0.0)
    size = torch.einsum("ij,jmf->imf", peers, seen).clamp(min=1)
    deviation = seen * (z - torch.einsum("ij,jmf->imf", peers, z) / size)
    same = (batch.label[:, None] == batch.label[None]).to(z.dtype)
    count = torch.einsum("ij,jmf->imf", same, seen).clamp(min=1)
    return torch.einsum("ij,jmf->imf", noise * same, deviation) / torch.sqrt(count)
