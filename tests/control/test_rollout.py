"""A rollout on a real ledger: any order of events, a death at every step, two drivers at once."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline import rollout as ro
from pipeline.config import load
from pipeline.control import rollout as drive
from pipeline.control.health import observe, observe_rollback
from pipeline.ledger import Ledger, StaleGeneration
from pipeline.rollout import Candidate, FailingSite, Freeze, Pointer, RolloutConfig, SiteFacts, Status
from tests.support.ledgers import BAD, GOOD, T0, begin, segment, shard

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
        ledger.sources.add(digest * 64, trunk="t" * 64, path="", manifest={}, lineage="", now=T0)
    verdict = shard().verdict
    made = {(None, 2): ledger.sources.judge(2, verdict, GOOD, now=T0)}
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


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """(database file, folder for copies of it); in memory where there is such a folder."""
    memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="drive", dir=memory or tmp_path_factory.getbasetemp()))
    stored(folder / "template.db")
    yield folder / "template.db"
    shutil.rmtree(folder)


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


class Events(RuleBasedStateMachine):
    """Any order of events; whatever happens, the invariants hold after each, and there is an end."""

    template: Path

    @initialize(config=st.sampled_from(CONFIGS), source=st.booleans())
    def begin(self, config, source):
        self.w = World(self.template)
        self.checked = self.verified = self.steps = (
            0  # audit rows whose moves were looked at; that were verified
        )
        self.history: dict[str, list] = {s: [] for s in TAGS}
        self.ahead = False  # a driver died between promoting a wave and remembering it
        self.old = None
        self.kinds: dict[str, str] = {}
        self.planned(config, later=False, source=source)

    def planned(self, config, *, later, source):
        draft = self.w.plan(config, later=later, source=source)
        self.kinds[draft.plan.release] = draft.plan.kind
        self.ahead, self.old = False, None

    def guarded(self, work):
        """What a driver or a person does; either may die, and the next one opens the ledger again."""
        before = self.w.row.revision
        try:
            return work()
        except ro.RolloutError:
            return None
        except Died:
            self.w.close()
            self.w.open()
            self.ahead = self.ahead or self.w.row.revision == before or self.r.wave < self.top()
            return None
        finally:
            self.w.mortal.left = -1

    @property
    def r(self):
        return self.w.r

    def top(self):
        return max((wave for wave, _ in self.w.on().values()), default=-1)

    @rule(config=st.sampled_from(CONFIGS), later=st.booleans(), source=st.booleans())
    def plan(self, config, later, source):
        row = self.w.row
        if Status(row.status) == Status.PLANNED:
            drive.save(
                self.w.ledger, row, ro.supersede(self.r, by="r", now=self.w.now), "superseded", at=self.w.now
            )
        if Status(self.w.row.status) in ro.TERMINAL:
            self.planned(config, later=later, source=source)

    @rule(who=st.sampled_from(["ann", "bob"]))
    def approve(self, who):
        self.guarded(lambda: self.w.approve(who))

    @rule(hours=st.sampled_from([0, 0, 0.1, 1.1, 1.1, 6, 30]), dies=st.integers(0, 3), after=st.booleans())
    def tick(self, hours, dies, after):
        self.w.mortal.left, self.w.mortal.after = dies or -1, after
        before, revision = self.r, self.w.row.revision
        self.guarded(lambda: self.w.tick(hours))
        after_it = self.r
        assert after_it.wave >= before.wave
        if before.status in ro.TERMINAL:
            assert (after_it, self.w.row.revision) == (before, revision)
        if self.w.mortal.left < 0 and after_it.status in ro.IN_PROGRESS and not self.ahead:
            assert self.top() <= after_it.wave

    @rule(again=st.integers(1, 3))
    def reported(self, again):
        self.w.report()
        for _ in range(again):
            self.guarded(lambda: self.w.tick(1.1))
            self.w.report()

    @rule(some=st.sets(st.sampled_from(sorted(TAGS)), min_size=1))
    def report_of_some(self, some):
        self.w.report(sorted(some))

    @rule(some=st.sets(st.sampled_from(sorted(TAGS)), max_size=4))
    def fail(self, some):
        self.w.bad = some

    @rule(really=st.integers(0, 3))
    def breach(self, really):
        self.w.breach = "" if really else "wave 1: apcer: 9.0 % is above 5.0 %"

    @rule()
    def pause(self):
        self.guarded(lambda: self.w.change(lambda r: ro.pause(r, reason="look", now=self.w.now)))

    @rule()
    def resume(self):
        self.guarded(lambda: self.w.change(lambda r: ro.resume(r, now=self.w.now)))

    @rule()
    def retry(self):
        self.guarded(lambda: self.w.change(lambda r: ro.retry(r, now=self.w.now)))

    @rule(who=st.sampled_from(["ann", "bob"]))
    def override(self, who):
        self.guarded(
            lambda: self.w.change(lambda r: ro.override(r, who=who, reason="we know", now=self.w.now))
        )

    @rule(luck=st.integers(0, 3), dies=st.integers(0, 4), after=st.booleans())
    def roll_back(self, luck, dies, after):
        """Also of a rollout that completed."""
        if luck:
            return
        self.w.mortal.left, self.w.mortal.after = dies or -1, after

        def back():
            self.w.change(lambda r: ro.abort(r, reason="incident", now=self.w.now))
            self.w.tick()

        self.guarded(back)

    @rule(pick=st.integers(0, len(SPARE) - 1))
    def join(self, pick):
        w, r = self.w, self.r
        site = SPARE[pick]
        if not ro.open_to_joiners(r) or r.plan.kind == "source" or site in w.ledger.plans.sites(w.row.id):
            return
        version = r.plan.source_version
        draft = ro.plan(
            w.row.id, w.facts([site], (version, w.used[version]), source=False), version, r.plan.config
        )
        new = {s: t._replace(wave=len(r.plan.waves) - 1) for s, t in draft.targets.items()}
        drive.save(w.ledger, w.row, ro.join(r, count=len(new)), "joined", at=w.now, joined=new)

    @rule(site=st.sampled_from(SITES), leaves=st.booleans())
    def leave(self, site, leaves):
        self.w.ledger.streams.set_retired(site, retired=leaves, reason="sold", now=self.w.now)

    @rule(hours=st.integers(-(10**4), 10**4))
    def clock_jump(self, hours):
        self.w.now += timedelta(hours=hours / 10)

    @rule()
    def a_driver_falls_asleep(self):
        self.old = (self.w.row, self.w.look())

    @precondition(
        lambda self: getattr(self, "old", None) is not None and self.old[0].revision < self.w.row.revision
    )
    @rule()
    def it_wakes(self):
        """Whatever it decided, nothing of it is written."""
        (row, seen), ledger, now = self.old, self.w.ledger, self.w.now
        before = len(ledger.audit.rows())
        for work in (
            lambda: ledger.releases.carry_out(
                row.id, [ro.Promote(wave=0)], without=(), reason="", revision=row.revision, now=now
            ),
            lambda: ledger.releases.carry_out(
                row.id, [ro.Rollback()], without=(), reason="", revision=row.revision, now=now
            ),
            lambda: drive.save(ledger, row, drive.load(row), "late", at=now),
        ):
            with pytest.raises(StaleGeneration):
                work()
        with contextlib.suppress(StaleGeneration):
            assert drive.step(ledger, row, seen, now) == (row, 0)
        assert len(ledger.audit.rows()) == before

    @invariant()
    def holds(self):
        if not hasattr(self, "w"):
            return
        self.new_rows_are_allowed()
        r, on, row = self.r, self.w.on(), self.w.row
        if r.status in ro.IN_PROGRESS or r.status in ro.NOT_STARTED | {Status.PAUSED}:  # I3
            reached = min(r.wave + self.ahead, len(r.plan.waves) - 1)
            assert max((wave for wave, _ in on.values()), default=-1) <= reached
            assert len(on) <= sum(w.sites for w in r.plan.waves[: reached + 1]) + r.joined
            for tag, cap in r.plan.config.caps.items():
                values = {s: x[tag] for s, x in TAGS.items() if s in SITES and s not in CONTROLS}
                used = Counter((wave, values[s]) for s, (wave, _) in on.items() if s in values)
                allowed = {
                    v: cap if cap >= 1 else max(1, int(cap * n)) for v, n in Counter(values.values()).items()
                }
                assert all(n <= allowed[v] for (_, v), n in used.items())
        if r.status == Status.ROLLED_BACK and row.status == Status.ROLLED_BACK:
            assert not any(moves for _, moves in on.values())
        self.steps += 1
        if self.steps % 10 == 0 or r.status in ro.TERMINAL:
            self.is_recorded()

    def is_recorded(self):
        """I6."""
        ((last,),) = self.w.asked("select max(seq) from audit")
        if last > self.verified:
            assert self.w.ledger.audit.first_broken() is None
            assert self.w.ledger.releases.verify() == []
            self.verified = last

    def new_rows_are_allowed(self):
        """I4 and I5, of every row since the last look; controls and retired sites."""
        rows = self.w.asked(
            "select site, counter, s.state, s.source_version, rollout, kind, verdict, audit from served s "
            "join targets using (rollout, site) where audit > ? order by audit",
            self.checked,
        )
        self.checked = max([self.checked, *(x[-1] for x in rows)])
        living = set(self.w.living())
        for site, counter, state, version, rollout, kind, verdict_id, _ in rows:
            past = self.history[site]
            assert counter == len(past) + 1
            now = (version, -1 if state is None else int(self.w.passed[state].cycle.split("-")[-1]))
            if kind == "promote":
                verdict = self.w.passed[verdict_id]
                assert (
                    (verdict.site, verdict.state) == (site, state) if state else verdict.offset_to == version
                )
                assert now > (past[-1] if past else (1, -1))
                assert site in living
            assert site not in CONTROLS or self.kinds[rollout] == "source"
            past.append(now)

    def teardown(self):
        if hasattr(self, "w"):
            self.w.to_end()
            self.ahead = False
            self.holds()
            self.is_recorded()
            assert self.w.ledger.plans.rollouts()[0].id == self.w.row.id
            self.w.close()


def run(template, **chosen):
    kind = type("Run", (Events,), {"template": template})
    run_state_machine_as_test(kind, settings=settings(deadline=None, phases=PHASES, **chosen))


@pytest.mark.timeout(300)
def test_any_order_of_events(template):
    run(template, max_examples=60, stateful_step_count=50)


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_any_order_of_events_500_times(template):
    run(template, max_examples=500, stateful_step_count=50)


RELEASED = RolloutConfig(**QUIET, second_approval_from_share=None, abort_share=0.4)
DEATHS = tuple(itertools.product((0, 1, 2), ("carry_out",), (False, True)))


def released(template, die=(), *, source=False):
    """A release over three waves, a site of the last fails, and back; returns deaths and what was served.

    ``die``: (wave, durable step, after it): there the driver dies, once, and another one goes on.
    """
    w = World(template, "crash.db")
    w.plan(RELEASED, source=source)
    w.approve()
    deaths, sights = 0, []
    for tick in range(12):
        if tick == 9:
            assert w.r.status == Status.COMPLETED
            sights.append(served(w))
            w.change(lambda r: ro.abort(r, reason="incident", now=w.now))
        if w.r.wave == 2:
            w.bad = {min(s for s, t in w.ledger.plans.targets(w.row.id).items() if t.wave == 2)}
        if die and w.r.wave + (die[1] == "carry_out") >= die[0] and not deaths:
            w.mortal.fatal, w.mortal.after = die[1], die[2]
        try:
            w.tick(1.1)
        except Died:
            deaths += 1
            w.close()
            w.open()
            w.tick()
        w.report()
    assert w.r.status == Status.ROLLED_BACK
    assert (w.ledger.audit.first_broken(), w.ledger.releases.verify()) == (None, [])
    sights += [served(w), w.ledger.sources.champion().version]
    w.close()
    return deaths, sights


def served(w):
    return sorted(w.asked("select site, state, source_version, max(counter) from served group by site"))


@pytest.mark.parametrize("source", [False, True])
def test_a_death_at_every_step_of_every_wave_changes_nothing(template, source):
    _, undisturbed = released(template, source=source)
    for die in DEATHS:
        assert released(template, die, source=source) == (1, undisturbed), die


def drives(me, path, barrier):
    """A driver in its own process, until the rollout has ended; number 2 aborts it in its second wave."""
    ledger = Ledger.open(f"sqlite:///{path}")
    barrier.wait()
    for _ in range(300):
        row = ledger.plans.rollouts()[0]
        r = drive.load(row)
        if r.status in ro.TERMINAL:
            break
        try:
            if me == 2 and r.wave == 1:
                drive.change(ledger, row, lambda r: ro.abort(r, reason="incident", now=T0), "aborted")
            seen = (
                observe_rollback(ledger, row.id, r)
                if r.status in ro.IN_ROLLBACK
                else observe(CONFIG, ledger, row.id, r)
            )
            drive.step(
                ledger,
                row,
                replace(seen, waves=tuple(replace(w, attack_presentations=None) for w in seen.waves)),
                T0,
            )
        except StaleGeneration:
            continue
    ledger.close()


@pytest.mark.parametrize("aborts", [False, True])
def test_two_drivers_at_once_move_nothing_twice(template, aborts):
    w = World(template, "two.db")
    quick = {
        "bake_seconds": 0,
        "health_samples": 0,
        "health_presentations": 0,
        "second_approval_from_share": None,
    }
    w.plan(RolloutConfig(waves=(0.1, 0.4, 1.0), **quick))
    w.approve()
    planned = w.ledger.plans.targets(w.row.id)
    w.close()
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, context) as pool:
        barrier = manager.Barrier(2)
        for f in [pool.submit(drives, me, w.path, barrier) for me in (1, 2 if aborts else 0)]:
            f.result(100)
    w.open()
    moves = {s: tuple((x.counter, x.kind) for x in w.ledger.releases.history(s)) for s in planned}
    if w.r.status == Status.COMPLETED:
        assert set(moves.values()) == {((1, "promote"),)}
    else:
        assert (aborts, w.r.status, w.on()) == (True, Status.ROLLED_BACK, {})
        assert set(moves.values()) <= {(), ((1, "promote"), (2, "rollback"))}
    writes = [p for _, _, kind, p in w.ledger.audit.rows() if kind == "rollout"]
    assert len(writes) == w.row.revision, "no write was lost"
    assert (w.ledger.audit.first_broken(), w.ledger.releases.verify()) == (None, [])
    w.close()
