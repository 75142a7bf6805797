"""Adapts by SHOT: information maximisation and centroid pseudo labels under a frozen head.

Liang et al., ICML 2020.

What had to change: the site adapter stands in for the feature extractor; the target is a stream, so the class
centroids are running means instead of one pass over the data per epoch, seeded from the stored source
features where a model carries them; a class nobody was assigned to keeps its centroid. Adam for SGD. Two
classes: the plain diversity term -H(mean prediction) pushes every batch towards half attacks, also at a door
that sees none, so by default the batch's mean is held to the site's own running mean prediction instead. A
radial head reads a length, and attacks lie all around: their mean fused feature says little, so by default
centroids are those of the coordinate the head reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site.adam import adam, moments
from pipeline.site.contract import SiteMethod
from pipeline.site.trust import entropy, sane
from pipeline.types import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.site.contract import Params, State
    from pipeline.types import Features

LEARNED = ("site.gamma", "site.beta", "site.down", "site.up")
PUBLISHED: dict[str, object] = {
    "diversity": "uniform",  # gent
    "centroid": "hidden",
    "spread": 1.0,  # ent_par weighs entropy and diversity together
    "pseudo": 0.3,  # cls_par; the learning rates 1e-3 and 1e-2 are of SGD with a schedule and left out
}


class Config(SiteMethod):
    """Settings of the baseline."""

    kind: str = "shot"
    lr: float = Field(default=1e-3, gt=0, description="learning rate of Adam")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    diversity: Literal["prior", "uniform"] = Field(
        default="prior",
        description="what the mean prediction is held to: the site's own running mean, or one half",
    )
    centroid: Literal["radius", "hidden"] = Field(
        default="radius", description="what the class means are means of"
    )
    spread: float = Field(default=1.0, ge=0, description="weight of the diversity term; 0: off")
    pseudo: float = Field(
        default=0.3, ge=0, description="weight of the cross entropy with the centroids' labels"
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of the running mean prediction, per step")
    memory: float = Field(default=0.99, ge=0, lt=1, description="of a centroid, per sample assigned to it")

    def init(self, tail: Params) -> State:
        """Returns movable tensors, Adam moments, the centroids' sums and weights, and the mean prediction."""
        total, weight = _seed(tail, self.centroid)
        return {
            **{k: v.clone() for k, v in tails.site_state(tail).items()},
            **moments(tail, LEARNED),
            "centroid.sum": total,
            "centroid.weight": weight,
            "prior": torch.zeros(()),
            "counted": torch.zeros((), dtype=torch.bool),
        }

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Scores the batch, labels it by the nearer centroid, learns, then moves prior and centroids."""
        batch = sane(batch)
        some = batch.valid.any()
        before = tails.forward(tails.with_site_state(tail, state), batch.z, batch.present)
        score, direction = torch.sigmoid(before.logit[:, tails.FUSED]), _direction(before, self.centroid)
        label = _nearest(state, direction, score)
        mean = _mean(score, batch.valid)
        prior = torch.where(
            state["counted"], state["prior"], mean
        )  # nothing is learned yet: the source's first calls

        def loss(learned: Params) -> Tensor:
            logit = tails.forward(
                {**tails.with_site_state(tail, state), **learned}, batch.z, batch.present
            ).logit[:, tails.FUSED]
            p = torch.sigmoid(logit)
            sharp = _mean(entropy(p), batch.valid)
            pseudo = _mean(torch.nn.functional.softplus(logit) - label * logit, batch.valid)
            return sharp + self.spread * self._diversity(_mean(p, batch.valid), prior) + self.pseudo * pseudo

        grads = torch.func.grad(loss)({k: state[k] for k in LEARNED})
        state = adam(state, grads, lr=self.lr, clip=self.clip, when=some)
        state = _gather(state, direction, score, label, batch.valid, memory=self.memory)
        moved = torch.where(some, self.momentum * prior + (1 - self.momentum) * mean, state["prior"])
        state = {**state, "prior": moved, "counted": state["counted"] | some}
        used = torch.where(batch.valid, label.to(torch.int8), -1)
        zero = torch.zeros(())
        return state, Outcome(score, used, torch.zeros_like(score), zero + 1, zero, zero > 1)

    def _diversity(self, mean: Tensor, prior: Tensor) -> Tensor:
        """Returns KL(mean prediction || prior) in nats; for one half that is -H(mean) and a constant."""
        p = mean.clamp(1e-6, 1 - 1e-6)
        q = torch.full_like(p, 0.5) if self.diversity == "uniform" else prior.clamp(1e-6, 1 - 1e-6)
        return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def _seed(tail: Params, of: str) -> tuple[Tensor, Tensor]:
    """Returns (sum [2, D + 1], weight [2]) of attacks and bona fide among the source features, else zeros."""
    if "replay.z" not in tail:
        return torch.zeros(2, 1 + (len(tail["fuse.out"]) if of == "hidden" else 1)), torch.zeros(2)
    direction = _direction(tails.forward(tail, tail["replay.z"], tail["replay.present"]), of)
    member = torch.nn.functional.one_hot(tail["replay.label"].long(), 2).to(direction.dtype)
    return member.T @ direction, member.sum(dim=0)


def _direction(read: tails.TailOutput, of: str) -> Tensor:
    """Returns unit vectors [B, D + 1], with D = 1 for a radius.

    The appended one keeps the length in the direction, as in SHOT's code.
    """
    x = read.hidden if of == "hidden" else read.radius[:, tails.FUSED :]
    return torch.nn.functional.normalize(torch.cat([x, torch.ones_like(x[:, :1])], dim=-1), dim=-1)


def _nearest(state: State, direction: Tensor, score: Tensor) -> Tensor:
    """Returns the label [B] of the nearer centroid by cosine, or the model's own call without centroids."""
    centroid = torch.nn.functional.normalize(state["centroid.sum"], dim=-1)
    cosine = direction @ centroid.T
    both = (state["centroid.weight"] > 0).all()
    return torch.where(both, cosine[:, 1] >= cosine[:, 0], score >= 0.5).float()


def _gather(
    state: State, direction: Tensor, score: Tensor, label: Tensor, valid: Tensor, *, memory: float
) -> State:
    """Adds every sample to its label's centroid, weighted by the model's probability of that class."""
    member = torch.stack([1 - label, label], dim=-1) * valid[:, None]
    weight = torch.stack([1 - score, score], dim=-1) * member
    keep = memory ** member.sum(dim=0)
    total = keep[:, None] * state["centroid.sum"] + weight.T @ direction
    return {
        **state,
        "centroid.sum": total,
        "centroid.weight": keep * state["centroid.weight"] + weight.sum(dim=0),
    }


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    return (x * valid).sum() / valid.sum().clamp(min=1)
