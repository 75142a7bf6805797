"""Every guard at its limits, no data holding, and replay of stored evidence."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.guards import Cell, Evidence, GuardsConfig, Verdict
from pipeline.guards.evidence import evidence_of
from pipeline.guards.fleet import (
    LabelledCounts,
    PromotedFindings,
    compare_with_controls,
    error_budget,
    judge_promoted,
)
from pipeline.guards.verdict import assess, paired_upper95

LIMITS = GuardsConfig()
PATTERNS = ("all", "no_depth")


def cell(species="print", *, pattern="all", n=600, errors=0, worse=0, better=0):
    return Cell(pattern=pattern, species=species, n=n, errors=errors, worse=worse, better=better)


def evidence(*cells, **changes):
    base = Evidence(
        cells=cells or (cell(), cell("bona_fide", n=500)),
        trust_ratio=0.01,
        margin_drop=0.1,
        stream_n=500,
        age_seconds=10.0,
        finite=True,
    )
    return Evidence.model_validate(base.model_dump() | changes)


def limits(**sections):
    return GuardsConfig.model_validate(sections)


def findings(verdict, call):
    return {(r.guard, r.where) for r in verdict.reasons if r.call == call and not r.advisory}


def test_a_clean_candidate_passes_and_says_why():
    got = assess(LIMITS, evidence())
    assert got.outcome == "pass"
    assert {r.guard for r in got.reasons} == {"ceiling", "noninferiority", "trust"}
    assert got.labels == "anchor"
    assert all(r.number is not None and r.limit is not None and r.text for r in got.reasons)


@pytest.mark.parametrize("errors, outcome", [(31, "pass"), (32, "fail")])  # of 600: upper95 6.91 and 7.10 %
def test_ceiling_on_apcer_is_an_upper_bound(errors, outcome):
    got = assess(LIMITS, evidence(cell(errors=errors), cell("bona_fide", n=500)))
    assert got.outcome == outcome
    assert ("ceiling", "all/print") in findings(got, outcome)


def test_ceiling_names_the_worst_species_and_pattern():
    cells = [cell(s, pattern=p) for p in PATTERNS for s in ("print", "mask", "bona_fide")]
    cells[4] = cell("mask", pattern="no_depth", errors=90)
    got = assess(LIMITS, evidence(*cells))
    assert findings(got, "fail") == {("ceiling", "no_depth/mask")}
    reason = next(r for r in got.reasons if r.call == "fail")
    assert "APCER of mask under no_depth: 90 of 600" in reason.text


def test_ceiling_patterns_and_limits_per_pattern():
    cells = [cell(s, pattern=p) for p in PATTERNS for s in ("print", "bona_fide")]
    cells[2] = cell(pattern="no_depth", errors=90)
    assert assess(limits(ceiling={"patterns": ["all"]}), evidence(*cells)).outcome == "pass"
    loose = limits(ceiling={"per_pattern": {"no_depth": {"apcer": 0.3}}})
    assert assess(loose, evidence(*cells)).outcome == "pass"
    assert assess(LIMITS, evidence(*cells)).outcome == "fail"


def test_bpcer_has_its_own_ceiling():
    got = assess(LIMITS, evidence(cell(), cell("bona_fide", n=500, errors=80)))
    assert findings(got, "fail") == {("ceiling", "all/bona_fide")}


def test_missed_target_is_reported_and_decides_nothing():
    got = assess(LIMITS, evidence(cell(errors=20), cell("bona_fide", n=500)))
    assert got.outcome == "pass"
    assert any(r.advisory and "target 2.00%" in r.text for r in got.reasons)


@pytest.mark.parametrize(
    "species, n, worse, outcome",
    [
        ("print", 600, 0, "pass"),
        ("print", 600, 1, "fail"),  # all attacks: 0.5 pp
        ("bona_fide", 500, 1, "pass"),
        ("bona_fide", 500, 2, "fail"),  # 1 pp
    ],
)
def test_noninferiority_limits(species, n, worse, outcome):
    other = cell("bona_fide", n=500) if species == "print" else cell()
    got = assess(LIMITS, evidence(cell(species, n=n, errors=worse, worse=worse), other))
    assert got.outcome == outcome


def test_gains_pay_for_losses():
    lost = cell(errors=1, worse=1)
    assert assess(LIMITS, evidence(lost, cell("bona_fide", n=500))).outcome == "fail"
    gained = lost.model_copy(update={"better": 9})
    assert assess(LIMITS, evidence(gained, cell("bona_fide", n=500))).outcome == "pass"


def test_one_bad_species_is_not_hidden_by_the_others():
    cells = [
        cell("print", n=3000, better=60),
        cell("mask", n=400, errors=6, worse=6),
        cell("bona_fide", n=500),
    ]
    got = assess(LIMITS, evidence(*cells))
    assert findings(got, "fail") == {("noninferiority", "all/mask")}


def test_under_resolved_cells_allow_no_loss_or_hold():
    small = [cell(s, n=150) for s in ("a", "b", "c", "d")] + [cell("bona_fide", n=500)]
    assert assess(LIMITS, evidence(*small)).outcome == "pass"
    assert any("150 items resolve" in r.text for r in assess(LIMITS, evidence(*small)).reasons)
    assert assess(limits(noninferiority={"under_resolved": "hold"}), evidence(*small)).outcome == "hold"
    worse = [cell("a", n=150, errors=1, worse=1), *small[1:]]
    assert ("noninferiority", "all/a") in findings(assess(LIMITS, evidence(*worse)), "fail")


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2000))
def test_paired_bound_moves_the_right_way(worse, better, rest):
    n = worse + better + rest + 1
    w, b, m = (np.array([float(x)]) for x in (worse, better, n))
    upper = paired_upper95(w, b, m)[0]
    assert upper > (worse - better) / n or upper == 1
    assert paired_upper95(w + 1, b, m)[0] >= upper
    assert paired_upper95(w, b, 10 * m)[0] <= max(upper, 0.0) or worse < better


def test_paired_bound_covers():
    """By 4,000 draws, an exact enumeration being long: a true difference of 1 pp is missed in about 5 %."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(600, [0.03, 0.02, 0.95], size=4000).astype(float)
    upper = paired_upper95(draws[:, 0], draws[:, 1], np.full(4000, 600.0))
    assert 0.03 < np.mean(upper < 0.01) < 0.06


