"""Garbage collection keeps everything that a job can ask for next, and deletes the rest."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from pipeline.ledger import Ledger
from pipeline.rollout import TERMINAL, Draft, Pointer, RolloutConfig, Target, plan
from tests.support.ledgers import BAD, GOOD, HELD, T0, begin, segment, shard

SITES = ("s0", "s1", "s2")
DAY = timedelta(days=1)


def planned(targets):
    """A plan with these targets."""
    return Draft(plan("r", {}, 1, RolloutConfig()).plan, targets, {}, ())


class History:
    """A ledger that does what hypothesis draws; a step is a day."""

    def __init__(self, ledger):
        self.ledger, self.day, self.cycle, self.release = ledger, 0, None, None
        ledger.streams.register({s: {} for s in SITES}, now=T0)

    @property
    def now(self):
        return T0 + self.day * DAY

    def adapt(self, picked, evidence):
        """One window of some sites in the running cycle; a site is judged once in a cycle."""
        self.cycle = self.cycle or begin(
            self.ledger, now=self.now, dead=lambda _: True, fingerprint=str(self.day)
        )
        at = {s: self.ledger.streams.site(s).learned_offset for s in picked}
        rows = [segment(s, f"segment-{n}.parquet", n) for s, n in at.items()]
        self.ledger.streams.commit(
            self.cycle,
            [r for r in rows if self.ledger.streams.site(r.site).ingested_offset == r.base_offset],
            [],
            now=self.now,
        )
        made = [
            shard(
                s,
                n,
                n + 10,
                evidence=evidence,
                blob=f"blob-{self.day}",
                slot=i,
                outcomes=f"outcomes-{self.day}-{s}",
            )
            for i, (s, n) in enumerate(at.items())
        ]
        self.ledger.verdicts.commit(self.cycle, made, now=self.now)

    def end_cycle(self, finish):
        """The driver ends, or dies and is replaced by one with another configuration."""
        if self.cycle and finish:
            self.ledger.cycles.finish(self.cycle, summary={}, now=self.now)
        elif self.cycle:
            other = begin(
                self.ledger, now=self.now, dead=lambda _: True, fingerprint=f"other-{self.day}", kind="adapt"
            )
            self.ledger.cycles.finish(other, summary={}, now=self.now)
        self.cycle = None

    def plan(self):
        """Every newest candidate that passed, with the way back that ``rollout/plan.py`` gives it."""
        if self.release and self.release[2] not in TERMINAL:
            return
        latest, good = self.ledger.verdicts.latest(), self.ledger.releases.promoted_by(self.completed())
        targets = {
            s: Target(0, Pointer(v.state, 1), Pointer(good[s].state if s in good else None, 1), v.id)
            for s, v in latest.items()
            if v.outcome == "pass"
        }
        if targets:
            self.release = [f"release-{len(self.ledger.plans.rollouts()):05d}", targets, "planned", 0]
            self.save("planned")

    def move(self, status):
        """Let the rollout go to ``status`` and do what belongs to it."""
        if not self.release or self.release[2] in TERMINAL:
            return
        name, targets, was, _ = self.release
        if (status in {"expired", "superseded"}) != (was == "planned") and status != "staging":
            return
        if status == "staging":
            self.serve(name, {s: t.to.state_id for s, t in targets.items()}, "promote")
        if status == "rolled_back":
            self.serve(name, {s: t.back.state_id for s, t in targets.items()}, "rollback")
        self.save(status)

    def serve(self, rollout, changes, kind):
        pointers = {s: (state, 1) for s, state in changes.items()}
        self.ledger.releases.serve(pointers, rollout=rollout, wave=1, kind=kind, reason="", now=self.now)

    def save(self, status):
        name, targets, _, revision = self.release
        self.release[2:] = (
            status,
            self.ledger.plans.save(
                name,
                plan_hash="h",
                status=status,
                body="{}",
                revision=revision,
                event={},
                now=self.now,
                draft=None if revision else planned(targets),
            ),
        )

    def completed(self):
        return [r.id for r in self.ledger.plans.rollouts() if r.status == "completed"]


STEPS = st.one_of(
    st.tuples(
        st.just("adapt"),
        st.sets(st.sampled_from(SITES), min_size=1),
        st.sampled_from([GOOD, GOOD, HELD, BAD]),
    ),
    st.tuples(st.just("end_cycle"), st.booleans()),
    st.tuples(st.just("plan")),
    st.tuples(
        st.just("move"),
        st.sampled_from(["staging", "completed", "paused", "rolled_back", "expired", "superseded"]),
    ),
)


def played(steps):
    h = History(Ledger.open("sqlite://"))
    for name, *arguments in steps:
        h.day += 1
        getattr(h, name)(*arguments)
    return h


def asked_for_next(h, since):
    """(states by id, verdicts with their outcomes) that some job may read next, as the jobs find them."""
    ledger, rollouts = h.ledger, h.ledger.plans.rollouts()
    ids = {s.learner for s in ledger.streams.sites()}  # adapt
    ids |= {r.state for r in ledger.releases.serving().values()}  # adapt, the red team
    ids |= {
        r.state for r in ledger.releases.promoted_by(h.completed()).values()
    }  # the way back of the next plan
    started = [r for r in rollouts if r.status not in {"planned", "expired", "superseded"}]
    for r in [r for r in rollouts if r.status not in TERMINAL] + started[:1]:  # tick; rollback
        ids |= {p.state_id for t in ledger.plans.targets(r.id).values() for p in (t.to, t.back)}
    running = {c.id for c in ledger.cycles.history() if c.status == "running"}
    kept = [v for v in ledger.verdicts.find() if v.at >= since or v.cycle in running]  # resume, report
    return ledger.verdicts.states([*(ids - {None}), *(v.state for v in kept)]), kept


@given(st.lists(STEPS, min_size=5, max_size=25), st.integers(0, 30))
def test_nothing_that_a_job_may_ask_for_is_missing(steps, days):
    h = played(steps)
    since = T0 + days * DAY
    pointed = h.ledger.garbage.needed(since=since)
    states, kept = asked_for_next(h, since)
    assert {s.blob for s in states.values()} <= pointed.states
    assert {v.window.outcomes_blob for v in kept} == pointed.outcomes
    for site in h.ledger.streams.sites():
        assert pointed.features[site.site] == min(
            [site.learned_offset, *(v.offset_from for v in kept if v.site == site.site)]
        )
    old = [
        s
        for s in h.ledger.verdicts.states([v.state for v in h.ledger.verdicts.find()]).values()
        if s.created_at < since
    ]
    still = {s.blob for s in states.values()} | {
        s.blob
        for site in SITES
        for s in h.ledger.verdicts.states(
            [r.state for r in h.ledger.releases.history(site) if r.since >= since]
        ).values()
    }
    assert pointed.states.isdisjoint({s.blob for s in old} - still)
    h.ledger.close()


def test_what_nothing_points_to_is_let_go(ledger):
    for day in range(4):
        now = T0 + day * DAY
        cycle = begin(ledger, now=now)
        ledger.streams.commit(cycle, [segment(name=f"segment-{day}.parquet", base=10 * day)], [], now=now)
        ledger.verdicts.commit(
            cycle, [shard("s0", 10 * day, 10 * day + 10, blob=f"b{day}", outcomes=f"o{day}")], now=now
        )
        ledger.cycles.finish(cycle, summary={}, now=now)
    served = ledger.verdicts.find(site="s0")[0].state
    ledger.releases.serve({"s0": (served, 1)}, rollout="r", wave=1, kind="promote", reason="", now=T0)
    never = T0 + 9 * DAY
    assert ledger.garbage.needed(since=never).states == {"b0", "b3"}  # served, learner
    assert ledger.garbage.needed(since=never).outcomes == set()
    assert ledger.garbage.needed(since=never).features == {
        "s0": 40,
        **dict.fromkeys(("s1", "s2", "s3", "s4"), 0),
    }
    young = ledger.garbage.needed(since=T0 + 2 * DAY)
    assert (young.states, young.outcomes, young.features["s0"]) == ({"b0", "b2", "b3"}, {"o2", "o3"}, 20)


def test_an_unfinished_cycle_keeps_what_it_made(ledger):
    cycle = begin(ledger)
    ledger.verdicts.commit(cycle, [shard(evidence=BAD)], now=T0)  # no learner points to it
    never = T0 + DAY
    pointed = ledger.garbage.needed(since=never)
    assert (pointed.states, pointed.outcomes, pointed.features["s0"]) == ({"b" * 64}, {"c" * 64}, 0)
    ledger.cycles.finish(cycle, summary={}, now=T0)
    pointed = ledger.garbage.needed(since=never)
    assert (pointed.states, pointed.outcomes, pointed.features["s0"]) == (set(), set(), 10)


def test_the_ways_back_are_kept(ledger):
    """Candidates of four days, one served per day; s0 then learns and serves something else."""
    ids = []
    for day in range(6):
        cycle = begin(ledger, now=T0 + day * DAY)
        ledger.verdicts.commit(
            cycle, [shard("s0", 10 * day, 10 * day + 10, blob=f"b{day}")], now=T0 + day * DAY
        )
        ledger.cycles.finish(cycle, summary={}, now=T0)
        ids.append(ledger.streams.site("s0").learner)

    def release(n, status, *, to, back, serves=True):
        target = Target(0, Pointer(ids[to], 1), Pointer(ids[back], 1), ids[to])
        ledger.plans.save(
            f"r{n}",
            plan_hash="h",
            status=status,
            body="{}",
            revision=0,
            event={},
            now=T0 + n * timedelta(hours=1),
            draft=planned({"s0": target}),
        )
        if serves:
            ledger.releases.serve(
                {"s0": (ids[to], 1)}, rollout=f"r{n}", wave=1, kind="promote", reason="", now=T0
            )

    def kept():
        return sorted(ledger.garbage.needed(since=T0 + 99 * DAY).states)

    release(1, "completed", to=0, back=0)
    release(2, "completed", to=1, back=0)  # from here a rollback leads to b0
    assert kept() == ["b0", "b1", "b5"]
    release(3, "rolled_back", to=2, back=1)  # b1 is the newest promotion that completed, b2 still served
    assert kept() == ["b1", "b2", "b5"]
    release(4, "expired", to=3, back=0, serves=False)
    assert kept() == ["b1", "b2", "b5"]
    release(5, "planned", to=4, back=3, serves=False)
    assert kept() == ["b1", "b2", "b3", "b4", "b5"]
    ledger.releases.serve({"s0": (None, 1)}, rollout="r3", wave=1, kind="rollback", reason="", now=T0)
    assert kept() == ["b1", "b2", "b3", "b4", "b5"]  # r3's plan names b2 as well
