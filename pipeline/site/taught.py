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
from pipeline.site import reservoir
from pipeline.site.adam import descend
from pipeline.site.trust import sane
from pipeline.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pipeline.site.contract import Params, State
    from pipeline.types import Features

MARGIN = 0.5  # logits on the right side that every taught presentation should reach
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


class Memory(NamedTuple):
    """Labelled presentations as a method learns from them."""

    z: Tensor  # [T, M, F] float32, zero where a sensor was absent
    present: Tensor  # [T, M] bool
    label: Tensor  # [T] 1 bona fide, 0 attack; of an empty slot anything
    weight: Tensor  # [T] sums to 1 with the same mass for both classes; 0 in an empty slot
    needed: Tensor  # [] bool: whether there is something to learn


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


def recall(tail: Params, state: State) -> Memory:
    """Returns the site's memory, and whether it has something to teach the source model ``tail``."""
    label, present = state["taught.label"], state["taught.present"]
    weight = state["taught.weight"] * (label != EMPTY)
    z = torch.where(present[..., None], state["taught.z"].float(), 0.0)
    weight = _balanced(label.float(), weight)
    return Memory(z, present, label.float(), weight, _needed(tail, z, present, label, weight))


def replayed(tail: Params) -> Memory:
    """Returns the labelled source features that ``tail`` carries; one empty slot for a tail without."""
    if "replay.z" not in tail:
        z, no = torch.zeros(1, *tail["site.gamma"].shape), torch.zeros(1)
        return Memory(z, torch.ones(z.shape[:2], dtype=torch.bool), no, no, no.any())
    label = tail["replay.label"].float()
    weight = _balanced(label, torch.ones_like(label))
    return Memory(tail["replay.z"], tail["replay.present"], label, weight, weight.any())


def risk(logit: Tensor, memory: Memory) -> Tensor:
    """Returns the weighted cross entropy [] of logits [T, V]; a present modality's head weighs HEAD."""
    side = torch.where(memory.label == 1, 1.0, -1.0)[:, None]
    each = _heads(memory.present) * torch.nn.functional.softplus(-side * logit)
    return (memory.weight * each.sum(-1)).sum()


def restart(state: State, movable: Params) -> State:
    """Returns the state of a site that serves what its labels taught, in ``movable``, and refers to it."""
    base = {f"base.{n}": movable[n] for n in tails.MOVABLE}
    return {**state, **{n: movable[n] for n in tails.MOVABLE}, **base}


def watch(tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
    """Scores a batch, learns nothing from it, and remembers it where the state has a reservoir."""
    batch = sane(batch)
    score = tails.score(tails.with_site_state(tail, state), batch.z, batch.present)
    if "reservoir.z" in state:
        state = reservoir.remember(state, batch, vote=score, source=score)
    none, zero = torch.full_like(score, EMPTY, dtype=torch.int8), torch.zeros(())
    return state, Outcome(score, none, torch.zeros_like(score), zero + 1, zero, zero > 1)


def learn(tail: Params, state: State, teaching: Teaching) -> Params:
    """Returns the movable tensors that the memory teaches; the source model's own where it is empty."""
    z, present, label, weight, needed = recall(tail, state)
    hold = held(tail)
    side = torch.where(label == 1, 1.0, -1.0)[:, None]
    margin = (side * tails.forward(tail, z, present).logit).clamp(MARGIN, KEPT)  # [T, V]
    heads = _heads(present)

    def loss(learned: Params) -> Tensor:
        params = {**tail, **learned}
        missing = torch.relu(margin - side * tails.forward(params, z, present).logit)
        bent = torch.where(missing < BEND, missing * missing, BEND * (2 * missing - BEND))
        return (weight * (heads * bent).sum(-1)).sum() + teaching.hold * hold(params)

    start = {n: tail[n] for n in tails.LEARNED}
    learned = descend(loss, start, steps=teaching.steps, lr=teaching.lr, clip=1.0, when=needed)
    return {**learned, "pattern": tail["pattern"]}


def _heads(present: Tensor) -> Tensor:
    """Returns the weights [T, V] of the heads: HEAD for those of present modalities, 1 for the fused one."""
    return torch.cat([HEAD * present.float(), torch.ones(len(present), 1)], dim=1)


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
