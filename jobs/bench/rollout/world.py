"""The fleet of a simulated month: its sites, ledger, people and driver; see ``bench_rollout_sim``."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np

from jobs.bench.rollout import fleet
from jobs.bench.rollout.checks import Checks, Month
from jobs.bench.rollout.way import Way
from pipeline import rollout as machine
from pipeline.control.health import observe_rollback
from pipeline.control.rollout import load, save, step
from pipeline.guards import GuardsConfig, judge_promoted
from pipeline.ledger import Ledger, StaleGeneration
from pipeline.rollout import (
    IN_PROGRESS,
    IN_ROLLBACK,
    TERMINAL,
    FailingSite,
    Freeze,
    Observation,
    Pointer,
    Rollout,
    RolloutConfig,
    SiteFacts,
    Status,
    WaveObservation,
)
from pipeline.simulate import cloned_sites as crowd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pipeline.ledger import RolloutRow, ServingRow

START = datetime(2026, 3, 2, tzinfo=UTC)
TICKS = 6  # a day
TICK = timedelta(days=1) / TICKS
ZONES = (
    "America/Los_Angeles",
    "America/Sao_Paulo",
    "Europe/Berlin",
    "Africa/Nairobi",
    "Asia/Kolkata",
    "Asia/Tokyo",
)
LATE, GONE = 0.02, 0.02  # of the sites join, or retire, within the month
LABELLED = 0.05  # of the sites show labelled attacks; of a small fleet 200
EVERY = 3 * TICKS  # ticks between the end of a release and the next
BAD = 0.4  # of the releases; HARM of a bad one's states are bad
HARM = 0.2
LIMITS = GuardsConfig()
REFUSED = 0.05  # candidates that fail their guards
JUMP, CRASH, SECOND = 0.05, 0.15, 0.05  # of the ticks: clock jumps, drivers that die, two drivers


class World:
    """The fleet, its ledger and its people; all chance comes from one seed."""

    def __init__(self, path: Path, *, sites: int, days: int, seed: int) -> None:
        self.random = np.random.Generator(np.random.PCG64(seed))
        self.month = Month(sites, days, seed)
        names = crowd.names(sites)
        self.tags = {
            s: {"tz": ZONES[int(z)]}
            for s, z in zip(names, self.random.integers(len(ZONES), size=sites), strict=True)
        }
        late = int(LATE * sites)
        self.joining, here = names[sites - late :], names[: sites - late]
        self.retiring = [str(s) for s in self.random.choice(here, int(GONE * sites), replace=False)]
        self.url = f"sqlite:///{path}"
        fleet.found(path, {s: self.tags[s] for s in here}, START).close()
        self.store = fleet.MortalStore.open(self.url)
        self.ledger = Ledger(self.store)
        self.checks = Checks(self.tags)
        self.living = dict.fromkeys(here, 0)  # site → how far it has learned
        self.candidates: dict[str, machine.Candidate] = {}
        self.worse: set[str] = set()  # states that are
        self.serving: Mapping[str, ServingRow] = {}
        shown = max(int(LABELLED * sites), min(sites, 200))
        labelled = set(self.random.choice(names, shown, replace=False).tolist())
        self.way = Way(self.random, names, labelled)
        freeze = Freeze(start=START + timedelta(days=days / 3), end=START + timedelta(days=days / 3 + 1.5))
        self.config = RolloutConfig(
            night="22:00-05:00",
            freeze=(freeze,),
            bake_seconds=12 * 3600,
            stage_seconds=6 * 3600,
            missing_share=0.1,
            hold_seconds=2 * 86_400,
            seed=seed,
        )
        self.row: RolloutRow | None = None
        self.rest = TICKS  # ticks until the next release

    def close(self) -> None:
        self.ledger.close()

    def open(self) -> bool:
        """Whether a rollout is under way."""
        return self.row is not None and Status(self.row.status) not in TERMINAL

    def report(self) -> Month:
        rows = self.ledger.plans.rollouts()
        self.month.violations = self.checks.found
        self.month.rollouts = len(rows)
        self.month.unfinished = sum(Status(r.status) not in TERMINAL for r in rows)
        self.month.events.update(f"rollouts_{r.status}" for r in rows)
        self.month.events.update(self.way.events)
        self.month.events["sites_moved"] = self.checks.moves
        return self.month

    def reconcile(self, tick: int) -> None:
        """Four hours: reports arrive, people act, the driver looks."""
        at = START + tick * TICK
        last = tick >= self.month.days * TICKS
        if tick % TICKS == 0:
            if not last:
                self._come_and_go(tick // TICKS, at)
            self.way.send(tick, self._awaited(), self.serving, self.worse)
        self.checks.found += self.way.arrive(self.ledger, tick, at, self.serving)
        if not self.open():
            self.rest -= 1
            if self.rest <= 0 and not last:
                self._release(at)
            return
        if self.random.random() < JUMP:
            self.month.events["clock_jumps"] += 1
            at += timedelta(hours=float(self.random.choice([-30, -5, 7, 30])))
        if self.random.random() < CRASH:
            self.store.left = int(self.random.integers(3))
        self._alive(lambda: self._people(at, last=last))
        if tick % TICKS == 0:
            self._alive(lambda: self._join(at))
        self._alive(lambda: self._drive(at))
        self.store.left = -1
        if not self.open():
            self.rest = EVERY

    def _awaited(self) -> list[str]:
        """Sites whose reports somebody waits for: those of the waves that were begun."""
        if not self.open():
            return []
        wave = load(self._row()).wave
        return [s for s, t in self.checks.targets.items() if t.wave <= wave and s in self.living]

    def _alive(self, work: Callable[[], None]) -> None:
        """Do it; whoever dies is started again and finds what was stored."""
        try:
            work()
        except fleet.Crash:
            self.month.events["crashes"] += 1
            self.ledger.close()
            self.store = fleet.MortalStore.open(self.url)
            self.ledger = Ledger(self.store)
            self.row = self.ledger.plans.rollout(self._row().id)

    def _come_and_go(self, day: int, at: datetime) -> None:
        """Sites join and retire, evenly over the month."""
        left = self.month.days - day
        joined = self.joining[: len(self.joining) // left]
        if joined:
            self.joining = self.joining[len(joined) :]
            self.ledger.streams.register({s: self.tags[s] for s in joined}, now=at)
            self.candidates |= self._learned(dict.fromkeys(joined, 0), at)
            self.living |= dict.fromkeys(joined, 1)
            self.month.events["sites_joined"] += len(joined)
        for site in self.retiring[: len(self.retiring) // left]:
            self.retiring.remove(site)
            self.ledger.streams.set_retired(site, retired=True, reason="closed", now=at)
            self.living.pop(site)
            self.month.events["sites_retired"] += 1

    def _learned(self, ends: Mapping[str, int], at: datetime) -> dict[str, machine.Candidate]:
        failing = {s for s in ends if self.random.random() < REFUSED}
        made = fleet.learn(self.ledger, ends, at, failing=failing)
        for s, c in made.items():
            if s not in failing:
                self.checks.passing[str(c.to.state_id)] = (s, ends[s])
        return made

    def _release(self, at: datetime) -> None:
        """Everybody learned something; now it is planned."""
        number = len(self.ledger.plans.rollouts()) + 1
        self.candidates = self._learned(self.living, at)
        self.living = {s: n + 1 for s, n in self.living.items()}
        if self.random.random() < BAD:
            self.month.events["bad_releases"] += 1
            self.worse |= {
                str(c.to.state_id) for c in self.candidates.values() if self.random.random() < HARM
            }
        release = f"release-{number:05d}"
        draft = fleet.planned(self.ledger, release, self._facts(list(self.living)), self.config, at)
        self.row, self.checks.targets = self.ledger.plans.rollout(release), dict(draft.targets)

    def _facts(self, names: list[str]) -> dict[str, SiteFacts]:
        completed = [r.id for r in self.ledger.plans.rollouts() if r.status == Status.COMPLETED]
        serving, good = self.ledger.releases.serving(names), self.ledger.releases.promoted_by(completed)
        controls = set(machine.choose_controls({s: self.tags[s] for s in self.living}, self.config))
        return {
            s: SiteFacts(
                _pointer(serving.get(s)) or fleet.SOURCE,
                _pointer(good.get(s)),
                self.candidates.get(s),
                control=s in controls,
                tags=self.tags[s],
            )
            for s in names
        }

    def _people(self, at: datetime, *, last: bool) -> None:
        """Somebody approves, pauses, resumes, tries again or aborts."""
        row = self._row()
        r, roll = load(row), float(self.random.random())
        new = r
        if r.status == Status.PLANNED and roll < 0.5:
            new = fleet.approved(r, row, at, fleet.PEOPLE[:1])
        elif r.status == Status.HOLD and roll < 0.3:
            new = fleet.approved(r, row, at)
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
            self.row = save(self.ledger, row, new, "a person", at=at)

    def _join(self, at: datetime) -> None:
        """Sites that came after the plan go with its last wave."""
        row = self._row()
        r, known = load(row), self.ledger.plans.sites(row.id)
        new = sorted(s for s in self.living if s not in known and s in self.candidates)
        if not new or not machine.open_to_joiners(r):
            return
        draft = machine.plan(row.id, self._facts(new), 1, self.config)
        joined = {
            s: t._replace(wave=len(r.plan.waves) - 1)
            for s, t in draft.targets.items()
            if t.zone in r.plan.zones
        }
        if joined:
            self.checks.targets |= joined
            self.row = save(
                self.ledger, row, machine.join(r, count=len(joined)), "joined", at=at, joined=joined
            )

    def _drive(self, at: datetime) -> None:
        """Step until there is nothing to do now, as ``pipeline.control.rollout.tick`` does; who decided on
        less is refused.
        """
        begun = self._row()
        while True:
            row, before = self._row(), load(self._row())
            seen = self._look(before)
            decided, _ = machine.advance(before, seen, at)
            moved = 1
            try:
                self.row, moved = step(self.ledger, row, seen, at)
            finally:
                if moved:  # also when it died in between
                    self.serving = self.ledger.releases.serving()
                    self.checks.moved(self.serving, row, decided, at)
            if decided.status != before.status and decided.status in {Status.HOLD, Status.PAUSED}:
                self.month.events[f"times_{decided.status}"] += 1
            if not moved and (decided.status, decided.wave) == (before.status, before.wave):
                break
        if self._row().revision != begun.revision and self.random.random() < SECOND:
            self._second(begun, at)

    def _second(self, begun: RolloutRow, at: datetime) -> None:
        """Another driver still has the row of before, and wants to go back."""
        r = (
            machine.abort(load(begun), reason="a second driver", now=at)
            if load(begun).status not in TERMINAL
            else None
        )
        try:
            if r:
                save(self.ledger, begun, r, "a second driver", at=at)
                self.checks.found.append(f"fence: {begun.id}: revision {begun.revision} was written over")
        except StaleGeneration:
            self.month.events["second_drivers_refused"] += 1

    def _look(self, r: Rollout) -> Observation:
        """What ``pipeline.control.health.look`` sees, its presentations counted on the way instead of
        replayed from features.
        """
        rollout, ledger = self._row().id, self.ledger
        if r.status in IN_ROLLBACK:
            return observe_rollback(ledger, rollout, r)
        if r.status not in IN_PROGRESS | {Status.PAUSED} or r.wave < 0:
            return Observation()
        last, out = min(r.wave, len(r.plan.waves) - 1), list(r.failed)
        silent = ledger.plans.silent(rollout, upto=last, samples=r.plan.config.health_samples, without=out)
        failed = Counter(r.failed.values())
        waves = [WaveObservation(sites=w.sites - failed[i]) for i, w in enumerate(r.plan.waves[:last])]
        waves.append(ledger.plans.observe_wave(rollout, last, without=out))
        promoted = ledger.plans.promoted(rollout, upto=last, names=self.way.labelled)
        standing = self.way.standing(promoted, self.serving)
        found, wave_of = judge_promoted(LIMITS, standing), {p.site: p.wave for p in promoted}
        shown = Counter[int]()
        for site, n in zip(standing.sites, standing.attacks.tolist(), strict=True):
            shown[wave_of[site]] += n
        return Observation(
            waves=tuple(
                WaveObservation(
                    w.sites,
                    w.not_serving,
                    w.first_not_serving,
                    *silent.get(i, (0, "")),
                    attack_presentations=shown[i],
                )
                for i, w in enumerate(waves)
            ),
            failed_returnable=ledger.plans.returnable(rollout, out) if out else 0,
            failing={s: FailingSite(wave_of[s], why[0].text) for s, why in found.failing.items()},
            breach=tuple(b.text for b in found.breach),
        )

    def _row(self) -> RolloutRow:
        assert self.row is not None
        return self.row


def _pointer(served: ServingRow | None) -> Pointer | None:
    return Pointer(served.state, served.source_version) if served else None