@pytest.mark.parametrize(
    "change, where", [({"trust_ratio": 0.11}, "state"), ({"margin_drop": 1.51}, "anchor")]
)
def test_trust_region(change, where):
    got = assess(LIMITS, evidence(**change))
    assert findings(got, "fail") == {("trust", where)}
    assert assess(limits(trust={"advisory": True}), evidence(**change)).outcome == "pass"


@pytest.mark.parametrize(
    "change",
    [
        {"finite": False},
        {"stream_n": 99},
        {"age_seconds": 86_401.0},
        {"age_seconds": math.nan},
        {"trust_ratio": math.nan},
        {"margin_drop": None},
        {"cells": ()},
        {"cells": (cell().model_dump(),)},
        {"cells": (cell("bona_fide", n=500).model_dump(),)},
        {"trust_ratio": math.inf},
    ],
)
def test_no_data_holds(change):
    got = assess(LIMITS, evidence(**change))
    assert got.outcome == "hold"
    assert not got.abort


def test_a_pattern_that_a_guard_names_must_be_there():
    named = limits(ceiling={"patterns": ["no_depth"]})
    got = assess(named, evidence())
    assert got.outcome == "hold"
    assert "no anchor attacks were replayed under pattern no_depth" in {r.text for r in got.reasons}


def test_small_species_hold_unless_clearly_bad():
    good, bad = cell("mask", n=20), cell("mask", n=20, errors=15)
    rest = [cell(), cell("bona_fide", n=500)]
    assert assess(LIMITS, evidence(good, *rest)).outcome == "hold"
    assert assess(LIMITS, evidence(bad, *rest)).outcome == "fail"


