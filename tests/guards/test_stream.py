"""Guards without labels at their limits, what they are measured on, and what earlier versions stored."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.guards import Cell, Evidence, GuardsConfig, Stream, Verdict
from pipeline.guards.stream import SiteHistory, WindowScores, add_hours, measure_stream, usual_modalities
from pipeline.guards.unlabelled import expired
from pipeline.guards.verdict import assess

LIMITS = GuardsConfig()
CELLS = (
    Cell(pattern="full", species="print", n=600, errors=0, worse=0, better=0),
    Cell(pattern="full", species="bona_fide", n=500, errors=0, worse=0, better=0),
)
QUIET = Stream(
    sessions=120,
    taught_bona_fide=60,
    taught_attack=20,
    taught_session=2,
    taught_modalities=(0, 20, 60),
    last=200,
    taught_disagreement=0.03,
    last_bona_fide=150,
    last_champion=150,
    drift_entropy=6.0,
    drift_attack=0.1,
    risk_lower=0.01,
    risk_source=0.05,
    ratchet=0.2,
    hours=((5, 4),) * 24,
    baseline=((50, 40),) * 24,
    age_days=3.0,
    steps=500,
)


def evidence(stream=QUIET, **changes):
    return Evidence(
        cells=CELLS,
        trust_ratio=0.01,
        margin_drop=0.1,
        stream_n=240,
        age_seconds=1.0,
        finite=True,
        stream=stream,
    ).model_copy(update=changes)


def judged(limits=LIMITS, **changes):
    """(outcome, findings that decide) with the quiet stream changed."""
    got = assess(limits, evidence(QUIET.model_copy(update=changes)))
    return got.outcome, {(r.guard, r.where) for r in got.reasons if r.call != "pass" and not r.advisory}


def test_a_quiet_stream_decides_nothing():
    assert judged() == ("pass", set())


@pytest.mark.parametrize(
    "change, finding, outcome",
    [
        ({"taught_session": 3}, ("influence", "session"), "fail"),
        ({"sessions": 19}, ("influence", "sessions"), "hold"),
        ({"taught_bona_fide": 80, "taught_attack": 0}, ("labels", "pseudo labels"), "hold"),
        ({"taught_disagreement": 0.08}, ("labels", "disagreement"), "fail"),
        ({"taught_modalities": (1, 20, 59)}, ("modality", "stream"), "fail"),
        ({"last_bona_fide": 199}, ("collapse", "calls"), "fail"),
        ({"last_bona_fide": 1}, ("collapse", "calls"), "fail"),
        ({"flips_bona_fide": 70, "flips_attack": 51}, ("collapse", "flips"), "hold"),
        ({"ratchet": 4.7}, ("ratchet", "accept rate"), "fail"),
        ({"age_days": 30.1}, ("expiry", "state"), "fail"),
        ({"steps": 10_001}, ("expiry", "state"), "fail"),
    ],
)
def test_each_guard_at_its_limit(change, finding, outcome):
    assert judged(**change) == (outcome, {finding})
    quiet = GuardsConfig.model_validate({finding[0]: {"advisory": True}})
    assert judged(quiet, **change) == ("pass", set())
    reason = next(
        r for r in assess(LIMITS, evidence(QUIET.model_copy(update=change))).reasons if r.guard == finding[0]
    )
    assert reason.number > reason.limit or finding == ("influence", "sessions")
    assert reason.text


@pytest.mark.parametrize(
    "change",
    [
        {"taught_session": 2},
        {"sessions": 20},
        {"sessions": 5, "sessions_before": 15},
        {"taught_disagreement": 0.07},
        {"last_bona_fide": 199, "last_champion": 198},
        {"last": 199, "last_bona_fide": 199},
        {"ratchet": 4.6},
        {"taught_bona_fide": 49, "taught_attack": 0},
        {"age_days": 30.0},
        {"steps": 10_000},
        {"ratchet": None},
        {
            "taught_bona_fide": 0,
            "taught_attack": 0,
            "taught_session": 0,
            "sessions": 1,
            "taught_modalities": (0, 0, 0),
        },
    ],
)
def test_what_is_within_its_limit_or_not_measured_passes(change):
    assert judged(**change) == ("pass", set())


def test_one_session_may_not_be_a_large_part_of_a_small_window():
    loose = GuardsConfig.model_validate({"influence": {"per_session": 50}})
    assert judged(loose, taught_session=12) == ("pass", set())
    assert judged(loose, taught_session=13) == ("fail", {("influence", "window")})


def test_drift_and_risk_are_reported_unless_they_are_made_decisive():
    shifted = QUIET.model_copy(update={"risk_lower": 0.08})
    told = {
        (r.guard, r.call)
        for r in assess(LIMITS, evidence(shifted)).reasons
        if r.advisory and r.guard != "ceiling"
    }
    assert told == {("drift", "hold"), ("risk", "fail")}
    strict = GuardsConfig.model_validate({"drift": {"advisory": False}, "risk": {"advisory": False}})
    assert judged(strict) == ("hold", {("drift", "entropy")})
    assert judged(strict, risk_lower=0.08) == ("fail", {("drift", "entropy"), ("risk", "stream")})


def test_learning_without_a_shift_is_said_and_decides_nothing():
    strict = GuardsConfig.model_validate({"drift": {"advisory": False}})
    got = assess(strict, evidence(QUIET.model_copy(update={"drift_entropy": 0.5})))
    assert got.outcome == "pass"
    assert any("no shift" in r.text and r.advisory for r in got.reasons)


def test_evidence_of_earlier_versions_gives_the_verdict_it_gave():
    old = evidence(Stream()).model_dump(exclude={"stream", "rig", "unseen"})
    got = assess(LIMITS, Evidence.model_validate(old))
    assert got.outcome == "pass"
    assert {r.guard for r in got.reasons} == {"ceiling", "noninferiority", "trust"}


def test_patterns_that_a_rig_cannot_show_are_passed_over():
    both = GuardsConfig.model_validate({"ceiling": {"patterns": ["full", "no-rgb"]}})
    assert assess(both, evidence()).outcome == "hold"
    assert assess(both, evidence(rig=("rgb",), unseen=("no-rgb",))).outcome == "pass"
    only = GuardsConfig.model_validate({g: {"patterns": ["no-rgb"]} for g in ("ceiling", "noninferiority")})
    got = assess(only, evidence(rig=("rgb",), unseen=("no-rgb",)))
    assert got.outcome == "hold"
    assert "shows anything of the rig rgb" in got.decisive


def test_a_candidate_expires():
    made = datetime(2026, 1, 1, tzinfo=UTC)
    assert expired(LIMITS, made, made + timedelta(hours=24)) is None
    late = expired(LIMITS, made, made + timedelta(hours=24, seconds=1))
    assert late and (late.guard, late.call, late.limit) == ("expiry", "fail", 24)
    quiet = expired(
        GuardsConfig.model_validate({"expiry": {"advisory": True}}), made, made + timedelta(days=9)
    )
    assert quiet and quiet.advisory


counts = st.integers(0, 400)
few = st.none() | st.floats(0, 20)


@settings(max_examples=200)
@given(
    st.builds(
        Stream,
        sessions=st.none() | counts,
        taught_bona_fide=counts,
        taught_attack=counts,
        taught_session=counts,
        flips_bona_fide=counts,
        last=counts,
        ratchet=few,
        drift_entropy=few,
        risk_lower=few,
        risk_source=few,
        age_days=few,
        taught_modalities=st.tuples(counts, counts, counts),
        hours=st.just(((1, 1),) * 24),
    )
)
def test_no_stream_approves_and_every_verdict_replays(stream):
    bad = CELLS[0].model_copy(update={"errors": 300})
    assert assess(LIMITS, evidence(stream, cells=(bad, CELLS[1]))).outcome == "fail"
    assert assess(LIMITS, evidence(stream, cells=())).outcome != "pass"
    e = evidence(stream)
    again = Evidence.model_validate_json(e.model_dump_json())
    assert again == e
    verdict = assess(LIMITS, e)
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict == assess(LIMITS, again)


def window(rng, n=200, *, shift=0.0, **changes):
    """A site as the source: nine tenths bona fide, two captures a session, every other sample teaches."""
    real = rng.random(n // 2).repeat(2) < 0.9
    score = np.clip(
        1 / (1 + np.exp(-(np.where(real, 3.0, -3.0) + rng.normal(size=n // 2).repeat(2) + shift))), 0, 1
    )
    label = np.where(np.arange(n) % 2, -1, real.astype(int))
    seen = WindowScores(
        score, score, score, label, np.full(n, 0.01), np.arange(n) // 2, np.full(n, 7), np.arange(n) % 24
    )
    return seen._replace(**changes)


def source(rng, n=1200):
    return 1 / (1 + np.exp(-(np.where(np.arange(n) < n // 2, 3.0, -3.0) + rng.normal(size=n))))


def measured(seen, rng, **history):
    return measure_stream(LIMITS, seen, source(rng), 0.5, history=SiteHistory(**history), steps=7)


def test_a_window_is_counted():
    rng = np.random.default_rng(0)
    seen = window(rng)
    flipped = np.where(np.arange(200) < 3, 1 - seen.score, seen.score)
    got = measured(
        seen._replace(candidate=flipped, present=np.where(np.arange(200) < 50, 1, 7)), rng, sessions=4
    )
    assert (got.sessions, got.sessions_before, got.steps) == (100, 4, 7)
    assert got.taught_bona_fide + got.taught_attack == 100
    assert got.taught_session == 1
    assert got.taught_modalities == (25, 0, 75)
    assert got.flips_bona_fide + got.flips_attack == 3
    assert got.last == 200
    assert abs(got.last_bona_fide - got.last_champion) <= 3
    assert sum(n for n, _ in got.hours) == 100
    assert got.ratchet is None


def test_no_shift_is_found_where_there_is_none_whatever_the_share_of_attacks():
    rng = np.random.default_rng(1)
    found = [measured(window(rng), rng) for _ in range(200)]
    assert sum(max(s.drift_entropy, s.drift_attack) >= np.log(100) for s in found) <= 6  # two at 1 % of 200
    assert not any(s.risk_lower > s.risk_source for s in found)


def test_a_shift_is_found():
    rng = np.random.default_rng(2)
    found = [measured(window(rng, 400, shift=-1.5), rng) for _ in range(20)]
    assert sum(s.drift_entropy >= np.log(100) for s in found) >= 18


def test_a_doubtful_site_is_a_risk():
    rng = np.random.default_rng(3)
    seen = window(rng, 2000)
    unsure = measured(seen._replace(score=np.where(seen.score > 0.5, 0.6, 0.4)), rng)
    assert unsure.risk_lower > unsure.risk_source + LIMITS.risk.epsilon


def test_a_site_that_accepts_more_than_its_hours_did_is_frozen():
    rng = np.random.default_rng(4)
    usual_hours = tuple((40, 28) for _ in range(24))
    seen = window(rng)
    assert measured(seen._replace(score=np.full(200, 0.9)), rng, baseline=usual_hours).ratchet > np.log(100)
    assert measured(seen._replace(score=np.full(200, 0.1)), rng, baseline=usual_hours).ratchet < 1
    assert measured(seen, rng, baseline=((1, 1),) * 24).ratchet is None, "too little is known"


def test_an_empty_window_and_a_missing_source_are_not_measured():
    rng = np.random.default_rng(5)
    none = WindowScores(
        *(
            np.zeros(0, int) if n in ("pseudo_label", "session", "present", "hour") else np.zeros(0)
            for n in WindowScores._fields
        )
    )
    got = measured(none, rng)
    assert (got.sessions, got.drift_entropy, got.risk_lower) == (0, None, None)
    few_known = measure_stream(LIMITS, window(rng), np.zeros(10), 0.5, history=SiteHistory(), steps=None)
    assert (few_known.drift_attack, few_known.risk_source) == (None, None)
    assert assess(LIMITS, evidence(got)).outcome == "pass"


def test_hours_add_up():
    a, b = ((1, 0),) * 24, ((2, 2),) * 24
    assert add_hours(a, b) == ((3, 2),) * 24
    assert add_hours((), b) == b == add_hours(b, ())
    assert usual_modalities(np.array([7, 3, 3])) == 3
    assert usual_modalities(np.zeros(0, np.int64)) == 0
