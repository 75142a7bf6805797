"""Trains like MMDG: single-side prototypes per modality, and gradients balanced between modalities.

The balance of gradients is ReGrad.

Lin et al., "Suppress and Rebalance: Towards Generalized Multi-Modal Face Anti-Spoofing", CVPR 2024 (arXiv
2402.19298): prototypes per modality of {all bona fide, attacks of each domain}; uncertainty of a modality
from Monte Carlo dropout; a gradient modulation that holds the fastest modality back. A reconstruction from
the formulas; the cross-adapters inside the ViT are not here. Our reading: trunks are separate, so the weights
that modalities share are the fusion's (``SHARED``); L_m is the risk of the fused head that sees modality m
alone; U_m = 1 - 2 mean deviation of P(bona fide), 1 when certain; the modulated gradient is the mean of the
modalities' formulas, so that equal directions and certain modalities give the plain sum back. ``fit`` keeps
the only ``backward()``: a term of value zero turns the gradient of sum L_m into that. With several workers,
each keeps prototypes of its own share of the batch and modulates its own gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import head_risks, logistic_loss, mean_over_domains, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params

SHARED = ("fuse.in", "fuse.bias", "fuse.out", *tails.BOUNDARY)
KEEP = 0.8  # share of itself that a prototype keeps when it meets a batch


class Config(SourceMethod):
    """``source.kind: mmdg``."""

    kind: str = "mmdg"
    prototype: float = Field(default=0.3, ge=0, description="weight of the single-side prototypes")
    rebalance: float = Field(
        default=0.3, ge=0, description="weight of the fused risks on one modality and of ReGrad"
    )
    dropout: float = Field(default=0.3, gt=0, lt=1, description="rate of the Monte Carlo dropout")
    passes: int = Field(default=5, ge=2, description="Monte Carlo passes through the heads")

    def extra(self, domains: int, tail: Params) -> Params:
        """Returns zero prototypes [M, 1 + E, D]: bona fide, then attacks per domain; zero means unseen."""
        return {"prototype": torch.zeros(tails.MODALITIES, 1 + domains, tail["intrinsic"].shape[1])}

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        read = tails.forward(model.tail, z, batch.present)
        risk = head_risks(read.logit, batch, batch.present)
        group, prototypes = torch.where(batch.label == 1, 0, 1 + batch.domain), model.extra["prototype"]
        now = update_prototypes(prototypes, read.intrinsic, group, batch.present)
        with torch.no_grad():
            prototypes.copy_(now)
        pull = mean_over_domains(single_side_loss(now, read.intrinsic, group), batch, batch.present).mean()
        pull = pull + 0.0 * prototypes.sum()  # DDP wants every parameter in the graph
        alone = single_modality_risks(model.tail, z, batch)
        certain = certainty(model.tail, read, batch.present, self.dropout, self.passes, generator)
        turn = gradient_correction(model.tail, alone, certain, batch.present.any(dim=0))
        return {
            **risk_terms(self, risk),
            "prototype": self.prototype * pull,
            "rebalance": self.rebalance * (alone.sum() + turn),
        }


def update_prototypes(prototypes: Tensor, intrinsic: Tensor, group: Tensor, present: Tensor) -> Tensor:
    """Returns the moving average of each group's mean feature, without gradient.

    The first mean of a group counts fully.
    """
    member = (
        torch.nn.functional.one_hot(group, prototypes.shape[1])[:, None] * present[..., None]
    )  # [B, M, G]
    size = member.sum(dim=0)[..., None]
    mean = torch.einsum("bmg,bmd->mgd", member.to(intrinsic.dtype), intrinsic.detach()) / size.clamp(min=1)
    old = prototypes.detach()
    fresh = (old == 0).all(dim=-1, keepdim=True)
    return torch.where(size > 0, torch.where(fresh, mean, KEEP * old + (1 - KEEP) * mean), old)


def single_side_loss(prototypes: Tensor, intrinsic: Tensor, group: Tensor) -> Tensor:
    """Returns L_ssp [B, M]: cross entropy of finding the own group's prototype by distance.

    Prototypes that were never seen do not take part.
    """
    distance = tails.norm(intrinsic[:, :, None] - prototypes)  # [B, M, G]
    log_p = torch.log_softmax(torch.where((prototypes != 0).any(dim=-1), -distance, -1e9), dim=-1)
    return -log_p.gather(2, group[:, None, None].expand(-1, tails.MODALITIES, 1))[..., 0]


def single_modality_risks(tail: Params, z: Tensor, batch: Batch) -> Tensor:
    """Returns L_m [M], the risk of the fused head with modality m alone."""
    only = (
        torch.eye(tails.MODALITIES, dtype=torch.bool, device=z.device)[:, None] & batch.present
    )  # [M, B, M]
    logit = tails.forward(tail, z.repeat(tails.MODALITIES, 1, 1), only.flatten(0, 1)).logit[:, tails.FUSED]
    single = logit.unflatten(0, (tails.MODALITIES, -1)).T
    per_row = logistic_loss(single, batch.label[:, None], smoothing=batch.smoothing)
    return mean_over_domains(per_row, batch, batch.present)


def certainty(
    tail: Params, read: tails.TailOutput, present: Tensor, rate: float, passes: int, generator: Generator
) -> Tensor:
    """Returns U [M] in 0..1: one minus twice the deviation of a head's P(bona fide) under dropout."""
    with torch.no_grad():
        keep = torch.rand(passes, *read.intrinsic.shape, generator=generator).to(present.device) >= rate
        intrinsic = (keep * read.intrinsic / (1 - rate)).flatten(0, 1)
        _, radius = tails.radii(tail, intrinsic, read.synergy.repeat(passes, 1, 1))
        p = torch.sigmoid(tails.logit(tail, radius, present.repeat(passes, 1)))[:, : tails.FUSED]
        deviation = p.unflatten(0, (passes, -1)).std(dim=0, correction=0)
        return 1 - 2 * (deviation * present).sum(dim=0) / present.sum(dim=0).clamp(min=1)


