"""Trunk ``vit`` on small random backbones of each architecture: its marks and mistakes; no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from pipeline.models import ModelConfig, VitConfig
from pipeline.models import checkpoint as cp
from pipeline.models import tail as tails
from pipeline.models.trunk import BadTrunk, build_trunk, features, fold, prepare

if TYPE_CHECKING:
    from pipeline.models.trunks.vit import VitTrunk

SIZE = 20
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}
ARCHITECTURES = {
    "vit": {**SMALL, "patch_size": 8, "intermediate_size": 32},
    "dinov2_with_registers": {**SMALL, "patch_size": 16, "mlp_ratio": 2, "num_register_tokens": 3},
    "clip_vision_model": {**SMALL, "patch_size": 8, "intermediate_size": 32},
}
TUNINGS = ("adapters", "last_block")
every_backbone = pytest.mark.parametrize("kind", ARCHITECTURES)
every_tuning = pytest.mark.parametrize("tuning", TUNINGS)
slow = pytest.mark.slow  # transformers takes seconds to import


def trunk_of(kind: str, tuning: str = "adapters") -> VitTrunk:
    """A trunk whose adapters have learned something."""
    config = VitConfig(kind="vit", features=16, tuning=tuning)
    trunk = build_trunk(config, SIZE, architecture={"model_type": kind, **ARCHITECTURES[kind]})
    for adapter in trunk.adapters.modules():
        if isinstance(adapter, torch.nn.Linear):
            torch.nn.init.normal_(adapter.weight, std=0.3)
    return trunk.train()


def frames(count: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 5, SIZE, SIZE), dtype=torch.uint8)


def all_present(count: int = 5) -> torch.Tensor:
    return torch.ones(count, 3, dtype=torch.bool)


def mistake(pretrained: Path | str) -> str:
    with pytest.raises(BadTrunk, match=r"^model\.trunk\.") as e:
        build_trunk(VitConfig(kind="vit", pretrained=str(pretrained)), SIZE)
    assert "\n" not in str(e.value)
    return str(e.value)


def saved(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    backbone = trunk_of(kind).backbone.to(dtype)
    backbone.save_pretrained(folder, safe_serialization=True)
    return backbone


@slow
@every_backbone
@every_tuning
def test_each_modality_and_sample_is_read_by_itself(kind: str, tuning: str) -> None:
    trunk, x, present = trunk_of(kind, tuning), frames(), all_present()
    whole = features(trunk, x, present)
    assert whole.shape == (5, 3, 16)
    assert torch.allclose(whole[2:3], features(trunk, x[2:3], present[2:3]), atol=1e-5)
    assert torch.allclose(whole.flip(0), features(trunk, x.flip(0), present), atol=1e-5)
    other = x.clone()
    other[:, 4] = 255 - other[:, 4]
    z = features(trunk, other, present)
    assert torch.equal(z[:, :2], whole[:, :2])
    assert not torch.allclose(z[:, 2], whole[:, 2])
    present[1:3, 2] = False
    assert torch.equal(features(trunk, x, present)[1:3], features(trunk, other, present)[1:3])
    assert not bool(features(trunk, x, present)[1:3, 2].any())


@slow
@every_backbone
@every_tuning
def test_the_last_block_trains_and_small_parts_and_nothing_else(kind: str, tuning: str) -> None:
    trunk = trunk_of(kind, tuning)
    trunk(prepare(frames()), all_present()).square().sum().backward()
    learned = {n for n, p in trunk.named_parameters() if p.requires_grad}
    moved = {n for n, p in trunk.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved <= learned
    still = {n for n in learned - moved if not n.endswith("k_proj.bias")}  # a softmax cannot see this bias
    assert all(".2.conv." in n for n in still), "after the last block only the class token is read"
    backbone = {n.removeprefix("backbone.") for n in learned if n.startswith("backbone.")}
    last = {n for n, _ in trunk.backbone.named_parameters() if ".2." in f".{n}"}
    norm = {n for n in backbone if n.startswith(("layernorm.", "post_layernorm."))}
    assert len(norm) == 2
    assert backbone == last | norm
    assert any(n.startswith("adapters.") for n in learned) == (tuning == "adapters")


@slow
@every_backbone
def test_adapters_begin_as_the_identity_and_leave_registers_out_of_the_grid(kind: str) -> None:
    fresh = build_trunk(
        VitConfig(kind="vit", features=16), SIZE, architecture={"model_type": kind, **ARCHITECTURES[kind]}
    )
    plain = build_trunk(
        VitConfig(kind="vit", features=16, tuning="last_block"), SIZE, architecture=fresh.architecture()
    )
    plain.load_state_dict(fresh.state_dict(), strict=False)
    x, present = frames(), all_present()
    assert torch.equal(features(fresh, x, present), features(plain, x, present))
    adapter = trunk_of(kind).adapters[0][0]
    count = 1 + ARCHITECTURES[kind].get("num_register_tokens", 0)
    tokens = torch.randn(1, count + 4, 32)
    other = tokens.clone()
    other[:, :count] += 1
    assert torch.equal(adapter(tokens)[:, count:], adapter(other)[:, count:])


@slow
@every_backbone
def test_the_class_token_is_that_of_the_backbone_itself(kind: str) -> None:
    trunk = trunk_of(kind, "last_block").eval()
    x = prepare(frames())[:, :3]
    big = torch.nn.functional.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        out = trunk.backbone(big)
    token = out.pooler_output if kind == "clip_vision_model" else out.last_hidden_state[:, 0]
    assert torch.allclose(trunk.read(0, x), trunk.project[0](token), atol=1e-5)


@slow
@every_backbone
@every_tuning
def test_a_checkpoint_holds_all_that_it_needs(kind: str, tuning: str, tmp_path: Path) -> None:
    trunk = trunk_of(kind, tuning)
    gone = VitConfig(kind="vit", features=16, tuning=tuning, pretrained=str(tmp_path / "gone"))
    config = ModelConfig(trunk=gone)
    tail = tails.init_tail(config.tail, 16, generator=torch.Generator().manual_seed(0))
    facts = trunk.architecture()
    assert facts["model_type"] == kind
    assert json.loads(json.dumps(facts))["hidden_size"] == 32
    manifest = cp.Manifest(config=config, size=SIZE, threshold=0.5, method="erm", architecture=facts)
    cp.save(tmp_path / "model", cp.seal(fold(trunk), tail, manifest))
    again = cp.load(tmp_path / "model")
    assert again.manifest.config.trunk == gone
    x, present = frames(), all_present()
    assert torch.equal(features(again.trunk, x, present), features(trunk, x, present))


def test_a_checkpoint_from_before_tuning_keeps_its_digest() -> None:
    old = {"kind": "vit", "pretrained": None, "features": 64}
    config = VitConfig.model_validate(old)
    assert config.tuning == "adapters"
    assert config.model_dump(mode="json") == old
    new = VitConfig(kind="vit", tuning="last_block")
    assert VitConfig.model_validate_json(new.model_dump_json()) == new


@slow
@every_backbone
def test_weights_come_from_a_local_folder_in_float32(kind: str, tmp_path: Path) -> None:
    backbone = saved(tmp_path, kind, dtype=torch.float16)
    trunk = build_trunk(VitConfig(kind="vit", features=16, pretrained=str(tmp_path)), SIZE)
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}
    assert str(tmp_path) not in json.dumps(trunk.architecture())
    wanted = backbone.state_dict()
    for name, t in trunk.backbone.state_dict().items():
        assert torch.equal(t.half(), wanted[name]), name


@slow
def test_of_a_whole_clip_the_vision_half_is_read(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    part = {**ARCHITECTURES["clip_vision_model"]}
    text = {k: v for k, v in part.items() if k not in ("image_size", "patch_size")} | {"vocab_size": 9}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=part))
    whole.save_pretrained(tmp_path, safe_serialization=True)
    trunk = build_trunk(VitConfig(kind="vit", features=16, pretrained=str(tmp_path)), SIZE)
    assert trunk.architecture()["model_type"] == "clip_vision_model"
    for name, t in trunk.backbone.state_dict().items():
        assert torch.equal(t, whole.vision_model.state_dict()[name]), name


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    assert "no such folder" in mistake(tmp_path / "gone")
    assert "no such folder" in mistake("./gone")


def test_a_folder_without_a_configuration_says_so(tmp_path: Path) -> None:
    assert "config.json" in mistake(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in mistake(tmp_path)


@pytest.mark.parametrize("config", ['{"model_type": "siglip"}', "{}", "[]"])
def test_an_unknown_architecture_lists_what_is_allowed(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    assert "is not one of vit, dinov2_with_registers, clip_vision_model, clip" in mistake(tmp_path)


def test_an_unknown_architecture_in_a_checkpoint_lists_what_is_allowed() -> None:
    with pytest.raises(BadTrunk, match="'siglip' is not one of vit, dinov2_with_registers"):
        build_trunk(VitConfig(kind="vit"), SIZE, architecture={"model_type": "siglip"})


def test_a_folder_with_pickled_weights_alone_is_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle is opened")
    assert "has no *.safetensors" in mistake(tmp_path)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadTrunk, match=r"needs the extra; pip install 'palisade\[vit\]'$"):
        build_trunk(VitConfig(kind="vit"), SIZE)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "needs the extra" in mistake("somebody/something")


@slow
def test_without_a_network_a_hub_name_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    assert "'no/such-model' cannot be loaded" in mistake("no/such-model")


@slow
def test_a_hub_name_that_was_fetched_before_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants as hub

    revision, repository = "0" * 40, tmp_path / "models--some--vit"
    backbone = saved(repository / "snapshots" / revision, "vit")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    trunk = build_trunk(VitConfig(kind="vit", features=16, pretrained="some/vit"), SIZE)
    for name, t in trunk.backbone.state_dict().items():
        assert torch.equal(t, backbone.state_dict()[name]), name


@slow
def test_torn_missing_and_foreign_tensors_are_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "vit")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    gone = next(n for n in tensors if n.endswith(".0.layernorm_before.weight"))
    save_file({n: t for n, t in tensors.items() if n != gone}, weights, metadata={"format": "pt"})
    assert "1 tensors are missing, e.g." in mistake(tmp_path)
    save_file(tensors | {gone: torch.zeros(3)}, weights, metadata={"format": "pt"})
    assert "cannot be loaded" in mistake(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be loaded" in mistake(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    assert "cannot be loaded" in mistake(tmp_path)


@slow
@pytest.mark.parametrize("odd", [{"image_size": [32, 16]}, {"num_channels": 1}])
def test_only_square_colour_images_are_read(odd: dict[str, object]) -> None:
    with pytest.raises(BadTrunk, match="only square images and patches of three channels"):
        build_trunk(
            VitConfig(kind="vit"), SIZE, architecture={"model_type": "vit", **ARCHITECTURES["vit"], **odd}
        )
