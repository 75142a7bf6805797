"""Simulates a fleet that takes releases: sites, people, a clock, and a driver that may die.

``LedgerFleet`` is one on a real ledger; time passes only when somebody says so. ``ObedientFleet`` is one in
memory whose sites do at once what the state machine says. The rollout benchmark and the tests of rollouts
share both.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

from pipeline import rollout as machine
from pipeline.control.health import observe_rollback
from pipeline.control.rollout import load, save, step
from pipeline.guards import Cell, Evidence, GuardsConfig
from pipeline.guards.verdict import assess
from pipeline.ledger import Ledger, SegmentRow, ShardRow, Store, WindowRecord, state_id
from pipeline.models import ModelConfig
from pipeline.models.manifest import Manifest
from pipeline.rollout import (
    IN_ROLLBACK,
    TERMINAL,
    Candidate,
    FailingSite,
    Observation,
    Pointer,
    SiteFacts,
    Status,
    WaveObservation,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from datetime import datetime

    from pipeline.ledger import Cycle, RolloutRow
    from pipeline.rollout import Action, Draft, Rollout, RolloutConfig, Target

T = TypeVar("T")
Instant = Literal["before", "within", "after"]
SOURCE = Pointer(None, 1)  # what a site serves before any release
CHUNK = 5000  # sites in one commit
CELLS = tuple(
    Cell(pattern="all", species=s, n=600, errors=0, worse=0, better=0) for s in ("print", "bona_fide")
)
GOOD = Evidence(cells=CELLS, trust_ratio=0.01, margin_drop=0.0, stream_n=500, age_seconds=1.0, finite=True)
BAD = GOOD.model_copy(update={"trust_ratio": 0.5})


class Died(Exception):
    """Stands for a SIGKILL of the driver at this point."""


class MortalStore(Store):
    """A ledger's store whose process dies at a write.

    ``within`` a transaction nothing of it is stored; ``before`` and ``after`` it, all or nothing is.
    """

    left = -1  # writes until it dies; negative: it lives on
    instant: Instant = "within"

    @contextmanager
    def write(self, *, exclusive: bool = False):  # pyright: ignore  # the types are those of Store
        """Opens one transaction, and dies before or after it if this is the one."""
        self._die("before")
        with super().write(exclusive=exclusive) as c:
            yield c
        self._die("after")

    def append(self, c, kind, payload, now) -> None:  # pyright: ignore  # the types are those of Store
        """Appends to the audit chain, and dies within the transaction if this is the one."""
        super().append(c, kind, payload, now)
        self._die("within")

    def _die(self, instant: Instant) -> None:
        if instant == self.instant and self.left >= 0:
            self.left -= 1
            if self.left < 0:
                raise Died(instant)


class LedgerFleet:
    """Sites, people and a driver around one ledger."""

    def __init__(self, url: str, tags: Mapping[str, Mapping[str, str]], at: datetime) -> None:
        self.url, self.tags, self.now = url, tags, at
        self.reopen()

    @classmethod
    def create(
        cls, url: str, tags: Mapping[str, Mapping[str, str]], at: datetime, *, sources: int = 1
    ) -> LedgerFleet:
        """Makes a ledger with the sites of ``tags`` and source models, of which the first is the champion."""
        fleet = cls(url, tags, at)
        for i in range(sources):
            given = {"size": 112, "threshold": 0.5, "method": "rise", "trunk_digest": "t" * 64}
            manifest = Manifest(config=ModelConfig(), digest="abcdef"[i] * 64, **given)
            fleet.ledger.sources.add(manifest, path="source", lineage="", now=at)
        fleet.ledger.streams.register(tags, now=at)
        return fleet

    def reopen(self) -> None:
        """Opens the ledger again, as a new process does after a crash."""
        self.store = MortalStore.open(self.url)
        self.ledger = Ledger(self.store)
        self.refresh()

    def refresh(self) -> None:
        """Reads the newest rollout as it is stored now."""
        rows = self.ledger.plans.rollouts()
        self._row: RolloutRow | None = rows[0] if rows else None

    def close(self) -> None:
        """Gives the connections back."""
        self.ledger.close()

    @contextmanager
    def dying(self, left: int, instant: Instant) -> Iterator[None]:
        """Lets the driver die at its write number ``left`` in here, counted from 0; negative: never."""
        self.store.left, self.store.instant = left, instant
        try:
            yield
        finally:
            self.store.left = -1

    @property
    def row(self) -> RolloutRow:
        """The newest rollout's row as this process last read it."""
        assert self._row is not None
        return self._row

    @property
    def r(self) -> Rollout:
        """The state machine's memory of the newest rollout."""
        return load(self.row)

    @property
    def under_way(self) -> bool:
        """Whether a rollout has not ended."""
        return self._row is not None and Status(self._row.status) not in TERMINAL

    def learn(
        self, ends: Mapping[str, int], *, failing: Collection[str] = (), samples: int = 1, version: int = 1
    ) -> dict[str, Candidate]:
        """Gives each site, ``ends`` being its place in its stream, a candidate; those of ``failing`` fail."""
        cycle, candidates = self._begin(), dict[str, Candidate]()
        verdicts = {e: assess(GuardsConfig(), e) for e in (GOOD, BAD)}
        for sites in _chunks(list(ends)):
            rows: list[ShardRow] = []
            for slot, s in enumerate(sites):
                evidence = BAD if s in failing else GOOD
                verdict, own = verdicts[evidence], state_id(cycle.id, s)
                window, end = WindowRecord(samples=samples), ends[s] + samples
                given = {
                    "blob": "b" * 64,
                    "slot": slot,
                    "parent": None,
                    "method": "danet",
                    "evidence": evidence,
                }
                rows.append(ShardRow(s, ends[s], end, version, window=window, verdict=verdict, **given))
                candidates[s] = Candidate(Pointer(own, version), own, verdict.outcome, verdict.decisive)
            self.ledger.verdicts.commit(cycle, rows, now=self.now)
        self.ledger.cycles.finish(cycle, summary={}, now=self.now)
        return candidates

    def report(self, segments: Sequence[tuple[str, str, int]], *, samples: int) -> int:
        """Ingests (site, name, offset) of segments; returns how many of them had arrived before."""
        cycle, again = self._begin(), 0
        for part in _chunks(segments):
            rows = [SegmentRow(site, name, "d" * 64, samples, at, samples, 0) for site, name, at in part]
            again += len(self.ledger.streams.commit(cycle, rows, [], now=self.now))
        self.ledger.cycles.finish(cycle, summary={}, now=self.now)
        return again

    def facts(
        self, names: Sequence[str], candidates: Mapping[str, Candidate], controls: Collection[str]
    ) -> dict[str, SiteFacts]:
        """Returns what a plan is made from: what the sites serve, may go back to, and their candidates."""
        completed = [r.id for r in self.ledger.plans.rollouts() if r.status == Status.COMPLETED]
        champion = Pointer(None, self.ledger.sources.champion().version)
        serving, good = (
            {s: Pointer(row.state, row.source_version) for s, row in rows.items()}
            for rows in (self.ledger.releases.serving(names), self.ledger.releases.promoted_by(completed))
        )
        return {
            s: SiteFacts(
                serving=serving.get(s, champion),
                last_good=good.get(s),
                candidate=candidates.get(s),
                control=s in controls,
                tags=self.tags[s],
            )
            for s in names
        }

    def plan(
        self,
        facts: Mapping[str, SiteFacts],
        config: RolloutConfig,
        *,
        version: int = 1,
        before: int | None = None,
    ) -> Draft:
        """Plans the next release and stores it; ``before`` is the source model that it replaces."""
        name = f"release-{len(self.ledger.plans.rollouts()) + 1:05d}"
        draft = machine.plan(name, facts, version, config, source_before=before)
        r = machine.start(draft.plan, self.now)
        event, given = {"event": "planned"}, {"revision": 0, "now": self.now, "draft": draft}
        self.ledger.plans.save(
            name, plan_hash=r.plan_hash, status=r.status, body=r.model_dump_json(), event=event, **given
        )
        self._row = self.ledger.plans.rollout(name)
        return draft

    def join(self, facts: Mapping[str, SiteFacts]) -> dict[str, Target]:
        """Adds late sites to the last wave, if the plan has their zone; returns their targets."""
        r = self.r
        draft, last = (
            machine.plan(self.row.id, facts, r.plan.source_version, r.plan.config),
            len(r.plan.waves) - 1,
        )
        joined = {s: t._replace(wave=last) for s, t in draft.targets.items() if t.zone in r.plan.zones}
        if joined:
            self.save(machine.join(r, count=len(joined)), "joined", joined=joined)
        return joined

    def save(self, r: Rollout, event: str, *, joined: Mapping[str, Target] | None = None) -> None:
        """Stores a person's decision; StaleGeneration if another driver stored one first."""
        self._row = save(self.ledger, self.row, r, event, at=self.now, joined=joined)

    def approve(self, *people: str) -> None:
        """Stores the approval of ``people``."""
        r = before = self.r
        for who in people:
            r = machine.approve(r, hash=self.row.plan_hash, who=who, now=self.now)
        if r != before:
            self.save(r, "approved")

    def step(self, observation: Observation) -> int:
        """Asks the state machine once and carries its actions out; returns how many sites moved."""
        self._row, moved = step(self.ledger, self.row, observation, self.now)
        return moved

    def reconcile(self, observe: Callable[[], Observation]) -> Status:
        """Steps until there is nothing more to do now, as ``pipeline.control.rollout.reconcile`` does."""
        for _ in range(100):
            before = self.r
            moved, after = self.step(observe()), self.r
            if not moved and (after.status, after.wave) == (before.status, before.wave):
                return after.status
        raise AssertionError(f"it reconciles without end: {self.r.status} {self.r.reason}")

    def roll_back(self, reason: str) -> Status:
        """Aborts and rolls back at once, which needs no report of any site."""
        self.save(machine.abort(self.r, reason=reason, now=self.now), "aborted")
        while (r := self.r).status in IN_ROLLBACK:
            self.step(observe_rollback(self.ledger, self.row.id, r))
        return self.r.status

    def _begin(self) -> Cycle:
        """Takes the lease; nobody else is there."""
        return self.ledger.cycles.begin("cycle", "sim", "{}", holder="sim", dead=lambda _: True, now=self.now)


