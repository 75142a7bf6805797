"""Computes one feature vector per modality from frames; it is frozen after source training.

``tiny`` is a small CNN per modality; ``vit`` is one ViT that the modalities share, by the recipe of MMDG and
DADM. Both read every modality by itself: at inference no value of another modality or another sample reaches
a feature.

Shapes: frames uint8 or float [B, 5, H, W] (RGB, depth, infrared), present [B, M], z [B, M, F].
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.models import TinyConfig, VitConfig
from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from pydantic import JsonValue
    from torch import Tensor
    from transformers import ViTModel

    Architecture = dict[str, JsonValue]

CHANNELS = ((0, 3), (3, 4), (4, 5))  # first and one past the last channel of each modality, enum order
MODALITIES = len(CHANNELS)
BLACK = 0.02  # level in [0, 1] up to which a pixel holds no measurement
FLAT = 0.05  # added to the spread, so that a flat frame does not become noise
ADAPTER = 8  # width of the ViT adapters' bottleneck
CENTRAL = 0.5  # share of the central difference in a ViT adapter's convolution (DADM)


class BadTrunk(PalisadeError, ValueError):
    """A trunk that cannot be built as configured; the message is one line."""


def build_trunk(
    config: TinyConfig | VitConfig, size: int, *, architecture: Architecture | None = None
) -> nn.Module:
    """Returns a fresh trunk; raises BadTrunk.

    With the ``architecture`` of a checkpoint nothing is downloaded: the caller loads the checkpoint's
    weights.
    """
    if isinstance(config, TinyConfig):
        return TinyTrunk(config.width, config.features)
    return VitTrunk(_backbone(config.pretrained, architecture), config.features)


def prepare(frames: Tensor) -> Tensor:
    """Normalises uint8 frames [B, 5, H, W] to mean 0 and about unit spread, per frame and modality.

    Black pixels (no return, removed background, borders) are left out of the statistics and stay 0. Otherwise
    a data set that removes its background would look darker than the others, and its scores would shift.
    """
    x = frames.float() / 255
    return torch.cat([_standardised(x[:, begin:end]) for begin, end in CHANNELS], dim=1)


def features(trunk: nn.Module, frames: Tensor, present: Tensor, *, batch: int = 256) -> Tensor:
    """Returns the features z [N, M, F] of uint8 frames [N, 5, H, W] at inference, in slices of ``batch``."""
    trunk.eval()
    device = next(trunk.parameters()).device
    with torch.no_grad():
        pairs = zip(frames.split(batch), present.split(batch), strict=True)
        return torch.cat([trunk(prepare(f.to(device)), p.to(device)).cpu() for f, p in pairs])


def fold(trunk: nn.Module) -> nn.Module:
    """Returns an equal, frozen trunk in eval mode with each BatchNorm merged into its convolution."""
    folded = copy.deepcopy(trunk).eval()
    for block in [m for m in folded.modules() if isinstance(m, Block)]:
        if isinstance(block.norm, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.norm)
            block.norm = nn.Identity()
    return folded.requires_grad_(False)


class TinyTrunk(nn.Module):
    """A CNN per modality, about 60 thousand parameters each at width 16.

    Its norms learn from rows where the modality is present, because absent ones are black.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.features = features
        branches = [Branch(end - begin, width, features) for begin, end in CHANNELS]
        self.branches = nn.ModuleList(branches)
        for p in self.branches.parameters():
            if p.dim() == 4:  # channels last is 1.3 times as fast on a CPU
                p.data = p.data.contiguous(memory_format=torch.channels_last)

    def forward(self, frames: Tensor, present: Tensor) -> Tensor:
        return torch.stack([self._modality(m, frames, present[:, m]) for m in range(MODALITIES)], dim=1)

    def architecture(self) -> Architecture:
        return {}

    def _modality(self, m: int, frames: Tensor, present: Tensor) -> Tensor:
        begin, end = CHANNELS[m]
        rows = present.nonzero()[:, 0]
        z = frames.new_zeros(len(frames), self.features)
        if len(rows) < 1 + self.training:  # one row has no batch variance to normalise by
            # DDP needs every parameter in the graph
            return z + 0.0 * sum(p.sum() for p in self.branches[m].parameters())
        part = frames[:, begin:end] if len(rows) == len(frames) else frames[rows, begin:end]
        feature = self.branches[m](part.contiguous(memory_format=torch.channels_last))
        return feature if len(rows) == len(frames) else z.index_copy(0, rows, feature.to(z.dtype))


class Branch(nn.Module):
    """Maps the frames of one modality [B, C, H, W] to features [B, F].

    The first two blocks normalise each sample by itself, which removes contrast and illumination (IBN-Net,
    Pan et al., ECCV 2018). The others normalise over the batch in training and are folded afterwards.
    """

    def __init__(self, channels: int, width: int, features: int) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            Block(channels, w, stride=2, norm=nn.InstanceNorm2d(w, affine=True)),
            Block(w, 2 * w, stride=2, norm=nn.InstanceNorm2d(2 * w, affine=True)),
            Block(2 * w, 4 * w, stride=2, norm=nn.BatchNorm2d(4 * w)),
            Block(4 * w, 4 * w, stride=1, norm=nn.BatchNorm2d(4 * w)),
        )
        self.project = nn.Linear(4 * w, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.body(x).mean(dim=(2, 3)))


class Block(nn.Module):
    """A convolution, a norm and a ReLU."""

    def __init__(self, inside: int, outside: int, *, stride: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


def _standardised(x: Tensor) -> Tensor:
    lit = (x.amax(dim=1, keepdim=True) > BLACK).float()
    count = x.shape[1] * lit.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    centred = lit * (x - (lit * x).sum(dim=(1, 2, 3), keepdim=True) / count)
    spread = torch.sqrt((centred * centred).sum(dim=(1, 2, 3), keepdim=True) / count)
    return centred / (spread + FLAT)


class VitTrunk(nn.Module):
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

    def forward(self, frames: Tensor, present: Tensor) -> Tensor:
        return torch.stack([self._modality(m, frames, present[:, m]) for m in range(MODALITIES)], dim=1)

    def architecture(self) -> Architecture:
        return self.backbone.config.to_dict()

    def _modality(self, m: int, frames: Tensor, present: Tensor) -> Tensor:
        begin, end = CHANNELS[m]
        rows = present.nonzero()[:, 0]
        z = frames.new_zeros(len(frames), self.features)
        if len(rows) == 0:  # DDP needs every parameter in the graph
            parameters = [*self.adapters[m].parameters(), *self.project[m].parameters()]
            return z + 0.0 * torch.stack([p.sum() for p in parameters]).sum()
        x = frames[rows, begin:end].expand(-1, 3, -1, -1)
        side = cast("int", self.backbone.config.image_size)
        hidden = self.backbone.embeddings(
            F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        )
        for layer, adapter in zip(self.backbone.layers, cast("nn.ModuleList", self.adapters[m]), strict=True):
            hidden = adapter(layer(hidden))
        return z.index_copy(0, rows, self.project[m](self.backbone.layernorm(hidden)[:, 0]))


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


def _backbone(pretrained: str | None, architecture: Architecture | None) -> ViTModel:
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
