"""Trains like CTNet: transitions between modalities are alike among bona fide, unlike in attacks.

Chong et al., "Multi-Modal Face Anti-Spoofing via Cross-Modal Feature Transitions", 2025 (arXiv 2507.05575).
From the abstract: consistent transitions between modalities among live samples, inconsistent ones between
live and spoof, and infrared and depth features learned from RGB against missing modalities. A reconstruction
from the abstract. Our reading: a transition is the direction of the difference of two modalities' intrinsic
features; live ones are drawn to their mean over domains, attacks are kept a cosine margin away from it; the
auxiliary features are the tail's complement when RGB alone is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import PAIRS, head_risks, mean_over_domains, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params

RGB = 0


class Config(SourceMethod):
    """``source.kind: ctnet``."""

    kind: str = "ctnet"
    consistency: float = Field(default=0.3, ge=0, description="weight of equal transitions among bona fide")
    inconsistency: float = Field(default=0.3, ge=0, description="weight of other transitions in attacks")
    margin: float = Field(
        default=0.5, ge=0, le=1, description="cosine distance of attacks from the live transition"
    )
    auxiliary: float = Field(default=0.3, ge=0, description="weight of infrared and depth features from RGB")

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        read = tails.forward(model.tail, z, batch.present)
        risk = head_risks(read.logit, batch, batch.present)
        consistent, inconsistent = transition_terms(read.intrinsic, batch, self.margin)
        return {
            **risk_terms(self, risk),
            "consistency": self.consistency * consistent,
            "inconsistency": self.inconsistency * inconsistent,
            "auxiliary": self.auxiliary * rgb_prediction_loss(model.tail, z, batch.present),
        }


def transitions(intrinsic: Tensor) -> Tensor:
    """Returns unit vectors [B, P, D] from modality k to modality m, for each pair k < m."""
    before, after = zip(*PAIRS, strict=True)
    step = intrinsic[:, after] - intrinsic[:, before]
    return step / tails.norm(step)[..., None]


def transition_terms(intrinsic: Tensor, batch: Batch, margin: float) -> tuple[Tensor, Tensor]:
    """Returns the two transition terms: distance of bona fide from the live transition, hinge of attacks.

    The hinge is the amount by which attacks come closer to the live transition than ``margin``.
    """
    step = transitions(intrinsic)
    both = torch.stack([batch.present[:, k] & batch.present[:, m] for k, m in PAIRS], dim=1)  # [B, P]
    live = both & (batch.label == 1)[:, None]
    with torch.no_grad():
        mean = mean_over_domains(step, batch, live[..., None])  # [P, D]
        centre = torch.nn.functional.normalize(mean, dim=-1)
    distance = 1 - (step * centre).sum(dim=-1)  # [B, P]
    consistent = mean_over_domains(distance, batch, live)
    inconsistent = mean_over_domains(torch.relu(margin - distance), batch, both & ~live)
    return consistent.mean(), inconsistent.mean()


def rgb_prediction_loss(tail: Params, z: Tensor, present: Tensor) -> Tensor:
    """Returns 1 - cosine of the other present modalities' features and their prediction from RGB alone.

    The features themselves get no gradient.
    """
    alone = present & (torch.arange(tails.MODALITIES, device=z.device) == RGB)
    predicted = tails.complete(tail, tails.apply_adapter(tail, z, alone), alone).complement
    gap = 1 - torch.nn.functional.cosine_similarity(predicted, z.detach(), dim=-1)
    predictable = present & present[:, [RGB]] & ~alone
    return (torch.where(predictable, gap, 0.0).sum(dim=0) / predictable.sum(dim=0).clamp(min=1)).sum()
