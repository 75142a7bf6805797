"""The cache of stem maps: one file per view, shared by every fit, and never wrong after damage or a kill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.corpus import Row, read_corpus, write_corpus
from pipeline.models import MobileConfig, TinyConfig
from pipeline.models.trunk import build_trunk, features, prepare
from pipeline.source import stems
from pipeline.source.methods import erm
from pipeline.source.sampler import draw, make_batch, stratify

DRAWS = 30  # from a corpus of 24: three views each are enough
SIZE, CONFIG = 32, MobileConfig(kind="mobile", features=16)


@pytest.fixture
def folder(tmp_path):
    """A corpus of 24 training, 6 validation and 6 test rows; some lack a modality."""
    random = np.random.default_rng(0)

    def row(i: int, split: str) -> Row:
        frame = random.integers(1, 256, (5, SIZE, SIZE)).astype(np.uint8)
        name, pai = f"{split}{i}", "bona_fide" if i % 2 else "print"
        return Row(name, split, i % 2, pai, name, name, frame, 7 if i % 3 else 5, f"{name:0>64}")

    splits = {"train": 24, "val": 6, "test": 6}
    rows = [row(i, s) for s, n in splits.items() for i in range(n)]
    write_corpus(rows, tmp_path / "A", domain="A", kind="synth", size=SIZE)
    return tmp_path / "A"


def filled(folder, splits=("train", "val", "test"), config=CONFIG):
    wanted = stems.parts([folder], config, splits, draws=DRAWS, most=2**30)
    for part in stems.missing(wanted):
        stems.make(part, config)
    return wanted


def test_plain_maps_give_the_features_of_the_frames(folder) -> None:
    filled(folder)
    (corpus,), trunk = stems.read([folder], ("val", "test"), CONFIG), build_trunk(CONFIG, SIZE)
    rows = np.flatnonzero(corpus.split == "test")[[0, 3, 5]]
    z, present = stems.features_of(trunk, corpus, rows)
    whole = features(trunk, torch.from_numpy(corpus.frame[rows]), present)
    assert torch.allclose(z, whole, atol=2e-2)
    assert torch.equal(stems.features_of(trunk, replace(corpus, maps={}), rows)[0], whole)


def test_a_draw_takes_views_of_its_own_rows(folder) -> None:
    filled(folder)
    (corpus,) = stems.read([folder], ("train", "val"), CONFIG, draws=DRAWS)
    trunk = build_trunk(CONFIG, SIZE)
    assert len(corpus.maps["train"]) == 3
    method = erm.Config(batch=8)
    cells = stratify([corpus])
    drawn = draw(method, [corpus], cells, step=3, rank=0, world=1)
    again = draw(method, [corpus], cells, step=3, rank=0, world=1)
    assert torch.equal(drawn.frames, again.frames)
    assert drawn.frames.shape == (8, 3, 32, SIZE // 8, SIZE // 8)
    stored = np.stack([np.asarray(v) for v in corpus.maps["train"]])
    for maps, label in zip(drawn.frames.numpy(), drawn.label):
        at = np.flatnonzero((stored == maps).all(axis=(2, 3, 4, 5)).any(axis=0))
        assert corpus.label[corpus.split == "train"][at].tolist() == [int(label)]
    batch, _ = make_batch(method, drawn, step=3, rank=0)
    assert bool(trunk(batch.frames, batch.present).isfinite().all())


def test_views_differ_and_are_near_what_the_frames_give(folder) -> None:
    filled(folder)
    (corpus,) = stems.read([folder], ("train",), CONFIG, draws=DRAWS)
    first, second = (torch.from_numpy(np.array(v)).float() for v in corpus.maps["train"][:2])
    plain = build_trunk(CONFIG, SIZE).stem(prepare(torch.from_numpy(corpus.frame)))  # pyright: ignore
    assert not torch.allclose(first, second, atol=0.1)
    assert 0.2 < float(torch.corrcoef(torch.stack([first.flatten(), plain.flatten()]))[0, 1]) < 0.999


def test_what_is_missing_is_made_and_what_is_there_is_kept(folder) -> None:
    wanted = filled(folder)
    untouched, lost = wanted[0].file, wanted[2].file
    before = untouched.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert stems.read([folder], ("train", "val"), CONFIG, draws=DRAWS)[0].maps == {}
    assert [p.file for p in stems.missing(wanted)] == [lost]
    filled(folder)
    assert (untouched.stat().st_mtime_ns, lost.read_bytes()) == before


def test_other_rows_another_folder(folder, tmp_path) -> None:
    here = {p.file.parent for p in filled(folder)}
    random = np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE)).astype(np.uint8)
    rows = [replace_row(r, random) for r in _rows(folder)]
    write_corpus(rows, tmp_path / "B", domain="A", kind="synth", size=SIZE)
    assert not here & {
        p.file.parent for p in stems.parts([tmp_path / "B"], CONFIG, ("val",), draws=0, most=2**30)
    }


def test_nothing_is_kept_for_a_trunk_without_a_stem_or_beyond_the_bound(folder) -> None:
    assert stems.parts([folder], TinyConfig(), ("train",), draws=1, most=2**30) == []
    assert stems.parts([folder], CONFIG, ("train",), draws=1, most=2**10) == []
    assert stems.read([folder], ("train",), TinyConfig())[0].maps == {}


def test_pruning_spares_what_is_wanted(folder) -> None:
    wanted = filled(folder)
    old = folder.parent / stems.FOLDER / "A-old"
    old.mkdir()
    (old / "train-01.npy").write_bytes(b"x" * 1000)
    stems.prune(folder.parent, wanted, most=2**30)
    assert old.exists(), "there is room"
    stems.prune(folder.parent, wanted, most=1)
    assert not old.exists()
    assert not stems.missing(wanted)


def _rows(folder) -> list[Row]:
    c = read_corpus(folder)
    columns = (c.sample_id, c.split, c.label, c.pai, c.subject, c.video, c.frame, c.present)
    return [
        Row(str(i), str(s), int(y), str(p), str(u), str(v), f, int(m), f"{i:0>64}")
        for i, s, y, p, u, v, f, m in zip(*columns, strict=True)
    ]


def replace_row(row: Row, frame: np.ndarray) -> Row:
    return row._replace(frame=frame) if row.sample_id == "val0" else row
