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
from pipeline.rollout import Candidate, FailingSite, Freeze, Pointer, RolloutConfig, SiteFacts, Status
from tests.support.ledgers import BAD, GOOD, T0, begin, segment, shard, source_manifest

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

DURABLE = ("carry_out", "save")

PHASES = (Phase.explicit, Phase.generate)  # a failing run is short enough to read; shrinking it takes minutes


class Died(Exception):
    """The process was killed here."""


class Mortal:
    """A ledger whose process dies before or after its ``left``-th durable step or the next ``fatal`` one."""

    def __init__(self, ledger):
        self.ledger, self.left, self.after, self.fatal = ledger, -1, False, ""

    def __getattr__(self, name):
        part = getattr(self.ledger, name)
        return MortalPart(self, part) if name in ("plans", "releases") else part

    def killing(self, name, real):
        def call(*arguments, **named):
            self.left -= 1
            now = self.left == 0 or self.fatal == name
            if now and not self.after:
                raise Died(name)
            done = real(*arguments, **named)
            if now:
                raise Died(name)
            return done

        return call


class MortalPart:
    """A part of it."""

    def __init__(self, mortal, part):
        self.mortal, self.part = mortal, part

    def __getattr__(self, name):
        real = getattr(self.part, name)
        return self.mortal.killing(name, real) if name in DURABLE else real


def stored(path):
    """Fills a ledger with every site's candidates of all generations; returns the pointers that passed."""
    ledger = Ledger.open(f"sqlite:///{path}")
    ledger.streams.register(TAGS, now=T0)
    for digest in "ab":
        ledger.sources.add(source_manifest(digest * 64), path="", lineage="", now=T0)
    verdict = shard().verdict
    made = {(None, 2): ledger.sources.add_verdict(2, verdict, GOOD, limits=GuardsConfig(), now=T0)}
    for k, (version, _) in enumerate(GENERATIONS):
        cycle = begin(ledger, now=T0 + timedelta(days=k - 9), fingerprint=str(k), dead=lambda _: True)
        rows = [
            replace(
                shard(s, 10 * k, 10 * k + 10, slot=i, evidence=BAD if s == BARRED else GOOD),
                source_version=version,
            )
            for i, s in enumerate(TAGS)
        ]
        ledger.verdicts.commit(cycle, rows, now=T0)
        ledger.cycles.finish(cycle, summary={}, now=T0)
    ledger.close()
    return made


@lru_cache(maxsize=4)
def opened(path):
    """Compiling a ledger's statements costs more than running them, so that all runs on a file share them."""
    return Ledger.open(f"sqlite:///{path}", create=False)


class World:
    """Sites, people and a driver around one ledger; time passes only when somebody says so."""

    def __init__(self, template, name="run.db"):
        self.path = template.with_name(name)
        for end in ("", "-wal", "-shm"):
            self.path.with_name(name + end).unlink(missing_ok=True)
        shutil.copyfile(template, self.path)
        self.now, self.bad, self.breach, self.used = T0, set(), "", {1: 0, 2: 0}
        self.open()
        self.candidates = {
            (s, GENERATIONS[int(v.cycle.split("-")[-1]) - 1]): v
            for v in self.ledger.verdicts.find()
            for s in [v.site]
            if s in TAGS
        }
        self.passed = {v.id: v for v in self.ledger.verdicts.find() if v.outcome == "pass"}
        for (verdict_id,) in self.peek.execute("select id from source_verdicts where outcome = 'pass'"):
            self.passed[verdict_id] = self.ledger.sources.verdict(verdict_id)
        self.cycle = begin(self.ledger, now=T0, fingerprint="reports")
        self.brought = Counter()

    def open(self):
        """With connections of its own: those of a process that died are gone."""
        self.ledger = opened(self.path)
        self.mortal = Mortal(self.ledger)
        self.peek = sqlite3.connect(
            self.path, isolation_level=None
        )  # the tests' own look, past the ledger's queries
        self.known = (None, None, None)

    def close(self):
        self.ledger.close()
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

    def facts(self, names, generation, source):
        serving = {s: Pointer(x.state, x.source_version) for s, x in self.ledger.releases.serving().items()}
        good = self.ledger.releases.promoted_by(
            [r.id for r in self.ledger.plans.rollouts() if r.status == Status.COMPLETED]
        )
        champion = Pointer(None, self.ledger.sources.champion().version)
        made = {}
        for s in names:
            verdict = self.candidates[s, generation]
            to = Candidate(Pointer(verdict.state, generation[0]), verdict.id, verdict.outcome)
            if source:
                to = Candidate(
                    Pointer(None, 2), next(i for i in self.passed if i.startswith("source-2")), "pass"
                )
            last = good.get(s)
            made[s] = SiteFacts(
                serving=serving.get(s, champion),
                last_good=last and Pointer(last.state, last.source_version),
                candidate=to,
                control=s in CONTROLS,
                tags=TAGS[s],
            )
        return made

    def living(self):
        return [s for (s,) in self.asked("select site from sites where status <> 'retired'")]

    def plan(self, config=CONFIGS[0], *, later=False, source=False):
        """Store a plan for the living sites, if it is one for anybody."""
        champion = self.ledger.sources.champion().version
        source = source and champion == 1
        self.used[champion] = min(self.used[champion] + later, 2 if champion == 1 else 1)
        names = [s for s in self.living() if s in SITES]
        name, version = f"r{len(self.ledger.plans.rollouts()) + 1:03d}", 2 if source else champion
        facts = self.facts(names, (champion, self.used[champion]), source)
        draft = ro.plan(name, facts, version, config, source_before=champion if source else None)
        r = ro.start(draft.plan, self.now)
        self.ledger.plans.save(
            name,
            plan_hash=r.plan_hash,
            status=r.status,
            body=r.model_dump_json(),
            revision=0,
            event={"event": "planned"},
            now=self.now,
            draft=draft,
        )
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
        return replace(
            seen,
            waves=waves,
            failing={p.site: FailingSite(p.wave, "shadow 9 of 9") for p in on},
            breach=breach,
        )

    def step(self):
        return drive.step(self.mortal, self.row, self.look(), self.now)

    def tick(self, hours=0.0):
        """As ``pipeline.control.rollout.tick``: until there is nothing more to do now."""
        self.now += timedelta(hours=hours)
        for _ in range(20):
            before = self.r
            _, moved = self.step()
            after = self.r
            if not moved and (after.status, after.wave) == (before.status, before.wave):
                return after.status
        raise AssertionError(f"a tick without end: {self.r.status} {self.r.reason}")

    def change(self, to, event="x"):
        drive.change(self.mortal, self.row, to, event)

    def approve(self, who="ann"):
        self.change(lambda r: ro.approve(r, hash=r.plan_hash, who=who, now=self.now))

    def report(self, names=tuple(TAGS)):
        """Captures of these sites come in."""
        rows = [segment(s, f"n{self.brought[s]}", 7 * self.brought[s], 7) for s in names]
        self.brought.update(names)
        self.ledger.streams.commit(self.cycle, rows, [], now=self.now)

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
            for who in ("ann", "bob"):
                if self.r.status not in ro.IN_ROLLBACK:
                    self.approve(who)
            if self.r.status == Status.PAUSED:
                asked += 1
                if asked < 4:
                    self.change(lambda r: ro.resume(r, now=self.now))
                else:
                    self.change(lambda r: ro.abort(r, reason="enough", now=self.now))
            self.tick(hours)
            self.report()
        raise AssertionError(f"no end: {self.r.status} wave {self.r.wave} {self.r.reason}")
