"""A rollout on a real ledger: any order of events, a death at every step, two drivers at once."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import settings
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
from pipeline.control import rollout as drive
from pipeline.control.health import observe, observe_rollback
from pipeline.ledger import Ledger, StaleGeneration
from pipeline.rollout import RolloutConfig, Status
from pipeline.simulate.release_fleet import Died
from tests.support.ledgers import T0
from tests.support.rollouts import CONFIG, CONFIGS, CONTROLS, PHASES, QUIET, SITES, SPARE, TAGS, World

INSTANT = st.sampled_from(["before", "within", "after"])


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
        draft = self.w.release(config, later=later, source=source)
        self.kinds[draft.plan.release] = draft.plan.kind
        self.ahead, self.old = False, None

    def guarded(self, work, dies=0, instant="before"):
        """What a driver or a person does; who dies at write number ``dies`` is followed by another."""
        before = self.w.row.revision
        try:
            with self.w.dying(dies - 1, instant):
                work()
        except ro.RolloutError:
            return
        except Died:
            self.w.close()
            self.w.reopen()
            self.ahead = self.ahead or self.w.row.revision == before or self.r.wave < self.top()

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

    @rule(hours=st.sampled_from([0, 0, 0.1, 1.1, 1.1, 6, 30]), dies=st.integers(0, 3), instant=INSTANT)
    def tick(self, hours, dies, instant):
        before, revision = self.r, self.w.row.revision
        self.guarded(lambda: self.w.tick(hours), dies, instant)
        after_it = self.r
        assert after_it.wave >= before.wave
        if before.status in ro.TERMINAL:
            assert (after_it, self.w.row.revision) == (before, revision)
        if after_it.status in ro.IN_PROGRESS and not self.ahead:
            assert self.top() <= after_it.wave

    @rule(again=st.integers(1, 3))
    def reported(self, again):
        self.w.bring()
        for _ in range(again):
            self.guarded(lambda: self.w.tick(1.1))
            self.w.bring()

    @rule(some=st.sets(st.sampled_from(sorted(TAGS)), min_size=1))
    def report_of_some(self, some):
        self.w.bring(sorted(some))

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

    @rule(luck=st.integers(0, 3), dies=st.integers(0, 4), instant=INSTANT)
    def roll_back(self, luck, dies, instant):
        """Also of a rollout that completed."""
        if luck:
            return

        def back():
            self.w.change(lambda r: ro.abort(r, reason="incident", now=self.w.now))
            self.w.tick()

        self.guarded(back, dies, instant)

    @rule(pick=st.integers(0, len(SPARE) - 1))
    def join(self, pick):
        w, r = self.w, self.r
        site = SPARE[pick]
        if not ro.open_to_joiners(r) or r.plan.kind == "source" or site in w.ledger.plans.sites(w.row.id):
            return
        version = r.plan.source_version
        w.join(w.facts_of([site], (version, w.used[version])))

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
                assert (verdict.site, verdict.state) == (site, state) if state else verdict.version == version
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
DEATHS = tuple(itertools.product((0, 1, 2), ("before", "within", "after")))


def released(template, die=(), *, source=False):
    """A release over three waves, a site of the last fails, and back; returns deaths and what was served.

    ``die``: (wave, instant): there the driver dies, once, and another one goes on.
    """
    w = World(template, "crash.db")
    w.release(RELEASED, source=source)
    w.approve("ann")
    deaths, sights = 0, []
    for tick in range(12):
        if tick == 9:
            assert w.r.status == Status.COMPLETED
            sights.append(served(w))
            w.change(lambda r: ro.abort(r, reason="incident", now=w.now))
        if w.r.wave == 2:
            w.bad = {min(s for s, t in w.ledger.plans.targets(w.row.id).items() if t.wave == 2)}
        left = 0 if die and w.r.wave + 1 >= die[0] and not deaths else -1
        try:
            with w.dying(left, die[1] if die else "before"):
                w.tick(1.1)
        except Died:
            deaths += 1
            w.close()
            w.reopen()
            w.tick()
        w.bring()
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
    w.release(RolloutConfig(waves=(0.1, 0.4, 1.0), **quick))
    w.approve("ann")
    planned = w.ledger.plans.targets(w.row.id)
    w.close()
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, context) as pool:
        barrier = manager.Barrier(2)
        for f in [pool.submit(drives, me, w.path, barrier) for me in (1, 2 if aborts else 0)]:
            f.result(100)
    w.reopen()
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