def test_too_many_holds_abort():
    assert not assess(LIMITS, evidence(stream_n=1, holds_before=1)).abort
    assert assess(LIMITS, evidence(stream_n=1, holds_before=2)).abort
    assert not assess(LIMITS, evidence(holds_before=5)).abort


def test_scores_that_are_not_finite_are_not_judged():
    got = assess(LIMITS, evidence(cell(errors=600), cell("bona_fide", n=500), finite=False))
    assert {r.guard for r in got.reasons} == {"no_data"}


counts = st.integers(1, 400).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n // 2), st.integers(0, n // 2))
)
cells = st.lists(
    st.builds(
        lambda p, s, k: cell(s, pattern=p, n=k[0], errors=k[1], worse=k[2], better=k[3]),
        st.sampled_from(PATTERNS),
        st.sampled_from(["print", "mask", "bona_fide"]),
        counts,
    ),
    max_size=6,
    unique_by=lambda c: (c.pattern, c.species),
)
measured = st.none() | st.floats(0, 2) | st.just(math.nan)


@settings(max_examples=200)
@given(
    st.builds(
        Evidence,
        cells=cells.map(tuple),
        trust_ratio=measured,
        margin_drop=measured,
        stream_n=st.integers(0, 300),
        age_seconds=measured,
        finite=st.booleans(),
        holds_before=st.integers(0, 4),
    )
)
def test_stored_evidence_replays_to_the_stored_verdict(e):
    verdict = assess(LIMITS, e)
    again = Evidence.model_validate_json(e.model_dump_json())
    assert again == e
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict == assess(LIMITS, again)
    if verdict.outcome == "pass":  # nothing without labels approves
        assert {c.species == "bona_fide" for c in e.cells} == {True, False}
        assert e.finite
        assert e.stream_n >= LIMITS.no_data.stream_min
    else:
        assert any(r.call == verdict.outcome and not r.advisory for r in verdict.reasons)


def anchor(n=100):
    label = np.repeat([0, 1], [3 * n, n])
    species = ["a"] * n + ["b"] * (2 * n - 5) + ["rare"] * 5 + ["bona_fide"] * n
    return label, species, np.tile(np.where(label, 0.9, 0.1), (2, 1))


def count(candidate, stable, label, species, **more):
    return evidence_of(
        candidate, stable, label, species, PATTERNS, 0.5, trust_ratio=0.0, stream_n=1, age_seconds=0, **more
    )


def test_evidence_counts_by_pattern_and_species():
    label, species, stable = anchor()
    candidate = stable.copy()
    stable[1, 0] = 0.6  # champion wrong, candidate right
    candidate[1, 1:3] = 0.5  # candidate wrong: the threshold itself is bona fide
    candidate[0, -1] = 0.4
    e = count(candidate, stable, label, species)
    got = {(c.pattern, c.species): c for c in e.cells}
    assert got[("no_depth", "a")] == cell("a", pattern="no_depth", n=100, errors=2, worse=2, better=1)
    assert got[("all", "bona_fide")] == cell("bona_fide", n=100, errors=1, worse=1)
    assert got[("all", "other")].n == 5
    assert e.merged == ("rare",)
    assert e.finite


def test_evidence_matches_a_plain_loop():
    rng = np.random.default_rng(3)
    label, species, _ = anchor(40)
    c, s = rng.random((2, 2, len(label)))
    valid = rng.random(c.shape) < 0.8
    for got in count(c, s, label, species, valid=valid, merge_below=0).cells:
        p = PATTERNS.index(got.pattern)
        rows = [i for i, name in enumerate(species) if name == got.species and valid[p, i]]
        wrong = [[(x[p, i] >= 0.5) != bool(label[i]) for i in rows] for x in (c, s)]
        assert got.n == len(rows)
        assert got.errors == sum(wrong[0])
        assert got.worse == sum(a and not b for a, b in zip(*wrong))
        assert got.better == sum(b and not a for a, b in zip(*wrong))


def test_margin_drop_is_of_the_worst_species():
    label, species, stable = anchor()
    logit = np.log(stable / (1 - stable))
    logit[:, :100] += 0.7  # species a comes nearer to bona fide
    e = count(1 / (1 + np.exp(-logit)), stable, label, species)
    assert e.margin_drop == pytest.approx(0.7)


