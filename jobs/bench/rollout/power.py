"""What the guards of a rollout stop, over many seeds, beside two usual canaries on the same draws.

A release goes over the fleet, decided by the state machine on what ``judge_promoted`` and ``error_budget``
find. Every promoted site shows ATTACKS labelled attacks a day, and is looked at LOOKS times a day; what
serves and what it would go back to err independently. In a clean fleet every APCER is ``shadow.apcer``, the
highest rate that is no reason to stop: no clean fleet is stopped more often. Harm: HARMED of the sites of
wave 1 go to WORSE.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

from jobs.bench.rollout import fleet
from pipeline import rollout as machine
from pipeline.guards import LabelledCounts, error_budget, judge_promoted
from pipeline.rollout import (
    IN_PROGRESS,
    IN_ROLLBACK,
    Candidate,
    FailingSite,
    Observation,
    Pointer,
    Rollout,
    SiteFacts,
    Status,
    WaveObservation,
)
from pipeline.simulate import cloned_sites as crowd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from jobs.terminal import Terminal
    from pipeline.guards import GuardsConfig
    from pipeline.rollout import Draft, RolloutConfig

    Counts = NDArray[np.int64]

START = datetime(2026, 3, 2, tzinfo=UTC)
LOOKS, DAYS = 8, 4  # a day, and days that a wave bakes
HOURS = 24 // LOOKS
ATTACKS, REAL = 40, 200  # labelled presentations of a site and day
WORSE, HARMED, REFUSED = 0.10, 0.05, 0.01  # APCER and share of harmed sites; BPCER of all
CONTROLS = 0.05  # of the fleet, for the Mann-Whitney canary
ENOUGH, P = (
    100,
    0.05,
)  # presentations before the threshold canary believes a rate; of the Mann-Whitney test, every day


class Outcome(NamedTuple):
    """One seed. Stops are in attack presentations per site since wave 1 began; None: not stopped."""

    ours: int | None
    wave: int  # in which ours stopped, index
    threshold: int | None
    ranks: int | None  # Mann-Whitney
    held: bool  # waits for a person instead of ending
    singles: int  # sites that were taken back by themselves
    freezes: int
    site_days: int


@dataclass(frozen=True)
class Found:
    """All seeds of one kind."""

    harmed: bool
    outcomes: tuple[Outcome, ...]

    def share(self, name: str) -> tuple[int, int]:
        """How many seeds were stopped by ``ours``, ``threshold`` or ``ranks``, of how many; harm counts in
        wave 1 alone.
        """
        return sum(s is not None for s in self.stops(name)), len(self.outcomes)

    def stops(self, name: str) -> list[int | None]:
        return [getattr(o, name) for o in self.outcomes]

    def median(self, name: str) -> float:
        """Presentations until the stop; a seed that was not stopped took for ever."""
        return float(np.median([np.inf if s is None else s for s in self.stops(name)]))


@dataclass(frozen=True)
class Fleet:
    """A planned release; its sites in the order of the waves."""

    draft: Draft
    limits: GuardsConfig

    @cached_property
    def names(self) -> list[str]:
        return [s for i in range(len(self.sizes)) for s in self.draft.wave(i)]

    @cached_property
    def sizes(self) -> list[int]:
        return [w.sites for w in self.draft.plan.waves]

    @cached_property
    def ends(self) -> list[int]:
        return np.cumsum(self.sizes).tolist()


def planned(limits: GuardsConfig, config: RolloutConfig, sites: int) -> Fleet:
    """A release of ``sites`` whose waves bake for DAYS."""
    config = config.model_copy(update={"bake_seconds": DAYS * 86_400.0})
    facts = {
        s: SiteFacts(fleet.SOURCE, candidate=Candidate(Pointer(s, 1), s, "pass")) for s in crowd.names(sites)
    }
    return Fleet(machine.plan("release-00001", facts, 1, config), limits)


def measure(on: Fleet, terminal: Terminal, *, seeds: int, harmed: bool) -> Found:
    """Release once per seed."""
    outcomes: list[Outcome] = []
    with terminal.progress("harm" if harmed else "clean", "seeds") as advance:
        for seed in range(seeds):
            outcomes.append(release(on, seed, harmed=harmed))
            advance(seed + 1, seeds)
    return Found(harmed, tuple(outcomes))


def release(on: Fleet, seed: int, *, harmed: bool) -> Outcome:
    """One release; with harm only its first wave. A hold at the end of its bake has stopped it: it goes on
    for nobody alone.
    """
    draws, run = _Draws(on, seed, harmed), _Run(on)
    threshold = ranks = None
    for look in range(1, (1 if harmed else len(on.sizes)) * DAYS * LOOKS + 1):
        wave = (look - 1) // (DAYS * LOOKS)
        draws.present(
            on.ends[wave], fresh=on.ends[wave - 1] if wave and (look - 1) % (DAYS * LOOKS) == 0 else None
        )
        at = look * ATTACKS // LOOKS
        run.look(draws, look)
        if threshold is None and _over(draws, on.limits.ceiling.apcer):
            threshold = at
        if ranks is None and look % LOOKS == 0 and _ranks(draws, on.ends, wave):
            ranks = at
    return Outcome(
        run.stopped, run.r.wave, threshold, ranks, run.held, len(run.r.failed), run.freezes, draws.site_days
    )


class _Draws:
    """Presentations since their wave began: [sites] counts, and the same of control sites."""

    def __init__(self, on: Fleet, seed: int, harmed: bool) -> None:
        self._random = np.random.Generator(np.random.PCG64([seed, int(harmed)]))
        null, count = on.limits.shadow.apcer, len(on.names)
        rates = np.full(count, null)
        if harmed:
            first = on.sizes[0]
            rates[self._random.choice(first, max(1, round(HARMED * first)), replace=False)] = WORSE
        # of an attack: worse, better, both wrong, both right
        self._calls = np.stack(
            [rates * (1 - null), (1 - rates) * null, rates * null, (1 - rates) * (1 - null)], axis=1
        )
        self._null = null
        self.attacks, self.real, self.refused = (np.zeros(count, np.int64) for _ in range(3))
        self.calls = np.zeros((count, 4), np.int64)
        self.controls = np.zeros(int(CONTROLS * count), np.int64)  # accepted, since the newest wave began
        self.hours: list[tuple[int, int]] = []  # errors of presentations of the fleet
        self.site_days = 0
        self._site_looks = 0

    @property
    def accepted(self) -> Counts:
        return self.calls[:, 0] + self.calls[:, 2]

    def present(self, sites: int, *, fresh: int | None) -> None:
        """The next look's presentations of the first ``sites``; ``fresh``: where a new wave begins."""
        n, m = ATTACKS // LOOKS, REAL // LOOKS
        calls = self._random.multinomial(n, self._calls[:sites])
        refused = self._random.binomial(m, REFUSED, sites)
        if fresh is not None:
            self.controls[:] = 0
        self.controls += self._random.binomial(n, self._null, len(self.controls))
        self.calls[:sites] += calls
        self.refused[:sites] += refused
        self.attacks[:sites] += n
        self.real[:sites] += m
        errors = int(calls[:, [0, 2]].sum() + refused.sum())
        shares = self._random.multinomial(errors, [1 / HOURS] * HOURS)
        self.hours += [(int(e), (n + m) * sites // HOURS) for e in shares]
        self._site_looks += sites
        self.site_days = self._site_looks // LOOKS


class _Run:
    """The state machine on what the guards find."""

    def __init__(self, on: Fleet) -> None:
        self._on, self._promoted = on, 0  # waves that serve their targets
        started = machine.start(on.draft.plan, START)
        for who in fleet.PEOPLE:
            started = machine.approve(started, hash=started.plan_hash, who=who, now=START)
        self.r: Rollout = started
        self.stopped: int | None = None
        self.held, self.freezes = False, 0
        self._settle(Observation(), START)

    def look(self, draws: _Draws, look: int) -> None:
        """Judge what was presented, unless it has ended or waits for a person."""
        now = START + timedelta(hours=look * HOURS)
        if self.r.status not in IN_PROGRESS or self.held:
            return
        errors, total = zip(*draws.hours[-6:], strict=True)
        freeze = error_budget(self._on.limits, errors, total)
        self.freezes += bool(freeze)
        self._settle(self._seen(draws, freeze[0].text if freeze else ""), now)
        self.held = self.r.status in {Status.HOLD, Status.PAUSED}
        if self.held or self.r.status in IN_ROLLBACK:
            self.stopped = look * ATTACKS // LOOKS

    def _seen(self, draws: _Draws, freeze: str) -> Observation:
        end = self._on.ends[self._promoted - 1]
        names, calls = (
            self._on.names[:end],
            draws.calls[:end],
        )  # a site that went back goes on to count, by replay
        found = judge_promoted(
            self._on.limits,
            LabelledCounts(
                names,
                draws.attacks[:end],
                draws.accepted[:end],
                calls[:, 0],
                calls[:, 1],
                draws.real[:end],
                draws.refused[:end],
            ),
        )
        return Observation(
            waves=self._waves(),
            freeze=freeze,
            breach=tuple(b.text for b in found.breach),
            failing={
                s: FailingSite(self._on.draft.targets[s].wave, why[0].text)
                for s, why in found.failing.items()
                if s not in self.r.failed
            },
        )

    def _waves(self) -> tuple[WaveObservation, ...]:
        out = [sum(w == i for w in self.r.failed.values()) for i in range(self._promoted)]
        return tuple(WaveObservation(self._on.sizes[i] - n) for i, n in enumerate(out))

    def _settle(self, seen: Observation, now: datetime) -> None:
        """Do what it says until it says nothing new: sites obey at once."""
        while True:
            before = self.r
            self.r, actions = machine.advance(self.r, seen, now)
            if self.r.status not in IN_PROGRESS:
                return
            for a in actions:
                self._promoted = max(self._promoted, a.wave + 1) if a.kind == "promote" else self._promoted
            seen = Observation(waves=self._waves(), freeze=seen.freeze)
            if self.r == before:
                return


def _over(draws: _Draws, ceiling: float) -> bool:
    """The threshold canary: some site's observed APCER is over the ceiling."""
    enough = draws.attacks >= ENOUGH
    return bool((draws.accepted[enough] > ceiling * draws.attacks[enough]).any())


def _ranks(draws: _Draws, ends: Sequence[int], wave: int) -> bool:
    """The Mann-Whitney canary: the newest wave's sites rank above the controls."""
    part = slice(ends[wave - 1] if wave else 0, ends[wave])
    return bool(stats.mannwhitneyu(draws.accepted[part], draws.controls, alternative="greater").pvalue < P)


def as_context(found: Sequence[Found]) -> dict[str, object]:
    """Shares of stopped seeds, and presentations until half of them were stopped."""
    return {
        ("harmed" if f.harmed else "clean"): {
            "seeds": len(f.outcomes),
            "site_days_per_seed": min(o.site_days for o in f.outcomes),
            "held": sum(o.held for o in f.outcomes),
            "single_sites_taken_back": sum(o.singles for o in f.outcomes),
            **{
                name: {
                    "stopped": f.share(name)[0],
                    "median_presentations": f.median(name) if f.harmed else None,
                }
                for name in ("ours", "threshold", "ranks")
            },
        }
        for f in found
    }
