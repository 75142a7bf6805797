"""Computes features by one pre-trained ViT that the modalities share, by the recipe of MMDG and DADM."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.trunks.contract import CHANNELS, BadTrunk, Trunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import ViTModel

    from pipeline.models.trunks.contract import Architecture

ADAPTER = 8  # width of the adapters' bottleneck
CENTRAL = 0.5  # share of the central difference in an adapter's convolution (DADM)


class VitTrunk(Trunk):
    """The recipe of MMDG and DADM: all layers but the last frozen, with small adapters per modality.

    Depth and infrared are read as grey RGB. The adapters start as the identity.
    """

    def __init__(self, backbone: ViTModel, features: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.features = features
        layers, width = len(backbone.layers), backbone.config.hidden_size
        backbone.layers[-1].requires_grad_(True)
        backbone.layernorm.requires_grad_(True)
        self.adapters = nn.ModuleList(nn.ModuleList(Adapter(width) for _ in range(layers)) for _ in CHANNELS)
        self.project = nn.ModuleList(nn.Linear(width, features) for _ in CHANNELS)

    def read(self, m: int, x: Tensor) -> Tensor:
        side = cast("int", self.backbone.config.image_size)
        grey = x.expand(-1, 3, -1, -1)
        hidden = self.backbone.embeddings(
            F.interpolate(grey, size=(side, side), mode="bilinear", antialias=True)
        )
        for layer, adapter in zip(self.backbone.layers, cast("nn.ModuleList", self.adapters[m]), strict=True):
            hidden = adapter(layer(hidden))
        return self.project[m](self.backbone.layernorm(hidden)[:, 0])

    def learned(self, m: int) -> Iterator[nn.Parameter]:
        return chain(self.adapters[m].parameters(), self.project[m].parameters())

    def architecture(self) -> Architecture:
        return self.backbone.config.to_dict()


class Adapter(nn.Module):
    """A bottleneck with central difference convolution over the patch grid, added to tokens [B, 1 + P, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, ADAPTER)
        self.conv = nn.Conv2d(ADAPTER, ADAPTER, 3, padding=1, bias=False)
        self.up = nn.Linear(ADAPTER, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        low = F.gelu(self.down(tokens))
        side = math.isqrt(low.shape[1] - 1)
        grid = low[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        centre = F.conv2d(grid, self.conv.weight.sum(dim=(2, 3), keepdim=True))
        grid = self.conv(grid) - CENTRAL * centre
        return tokens + self.up(torch.cat([low[:, :1], low[:, 1:] + grid.flatten(2).transpose(1, 2)], dim=1))


def vit_backbone(pretrained: str | None, architecture: Architecture | None) -> ViTModel:
    try:
        from transformers import ViTConfig, ViTModel  # imported here: it takes 12 s cold
    except ImportError:
        raise BadTrunk("model.trunk.kind: vit needs the extra; pip install 'palisade[vit]'") from None
    if architecture is not None:
        return ViTModel(ViTConfig.from_dict(dict(architecture)), add_pooling_layer=False)
    if pretrained is None:
        small = ViTConfig(
            image_size=32,
            patch_size=8,
            **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
            num_hidden_layers=3,
            num_attention_heads=2,
        )
        return ViTModel(small, add_pooling_layer=False)
    try:
        return ViTModel.from_pretrained(pretrained, add_pooling_layer=False, use_safetensors=True)
    except (OSError, ValueError) as e:
        first = " ".join(str(e).split())[:200]
        raise BadTrunk(f"model.trunk.pretrained: {pretrained!r} cannot be loaded: {first}") from None
