"""Stacks, steps, pads and scores K sites at once; it is the only place that knows the axis K.

Shapes are fixed by configuration (K slots, B samples), so the arithmetic of one slot never depends on what
its neighbours hold: their results are bit-equal whatever a hostile site sends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from pipeline.models import tail as tails
from pipeline.site.contract import Selective
from pipeline.types import Features, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from pipeline.site.contract import Params, SiteMethod, State, Taught


class Trace(NamedTuple):
    """The outcomes of one site's N samples in ``run``.

    A quantity of a step is repeated for each sample of the step.
    """

    score: Tensor  # [N] before learning
    pseudo_label: Tensor  # [N] int8
    disagreement: Tensor  # [N] nats
    omega: Tensor  # [N]
    instability: Tensor  # [N]
    restored: Tensor  # [N] bool, True at the first sample of a restoring step


def stack(states: Sequence[State]) -> State:
    """Stacks K states of one site each into one state with the leading axis K."""
    return {name: torch.stack([s[name] for s in states]) for name in states[0]}


def unstack(stacked: State) -> list[State]:
    """Returns the states of a ``stack``; the tensors are copies."""
    count = next(iter(stacked.values())).shape[0]
    return [{name: t[k].clone() for name, t in stacked.items()} for k in range(count)]


def step(method: SiteMethod, tail: Params, stacked: State, batch: Features) -> tuple[State, Outcome]:
    """Steps K sites at once; a slot without valid rows keeps its state.

    The batch has z [K, B, M, F], present [K, B, M], valid [K, B], session [K, B].
    """
    if isinstance(method, Selective):
        seen, lesson = torch.func.vmap(lambda s, b: method.observe(tail, s, b))(stacked, batch)
        learn = bool(lesson.used.any())
        new, outcome = torch.func.vmap(lambda s, x: method.conclude(tail, s, x, learn=learn))(seen, lesson)
    else:
        new, outcome = torch.func.vmap(lambda s, b: method.step(tail, s, b))(stacked, batch)
    idle = ~batch.valid.any(dim=1)
    states = {n: torch.where(idle.view(-1, *[1] * (t.dim() - 1)), stacked[n], t) for n, t in new.items()}
    return {n: t.detach() for n, t in states.items()}, Outcome(*(t.detach() for t in outcome))


def teach(method: Taught, tail: Params, stacked: State, *, slots: int) -> State:
    """Returns the K states after each site learned anew from the labels in its memory; K ≤ slots.

    Slots beyond K are filled with a copy, so that every call has the same shape.
    """
    count = len(next(iter(stacked.values())))
    assert 0 < count <= slots
    spare = torch.arange(slots).clamp(max=count - 1)
    filled = {name: t[spare] for name, t in stacked.items()}
    new = torch.func.vmap(lambda s: method.teach(tail, s))(filled)
    return {n: t[:count].detach() for n, t in new.items()}


def run(
    method: SiteMethod,
    tail: Params,
    stacked: State,
    streams: Sequence[Features],
    *,
    batch: int,
    slots: int,
    on_step: Callable[[State], None] | None = None,
) -> tuple[State, list[Trace]]:
    """Feeds each site its samples in order, ``batch`` at a time: predict, then learn.

    ``stacked`` holds one state per stream.

    ``on_step`` is shown the states after each step. Slots beyond ``len(streams)`` are filled with an idle
    copy, so every step has the shape [slots, batch].
    """
    count = len(streams)
    assert 0 < count <= slots
    spare = torch.arange(slots).clamp(max=count - 1)
    stacked = {name: t[spare] for name, t in stacked.items()}
    empty = Features(*(t[:0] for t in streams[0]))
    parts: list[list[Outcome]] = [[] for _ in streams]
    for start in range(0, max(len(s.z) for s in streams), batch):
        now = [Features(*(t[start : start + batch] for t in s)) for s in streams]
        stacked, outcome = step(method, tail, stacked, pad(now + [empty] * (slots - count), batch))
        if on_step:
            on_step(stacked)
        for k, samples in enumerate(now):
            if len(samples.z):
                parts[k].append(Outcome(*(t[k, : len(samples.z)] if t.dim() > 1 else t[k] for t in outcome)))
    return {name: t[:count] for name, t in stacked.items()}, [_trace(p) for p in parts]


def scores(tail: Params, stacked: State, z: Tensor, present: Tensor) -> Tensor:
    """Returns P(bona fide) [K, N] of the same samples (z [N, M, F], present [N, M]) under K states."""
    movable = {name: stacked[name] for name in tails.MOVABLE}
    with torch.no_grad():
        return torch.func.vmap(lambda s: tails.score({**tail, **s}, z, present))(movable)


def distance(tail: Params, stacked: State, k: int) -> float:
    """Returns |theta_k - theta_0| / |theta_0| of site ``k`` over the movable tensors.

    theta_0 is what people vouch for: the base that the site's labels taught, else the source model.
    """
    base = _base(tail, stacked, k)
    moved = torch.stack([torch.sum((stacked[n][k] - base[n]) ** 2) for n in tails.MOVABLE]).sum()
    size = torch.stack([torch.sum(base[n] ** 2) for n in tails.MOVABLE]).sum()
    return float(torch.sqrt(moved / size))


def moved(tail: Params, stacked: State, k: int, mask: int) -> tuple[float, list[float]]:
    """Returns what of site ``k`` moved: the boundary, and each modality's adapter [M].

    The boundary is that under the sensors of ``mask``, in logits, positive where it loosened since the base
    (what labels taught, else the source model); an adapter's number is its squared change against the source.
    """
    own = {n: stacked[n][k] for n in tails.MOVABLE}
    base = _base(tail, stacked, k)
    rho = [p["log_rho"][tails.FUSED] + p["pattern"][mask] for p in (own, base)]
    now, before = rho if "linear" in tail else [torch.exp(r) for r in rho]
    squares = [(own[n] - tail[n]).square().flatten(1).sum(-1) for n in tails.ADAPTER]
    each = torch.stack([*squares, (own["gate"] - tail["gate"]).square()]).sum(0)
    return float(tails.KAPPA * (now - before)), each.tolist()


def _base(tail: Params, stacked: State, k: int) -> Params:
    """Returns the movable tensors that labels taught site ``k``, else the source model's."""
    return {n: stacked[b][k] if (b := f"base.{n}") in stacked else tail[n] for n in tails.MOVABLE}


def pad(batches: Sequence[Features], size: int) -> Features:
    """Pads one Features per site (at most ``size`` rows) to z [K, size, M, F] and masks.

    The added rows are zero and invalid.
    """
    return Features(*(torch.stack([_fill(t, size) for t in parts]) for parts in zip(*batches, strict=True)))


def _trace(outcomes: Sequence[Outcome]) -> Trace:
    if not outcomes:
        none = torch.zeros(0)
        return Trace(none, none.to(torch.int8), none, none, none, none.bool())
    sizes = torch.tensor([len(o.score) for o in outcomes])

    def spread(values: list[Tensor]) -> Tensor:
        return torch.repeat_interleave(torch.stack(values), sizes)

    first = torch.cat([torch.arange(int(n)) == 0 for n in sizes])
    return Trace(
        torch.cat([o.score for o in outcomes]),
        torch.cat([o.pseudo_label for o in outcomes]),
        torch.cat([o.disagreement for o in outcomes]),
        spread([o.omega for o in outcomes]),
        spread([o.instability for o in outcomes]),
        spread([o.restored for o in outcomes]) & first,
    )


def _fill(t: Tensor, size: int) -> Tensor:
    return torch.cat([t, t.new_zeros(size - t.shape[0], *t.shape[1:])])
