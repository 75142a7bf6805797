"""A trunk's graph under ONNX Runtime: the features of torch, without torch, from an unchanged file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import DataConfig
from pipeline.data.featurise import load_trunk
from pipeline.models import MobileConfig, ModelConfig, TinyConfig
from pipeline.models import checkpoint as cp
from pipeline.models.graph import SLICE, open_graph
from pipeline.models.manifest import GRAPH
from pipeline.models.tail import init_tail
from pipeline.models.trunk import build_trunk, features, fold
from tests.support.captures import segment
from tests.support.layout import REPO

SIZE, F = 32, 16
PATTERNS = np.array([[bool(mask >> m & 1) for m in range(3)] for mask in range(8)])


def sealed(config: MobileConfig | TinyConfig) -> cp.SourceModel:
    model, random = ModelConfig(trunk=config), torch.Generator().manual_seed(0)
    trunk = fold(build_trunk(config, SIZE))
    manifest = cp.Manifest(config=model, size=SIZE, threshold=0.5, method="erm")
    return cp.seal(trunk, init_tail(model.tail, F, generator=random), manifest)


@pytest.fixture(scope="module")
def model() -> cp.SourceModel:
    torch.manual_seed(0)
    return sealed(MobileConfig(kind="mobile", features=F))


@pytest.fixture(scope="module")
def saved(model: cp.SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph") / "m"
    assert cp.save(folder, model) == model.manifest.digest, "equal weights give an equal graph"
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def frames(count: int, seed: int = 0) -> np.ndarray:
    """Noise, of which some frames have black pixels or are of one value."""
    x = np.random.default_rng(seed).integers(0, 256, (count, 5, SIZE, SIZE), dtype=np.uint8)
    x[::3, :, : SIZE // 2] = 0
    x[1::5, 3:] = 0
    x[2::5, :3] = 200
    return x


def by_torch(model: cp.SourceModel, x: np.ndarray, present: np.ndarray) -> np.ndarray:
    return features(model.trunk, torch.from_numpy(x), torch.from_numpy(present)).numpy()


def edit(folder: Path, **changes: object) -> None:
    """Writes the manifest with ``changes`` under its right digest."""
    raw = {**json.loads((folder / cp.MANIFEST).read_text()), **changes}
    manifest = cp.Manifest.model_validate(raw)
    manifest = manifest.model_copy(update={"digest": cp.manifest_digest(manifest)})
    (folder / cp.MANIFEST).write_text(manifest.model_dump_json())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_features_are_those_of_torch_whatever_is_missing(model, saved: Path, pattern: np.ndarray) -> None:
    x, present = frames(SLICE + 3), np.tile(pattern, (SLICE + 3, 1))
    z, expected = open_graph(saved, model.manifest)(x, present), by_torch(model, x, present)
    assert z.shape == expected.shape and z.dtype == np.float32
    assert np.abs(z - expected).max() <= 1e-4
    assert not z[~present].any()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(masks=st.lists(st.integers(0, 7), max_size=4 * SLICE), seed=st.integers(0, 99))
def test_features_are_those_of_torch_in_any_batch(model, saved: Path, masks: list[int], seed: int) -> None:
    trunk, x, present = load_trunk(str(saved)), frames(len(masks), seed), PATTERNS[np.array(masks, int)]
    z = trunk(x, present)
    assert z.shape == (len(masks), 3, F)
    if not masks:
        return
    assert np.abs(z - by_torch(model, x, present)).max() <= 1e-4
    at = seed % len(masks)
    assert np.allclose(z[at], trunk(x[at : at + 1], present[at : at + 1])[0], atol=1e-5)


def test_absent_pixels_never_reach_a_feature(saved: Path) -> None:
    trunk, x = load_trunk(str(saved)), frames(8)
    other = x.copy()
    for m, (begin, end) in enumerate(((0, 3), (3, 4), (4, 5))):
        other[~PATTERNS[:, m], begin:end] ^= 255
    assert np.array_equal(trunk(x, PATTERNS), trunk(other, PATTERNS))


def test_a_task_of_ingest_imports_no_torch(saved: Path, tmp_path: Path) -> None:
    """Nor anything else that takes long to import and that it does not need."""
    heavy = ("torch", "onnx", "mlflow", "pandas", "sqlalchemy", "scipy", "safetensors")
    path = segment(tmp_path / "gate/segment-0.parquet", "a", "b")
    limits = DataConfig(frame_px=SIZE).model_dump_json()
    code = (
        "import sys\nfrom pipeline.cluster.trunks import decode_and_featurise\n"
        f"batch = {{'segments': [{json.dumps([[0, 'gate', str(path)]])!r}]}}\n"
        f"(rows,) = decode_and_featurise(batch, limits={limits!r}, checkpoints=[{str(saved)!r}])\n"
        f"print(rows['z0'].shape, rows['z0'].dtype, [m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 3, 16) float16 []\n"


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone"])
def test_a_changed_graph_is_refused(copy: Path, damage: str) -> None:
    payload = bytearray((copy / GRAPH).read_bytes())
    payload[1000] ^= 1
    (copy / GRAPH).write_bytes(payload if damage == "flipped" else payload[:-9])
    if damage == "gone":
        (copy / GRAPH).unlink()
    with pytest.raises(cp.BadCheckpoint, match=r"trunk\.onnx: .*restore it or run `palisade train`") as e:
        load_trunk(str(copy))
    assert "\n" not in str(e.value)


def test_what_is_no_graph_is_refused_even_with_agreeing_digests(copy: Path) -> None:
    (copy / GRAPH).write_bytes(b"rubbish")
    edit(copy, graph_digest=hashlib.sha256(b"rubbish").hexdigest())
    with pytest.raises(cp.BadCheckpoint, match=r"trunk\.onnx: not a graph of a trunk: ") as e:
        load_trunk(str(copy))
    assert "\n" not in str(e.value)


def test_a_checkpoint_from_before_graphs_is_read_by_torch(model, copy: Path) -> None:
    (copy / GRAPH).unlink()
    edit(copy, graph_digest="", format=2)
    raw = json.loads((copy / cp.MANIFEST).read_text())
    assert "graph_digest" not in raw, "its digest is what it was"
    x = frames(8)
    assert np.array_equal(load_trunk(str(copy))(x, PATTERNS), by_torch(model, x, PATTERNS))
    cp.save(copy / "again", cp.load(copy))
    assert cp.read_manifest(copy / "again").files == model.manifest.files, "saved again, it has a graph"


def test_a_trunk_without_a_graph_has_no_such_file(tmp_path: Path) -> None:
    tiny = sealed(TinyConfig(width=4, features=F))
    cp.save(tmp_path / "m", tiny)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [cp.MANIFEST, cp.WEIGHTS]
    x = frames(8)
    assert np.array_equal(load_trunk(str(tmp_path / "m"))(x, PATTERNS), by_torch(tiny, x, PATTERNS))
    assert load_trunk(str(tmp_path / "m"))(x[:0], PATTERNS[:0]).shape == (0, 3, F)
