"""Computes the loss terms and risks that more than one source method uses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pipeline.models import tail as tails

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params, SourceMethod

PAIRS = ((0, 1), (0, 2), (1, 2))  # of modalities


def risk_terms(method: SourceMethod, risk: Tensor) -> dict[str, Tensor]:
    """Returns the terms that all methods have, from the risk [V] of every head."""
    return {"risk": risk[tails.FUSED], "heads": method.heads * risk[: tails.FUSED].sum()}


def domain_boundaries(domains: int, tail: Params) -> Params:
    """Returns ``extra`` of a method whose domains own a boundary each: [E, ...] copies of the tail's."""
    return {n: tail[n].detach().expand(domains, *tail[n].shape).clone() for n in tails.BOUNDARY if n in tail}


def with_domain_boundaries(model: Model, batch: Batch) -> Params:
    """Returns the tail in which every sample meets the boundary of its own domain."""
    return {**model.tail, **{n: t[batch.domain] for n, t in model.extra.items() if n in tails.BOUNDARY}}


def pg_irm_step(extra: Params, alpha: float) -> None:
    """Moves each domain's boundary towards the one farthest from it, in place.

    PG-IRM of SA-FAS (Sun et al., CVPR 2023).
    """
    with torch.no_grad():
        for name in (n for n in tails.BOUNDARY if n in extra and len(extra[n]) > 1):
            beta = extra[name]
            row = beta.reshape(*beta.shape[:2], -1)  # [E, V, D], or one number per head
            farthest = (row[:, None] - row[None]).norm(dim=-1).argmax(dim=1)[..., None].expand_as(row)
            beta.copy_((alpha * row + (1 - alpha) * row.gather(0, farthest)).view_as(beta))


def logistic_loss(logit: Tensor, label: Tensor, margin: float = 0.0, smoothing: float = 0.0) -> Tensor:
    """Returns the logistic loss of each logit; ``margin`` (in radii) is asked for on both sides.

    With ``smoothing`` e a label counts as 1 - e of its class and e of the other one.
    """
    signed = torch.where(label == 1, logit, -logit) - tails.KAPPA * margin
    loss = torch.nn.functional.softplus(-signed)
    return loss + smoothing * signed if smoothing else loss  # e softplus(s) = e softplus(-s) + e s


