"""Estimates how far a site's scores moved against source validation, from the scores alone.

The fused logits of a site are a mixture: bona fide and attacks as source validation knows them
(``reference.logit``), both moved by ``delta`` and the bona fide spread by ``scale``, in a share that the site
alone knows. ``delta``, ``scale`` and, by expectation maximisation, the share are weighed on a grid by what
they make of the logits seen: no prior of the site is assumed, so a stream of one class says nothing that it
does not know. Only logits of the *source* model are counted: what adaptation does never feeds back. Our own
construction; the share is estimated as by Saerens et al. (2002).

Shapes: P = 2^M sets of present modalities, S grid points, N bins of the logit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from pipeline.models import tail as tails

if TYPE_CHECKING:
    from torch import Tensor

    Params = dict[str, Tensor]
    State = dict[str, Tensor]

PATTERNS = 2**tails.MODALITIES
LOW, WIDTH, BINS = -12.0, 0.5, 40  # logits
DELTAS, SCALES = tuple(0.5 * k for k in range(-6, 7)), (1.0, 2.0, 4.0, 8.0)
SPREAD = 1.0  # logits, how far a boundary moves before anything was seen
BLUR = 1.0  # bins, of the reference's few quantiles
FLOOR = 0.08  # share of any density that is spread evenly: no single score is impossible
EM_STEPS = 2  # per call; the shares are kept between calls


class Tables(NamedTuple):
    """Densities per grid point."""

    attack: Tensor  # [P, S, N]
    bona_fide: Tensor  # [P, S, N]
    crossing: Tensor  # [P] logit of equal errors where nothing has moved, as these bins see it


class Shift(NamedTuple):
    """The estimate from the counts."""

    logit: Tensor  # [P] boundary of equal errors minus the source's; negative where the site scores lower
    evidence: Tensor  # [] nats for any shift against none
    bona_fide: Tensor  # [] samples of the class, in expectation
    attack: Tensor  # []


def init() -> State:
    """Returns empty counts."""
    return {
        "shift.count": torch.zeros(PATTERNS, BINS),
        "shift.share": torch.full((PATTERNS, len(_grid()[0])), 0.5),
    }


@lru_cache(maxsize=4)  # by identity: a source model's reference is never written to
def tables(reference: Tensor) -> Tables:
    """Returns the densities of ``reference.logit`` [P, 2, QUANTILES] at every grid point."""
    delta, scale = _grid()
    middle = reference[:, 1, reference.shape[-1] // 2]
    edges = LOW + WIDTH * torch.arange(BINS + 1.0)
    moved = edges - delta[:, None]  # [S, N + 1], where an edge was before the shift
    spread = middle[:, None, None] + (moved - middle[:, None, None]) / scale[:, None]
    attack = _density(reference[:, 0], moved.expand(PATTERNS, -1, -1))
    bona_fide = _density(reference[:, 1], spread)
    still = int(((delta == 0) & (scale == 1)).nonzero()[0, 0])
    return Tables(attack, bona_fide, _crossing(attack[:, still], bona_fide[:, still]))


@lru_cache(maxsize=4)  # by identity, as above
def affordable(reference: Tensor, share: float) -> Tensor:
    """Returns how far [P] the boundary at logit 0 may loosen, in logits, until ``share`` more attacks pass.

    Of the source's validation attacks, by the quantiles in ``reference`` [P, 2, QUANTILES].
    """
    q = reference[:, 0].contiguous()
    last = q.shape[-1] - 1
    upper = torch.searchsorted(q, torch.zeros(len(q), 1)).clamp(1, last)
    low, high = q.gather(-1, upper - 1), q.gather(-1, upper)
    part = (-low / (high - low).clamp(min=1e-6)).clamp(0, 1)
    level = ((upper - 1 + part)[:, 0] / last - share).clamp(0, 1) * last
    below = level.floor().long().clamp(max=last - 1)[:, None]
    at = q.gather(-1, below) + (level[:, None] - below) * (q.gather(-1, below + 1) - q.gather(-1, below))
    return (-at[:, 0]).clamp(min=0)


def count(state: State, logit: Tensor, pattern: Tensor, weight: Tensor, *, half_life: float) -> State:
    """Adds the source's logits [B] under ``pattern`` [B] with ``weight`` [B]; older counts fade.

    They fade by half in ``half_life`` samples.
    """
    bin_ = ((logit - LOW) / WIDTH).floor().clamp(0, BINS - 1).long()
    cell = (pattern[:, None] == torch.arange(PATTERNS))[:, :, None] & (bin_[:, None] == torch.arange(BINS))[
        :, None, :
    ]
    fade = 0.5 ** (weight.sum() / half_life)
    return {**state, "shift.count": state["shift.count"] * fade + (cell * weight[:, None, None]).sum(0)}


def estimate(state: State, densities: Tables) -> tuple[State, Shift]:
    """Weighs the grid by the counts; returns the state and the shift."""
    seen, share = state["shift.count"], state["shift.share"]
    total = seen.sum(-1, keepdim=True)  # [P, 1]
    gap = densities.bona_fide - densities.attack
    for _ in range(EM_STEPS):
        ratio = densities.bona_fide / torch.addcmul(densities.attack, share[..., None], gap)
        mine = share * torch.einsum("psn,pn->ps", ratio, seen)
        share = (mine + 1) / (total + 2)
    mixed = torch.addcmul(densities.attack, share[..., None], gap)
    likelihood = torch.einsum("psn,pn->s", torch.log(mixed), seen)
    delta, scale = _grid()
    prior = torch.log_softmax(-0.5 * (delta / SPREAD) ** 2 - 0.5 * torch.log2(scale) ** 2, dim=0)
    still = (delta == 0) & (scale == 1)
    moved_by, none = (
        torch.logsumexp(torch.where(mask, prior + likelihood, -torch.inf), 0)
        - torch.logsumexp(torch.where(mask, prior, -torch.inf), 0)
        for mask in (~still, still)
    )
    weight = torch.softmax(prior + likelihood, dim=0)
    attack, bona_fide = (
        torch.einsum("s,psn->pn", weight, d) for d in (densities.attack, densities.bona_fide)
    )
    genuine = ((share * weight).sum(-1) * total[:, 0]).sum()
    shift = Shift(
        _crossing(attack, bona_fide) - densities.crossing, moved_by - none, genuine, total.sum() - genuine
    )
    return {**state, "shift.share": share}, shift


def _grid() -> tuple[Tensor, Tensor]:
    """Returns delta [S] and scale [S]."""
    delta, scale = torch.meshgrid(torch.tensor(DELTAS), torch.tensor(SCALES), indexing="ij")
    return delta.flatten(), scale.flatten()


def _density(quantiles: Tensor, edges: Tensor) -> Tensor:
    """Returns the blurred mass [P, S, N] between ``edges`` [P, S, N + 1] from ``quantiles`` [P, Q].

    The outer bins are open.
    """
    q = quantiles[:, None, :].expand(*edges.shape[:2], -1).contiguous()
    upper = torch.searchsorted(q, edges.contiguous()).clamp(1, q.shape[-1] - 1)
    low, high = q.gather(-1, upper - 1), q.gather(-1, upper)
    part = ((edges - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    below = (upper - 1 + part) / (q.shape[-1] - 1)
    below = torch.cat(
        [torch.zeros_like(below[..., :1]), below[..., 1:-1], torch.ones_like(below[..., :1])], dim=-1
    )
    steps = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-0.5 * (steps / BLUR) ** 2)
    mass = below.diff(dim=-1)
    padded = torch.nn.functional.pad(mass.flatten(0, 1)[:, None], (3, 3), mode="replicate")
    mass = torch.nn.functional.conv1d(padded, (kernel / kernel.sum()).view(1, 1, -1)).view(mass.shape)
    return (1 - FLOOR) * mass / mass.sum(-1, keepdim=True) + FLOOR / mass.shape[-1]


def _crossing(attack: Tensor, bona_fide: Tensor) -> Tensor:
    """Returns the logit [P] with as many bona fide below as attacks above, linear between bins."""
    gap = bona_fide.cumsum(-1) - (1 - attack.cumsum(-1))  # [P, N], rises from below 0 to above it
    at = (gap <= 0).sum(-1).clamp(1, BINS - 1)
    low, high = gap.gather(-1, at[:, None] - 1)[:, 0], gap.gather(-1, at[:, None])[:, 0]
    return LOW + WIDTH * (at + (-low / (high - low).clamp(min=1e-9)).clamp(0, 1))
