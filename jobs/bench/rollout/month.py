"""Simulates a month of a fleet whose network, clocks, people and drivers fail, on a real ledger.

Every day each site of a wave that was begun sends one report, which may be lost, doubled or late. Releases
follow one another, some of them bad; sites join and retire; the driver's clock jumps, and it dies within its
transactions.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np

from jobs.bench.rollout.checks import Checks
from jobs.bench.rollout.control import delete
from pipeline import rollout as machine
from pipeline.control.health import observe_rollback
from pipeline.control.rollout import save
from pipeline.guards import GuardsConfig
from pipeline.guards.fleet import judge_promoted
from pipeline.ledger import StaleGeneration
from pipeline.rollout import (
    IN_PROGRESS,
    IN_ROLLBACK,
    TERMINAL,
    FailingSite,
    Freeze,
    Observation,
    RolloutConfig,
    Status,
    WaveObservation,
)
from pipeline.simulate import cloned_sites
from pipeline.simulate.lossy_reports import LossyReports
from pipeline.simulate.release_fleet import Died, LedgerFleet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pipeline.ledger import RolloutRow, ServingRow
    from pipeline.rollout import Candidate, SiteFacts

START = datetime(2026, 3, 2, tzinfo=UTC)
TICKS = 6  # a day
PATIENCE = 15  # days after the last that everything has to end
ZONES = ("America/Los_Angeles", "America/Sao_Paulo", "Europe/Berlin")
ZONES = (*ZONES, "Africa/Nairobi", "Asia/Kolkata", "Asia/Tokyo")
LATE, GONE = 0.02, 0.02  # of the sites join, or retire, within the month
LABELLED = 0.05  # of the sites show labelled attacks; of a small fleet 200
EVERY = 3 * TICKS  # ticks between the end of a release and the next
BAD, HARM = 0.4, 0.2  # of the releases are bad; of a bad one's states
REFUSED = 0.05  # candidates that fail their guards
JUMP, CRASH, SECOND = 0.05, 0.15, 0.05  # of the ticks: clock jumps, drivers that die, two drivers


@dataclass
class Month:
    """What happened in it."""

    sites: int
    days: int
    seed: int
    violations: list[str] = field(default_factory=list[str])
    rollouts: int = 0
    unfinished: int = 0
    seconds: float = 0.0
    events: Counter[str] = field(default_factory=Counter[str])

    @property
    def numbers(self) -> dict[str, float]:
        """Its numbers by name."""
        facts: dict[str, float] = {"sites": self.sites, "days": self.days, "seed": self.seed}
        facts["seconds_per_day"] = round(self.seconds / max(1, self.days), 3)
        return {**facts, "violations": len(self.violations), **dict(sorted(self.events.items()))}


def simulate(folder: Path, *, sites: int, days: int, seed: int, advance: Callable[[int, int], None]) -> Month:
    """Runs a month; then gives what is under way PATIENCE days to end."""
    folder.mkdir(parents=True, exist_ok=True)
    path, started = folder / "month.db", time.monotonic()
    delete(path)
    month = Month(sites, days, seed)
    with closing(World(path, month)) as world:
        for tick in range((days + PATIENCE) * TICKS):
            if tick >= days * TICKS and not world.fleet.under_way:
                break
            world.pass_hours(tick)
            if tick % TICKS == TICKS - 1:
                world.checks.daily(world.fleet.ledger)
                advance(min(days, tick // TICKS + 1), days)
        world.checks.ended(world.fleet.ledger)
        month.seconds = time.monotonic() - started
        world.count()
    return month


class World:
    """The fleet of a month, its reports, its people and its driver; all chance comes from one seed."""

    def __init__(self, path: Path, month: Month) -> None:
        self.month, sites, days = month, month.sites, month.days
        self.random = np.random.Generator(np.random.PCG64(month.seed))
        names, zones = cloned_sites.names(sites), self.random.integers(len(ZONES), size=sites)
        tags = {s: {"tz": ZONES[int(z)]} for s, z in zip(names, zones, strict=True)}
        late = int(LATE * sites)
        self.joining, present = names[sites - late :], names[: sites - late]
        self.retiring = [str(s) for s in self.random.choice(present, int(GONE * sites), replace=False)]
        self.fleet = LedgerFleet.create(f"sqlite:///{path}", {s: tags[s] for s in present}, START)
        self.fleet.tags = tags
        self.checks = Checks(tags)
        self.living = dict.fromkeys(present, 0)  # site -> how far it has learned
        self.candidates: dict[str, Candidate] = {}
        self.worse: set[str] = set()  # states that are
        self.serving: Mapping[str, ServingRow] = {}
        shown = max(int(LABELLED * sites), min(sites, 200))
        self.reports = LossyReports(
            self.random, names, self.random.choice(names, shown, replace=False).tolist()
        )
        freeze = Freeze(start=START + timedelta(days=days / 3), end=START + timedelta(days=days / 3 + 1.5))
        waits = {"bake_seconds": 12 * 3600, "stage_seconds": 6 * 3600, "hold_seconds": 2 * 86_400}
        settings = {"night": "22:00-05:00", "missing_share": 0.1, "seed": month.seed, **waits}
        self.config = RolloutConfig(freeze=(freeze,), **settings)
        self.rest = TICKS  # ticks until the next release

    def close(self) -> None:
        """Gives the ledger's connections back."""
        self.fleet.close()

    def count(self) -> None:
        """Adds up what happened."""
        rows, month = self.fleet.ledger.plans.rollouts(), self.month
        month.violations, month.rollouts = self.checks.violations, len(rows)
        month.unfinished = sum(Status(r.status) not in TERMINAL for r in rows)
        month.events.update(f"rollouts_{r.status}" for r in rows)
        month.events.update(self.reports.events)
        month.events["sites_moved"] = self.checks.moves

    def pass_hours(self, tick: int) -> None:
        """Lets four hours pass: reports arrive, people act, the driver looks."""
        fleet, last = self.fleet, tick >= self.month.days * TICKS
        fleet.now = START + tick * timedelta(days=1) / TICKS
        if tick % TICKS == 0:
            if not last:
                self._come_and_go(tick // TICKS)
            self.reports.send(tick, self._awaited(), self.serving, self.worse)
        self.checks.violations += self.reports.arrive(fleet, tick, self.serving)
        if not fleet.under_way:
            self.rest -= 1
            if self.rest <= 0 and not last:
                self._release()
            return
        if self.random.random() < JUMP:
            self.month.events["clock_jumps"] += 1
            fleet.now += timedelta(hours=float(self.random.choice([-30, -5, 7, 30])))
        left = int(self.random.integers(3)) if self.random.random() < CRASH else -1
        with fleet.dying(left, "within"):
            self._survive(lambda: self._people(last=last))
            if tick % TICKS == 0:
                self._survive(self._join)
            self._survive(self._drive)
        if not fleet.under_way:
            self.rest = EVERY

    def _awaited(self) -> list[str]:
        """Returns the sites whose reports somebody waits for: those of the waves that were begun."""
        if not self.fleet.under_way:
            return []
        wave = self.fleet.r.wave
        return [s for s, t in self.checks.targets.items() if t.wave <= wave and s in self.living]

    def _survive(self, work: Callable[[], None]) -> None:
        """Does it; a driver that dies is started again and finds what was stored."""
        try:
            work()
        except Died:
            self.month.events["crashes"] += 1
            self.fleet.close()
            self.fleet.reopen()

    def _come_and_go(self, day: int) -> None:
        """Lets sites join and retire, evenly over the month."""
        left = self.month.days - day
        joined, retired = (sites[: len(sites) // left] for sites in (self.joining, self.retiring))
        if joined:
            self.joining = self.joining[len(joined) :]
            self.fleet.ledger.streams.register({s: self.fleet.tags[s] for s in joined}, now=self.fleet.now)
            self.candidates |= self._learned(dict.fromkeys(joined, 0))
            self.living |= dict.fromkeys(joined, 1)
            self.month.events["sites_joined"] += len(joined)
        for site in retired:
            self.retiring.remove(site)
            self.fleet.ledger.streams.set_retired(site, retired=True, reason="closed", now=self.fleet.now)
            self.living.pop(site)
            self.month.events["sites_retired"] += 1

    def _learned(self, ends: Mapping[str, int]) -> dict[str, Candidate]:
        failing = {s for s in ends if self.random.random() < REFUSED}
        candidates = self.fleet.learn(ends, failing=failing)
        passing = {str(c.to.state_id): (s, ends[s]) for s, c in candidates.items() if s not in failing}
        self.checks.passing |= passing
        return candidates

    def _release(self) -> None:
        """Lets everybody learn something, and plans a release of it."""
        self.candidates = self._learned(self.living)
        self.living = {s: n + 1 for s, n in self.living.items()}
        if self.random.random() < BAD:
            self.month.events["bad_releases"] += 1
            states = (str(c.to.state_id) for c in self.candidates.values())
            self.worse |= {state for state in states if self.random.random() < HARM}
        self.checks.targets = dict(self.fleet.plan(self._facts(list(self.living)), self.config).targets)

    def _facts(self, names: list[str]) -> dict[str, SiteFacts]:
        controls = machine.choose_controls({s: self.fleet.tags[s] for s in self.living}, self.config)
        return self.fleet.facts(names, self.candidates, set(controls))

    def _people(self, *, last: bool) -> None:
        """Lets somebody approve, pause, resume, try again or abort."""
        r, roll, at = self.fleet.r, float(self.random.random()), self.fleet.now
        new = r
        if r.status == Status.PLANNED and roll < 0.5:
            new = machine.approve(r, hash=r.plan_hash, who="ann", now=at)
        elif r.status == Status.HOLD and roll < 0.3:
            for who in ("ann", "ben"):
                new = machine.approve(new, hash=r.plan_hash, who=who, now=at)
        elif r.status == Status.PAUSED and (roll < 0.15 or last):
            new = machine.abort(r, reason="given up", now=at)
        elif r.status == Status.PAUSED and roll < 0.5:
            new = machine.resume(r, now=at)
            new = machine.retry(new, now=at) if roll < 0.25 and new.wave in new.failed.values() else new
        elif r.status in IN_PROGRESS and roll < 0.01:
            new = machine.pause(r, reason="lunch", now=at)
        elif r.status in IN_PROGRESS and roll < 0.02:
            new = machine.abort(r, reason="second thoughts", now=at)
        if new != r:
            self.month.events["people"] += 1
            self.fleet.save(new, "a person")

    def _join(self) -> None:
        """Lets sites that came after the plan go with its last wave."""
        planned = self.fleet.ledger.plans.sites(self.fleet.row.id)
        new = sorted(s for s in self.living if s not in planned and s in self.candidates)
        if new and machine.open_to_joiners(self.fleet.r):
            self.checks.targets |= self.fleet.join(self._facts(new))

    def _drive(self) -> None:
        """Steps until there is nothing to do now; who decided on an older revision is refused."""
        begun, fleet = self.fleet.row, self.fleet
        while True:
            row, before, observation = fleet.row, fleet.r, self._observe()
            decided, _ = machine.advance(before, observation, fleet.now)
            moved = 1
            try:
                moved = fleet.step(observation)
            finally:
                if moved:  # also when it died in between
                    self.serving = fleet.ledger.releases.serving()
                    self.checks.moved(self.serving, row, decided, fleet.now)
            if decided.status != before.status and decided.status in {Status.HOLD, Status.PAUSED}:
                self.month.events[f"times_{decided.status}"] += 1
            if not moved and (decided.status, decided.wave) == (before.status, before.wave):
                break
        if fleet.row.revision != begun.revision and self.random.random() < SECOND:
            self._second(begun)

    def _second(self, begun: RolloutRow) -> None:
        """Another driver still has the row of before, and wants to go back."""
        r, fleet = machine.Rollout.model_validate_json(begun.body), self.fleet
        if r.status in TERMINAL:
            return
        try:
            r = machine.abort(r, reason="a second driver", now=fleet.now)
            save(fleet.ledger, begun, r, "a second driver", at=fleet.now)
            self.checks.violations.append(f"fence: {begun.id}: revision {begun.revision} was written over")
        except StaleGeneration:
            self.month.events["second_drivers_refused"] += 1

    def _observe(self) -> Observation:
        """Returns what ``control.health.observe`` sees, presentations counted by report and not replayed."""
        r, rollout, plans = self.fleet.r, self.fleet.row.id, self.fleet.ledger.plans
        if r.status in IN_ROLLBACK:
            return observe_rollback(self.fleet.ledger, rollout, r)
        if r.status not in IN_PROGRESS | {Status.PAUSED} or r.wave < 0:
            return Observation()
        last, out = min(r.wave, len(r.plan.waves) - 1), list(r.failed)
        silent = plans.silent(rollout, upto=last, samples=r.plan.config.health_samples, without=out)
        failed, shown = Counter(r.failed.values()), Counter[int]()
        waves = [WaveObservation(sites=w.sites - failed[i]) for i, w in enumerate(r.plan.waves[:last])]
        waves.append(plans.observe_wave(rollout, last, without=out))
        promoted = plans.promoted(rollout, upto=last, names=self.reports.labelled)
        counts = self.reports.counts(promoted, self.serving)
        findings, wave_of = judge_promoted(GuardsConfig(), counts), {p.site: p.wave for p in promoted}
        for site, n in zip(counts.sites, counts.attacks.tolist(), strict=True):
            shown[wave_of[site]] += n
        quiet = (silent.get(i, (0, "")) for i in range(len(waves)))
        heard = [(w.sites, w.not_serving, w.first_not_serving, *q) for w, q in zip(waves, quiet, strict=True)]
        return Observation(
            waves=tuple(WaveObservation(*w, attack_presentations=shown[i]) for i, w in enumerate(heard)),
            failed_returnable=plans.returnable(rollout, out) if out else 0,
            failing={s: FailingSite(wave_of[s], why[0].text) for s, why in findings.failing.items()},
            breach=tuple(b.text for b in findings.breach),
        )
