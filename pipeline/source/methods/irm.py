"""Adds IRMv1, which asks for the same best scale of the logit in every domain.

Arjovsky et al., "Invariant Risk Minimization", 2019 (arXiv 1907.02893): mean risk of the domains plus a
penalty on the gradient of each domain's risk by a scale of the logit, weight 1 at first and ``penalty``
later, as in DomainBed (Gulrajani and Lopez-Paz, ICLR 2021). Ours: class means first, the fused head only, and
no rescaling when the weight rises. The authors' code divides the loss by the weight and DomainBed resets
Adam; Adam's memory of squared gradients is as long as a schedule here, so a division would cut the rate on
the risk for the rest of the fit, and the gradient's clip is what bounds the jump.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import head_risks, irm_penalty, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model


class Config(SourceMethod):
    """``source.kind: irm``."""

    kind: str = "irm"
    penalty: float = Field(default=10.0, ge=0, description="weight of the penalty after the annealing")
    anneal: float = Field(
        default=0.5, ge=0, le=1, description="share of the schedule in which the weight is at most 1"
    )

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        logit = tails.forward(model.tail, z, batch.present).logit
        risk = head_risks(logit, batch, batch.present)
        weight = self.penalty if batch.progress >= self.anneal else min(1.0, self.penalty)
        return {**risk_terms(self, risk), "irm": weight * irm_penalty(logit[:, tails.FUSED], batch)}
