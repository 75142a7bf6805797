"""The feature store: what is written comes back, damage is found."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data import blobs, features
from pipeline.data.features import FeatureBlock, mask_to_bool, pseudonym, read_features, write_features
from pipeline.storage import write_atomic

F = 8


def block(start: int, n: int) -> FeatureBlock:
    rng = np.random.default_rng(start)
    return FeatureBlock(
        offset=np.arange(start, start + n),
        sample_id=np.array([f"s{i}" for i in range(start, start + n)], dtype=object),
        captured_at=np.datetime64("2026-01-01T00:00:00", "us") + np.arange(n),
        session=np.arange(n),
        present=np.full(n, 5, np.uint8),
        z=rng.normal(size=(n, 3, F)).astype(np.float16),
    )


def test_round_trip_in_offset_order(tmp_path):
    late, early = block(10, 5), block(0, 10)
    write_features(tmp_path, "t" * 64, "gate", late)
    write_features(tmp_path, "t" * 64, "gate", early)
    got = read_features(tmp_path, "t" * 64, "gate", start=3, end=12, features=F)
    assert got.offset.tolist() == list(range(3, 12))
    assert np.array_equal(got.z[:7], early.z[3:])
    assert got.sample_id[0] == "s3"


def test_writing_a_range_again_changes_nothing(tmp_path):
    for _ in range(2):
        write_features(tmp_path, "t" * 64, "gate", block(0, 4))
    assert len(read_features(tmp_path, "t" * 64, "gate", start=0, end=9, features=F)) == 4


def test_an_unknown_site_has_no_samples(tmp_path):
    assert len(read_features(tmp_path, "t" * 64, "gate", start=0, end=9, features=F)) == 0


@pytest.mark.parametrize("site", ["../etc", "a/b", "", "A", "-x"])
def test_a_path_is_no_site(tmp_path, site):
    with pytest.raises(ValueError, match="site id"):
        write_features(tmp_path, "t" * 64, site, block(0, 1))


def test_another_trunk_width_is_refused(tmp_path):
    write_features(tmp_path, "t" * 64, "gate", block(0, 4))
    with pytest.raises(blobs.BadBlob, match="ingest again"):
        read_features(tmp_path, "t" * 64, "gate", start=0, end=9, features=F + 1)


def test_a_damaged_file_is_one_clear_error(tmp_path):
    path = write_features(tmp_path, "t" * 64, "gate", block(0, 4))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(blobs.BadBlob, match="ingest"):
        read_features(tmp_path, "t" * 64, "gate", start=0, end=9, features=F)


@pytest.mark.parametrize(
    "broken",
    [
        lambda t: t.drop_columns(["session"]),
        lambda t: t.set_column(t.schema.get_field_index("session"), "session", pa.array(["x"] * len(t))),
        lambda t: t.set_column(
            t.schema.get_field_index("offset"), "offset", pa.array([None] * len(t), pa.int64())
        ),
    ],
    ids=["missing", "text", "null"],
)
def test_a_column_of_another_kind_is_one_clear_error(tmp_path, broken):
    path = write_features(tmp_path, "t" * 64, "gate", block(0, 4))
    made = io.BytesIO()
    pq.write_table(broken(pq.read_table(path, partitioning=None)), made)
    path.write_bytes(features._with_digest(made.getvalue()))
    with pytest.raises(blobs.BadBlob, match="session|offset"):
        read_features(tmp_path, "t" * 64, "gate", start=0, end=9, features=F)


def test_masks_follow_the_modality_order():
    assert mask_to_bool(np.array([1, 6], np.uint8)).tolist() == [[True, False, False], [False, True, True]]


def test_pseudonyms_differ_by_site_and_fit_int64():
    assert pseudonym("a", "s") != pseudonym("b", "s")
    assert 0 <= pseudonym("a", "s") < 2**63


def test_blob_round_trip_and_one_copy(tmp_path):
    tensors = {"a": torch.randn(3), "n": torch.tensor(4)}
    assert blobs.put(tmp_path, tensors) == blobs.put(tmp_path, tensors)
    (path,) = tmp_path.rglob("*.safetensors")
    assert all(torch.equal(v, tensors[k]) for k, v in blobs.get(tmp_path, path.stem).items())


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_blob_is_never_used(tmp_path, damage):
    digest = blobs.put(tmp_path, {"a": torch.randn(30)})
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "flip" else data[:-4])
    with pytest.raises(blobs.BadBlob):
        blobs.get(tmp_path, digest)


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []
