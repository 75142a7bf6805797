"""Computes features by a small CNN per modality; it trains from scratch on a CPU in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.trunks.contract import CHANNELS, Trunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class TinyTrunk(Trunk):
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

    def read(self, m: int, x: Tensor) -> Tensor:
        return self.branches[m](x.contiguous(memory_format=torch.channels_last))

    def learned(self, m: int) -> Iterator[nn.Parameter]:
        return self.branches[m].parameters()

    def fewest(self) -> int:
        return 1 + self.training  # one row has no batch variance to normalise by


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
