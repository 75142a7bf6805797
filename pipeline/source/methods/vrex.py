"""Adds V-REx, the variance of the domains' risks.

Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation", ICML 2021 (arXiv 2003.00688):
mean risk of the domains plus a weight times the variance of their risks, weight 1 at first and ``penalty``
later, as in DomainBed (Gulrajani and Lopez-Paz, ICLR 2021). Ours: class means first, the variance on the
fused head only, and no reset of Adam when the weight rises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import domain_risks, head_risks, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model


class Config(SourceMethod):
    """``source.kind: vrex``."""

    kind: str = "vrex"
    penalty: float = Field(default=10.0, ge=0, description="weight of the variance after the annealing")
    anneal: float = Field(
        default=0.5, ge=0, le=1, description="share of the schedule in which the weight is at most 1"
    )

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        logit = tails.forward(model.tail, z, batch.present).logit
        risk = head_risks(logit, batch, batch.present)
        per_domain = domain_risks(logit[:, tails.FUSED], batch, batch.present.any(dim=1))
        weight = self.penalty if batch.progress >= self.anneal else min(1.0, self.penalty)
        return {**risk_terms(self, risk), "variance": weight * per_domain.var(correction=0)}
