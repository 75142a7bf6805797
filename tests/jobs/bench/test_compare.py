"""Held-out results of source methods: stored bit for bit, and compared as the metrics count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.bench import speed
from jobs.bench.parts import load, save
from jobs.bench.source import compare
from jobs.bench.source.fits import Result, degenerate, fit_and_score
from pipeline.config import methods
from pipeline.data.protocols import PATTERNS
from pipeline.models import tail as tails
from pipeline.stats import metrics
from tests.support.held_out import SOURCES, TARGET, corpus, task


@pytest.fixture(scope="module")
def result() -> Result:
    return fit_and_score(task(steps=40), SOURCES, [TARGET])


def test_a_result_survives_its_file_bit_for_bit(result: Result, tmp_path: Path) -> None:
    save(tmp_path / "r.npz", result)
    again = load(tmp_path / "r.npz", Result)
    for mine, theirs in zip((*result.dev, *result.test), (*again.dev, *again.test), strict=True):
        assert np.array_equal(mine, theirs)
    assert (again.known, again.radius) == (result.known, result.radius)


def test_a_damaged_file_is_one_clear_line_that_says_what_to_do(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    save(path, result)
    whole = path.read_bytes()
    lines = list[str]()
    for bit in np.linspace(0, 8 * len(whole) - 1, 400).astype(int):
        spoiled = bytearray(whole)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        try:
            again = load(path, Result)
        except ValueError as e:
            lines.append(str(e))
        else:  # of a date, say
            mine, theirs = ((*r.dev, *r.test) for r in (result, again))
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
            assert (again.known, again.radius, again.seconds) == (result.known, result.radius, result.seconds)
    assert lines
    assert all(line.endswith("; delete it and run again") and "\n" not in line for line in lines)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="delete it and run again"):
        load(path, Result)


def test_a_foreign_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "r.npz").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="not a stored result of this version"):
        load(tmp_path / "r.npz", Result)


def test_the_validation_of_a_result_is_the_sources_and_its_test_the_target(result: Result) -> None:
    assert set(result.dev.domain.tolist()) == {"a", "b"}
    assert set(result.test.domain.tolist()) == {"t"}
    assert len(result.test.label) == int((TARGET.split == "test").sum())
    assert result.known == ("bona_fide", "print_a", "print_b", "replay")


def test_the_stored_logit_is_that_of_the_models_own_threshold(result: Result) -> None:
    logit, label = result.scores("dev")
    assert abs(result.threshold()) < 0.5, "calibrated radii put the boundary near 0"
    assert metrics.hter(logit, label, result.threshold()) < 0.2


def test_a_missing_modality_changes_the_score_and_both_fills_are_stored(result: Result) -> None:
    i = list(PATTERNS).index("no-ir")
    assert not np.allclose(result.test.logit[:, i, 0], result.test.logit[:, 0, 0])
    assert not np.allclose(result.test.logit[:, i, 0], result.test.logit[:, i, 1])
    assert np.array_equal(result.test.logit[:, 0, 0], result.test.logit[:, 0, 1]), (
        "nothing is missing, nothing is filled"
    )


def test_a_pattern_that_leaves_nothing_is_not_scored() -> None:
    infrared = [replace(c, present=np.full(len(c), 4, np.uint8)) for c in SOURCES]
    r = fit_and_score(task(), infrared, [replace(TARGET, present=np.full(len(TARGET), 4, np.uint8))])
    i = list(PATTERNS).index("no-ir")
    assert np.isnan(r.test.logit[:, i]).all()
    assert len(r.scores("test", "no-ir")[0]) == 0
    assert np.isfinite(r.test.logit[:, 0]).all()


@pytest.mark.parametrize("head", ["radial", "linear"])
@pytest.mark.parametrize("kind", methods("source"))
def test_every_method_fits_with_both_heads_and_scores_are_finite(kind: str, head: str) -> None:
    r = fit_and_score(task(kind, head=head, steps=3), SOURCES, [TARGET])
    assert np.isfinite(r.test.logit).all()


def test_degenerate_corpora_end_in_a_clear_error_or_finite_scores() -> None:
    found = degenerate(task(), [*SOURCES, corpus("c", seed=3)])
    assert "both classes are needed" in found.pop("one class missing")
    assert "not finite" in found.pop("NaN features")
    assert set(found.values()) == {"finite"}
    assert "a single domain" in found


def test_speed_is_split_into_its_parts() -> None:
    s = speed.measure(task("erm"), SOURCES, workers=0)
    assert min(s) > 0


def runs() -> compare.Runs:
    made: compare.Runs = {}
    for kind in ("erm", "rise"):
        made[kind] = {
            t.domain: [fit_and_score(task(kind, seed=s, steps=6), SOURCES, [t]) for s in (0, 1)]
            for t in (TARGET, corpus("u", seed=5))
        }
    return made


def test_the_comparison_is_paired_and_counts_what_the_metrics_count() -> None:
    made = runs()
    rows = {m.method: m for m in compare.method_rows(made, "rise")}
    direct = np.mean(
        [metrics.hter(*r.scores("test"), r.threshold()) for per in made["erm"].values() for r in per]
    )
    assert rows["erm"].hter.value == pytest.approx(direct)
    assert rows["erm"].paired is not None
    assert rows["erm"].paired.difference.value == pytest.approx(
        rows["rise"].hter.value - rows["erm"].hter.value
    )
    assert rows["rise"].paired is None
    assert rows["erm"].seeds == 2
    assert rows["erm"].score_shift == pytest.approx(rows["erm"].hter.value - rows["erm"].oracle_eer)


def test_a_target_that_one_method_lacks_is_left_out_for_all() -> None:
    made = runs()
    del made["erm"]["u"]
    assert compare.shared_targets(made) == ["t"]
    assert {tuple(m.hter_by_target) for m in compare.method_rows(made, "rise")} == {("t",)}


def test_unseen_instruments_are_those_that_no_source_shows() -> None:
    strange = replace(TARGET, pai=np.where(TARGET.label == 1, "bona_fide", "tattoo"))
    made = {"rise": {"t": [fit_and_score(task(steps=3), SOURCES, [strange])]}}
    rows = compare.unseen_rows(made, ("rise", "erm"))
    assert [(r.target, r.species) for r in rows] == [("t", "tattoo")]
    assert rows[0].apcer["rise"].n == int(((TARGET.split == "test") & (TARGET.label == 0)).sum())


def test_the_missing_table_has_every_pattern_and_their_mean(result: Result) -> None:
    grid = compare.missing_grid({"t": [result]})
    assert set(grid) == {*PATTERNS, "mean"} - {"full"}
    for name in compare.STANDS_IN:
        assert grid["mean"][name].value == pytest.approx(
            np.mean([grid[p][name].value for p in PATTERNS if p != "full"])
        )


def test_radius_panels_lay_the_target_into_the_plane_of_the_sources(result: Result) -> None:
    panels = compare.radius_panels(result)
    assert [p.domain for p in panels] == ["a", "b", "target"]
    assert len(panels[2].bona_fide) + len(panels[2].attack) == len(result.test.label)
    assert all(np.abs(p.bona_fide_angle).max() <= np.pi for p in panels)
    accepted = result.test.heads[:, tails.FUSED] > 0
    inside = [(p < panels[2].rho).sum() for p in (panels[2].bona_fide, panels[2].attack)]
    assert inside == [(accepted & (result.test.label == y)).sum() for y in (1, 0)], "drawn as it is scored"


def test_patterns_that_say_the_same_do_not_narrow_the_interval(result: Result) -> None:
    same = result.test.logit[:, :1].repeat(len(PATTERNS), axis=1)
    alike = replace(
        result,
        test=result.test._replace(logit=same),
        dev=result.dev._replace(logit=result.dev.logit[:, :1].repeat(len(PATTERNS), axis=1)),
    )
    grid = compare.missing_grid({"t": [alike]})
    assert grid["mean"]["complement"] == pytest.approx(grid["no-ir"]["complement"], nan_ok=True)
    saved = compare.complement_saves({"t": [alike]})
    assert saved is not None and (saved.value == 0 or np.isnan(saved.value)), "the same calls save nothing"


def test_nothing_measured_is_nothing_shown() -> None:
    assert compare.missing_grid({}) == {}
    assert compare.complement_saves({}) is None
    assert compare.unseen_rows({}, ("rise",)) == ()
    assert compare.method_rows({"rise": {}}, "rise") == ()


def test_the_honest_point_lies_on_the_curve_of_its_method(result: Result) -> None:
    ((_, curve),) = compare.det_curves({"rise": {"a": [result]}}, "a")
    assert curve.at is not None
    apcer, bpcer = curve.at
    on_it = np.isclose(curve.apcer, apcer) & np.isclose(curve.bpcer, bpcer)
    assert on_it.any()
    assert np.all(np.diff(curve.apcer) <= 0)
    assert np.all(np.diff(curve.bpcer) >= 0)


def test_species_contributions_and_all_sets_are_counted(result: Result) -> None:
    rows = compare.species_rows([result])
    assert {r.species for r in rows} == set(result.test.pai[result.test.label == 0].tolist())
    assert [r.apcer.upper95 for r in rows] == sorted((r.apcer.upper95 for r in rows), reverse=True)
    assert all(r.holds == (r.apcer.upper95 <= compare.CEILING) for r in rows)
    names = list(PATTERNS)
    added = result.test.logit[:, names.index("full"), 0] - result.test.logit[:, names.index("no-ir"), 0]
    ir = next(c for c in compare.contributions({"a": [result]}) if c.modality == "ir")
    assert ir.attack == pytest.approx(float(np.nanmean(added[result.test.label == 0])), rel=1e-5)
    assert compare.species_rows([]) == compare.contributions({}) == ()
