"""Plans and the state machine, each rule by itself; tests/control/test_rollout.py runs them in any order."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline import rollout as ro
from pipeline.rollout import Candidate, Excluded, Freeze, Pointer, RolloutConfig, SiteFacts, Status, Target
from pipeline.rollout.calendar import zones_at_night
from pipeline.simulate.release_fleet import ObedientFleet

T0 = datetime(2026, 1, 1, tzinfo=UTC)
SOURCE = Pointer(None, 1)
ALONE = RolloutConfig(second_approval_from_share=None)


def pointer(i):
    return Pointer(f"x{i}", 1)


def candidate(i, outcome="pass", reason=""):
    return Candidate(pointer(i), f"v{i}", outcome, reason)


def fleet(n, tags=lambda i: {}, **changes):
    return {
        f"s{i:05d}": SiteFacts(serving=SOURCE, candidate=candidate(i), tags=tags(i)) for i in range(n)
    } | changes


def sizes(draft):
    return [w.sites for w in draft.plan.waves]


class Fleet(ObedientFleet):
    """Sites with a plan for all of them, and people."""

    def __init__(self, n=100, config=ALONE, facts=None, version=1, **named):
        facts = facts or fleet(n)
        super().__init__(ro.plan("r1", facts, version, config, **named), facts, T0)

    def approve(self, who="ann"):
        super().approve(who)
        return self

    def to_wave(self, w):
        """Bake until wave ``w`` is baking."""
        self.approve()
        for _ in range(60):
            if self.r.wave == w and self.r.status == Status.BAKING:
                return self
            self.tick(3600)
        raise AssertionError(self.r)

    def to_end(self, seconds=3600, ticks=200):
        for _ in range(ticks):
            if self.tick(seconds) in ro.TERMINAL:
                return self.r.status
        raise AssertionError(self.r)


def test_plan_waves_are_cumulative_shares():
    draft = ro.plan("r1", fleet(1000), 1, RolloutConfig())
    assert sizes(draft) == [10, 40, 150, 300, 500]
    assert draft.plan.duration_seconds == 5 * (600 + 3600)
    assert [w.abort_at for w in draft.plan.waves] == [5, 5, 5, 7, 11]
    days = [w.detects_days for w in draft.plan.waves]
    assert all(d is not None and 0 < d < 30 for d in days)
    assert RolloutConfig().presentations_per_day == 40
    faster = ro.plan("r1", fleet(1000), 1, RolloutConfig(presentations_per_day=80)).plan.waves[0].detects_days
    assert faster == pytest.approx(days[0] / 2)


@pytest.mark.parametrize("n, expected", [(1, [1]), (2, [1, 1]), (6, [1, 2, 3]), (0, [])])
def test_plan_of_few_sites_has_no_empty_wave(n, expected):
    assert sizes(ro.plan("r1", fleet(n), 1, RolloutConfig())) == expected


def test_plan_is_reproducible_and_depends_on_the_release():
    sites = fleet(200)
    again = dict(reversed(sites.items()))
    a, b, c = (ro.plan(r, f, 1, RolloutConfig()) for r, f in (("r1", sites), ("r1", again), ("r2", sites)))
    assert ro.plan_hash(a.plan) == ro.plan_hash(b.plan) != ro.plan_hash(c.plan)
    assert a.wave(0) != c.wave(0)
    assert ro.Plan.model_validate_json(a.plan.model_dump_json()) == a.plan


TAGGED = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y"]), st.booleans(), st.booleans()), max_size=60
)


@given(TAGGED, st.sampled_from([0.1, 0.5, 1.0, 3]), st.booleans())
def test_a_plan_is_a_partition_and_keeps_its_caps(drawn, cap, source):
    sites = {
        f"s{i:03d}": SiteFacts(
            serving=SOURCE,
            control=control,
            tags={"region": region, "rig": rig},
            candidate=Candidate(Pointer(None if source else f"x{i}", 2), f"v{i}", "pass" if good else "hold"),
        )
        for i, (region, rig, good, control) in enumerate(drawn)
    }
    config = RolloutConfig(caps={"region": cap}, strata=("rig",))
    draft = ro.plan("r", sites, 2, config, source_before=1 if source else None)
    assert draft.targets.keys() | draft.excluded.keys() == sites.keys()
    assert not draft.targets.keys() & draft.excluded.keys()
    waves = [draft.wave(i) for i in range(len(draft.plan.waves))]
    assert sorted(s for w in waves for s in w) == sorted(draft.targets)
    assert [len(w) for w in waves] == sizes(draft)
    assert all(waves)
    shares = [w.share for w in draft.plan.waves]
    assert shares == sorted(shares)
    free = [s for s in draft.targets if not sites[s].control]
    there = Counter(sites[s].tags["region"] for s in free)
    for wave in waves:
        for value, n in Counter(sites[s].tags["region"] for s in wave if not sites[s].control).items():
            assert n <= (cap if cap >= 1 else max(1, int(cap * there[value])))
    moved = {s for s in draft.targets if sites[s].control}
    assert moved <= set(waves[-1]) if source and waves else not moved


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=200))
def test_every_wave_holds_its_share_of_every_stratum(regions):
    draft = ro.plan(
        "r", fleet(len(regions), lambda i: {"region": regions[i]}), 1, RolloutConfig(strata=("region",))
    )
    total, done = Counter(regions), Counter()
    for i in range(len(draft.plan.waves)):
        done += Counter(regions[int(s[1:])] for s in draft.wave(i))
        for region, n in done.items():
            assert abs(n - sum(done.values()) / len(regions) * total[region]) <= 2
    assert done == total


TARGET = Target(0, pointer(1), SOURCE, "v1", "UTC")


@pytest.mark.parametrize(
    "changed",
    [
        {"wave": 1},
        {"to": pointer(2)},
        {"to": Pointer("x1", 2)},
        {"back": pointer(3)},
        {"back": Pointer(None, 2)},
        {"verdict_id": "v2"},
        {"zone": "Asia/Tokyo"},
    ],
)
def test_the_roster_changes_with_any_change(changed):
    excluded = {"e": Excluded("no candidate")}
    base = ro.roster({"s": TARGET}, excluded)
    assert ro.roster({"s": TARGET._replace(**changed)}, excluded) != base
    assert ro.roster({"t": TARGET}, excluded) != base
    assert ro.roster({"s": TARGET}, {}) != base
    assert ro.roster({"s": TARGET}, {"e": Excluded("no candidate", "v")}) != base
    assert ro.roster({"s": TARGET}, {"e": Excluded("fail")}) != base


def test_plan_takes_only_sites_with_a_passing_stored_verdict():
    sites = {
        "good": fleet(1)["s00000"],
        "bad": SiteFacts(serving=SOURCE, candidate=candidate(7, "fail", "APCER")),
        "held": SiteFacts(serving=SOURCE, candidate=candidate(8, "hold")),
        "unstored": SiteFacts(serving=SOURCE, candidate=Candidate(pointer(3), None, "pass")),
        "none": SiteFacts(serving=SOURCE),
        "same": SiteFacts(serving=pointer(9), candidate=candidate(9)),
        "control": SiteFacts(serving=SOURCE, control=True, candidate=candidate(10)),
        "nowhere": SiteFacts(serving=SOURCE, candidate=candidate(11), tags={"tz": "Mars/Base"}),
    }
    draft = ro.plan("r1", sites, 1, RolloutConfig())
    assert set(draft.targets) == {"good"}
    assert draft.controls == ("control",)
    assert set(draft.excluded) == set(sites) - {"good"}
    assert draft.excluded["bad"] == Excluded("verdict fail: APCER", "v7")
    assert "time zone 'Mars/Base' is not known" in draft.excluded["nowhere"].reason


def test_rollback_goes_to_the_last_good_version_else_the_source():
    c = Candidate(pointer(9), "v1", "pass")
    sites = {
        "kept": SiteFacts(serving=pointer(3), last_good=pointer(2), candidate=c),
        "new": SiteFacts(serving=pointer(3), candidate=c),
        "same": SiteFacts(serving=pointer(3), last_good=pointer(9), candidate=c),
    }
    draft = ro.plan("r1", sites, 1, RolloutConfig())
    assert {s: t.back for s, t in draft.targets.items()} == {
        "kept": pointer(2),
        "new": SOURCE,
        "same": SOURCE,
    }


def test_a_source_release_takes_the_controls_last_and_goes_back_to_the_model_before():
    new = Candidate(Pointer(None, 2), "source-2", "pass")
    sites = {f"s{i}": SiteFacts(serving=SOURCE, candidate=new, control=i % 4 == 0) for i in range(40)}
    sites["s1"] = SiteFacts(serving=pointer(1), last_good=pointer(1), candidate=new)
    f = Fleet(facts=sites, config=ALONE, version=2, source_before=1)
    assert (f.draft.plan.kind, f.draft.plan.source_version, f.draft.plan.source_before) == ("source", 2, 1)
    last = len(f.draft.plan.waves) - 1
    assert {s for s, t in f.targets.items() if sites[s].control} <= set(f.wave(last))
    assert {t.back for s, t in f.targets.items() if s != "s1"} == {SOURCE}
    assert f.targets["s1"].back == pointer(1)
    assert f.approve().to_end() == Status.COMPLETED
    assert set(f.serving.values()) == {Pointer(None, 2)}
    f.r = ro.abort(f.r, reason="incident", now=f.now)
    assert f.to_end() == Status.ROLLED_BACK
    assert f.serving == {s: x.serving for s, x in sites.items()}


def test_controls_per_stratum_stay_when_the_fleet_grows():
    config = RolloutConfig(strata=("rig",))
    tags = {f"s{i}": {"rig": "ab"[i % 2]} for i in range(100)}
    first = ro.choose_controls(tags, config)
    assert sorted(tags[s]["rig"] for s in first) == ["a", "a", "b", "b"]
    assert ro.choose_controls({f"t{i}": {} for i in range(9)}, config) == ()
    assert len(ro.choose_controls({f"t{i}": {} for i in range(10)}, config)) == 1
    assert set(first) == set(ro.choose_controls(dict(reversed(tags.items())), config))


def test_diff_names_what_changed():
    a = ro.plan("r1", fleet(50), 1, RolloutConfig()).targets
    changed = fleet(51)
    del changed["s00000"]
    changed["s00001"] = SiteFacts(serving=SOURCE, candidate=Candidate(pointer(999), "v1", "pass"))
    got = ro.diff(a, ro.plan("r1", changed, 1, RolloutConfig()).targets)
    assert (got.added, got.removed, got.retargeted) == (("s00050",), ("s00000",), ("s00001",))
    assert ro.diff(a, a) == ro.PlanDiff(added=(), removed=(), retargeted=(), moved={})


@pytest.mark.parametrize("waves", [(), (0.5,), (0.5, 0.1, 1.0), (0.0, 1.0), (0.5, 0.5, 1.0)])
def test_waves_must_rise_to_the_whole_fleet(waves):
    with pytest.raises(ValidationError, match="rising shares"):
        RolloutConfig(waves=waves)


@pytest.mark.parametrize(
    "wrong",
    [
        {"caps": {"region": 0}},
        {"night": "22-05"},
        {"night": "24:00-05:00"},
        {"freeze": [{"start": T0, "end": T0}]},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValidationError):
        RolloutConfig(**wrong)


def test_a_healthy_rollout_completes_wave_by_wave():
    f, grown = Fleet(100).approve(), []
    for _ in range(20):
        before = len(f.promoted())
        if f.tick(3600) == Status.COMPLETED:
            break
        if len(f.promoted()) > before:
            grown.append(len(f.promoted()))
    assert grown == [1, 5, 20, 50, 100]
    assert f.actions == (ro.Notify(status=Status.COMPLETED, reason="100 of 100 sites promoted"),)


def test_nothing_happens_before_approval_and_approval_needs_the_hash():
    f = Fleet()
    assert (f.tick(10), f.actions) == (Status.PLANNED, ())
    with pytest.raises(ro.RolloutError, match="plan hash"):
        ro.approve(f.r, hash="0" * 64, who="ann", now=T0)
    assert f.approve().tick() == Status.STAGING
    assert f.actions == (ro.Promote(wave=0),)


def test_a_plan_that_is_not_started_expires():
    assert Fleet().tick(86_401) == Status.EXPIRED
    f = Fleet().approve()
    assert f.tick(86_401) == Status.EXPIRED


def test_advance_is_idempotent():
    f = Fleet(100).to_wave(2)
    f.now += timedelta(seconds=3601)
    a, first = ro.advance(f.r, f.observe(), f.now)
    assert ro.advance(a, f.observe(), f.now) == (a, first)
    assert first == (ro.Promote(wave=3),)


def test_silence_holds_and_then_waits_for_a_person():
    f = Fleet(100).to_wave(1)
    f.without_data = set(f.wave(0))
    assert f.tick(3601) == Status.HOLD
    assert "no data from 1 of 1" in f.r.reason
    assert f.tick(86_401) == Status.PAUSED
    assert isinstance(f.actions[-1], ro.Notify)
    f.without_data = set()
    assert f.tick(10**6) == Status.PAUSED
    f.r = ro.resume(f.r, now=f.now)
    assert f.tick() == Status.BAKING
    assert (f.tick(3600), f.r.wave) == (Status.STAGING, 2)


def test_a_hold_ends_when_the_data_comes():
    f = Fleet(100).to_wave(1)
    f.without_data = set(f.wave(1))
    f.tick(3601)
    f.without_data = set()
    assert (f.tick(1), f.r.wave) == (Status.STAGING, 2)


def test_too_few_labelled_presentations_hold_and_say_so():
    f = Fleet(100).to_wave(1)
    f.attack_presentations = 99
    assert f.tick(3601) == Status.HOLD
    assert f.r.reason == (
        "wave 2 saw 99 labelled attack presentations, rollout.health_presentations wants 100; "
        "record what the red team presents in data.labels"
    )
    f.attack_presentations = 100
    assert f.tick(1) == Status.STAGING


@pytest.mark.parametrize("count, status", [(4, Status.HOLD), (3, Status.STAGING)])
def test_some_silent_sites_may_be_allowed(count, status):
    f = Fleet(100, RolloutConfig(missing_share=0.1, second_approval_from_share=None)).to_wave(3)
    f.without_data = set(f.wave(3)[:count])
    assert f.tick(3601) == status


def test_sites_that_never_take_their_state_hold():
    f = Fleet(100).approve()
    assert f.tick(0, obey=False) == Status.STAGING
    assert f.tick(601, obey=False) == Status.HOLD
    assert f.actions[0] == ro.Promote(wave=0)  # and it is still tried
    f.tick(0)
    assert f.tick(0) == Status.BAKING


@pytest.mark.parametrize("failing, status", [(4, Status.HOLD), (5, Status.ROLLING_BACK)])
def test_share_and_number_of_failing_sites_abort(failing, status):
    f = Fleet(200).to_wave(2)
    bad = f.wave(2)[:failing]
    f.failing = dict.fromkeys(bad, "shadow 9 of 9 > 5")
    f.tick(3601)
    assert f.r.status == status
    if status == Status.HOLD:
        assert f.actions[0] == ro.Rollback(sites=bad)  # these went back by themselves
        assert f.promoted().isdisjoint(bad)
    else:
        assert f.r.reason == "5 of 30 sites of wave 3 fail; 5 abort; shadow 9 of 9 > 5"
        assert f.tick() == Status.ROLLED_BACK
        assert set(f.serving.values()) == {SOURCE}


def test_few_failing_sites_of_a_large_wave_stay_out_and_the_rest_goes_on():
    f = Fleet(1000).to_wave(3)
    bad = f.wave(3)[:6]  # 2 % of 300
    f.failing = dict.fromkeys(bad, "x")
    f.tick()
    assert f.r.failed == dict.fromkeys(bad, 3)
    assert f.to_end() == Status.COMPLETED
    assert f.r.reason == "994 of 1000 sites promoted"
    assert f.promoted() == set(f.targets) - set(bad)


def test_failed_sites_get_another_try_when_a_person_says_so():
    f = Fleet(200).to_wave(2)
    f.failing = dict.fromkeys(f.wave(2)[:4], "x")
    assert f.tick(3601) == Status.HOLD
    f.failing = {}
    f.r = ro.retry(f.r, now=f.now)
    assert (f.r.failed, f.tick(), f.promoted(2)) == ({}, Status.STAGING, set(f.wave(2)))
    assert f.tick() == Status.BAKING, "and it bakes anew"
    assert f.to_end() == Status.COMPLETED


def test_a_whole_small_wave_failing_aborts():
    f = Fleet(6).to_wave(0)
    f.failing = dict.fromkeys(f.wave(0), "x")
    assert f.tick() == Status.ROLLING_BACK


@pytest.mark.parametrize("paused", [False, True])
def test_a_breach_aborts_also_while_paused_or_overridden(paused):
    f = Fleet(100).to_wave(2)
    for who in ("ann", "bob"):
        f.r = ro.override(f.r, who=who, reason="we know", now=f.now)
    if paused:
        f.r = ro.pause(f.r, reason="look", now=f.now)
    f.breach = ("wave 1: apcer: 12 % > 5 %",)
    assert f.tick() == Status.ROLLING_BACK
    assert f.r.reason == f.breach[0]
    assert f.promoted() == set()


def test_rollback_waits_for_no_data_is_repeatable_and_respects_later_moves():
    f = Fleet(100).to_wave(3)
    moved = f.wave(0)[0]
    f.move(moved, pointer(777))  # a person moved it by hand
    f.without_data = set(f.targets)
    f.r = ro.abort(f.r, reason="incident", now=f.now)
    assert f.tick(obey=False) == Status.ROLLING_BACK
    f.r = ro.abort(f.r, reason="again", now=f.now)
    assert (f.tick(), f.actions) == (Status.ROLLING_BACK, (ro.Rollback(sites=None),))
    assert (f.tick(), f.r.reason) == (Status.ROLLED_BACK, "incident")
    assert f.serving[moved] == pointer(777)


def test_rollback_of_an_unstarted_plan_touches_nothing():
    f = Fleet()
    f.r = ro.abort(f.r, reason="no", now=T0)
    assert f.tick() == Status.ROLLED_BACK
    assert [a.kind for a in f.actions] == ["notify"]


def test_supersede_leaves_sites_and_ends():
    f = Fleet(100).to_wave(2)
    f.r, before = ro.supersede(f.r, by="r2", now=f.now), dict(f.serving)
    assert f.tick(10**6) == Status.SUPERSEDED
    assert f.serving == before
    with pytest.raises(ro.RolloutError, match="rollout of r1 is superseded; it cannot be resumed"):
        ro.resume(f.r, now=f.now)


def test_a_large_wave_waits_for_a_second_person():
    f = Fleet(100, RolloutConfig(second_approval_from_share=0.5)).to_wave(2)
    assert f.tick(3601) == Status.HOLD
    assert f.r.reason == (
        f"wave 4 reaches 50% of the fleet: 1 of 2 people approved; somebody else has to say "
        f"`palisade rollout approve {f.r.plan_hash[:8]}`"
    )
    for who in ("ann", "bob"):
        f.r = ro.override(f.r, who=who, reason="we know", now=f.now)
    assert (f.approve("ann").tick(1), f.promoted(3)) == (Status.HOLD, set()), (
        "nobody is two people, nor is an override"
    )
    assert (f.approve("bob").tick(1), f.promoted(3)) == (Status.STAGING, set(f.wave(3)))
    assert f.to_end() == Status.COMPLETED


def test_an_override_takes_two_people_and_expires():
    f = Fleet(100).to_wave(1)
    f.without_data = set(f.targets)
    assert f.tick(3601) == Status.HOLD
    with pytest.raises(ro.RolloutError, match="needs a reason"):
        ro.override(f.r, who="ann", reason=" ", now=f.now)
    for who, status in (("ann", Status.HOLD), ("ann", Status.HOLD), ("bob", Status.STAGING)):
        f.r = ro.override(f.r, who=who, reason="we know", now=f.now)
        assert f.tick(1) == status
    f.tick()
    assert f.tick(3601) == Status.HOLD, "an hour later it is over"
    assert not ro.override_active(f.r, f.now)


def test_a_freeze_holds_without_pausing_and_then_goes_on():
    window = Freeze(start=T0 + timedelta(minutes=90), end=T0 + timedelta(days=9), reason="holidays")
    f = Fleet(100, RolloutConfig(freeze=(window,), second_approval_from_share=None)).to_wave(0)
    assert f.tick(3601) == Status.HOLD
    assert f.r.reason == "no promotions until 2026-01-10 00:00 UTC: holidays"
    for _ in range(7):
        assert f.tick(86_400) == Status.HOLD
    f.now = window.end - timedelta(seconds=1)
    assert f.tick() == Status.HOLD
    assert (f.tick(1), f.promoted(1)) == (Status.STAGING, set(f.wave(1)))
    assert f.to_end() == Status.COMPLETED


def test_an_error_budget_that_is_spent_freezes_and_then_pauses():
    f = Fleet(100).to_wave(0)
    f.freeze = "error budget: 3 % burned in 1 h > 2 %"
    assert (f.tick(3601), f.r.reason) == (Status.HOLD, f.freeze)
    assert f.tick(86_401) == Status.PAUSED


def test_sites_are_promoted_in_their_own_night():
    zones = ("UTC", "Asia/Tokyo")
    config = RolloutConfig(waves=(1.0,), night="22:00-05:00", second_approval_from_share=None)
    f = Fleet(facts=fleet(10, lambda i: {"tz": zones[i % 2]}), config=config).approve()
    f.now = T0.replace(hour=14)  # 23:00 in Tokyo
    f.tick()
    assert {f.targets[s].zone for s in f.promoted()} == {"Asia/Tokyo"}
    f.tick(7 * 3600)
    assert (len(f.promoted()), f.r.status) == (5, Status.STAGING)
    f.tick(3600)  # 22:00 UTC
    assert len(f.promoted()) == 10
    assert f.to_end() == Status.COMPLETED
    assert f.draft.plan.duration_seconds == 600 + 3600 + 86_400


@pytest.mark.parametrize(
    "at, zone, night",
    [
        ("2026-03-29T00:59:00", "Europe/Berlin", True),  # 01:59 there; then the clock goes to 03:00
        ("2026-03-29T01:00:00", "Europe/Berlin", False),
        ("2026-10-25T00:30:00", "Europe/Berlin", True),  # 02:30 there, twice
        ("2026-10-25T01:30:00", "Europe/Berlin", True),
        ("2026-10-25T02:00:00", "Europe/Berlin", False),
        ("2026-07-01T16:30:00", "Asia/Kolkata", True),  # 22:00
        ("2026-07-01T16:29:59", "Asia/Kolkata", False),
    ],
)
def test_a_night_is_the_sites_own_also_when_its_clock_is_changed(at, zone, night):
    now = datetime.fromisoformat(at).replace(tzinfo=UTC)
    assert zones_at_night("22:00-03:00", [zone, zone], now) == ((zone,) if night else ())
    assert zones_at_night("00:00-23:59", [zone], now) == (zone,)
    assert zones_at_night(None, [zone], now) is None


def test_sites_join_the_last_wave_until_it_begins():
    f = Fleet(100)
    f.r = ro.join(f.r, count=2)
    f.to_wave(3)
    f.r = ro.join(f.r, count=1)
    assert (f.r.joined, f.r.plan_hash) == (3, ro.plan_hash(f.draft.plan))
    f.tick(3601)
    assert not ro.open_to_joiners(f.r)
    with pytest.raises(ro.RolloutError, match="cannot be joined any more"):
        ro.join(f.r, count=1)


def test_a_wave_whose_sites_have_all_left_does_not_stop_it():
    f = Fleet(100).to_wave(1)
    f.leave(*f.wave(1))
    assert (f.tick(3601), f.r.wave) == (Status.STAGING, 2)


@pytest.mark.parametrize("wave", [0, 2])
def test_a_clock_that_is_set_back_holds_once_and_says_so(wave):
    f = Fleet(100).to_wave(wave)
    f.now -= timedelta(days=400)
    assert f.tick() == Status.HOLD
    assert f.r.reason.endswith(f"s: wave {wave + 1} bakes anew")
    assert f.r.reason.startswith("the clock went back by 34")
    assert f.actions == (ro.Notify(status=Status.HOLD, reason=f.r.reason),)
    assert f.tick() == Status.BAKING
    assert f.to_end() == Status.COMPLETED


def test_what_has_ended_stays_whatever_the_clock_says():
    f = Fleet(10).approve()
    f.to_end()
    before = f.r
    f.breach = ("x",)
    for seconds in (-(10**6), 10**7):
        assert (f.tick(seconds), f.r, f.actions) == (Status.COMPLETED, before, ())


def test_a_retry_is_for_the_wave_that_flies():
    f = Fleet(300).to_wave(2)
    early, now = f.wave(0)[0], f.wave(2)[0]
    f.r = f.r.model_copy(update={"failed": {early: 0, now: 2}})
    assert ro.retry(f.r, now=f.now).failed == {early: 0}
    f.r = f.r.model_copy(update={"failed": {early: 0}})
    with pytest.raises(ro.RolloutError, match="no site of wave 3 failed"):
        ro.retry(f.r, now=f.now)


def test_two_people_look_at_a_wave_that_covers_a_small_fleet():
    plan = Fleet(2, RolloutConfig()).r.plan
    assert plan.waves[0].share < 0.5
    assert ro.approvals_needed(plan, 0) == 2
