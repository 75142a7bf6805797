"""Augments frames as another sensor and another crop would show them.

Sensor effects are drawn per sample and modality; geometry is joint, because all modalities look at one face.

Frames here are float [B, 5, H, W] in [0, 1] (RGB, depth, infrared). Depth 0 means no return and stays 0.
It is worth more than any loss, so every source method gets the same.
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
SCALE = 0.22  # factor in e^±: sets and sites crop faces differently
ASPECT = 0.12  # factor in e^± on the width, and its inverse on the height
ROTATION = 0.15  # radians
DEPTH = 3
CHANNEL_MODALITY = (0, 0, 0, 1, 2)


def augment(frames: Tensor, generator: Generator) -> Tensor:
    """Returns augmented frames, with one draw of every effect per sample; the input stays as it is."""
    moved = change_geometry(frames, generator)
    no_return = moved[:, DEPTH : DEPTH + 1] == 0
    seen = change_sensor(invert_depth(moved, generator), generator)
    seen[:, DEPTH : DEPTH + 1].masked_fill_(no_return, 0.0)
    return seen


def augment_bytes(frames: Tensor, generator: Generator) -> Tensor:
    """Returns augmented frames uint8 [B, 5, H, W] of such frames."""
    return augment(frames.float() / 255, generator).mul_(255).round_().to(torch.uint8)


def change_geometry(frames: Tensor, generator: Generator) -> Tensor:
    """Flips, scales, stretches, rotates and shifts: another crop, the same for all modalities.

    Borders repeat. Depth is averaged over its returns alone, so that an edge does not become a surface half
    way.
    """
    count = frames.shape[0]

    def draw(spread: float) -> Tensor:
        return spread * (2 * torch.rand(count, generator=generator) - 1)

    scale, aspect, angle = torch.exp(draw(SCALE)), torch.exp(draw(ASPECT)), draw(ROTATION)
    across, down = draw(2 * SHIFT), draw(2 * SHIFT)
    mirrored = torch.where(torch.rand(count, generator=generator) < FLIP_SHARE, -1.0, 1.0)
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    first = torch.stack([mirrored * aspect * cosine, -aspect * sine, across], dim=1)
    second = torch.stack([mirrored * sine / aspect, cosine / aspect, down], dim=1)
    to = list(frames.shape)
    grid = torch.nn.functional.affine_grid(torch.stack([first, second], dim=1), to, align_corners=False)
    returned = (frames[:, DEPTH : DEPTH + 1] > 0).float()
    moved = _sampled(torch.cat([frames, returned], dim=1), grid)
    weight = moved[:, -1:]
    depth = torch.where(weight > 0.5, moved[:, DEPTH : DEPTH + 1] / weight.clamp(min=0.5), 0.0)
    return torch.cat([moved[:, :DEPTH], depth, moved[:, DEPTH + 1 : -1]], dim=1).clamp_(0, 1)


def invert_depth(frames: Tensor, generator: Generator) -> Tensor:
    """Exchanges near and far in some samples, because the polarity of a sensor's depth is not known."""
    flip = torch.rand(frames.shape[0], 1, 1, generator=generator) < INVERT_SHARE
    depth = frames[:, DEPTH]
    return torch.cat(
        [frames[:, :DEPTH], torch.where(flip, 1 - depth, depth)[:, None], frames[:, DEPTH + 1 :]], dim=1
    )


def change_sensor(frames: Tensor, generator: Generator) -> Tensor:
    """Applies the gamma, gain, offset, blur and noise of another sensor."""
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


def _sampled(planes: Tensor, grid: Tensor) -> Tensor:
    return torch.nn.functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
