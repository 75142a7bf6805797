"""A rollout on a real ledger: sites, people and a driver that may die at any durable step."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

from hypothesis import Phase

from pipeline import rollout as ro
from pipeline.config import load
from pipeline.control import rollout as drive
from pipeline.control.health import observe, observe_rollback
from pipeline.guards import GuardsConfig
from pipeline.ledger import Ledger
from pipeline.rollout import Candidate, FailingSite, Freeze, Pointer, RolloutConfig, Status
from pipeline.simulate.release_fleet import LedgerFleet, MortalStore
from tests.support.ledgers import GOOD, T0, shard

CONFIG = load(None, [])
SHARED_MEMORY = Path("/dev/shm")
SITES = tuple(f"s{i:02d}" for i in range(14))
SPARE = ("t00", "t01", "t02")  # they join later
CONTROLS = frozenset({"s03", "s10"})
BARRED = "s06"  # its candidates fail
ZONES = ("UTC", "Asia/Tokyo", "America/New_York")
TAGS = {s: {"region": "ab"[i % 3 == 0], "tz": ZONES[i % 3]} for i, s in enumerate((*SITES, *SPARE))}
GENERATIONS = (
    (1, 0),
    (1, 1),
    (1, 2),
    (2, 0),
    (2, 1),
)  # source version, number: later candidates of the same site
QUIET = {"health_presentations": 0, "health_samples": 5, "waves": (0.1, 0.4, 1.0)}
FROZEN = Freeze(start=T0 + timedelta(hours=5), end=T0 + timedelta(hours=40), reason="holidays")
CONFIGS = (
    RolloutConfig(**QUIET),
    RolloutConfig(**QUIET, caps={"region": 3}, strata=("region",), second_approval_from_share=None),
    RolloutConfig(**QUIET, night="22:00-05:00", missing_share=0.4),
    RolloutConfig(**QUIET, freeze=(FROZEN,), abort_share=0.5, caps={"region": 0.5}),
)
PHASES = (Phase.explicit, Phase.generate)  # a failing run is short enough to read; shrinking it takes minutes


def stored(path):
    """Fills a ledger with every site's candidates of all generations, before anything is served."""
    fleet = LedgerFleet.create(f"sqlite:///{path}", TAGS, T0, sources=2)
    fleet.ledger.sources.add_verdict(2, shard().verdict, GOOD, limits=GuardsConfig(), now=T0)
    for k, (version, _) in enumerate(GENERATIONS):
        fleet.now = T0 + timedelta(days=k - 9)
        fleet.learn(dict.fromkeys(TAGS, 10 * k), failing={BARRED}, samples=10, version=version)
    fleet.close()


@lru_cache(maxsize=4)
def opened(path):
    """Compiling a ledger's statements costs more than running them, so that all runs on a file share them."""
    return MortalStore.open(f"sqlite:///{path}", create=False)


