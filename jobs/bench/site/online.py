"""One site method on one labelled stream: scored before it learns, counted at the source's threshold.

Labels are read here only, to count; no method sees one. Rates are in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.models import tail as tails
from pipeline.site import bank
from pipeline.stats import metrics
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.site.contract import Params, SiteMethod, State

WINDOW = 100  # samples a point of a timeline looks at
POINTS = 60  # of a timeline
LONGER = 1.5  # times as long as the shortest of those it is stepped together with, at most
SLOTS = 16  # streams stepped together


@dataclass(frozen=True)
class Stream:
    """Labelled samples of one site in order, N of them."""

    name: str
    features: Features
    label: NDArray[np.int64]  # [N]
    pai: NDArray[np.str_]  # [N]
    poison: NDArray[np.bool_]  # [N] placed there to be learned from
    changes: tuple[int, ...] = ()  # positions at which something changes for good
    probe: str | None = None  # name of the Stream, never learned from, that counts errors afterwards


class Rates(NamedTuple):
    """Errors at the source's threshold; NaN for a class that is missing."""

    hter: float
    bpcer: float
    max_apcer: float
    worst_species: str


@dataclass(frozen=True)
class Course:
    """What one method did on one stream."""

    score: NDArray[np.float32]  # [N] before learning
    pseudo_label: NDArray[np.int8]  # [N] -1: not used
    online: Rates
    source_after: Rates  # on source validation, by the state at the end: what was forgotten
    probe_after: Rates | None
    shift: NDArray[np.float32]  # [steps] logits by which the boundary of complete captures moved
    stopped_after: float  # poisoned samples until what serves last changed; inf: it went on


def rates(
    score: NDArray[np.floating], label: NDArray[np.int64], pai: NDArray[np.str_], threshold: float
) -> Rates:
    """HTER, BPCER and the worst species' APCER; small species are counted together as everywhere."""
    names, _ = metrics.merge_small(pai, label, min(metrics.MIN_SPECIES, 10))
    worst, top = metrics.max_apcer(metrics.apcer_by_species(score, label, names, threshold))
    return Rates(
        metrics.hter(score, label, threshold), metrics.bpcer(score, label, threshold).rate, top, worst
    )


