"""Runs one site method on labelled streams: scored before it learns, counted at the source's threshold.

Labels are read here only, to count; no method sees one. Rates are in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.data.features import mask_to_bool
from pipeline.models import tail as tails
from pipeline.site import bank
from pipeline.stats import metrics
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.site.contract import Params, SiteMethod, State

WINDOW = 100  # samples a point of a timeline looks at
POINTS = 60  # of a timeline
LONGER = 1.5  # times as long as the shortest of those it is stepped together with, at most
SLOTS = 16  # streams stepped together
SOUND = "bit-equal and finite"  # what a degenerate batch leaves of its neighbours


@dataclass(frozen=True)
class Stream:
    """Labelled samples of one site in order, N of them."""

    z: np.ndarray  # [N, M, F] features
    present: np.ndarray  # [N] uint8, a bit per modality
    session: np.ndarray  # [N]
    label: np.ndarray  # [N] 1 bona fide, 0 attack
    pai: np.ndarray  # [N] species
    poison: np.ndarray  # [N] bool, placed there to be learned from
    changes: tuple[int, ...] = ()  # positions at which something changes for good
    probe: str | None = None  # name of the stream, never learned from, that counts errors afterwards

    @cached_property
    def features(self) -> Features:
        """The samples as a method sees them."""
        z, present = torch.from_numpy(self.z.astype(np.float32)), torch.from_numpy(mask_to_bool(self.present))
        return Features(z, present, torch.ones(len(z), dtype=torch.bool), torch.from_numpy(self.session))


class Rates(NamedTuple):
    """Errors at the source's threshold; NaN for a class that is missing."""

    hter: float
    bpcer: float
    max_apcer: float
    worst_species: str


@dataclass(frozen=True)
class Course:
    """What one method did on one stream."""

    score: np.ndarray  # [N] before learning
    pseudo_label: np.ndarray  # [N] int8, -1: not used
    online: Rates
    source_after: Rates | None  # on source validation, by the state at the end: what was forgotten
    probe_after: Rates | None
    shift: np.ndarray  # [steps] logits by which the boundary of complete captures moved
    stopped_after: float  # poisoned samples until what serves last changed; inf: it went on


def rates(score: np.ndarray, label: np.ndarray, pai: np.ndarray, threshold: float) -> Rates:
    """Returns HTER, BPCER and the worst species' APCER; small species are counted together as everywhere."""
    names, _ = metrics.merge_small(pai, label, min(metrics.MIN_SPECIES, 10))
    worst, top = metrics.max_apcer(metrics.apcer_by_species(score, label, names, threshold))
    bpcer = metrics.bpcer(score, label, threshold).rate
    return Rates(metrics.hter(score, label, threshold), bpcer, top, worst)


