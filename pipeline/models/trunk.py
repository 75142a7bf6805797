"""Computes one feature vector per modality from frames; it is frozen after source training.

``tiny`` is a small CNN per modality, ``mobile`` an ImageNet CNN with a shared stem and a middle per modality,
``vit`` one ViT that the modalities share. All read every modality by itself: at inference no value of another
modality or another sample reaches a feature.

Shapes: frames uint8 or float [B, 5, H, W] (RGB, depth, infrared), present [B, M], z [B, M, F].
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.models import MobileConfig, TinyConfig
from pipeline.models.trunks.contract import CHANNELS, BadTrunk, Trunk
from pipeline.models.trunks.mobile import MobileTrunk
from pipeline.models.trunks.tiny import Block, TinyTrunk
from pipeline.models.trunks.vit import VitTrunk, vit_backbone
from pipeline.types import Modality

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models import TrunkConfig
    from pipeline.models.trunks.contract import Architecture

__all__ = ["BadTrunk", "Trunk", "build_trunk", "features", "fold", "graph_of", "prepare"]

BLACK = 0.02  # level in [0, 1] up to which a pixel holds no measurement
OPSET = 17  # of the exported graph
FLAT = 0.05  # added to the spread, so that a flat frame does not become noise


def build_trunk(config: TrunkConfig, size: int, *, architecture: Architecture | None = None) -> Trunk:
    """Returns a fresh trunk; raises BadTrunk.

    With the ``architecture`` of a checkpoint no pre-trained weights are looked for: the caller loads the
    checkpoint's.
    """
    if isinstance(config, TinyConfig):
        return TinyTrunk(config.width, config.features)
    if isinstance(config, MobileConfig):
        return MobileTrunk(config.features, pretrained=architecture is None)
    backbone = vit_backbone(config.pretrained, architecture)
    return VitTrunk(backbone, config.features, tuning=config.tuning)


def prepare(frames: Tensor) -> Tensor:
    """Normalises uint8 frames [B, 5, H, W] to mean 0 and about unit spread, per frame and modality.

    A stem's stored maps float16 [B, M, C, h, w] were made from such frames and only become float32.

    Black pixels (no return, removed background, borders) are left out of the statistics and stay 0. Otherwise
    a data set that removes its background would look darker than the others, and its scores would shift.
    """
    if frames.dtype == torch.float16:
        return frames.float()
    return torch.cat([_standardised(frames[:, begin:end]) for begin, end in CHANNELS], dim=1)


def features(trunk: Trunk, frames: Tensor, present: Tensor, *, batch: int = 256) -> Tensor:
    """Returns the features z [N, M, F] at inference, in slices of ``batch``; ``frames`` as in ``prepare``."""
    trunk.eval()
    device, batch = next(trunk.parameters()).device, min(batch, trunk.slice)
    with torch.no_grad():
        pairs = zip(frames.split(batch), present.split(batch), strict=True)
        return torch.cat([trunk(prepare(f.to(device)), p.to(device)).cpu() for f, p in pairs])


def fold(trunk: Trunk) -> Trunk:
    """Returns an equal, frozen trunk in eval mode with each BatchNorm merged into its convolution."""
    folded = copy.deepcopy(trunk).eval()
    for block in [m for m in folded.modules() if isinstance(m, Block)]:
        if isinstance(block.norm, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.conv, block.norm)
            block.norm = nn.Identity()
    return folded.requires_grad_(False)


def graph_of(trunk: Trunk, size: int) -> bytes:
    """Returns the folded ``trunk`` with ``prepare`` before it as an ONNX graph, which ``models.graph`` runs.

    Equal weights give equal bytes. A modality is an input of its own, uint8 [N, C, size, size], and gives an
    output [N, F]; N is free, and may differ between modalities.
    """
    names = [m.name.lower() for m in Modality]
    rows = [torch.zeros(2, end - begin, size, size, dtype=torch.uint8) for begin, end in CHANNELS]
    device = next(trunk.parameters()).device
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a newer exporter exists, which needs another package
        torch.onnx.export(
            _Graph(trunk),
            tuple(part.to(device) for part in rows),
            buffer,  # pyright: ignore[reportArgumentType]: the type is that of the newer exporter alone
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            output_names=[f"z.{name}" for name in names],
            dynamic_axes={name: {0: f"rows.{name}"} for name in names},
        )
    return buffer.getvalue()


class _Graph(nn.Module):
    """The trunk from the rows of each modality, which are all present, to their features."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, *rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.trunk.read(m, _standardised(x)) for m, x in enumerate(rows))


def _standardised(part: Tensor) -> Tensor:
    """Returns the frames of one modality [B, C, H, W], 0 to 255, as ``prepare`` does."""
    x = part.float() / 255
    lit = (x.amax(dim=1, keepdim=True) > BLACK).float()
    count = x.shape[1] * lit.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    centred = lit * (x - (lit * x).sum(dim=(1, 2, 3), keepdim=True) / count)
    spread = torch.sqrt((centred * centred).sum(dim=(1, 2, 3), keepdim=True) / count)
    return centred / (spread + FLAT)
