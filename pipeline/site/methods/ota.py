"""Learns from a site's labels by OTA: prototypes of both classes are moved by optimal transport.

Li et al., "Optimal Transport-Guided Source-Free Adaptation for Face Anti-Spoofing", CVPR 2025
(arXiv 2503.22984).

A reconstruction from the paper's abstract: a model of prototypes, an adaptor that optimal transport guides
without training or with little of it, and geodesic mixup, samples on the way from source prototypes to the
site. What had to change: the prototypes are the labelled source features that a model carries (``replay.*``).
Their transport does not replace the classifier but says where a site's features belong: an affine map per
modality (``site.gamma``, ``site.beta``) brings them there in closed form. A few steps of that map and the
boundary follow, on the source's labels, on the site's and on points along the way. Transport lets go of
source features that nothing of the site resembles: a site shows a few kinds of attack, the source knows many.
A class without labels keeps the source's prototype. The stream teaches nothing; its samples are remembered
and weigh in the transport.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site import reservoir, taught
from pipeline.site.adam import descend
from pipeline.site.contract import LabelsAlone

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.site.contract import Params, State
    from pipeline.site.taught import Memory

ITERATIONS = 30  # of Sinkhorn
FORBIDDEN = 1e3  # cost of a transport to the other class
STOPS = (0.0, 0.5)  # on the way from the site's features to the source's: geodesic mixup


class Config(LabelsAlone):
    """Settings of the baseline."""

    kind: str = "ota"
    reservoir: int = Field(default=32, ge=8, le=256, description="unlabelled samples that a site remembers")
    unlabelled: float = Field(
        default=0.5, ge=0, description="mass of the unlabelled samples beside that of the labels, 1"
    )
    entropy: float = Field(default=0.3, gt=0, description="weight of the transport's entropy, in mean costs")
    let_go: float = Field(
        default=1.0, gt=0, description="weight of the source features' own masses, in mean costs"
    )
    strength: float = Field(default=0.5, ge=0, le=1, description="share of the way that features are moved")
    stiffness: float = Field(
        default=1.0, gt=0, description="of the map's scale against the spread within a class"
    )
    steps: int = Field(default=60, ge=0, description="Adam steps after the transport; 0: without training")
    lr: float = Field(default=1e-2, gt=0, description="learning rate of these steps")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")

    def init(self, tail: Params) -> State:
        """Returns movable tensors, an empty memory of labels and an empty reservoir."""
        return {
            **{k: v.clone() for k, v in tails.site_state(tail).items()},
            **taught.init(self.taught, tail),
            **reservoir.init(self.reservoir, *tail["site.gamma"].shape),
        }

    def teach(self, tail: Params, state: State) -> State:
        """Transports the site's features to the source's, then learns on the way between the two."""
        here, there = taught.recall(tail, state), taught.replayed(tail)
        site = _points(here, state, self.unlabelled)
        moved = _transported(site, there, self.entropy, self.let_go)
        gamma, beta = _affine(site, moved, there, self.stiffness)
        start = {
            "site.gamma": tail["site.gamma"] + self.strength * (gamma - 1),
            "site.beta": tail["site.beta"] + self.strength * beta,
            "log_rho": tail["log_rho"],
        }
        target = moved.z[: len(here.z)]

        def loss(learned: Params) -> Tensor:
            total = taught.risk(tails.forward({**tail, **learned}, there.z, there.present).logit, there)
            for stop in STOPS:
                z = here.z + stop * (target - here.z)
                logit = tails.forward({**tail, **learned}, z, here.present).logit
                total = total + taught.risk(logit, here) / len(STOPS)
            return total

        new = descend(loss, start, steps=self.steps, lr=self.lr, clip=self.clip, when=here.needed)
        learned = {n: torch.where(here.needed, t, tail[n]) for n, t in new.items()}
        return taught.restart(state, {**tails.site_state(tail), **learned})


class _Points(NamedTuple):
    """Features of a site, N of them."""

    z: Tensor  # [N, M, F]
    present: Tensor  # [N, M]
    mass: Tensor  # [N] sums to 1
    bona_fide: Tensor  # [N] share in [0, 1]; -1: not known


def _points(here: Memory, state: State, unlabelled: float) -> _Points:
    """Returns the labelled presentations first, then what the reservoir holds."""
    held = reservoir.filled(state)
    mass = torch.cat([here.weight, unlabelled * held / held.sum().clamp(min=1)])
    present = torch.cat([here.present, state["reservoir.present"]])
    z = torch.cat([here.z, state["reservoir.z"]])
    known = torch.cat([here.label, torch.full_like(held, -1.0)])
    return _Points(torch.where(present[..., None], z, 0.0), present, mass / mass.sum().clamp(min=1e-9), known)


def _transported(site: _Points, there: Memory, entropy: float, let_go: float) -> _Points:
    """Returns where each point of the site belongs among the source features, and its share of bona fide.

    Entropic transport in the logarithmic domain: Sinkhorn's, with one side relaxed as by Chizat et al., 2018.
    The site's masses are kept, those of the source may be given up at ``let_go`` times their divergence.
    """
    both = (site.present[:, None] & there.present[None]).float()  # [N, S, M]
    apart = (site.z[:, None] - there.z[None]).square().mean(-1) * both
    cost = apart.sum(-1) / both.sum(-1).clamp(min=1)
    scale = (site.mass[:, None] * there.weight[None] * cost).sum().clamp(min=1e-6)
    cost = cost / scale
    other = (site.bona_fide[:, None] >= 0) & (site.bona_fide[:, None] != there.label[None])
    cost = cost + FORBIDDEN * other
    log_site, log_source = site.mass.clamp(min=1e-12).log(), there.weight.clamp(min=1e-12).log()
    relaxed = let_go / (let_go + entropy)
    f, g = torch.zeros_like(log_site), torch.zeros_like(log_source)
    for _ in range(ITERATIONS):
        g = -relaxed * torch.logsumexp((log_site + f)[:, None] - cost / entropy, dim=0)
        f = -torch.logsumexp((log_source + g)[None] - cost / entropy, dim=1)
    share = torch.softmax((log_source + g)[None] - cost / entropy, dim=1)  # [N, S] of each point's mass
    z = torch.einsum("ns,smf->nmf", share, there.z)
    return site._replace(z=torch.where(site.present[..., None], z, 0.0), bona_fide=share @ there.label)


def _affine(site: _Points, moved: _Points, there: Memory, stiffness: float) -> tuple[Tensor, Tensor]:
    """Returns the scale [M, F] and offset [M, F] that bring the site's prototypes to where they belong.

    Ridge regression over the two prototypes; a class without labels stands at the source's and stays there.
    """
    before: list[Tensor] = []
    after: list[Tensor] = []
    within = torch.zeros_like(there.z[0])
    for c in (0, 1):
        own = (there.weight * (there.label == c))[:, None] * there.present  # [S, M]
        mean = _mean(there.z, own)
        within = within + _mean((there.z - mean) ** 2, own) / 2
        share = moved.bona_fide if c else 1 - moved.bona_fide
        mass = (site.mass * share)[:, None] * site.present
        known = (site.mass * (site.bona_fide == c)).sum() > 0
        labelled = known & (mass.sum(0) > 0)[:, None]  # [M, 1]
        before.append(torch.where(labelled, _mean(site.z, mass), mean))
        after.append(torch.where(labelled, _mean(moved.z, mass), mean))
    middle, way = (before[0] + before[1]) / 2, [b - a for a, b in zip(before, after, strict=True)]
    shift, half = (way[0] + way[1]) / 2, (before[1] - before[0]) / 2
    stretch = half * (way[1] - way[0]) / 2 / (half**2 + stiffness * within + 1e-6)
    return 1 + stretch, shift - stretch * middle


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the mean [M, F] of x [N, M, F] under weights [N, M]."""
    return (weight[..., None] * x).sum(0) / weight.sum(0).clamp(min=1e-9)[:, None]