def run(
    method: SiteMethod,
    tail: Params,
    streams: Mapping[str, Stream],
    probes: Mapping[str, Stream],
    *,
    batch: int,
    threshold: float,
    source: Stream | None = None,
) -> dict[str, Course]:
    """Runs every stream from the source model's own state; ``source`` is its labelled validation."""
    courses: dict[str, Course] = {}
    for names in _alike(streams):
        history: list[State] = []
        states, traces = bank.run(
            method,
            tail,
            bank.stack([method.init(tail) for _ in names]),
            [streams[n].features for n in names],
            batch=batch,
            slots=len(names),
            on_step=lambda state, steps=history: steps.append({n: state[n] for n in tails.MOVABLE}),
        )
        for k, (name, trace) in enumerate(zip(names, traces, strict=True)):
            s, own = streams[name], {n: t[k : k + 1] for n, t in states.items()}
            steps = [{n: t[k] for n, t in step.items()} for step in history[: -(-len(s.label) // batch)]]
            courses[name] = Course(
                score=trace.score.numpy(),
                pseudo_label=trace.pseudo_label.numpy(),
                online=rates(trace.score.numpy(), s.label, s.pai, threshold),
                source_after=_afterwards(tail, own, source, threshold),
                probe_after=_afterwards(tail, own, probes.get(s.probe or ""), threshold),
                shift=np.array([_shift(tail, step) for step in steps], np.float32),
                stopped_after=_stopped(steps, s.poison, batch),
            )
    return courses


def timeline(
    score: np.ndarray, label: np.ndarray, pai: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (position, BPCER, max APCER) [POINTS] in windows of WINDOW; NaN where a class is missing."""
    n = len(label)
    at = np.linspace(min(WINDOW, n) / 2, n - min(WINDOW, n) / 2, min(POINTS, max(1, n // 10)))
    rows = [slice(max(0, int(p - WINDOW / 2)), int(p + WINDOW / 2)) for p in at]
    each = [rates(score[r], label[r], pai[r], threshold) for r in rows]
    return at, np.array([e.bpcer for e in each]), np.array([e.max_apcer for e in each])


def recovery(
    score: np.ndarray, label: np.ndarray, threshold: float, change: int, *, within: float = metrics.HARM
) -> float:
    """Returns the samples after ``change`` until the error of a WINDOW is back ``within`` of that before.

    NaN where a class is missing before it; infinite if it does not come back.
    """
    before = metrics.hter(score[:change], label[:change], threshold)
    if math.isnan(before):
        return math.nan
    for end in range(change + WINDOW, len(label) + 1, WINDOW // 4):
        if metrics.hter(score[end - WINDOW : end], label[end - WINDOW : end], threshold) <= before + within:
            return float(end - change)
    return math.inf


def degenerate(
    method: SiteMethod, tail: Params, *, batch: int, sites: int = 4, steps: int = 3
) -> dict[str, str]:
    """Gives the last slot of a bank samples that nobody should learn from.

    Returns SOUND for each kind of them if no other slot changed and all states are finite, else what was not.
    """
    random = torch.Generator().manual_seed(0)
    shape = (steps, sites, batch, *tail["site.gamma"].shape)
    z = tail["replay.z"][torch.randint(len(tail["replay.z"]), shape[:3], generator=random)]
    present = torch.ones(shape[:4], dtype=torch.bool)
    valid, session = present[..., 0].clone(), torch.arange(steps * sites * batch).view(shape[:3])
    start = bank.stack([method.init(tail) for _ in range(sites)])
    values = {"NaN": math.nan, "infinite": math.inf, "constant": 1.0, "all black": 0.0, "one sample": 0.0}

    def run_on(value: float | None, *, single: bool) -> State:
        state = start
        for at in range(steps):
            samples = Features(z[at].clone(), present[at], valid[at].clone(), session[at])
            if value is not None:
                samples.z[-1] = z[at, -1] if single else value
            samples.valid[-1, 1:] &= not single
            state, _ = bank.step(method, tail, state, samples)
        return state

    clean, ends = run_on(None, single=False), dict[str, str]()
    for name, value in values.items():
        state = run_on(value, single=name == "one sample")
        same = all(torch.equal(state[n][:-1], clean[n][:-1]) for n in clean)
        finite = all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())
        ends[name] = SOUND if same and finite else "not finite" if same else "a neighbour changed"
    return ends


def precision(pseudo_label: np.ndarray, label: np.ndarray, value: int) -> tuple[int, int]:
    """Returns (right, used) pseudo labels of the class ``value``."""
    used = pseudo_label == value
    return int((label[used] == value).sum()), int(used.sum())


def _alike(streams: Mapping[str, Stream]) -> list[list[str]]:
    """Groups at most SLOTS streams of like length: a slot that has ended is computed all the same."""
    groups: list[list[str]] = []
    length = {name: len(s.label) for name, s in streams.items()}
    for name in sorted(streams, key=lambda n: length[n]):
        if not groups or len(groups[-1]) == SLOTS or length[name] > LONGER * length[groups[-1][0]]:
            groups.append([])
        groups[-1].append(name)
    return groups


def _afterwards(tail: Params, own: State, s: Stream | None, threshold: float) -> Rates | None:
    if s is None:
        return None
    score = bank.scores(tail, own, s.features.z, s.features.present)[0].numpy()
    return rates(score, s.label, s.pai, threshold)


def _shift(tail: Params, state: State) -> float:
    """Returns the logits by which the boundary of complete captures lies above the source's."""
    full = 2**tails.MODALITIES - 1
    now, then = (float(s["log_rho"][..., tails.FUSED] + s["pattern"][..., full]) for s in (state, tail))
    return tails.KAPPA * (then - now if "linear" in tail else math.exp(then) - math.exp(now))


def _stopped(steps: Sequence[State], poison: np.ndarray, batch: int) -> float:
    """Returns the poisoned samples up to the last change of what serves; 0: none after the first."""
    if not poison.any():
        return math.nan
    first = int(np.flatnonzero(poison)[0]) // batch

    def moved(i: int) -> bool:
        return any(not torch.equal(tensor, steps[i - 1][n]) for n, tensor in steps[i].items())

    moves = [i for i in range(max(first, 1), len(steps)) if moved(i)]
    if not moves:
        return 0.0
    return math.inf if moves[-1] == len(steps) - 1 else float(poison[: (moves[-1] + 1) * batch].sum())
