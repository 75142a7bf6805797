"""Computes features by MobileNetV2: a frozen stem that all modalities share, and a middle for each of them.

The stem (blocks 0 to 6, stride 8) and the start of every middle (blocks 7 to 13, stride 16) come from
ImageNet (Sandler et al., CVPR 2018). Their norms are merged into the convolutions when the weights are read:
the statistics are frozen anyway, and what is trained, stored and served is then the same plain network.

A frozen stem pays twice: its maps can be computed once per sample and kept (``pipeline.source.stems``), and a
middle that starts from ImageNet needs few steps. The last blocks are left out: they throw away what tells a
print from a face.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.trunks import pretrained as weights
from pipeline.models.trunks.contract import CHANNELS, Trunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

STRIDE = 8  # of the stem's maps to the frame
STEM = ((32, 16, 1, 1), (16, 24, 2, 6), (24, 24, 1, 6), (24, 32, 2, 6), (32, 32, 1, 6), (32, 32, 1, 6))
MIDDLE = (  # channels in and out, stride, expansion
    (32, 64, 2, 6),
    *[(64, 64, 1, 6)] * 3,
    (64, 96, 1, 6),
    *[(96, 96, 1, 6)] * 2,
)
FIRST, STEM_CHANNELS, LAST = 32, STEM[-1][1], MIDDLE[-1][1]
EPSILON = 1e-5  # of the norms that are merged


class MobileTrunk(Trunk):
    """MobileNetV2 to stride 16; a feature is linear in the means of its stem's and its middle's last maps."""

    slice, exported = 16, True

    def __init__(self, features: int, *, pretrained: bool) -> None:
        super().__init__()
        self.features = features
        self.stem_first = nn.Conv2d(3, FIRST, 3, 2, 1)
        self.stem_blocks = nn.Sequential(*(Inverted(*shape) for shape in STEM))
        middles = [nn.Sequential(*(Inverted(*shape) for shape in MIDDLE)) for _ in CHANNELS]
        self.middle = nn.ModuleList(middles)
        self.project = nn.ModuleList(nn.Linear(STEM_CHANNELS + LAST, features) for _ in CHANNELS)
        if pretrained:
            self._load(weights.read())
        for p in (*self.stem_first.parameters(), *self.stem_blocks.parameters()):
            p.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # missing in the stubs

    def stem(self, frames: Tensor) -> Tensor:
        """Returns the stem's maps [B, M, C, H/8, W/8] of prepared frames [B, 5, H, W]."""
        with torch.no_grad():
            each = [self._stem(frames[:, begin:end]) for begin, end in CHANNELS]
        return torch.stack(each, dim=1)

    def read(self, m: int, x: Tensor) -> Tensor:
        maps = x if x.shape[1] == STEM_CHANNELS else self._stem(x)
        last = self.middle[m](maps.contiguous(memory_format=torch.channels_last))
        return self.project[m](torch.cat([last.mean(dim=(2, 3)), maps.mean(dim=(2, 3))], dim=1))

    def part(self, m: int, x: Tensor) -> Tensor:
        return x[:, m] if x.dim() == 5 else super().part(m, x)

    def learned(self, m: int) -> Iterator[nn.Parameter]:
        return chain(self.middle[m].parameters(), self.project[m].parameters())

    def _stem(self, x: Tensor) -> Tensor:
        rgb = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return self.stem_blocks(_clipped(self.stem_first(rgb)))

    def _load(self, state: Mapping[str, Tensor]) -> None:
        """Takes blocks 0 to 13 of torchvision's MobileNetV2, the middle once per modality."""
        _merge(self.stem_first, state, "features.0.0", "features.0.1")
        blocks = (self.stem_blocks, *(cast("nn.Sequential", m) for m in self.middle))
        for sequence in blocks:
            begin = 1 if sequence is self.stem_blocks else 1 + len(STEM)
            for at, block in enumerate(sequence, begin):
                cast("Inverted", block).load(state, f"features.{at}.conv")


class Inverted(nn.Module):
    """An inverted residual block with its norms merged."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * inside
        self.expand = nn.Conv2d(inside, wide, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide)
        self.reduce = nn.Conv2d(wide, outside, 1)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else _clipped(self.expand(x))
        y = self.reduce(_clipped(self.depthwise(y)))
        return y.add_(x) if self.residual else y

    def load(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Takes the tensors below ``prefix``, by torchvision's numbers."""
        at = 0
        if self.expand is not None:
            _merge(self.expand, state, f"{prefix}.0.0", f"{prefix}.0.1")
            at = 1
        _merge(self.depthwise, state, f"{prefix}.{at}.0", f"{prefix}.{at}.1")
        _merge(self.reduce, state, f"{prefix}.{at + 1}", f"{prefix}.{at + 2}")


def _clipped(x: Tensor) -> Tensor:
    """Returns relu6 of ``x``, written over it: a second tensor of its size costs more than the arithmetic."""
    return F.hardtanh(x, 0.0, 6.0, inplace=True)


def _merge(conv: nn.Conv2d, state: Mapping[str, Tensor], weight: str, norm: str) -> None:
    """Sets ``conv`` to the convolution ``weight`` with the frozen ``norm`` after it."""
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + EPSILON)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(state[f"{weight}.weight"] * scale[:, None, None, None])
        conv.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)
