"""Sensor augmentation: what differs between cameras, per sample and independently per modality; geometry is joint.

Frames here are float [B, 5, S, S] in [0, 1] (RGB, depth, infrared). Depth 0 means no return and stays 0.
Ranges: ``methods.md`` §7. It is worth more than any loss, so every method gets the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

GAMMA = 0.5  # exponent in e^±
GAIN = 0.35  # factor in e^±, per channel
OFFSET = 0.15
NOISE = 0.06  # largest standard deviation
BLUR_SHARE = 0.3  # of samples, per modality: half resolution
INVERT_SHARE = 0.3  # of samples: depth with near and far exchanged
FLIP_SHARE = 0.5
SHIFT = 1 / 16  # of the side
DEPTH = 3
CHANNEL_MODALITY = (0, 0, 0, 1, 2)


def augment(frames: Tensor, generator: Generator) -> Tensor:
    """One draw of everything for every sample; the input is left as it is."""
    moved = shift_and_flip(frames, generator)
    no_return = moved[:, DEPTH : DEPTH + 1] == 0
    seen = sense(invert_depth(moved, generator), generator)
    seen[:, DEPTH : DEPTH + 1].masked_fill_(no_return, 0.0)
    return seen


def shift_and_flip(frames: Tensor, generator: Generator) -> Tensor:
    """Horizontal flip and a small shift, the same for all modalities: they look at one face. Borders repeat."""
    count, channels, side = frames.shape[0], frames.shape[1], frames.shape[-1]
    reach = max(1, round(side * SHIFT))
    by = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < FLIP_SHARE
    at = torch.arange(side)
    rows, columns = (at + by[0]).clamp(0, side - 1), (at + by[1]).clamp(0, side - 1)
    columns = torch.where(flip, columns.flip(1), columns)
    sample, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return frames[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def invert_depth(frames: Tensor, generator: Generator) -> Tensor:
    """Exchange near and far in some samples: the polarity of a sensor's depth is not known."""
    flip = torch.rand(frames.shape[0], 1, 1, generator=generator) < INVERT_SHARE
    depth = frames[:, DEPTH]
    return torch.cat([frames[:, :DEPTH], torch.where(flip, 1 - depth, depth)[:, None], frames[:, DEPTH + 1 :]], dim=1)


def sense(frames: Tensor, generator: Generator) -> Tensor:
    """Gamma, gain, offset, blur and noise of another sensor."""
    count, channels, side = frames.shape[0], frames.shape[1], frames.shape[-1]
    modality = torch.tensor(CHANNEL_MODALITY)

    def draw(spread: float) -> Tensor:  # one number per modality
        return spread * (2 * torch.rand(count, 3, generator=generator) - 1)[:, modality, None, None]

    gamma, offset = torch.exp(draw(GAMMA)), draw(OFFSET)
    gain = torch.exp(GAIN * (2 * torch.rand(count, channels, 1, 1, generator=generator) - 1))
    x = (gain * frames.clamp(min=1e-4) ** gamma + offset).clamp_(0, 1)
    planes = x.flatten(0, 1)
    blurred = (torch.rand(count, 3, generator=generator) < BLUR_SHARE)[:, modality].flatten().nonzero()[:, 0]
    small = torch.nn.functional.avg_pool2d(planes[blurred, None], 2, ceil_mode=True)
    planes[blurred] = torch.nn.functional.interpolate(small, size=(side, side), mode="bilinear")[:, 0]
    noise = torch.randn(frames.shape, generator=generator).mul_(draw(NOISE / 2) + NOISE / 2)
    return noise.add_(x).clamp_(0, 1)
