"""Learns from a site's labels by MC-LRD: low-rank parts that modalities share, and parts of their own.

Wanyan et al., "Modality-Collaborative Low-Rank Decomposers for Few-Shot Video Domain Adaptation", 2025
(arXiv 2511.18711).

A reconstruction from the paper's abstract: low-rank decomposers per modality whose parameters are partly
shared between modalities, routers that activate them, orthogonality that keeps decomposers apart, and a loss
that asks samples of one class to activate them alike in source and site. What had to change: the decomposers
are the ranks of the site adapter U relu(V z), so that the rectifier is the router; of R ranks the first half
is one matrix for all modalities (the paper shares by degrees), the rest is each modality's own; nothing else
moves. The source is the labelled features that a model carries (``replay.*``). The stream teaches nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site import taught
from pipeline.site.adam import descend
from pipeline.site.contract import LabelsAlone

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.site.contract import Params, State
    from pipeline.site.taught import Memory


class Config(LabelsAlone):
    """Settings of the baseline."""

    kind: str = "mclrd"
    steps: int = Field(default=60, ge=1, description="Adam steps in which a memory is learned anew")
    lr: float = Field(default=3e-3, gt=0, description="learning rate of these steps")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    source: float = Field(default=1.0, ge=0, description="weight of the risk on labelled source features")
    orthogonal: float = Field(
        default=1.0, ge=0, description="weight of the overlap between shared and own parts"
    )
    consistent: float = Field(
        default=0.1, ge=0, description="weight of the difference of activations between source and site"
    )

    def init(self, tail: Params) -> State:
        """Returns movable tensors and an empty memory of labels."""
        return {**{k: v.clone() for k, v in tails.site_state(tail).items()}, **taught.init(self.taught, tail)}

    def teach(self, tail: Params, state: State) -> State:
        """Learns the low-rank parts anew from the site's labels and the source features."""
        here, there = taught.recall(tail, state), taught.replayed(tail)

        def loss(parts: Params) -> Tensor:
            adapter = _adapter(parts)
            params = {**tail, **adapter}
            source, site = (tails.forward(params, m.z, m.present).logit for m in (there, here))
            risk = taught.risk(site, here) + self.source * taught.risk(source, there)
            unlike = _unlike(adapter["site.down"], there, here)
            return risk + self.orthogonal * _overlap(parts) + self.consistent * unlike

        start, when = _parts(tail), here.needed
        learned = _adapter(descend(loss, start, steps=self.steps, lr=self.lr, clip=self.clip, when=when))
        learned = {n: torch.where(here.needed, t, tail[n]) for n, t in learned.items()}
        return taught.restart(state, {**tails.site_state(tail), **learned})


def _parts(tail: Params) -> Params:
    """Returns shared and own parts of a source model's adapter, which is the identity: its U is zero."""
    down, up = tail["site.down"], tail["site.up"]
    shared = down.shape[1] // 2
    return {
        "shared.down": down[:, :shared].sum(dim=0) / math.sqrt(len(down)),  # [R/2, F], as long as one of them
        "shared.up": up[..., :shared].mean(dim=0),  # [F, R/2]
        "own.down": down[:, shared:],  # [M, R/2, F]
        "own.up": up[..., shared:],  # [M, F, R/2]
    }


def _adapter(parts: Params) -> Params:
    """Returns ``site.down`` [M, R, F] and ``site.up`` [M, F, R] of the parts."""
    count = len(parts["own.down"])
    down, up = (parts[f"shared.{n}"].expand(count, -1, -1) for n in ("down", "up"))
    return {
        "site.down": torch.cat([down, parts["own.down"]], dim=1),
        "site.up": torch.cat([up, parts["own.up"]], dim=2),
    }


def _overlap(parts: Params) -> Tensor:
    """Returns the mean squared cosine [] between what a shared and an own decomposer of a modality read."""
    shared, own = (torch.nn.functional.normalize(parts[f"{n}.down"], dim=-1) for n in ("shared", "own"))
    return (own @ shared.mT).square().mean()


def _unlike(down: Tensor, there: Memory, here: Memory) -> Tensor:
    """Returns the squared difference [] of mean activations, over the classes and modalities of both."""
    total = torch.zeros(())
    for c in (0, 1):
        means: list[Tensor] = []
        known: list[Tensor] = []
        for m in (there, here):
            weight = (m.weight * (m.label == c))[:, None] * m.present  # [T, M]
            mass = weight.sum(0)[:, None]
            means.append((weight[..., None] * _activation(down, m)).sum(0) / mass.clamp(min=1e-9))
            known.append(mass > 0)
        total = total + (known[0] & known[1]).mul((means[0] - means[1]) ** 2).mean()
    return total


def _activation(down: Tensor, memory: Memory) -> Tensor:
    """Returns how strongly each sample activates each decomposer, [T, M, R]."""
    normed = torch.nn.functional.layer_norm(memory.z, memory.z.shape[-1:])
    return torch.relu(torch.einsum("...mf,...mrf->...mr", normed, down))
