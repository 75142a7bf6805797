"""Importers read each set's own layout, put broken samples aside, and let no personal data through."""

from __future__ import annotations

import csv
import json
import zipfile
from typing import TYPE_CHECKING

import cv2
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.import_corpus import kinds, read_into
from pipeline.data import corpora
from pipeline.data.corpora import BONA_FIDE, CorpusError, CorpusManifest, Rejected, Row, read_corpus
from pipeline.data.corpora.wmca import CLIENTS, species

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 16
FILES = ("wmca", "cefa", "surf", "padisi")  # kinds that read a folder
ID_CARD = "199001011234567X"


def image(path: Path, value: int, *, grey: bool, side: int = 24, border: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(40, 250, (side, side, 3)).astype(np.uint8)
    pixels[:border] = 0
    cv2.imwrite(str(path), pixels[..., 0] if grey else pixels)


def clip(path: Path, seed: int, *, colour: str, frames: tuple[int, ...] = (1, 12), width: int = 4) -> Path:
    for k in frames:
        for m, folder in enumerate((colour, "depth", "ir")):
            image(path / folder / f"{k:0{width}d}.jpg", 10_000 * seed + 10 * k + m, grey=folder != colour)
    return path


def cefa(root: Path) -> Path:
    for k, (race, code, subject) in enumerate((("AF", 1, "000"), ("CA", 2, "250"), ("EA", 3, "499"))):
        person = root / "CeFA-Race" / race / f"{race}-{subject}-{ID_CARD}"
        clip(person / f"{code}_{subject}_1_1_1", 10 * k, colour="profile")
        clip(person / f"{code}_{subject}_3_2_2", 10 * k + 1, colour="profile")
        clip(person / f"{code}_{subject}_3_1_4", 10 * k + 2, colour="profile")
    clip(root / "CeFA-Mask" / "3D-Mask" / "085" / "1_085_1_1_1_1_1", 50, colour="profile")
    clip(root / "CeFA-Mask" / "Silicone-Mask" / "007" / "2_007_1_0_2_1_1", 51, colour="profile")
    return root


def surf(root: Path) -> Path:
    top = root / "CASIA-SURF-CROP"
    for k, split in enumerate(("train", "val", "test")):
        real = top / "real_part" / f"real_{split}_part" / f"CLKJ_AS000{k}"
        fake = top / "fake_part" / f"fake_{split}_part" / f"CLKJ_AS000{k}"
        clip(real / "real.rssdk", 100 + k, colour="color", frames=(1, 11, 101), width=1)
        clip(fake / "03_en_s.rssdk", 200 + k, colour="color", frames=(1, 11), width=1)
    return root


def recording(
    root: Path, name: str, *, frames: tuple[int, ...] = (12, 24, 36), cdit: tuple[int, ...] | None = None
) -> None:
    seed = abs(hash(name)) % 2**31
    for which, planes, chosen in (("RGB", 3, frames), ("CDIT", 4, frames if cdit is None else cdit)):
        path = root / f"WMCA_preprocessed_{which}" / "WMCA" / "face-station" / "05.12.17" / f"{name}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for i in chosen:
                rng = np.random.default_rng([seed, i, planes])
                file[f"Frame_{i}/array"] = rng.integers(30, 250, (planes, 20, 20)).astype(np.uint8)


def wmca(root: Path) -> Path:
    for name in (
        "002_01_000_0_00",
        "003_01_000_0_01",
        "001_01_000_0_02",
        "002_01_000_1_05",
        "003_01_000_2_75",
        "001_01_000_4_11",
    ):
        recording(root, name)
    return root


def padisi(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    truth = [
        (
            "transaction_id",
            "trial_id",
            "trial_name",
            "ground_truth",
            "participant_id",
            "gender",
            "ethnicity",
            "race",
            "age",
        )
    ]
    parts = [("transaction_id", "trial_id", "trial_name", "partition_name")]
    for k, (code, split) in enumerate(
        (("m00000", "train"), ("m50105", "train"), ("m00000", "valid"), ("m00000", "test"))
    ):
        trial = f"{k}abcdxyz"
        truth.append(("f" * 40, trial, "FACE", code, f"person{k}", "Female", "Hispanic", "Asian", "39"))
        parts.append(("f" * 40, trial, "FACE", split))
        name = f"{trial}.npz" if k == 0 else f"ID_{'f' * 40}_{trial}_FACE_1.npz"
        np.savez_compressed(
            root / name, data=np.random.default_rng(k).random((1, 22, 20, 16)).astype(np.float16)
        )
    for name, rows in (("padisi_USC_FACE_ground_truth.csv", truth), ("x_partition_3folds_part0.csv", parts)):
        with (root / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return root


TREES = {"wmca": wmca, "cefa": cefa, "surf": surf, "padisi": padisi}


def imported(kind: str, root: Path, out: Path) -> tuple[CorpusManifest, dict[str, str]]:
    manifest = read_into(kind, root, out, domain="X", size=SIZE)
    return manifest, {r["item"]: r["reason"] for r in pq.read_table(out / "quarantine.parquet").to_pylist()}


def test_the_folder_is_the_registry(tmp_path: Path) -> None:
    assert set(FILES) <= set(kinds())
    with pytest.raises(CorpusError, match="allowed are cefa"):
        read_into("nuaa", tmp_path, tmp_path / "out", domain="X", size=SIZE)


@pytest.mark.parametrize("kind", FILES)
def test_a_tree_is_imported_whole(kind: str, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    root = TREES[kind](tmp_path / "root")
    manifest = read_into(
        kind, root, tmp_path / "out", domain="X", size=SIZE, progress=lambda a, b: done.append((a, b))
    )
    corpus = read_corpus(tmp_path / "out")
    assert manifest.rejected == 0
    assert all(manifest.rows[s] > 0 for s in corpora.SPLITS)
    assert len(corpus) == sum(manifest.rows.values())
    assert corpus.frame.shape == (len(corpus), 5, SIZE, SIZE)
    assert (corpus.present == 0b111).all()
    assert set(corpus.label) == {0, 1}
    assert ((corpus.pai == BONA_FIDE) == (corpus.label == 1)).all()
    assert done[-1] == (done[-1][1], done[-1][1])
    assert len(set(corpus.sample_id)) == len(corpus)


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_folder_is_one_clear_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "nowhere", None):
        with pytest.raises(CorpusError) as raised:
            read_into(kind, root, tmp_path / "out", domain="X", size=SIZE)
        assert "expected" in str(raised.value)
        assert root is None or str(root) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_costs_one_item(kind: str, tmp_path: Path) -> None:
    root = TREES[kind](tmp_path / "root")
    files = sorted(p for p in root.rglob("*") if p.suffix in (".jpg", ".npz", ".hdf5"))
    files[0].write_bytes(files[0].read_bytes()[:200])
    manifest, reasons = imported(kind, root, tmp_path / "out")
    assert sum(manifest.rows.values()) > 0
    assert len(reasons) == 1
    assert str(tmp_path) not in next(iter(reasons.values()))


@pytest.mark.parametrize("kind", FILES)
def test_no_personal_data_reaches_the_output(kind: str, tmp_path: Path) -> None:
    root = TREES[kind](tmp_path / "root")
    if kind == "cefa":  # reasons must not repeat a folder name either
        stray = root / "CeFA-Race" / "AF" / f"AF{ID_CARD}"
        clip(stray / f"1_{ID_CARD}", 90, colour="profile")
        clip(root / "CeFA-Race" / "AF" / f"AF-001-{ID_CARD}" / f"{ID_CARD}", 91, colour="profile")
        bad = root / "CeFA-Race" / "AF" / f"AF-000-{ID_CARD}" / "1_000_1_1_1" / "depth" / "0001.jpg"
        bad.unlink()
        bad.mkdir()
    imported(kind, root, tmp_path / "out")
    stored = json.dumps(
        [
            pq.read_table(p).drop_columns([c for c in pq.read_schema(p).names if c == "frame"]).to_pydict()
            for p in sorted((tmp_path / "out").glob("*.parquet"))
        ]
    )
    stored += (tmp_path / "out" / "manifest.json").read_text()
    for secret in (ID_CARD[:8], "Female", "Hispanic", "Asian"):
        assert secret not in stored


def test_importing_twice_is_the_same_corpus_and_replaces_nothing(tmp_path: Path) -> None:
    root = surf(tmp_path / "root")
    first, _ = imported("surf", root, tmp_path / "a")
    second, _ = imported("surf", root, tmp_path / "b")
    assert first == second
    with pytest.raises(CorpusError, match="exists"):
        imported("surf", root, tmp_path / "a")
    with pytest.raises(CorpusError, match="domain"):
        read_into("surf", root, tmp_path / "c", domain="../x", size=SIZE)


# --- each set's own rules


def test_wmca_splits_by_client_without_a_protocol_and_by_protocol_with_one(tmp_path: Path) -> None:
    root = wmca(tmp_path / "root")
    imported("wmca", root, tmp_path / "a")
    corpus = read_corpus(tmp_path / "a")
    assert {(c, s) for c, s in zip(corpus.subject, corpus.split)} == {
        ("002", "train"),
        ("003", "val"),
        ("001", "test"),
    }
    (root / "PROTOCOL-grandtest.csv").write_text(
        "path,group\nface-station/05.12.17/002_01_000_0_00,eval\n"
        "face-station/05.12.17/003_01_000_0_01.hdf5,train\n"
        "a/001_01_000_0_02,dev\na/001_01_000_4_11,train\na/001_01_000_4_11,eval\na/009_01_000_0_00,train\n"
    )
    _, reasons = imported("wmca", root, tmp_path / "b")
    corpus = read_corpus(tmp_path / "b")
    assert {(v, s) for v, s in zip(corpus.video, corpus.split)} == {
        ("002_01_000_0_00", "test"),
        ("003_01_000_0_01", "train"),
        ("001_01_000_0_02", "val"),
    }
    assert "no single split" in reasons["001_01_000_4_11"]
    assert "no single split" in reasons["002_01_000_1_05"]
    assert "no file" in reasons["009_01_000_0_00"]


def test_wmca_puts_doubtful_recordings_aside(tmp_path: Path) -> None:
    root = wmca(tmp_path / "root")
    recording(root, "100_03_015_2_10")
    recording(root, "002_02_000_0_00", cdit=(12, 25, 36))
    recording(root, "002_02_000_0_07")
    recording(root, "999_02_000_0_00")
    recording(root, "holiday")
    recording(root, "002_03_000_0_00", frames=())
    lonely = root / "WMCA_preprocessed_CDIT" / "WMCA" / "face-station" / "05.12.17" / "002_01_000_1_05.hdf5"
    lonely.unlink()
    _, reasons = imported("wmca", root, tmp_path / "out")
    assert "known defect" in reasons["100_03_015_2_10"]
    assert "frame indices differ" in reasons["002_02_000_0_00"]
    assert "instrument 07" in reasons["002_02_000_0_07"]
    assert "client 999 has no split" in reasons["999_02_000_0_00"]
    assert "file name" in reasons["holiday"]
    assert "frame indices" in reasons["002_03_000_0_00"]
    assert "depth and infrared file is missing" in reasons["002_01_000_1_05"]


def test_wmca_arrays_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    root = wmca(tmp_path / "root")
    path = next((root / "WMCA_preprocessed_RGB").rglob("*.hdf5"))
    with h5py.File(path, "a") as file:
        del file["Frame_12/array"]
        file.create_dataset("Frame_12/array", (3, 2**20, 2**20), np.uint8, chunks=(1, 16, 16))
        del file["Frame_24/array"]
        file["Frame_24/array"] = np.zeros((3, 8, 8), np.float32)
        del file["Frame_36/array"]
    _, reasons = imported("wmca", root, tmp_path / "out")
    assert "claims 1048576x1048576" in reasons[f"{path.stem}/0012"]
    assert "not uint8" in reasons[f"{path.stem}/0024"]
    assert "cannot be read" in reasons[f"{path.stem}/0036"]


def test_wmca_species_and_clients_are_the_published_ones() -> None:
    assert [
        species(*c) for c in (("1", "05"), ("1", "13"), ("2", "03"), ("2", "09"), ("2", "14"), ("2", "75"))
    ] == ["glasses", "rigid_mask", "fake_head", "paper_mask", "rigid_mask", "flexible_mask"]
    assert [species(*c) for c in (("3", "04"), ("3", "05"), ("4", "18"), ("5", "01"), ("1", "09"))] == [
        "print",
        "replay",
        "replay",
        "unlisted_5_01",
        "unlisted_1_09",
    ]
    clients = [c for ids in CLIENTS.values() for c in ids.split()]
    assert [len(ids.split()) for ids in CLIENTS.values()] == [35, 34, 34]
    assert len(set(clients)) == len(clients) == 103


def test_cefa_labels_splits_and_species(tmp_path: Path) -> None:
    imported("cefa", cefa(tmp_path / "root"), tmp_path / "out")
    corpus = read_corpus(tmp_path / "out")
    found = set(zip(corpus.subject, corpus.split, corpus.pai, corpus.label))
    races = (("AF-000", "train"), ("CA-250", "val"), ("EA-499", "test"))
    kinds = ((BONA_FIDE, 1), ("cloth_outdoor", 0), ("screen", 0))
    wanted = {(subject, split, pai, label) for subject, split in races for pai, label in kinds}
    wanted |= {
        ("3D-Mask-085", "test", "mask_3d_wig_glasses", 0),
        ("Silicone-Mask-007", "test", "silicone", 0),
    }
    assert found == wanted


def test_cefa_contradictions_and_gaps_are_put_aside(tmp_path: Path) -> None:
    root = cefa(tmp_path / "root")
    person = root / "CeFA-Race" / "AF" / f"AF-000-{ID_CARD}"
    clip(person / "2_000_1_1_1", 60, colour="profile")
    clip(person / "1_001_1_1_1", 61, colour="profile")
    gap = clip(person / "1_000_3_1_2", 62, colour="profile")
    (gap / "ir" / "0012.jpg").unlink()
    clip(root / "CeFA-Race" / "CA" / "CA-500" / "2_500_1_1_1", 63, colour="profile")
    _, reasons = imported("cefa", root, tmp_path / "out")
    assert reasons == {
        "AF-000/2_000_1_1_1": "clip name contradicts its subject's folder",
        "AF-000/1_001_1_1_1": "clip name contradicts its subject's folder",
        "AF-000/1_000_3_1_2": "1 frames lack one of profile, depth, ir; 1 are complete",
        "CA-500/2_500_1_1_1": "subject above 499",
    }


def test_cefa_black_borders_are_cut_in_all_modalities_alike(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for race, code, subject in (("AF", 1, "000"), ("AF", 1, "001")):
        for m, folder in enumerate(("profile", "depth", "ir")):
            path = (
                root
                / "CeFA-Race"
                / race
                / f"{race}-{subject}"
                / f"{code}_{subject}_1_1_1"
                / folder
                / "0001.jpg"
            )
            image(path, 5 + m, grey=m > 0, side=40, border=16 if subject == "000" else 0)
    imported("cefa", root, tmp_path / "out")
    bordered, plain = read_corpus(tmp_path / "out").frame
    assert bordered[:3, 1].mean() > plain[:3, 1].mean() / 2  # row 0 may hold what JPEG smears over the edge


def test_surf_reads_species_and_splits_from_folders(tmp_path: Path) -> None:
    root = surf(tmp_path / "root")
    top = root / "CASIA-SURF-CROP" / "fake_part" / "fake_train_part" / "CLKJ_AS0000"
    clip(top / "07_other.rssdk", 70, colour="color")
    clip(top / "real.rssdk", 71, colour="color")
    _, reasons = imported("surf", root, tmp_path / "out")
    corpus = read_corpus(tmp_path / "out")
    assert set(corpus.pai) == {BONA_FIDE, "03_en_s"}
    assert corpus.video[0] == "CLKJ_AS0000/real"
    assert set(reasons) == {"CLKJ_AS0000/07_other", "CLKJ_AS0000/real"}


def test_surf_challenge_layout_takes_the_modality_from_the_suffix(tmp_path: Path) -> None:
    root = tmp_path / "root"
    clip(root / "Training" / "real_part" / "CLKJ_AS0005" / "real.rssdk", 80, colour="color", width=1)
    clip(root / "Training" / "fake_part" / "CLKJ_AS0005" / "06_enm_b.rssdk", 81, colour="color", width=1)
    for k in range(3):
        for m, kind in enumerate(("color", "depth", "ir")):
            image(root / "Val" / "0000" / f"00000{k}-{kind}.jpg", 820 + 10 * k + m, grey=m > 0)
    path = "Val/0000/00000{}-{}.jpg"
    lines = [
        " ".join((path.format(0, "color"), path.format(0, "depth"), path.format(0, "ir"), "1")),
        " ".join((path.format(1, "color"), path.format(1, "ir"), path.format(1, "depth"), "0")),
        " ".join((path.format(2, "color"), path.format(1, "ir"), path.format(2, "depth"), "0")),
        "../../etc/passwd a b 1",
    ]
    (root / "val_private_list.txt").write_text("\n".join(lines))
    _, reasons = imported("surf", root, tmp_path / "out")
    corpus = read_corpus(tmp_path / "out")
    val = corpus.split == "val"
    assert list(zip(corpus.sample_id[val], corpus.label[val])) == [("val/000000", 1), ("val/000001", 0)]
    assert set(reasons) == {"val_private_list.txt:3", "val_private_list.txt:4"}
    depth_first, ir_first = (corpus.frame[i, 4].mean() for i in np.flatnonzero(val))
    assert min(depth_first, ir_first) > 0
    assert set(corpus.pai[~val]) == {BONA_FIDE, "06_enm_b"}


def test_padisi_reads_bgr_depth_and_nir(tmp_path: Path) -> None:
    root = padisi(tmp_path / "root")
    data = np.zeros((1, 22, 20, 20), np.float32)
    data[0, 0], data[0, 2], data[0, 3] = 0.2, 0.8, 0.4  # blue, red, NIR
    data[0, 4, :10], data[0, 4, 10:] = 0.1, 0.3
    np.savez(root / "0abcdxyz.npz", data=data)
    imported("padisi", root, tmp_path / "out")
    corpus = read_corpus(tmp_path / "out")
    frame = corpus.frame[list(corpus.sample_id).index("0abcdxyz")]
    assert frame[:3, 8, 8].tolist() == [204, 0, 51]
    assert frame[4, 8, 8] == 102
    assert frame[3, 0, 0] < frame[3, -1, 0]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((1, 22, 8, 8), np.uint8), "allowed float"),
        (np.zeros((22, 8, 8), np.float32), "allowed float"),
        (np.zeros((1, 5, 8, 8), np.float32), "allowed float"),
        (np.full((1, 22, 8, 8), 2.0, np.float32), "not all in [0, 1]"),
        (np.full((1, 22, 8, 8), np.nan, np.float32), "not all in [0, 1]"),
        (np.array([{"a": 1}], dtype=object), "allowed float"),
    ],
)
def test_padisi_arrays_of_a_wrong_kind_are_put_aside(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    root = padisi(tmp_path / "root")
    np.savez(root / "0abcdxyz.npz", data=array)
    _, reasons = imported("padisi", root, tmp_path / "out")
    assert reason in reasons["0abcdxyz"]


def test_padisi_claimed_shapes_are_bounded_before_unpacking(tmp_path: Path) -> None:
    root = padisi(tmp_path / "root")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 22, 4096, 4096), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(root / "0abcdxyz.npz", "w") as archive:
        archive.writestr(
            "data.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100)
        )
    with zipfile.ZipFile(root / f"ID_{'f' * 40}_1abcdxyz_X.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", bytes(65 * 2**20))
    (root / f"ID_{'f' * 40}_1abcdxyz_FACE_1.npz").unlink()
    _, reasons = imported("padisi", root, tmp_path / "out")
    assert "claims more than" in reasons["0abcdxyz"]
    assert "array claims 68157440 bytes" in reasons["1abcdxyz"]


def test_padisi_lists_what_has_no_file_or_no_truth(tmp_path: Path) -> None:
    root = padisi(tmp_path / "root")
    (root / "0abcdxyz.npz").rename(root / "zzzzzzzz.npz")
    (root / "nonsense name.npz").write_bytes(b"x")
    _, reasons = imported("padisi", root, tmp_path / "out")
    assert set(reasons) == {"0abcdxyz", "zzzzzzzz", "nonsense name"}
    (root / "padisi_USC_FACE_ground_truth.csv").unlink()
    with pytest.raises(CorpusError, match=r"ground_truth\.csv"):
        imported("padisi", root, tmp_path / "b")


# --- the store


def row(k: int, split: str = "train", *, source: str | None = None, label: int = 1) -> Row:
    frame = np.full((5, SIZE, SIZE), k % 256, np.uint8)
    pai = BONA_FIDE if label else "print"
    return Row(f"s{k}", split, label, pai, f"p{k}", f"v{k}", frame, 7, source or f"{k:064x}")


def write(rows: list[Row | Rejected] | Iterator[Row], out: Path) -> CorpusManifest:
    return corpora.write_corpus(rows, out, domain="X", kind="synth", size=SIZE)


def test_leaks_between_splits_are_put_aside(tmp_path: Path) -> None:
    rows = [
        row(0),
        row(1, "val"),
        row(2, "test", source=f"{0:064x}"),
        row(0, "test"),
        row(3, source=f"{0:064x}"),
        Rejected("x", "y"),
    ]
    manifest = write(rows, tmp_path / "out")
    corpus = read_corpus(tmp_path / "out")
    assert list(corpus.sample_id) == ["s0", "s3", "s1"]
    assert manifest.rejected == 3
    reasons = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [r["reason"] for r in reasons] == [
        "the same bytes are already in train",
        "sample id is already in train",
        "y",
    ]


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(corpora.SPLITS), st.integers(0, 1)), min_size=1, max_size=30))
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, int]]
) -> None:
    out = tmp_path_factory.mktemp("store") / "X"
    rows = [row(k, split, label=label) for k, (split, label) in enumerate(plan)]
    manifest = write(list(rows), out)
    corpus = read_corpus(out)
    wanted = sorted(rows, key=lambda r: corpora.SPLITS.index(r.split))
    for name in ("sample_id", "split", "label", "pai", "subject", "video", "present"):
        assert list(getattr(corpus, name)) == [getattr(r, name) for r in wanted]
    assert np.array_equal(corpus.frame, np.stack([r.frame for r in wanted]))
    assert manifest.rows == {s: sum(r.split == s for r in rows) for s in corpora.SPLITS}
    assert len(read_corpus(out, ("val",))) == manifest.rows["val"]


