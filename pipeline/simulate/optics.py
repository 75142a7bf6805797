"""Applies what lies between a scene and a sensor: panes that mirror, narrow beams, fringes, wide lenses.

Images are float32 with values around 0 to 1, depth is in mm. Positions are counted from the centre of a
frame: -1 is its left or upper edge, 1 its right or lower one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:
    from pipeline.simulate.heads import Map


class Glare(NamedTuple):
    """Light that does not come from the scene: a veil over the whole frame, and a spot on top of it."""

    veil: float  # light added everywhere
    spot: float  # light added at the centre of the spot
    x: float  # of the spot
    y: float
    width: float  # standard deviation of the spot
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of the added light in a colour image


class Beam(NamedTuple):
    """A lamp that does not fill the frame."""

    width: float  # standard deviation
    x: float = 0.0  # where it points
    y: float = 0.0


class Fringes(NamedTuple):
    """Waves that structured light leaves in depth; their phase differs between captures."""

    amplitude: float  # mm
    period: float  # pixels
    angle: float  # rad from a horizontal run


def with_glare(image: Map, glare: Glare) -> Map:
    """Returns ``image`` [R, R] or [R, R, 3] behind stray light; a dimmer exposure takes half of it back."""
    light = np.float32(glare.veil) + np.float32(glare.spot) * _bump(image.shape[0], glare)
    if image.ndim == 3:
        light = light[..., None]
    tint = np.array(glare.tint, np.float32) if image.ndim == 3 else np.float32(1)
    return image * (1 - np.float32(0.5) * np.clip(light, 0, 1)) + tint * light


def with_beam(image: Map, beam: Beam) -> Map:
    """Returns ``image`` [R, R] under a lamp whose light falls off from where it points."""
    return image * _bump(image.shape[0], beam)


def with_fringes(mm: Map, fringes: Fringes, rng: np.random.Generator) -> Map:
    """Returns depth [R, R] with waves on it; their phase is drawn."""
    axis = np.arange(len(mm), dtype=np.float32)
    along = axis * np.float32(np.cos(fringes.angle)) + axis[:, None] * np.float32(np.sin(fringes.angle))
    turn = np.float32(rng.uniform(0, 2 * np.pi))
    return mm + np.float32(fringes.amplitude) * np.sin(np.float32(2 * np.pi / fringes.period) * along + turn)


def bent(maps: Map, amount: float) -> Map:
    """Returns maps [C, R, R] through a wide lens that shrinks a frame's corners by up to 2 ``amount``."""
    x, y = _grid(maps.shape[-1])
    stretch = 1 + np.float32(amount) * (x * x + y * y)
    u, v = ((a * stretch + 1) * np.float32(maps.shape[-1] / 2) - np.float32(0.5) for a in (x, y))
    return np.stack([cv2.remap(p, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for p in maps])


def _bump(side: int, at: Glare | Beam) -> Map:
    """Returns a Gaussian [side, side] that is 1 at its centre."""
    x, y = _grid(side)
    return np.exp(((x - at.x) ** 2 + (y - at.y) ** 2) / np.float32(-2 * at.width**2))


def _grid(side: int) -> tuple[Map, Map]:
    """Returns the coordinates (x, y) of the pixels of a frame."""
    axis = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / side) - 1
    x, y = np.meshgrid(axis, axis)
    return x, y
