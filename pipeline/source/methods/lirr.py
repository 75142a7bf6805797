"""Trains like LIRR: domains share the representation, and no domain gains from a boundary of its own.

Li et al., "Learning Invariant Representations and Risks for Semi-supervised Domain Adaptation", CVPR 2021
(arXiv 2010.04647): the marginal distribution of the representation and the conditional one of the label are
aligned together; the second by the gap between the least risk of a predictor that does not know the domain
and of one that does. A reconstruction for domain generalization: the source domains are the environments.
The paper's target needs two things that a source fit does not have: unlabelled target frames in the batch,
which enter ``energy_distance`` as one more domain, and a few labelled ones, which enter the risks. Our
reading: a domain's predictor is the fused logit plus a linear function of the fused feature; these functions
add up to zero over the domains, so that what helps all domains alike is no gain. The representation descends
the gap and the functions ascend it, as in the paper; the marginals are compared by the energy distance
(Szekely and Rizzo, 2013) instead of an adversary, with equal mass per class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import domain_risks, head_risks, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params

START = 0.1  # deviation of the domains' functions at first: at zero there would be no gap to descend


class Config(SourceMethod):
    """``source.kind: lirr``."""

    kind: str = "lirr"
    gap: float = Field(
        default=0.1, ge=0, description="weight of what domains gain by a predictor of their own"
    )
    align: float = Field(default=0.1, ge=0, description="weight of the distance between domains' features")

    def extra(self, domains: int, tail: Params) -> Params:
        """Returns the domains' linear functions [E, D + 1] of the fused feature, bias last."""
        width = tail["fuse.out"].shape[0] + 1
        drawn = torch.randn(domains, width, generator=torch.Generator().manual_seed(0))
        return {"predictor": START * drawn}

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        read = tails.forward(model.tail, z, batch.present)
        logit, used = read.logit[:, tails.FUSED], batch.present.any(dim=1)
        predictor = model.extra["predictor"]
        gap = invariance_gap(logit, read.hidden, predictor.detach(), batch)
        own = -invariance_gap(logit.detach(), read.hidden.detach(), predictor, batch)
        return {
            **risk_terms(self, head_risks(read.logit, batch, batch.present)),
            "gap": self.gap * gap,
            "predictor": own,
            "align": self.align * energy_distance(read.hidden, batch, used),
        }


def invariance_gap(logit: Tensor, hidden: Tensor, predictor: Tensor, batch: Batch) -> Tensor:
    """Returns how much less the domains risk by a ``predictor`` [E, D + 1] of their own, on average.

    Where the domains are equal it is at most zero, whatever the predictors: the risk is convex, and their
    mean is zero.
    """
    weight = (predictor - predictor.mean(dim=0))[batch.domain]
    own = logit + (weight[:, :-1] * hidden).sum(dim=1) + weight[:, -1]
    used = batch.present.any(dim=1)
    return (domain_risks(logit, batch, used) - domain_risks(own, batch, used)).mean()


def energy_distance(x: Tensor, batch: Batch, used: Tensor) -> Tensor:
    """Returns the mean energy distance between two domains' rows of x [B, D], classes with equal mass.

    It is zero only where they are equally distributed. A domain in which ``used`` [B] lacks a class is left
    out, because what would differ is its classes.
    """
    domain = batch.domain.unique(return_inverse=True)[1]
    cell = torch.nn.functional.one_hot(2 * domain + batch.label.long(), 2 * (int(domain.max()) + 1))
    member = (cell * used[:, None]).to(x.dtype)
    size = member.sum(dim=0)
    mass = (0.5 * member / size.clamp(min=1)).unflatten(1, (-1, 2)).sum(dim=2).T  # [E, B]
    mass = mass[(size > 0).unflatten(0, (-1, 2)).all(dim=1)]
    difference = mass[:, None] - mass[None]
    distance = tails.norm(x[:, None] - x[None])
    total = -torch.einsum("efi,ij,efj->", difference, distance, difference)
    return total / max(1, len(mass) * (len(mass) - 1))
