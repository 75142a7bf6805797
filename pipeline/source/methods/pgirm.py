"""Trains like SA-FAS: domains stay apart in the features and come to share a boundary (PG-IRM).

Sun et al., "Rethinking Domain Generalization for Face Anti-spoofing: Separability and Alignment", CVPR 2023
(arXiv 2303.13662): a supervised contrast keeps (domain, class) groups separate; every domain has its own
classifier, and after each step it is drawn to the one farthest from it; the mean classifies at inference.
Ours: the same for every head of a multi-modal tail, radial or linear, and the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import (
    domain_boundaries,
    head_risks,
    pg_irm_step,
    risk_terms,
    sup_con,
    with_domain_boundaries,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params


class Config(SourceMethod):
    """``source.kind: pgirm``."""

    kind: str = "pgirm"
    angle: float = Field(default=0.1, ge=0, description="weight of the contrast by (domain, class)")
    temperature: float = Field(default=0.1, gt=0, description="temperature of the contrast")
    alpha: float = Field(
        default=0.995, gt=0, le=1, description="share of its own boundary a domain keeps per step"
    )

    def extra(self, domains: int, tail: Params) -> Params:
        return domain_boundaries(domains, tail)

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        read = tails.forward(with_domain_boundaries(model, batch), z, batch.present)
        risk = head_risks(read.logit, batch, batch.present)
        return {
            **risk_terms(self, risk),
            "angle": self.angle * sup_con(read.hidden, 2 * batch.domain + batch.label, self.temperature),
        }

    def after_step(self, extra: Params) -> None:
        """Moves the domains' boundaries towards each other, until one serves all domains (PG-IRM)."""
        pg_irm_step(extra, self.alpha)
