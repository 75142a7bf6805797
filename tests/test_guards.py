"""Every guard at its limits, no data holding, and replay of stored evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import guards
from pipeline.guards import Cell, Evidence, GuardsConfig, Verdict, assess, evidence_of

LIMITS = GuardsConfig()
PATTERNS = ("all", "no_depth")


def cell(species="print", *, pattern="all", n=600, errors=0, worse=0, better=0):
    return Cell(pattern=pattern, species=species, n=n, errors=errors, worse=worse, better=better)


def evidence(*cells, **changes):
    base = Evidence(cells=cells or (cell(), cell("bona_fide", n=500)), trust_ratio=0.01, margin_drop=0.1, stream_n=500,
                    age_seconds=10.0, finite=True)  # fmt: skip
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


@pytest.mark.parametrize("species, n, worse, outcome", [
    ("print", 600, 0, "pass"), ("print", 600, 1, "fail"),  # all attacks: 0.5 pp
    ("bona_fide", 500, 1, "pass"), ("bona_fide", 500, 2, "fail"),  # 1 pp
])  # fmt: skip
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
    cells = [cell("print", n=3000, better=60), cell("mask", n=400, errors=6, worse=6), cell("bona_fide", n=500)]
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
    upper = guards.paired_upper95(w, b, m)[0]
    assert upper > (worse - better) / n or upper == 1
    assert guards.paired_upper95(w + 1, b, m)[0] >= upper
    assert guards.paired_upper95(w, b, 10 * m)[0] <= max(upper, 0.0) or worse < better


def test_paired_bound_covers():
    """An exact enumeration would be long; 4,000 draws at a true difference of 1 pp miss it about 5 % of the time."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(600, [0.03, 0.02, 0.95], size=4000).astype(float)
    upper = guards.paired_upper95(draws[:, 0], draws[:, 1], np.full(4000, 600.0))
    assert 0.03 < np.mean(upper < 0.01) < 0.06


@pytest.mark.parametrize("change, where", [
    ({"trust_ratio": 0.11}, "state"), ({"margin_drop": 0.51}, "anchor"),
])  # fmt: skip
def test_trust_region(change, where):
    got = assess(LIMITS, evidence(**change))
    assert findings(got, "fail") == {("trust", where)}
    assert assess(limits(trust={"advisory": True}), evidence(**change)).outcome == "pass"


@pytest.mark.parametrize("change", [
    {"finite": False}, {"stream_n": 99}, {"age_seconds": 86_401.0}, {"age_seconds": math.nan},
    {"trust_ratio": math.nan}, {"margin_drop": None}, {"cells": ()}, {"cells": (cell().model_dump(),)},
    {"cells": (cell("bona_fide", n=500).model_dump(),)}, {"trust_ratio": math.inf},
])  # fmt: skip
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
        st.sampled_from(PATTERNS), st.sampled_from(["print", "mask", "bona_fide"]), counts,
    ),
    max_size=6, unique_by=lambda c: (c.pattern, c.species),
)  # fmt: skip
measured = st.none() | st.floats(0, 2) | st.just(math.nan)


@settings(max_examples=200)
@given(st.builds(
    Evidence, cells=cells.map(tuple), trust_ratio=measured, margin_drop=measured, stream_n=st.integers(0, 300),
    age_seconds=measured, finite=st.booleans(), holds_before=st.integers(0, 4),
))  # fmt: skip
def test_stored_evidence_replays_to_the_stored_verdict(e):
    verdict = assess(LIMITS, e)
    again = Evidence.model_validate_json(e.model_dump_json())
    assert again == e
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict == assess(LIMITS, again)
    if verdict.outcome == "pass":  # nothing without labels approves
        assert {c.species == "bona_fide" for c in e.cells} == {True, False}
        assert e.finite
        assert e.stream_n >= LIMITS.no_data.n_min
    else:
        assert any(r.call == verdict.outcome and not r.advisory for r in verdict.reasons)


def anchor(n=100):
    label = np.repeat([0, 1], [3 * n, n])
    species = ["a"] * n + ["b"] * (2 * n - 5) + ["rare"] * 5 + ["bona_fide"] * n
    return label, species, np.tile(np.where(label, 0.9, 0.1), (2, 1))


def count(candidate, stable, label, species, **more):
    return evidence_of(candidate, stable, label, species, PATTERNS, 0.5, trust_ratio=0.0, stream_n=1, age_seconds=0,
                       **more)  # fmt: skip


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