class ObedientFleet:
    """Sites in memory that do what the actions say, and the state machine's memory."""

    def __init__(self, draft: Draft, facts: Mapping[str, SiteFacts], at: datetime) -> None:
        self.draft, self.now, self.r = draft, at, machine.start(draft.plan, at)
        self.targets: dict[str, Target] = dict(draft.targets)
        self.serving = {s: f.serving for s, f in facts.items() if f.serving}
        self.without_data: set[str] = set()
        self.failing: dict[str, str] = {}  # site -> why; those that do not serve their target do not count
        self.breach: tuple[str, ...] = ()
        self.freeze = ""
        self.attack_presentations: int | None = None
        self.actions: tuple[Action, ...] = ()
        self._sets: dict[
            int, tuple[set[str], set[str]]
        ] = {}  # wave -> its sites, and those that serve targets

    def wave(self, i: int) -> tuple[str, ...]:
        """Returns the sites that were planned for a wave."""
        return self.draft.wave(i)

    def leave(self, *sites: str) -> None:
        """Takes ``sites`` out of the fleet."""
        self.targets = {s: t for s, t in self.targets.items() if s not in sites}
        self._sets.clear()

    def move(self, site: str, to: Pointer) -> None:
        """Moves one site by hand, as a person may."""
        self.serving[site] = to
        self._sets.clear()

    def promoted(self, wave: int | None = None) -> set[str]:
        """Returns the sites, of one wave or of all, that serve their targets."""
        if wave is None:
            return {s for i in range(len(self.draft.plan.waves)) for s in self.promoted(i)}
        return self._wave_sets(wave)[1]

    def observe(self) -> Observation:
        """Returns what the state machine decides on."""
        if self.r.status in IN_ROLLBACK:
            on = self.promoted()
            return Observation(returnable=sum(self.targets[s].to != self.targets[s].back for s in on))
        started = min(self.r.wave, len(self.draft.plan.waves) - 1) + 1
        on = {s for s in (*self.failing, *self.r.failed) if s in self.targets and self._serves(s)}
        return Observation(
            waves=tuple(self._observe_wave(i) for i in range(started)),
            failed_returnable=len(on & self.r.failed.keys()),
            failing={s: FailingSite(self.targets[s].wave, why) for s, why in self.failing.items() if s in on},
            breach=self.breach,
            freeze=self.freeze,
        )

    def tick(self, seconds: float = 0.0, *, obey: bool = True) -> Status:
        """Asks the state machine once, ``seconds`` later; the sites do what it says if they ``obey``."""
        self.now += timedelta(seconds=seconds)
        self.r, self.actions = machine.advance(self.r, self.observe(), self.now)
        for action in self.actions if obey else ():
            if action.kind == "promote":
                sites = self.wave(action.wave)
                sites = [s for s in sites if s in self.targets and s not in self.r.failed]
                zones = action.zones
                chosen = [s for s in sites if zones is None or self.targets[s].zone in zones]
                self.serving |= {s: self.targets[s].to for s in chosen}
            elif action.kind == "rollback":
                on = self.promoted()
                self.serving |= {
                    s: self.targets[s].back for s in on if action.sites is None or s in action.sites
                }
            self._sets.clear()
        return self.r.status

    def approve(self, who: str) -> None:
        """Adds the approval of ``who``."""
        self.r = machine.approve(self.r, hash=self.r.plan_hash, who=who, now=self.now)

    def _serves(self, site: str) -> bool:
        return self.serving[site] == self.targets[site].to

    def _wave_sets(self, i: int) -> tuple[set[str], set[str]]:
        if i not in self._sets:
            sites = {s for s in self.wave(i) if s in self.targets}
            self._sets[i] = sites, {s for s in sites if self._serves(s)}
        return self._sets[i]

    def _observe_wave(self, i: int) -> WaveObservation:
        sites, on = self._wave_sets(i)
        failed = {s for s, wave in self.r.failed.items() if wave == i and s in sites}
        late = sites - on - failed if len(sites) - len(failed) > len(on - failed) else set[str]()
        quiet = (self.without_data & on) - failed if self.without_data else set[str]()
        zones, attacks = Counter(self.targets[s].zone for s in late), self.attack_presentations
        count = len(sites) - len(failed)
        return WaveObservation(
            count, zones, min(late, default=""), len(quiet), min(quiet, default=""), attacks
        )


def _chunks(values: Sequence[T]) -> list[Sequence[T]]:
    return [values[i : i + CHUNK] for i in range(0, len(values), CHUNK)]
