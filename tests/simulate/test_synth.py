"""Rendered corpora: plans, splits, and that a process pool changes nothing."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.data.corpora import read_corpus
from pipeline.simulate.corpora import synth
from pipeline.simulate.render import BONA_FIDE, VICTIMS

if TYPE_CHECKING:
    from pathlib import Path

FEW = {"train": 12, "val": 6, "test": 6}


def test_rows_are_reproducible_and_well_formed() -> None:
    first, again = (list(synth.rows(None, size=32, domain="D", per_split=FEW, seed=1)) for _ in range(2))
    assert len(first) == synth.total(None, per_split=FEW) == 24
    assert len({r.sample_id for r in first}) == len({r.source_sha256 for r in first}) == 24
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.frame, b.frame)
        assert a._replace(frame=b.frame) == b
        assert a.frame.shape == (5, 32, 32)
        assert a.frame.dtype == np.uint8
        assert a.present == 7
        assert (a.label == 1) == (a.pai == BONA_FIDE)
    other = next(synth.rows(None, size=32, domain="D", per_split=FEW, seed=2))
    assert not np.array_equal(first[0].frame, other.frame)


@pytest.mark.parametrize("domain", synth.MIX)
def test_shares_and_species(domain: str) -> None:
    plan = synth.clips(domain, {"train": 180, "val": 45, "test": 75}, 0)
    assert len(plan) == 300
    for split in synth.SPLITS:
        names = [c.what.species for c in plan if c.split == split]
        assert names.count(BONA_FIDE) / len(names) == pytest.approx(synth.BONA_FIDE_SHARE[domain], abs=0.06)
        assert set(names) == {BONA_FIDE, *synth.MIX[domain]}


def test_subjects_are_disjoint_between_splits_domains_and_the_anchor_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = {
        (d, s): {c.what.subject for c in synth.clips(d, {s: 90}, 0)} for d in synth.MIX for s in synth.SPLITS
    }
    monkeypatch.setattr(synth, "render", lambda plan, **_: plan)
    plan = list(synth.anchor(size=32))
    groups["anchor", "test"] = {c.what.subject for c in plan}  # pyright: ignore[reportAttributeAccessIssue]
    everyone = [subject for group in groups.values() for subject in group]
    assert len(everyone) == len(set(everyone))
    assert max(everyone) < VICTIMS


def test_anchor_has_enough_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "render", lambda plan, **_: plan)
    plan = list(synth.anchor(size=32))
    names = [c.what.species for c in plan]  # pyright: ignore[reportAttributeAccessIssue]
    assert names.count(BONA_FIDE) == 500
    assert {names.count(s) for s in synth.ANCHOR_SPECIES} == {150}
    assert len({c.rig for c in plan}) == 12  # pyright: ignore[reportAttributeAccessIssue]


def test_videos_hold_frames_of_one_presentation() -> None:
    videos: dict[int, set[object]] = {}
    for clip in synth.clips("B", {"train": 30}, 0):
        videos.setdefault(clip.video, set()).add(clip.what)
    assert {len(v) for v in videos.values()} == {1}
    assert len(videos) == 10


def test_write_makes_corpora_that_read_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    synth.write(
        tmp_path, size=24, domains=("A", "D"), samples=20, workers=1, progress=lambda *p: seen.append(p)
    )
    corpus = read_corpus(tmp_path / "D")
    rows = list(synth.rows(None, size=24, domain="D", per_split={"train": 12, "val": 3, "test": 5}))
    assert seen[-1] == (40, 40)
    assert [str(s) for s in corpus.sample_id] == [r.sample_id for r in rows]
    assert np.array_equal(corpus.frame, np.stack([r.frame for r in rows]))


def test_pool_renders_the_same_rows_in_order() -> None:
    plan = synth.clips("C", {"train": synth.CHUNK + 3}, 0)
    pooled, inline = (list(synth.render(plan, size=24, workers=w)) for w in (2, 1))
    assert [r.source_sha256 for r in pooled] == [r.source_sha256 for r in inline]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="domain 'Z': allowed are A, B, C, D"):
        synth.clips("Z", FEW, 0)
    with pytest.raises(ValueError, match="split 'dev': allowed are train, val, test"):
        synth.clips("A", {"dev": 3}, 0)


def test_the_rendered_domain_is_for_training_and_nobody_in_it_is_anywhere_else() -> None:
    from pipeline.simulate.corpora import rendered

    plan = rendered.plan(480)
    assert len(plan) == 480
    assert {c.split for c in plan} == {"train"}
    assert len({(c.domain, c.video, c.frame) for c in plan}) == 480, "names of samples are unique"
    assert min(c.what.subject for c in plan) >= rendered.PEOPLE
    assert len({c.rig.exposure for c in plan}) > 30, "rigs differ between videos"
    assert all(
        c.rig == d.rig for c, d in itertools.pairwise(plan) if (c.domain, c.video) == (d.domain, d.video)
    )
    assert {c.what.species for c in plan} >= {
        "bona_fide",
        "print_flat",
        "mask_silicone",
        "partial_glasses",
        "print_cutout",
    }
    first = next(rendered.rows(None, size=16, samples=4))
    assert (first.split, first.frame.shape) == ("train", (5, 16, 16))