def test_the_digest_does_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write([row(k) for k in range(20)], tmp_path / "a")
    monkeypatch.setattr("pipeline.data.corpus.BATCH_BYTES", 3 * 5 * SIZE * SIZE)
    assert write([row(k) for k in range(20)], tmp_path / "b") == first
    assert read_corpus(tmp_path / "b").frame[:, 0, 0, 0].tolist() == list(range(20))
    assert write([row(k) for k in range(1, 21)], tmp_path / "c").digest != first.digest


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    def breaking() -> Iterator[Row]:
        yield row(0)
        raise CorpusError("the disk went away")

    with pytest.raises(CorpusError, match="went away"):
        write(breaking(), tmp_path / "out")
    with pytest.raises(CorpusError, match="no sample could be imported; the first of 1: x: broken"):
        write([Rejected("x", "broken")], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damage_at_rest_is_found(tmp_path: Path) -> None:
    write([row(k) for k in range(5)], tmp_path / "out")
    other = write([row(k) for k in range(1, 6)], tmp_path / "other")
    assert other.rows["train"] == 5
    path = tmp_path / "out" / "train.parquet"
    whole = path.read_bytes()
    path.write_bytes((tmp_path / "other" / "train.parquet").read_bytes())
    with pytest.raises(CorpusError, match="digest"):
        read_corpus(tmp_path / "out")
    path.write_bytes(whole[:-20])
    with pytest.raises(CorpusError, match="damaged"):
        read_corpus(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(CorpusError, match="damaged"):
        read_corpus(tmp_path / "out")
    with pytest.raises(CorpusError, match="no corpus here"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="splits dev; allowed: train, val, test"):
        read_corpus(tmp_path / "other", ("dev",))


@given(st.integers(0, 400))
def test_frames_are_spread_evenly(n: int) -> None:
    chosen = corpora.evenly_spaced(range(n))
    assert len(chosen) == min(n, corpora.FRAMES)
    assert chosen == sorted(set(chosen))
    if n > corpora.FRAMES:
        assert chosen[0] > 0 or n == 4  # three of four items in equal steps are 0, 1, 2
        assert chosen[-1] < n - 1


def test_fifty_frames_give_the_published_three() -> None:
    assert corpora.evenly_spaced(range(50)) == [12, 24, 36]


@pytest.mark.parametrize(
    ("kind", "name", "bona_fide", "rows", "only_test"),
    [
        ("wmca", "W", 192, {"train": 450, "val": 150, "test": 300}, {"paper_mask"}),
        ("cefa", "C", 202, {"train": 448, "val": 152, "test": 300}, {"mask_3d", "silicone"}),
        ("surf", "S", 128, {"train": 448, "val": 154, "test": 294}, set()),
        ("padisi", "P", 477, {"train": 450, "val": 150, "test": 300}, {"m50105", "m50106", "m50110"}),
    ],
)
def test_the_reference_sets(
    kind: str,
    name: str,
    bona_fide: int,
    rows: dict[str, int],
    only_test: set[str],
    padbench: Path,
    tmp_path: Path,
) -> None:
    manifest, reasons = imported(kind, padbench / name, tmp_path / "out")
    assert reasons == {}
    assert manifest.rows == rows
    assert sum(manifest.bona_fide.values()) == bona_fide
    assert only_test <= manifest.species["test"].keys()
    assert not only_test & (manifest.species["train"].keys() | manifest.species["val"].keys())
    corpus = read_corpus(tmp_path / "out")
    subjects = [set(corpus.subject[corpus.split == s]) for s in corpora.SPLITS]
    assert len(set.union(*subjects)) == sum(len(s) for s in subjects)
