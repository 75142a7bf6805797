from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from pipeline.models import ModelConfig, TinyConfig
from pipeline.models import checkpoint as cp
from pipeline.models import tail as tails
from pipeline.models.manifest import MAX_MANIFEST
from pipeline.models.trunk import build_trunk, features, fold


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def model(seed: int = 0, threshold: float = 0.4) -> cp.SourceModel:
    torch.manual_seed(seed)
    config = ModelConfig(trunk=TinyConfig(width=4, features=8))
    trunk = fold(build_trunk(config.trunk, 16))
    tail = tails.init_tail(config.tail, 8, generator=torch.Generator().manual_seed(seed))
    manifest = cp.Manifest(
        config=config, size=16, threshold=threshold, method="erm", domains=("a",), data={"a": "ff"}
    )
    return cp.seal(trunk, tail, manifest)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cp.save(tmp_path / "m", model())
    return tmp_path / "m"


def edit(folder: Path, **changes: object) -> None:
    path = folder / cp.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reseal(folder: Path) -> None:
    """What an attacker who can write can do as well: make the digests agree."""
    import hashlib

    raw = json.loads((folder / cp.MANIFEST).read_text())
    raw["weights_digest"] = hashlib.sha256((folder / cp.WEIGHTS).read_bytes()).hexdigest()
    raw["digest"] = cp.manifest_digest(cp.Manifest.model_validate(raw))
    (folder / cp.MANIFEST).write_text(json.dumps(raw))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    before = model()
    digest = cp.save(tmp_path / "deep" / "m", before)
    after = cp.load(tmp_path / "deep" / "m")
    x, present = torch.randint(0, 256, (3, 5, 16, 16), dtype=torch.uint8), torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(features(before.trunk, x, present), features(after.trunk, x, present))
    assert all(torch.equal(before.tail[n], after.tail[n]) for n in before.tail)
    assert after.manifest == before.manifest
    assert digest == after.manifest.digest == cp.read_manifest(tmp_path / "deep" / "m").digest
    assert sorted(p.name for p in (tmp_path / "deep" / "m").iterdir()) == [cp.MANIFEST, cp.WEIGHTS], (
        "nothing else is left"
    )


def test_digests_name_what_they_should() -> None:
    one, other_threshold, other_weights = model().manifest, model(threshold=0.5).manifest, model(1).manifest
    assert one.digest != other_threshold.digest
    assert one.trunk_digest == other_threshold.trunk_digest, "features do not depend on the threshold"
    assert one.trunk_digest != other_weights.trunk_digest
    m = model()
    assert cp.trunk_digest(m.trunk, m.manifest.config, 16) != cp.trunk_digest(m.trunk, m.manifest.config, 24)


def test_a_checkpoint_is_never_overwritten(saved: Path) -> None:
    before = (saved / cp.WEIGHTS).read_bytes()
    with pytest.raises(cp.BadCheckpoint, match="exists already"):
        cp.save(saved, model(1))
    assert (saved / cp.WEIGHTS).read_bytes() == before


def test_a_save_that_did_not_end_is_no_checkpoint_and_the_next_one_mends_it(tmp_path: Path) -> None:
    """The manifest comes last: whoever died before it left weights that nobody loads."""
    cp.save(tmp_path / "m", model(1))
    (tmp_path / "m" / cp.MANIFEST).unlink()
    assert not cp.exists(tmp_path / "m")
    refused(tmp_path / "m", "manifest.json: cannot be read")
    digest = cp.save(tmp_path / "m", model())
    assert cp.load(tmp_path / "m").manifest.digest == digest
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [cp.MANIFEST, cp.WEIGHTS]


def refused(folder: Path, match: str) -> None:
    with pytest.raises(cp.BadCheckpoint, match=match) as e:
        cp.load(folder)
    assert "\n" not in str(e.value)


def test_missing_folder_and_files(saved: Path) -> None:
    refused(saved / "nowhere", "no such checkpoint folder")
    (saved / cp.WEIGHTS).rename(saved / "aside")
    refused(saved, "model.safetensors: cannot be read")
    (saved / cp.MANIFEST).unlink()
    refused(saved, "manifest.json: cannot be read")


@pytest.mark.parametrize("at", [0, 200, -1])
def test_one_changed_byte_is_seen(saved: Path, at: int) -> None:
    payload = bytearray((saved / cp.WEIGHTS).read_bytes())
    payload[at] ^= 1
    (saved / cp.WEIGHTS).write_bytes(payload)
    refused(saved, "digest is")


def test_a_changed_threshold_is_seen(saved: Path) -> None:
    edit(saved, threshold=0.01)
    refused(saved, "the manifest was changed")


def test_pickle_is_refused_and_never_run_even_with_agreeing_digests(saved: Path, tmp_path: Path) -> None:
    (saved / cp.WEIGHTS).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused(saved, "digest is")
    reseal(saved)
    refused(saved, "not a safetensors file")
    assert not (tmp_path / "ran").exists()


def test_a_newer_format_is_told_from_damage(saved: Path) -> None:
    edit(saved, format=cp.FORMAT + 1, something_new=3)
    refused(saved, f"newer than {cp.FORMAT}.*upgrade")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "no format number"),
        ("{}", "no format number"),
        ('{"format": true}', "no format number"),
        ('{"format": 1}', "config: Field required"),
        ("[" * 100_000, "not JSON"),
        (" " * (MAX_MANIFEST + 1), "bytes, allowed"),
    ],
)
def test_a_manifest_that_is_none(saved: Path, text: str, match: str) -> None:
    (saved / cp.MANIFEST).write_text(text)
    refused(saved, match)


def test_tensors_of_another_architecture(saved: Path) -> None:
    raw = json.loads((saved / cp.MANIFEST).read_text())
    raw["config"]["trunk"]["width"] = 8
    (saved / cp.MANIFEST).write_text(json.dumps(raw))
    reseal(saved)
    refused(saved, "trunk does not fit its config")
    raw["config"]["tail"]["width"] = 8
    (saved / cp.MANIFEST).write_text(json.dumps(raw))
    reseal(saved)
    refused(saved, "tail tensor")


@pytest.mark.parametrize("pool", [torch.tensor(1.5), torch.tensor(-0.1), torch.zeros(2)])
def test_a_pool_that_is_no_share(tmp_path: Path, pool: torch.Tensor) -> None:
    odd = model()
    odd.tail["reference.pool"] = pool
    cp.save(tmp_path / "m", odd)
    refused(tmp_path / "m", "reference.pool is no share")


def test_a_trunk_under_a_false_address(saved: Path) -> None:
    edit(saved, trunk_digest="0" * 64)
    reseal(saved)
    refused(saved, "trunk_digest")


def test_a_value_that_is_not_finite_is_not_stored(tmp_path: Path) -> None:
    bad = model()
    bad.tail["gate"][0] = float("nan")
    with pytest.raises(cp.BadCheckpoint, match=r"tail\.gate: .* not finite"):
        cp.save(tmp_path / "m", bad)
    assert list(tmp_path.iterdir()) == []