class World(LedgerFleet):
    """A fleet on a copy of the template, with the tests' own look at what is stored."""

    def __init__(self, template, name="run.db"):
        self.path = template.with_name(name)
        for end in ("", "-wal", "-shm"):
            self.path.with_name(name + end).unlink(missing_ok=True)
        shutil.copyfile(template, self.path)
        self.bad, self.breach, self.used, self.brought = set(), "", {1: 0, 2: 0}, Counter()
        super().__init__(f"sqlite:///{self.path}", TAGS, T0)
        verdicts = self.ledger.verdicts.find()
        self.candidates = {(v.site, GENERATIONS[int(v.cycle.split("-")[-1]) - 1]): v for v in verdicts}
        self.passed = {v.id: v for v in verdicts if v.outcome == "pass"}
        for (verdict_id,) in self.asked("select id from source_verdicts where outcome = 'pass'"):
            self.passed[verdict_id] = self.ledger.sources.verdict(verdict_id)

    def reopen(self):
        """With connections of its own: those of a process that died are gone."""
        self.store = opened(self.path)
        self.store.left = -1
        self.ledger = Ledger(self.store)
        self.peek = sqlite3.connect(self.path, isolation_level=None)
        self.known = (None, None, None)

    def close(self):
        super().close()
        self.peek.close()

    def asked(self, query, *values):
        return self.peek.execute(query, values).fetchall()

    @property
    def row(self):
        """The newest rollout as it is stored now."""
        return self._newest()[1]

    @property
    def r(self):
        return self._newest()[2]

    def _newest(self):
        ((name, revision),) = self.asked("select id, revision from rollouts order by id desc limit 1")
        if self.known[0] != (name, revision):
            row = self.ledger.plans.rollout(name)
            self.known = ((name, revision), row, drive.load(row))
        return self.known

    def facts_of(self, names, generation, *, source=False):
        """What a plan is made from: candidates of one generation, or of the new source model."""
        new = next(i for i in self.passed if i.startswith("source-2"))
        candidates = {}
        for s in names:
            verdict = self.candidates[s, generation]
            own = Candidate(Pointer(verdict.state, generation[0]), verdict.id, verdict.outcome)
            candidates[s] = Candidate(Pointer(None, 2), new, "pass") if source else own
        return self.facts(names, candidates, CONTROLS)

    def living(self):
        return [s for (s,) in self.asked("select site from sites where status <> 'retired'")]

    def release(self, config=CONFIGS[0], *, later=False, source=False):
        """Store a plan for the living sites, if it is one for anybody."""
        champion = self.ledger.sources.champion().version
        source = source and champion == 1
        self.used[champion] = min(self.used[champion] + later, 2 if champion == 1 else 1)
        names = [s for s in self.living() if s in SITES]
        facts = self.facts_of(names, (champion, self.used[champion]), source=source)
        given = {"version": 2, "before": champion} if source else {"version": champion}
        draft = self.plan(facts, config, **given)
        if source:
            self.ledger.sources.set_challenger(2, now=self.now)
        return draft

    def look(self):
        row, r = self.row, self.r
        if r.status in ro.IN_ROLLBACK:
            return observe_rollback(self.ledger, row.id, r)
        seen = observe(CONFIG, self.ledger, row.id, r)
        on = self.ledger.plans.promoted(row.id, upto=r.wave, names=sorted(self.bad)) if seen.waves else []
        waves = tuple(replace(w, attack_presentations=None) for w in seen.waves)
        breach = (self.breach,) if self.breach and seen.waves else ()
        failing = {p.site: FailingSite(p.wave, "shadow 9 of 9") for p in on}
        return replace(seen, waves=waves, failing=failing, breach=breach)

    def tick(self, hours=0.0):
        """Until there is nothing more to do now."""
        self.now += timedelta(hours=hours)
        return self.reconcile(self.look)

    def change(self, to, event="x"):
        drive.change(self.ledger, self.row, to, event)

    def bring(self, names=tuple(TAGS)):
        """Captures of these sites come in."""
        self.report([(s, f"n{self.brought[s]}", 7 * self.brought[s]) for s in names], samples=7)
        self.brought.update(names)

    def on(self):
        """Wave of the sites that serve their target of the newest plan, and whether the way back differs."""
        ((champion,),) = self.asked("select value from meta where key = 'champion'")
        served = self.asked("select site, max(counter), state, source_version from served group by site")
        serving = {site: (state, version) for site, _, state, version in served}
        planned = self.asked(
            "select site, wave, state, source_version, back_state, back_version from targets "
            "where rollout = ? and wave >= 0",
            self.row.id,
        )
        return {
            s: (wave, (state, version) != (back, before))
            for s, wave, state, version, back, before in planned
            if serving.get(s, (None, int(champion))) == (state, version)
        }

    def to_end(self, hours=5, ticks=60):
        """People who decide and sites that answer bring it to an end."""
        self.bad, self.breach, asked = set(), "", 0
        for _ in range(ticks):
            if self.r.status in ro.TERMINAL:
                return self.r.status
            if self.r.status not in ro.IN_ROLLBACK:
                self.approve("ann", "bob")
            if self.r.status == Status.PAUSED:
                asked += 1
                if asked < 4:
                    self.change(lambda r: ro.resume(r, now=self.now))
                else:
                    self.change(lambda r: ro.abort(r, reason="enough", now=self.now))
            self.tick(hours)
            self.bring()
        raise AssertionError(f"no end: {self.r.status} wave {self.r.wave} {self.r.reason}")