def test_nan_scores_clear_finite_and_hold():
    label, species, stable = anchor()
    candidate = stable.copy()
    candidate[0, 3] = math.nan
    e = count(candidate, stable, label, species)
    assert not e.finite
    assert e.margin_drop is None
    assert assess(LIMITS, e).outcome == "hold"
    valid = ~np.isnan(candidate)
    assert count(candidate, stable, label, species, valid=valid).finite


def test_wrong_shapes_are_named():
    label, species, stable = anchor()
    with pytest.raises(ValueError, match="2 patterns, 399 items"):
        count(stable, stable, label[:-1], species)


def standing(attacks, accepted, *, worse=None, better=None, bona_fide=0, refused=0, names=None):
    """Sites with these counts; by default every accepted attack is one that the way back refuses."""
    a, x = np.broadcast_arrays(attacks, np.atleast_1d(accepted))
    w, b, r, n = (
        np.broadcast_to(v, a.shape)
        for v in (x if worse is None else worse, 0 if better is None else better, refused, bona_fide)
    )
    return LabelledCounts(names or [f"s{i:05d}" for i in range(len(a))], a, x, w, b, n, r)


def test_no_sites_and_no_presentations_are_no_finding():
    assert judge_promoted(LIMITS, standing(0, [])) == PromotedFindings({}, ())
    assert judge_promoted(LIMITS, standing(0, [0, 0])) == PromotedFindings({}, ())


def test_a_site_over_the_hard_ceiling_is_a_breach_that_names_it():
    got = judge_promoted(LIMITS, standing(60, [0, 0, 24, 0], better=1))
    (reason,) = [r for r in got.breach if r.guard == "ceiling"]
    assert reason.where == "s00002"
    assert "APCER of s00002 24 of 60" in reason.text
    assert reason.number > 0.07 == reason.limit
    assert set(got.failing) == {"s00002"}, "its own e-value is over the limit as well"


def test_what_going_back_would_not_mend_is_no_reason_to_go_back():
    assert judge_promoted(LIMITS, standing(60, [24, 24], worse=2, better=2)) == PromotedFindings({}, ())
    assert judge_promoted(LIMITS, standing(60, [24, 24], worse=24, better=0)).breach


def test_a_site_that_refuses_its_people_is_taken_back_alone():
    got = judge_promoted(LIMITS, standing(50, [1, 0], bona_fide=100, refused=[10, 45]))
    assert got.breach == ()
    assert set(got.failing) == {"s00001"}
    assert "BPCER of s00001 45 of 100" in got.failing["s00001"][0].text


def test_many_small_rises_stop_the_wave_before_any_site_stops():
    got = judge_promoted(LIMITS, standing(100, [10] * 100))
    (reason,) = [r for r in got.breach if "attacks accepted" in r.text]
    assert reason.where == "wave"
    assert reason.number > reason.limit == pytest.approx(1 / 0.0018)
    assert not judge_promoted(LIMITS, standing(100, [2] * 100)).breach


def test_advisory_guards_of_the_fleet_decide_nothing():
    quiet = limits(shadow={"advisory": True}, ceiling={"advisory": True})
    assert judge_promoted(quiet, standing(100, [60] * 10, bona_fide=100, refused=90)) == PromotedFindings(
        {}, ()
    )


def test_ten_thousand_sites_are_watched_in_milliseconds():
    rng = np.random.default_rng(0)
    accepted = rng.binomial(100, 0.02, 10_000)
    s = standing(
        100,
        accepted,
        better=rng.binomial(100, 0.02, 10_000),
        bona_fide=500,
        refused=rng.binomial(500, 0.05, 10_000),
    )
    took = []
    for _ in range(5):
        start = time.perf_counter()
        assert judge_promoted(LIMITS, s).breach == ()
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1  # 0.01 s on a free core