def run(
    method: SiteMethod,
    tail: Params,
    streams: Sequence[Stream],
    probes: Mapping[str, Stream],
    *,
    batch: int,
    threshold: float,
    source: Stream | None = None,
    on_stream: Callable[[int], None] | None = None,
) -> dict[str, Course]:
    """Every stream from the source model's own state; ``source`` is its labelled validation."""
    found: dict[str, Course] = {}
    for part in _alike(streams):
        stacked = bank.stack([method.init(tail) for _ in part])
        history: list[State] = []
        states, traces = bank.run(
            method,
            tail,
            stacked,
            [s.features for s in part],
            batch=batch,
            slots=len(part),
            on_step=lambda state, kept=history: kept.append({n: state[n] for n in tails.MOVABLE}),
        )
        for k, (stream, trace) in enumerate(zip(part, traces, strict=True)):
            own = {n: t[k : k + 1] for n, t in states.items()}
            steps = history[: -(-len(stream.label) // batch)]
            score = trace.score.numpy()
            found[stream.name] = Course(
                score,
                trace.pseudo_label.numpy(),
                rates(score, stream.label, stream.pai, threshold),
                _afterwards(tail, own, source, threshold) or Rates(math.nan, math.nan, math.nan, ""),
                _afterwards(tail, own, probes.get(stream.probe or ""), threshold),
                np.array([_threshold_shift(tail, h, k) for h in steps], np.float32),
                _stopped(tail, steps, k, stream.poison, batch),
            )
        if on_stream:
            on_stream(len(found))
    return found


def timeline(
    score: NDArray[np.floating], label: NDArray[np.int64], pai: NDArray[np.str_], threshold: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(position, BPCER, max APCER) [POINTS] in windows of WINDOW samples; NaN where a class is missing."""
    n = len(label)
    at = np.linspace(min(WINDOW, n) / 2, n - min(WINDOW, n) / 2, min(POINTS, max(1, n // 10)))
    rows = [slice(max(0, int(p - WINDOW / 2)), int(p + WINDOW / 2)) for p in at]
    each = [rates(score[r], label[r], pai[r], threshold) for r in rows]
    return at, np.array([e.bpcer for e in each]), np.array([e.max_apcer for e in each])


def recovery(
    score: NDArray[np.floating],
    label: NDArray[np.int64],
    threshold: float,
    change: int,
    *,
    within: float = metrics.HARM,
) -> float:
    """Samples after ``change`` until the error of the last WINDOW is back within ``within`` of what it was
    before.

    NaN where a class is missing before it; infinite if it does not come back.
    """
    before = metrics.hter(score[:change], label[:change], threshold)
    if math.isnan(before):
        return math.nan
    for end in range(change + WINDOW, len(label) + 1, WINDOW // 4):
        now = metrics.hter(score[end - WINDOW : end], label[end - WINDOW : end], threshold)
        if now <= before + within:
            return float(end - change)
    return math.inf


def degenerate(
    method: SiteMethod, tail: Params, *, batch: int, sites: int = 4, steps: int = 3
) -> dict[str, str]:
    """What the last slot of a bank was given → "bit-equal and finite" for the other slots and all states, or
    what was not.
    """
    random = torch.Generator().manual_seed(0)
    shape = (steps, sites, batch, *tail["site.gamma"].shape)
    z = tail["replay.z"][torch.randint(len(tail["replay.z"]), shape[:3], generator=random)]
    present = torch.ones(shape[:4], dtype=torch.bool)
    valid, session = present[..., 0].clone(), torch.arange(steps * sites * batch).view(shape[:3])
    start = bank.stack([method.init(tail) for _ in range(sites)])
    poison = {"NaN": math.nan, "infinite": math.inf, "constant": 1.0, "all black": 0.0, "one sample": 0.0}

    def run_on(value: float | None, *, single: bool) -> State:
        state = start
        for at in range(steps):
            given = Features(z[at].clone(), present[at], valid[at].clone(), session[at])
            if value is not None:
                given.z[-1] = z[at, -1] if single else value
            given.valid[-1, 1:] &= not single
            state, _ = bank.step(method, tail, state, given)
        return state

    clean = run_on(None, single=False)
    found: dict[str, str] = {}
    for name, value in poison.items():
        state = run_on(value, single=name == "one sample")
        same = all(torch.equal(state[n][:-1], clean[n][:-1]) for n in clean)
        finite = all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())
        found[name] = (
            "bit-equal and finite" if same and finite else "not finite" if same else "a neighbour changed"
        )
    return found


def precision(pseudo_label: NDArray[np.int8], label: NDArray[np.int64], value: int) -> tuple[int, int]:
    """(right, used) pseudo labels of the class ``value``."""
    used = pseudo_label == value
    return int((label[used] == value).sum()), int(used.sum())


def _alike(streams: Sequence[Stream]) -> list[list[Stream]]:
    """At most SLOTS streams together, none much longer than another: a slot that has ended is computed all
    the same.
    """
    parts: list[list[Stream]] = []
    for s in sorted(streams, key=lambda s: len(s.label)):
        if not parts or len(parts[-1]) == SLOTS or len(s.label) > LONGER * len(parts[-1][0].label):
            parts.append([])
        parts[-1].append(s)
    return parts


def _afterwards(tail: Params, own: State, stream: Stream | None, threshold: float) -> Rates | None:
    if stream is None:
        return None
    score = bank.scores(tail, own, stream.features.z, stream.features.present)[0].numpy()
    return rates(score, stream.label, stream.pai, threshold)


def _threshold_shift(tail: Params, state: State, k: int) -> float:
    """Logits by which the fused boundary of complete captures lies above the source's; below 0: more is
    accepted.
    """
    full = 2**tails.MODALITIES - 1
    now, then = (
        float(s["log_rho"][..., tails.FUSED] + s["pattern"][..., full])
        for s in ({n: state[n][k] for n in ("log_rho", "pattern")}, tail)
    )
    return tails.KAPPA * (then - now if "linear" in tail else math.exp(then) - math.exp(now))


def _stopped(tail: Params, steps: Sequence[State], k: int, poison: NDArray[np.bool_], batch: int) -> float:
    """Poisoned samples seen up to the last step that changed what serves; 0: nothing moved after the first of
    them.
    """
    if not poison.any():
        return math.nan
    first = int(np.flatnonzero(poison)[0]) // batch
    last = -1
    for i in range(max(first, 1), len(steps)):
        if any(not torch.equal(steps[i][n][k], steps[i - 1][n][k]) for n in tails.MOVABLE):
            last = i
    if last < 0:
        return 0.0
    return math.inf if last == len(steps) - 1 else float(poison[: (last + 1) * batch].sum())