def gradient_correction(tail: Params, alone: Tensor, certain: Tensor, present: Tensor) -> Tensor:
    """Returns a zero whose gradient turns that of ``alone.sum()`` into ReGrad's on the shared weights."""
    shared = [tail[n] for n in SHARED if n in tail]
    each = [torch.autograd.grad(risk, shared, retain_graph=True) for risk in alone]
    g = torch.stack(
        [torch.cat([part.flatten() for part in parts]) for parts in each]
    )  # [M, N] of all shared weights
    fast = int(torch.where(present, alone.detach(), torch.inf).argmin())
    change = (regrad(g, certain, fast) - g.sum(dim=0)).split([p.numel() for p in shared])
    return torch.stack(
        [((p - p.detach()).flatten() * c).sum() for p, c in zip(shared, change, strict=True)]
    ).sum()


def regrad(g: Tensor, certain: Tensor, fast: int) -> Tensor:
    """Combines gradients [M, N] into one [N] by ReGrad, with certainty U [M] and the fastest modality.

    The others help a slow modality as far as they are certain; the fastest only helps the others.

    Slow m: g_m + sum_k U_k corr(g_k | g_m). Fast m: U_m corr(g_m | sum_k g_k) + sum_k g_k. Their mean.
    """
    total, terms = g.sum(dim=0), []
    for m, rest in enumerate(total - g):
        others = torch.stack([certain[k] * corr(g[k], g[m]) for k in range(len(g)) if k != m]).sum(dim=0)
        terms.append(certain[m] * corr(g[m], rest) + rest if m == fast else g[m] + others)
    return torch.stack(terms).mean(dim=0)


def corr(b: Tensor, a: Tensor) -> Tensor:
    """Returns the part of b that agrees with a: its projection on a, or, if they conflict, b without it."""
    inner = b @ a
    along = inner / (a @ a).clamp(min=1e-20) * a
    return torch.where(inner > 0, along, b - along)
