"""Learns from a site's labels by LIRR: invariant representations and invariant risks, with the source beside.

Li et al., "Learning Invariant Representations and Risks for Semi-supervised Domain Adaptation", CVPR 2021.

A reconstruction from the paper's abstract and equations. Its three terms are here: the risk on the labels of
both domains, the distance of the representations, and the gap between the risk of the head that both domains
share and that of heads which know the domain and play against it. What had to change: the site adapter and
the complement gates stand in for the feature extractor, and the labelled source features that a model carries
(``replay.*``) for the source; moments stand in for the domain discriminator, class by class, because a door
shows other shares of the classes than the source; a head that knows its domain is an affine map of each
logit. Only a memory of labels that changes teaches; unlabelled presentations are remembered meanwhile, and
weigh in both classes by the score of the model as it is learned.
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

DOMAINS = 2  # source, site
OWN = ("own.scale", "own.offset")  # of the heads that know the domain


class Config(LabelsAlone):
    """Settings of the baseline."""

    kind: str = "lirr"
    steps: int = Field(default=60, ge=1, description="Adam steps in which a memory is learned anew")
    lr: float = Field(default=3e-3, gt=0, description="learning rate of these steps")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    source: float = Field(default=1.0, ge=0, description="weight of the risk on labelled source features")
    representation: float = Field(
        default=1.0, ge=0, description="weight of the distance between source and site"
    )
    invariance: float = Field(
        default=1.0, ge=0, description="weight of the gap between the shared head's risk and the domains' own"
    )
    reservoir: int = Field(default=32, ge=8, le=256, description="unlabelled samples that a site remembers")
    unlabelled: float = Field(
        default=0.5, ge=0, description="mass of the unlabelled samples beside that of the labels, 1"
    )

    def init(self, tail: Params) -> State:
        """Returns movable tensors, an empty memory of labels and an empty reservoir."""
        return {
            **{k: v.clone() for k, v in tails.site_state(tail).items()},
            **taught.init(self.taught, tail),
            **reservoir.init(self.reservoir, *tail["site.gamma"].shape),
        }

    def teach(self, tail: Params, state: State) -> State:
        """Learns anew from the site's labels, its unlabelled presentations and the source features."""
        here, there = taught.recall(tail, state), taught.replayed(tail)
        start = {n: tail[n] for n in tails.LEARNED}
        start |= {
            "own.scale": torch.ones(DOMAINS, tails.HEADS),
            "own.offset": torch.zeros(DOMAINS, tails.HEADS),
        }
        mass = self.unlabelled * reservoir.filled(state) / reservoir.filled(state).sum().clamp(min=1)
        seen = _Seen(state["reservoir.z"], state["reservoir.present"], mass)
        with torch.no_grad():
            spread = tails.forward(tail, there.z, there.present).hidden.var(dim=0, correction=0).sum() + 1e-6

        def loss(learned: Params) -> Tensor:
            params = {**tail, **{n: learned[n] for n in tails.LEARNED}}
            source, site = (tails.forward(params, m.z, m.present) for m in (there, here))
            pairs = ((source.logit, there), (site.logit, here))
            shared = self.source * taught.risk(*pairs[0]) + taught.risk(*pairs[1])
            scale, offset = (learned[n] for n in OWN)

            def own(a: Tensor, b: Tensor, *, learn: bool) -> Tensor:
                logits = [x.detach() if learn else x for x, _ in pairs]
                risks = [
                    taught.risk(a[d] * x + b[d], m)
                    for d, (x, (_, m)) in enumerate(zip(logits, pairs, strict=True))
                ]
                return self.source * risks[0] + risks[1]

            gap = shared - own(scale.detach(), offset.detach(), learn=False)
            apart = _apart(params, source.hidden, there, site.hidden, here, seen) / spread
            learns_own = own(scale, offset, learn=True)
            return shared + self.invariance * gap + self.representation * apart + learns_own

        new = descend(loss, start, steps=self.steps, lr=self.lr, clip=self.clip, when=here.needed)
        movable = {**{n: new[n] for n in tails.LEARNED}, "pattern": tail["pattern"]}
        return taught.restart(state, movable)


class _Seen(NamedTuple):
    """Unlabelled samples, R of them."""

    z: Tensor  # [R, M, F]
    present: Tensor  # [R, M]
    mass: Tensor  # [R]


def _apart(params: Params, source: Tensor, there: Memory, site: Tensor, here: Memory, seen: _Seen) -> Tensor:
    """Returns the squared distance [] of the fused features' means and deviations, over labelled classes.

    Unlabelled samples weigh in each class by their score, through which no gradient flows.
    """
    out = tails.forward(params, seen.z, seen.present)
    p = torch.sigmoid(out.logit[:, tails.FUSED]).detach()
    hidden = torch.cat([site, out.hidden])
    total = torch.zeros(())
    for c in (0, 1):
        labelled = here.weight * (here.label == c)
        of_class = torch.cat([labelled, seen.mass * (p if c else 1 - p)])
        both = (labelled.sum() > 0) & there.weight.any()
        pairs = zip(
            _moments(source, there.weight * (there.label == c)), _moments(hidden, of_class), strict=True
        )
        total = total + torch.where(both, sum(((a - b) ** 2).sum() for a, b in pairs), 0.0)
    return total


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weighted mean [D] and deviation [D] of features [N, D]."""
    weight = weight / weight.sum().clamp(min=1e-9)
    mean = weight @ x
    return mean, torch.sqrt(weight @ (x - mean) ** 2 + 1e-6)
