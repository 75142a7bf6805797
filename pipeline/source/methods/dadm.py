"""Trains like DADM: mutual information aligns modalities, boundaries and angles align domains.

Yang et al., "DADM: Dual Alignment of Domain and Modality for Face Anti-spoofing", ICCV 2025 (arXiv
2503.00429). From the abstract: a module based on mutual information enhances favourable modalities and
suppresses unfavourable ones, and a dual alignment acts on the hyperplanes of sub-domains and on the angle
margins of modalities. A reconstruction; the paper's code is not used. Our reading: the information between
two modalities is the InfoNCE bound on their intrinsic features (van den Oord et al., 2018) and is maximised;
the odds with which a modality finds its own sample in the others weight its head's risk per sample, without
gradient; hyperplanes are aligned by PG-IRM (Sun et al., CVPR 2023); the angle margin is ArcFace's (Deng et
al., CVPR 2019) in a supervised contrast by class over all domains, in each modality.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import (
    PAIRS,
    domain_boundaries,
    head_mask,
    logistic_loss,
    mean_over_domains,
    pg_irm_step,
    risk_terms,
    sup_con,
    with_domain_boundaries,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params


class Config(SourceMethod):
    """``source.kind: dadm``."""

    kind: str = "dadm"
    mutual: float = Field(default=0.1, ge=0, description="weight of the information between modalities")
    angle: float = Field(default=0.1, ge=0, description="weight of the contrast of directions by class")
    margin: float = Field(default=0.2, ge=0, le=1.5, description="angle margin, radians")
    temperature: float = Field(default=0.1, gt=0, description="temperature of the contrast")
    alpha: float = Field(
        default=0.995, gt=0, le=1, description="share of its own boundary a domain keeps per step"
    )

    def extra(self, domains: int, tail: Params) -> Params:
        return domain_boundaries(domains, tail)

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        read = tails.forward(with_domain_boundaries(model, batch), z, batch.present)
        bound, weight = alignment(read.intrinsic, batch.present, self.temperature)
        each = logistic_loss(read.logit, batch.label[:, None], smoothing=batch.smoothing)
        each = torch.cat([weight * each[:, : tails.FUSED], each[:, tails.FUSED :]], dim=1)
        risk = mean_over_domains(each, batch, head_mask(batch.present))
        angles = [
            sup_con(
                read.intrinsic[:, m],
                batch.label,
                self.temperature,
                used=batch.present[:, m],
                margin=self.margin,
            )
            for m in range(tails.MODALITIES)
        ]
        return {
            **risk_terms(self, risk),
            "mutual": -self.mutual * bound,
            "angle": self.angle * torch.stack(angles).mean(),
        }

    def after_step(self, extra: Params) -> None:
        """Moves the domains' hyperplanes towards each other, until one serves all domains (PG-IRM)."""
        pg_irm_step(extra, self.alpha)


def alignment(intrinsic: Tensor, present: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the mean information between two modalities in nats, and the trust in each [B, M].

    Trust has mean 1 over the present modalities.

    A modality is favourable in a sample when the others recognise it: the probability of the true match, in
    both directions. A modality that is alone keeps weight 1.
    """
    before, after = zip(*PAIRS, strict=True)
    u = torch.nn.functional.normalize(intrinsic, dim=-1).transpose(0, 1)
    both = (present[:, before] & present[:, after]).T  # [P, B]
    log_p = match_log_p(u[list(before)], u[list(after)], both, temperature)
    size = both.sum(dim=1).clamp(min=1)
    bound = size.log() + torch.where(both, log_p, 0.0).sum(dim=1) / size
    match = torch.where(both, log_p.detach().exp(), 0.0)
    trust = torch.stack(
        [match[[m in pair for pair in PAIRS]].sum(dim=0) for m in range(tails.MODALITIES)], dim=1
    )
    mean = trust.sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True).clamp(min=1)
    return bound.mean(), torch.where(mean > 0, trust / mean.clamp(min=1e-12), 1.0)


def match_log_p(u: Tensor, v: Tensor, both: Tensor, temperature: float) -> Tensor:
    """Returns the mean log probability [..., B] of finding a row's partner among ``both`` by cosine.

    The mean is taken over both directions.

    ``u``, ``v`` are [..., B, D] of unit length. Its mean plus log n is the InfoNCE bound on the mutual
    information.
    """
    similarity = torch.where(both[..., None] & both[..., None, :], u @ v.mT / temperature, -1e9)
    log_p = torch.log_softmax(similarity, dim=-1) + torch.log_softmax(similarity, dim=-2)
    return 0.5 * log_p.diagonal(dim1=-2, dim2=-1)
