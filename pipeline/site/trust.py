"""Decides which samples of an unlabelled stream may teach, and combines their gradients robustly.

The vote is MFAS-DANet-style (a reconstruction, see ``pipeline/site/README.md``); prototypes, conformal
acceptance, influence caps and medians of means are our own additions, each of which ``danet`` can switch.

Shapes: B samples, M modalities, V = M + 1 heads, R source features kept with the model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pipeline.models import tail as tails

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.types import Features

    Params = dict[str, Tensor]
    State = dict[str, Tensor]

SUBSTITUTED = 0.2  # extra uncertainty of a head that reads a substituted modality
SHARPNESS = 0.2  # temperature of the vote
REMEMBERED = 16  # sessions whose samples are still counted
LARGEST = 1e4  # no trunk feature comes near; its square still sums without overflow


def sane(batch: Features) -> Features:
    """Turns broken rows into padding and absent values into zero.

    A row is broken if a present modality holds a value beyond ``LARGEST`` or one that is not finite.
    """
    clean = torch.where(batch.present[..., None], batch.z, 0.0)
    ok = (clean.abs() <= LARGEST).all(-1).all(-1) & batch.present.any(-1)  # a NaN compares False
    valid = batch.valid & ok
    return batch._replace(z=torch.where(valid[:, None, None], clean, 0.0), valid=valid)


def entropy(p: Tensor) -> Tensor:
    """Returns the binary entropy in nats, with a finite gradient at 0 and 1."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -p * torch.log(p) - (1 - p) * torch.log1p(-p)


def vote(p: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the uncertainty-weighted vote [B] of the heads' ``p`` [B, V], and their disagreement [B].

    Disagreement is the weighted Jensen-Shannon divergence in nats.
    """
    substituted = torch.cat([~present, torch.zeros_like(present[:, :1])], dim=-1)
    uncertainty = (entropy(p) / math.log(2) + SUBSTITUTED * substituted).clamp(max=1)
    weight = torch.softmax(-uncertainty / SHARPNESS, dim=-1)
    voted = (weight * p).sum(-1)
    return voted, (entropy(voted) - (weight * entropy(p)).sum(-1)).clamp(min=0)


def unanimous(p: Tensor, present: Tensor) -> Tensor:
    """Returns [B], True where every present modality's head and the fused one say bona fide."""
    return ((p[:, : tails.FUSED] >= 0.5) | ~present).all(-1) & (p[:, tails.FUSED] >= 0.5)


def prototype(tail: Params, hidden: Tensor) -> Tensor:
    """Returns the label [B] of the source feature whose fused direction is nearest to ``hidden`` [B, D].

    The direction never enters the score, so this is a second opinion (RiSe-style angles keep what a radius
    drops).
    """
    source = tails.forward(tail, tail["replay.z"], tail["replay.present"]).hidden
    alike = torch.nn.functional.normalize(hidden, dim=-1) @ torch.nn.functional.normalize(source, dim=-1).T
    return tail["replay.label"][alike.argmax(-1)]


def conformal(reference: Tensor, logit: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Returns p-values (attack [B], bona fide [B]) of source logits [B] from ``reference.logit``.

    One-sided, towards the other class (Vovk et al. 2005): the share of validation samples of the class that
    look at least as much like the other one. Exchangeable with source validation only; a shifted site makes
    them a score, not a guarantee.
    """
    q = reference[pattern]  # [B, 2, Q]
    return (q[:, 0] >= logit[:, None]).float().mean(-1), (q[:, 1] <= logit[:, None]).float().mean(-1)


def remember_sessions() -> State:
    """Returns the state before any session was seen."""
    return {
        "session.id": torch.full((REMEMBERED,), -1, dtype=torch.int64),
        "session.count": torch.zeros(REMEMBERED, dtype=torch.int64),
        "session.next": torch.zeros((), dtype=torch.int64),
        "session.seen": torch.zeros((), dtype=torch.int64),
    }


def capped(state: State, batch: Features, *, cap: int) -> tuple[State, Tensor]:
    """Counts the batch's sessions; returns [B], True among the first ``cap`` samples of a session."""
    ids, counts, at, seen = (state[f"session.{k}"] for k in ("id", "count", "next", "seen"))
    slots = torch.arange(REMEMBERED)
    within: list[Tensor] = []
    for i in range(batch.valid.shape[0]):
        same = ids == batch.session[i]
        fresh = batch.valid[i] & ~same.any()
        same = torch.where(fresh, slots == at, same)
        ids = torch.where(same & batch.valid[i], batch.session[i], ids)
        counts = torch.where(fresh & same, 0, counts) + (same & batch.valid[i])
        within.append(batch.valid[i] & ((counts * same).sum() <= cap))
        at, seen = torch.where(fresh, (at + 1) % REMEMBERED, at), seen + fresh
    sessions = {"session.id": ids, "session.count": counts, "session.next": at, "session.seen": seen}
    return {**state, **sessions}, torch.stack(within)


def median_of_means(each: Params, weight: Tensor, session: Tensor, *, groups: int) -> Params:
    """Returns the coordinate-wise median over ``groups`` of sessions of the samples' mean gradients.

    A group's mean weighs its samples by ``weight`` [B] and divides by how many have any. What fewer than half
    of the groups say cannot move the median (Lugosi & Mendelson, 2019). Groups without a sample do not count.
    """
    member = (session % groups == torch.arange(groups)[:, None]) & (weight > 0)  # [G, B]
    share = weight * member / member.sum(-1, keepdim=True).clamp(min=1)
    flat = torch.cat([g.reshape(len(weight), -1) for g in each.values()], dim=-1)  # [B, P]
    means = share @ flat
    filled = member.any(-1)
    middle = ((filled.sum() - 1) // 2).clamp(min=0)
    ranked = _ranked(torch.where(filled[:, None] & torch.isfinite(means), means, torch.inf))
    chosen = torch.where((torch.arange(groups) == middle)[:, None] & torch.isfinite(ranked), ranked, 0.0).sum(
        0
    )
    parts = chosen.split([g[0].numel() for g in each.values()])
    return {name: part.view(each[name].shape[1:]) for name, part in zip(each, parts, strict=True)}


def _ranked(x: Tensor) -> Tensor:
    """Sorts ``x`` [G, P] along the few G by odd-even transposition of whole rows.

    It takes an eighth of the time of sort.
    """
    rows = list(x.unbind(0))
    for start in range(len(rows)):
        for i in range(start % 2, len(rows) - 1, 2):
            rows[i], rows[i + 1] = torch.minimum(rows[i], rows[i + 1]), torch.maximum(rows[i], rows[i + 1])
    return torch.stack(rows)
