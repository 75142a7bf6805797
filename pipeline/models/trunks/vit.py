"""Computes features by one pre-trained ViT that the modalities share, by the recipe of MMDG and DADM.

The backbone is a ViT, a DINOv2 with registers or the vision half of a CLIP of ``transformers``. Frames come
prepared, so a backbone's own image mean and deviation are not used.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from pipeline.models.trunks.contract import CHANNELS, BadTrunk, Trunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType
    from typing import Literal

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from pipeline.models.trunks.contract import Architecture

ADAPTER = 8  # width of the adapters' bottleneck
CENTRAL = 0.5  # share of the central difference in an adapter's convolution (DADM)
WHERE = "model.trunk.pretrained"
EXTRA = "model.trunk.kind: vit needs the extra; pip install 'palisade[vit]'"
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")  # read from a hub; never a pickle


@dataclass(frozen=True)
class Backbone:
    """Names of a backbone's classes in ``transformers``, and of its parts."""

    model: str
    config: str
    layers: str  # path of the blocks
    norm: str  # path of the norm after the last block
    options: dict[str, bool] = field(default_factory=dict)


BACKBONES = {  # by the config's model_type
    "vit": Backbone("ViTModel", "ViTConfig", "layers", "layernorm", {"add_pooling_layer": False}),
    "dinov2_with_registers": Backbone(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "encoder.layer", "layernorm"
    ),
    "clip_vision_model": Backbone("CLIPVisionModel", "CLIPVisionConfig", "encoder.layers", "post_layernorm"),
}
SMALL = {  # without pre-trained weights
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
PART_OF = {"clip": "clip_vision_model"}  # a whole model's model_type → that of its part read here


class VitTrunk(Trunk):
    """The recipe of MMDG and DADM: all blocks but the last frozen, with small adapters per modality.

    With ``tuning: last_block`` there are no adapters. Depth and infrared are read as grey RGB, and a feature
    is linear in the class token. The adapters start as the identity.
    """

    def __init__(
        self, backbone: PreTrainedModel, features: int, *, tuning: Literal["adapters", "last_block"]
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.features = features
        self._side = _side(backbone.config)
        names = BACKBONES[backbone.config.model_type]
        self._layers, self._norm = names.layers, names.norm
        blocks, width = self._blocks(), backbone.config.hidden_size
        blocks[-1].requires_grad_(True)
        backbone.get_submodule(names.norm).requires_grad_(True)
        before = 1 + getattr(backbone.config, "num_register_tokens", 0)
        count = len(blocks) if tuning == "adapters" else 0
        self.adapters = nn.ModuleList(
            nn.ModuleList(Adapter(width, before) for _ in range(count)) for _ in CHANNELS
        )
        self.project = nn.ModuleList(nn.Linear(width, features) for _ in CHANNELS)

    def read(self, m: int, x: Tensor) -> Tensor:
        grey = x.expand(-1, 3, -1, -1)
        hidden = self.backbone.get_submodule("embeddings")(
            F.interpolate(grey, size=(self._side, self._side), mode="bilinear", antialias=True)
        )
        if isinstance(first := getattr(self.backbone, "pre_layrnorm", None), nn.Module):  # CLIP spells it so
            hidden = first(hidden)
        adapters = list(cast("nn.ModuleList", self.adapters[m]))
        for layer, adapter in zip(self._blocks(), adapters or [nn.Identity()] * len(self._blocks())):
            hidden = adapter(layer(hidden, None))
        return self.project[m](self.backbone.get_submodule(self._norm)(hidden[:, 0]))

    def learned(self, m: int) -> Iterator[nn.Parameter]:
        return chain(self.adapters[m].parameters(), self.project[m].parameters())

    def architecture(self) -> Architecture:
        """Returns the backbone's configuration, without the place that its weights came from."""
        facts = json.loads(json.dumps(self.backbone.config.to_dict()))  # its numbered labels become names
        return {k: v for k, v in facts.items() if k != "_name_or_path"}

    def _blocks(self) -> nn.ModuleList:
        return cast("nn.ModuleList", self.backbone.get_submodule(self._layers))


class Adapter(nn.Module):
    """A bottleneck with central difference convolution over the patch grid, added to tokens [B, N + P, W].

    The first N tokens are of no patch: the class token and the registers.
    """

    def __init__(self, width: int, before: int) -> None:
        super().__init__()
        self.before = before
        self.down = nn.Linear(width, ADAPTER)
        self.conv = nn.Conv2d(ADAPTER, ADAPTER, 3, padding=1, bias=False)
        self.up = nn.Linear(ADAPTER, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        low = F.gelu(self.down(tokens))
        first, patches = low[:, : self.before], low[:, self.before :]
        side = math.isqrt(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        centre = F.conv2d(grid, self.conv.weight.sum(dim=(2, 3), keepdim=True))
        grid = self.conv(grid) - CENTRAL * centre
        return tokens + self.up(torch.cat([first, patches + grid.flatten(2).transpose(1, 2)], dim=1))


def vit_backbone(pretrained: str | None, architecture: Architecture | None) -> PreTrainedModel:
    """Returns the backbone of a checkpoint's ``architecture``, of ``pretrained``, or a small random ViT.

    Raises BadTrunk. Only safetensors are read; with ``architecture`` nothing is looked for at all.
    """
    if architecture is not None:
        return _random(architecture)
    if pretrained is None:
        return _random(SMALL)
    folder = _folder(pretrained)
    names = BACKBONES[_model_type(_config(pretrained, folder), f"{WHERE}: {pretrained!r}")]
    if not any(folder.glob("*.safetensors")):
        raise BadTrunk(f"{WHERE}: {pretrained!r} has no *.safetensors; no other format is read")
    kind = getattr(_transformers(), names.model)
    from huggingface_hub.errors import StrictDataclassError  # a wrong setting; it comes with transformers

    try:
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **names.options
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as e:
        raise _unloadable(pretrained, e) from None
    if absent := sorted(info["missing_keys"]):
        raise BadTrunk(
            f"{WHERE}: {pretrained!r} cannot be loaded: {len(absent)} tensors are missing, e.g. {absent[0]}"
        )
    return model


def _random(architecture: Mapping[str, object]) -> PreTrainedModel:
    names = BACKBONES[_model_type(architecture, "the checkpoint's trunk")]
    transformers = _transformers()
    config = getattr(transformers, names.config).from_dict(dict(architecture))
    return getattr(transformers, names.model)(config, **names.options)


def _folder(pretrained: str) -> Path:
    """Returns the folder of weights, fetched from the hub if ``pretrained`` is no folder here."""
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(pretrained):
        raise BadTrunk(f"{WHERE}: {pretrained!r} cannot be loaded: no such folder, and no name on a hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BadTrunk(EXTRA) from None
    try:
        return Path(snapshot_download(pretrained, allow_patterns=list(FILES)))
    except (OSError, ValueError) as e:  # no network, no such name, no access
        raise _unloadable(pretrained, e) from None


def _config(pretrained: str, folder: Path) -> Mapping[str, object]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise _unloadable(pretrained, e) from None
    return config if isinstance(config, dict) else {}


def _model_type(config: Mapping[str, object], where: str) -> str:
    given = str(config.get("model_type"))
    kind = PART_OF.get(given, given)
    if kind not in BACKBONES:
        allowed = ", ".join((*BACKBONES, *PART_OF))
        raise BadTrunk(f"{where}: model_type {given!r} is not one of {allowed}")
    return kind


def _side(config: PretrainedConfig) -> int:
    """Returns the side of the square colour images that a backbone reads."""
    sides = {n: getattr(config, n) for n in ("image_size", "patch_size")}
    side, patch = (s if isinstance(s, int) or len({*s}) > 1 else s[0] for s in sides.values())
    if not isinstance(side, int) or not isinstance(patch, int) or config.num_channels != 3:
        raise BadTrunk(
            f"{WHERE}: image_size {sides['image_size']}, patch_size {sides['patch_size']}, num_channels "
            f"{config.num_channels}: only square images and patches of three channels are read"
        )
    return side


def _transformers() -> ModuleType:
    try:
        import transformers  # imported here: it takes 12 s cold
    except ImportError:
        raise BadTrunk(EXTRA) from None
    return transformers


def _unloadable(pretrained: str, e: Exception) -> BadTrunk:
    return BadTrunk(f"{WHERE}: {pretrained!r} cannot be loaded: {' '.join(str(e).split())[:200]}")
