"""Simulated sites: files follow their script, and no column of a capture reveals its label."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.data import DataConfig
from pipeline.data.captures import BadSegment, check_segment, list_segments, read_labels, read_segment
from pipeline.data.decode import BadImage, decode
from pipeline.data.presentations import read_label_file
from pipeline.simulate.render import BONA_FIDE
from pipeline.simulate.rig import TRAINING, UNSEEN, SensorRig
from pipeline.simulate.shifted_rigs import SHIFTED
from pipeline.simulate.site_script import (
    COMMISSIONING,
    PHASES,
    RED_SPECIES,
    Broken,
    Drift,
    Missing,
    SiteScript,
    Stretch,
    demo_fleet,
    plan,
    rig_at,
)
from pipeline.simulate.sites import START, simulate

if TYPE_CHECKING:
    from pathlib import Path

RIG = SensorRig("tiny", side=32)
SITE = SiteScript("door-1", RIG, "eu", "acme", "tiny", rate=1.0, redteam=4)


def _rows(root: Path, site: str) -> list[dict[str, object]]:
    paths = list_segments(root / "captures").segments[site]
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def _hour(row: dict[str, object]) -> float:
    return (row["captured_at"] - START) / timedelta(hours=1)  # pyright: ignore[reportOperatorIssue]


def test_two_phases_give_segments_and_labels_that_match_the_rows(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    first = simulate(tmp_path, [SITE], phase=1, workers=1, progress=lambda *p: steps.append(p))
    assert not (tmp_path / "labels").exists()
    second = simulate(tmp_path, [SITE], phase=2, workers=1)
    rows = _rows(tmp_path, "door-1")
    assert steps[-1] == (first["door-1"], first["door-1"])
    assert len(rows) == first["door-1"] + second["door-1"]
    labels = read_labels(tmp_path / "sealed" / "door-1-labels.parquet")
    assert [r["sample_id"] for r in rows] == list(labels)
    red = read_label_file(tmp_path / "labels" / "door-1" / "labels-0002.parquet", site="door-1")
    assert (red.rows, red.bad) == (4, [])
    assert sorted(p.label for p in red.good) == [0, 0, 1, 1]
    assert all(labels[p.sample_id] == (p.label, p.instrument) for p in red.good)
    assert {p.kind for p in red.good} == {"red-team"}
    hours = [_hour(r) for r in rows]
    assert all(PHASES[1].start <= h < PHASES[2].end + 0.1 for h in hours)


def test_every_row_of_a_clean_site_decodes(tmp_path: Path) -> None:
    simulate(tmp_path, [SITE], phase=1, workers=1)
    for path in list_segments(tmp_path / "captures").segments["door-1"]:
        check_segment(path, site="door-1", limits=DataConfig())
        segment = read_segment(path, site="door-1", limits=DataConfig())
        assert not segment.bad
        for row in segment.good:
            frame, present = decode(row["rgb"], row["depth"], row["ir"], size=24)
            assert present == 7
            assert frame.any(axis=(1, 2)).all()


def test_same_seed_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    simulate(tmp_path / "a", [SITE], phase=1, workers=1, seed=4)
    simulate(tmp_path / "b", [SITE], phase=1, workers=2, seed=4)
    assert _rows(tmp_path / "a", "door-1") == _rows(tmp_path / "b", "door-1")
    assert plan(SITE, phase=1, seed=4) != plan(SITE, phase=1, seed=5)


def test_a_segment_is_never_written_twice(tmp_path: Path) -> None:
    simulate(tmp_path, [SITE], phase=1, workers=1)
    with pytest.raises(BadSegment, match="exists"):
        simulate(tmp_path, [SITE], phase=1, workers=1)


def test_missing_episode_is_null_exactly_then(tmp_path: Path) -> None:
    script = replace(SITE, missing=(Missing("ir", 6, 18), Missing("rgb", 12, 20)))
    simulate(tmp_path, [script], phase=1, workers=1)
    rows = _rows(tmp_path, "door-1")
    assert any(6 <= _hour(r) < 18 for r in rows)
    for row in rows:
        assert (row["ir"] is None) == (6 <= _hour(row) < 18)
        assert (row["rgb"] is None) == (12 <= _hour(row) < 20)
        assert row["depth"] is not None


def test_rig_swap_changes_pixels_and_not_labels(tmp_path: Path) -> None:
    swapped = replace(SITE, swap=(12, replace(RIG, side=40)))
    for name, script in (("a", SITE), ("b", swapped)):
        simulate(tmp_path / name, [script], phase=1, workers=1)
    labels = [(tmp_path / n / "sealed" / "door-1-labels.parquet").read_bytes() for n in "ab"]
    assert labels[0] == labels[1]
    for before, after in zip(_rows(tmp_path / "a", "door-1"), _rows(tmp_path / "b", "door-1"), strict=True):
        assert before["sample_id"] == after["sample_id"]
        assert (before["rgb"] == after["rgb"]) == (_hour(before) < 12)


@pytest.mark.parametrize("prior", [0.5, 0.9, 1.0])
def test_prior_is_respected(prior: float) -> None:
    shots = [s for k in range(8) for s in plan(replace(SITE, rate=20, prior=prior), phase=1, seed=k)]
    share = np.mean([s.what.species == BONA_FIDE for s in shots])
    assert share == pytest.approx(prior, abs=0.04)
    assert {s.what.species for s in shots} <= {BONA_FIDE, *SITE.species}


def test_burst_brings_more_traffic_of_its_species() -> None:
    burst = Stretch(10, 14, 0.0, rate=4, species=("replay",))
    shots = plan(replace(SITE, rate=20, prior=1.0, stretches=(burst,)), phase=1, seed=0)
    inside = [s for s in shots if 10.2 <= s.hour < 14]
    before = [s for s in shots if s.hour < 10]
    assert {s.what.species for s in inside} == {"replay"}
    assert {s.what.species for s in before} == {BONA_FIDE}
    assert len(inside) / 4 > 2 * len(before) / 10


def test_broken_camera(tmp_path: Path) -> None:
    for kind in ("black", "constant", "truncated"):
        script = replace(SITE, rate=0.5, broken=Broken(kind, 0, 24))
        simulate(tmp_path / kind, [script], phase=1, workers=1)
        row = _rows(tmp_path / kind, "door-1")[0]
        rgb, depth, ir = row["rgb"], row["depth"], row["ir"]
        if kind == "truncated":
            with pytest.raises(BadImage, match="rgb"):
                decode(rgb, depth, ir, size=24)  # pyright: ignore[reportArgumentType]
        else:
            frame, _ = decode(rgb, depth, ir, size=24)  # pyright: ignore[reportArgumentType]
            assert frame[:3].std() < 2


def test_hostile_files_are_refused_and_the_bomb_never_opens(tmp_path: Path) -> None:
    script = replace(SITE, hostile=("garbage", "schema", "bomb"))
    simulate(tmp_path, [script], phase=1, workers=1)
    paths = list_segments(tmp_path / "captures").segments["door-1"]
    assert len(paths) == PHASES[1].segments + 2
    refused, reasons = 0, []
    for path in paths:
        try:
            segment = read_segment(path, site="door-1", limits=DataConfig())
        except BadSegment:
            refused += 1
            continue
        for row in segment.good:
            try:
                decode(row["rgb"], row["depth"], row["ir"], size=24)
            except BadImage as e:
                reasons.append(str(e))
    assert refused == 2
    assert len(reasons) == 1
    assert "12000" in reasons[0]


def test_drift_only_goes_one_way() -> None:
    script = replace(SITE, drift=Drift(ir_fade=0.7, depth_noise=0.5, warm=0.1))
    power = [rig_at(script, h).ir_power for h in (0, 12, 24, 38)]
    assert power == sorted(power, reverse=True)
    assert rig_at(script, 24).ir_power == pytest.approx(RIG.ir_power * np.exp(-0.7))
    assert rig_at(script, 24).white[0] > RIG.white[0]
    assert rig_at(SITE, 24) == RIG


def test_demo_fleet_is_the_promised_mix() -> None:
    fleet = demo_fleet()
    assert len({s.site for s in fleet}) == 18
    assert {s.rig.name for s in fleet if s.rig.name in UNSEEN} == {"E", "F"}
    shifted = [s for s in fleet if s.rig.name in SHIFTED]
    assert Counter(s.rig.name for s in shifted) == dict.fromkeys(SHIFTED, 2)
    assert len({s.rig for s in shifted}) == 8
    troubled = [
        s for s in fleet if s.missing or s.stretches or s.broken or s.hostile or s.swap or s.drift != Drift()
    ]
    clean = [s for s in fleet if s not in troubled]
    assert sum(s.rig.name in TRAINING for s in clean) == 3
    labelled = {s.site: s.commissioning for s in fleet if s.commissioning}
    assert set(labelled.values()) == {32}
    assert [s.site for s in shifted if s.site not in labelled] == ["phone-onboarding", "ticket-window"]
    assert [s.site for s in clean if s.site in labelled and s not in shifted] == ["lobby-south"]
    assert [s.site for s in fleet if s.mislabelled] == ["dock-night"]
    assert {m.modality for s in fleet for m in s.missing} == {"rgb", "depth", "ir"}
    for phase, low, high in ((1, 120, 330), (2, 80, 330)):
        assert all(low < len(plan(s, phase=phase, seed=0)) < high for s in fleet)
    assert all(s.region and s.tenant and s.hardware for s in fleet)


def test_sessions_are_one_presentation_and_ids_say_nothing() -> None:
    shots = plan(replace(SITE, rate=10, redteam=20), phase=2, seed=0)
    sessions: dict[str, set[object]] = {}
    for shot in shots:
        sessions.setdefault(shot.session_id, set()).add(shot.what)
        assert shot.what.species not in shot.sample_id + shot.session_id
    assert {len(v) for v in sessions.values()} == {1}
    assert [s.sample_id for s in shots] == sorted(s.sample_id for s in shots)


def test_commissioning_leaves_the_stream_as_it_is() -> None:
    script = replace(SITE, rate=10, species=("print_bent", "mask_rigid"))
    for phase in PHASES:
        without = plan(script, phase=phase, seed=3)
        shots = plan(replace(script, commissioning=9), phase=phase, seed=3)
        stream = [s for s in shots if s.vouched != COMMISSIONING]
        assert [(s.hour, s.what, s.frame) for s in stream] == [(s.hour, s.what, s.frame) for s in without]
        assert len(shots) - len(stream) == (18 if phase == 1 else 0)
        assert [s.sample_id for s in shots] == sorted(s.sample_id for s in shots)


def test_an_installer_presents_regulars_and_every_attack_of_the_kit_in_the_first_hour() -> None:
    script = replace(SITE, rate=10, species=("print_bent", "mask_rigid"), commissioning=9)
    shots = plan(script, phase=1, seed=3)
    brought = [s for s in shots if s.vouched == COMMISSIONING]
    genuine = [s for s in brought if s.what.species == BONA_FIDE]
    attacks = [s.what.species for s in brought if s.what.species != BONA_FIDE]
    assert len(genuine) == len(attacks) == 9
    assert all(0 <= s.hour < 1 and s.frame == 0 for s in brought)
    assert set(attacks) == {"print_bent", *RED_SPECIES}
    assert len({s.session_id for s in brought}) == 18
    assert not {s.session_id for s in brought} & {s.session_id for s in shots if not s.vouched}
    met = {s.what.subject for s in shots if not s.vouched and s.what.species == BONA_FIDE}
    assert len({s.what.subject for s in genuine}) == 9
    assert {s.what.subject for s in genuine} <= met


def test_labels_of_an_installer_are_true_and_nothing_in_a_row_tells_which_they_are(tmp_path: Path) -> None:
    script = replace(SITE, commissioning=4)
    simulate(tmp_path, [script], phase=1, workers=1)
    labels = read_labels(tmp_path / "sealed" / "door-1-labels.parquet")
    said = read_label_file(tmp_path / "labels" / "door-1" / "labels-0001.parquet", site="door-1")
    assert (said.rows, said.bad) == (8, [])
    assert {p.kind for p in said.good} == {"commissioning"}
    assert sorted(p.label for p in said.good) == [0] * 4 + [1] * 4
    assert all(labels[p.sample_id] == (p.label, p.instrument) for p in said.good)
    assert {p.sample_id for p in said.good} < set(labels)
    columns = {tuple(row) for row in _rows(tmp_path, "door-1")}
    assert columns == {("sample_id", "site_id", "captured_at", "session_id", "rgb", "depth", "ir")}
    simulate(tmp_path, [script], phase=2, workers=1)
    red = read_label_file(tmp_path / "labels" / "door-1" / "labels-0002.parquet", site="door-1")
    assert {p.kind for p in red.good} == {"red-team"}
    assert read_labels(tmp_path / "sealed" / "door-1-labels.parquet").items() > labels.items()


def test_a_careless_installer_swaps_the_classes_and_the_sealed_truth_stays(tmp_path: Path) -> None:
    script = replace(SITE, commissioning=4, mislabelled=True)
    for phase in PHASES:
        simulate(tmp_path, [script], phase=phase, workers=1)
    labels = read_labels(tmp_path / "sealed" / "door-1-labels.parquet")
    said, red = (
        read_label_file(tmp_path / "labels" / "door-1" / f"labels-{phase:04d}.parquet", site="door-1")
        for phase in PHASES
    )
    assert (len(said.good), said.bad) == (8, [])
    assert all(labels[p.sample_id][0] == 1 - p.label for p in said.good)
    assert {p.instrument for p in said.good} == {"unknown", "bona_fide"}
    assert all(labels[p.sample_id] == (p.label, p.instrument) for p in red.good)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="phase 3: allowed are 1, 2"):
        simulate(tmp_path, [SITE], phase=3)
    with pytest.raises(ValueError, match="must differ"):
        simulate(tmp_path, [SITE, SITE], phase=1)
