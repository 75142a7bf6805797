"""Counts what the guards of a rollout stop, over many seeds, beside two usual canaries on the same draws.

The state machine decides on what ``judge_promoted`` and ``error_budget`` find. Every promoted site shows
ATTACKS labelled attacks a day, and is looked at LOOKS times a day; what serves and what it would go back to
err independently. In a clean fleet every APCER is ``shadow.apcer``, the highest rate that is no reason to
stop: no clean fleet is stopped more often. Harm: HARMED of the sites of wave 1 go to WORSE.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

from pipeline import rollout as machine
from pipeline.guards.fleet import LabelledCounts, error_budget, judge_promoted
from pipeline.rollout import IN_PROGRESS, IN_ROLLBACK, Candidate, Pointer, SiteFacts, Status
from pipeline.simulate import cloned_sites
from pipeline.simulate.release_fleet import SOURCE, ObedientFleet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobs.terminal import Terminal
    from pipeline.guards import GuardsConfig
    from pipeline.rollout import Draft, RolloutConfig

START = datetime(2026, 3, 2, tzinfo=UTC)
LOOKS, DAYS = 8, 4  # a day, and days that a wave bakes
HOURS = 24 // LOOKS
ATTACKS, REAL = 40, 200  # labelled presentations of a site and day
WORSE, HARMED, REFUSED = 0.10, 0.05, 0.01  # APCER and share of harmed sites; BPCER of all
CONTROLS = 0.05  # of the fleet, for the Mann-Whitney canary
ENOUGH = 100  # presentations before the threshold canary believes a rate
P = 0.05  # of the Mann-Whitney test, every day
STOPS = {
    "ours": "guards",
    "threshold": "threshold",
    "ranks": "Mann-Whitney",
}  # field of Outcome -> who stopped it


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
class Outcomes:
    """All seeds of one kind."""

    harmed: bool
    seeds: tuple[Outcome, ...]

    def stopped(self, name: str) -> int:
        """Returns how many seeds ``ours``, ``threshold`` or ``ranks`` stopped; with harm in wave 1 alone."""
        return sum(getattr(o, name) is not None for o in self.seeds)

    def median(self, name: str) -> float:
        """Returns the median of presentations until the stop; a seed that was not stopped took for ever."""
        stops = [getattr(o, name) for o in self.seeds]
        return float(np.median([np.inf if s is None else s for s in stops]))

    @property
    def name(self) -> str:
        """Of its row in a table."""
        return "harmed" if self.harmed else "clean"


@dataclass(frozen=True)
class Release:
    """A planned release; its sites in the order of the waves."""

    draft: Draft
    facts: Mapping[str, SiteFacts]
    limits: GuardsConfig

    @cached_property
    def names(self) -> list[str]:
        """All sites."""
        return [s for i in range(len(self.sizes)) for s in self.draft.wave(i)]

    @cached_property
    def sizes(self) -> list[int]:
        """Sites per wave."""
        return [w.sites for w in self.draft.plan.waves]

    @cached_property
    def ends(self) -> list[int]:
        """Sites up to the end of each wave."""
        return np.cumsum(self.sizes).tolist()


def planned(limits: GuardsConfig, config: RolloutConfig, sites: int) -> Release:
    """Plans a release to ``sites`` whose waves bake for DAYS."""
    config = config.model_copy(update={"bake_seconds": DAYS * 86_400.0})
    names = cloned_sites.names(sites)
    facts = {s: SiteFacts(SOURCE, candidate=Candidate(Pointer(s, 1), s, "pass")) for s in names}
    return Release(machine.plan("release-00001", facts, 1, config), facts, limits)


def measure(on: Release, terminal: Terminal, *, seeds: int, harmed: bool) -> Outcomes:
    """Runs the release once per seed."""
    outcomes: list[Outcome] = []
    with terminal.progress("harm" if harmed else "clean", "seeds") as advance:
        for seed in range(seeds):
            outcomes.append(release(on, seed, harmed=harmed))
            advance(seed + 1, seeds)
    return Outcomes(harmed, tuple(outcomes))


def release(on: Release, seed: int, *, harmed: bool) -> Outcome:
    """Runs one release, with harm only its first wave.

    A hold at the end of its bake has stopped it: it does not go on without a person.
    """
    draws, fleet = _Draws(on, seed, harmed), ObedientFleet(on.draft, on.facts, START)
    for who in ("ann", "ben"):
        fleet.approve(who)
    _settle(fleet)
    stop: dict[str, int] = {}
    freezes, per_wave = 0, DAYS * LOOKS
    for look in range(1, (1 if harmed else len(on.sizes)) * per_wave + 1):
        wave, begins = (look - 1) // per_wave, look > 1 and (look - 1) % per_wave == 0
        draws.present(on.ends[wave], begins=begins)
        at = look * ATTACKS // LOOKS
        if fleet.r.status in IN_PROGRESS and "ours" not in stop:
            reasons = error_budget(on.limits, *zip(*draws.hours[-6:], strict=True))
            freezes += bool(reasons)
            fleet.now = START + timedelta(hours=look * HOURS)
            fleet.freeze = reasons[0].text if reasons else ""
            # a site that went back goes on to count, by replay
            findings = judge_promoted(on.limits, draws.counts(on.names, on.ends[fleet.r.wave]))
            fleet.breach = tuple(b.text for b in findings.breach)
            fleet.failing = {s: why[0].text for s, why in findings.failing.items()}
            _settle(fleet)
            if fleet.r.status in {Status.HOLD, Status.PAUSED} | IN_ROLLBACK:
                stop["ours"] = at
        if "threshold" not in stop and _over(draws, on.limits.ceiling.apcer):
            stop["threshold"] = at
        if "ranks" not in stop and look % LOOKS == 0 and _ranks(draws, on.ends, wave):
            stop["ranks"] = at
    held, singles = fleet.r.status in {Status.HOLD, Status.PAUSED}, len(fleet.r.failed)
    stops = {name: stop.get(name) for name in STOPS}
    return Outcome(
        **stops, wave=fleet.r.wave, held=held, singles=singles, freezes=freezes, site_days=draws.site_days
    )


class _Draws:
    """Presentations since their wave began: [sites] counts, and the same of control sites."""

    def __init__(self, on: Release, seed: int, harmed: bool) -> None:
        self._random = np.random.Generator(np.random.PCG64([seed, int(harmed)]))
        null, count, first = on.limits.shadow.apcer, len(on.names), on.sizes[0]
        rates = np.full(count, null)
        if harmed:
            rates[self._random.choice(first, max(1, round(HARMED * first)), replace=False)] = WORSE
        # of an attack: worse, better, both wrong, both right
        odds = [rates * (1 - null), (1 - rates) * null, rates * null, (1 - rates) * (1 - null)]
        self._calls, self._null = np.stack(odds, axis=1), null
        self.attacks, self.real, self.refused = (np.zeros(count, np.int64) for _ in range(3))
        self.calls = np.zeros((count, 4), np.int64)
        self.controls = np.zeros(int(CONTROLS * count), np.int64)  # accepted, since the newest wave began
        self.hours: list[tuple[int, int]] = []  # errors of presentations of the fleet
        self._site_looks = 0

    @property
    def accepted(self) -> np.ndarray:
        return self.calls[:, 0] + self.calls[:, 2]

    @property
    def site_days(self) -> int:
        return self._site_looks // LOOKS

    def counts(self, names: Sequence[str], end: int) -> LabelledCounts:
        """Returns what the guards see of the first ``end`` sites."""
        columns = (self.attacks, self.accepted, self.calls[:, 0], self.calls[:, 1], self.real, self.refused)
        return LabelledCounts(names[:end], *(c[:end] for c in columns))

    def present(self, sites: int, *, begins: bool) -> None:
        """Draws the next look's presentations; controls count anew where a wave ``begins``."""
        n, m = ATTACKS // LOOKS, REAL // LOOKS
        calls = self._random.multinomial(n, self._calls[:sites])
        refused = self._random.binomial(m, REFUSED, sites)
        if begins:
            self.controls[:] = 0
        self.controls += self._random.binomial(n, self._null, len(self.controls))
        self.calls[:sites] += calls
        self.refused[:sites] += refused
        self.attacks[:sites] += n
        self.real[:sites] += m
        shares = self._random.multinomial(int(calls[:, [0, 2]].sum() + refused.sum()), [1 / HOURS] * HOURS)
        self.hours += [(int(e), (n + m) * sites // HOURS) for e in shares]
        self._site_looks += sites


def _settle(fleet: ObedientFleet) -> None:
    """Lets the state machine go on until it says nothing new, or the release no longer goes forward."""
    while True:
        before = fleet.r
        if fleet.tick() not in IN_PROGRESS or fleet.r == before:
            return


def _over(draws: _Draws, ceiling: float) -> bool:
    """Returns the threshold canary: some site's observed APCER is over the ceiling."""
    enough = draws.attacks >= ENOUGH
    return bool((draws.accepted[enough] > ceiling * draws.attacks[enough]).any())


def _ranks(draws: _Draws, ends: Sequence[int], wave: int) -> bool:
    """Returns the Mann-Whitney canary: the newest wave's sites rank above the controls."""
    part = slice(ends[wave - 1] if wave else 0, ends[wave])
    return bool(stats.mannwhitneyu(draws.accepted[part], draws.controls, alternative="greater").pvalue < P)