def domain_means(x: Tensor, batch: Batch, used: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean over classes of the class means of x [B, ...] per domain, and where it has rows.

    No class prior matters. Both are [E', ...]; ``used`` [B, ...] selects, zero stands where it selects
    nothing.
    """
    cell = _cells(batch).to(x.dtype)
    used = used.expand(x.shape)
    size = torch.einsum("bc,b...->c...", cell, used.to(x.dtype))
    mean = torch.einsum("bc,b...->c...", cell, torch.where(used, x, 0.0)) / size.clamp(min=1)
    classes = (size > 0).unflatten(0, (-1, 2)).sum(dim=1)
    return mean.unflatten(0, (-1, 2)).sum(dim=1) / classes.clamp(min=1), classes > 0


def mean_over_domains(x: Tensor, batch: Batch, used: Tensor) -> Tensor:
    """Returns the mean of ``domain_means`` over the domains with rows, [...]: no domain's size matters."""
    mean, filled = domain_means(x, batch, used)
    return mean.sum(dim=0) / filled.sum(dim=0).clamp(min=1)


def domain_risks(logit: Tensor, batch: Batch, used: Tensor, margin: float = 0.0) -> Tensor:
    """Returns the logistic risk [E'] of each domain with a row in ``used`` [B]; one zero if there is none."""
    loss = logistic_loss(logit, batch.label, margin, batch.smoothing)
    risk, filled = domain_means(loss, batch, used)
    return risk[filled] if bool(filled.any()) else risk[:1]


def head_risks(logit: Tensor, batch: Batch, present: Tensor, margin: float = 0.0) -> Tensor:
    """Returns [V] the mean over domains of every head's risk, where its modality is ``present`` [B, M]."""
    loss = logistic_loss(logit, batch.label[:, None], margin, batch.smoothing)
    return mean_over_domains(loss, batch, head_mask(present))


def sup_con(
    hidden: Tensor, group: Tensor, temperature: float, *, used: Tensor | None = None, margin: float = 0.0
) -> Tensor:
    """Returns the supervised contrast of the directions of ``hidden`` [B, D] by ``group`` [B].

    SupCon of Khosla et al., NeurIPS 2020.

    Rows of a group have to be closer by ``margin`` (radians) than those of others; ``used`` [B] selects rows.
    """
    u = torch.nn.functional.normalize(hidden, dim=1)
    used = torch.ones_like(group, dtype=torch.bool) if used is None else used
    other = used[:, None] & used[None] & ~torch.eye(len(u), dtype=torch.bool, device=u.device)
    same = (group[:, None] == group[None]) & other
    cosine = u @ u.T
    if margin:
        cosine = torch.where(same, _with_angle_margin(cosine, margin), cosine)
    similarity = (cosine / temperature).masked_fill(~other, -1e9)
    log_p = similarity - torch.logsumexp(similarity, dim=1, keepdim=True)
    per_row = -torch.where(same, log_p, 0.0).sum(dim=1) / same.sum(dim=1).clamp(min=1)
    return masked_mean(per_row, same.any(dim=1))


def irm_penalty(logit: Tensor, batch: Batch) -> Tensor:
    """Returns the squared gradient of each domain's risk by a scale w = 1 of the logit [B], unbiased.

    IRMv1 of Arjovsky et al., 2019.

    The paper multiplies the gradients on two halves of the data. This is the mean over all such splits of
    every class, so no order matters: a product of two classes' means, or of different samples within a class.
    In closed form, because DDP knows no double backward.
    """
    signed = torch.where(batch.label == 1, logit, -logit)
    slope = -signed * torch.sigmoid(-signed)  # d softplus(-w signed) / dw at w = 1
    cell = _cells(batch).to(slope.dtype)
    size, total, squares = cell.sum(dim=0), slope @ cell, (slope * slope) @ cell
    within = (total * total - squares) / (size * (size - 1)).clamp(min=1)
    across = (total / size.clamp(min=1)).unflatten(0, (-1, 2)).prod(dim=1)
    return (0.25 * (within.unflatten(0, (-1, 2)).sum(dim=1) + 2 * across)).mean()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of x [B] over mask [B]; zero (with a gradient path) where nothing is selected."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def head_mask(present: Tensor) -> Tensor:
    """Returns [B, V]: a modality's head counts only where the modality is present; the fused head always."""
    return torch.cat([present, present.any(dim=1, keepdim=True)], dim=1)


def drop_modalities(present: Tensor, share: float, generator: Generator) -> Tensor:
    """Drops D, I, both, or RGB (odds .25 .25 .25 .1) from ``share`` of the samples, never the last one."""
    remaining = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    count = present.shape[0]
    pattern = torch.multinomial(
        torch.tensor([0.25, 0.25, 0.25, 0.1]), count, replacement=True, generator=generator
    )
    hit = (torch.rand(count, generator=generator) < share)[:, None]
    dropped = present & torch.where(hit, remaining[pattern], True).to(present.device)
    return torch.where(dropped.any(dim=1, keepdim=True), dropped, present)


def _cells(batch: Batch) -> Tensor:
    """Returns [B, 2 E'] one-hot: the class and domain in the batch that a row belongs to."""
    domain = batch.domain.unique(return_inverse=True)[1]
    return torch.nn.functional.one_hot(2 * domain + batch.label.long(), 2 * (int(domain.max()) + 1))


def _with_angle_margin(cosine: Tensor, margin: float) -> Tensor:
    """Returns the cosine of the angle plus ``margin``, falling with the angle up to pi.

    ArcFace, Deng et al., CVPR 2019.
    """
    sine = torch.sqrt((1 - cosine * cosine).clamp(min=1e-6))
    wide = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), wide, cosine - margin * math.sin(margin))