def presented(rng, runs, looks, rates, step):
    """[looks, runs, sites] counts so far: attacks accepted now, and those in which now and before differ."""
    now = rng.random((looks * step, runs, len(rates))) < rates
    back = rng.random(now.shape) < 0.02
    parts = (x.reshape(looks, step, runs, -1).sum(1).cumsum(0) for x in (now, now & ~back, back & ~now))
    return tuple(parts)


def stops(rng, runs, looks, rates, step):
    """[runs] presentations per site until a breach, infinity where none comes; and the sites that failed."""
    accepted, worse, better = presented(rng, runs, looks, rates, step)
    found, failed = np.full(runs, np.inf), np.zeros(runs)
    for r in range(runs):
        lost = set()
        for t in range(looks):
            got = judge_promoted(
                LIMITS, standing((t + 1) * step, accepted[t, r], worse=worse[t, r], better=better[t, r])
            )
            lost |= set(got.failing)
            if got.breach:
                found[r] = (t + 1) * step
                break
        failed[r] = len(lost)
    return found, failed


@pytest.mark.slow
def test_five_bad_sites_of_a_hundred_stop_the_first_wave():
    rng = np.random.default_rng(1)
    found, _ = stops(rng, 300, 100, np.where(np.arange(100) < 5, 0.1, 0.02), 2)
    print("stopped", (found < np.inf).mean(), "median", np.median(found), "p95", np.quantile(found, 0.95))
    assert (found < np.inf).mean() >= 0.95
    assert np.median(found) <= 75


@pytest.mark.slow
def test_healthy_releases_are_not_stopped():
    """400 releases of 100 sites and 400 looks: at 1 % four would be stopped."""
    rng = np.random.default_rng(2)
    found, failed = stops(rng, 400, 80, np.full(100, 0.02), 5)
    print("stopped", (found < np.inf).mean(), "sites failed", failed.sum(), "of", 400 * 100)
    assert (found < np.inf).mean() <= 0.01
    assert failed.sum() <= 0.001 * 400 * 100


def test_control_sites_show_a_stratum_that_errs_more():
    strata = {f"t{i}": "north" if i < 5 else "south" for i in range(10)} | {
        "c0": "north",
        "c1": "south",
        "c2": "east",
    }
    treated = standing(200, [20] * 5 + [4] * 5, bona_fide=500, refused=10, names=[f"t{i}" for i in range(10)])
    controls = standing(1000, [20, 20, 900], bona_fide=2000, refused=40, names=["c0", "c1", "c2"])
    (reason,) = compare_with_controls(LIMITS, treated, controls, strata=strata)
    assert (reason.guard, reason.where) == ("controls", "north")
    assert "100 of 1000 at promoted sites, 20 of 1000 at control sites" in reason.text
    assert compare_with_controls(LIMITS, controls, treated, strata=strata) == ()


def test_control_sites_keep_their_false_findings_under_peeking():
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(300):
        a, b = (rng.random((600, 10)) < 0.05).cumsum(0), (rng.random((600, 10)) < 0.05).cumsum(0)
        names = [f"x{i}" for i in range(10)]
        strata = {n: n for n in names}
        found += any(
            compare_with_controls(
                LIMITS, standing(t, a[t - 1], names=names), standing(t, b[t - 1], names=names), strata=strata
            )
            for t in (20, 60, 150, 300, 600)
        )
    assert found / 300 <= 0.05


def test_the_error_budget_freezes_when_it_burns_too_fast():
    quiet = np.full(24, 5.0), np.full(24, 1000.0)
    assert error_budget(LIMITS, *quiet) == ()
    burning = quiet[0].copy()
    burning[-1] = 220  # 22 % in an hour: 3.06 % of the month's 1 %
    (reason,) = error_budget(LIMITS, burning, quiet[1])
    assert (reason.guard, reason.call, reason.where) == ("budget", "hold", "fleet")
    assert reason.number == pytest.approx(0.22 / 7.2)
    burning[-6:] = 142  # 14.2 % for six hours
    assert [r.limit for r in error_budget(LIMITS, burning, quiet[1])] == [0.10]
    assert error_budget(LIMITS, [1], [2]) == (), "one error of two proves nothing"
    assert error_budget(LIMITS, [], []) == ()
