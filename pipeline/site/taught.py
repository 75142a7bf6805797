"""Keeps a site's labelled presentations in its state and learns what they teach by supervised steps.

The memory has a fixed size; who is in it is decided where labels are read (``pipeline.control.teaching``).
What a memory teaches follows from the source model and the memory alone: learning starts at the source model
whenever the memory changes, so nothing is forgotten, and a label that was taken back leaves nothing behind.

The loss is a squared hinge on every head's logit, linear far from its margin, so that no single label pulls
without bound. What the source model gets right with a margin keeps that margin: without this, the few that
it gets wrong would drag the many along. Beside it the logits of labelled source features stay where the
source model has them, which holds the attack side where nobody has presented an attack. Our own construction.

Shapes: T slots, M modalities, F features, V heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from pipeline.models import tail as tails
from pipeline.site.adam import adam, moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pipeline.site.contract import Params, State

MARGIN = 1.0  # logits on the right side that every taught presentation should reach
KEPT = 3.0  # logits; a larger margin of the source model need not stay larger
BEND = 2.0  # logits short of the margin from which the loss grows linearly
HEAD = 0.3  # weight of a present modality's own head beside the fused one
WRONG = 2  # labels of a single class that the source model must call the other one
EMPTY = -1


class Teaching(NamedTuple):
    """The strength of what labels teach; the fields of a method's configuration."""

    steps: int  # Adam steps from the source model
    lr: float
    hold: float  # weight of the squared change of the source features' logits


def init(size: int, tail: Params) -> State:
    """Returns an empty memory of T = ``size`` slots and the source model as the base."""
    modalities, features = tail["site.gamma"].shape
    return {
        "taught.z": torch.zeros(size, modalities, features, dtype=torch.float16),
        "taught.present": torch.zeros(size, modalities, dtype=torch.bool),
        "taught.label": torch.full((size,), EMPTY, dtype=torch.int8),
        "taught.weight": torch.zeros(size),
        "taught.digest": torch.zeros((), dtype=torch.int64),
        **{f"base.{n}": tail[n].clone() for n in tails.MOVABLE},
    }


def empty(state: State) -> State:
    """Returns the tensors of an empty memory of the same size as the one in ``state``."""
    mine = {n: torch.zeros_like(t) for n, t in state.items() if n.startswith("taught.")}
    return {**mine, "taught.label": torch.full_like(state["taught.label"], EMPTY)}


def both(state: State) -> Tensor:
    """Returns [] whether the memory holds labels of both classes."""
    label = torch.where(state["taught.weight"] > 0, state["taught.label"], EMPTY)
    return (label == 1).any() & (label == 0).any()


def base(tail: Params, state: State) -> Params:
    """Returns the tail as the site's labels left it, before anything was learned from its stream."""
    return {**tail, **{n: state[f"base.{n}"] for n in tails.MOVABLE}}


def learn(tail: Params, state: State, teaching: Teaching) -> Params:
    """Returns the movable tensors that the memory teaches; the source model's own where it is empty."""
    label, present = state["taught.label"], state["taught.present"]
    weight = state["taught.weight"] * (label != EMPTY)
    z = torch.where(present[..., None], state["taught.z"].float(), 0.0)
    weight = _balanced(label.float(), weight)
    hold, needed = held(tail), _needed(tail, z, present, label, weight)
    start = {n: tail[n] for n in tails.LEARNED}
    now: State = {**start, **moments(tail, tails.LEARNED)}

    side = torch.where(label == 1, 1.0, -1.0)[:, None]
    margin = (side * tails.forward(tail, z, present).logit).clamp(MARGIN, KEPT)  # [T, V]
    heads = torch.cat([HEAD * present.float(), torch.ones(len(label), 1)], dim=1)

    def loss(learned: Params) -> Tensor:
        params = {**tail, **learned}
        missing = torch.relu(margin - side * tails.forward(params, z, present).logit)
        bent = torch.where(missing < BEND, missing * missing, BEND * (2 * missing - BEND))
        return (weight * (heads * bent).sum(-1)).sum() + teaching.hold * hold(params)

    for _ in range(teaching.steps):
        grads = torch.func.grad(loss)({n: now[n] for n in tails.LEARNED})
        now = adam(now, grads, lr=teaching.lr, clip=1.0, when=needed)
    return {**{n: now[n] for n in tails.LEARNED}, "pattern": tail["pattern"]}


def _needed(tail: Params, z: Tensor, present: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Returns [] whether there is something to learn: both classes, or WRONG of one that the source errs on.

    Labels of one class alone always gain by letting the other one in; so they must show that it is needed.
    """
    accepts = tails.forward(tail, z, present).logit[:, tails.FUSED] >= 0
    wrong = ((accepts != (label == 1)) & (weight > 0)).sum()
    classes = torch.stack([((label == c) & (weight > 0)).any() for c in (0, 1)]).sum()
    return (classes == 2) | (wrong >= WRONG)


def _balanced(label: Tensor, weight: Tensor) -> Tensor:
    """Returns weights [T] under which both classes, or the one that is there, weigh the same in all."""
    of_class = torch.stack([weight * (label == 1), weight * (label == 0)])
    total = of_class.sum(-1, keepdim=True)
    classes = (total > 0).sum().clamp(min=1)
    return (of_class / total.clamp(min=1e-9)).sum(0) / classes


def held(tail: Params) -> Callable[[Params], Tensor]:
    """Returns the loss [] that holds the logits of the labelled source features; 0 for a tail without.

    They are shown whole and once more with one modality missing, another one from sample to sample: what a
    site with every sensor learns may not cost what is served when one fails.
    """
    if "replay.z" not in tail:
        return lambda params: torch.zeros(())
    lost = torch.arange(len(tail["replay.z"]))[:, None] % tails.MODALITIES == torch.arange(tails.MODALITIES)
    fewer = tail["replay.present"] & ~lost
    fewer = torch.where(fewer.any(-1, keepdim=True), fewer, tail["replay.present"])
    z, present = tail["replay.z"].repeat(2, 1, 1), torch.cat([tail["replay.present"], fewer])
    before = tails.forward(tail, z, present).logit
    return lambda params: (tails.forward(params, z, present).logit - before).square().mean()
