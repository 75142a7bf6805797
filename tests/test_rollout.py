"""Plans and the state machine: each rule by itself, then any order of events against the invariants."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

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
from pydantic import ValidationError

from pipeline import rollout as ro
from pipeline.rollout import Candidate, HealthReport, Pointer, RolloutConfig, SiteFacts, Status, WaveEvidence

T0 = datetime(2026, 1, 1, tzinfo=UTC)
SOURCE = Pointer(state_id=None, source_version=1)
OK, FAILING, SILENT = (HealthReport(health=h) for h in ("ok", "failing", "no_data"))


def pointer(i):
    return Pointer(state_id=f"x{i}", source_version=1)


def candidate(i, outcome="pass", reason=""):
    return Candidate(to=pointer(i), verdict_id=f"v{i}", outcome=outcome, reason=reason)


def fleet(n, **changes):
    return {f"s{i:05d}": SiteFacts(serving=SOURCE, candidate=candidate(i)) for i in range(n)} | changes


class Fleet:
    """Sites that do what the actions say, and a store for the rollout."""

    def __init__(self, n=100, config=None, facts=None):
        self.facts = facts or fleet(n)
        self.plan = ro.plan("r1", self.facts, 1, config or RolloutConfig())
        self.r = ro.start(self.plan, T0)
        self.serving = {s: f.serving for s, f in self.facts.items() if f.serving}
        self.health: dict[str, HealthReport] = {}
        self.now = T0
        self.actions: tuple[ro.Action, ...] = ()

    def evidence(self):
        return WaveEvidence(serving=self.serving, health=self.health)

    def tick(self, seconds=0.0, obey=True):
        self.now += timedelta(seconds=seconds)
        self.r, self.actions = ro.advance(self.r, self.evidence(), self.now)
        for a in self.actions:
            if obey and not isinstance(a, ro.Notify):
                self.serving[a.site] = a.to
                self.health.pop(a.site, None)
        return self.r.status

    def approve(self):
        self.r = ro.approve(self.r, hash=self.r.plan_hash, who="ann", now=self.now)
        return self

    def well(self):
        self.health = dict.fromkeys(self.serving, OK)

    def to_wave(self, w):
        """Bake until wave ``w`` is baking."""
        self.approve()
        for _ in range(20):
            if self.r.wave == w and self.r.status == Status.BAKING:
                return self
            self.tick(3601)
            self.well()
        raise AssertionError(self.r)

    def promoted(self):
        return {s for s, p in self.serving.items() if s in self.plan.targets and p == self.plan.targets[s].to}


def test_plan_waves_are_cumulative_shares():
    plan = ro.plan("r1", fleet(1000), 1, RolloutConfig())
    assert [len(w.sites) for w in plan.waves] == [10, 40, 150, 300, 500]
    assert sorted(s for w in plan.waves for s in w.sites) == sorted(plan.targets)
    assert plan.duration_seconds == 5 * (600 + 3600)
    assert [w.abort_at for w in plan.waves] == [5, 5, 5, 7, 11]


@pytest.mark.parametrize("n, sizes", [(1, [1]), (2, [1, 1]), (6, [1, 2, 3]), (0, [])])
def test_plan_of_few_sites_has_no_empty_wave(n, sizes):
    assert [len(w.sites) for w in ro.plan("r1", fleet(n), 1, RolloutConfig()).waves] == sizes


def test_plan_is_reproducible_and_depends_on_the_release():
    sites = fleet(200)
    again = dict(reversed(sites.items()))
    a, b, c = (ro.plan(r, f, 1, RolloutConfig()) for r, f in (("r1", sites), ("r1", again), ("r2", sites)))
    assert ro.plan_hash(a) == ro.plan_hash(b) != ro.plan_hash(c)
    assert a.waves[0] != c.waves[0]
    assert ro.Plan.model_validate_json(a.model_dump_json()) == a


def test_plan_takes_only_sites_with_a_passing_stored_verdict():
    sites = {
        "good": fleet(1)["s00000"],
        "bad": SiteFacts(serving=SOURCE, candidate=candidate(7, "fail", "APCER")),
        "held": SiteFacts(serving=SOURCE, candidate=candidate(8, "hold")),
        "unstored": SiteFacts(serving=SOURCE, candidate=Candidate(to=pointer(3), verdict_id=None, outcome="pass")),
        "none": SiteFacts(serving=SOURCE),
        "same": SiteFacts(serving=pointer(9), candidate=candidate(9)),
        "control": SiteFacts(serving=SOURCE, control=True, candidate=candidate(10)),
    }
    plan = ro.plan("r1", sites, 1, RolloutConfig())
    assert set(plan.targets) == {"good"}
    assert plan.controls == ("control",)
    assert set(plan.excluded) == {"bad", "held", "unstored", "none", "same"}
    assert plan.excluded["bad"] == ro.Excluded(reason="verdict fail: APCER", verdict_id="v7")


def test_rollback_goes_to_the_last_good_version_else_the_source():
    c = Candidate(to=pointer(9), verdict_id="v1", outcome="pass")
    sites = {
        "kept": SiteFacts(serving=pointer(3), last_good=pointer(2), candidate=c),
        "new": SiteFacts(serving=pointer(3), candidate=c),
        "same": SiteFacts(serving=pointer(3), last_good=pointer(9), candidate=c),
    }
    plan = ro.plan("r1", sites, 1, RolloutConfig())
    assert {s: t.back for s, t in plan.targets.items()} == {"kept": pointer(2), "new": SOURCE, "same": SOURCE}


def test_controls_per_stratum_stay_when_the_fleet_grows():
    config = RolloutConfig(stratum="rig")
    tags = {f"s{i}": {"rig": "ab"[i % 2]} for i in range(100)}
    first = ro.choose_controls(tags, config)
    assert sorted(tags[s]["rig"] for s in first) == ["a", "a", "b", "b"]
    assert ro.choose_controls({f"t{i}": {} for i in range(9)}, config) == ()
    assert len(ro.choose_controls({f"t{i}": {} for i in range(10)}, config)) == 1
    assert set(first) == set(ro.choose_controls(dict(reversed(tags.items())), config))


def test_diff_names_what_changed():
    a = ro.plan("r1", fleet(50), 1, RolloutConfig())
    changed = fleet(51)
    del changed["s00000"]
    changed["s00001"] = SiteFacts(serving=SOURCE, candidate=Candidate(to=pointer(999), verdict_id="v1", outcome="pass"))
    got = ro.diff(a, ro.plan("r1", changed, 1, RolloutConfig()))
    assert (got.added, got.removed, got.retargeted) == (("s00050",), ("s00000",), ("s00001",))
    assert ro.diff(a, a) == ro.PlanDiff(added=(), removed=(), retargeted=(), moved={})


@pytest.mark.parametrize("waves", [(), (0.5,), (0.5, 0.1, 1.0), (0.0, 1.0), (0.5, 0.5, 1.0)])
def test_waves_must_rise_to_the_whole_fleet(waves):
    with pytest.raises(ValidationError, match="rising shares"):
        RolloutConfig(waves=waves)


def test_a_healthy_rollout_completes_wave_by_wave():
    f = Fleet(100).approve()
    sizes = []
    for _ in range(20):
        before = len(f.promoted())
        if f.tick(3600) == Status.COMPLETED:
            break
        f.well()
        if len(f.promoted()) > before:
            sizes.append(len(f.promoted()))
    assert sizes == [1, 5, 20, 50, 100]
    assert f.r.status == Status.COMPLETED
    assert f.actions == (ro.Notify(status=Status.COMPLETED, reason="100 of 100 sites promoted"),)


def test_nothing_happens_before_approval_and_approval_needs_the_hash():
    f = Fleet()
    assert f.tick(10) == Status.PLANNED
    assert f.actions == ()
    with pytest.raises(ro.RolloutError, match="plan hash"):
        ro.approve(f.r, hash="0" * 64, who="ann", now=T0)
    assert f.approve().tick() == Status.STAGING
    assert all(isinstance(a, ro.Promote) and a.verdict_id == f.plan.targets[a.site].verdict_id for a in f.actions)


def test_a_plan_that_is_not_started_expires():
    assert Fleet().tick(86_401) == Status.EXPIRED


def test_advance_is_idempotent():
    f = Fleet(100).to_wave(2)
    f.now += timedelta(seconds=3601)
    a, first = ro.advance(f.r, f.evidence(), f.now)
    b, second = ro.advance(a, f.evidence(), f.now)
    assert (a, first) == (b, second)
    assert len(first) == 30


@pytest.mark.parametrize("silence", [None, SILENT])
def test_silence_holds_and_then_waits_for_a_person(silence):
    f = Fleet(100).to_wave(1)
    f.health = dict.fromkeys(f.serving, silence) if silence else {}
    assert f.tick(3601) == Status.HOLD
    assert "no data from 1 of 1" in f.r.reason
    assert f.tick(86_401) == Status.PAUSED
    assert isinstance(f.actions[-1], ro.Notify)
    f.well()
    assert f.tick(10**6) == Status.PAUSED
    f.r = ro.resume(f.r, now=f.now)
    assert f.tick() == Status.BAKING
    f.well()
    assert f.tick(3600) == Status.STAGING
    assert f.r.wave == 2


def test_a_hold_ends_when_the_data_comes():
    f = Fleet(100).to_wave(1)
    f.health = {}
    f.tick(3601)
    f.well()
    assert f.tick(1) == Status.STAGING
    assert f.r.wave == 2


def test_some_silent_sites_may_be_allowed():
    f = Fleet(100, RolloutConfig(missing_share=0.1)).to_wave(3)
    silent = f.plan.waves[3].sites[:4]
    for count, status in ((4, Status.HOLD), (3, Status.STAGING)):
        f.health = {s: OK for s in f.serving if s not in silent[:count]}
        assert f.tick(3601 if count == 4 else 1) == status


def test_sites_that_never_take_their_state_hold():
    f = Fleet(100).approve()
    assert f.tick(0, obey=False) == Status.STAGING
    assert f.tick(601, obey=False) == Status.HOLD
    assert [type(a) for a in f.actions] == [ro.Promote]  # and it is still tried
    assert f.tick(0) == Status.HOLD
    assert f.tick(0) == Status.BAKING


@pytest.mark.parametrize("failing, status", [(4, Status.HOLD), (5, Status.ROLLING_BACK)])
def test_share_and_number_of_failing_sites_abort(failing, status):
    f = Fleet(200).to_wave(2)
    bad = f.plan.waves[2].sites[:failing]
    f.health |= dict.fromkeys(bad, FAILING)
    assert f.tick(3601) == status
    if status == Status.HOLD:
        assert {a.site for a in f.actions} == set(bad)  # these went back by themselves
        assert f.promoted().isdisjoint(bad)
    else:
        assert f.tick() == Status.ROLLED_BACK
        assert f.promoted() == set()
        assert set(f.serving.values()) == {SOURCE}


def test_few_failing_sites_of_a_large_wave_stay_out_and_the_rest_goes_on():
    f = Fleet(1000).to_wave(3)
    bad = f.plan.waves[3].sites[:6]  # 2 % of 300
    f.health |= dict.fromkeys(bad, FAILING)
    f.tick()
    assert f.r.failed == tuple(sorted(bad))
    f.well()
    assert f.tick(3601) == Status.STAGING
    f.well()
    f.tick(1)
    f.well()
    assert f.tick(3601) == Status.COMPLETED
    assert f.r.reason == "994 of 1000 sites promoted"
    assert f.promoted() == set(f.plan.targets) - set(bad)


def test_a_whole_small_wave_failing_aborts():
    f = Fleet(6).to_wave(0)
    f.health = dict.fromkeys(f.plan.waves[0].sites, FAILING)
    assert f.tick() == Status.ROLLING_BACK


def test_a_breach_anywhere_aborts_also_while_paused():
    for paused in (False, True):
        f = Fleet(100).to_wave(2)
        if paused:
            f.r = ro.pause(f.r, reason="look", now=f.now)
        site = f.plan.waves[0].sites[0]
        f.health[site] = HealthReport(health="ok", breach=True, reasons=("APCER of mask 12 %",))
        assert f.tick() == Status.ROLLING_BACK
        assert f.r.reason == f"{site} exceeds a ceiling: APCER of mask 12 %"
        assert {a.site for a in f.actions} == {s for w in f.plan.waves[:3] for s in w.sites}


def test_reports_about_what_a_site_served_before_do_not_count():
    f = Fleet(100).approve()
    f.health = {s: HealthReport(health="failing", breach=True) for s in f.serving}
    assert f.tick() == Status.STAGING


def test_rollback_waits_for_no_data_is_repeatable_and_respects_later_moves():
    f = Fleet(100).to_wave(3)
    moved = f.plan.waves[0].sites[0]
    f.serving[moved] = pointer(777)  # a person moved it by hand
    f.health = {}
    f.r = ro.abort(f.r, reason="incident", now=f.now)
    assert f.tick(obey=False) == Status.ROLLING_BACK
    first = f.actions
    f.r = ro.abort(f.r, reason="again", now=f.now)
    assert f.tick() == Status.ROLLING_BACK
    assert f.actions == first
    assert f.tick() == Status.ROLLED_BACK
    assert f.serving[moved] == pointer(777)
    f.serving[f.plan.waves[1].sites[0]] = f.plan.targets[f.plan.waves[1].sites[0]].to  # a lost write
    f.r = ro.abort(f.r, reason="repeat", now=f.now)
    assert f.tick() == Status.ROLLING_BACK
    assert len(f.actions) == 1


def test_a_rollback_to_the_same_pointer_ends():
    to = Pointer(state_id=None, source_version=1)  # a release of the source model that is gone back to anyway
    site = SiteFacts(serving=pointer(3), candidate=Candidate(to=to, verdict_id="v1", outcome="pass"))
    f = Fleet(facts={"s": site}).approve()
    f.tick()
    f.r = ro.abort(f.r, reason="x", now=f.now)
    assert f.tick() == Status.ROLLED_BACK


def test_a_completed_rollout_can_be_taken_back():
    f = Fleet(10).approve()
    while f.tick(3601) != Status.COMPLETED:
        f.well()
    f.r = ro.abort(f.r, reason="incident", now=f.now)
    f.tick()
    assert f.tick() == Status.ROLLED_BACK
    assert set(f.serving.values()) == {SOURCE}


def test_rollback_of_an_unstarted_plan_touches_nothing():
    f = Fleet()
    f.r = ro.abort(f.r, reason="no", now=T0)
    assert f.tick() == Status.ROLLED_BACK
    assert all(isinstance(a, ro.Notify) for a in f.actions)


def test_supersede_leaves_sites_and_ends():
    f = Fleet(100).to_wave(2)
    f.r = ro.supersede(f.r, by="r2", now=f.now)
    before = dict(f.serving)
    assert f.tick(10**6) == Status.SUPERSEDED
    assert f.serving == before
    with pytest.raises(ro.RolloutError, match="rollout of r1 is superseded; it cannot be resumed"):
        ro.resume(f.r, now=f.now)


def test_a_clock_that_jumps_back_does_not_stop_the_rollout():
    f = Fleet(100).to_wave(1)
    f.now -= timedelta(days=400)
    f.tick()
    assert f.tick(3600) == Status.STAGING


class Any(RuleBasedStateMachine):
    """Any order of events; after it, a person who decides and a fleet that answers bring every rollout to an end."""

    @initialize(n=st.integers(0, 60), missing=st.sampled_from([0.0, 0.2]))
    def begin(self, n, missing):
        facts = fleet(n, ctl=SiteFacts(serving=SOURCE, control=True))
        if n:
            bad = Candidate(to=pointer(5000), verdict_id="v1", outcome="hold", reason="n")
            facts["s00000"] = SiteFacts(serving=SOURCE, candidate=bad)
        self.f = Fleet(config=RolloutConfig(missing_share=missing), facts=facts)
        self.rolled_back: set[str] = set()
        self.went_down = False

    @rule(seconds=st.sampled_from([0, 1, 700, 3601]), obey=st.booleans())
    def tick(self, seconds, obey):
        wave, status = self.f.r.wave, self.f.r.status
        self.f.tick(seconds, obey=obey)
        assert self.f.r.wave >= wave
        if status in ro.TERMINAL:
            assert self.f.r.status == status
            assert not self.f.actions
        for a in self.f.actions:
            if isinstance(a, ro.Promote):  # I4
                assert self.f.facts[a.site].candidate.outcome == "pass"
                assert a.verdict_id == self.f.facts[a.site].candidate.verdict_id
                assert a.site not in self.f.r.failed
        again, actions = ro.advance(self.f.r, self.f.evidence(), self.f.now)
        if not self.f.actions:
            assert (again, actions) == (self.f.r, ())  # nothing to do stays so

    @rule(jump=st.integers(-(10**7), 10**7))
    def clock_jump(self, jump):
        self.f.now += timedelta(seconds=jump)

    @rule()
    def crash(self):
        self.f.r = ro.Rollout.model_validate_json(self.f.r.model_dump_json())

    @rule()
    def approve(self):
        if self.f.r.status in ro.WAITING:
            self.f.approve()

    @rule()
    def well(self):
        self.f.well()

    @rule()
    def silence(self):
        self.f.health = {}

    @rule(pick=st.integers(0, 59), report=st.sampled_from([FAILING, SILENT, HealthReport(health="ok", breach=True)]))
    def report(self, pick, report):
        sites = sorted(self.f.plan.targets)
        if sites:
            self.f.health[sites[pick % len(sites)]] = report

    @precondition(lambda self: self.f.r.status in ro.FLYING)
    @rule()
    def pause(self):
        self.f.r = ro.pause(self.f.r, reason="p", now=self.f.now)

    @precondition(lambda self: self.f.r.status == Status.PAUSED)
    @rule()
    def resume(self):
        self.f.r = ro.resume(self.f.r, now=self.f.now)

    @precondition(lambda self: self.f.r.status not in {Status.SUPERSEDED, Status.EXPIRED})
    @rule(luck=st.integers(0, 3))
    def abort(self, luck):
        if luck == 0:
            self.f.r = ro.abort(self.f.r, reason="a", now=self.f.now)

    @invariant()
    def only_started_waves_are_promoted(self):  # I3
        if not hasattr(self, "f"):
            return
        cap = {s for w in self.f.plan.waves[: self.f.r.wave + 1] for s in w.sites}
        assert self.f.promoted() <= cap
        assert self.f.serving["ctl"] == SOURCE
        if self.f.r.status == Status.ROLLED_BACK:
            assert not self.f.promoted()
        if self.f.r.status == Status.COMPLETED:
            assert self.f.promoted() == set(self.f.plan.targets) - set(self.f.r.failed)

    def teardown(self):
        if not hasattr(self, "f"):
            return
        self.approve()
        for _ in range(40):
            if self.f.r.status in ro.TERMINAL:
                return
            if self.f.r.status == Status.PAUSED:
                self.f.r = ro.abort(self.f.r, reason="decided", now=self.f.now)
            self.f.tick(3601)
        raise AssertionError(f"no end: {self.f.r.status} {self.f.r.reason}")


TestAny = Any.TestCase
TestAny.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


@pytest.mark.slow
def test_any_order_of_events_500_times():
    run_state_machine_as_test(Any, settings=settings(max_examples=500, stateful_step_count=60, deadline=None))
