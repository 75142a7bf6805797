"""Draws procedural people as height fields with reflectances, in millimetres.

A solid is float32 [8, N, N] over 320 x 320 mm seen from the front, y down, z toward the camera. Identities
are random draws of one shape model. NIR reflectances are assumed orders of magnitude, not measurements:
melanin hardly matters, water darkens skin at 940 nm.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    Map = np.ndarray  # float32
    Shape = dict[str, float]

N = 80
HALF = 160.0  # mm from the centre of the grid to its edge
FACE_Z = 80.0  # mm from the axis of the head to the plane of the face; camera distances end at this plane
RED, GREEN, BLUE, NIR, Z, ALPHA, GLOSS, SOFT = range(
    8
)  # SOFT: 1 = light bleeds under the surface, -1 = a display
_AXIS = np.linspace(-HALF, HALF, N, dtype=np.float32)
X, Y = _AXIS[None, :], _AXIS[:, None]
_TRAITS = {  # mean and standard deviation over identities; mm, or dimensionless where the mean is below 1
    "width": (71, 4),
    "top": (112, 5),
    "bottom": (102, 5),
    "taper": (0.3, 0.08),
    "bridge": (9, 2),
    "nose": (19, 3.5),
    "nose_width": (8.5, 1.3),
    "nose_y": (20, 2.5),
    "brow": (5, 1.5),
    "socket": (9, 1.8),
    "eye_x": (31, 1.7),
    "eye_y": (-14, 2),
    "lips": (4.5, 1.3),
    "mouth_y": (51, 2.5),
    "mouth": (21, 2.3),
    "chin": (6, 2),
    "cheek": (3.5, 1.8),
    "skew": (0, 1.6),
    "tone": (0.45, 0.27),
    "hairline": (-64, 9),
    "beard": (-0.5, 0.8),
    "hair_long": (-0.3, 1),
    "hair_light": (0.05, 0.17),
}


def shape_of(subject: int) -> Shape:
    """Returns a person: named lengths and traits, at most two standard deviations from the mean."""
    draw = np.clip(np.random.default_rng([subject, 7]).standard_normal(len(_TRAITS)), -2, 2)
    return {name: mean + sd * float(d) for (name, (mean, sd)), d in zip(_TRAITS.items(), draw, strict=True)}


def person(subject: int, fixed: np.random.Generator, moving: np.random.Generator, wavelength: int) -> Map:
    """Returns a head with hair, ears and neck.

    ``fixed`` draws what stays the same for a session, ``moving`` the expression.
    """
    s = shape_of(subject)
    mouth, smile, gaze = max(0.0, moving.normal(0, 3.5)), moving.normal(0, 0.6), moving.normal(0, 1.5)
    out = _at_rest(subject, wavelength).copy()
    mouth_y, half = s["mouth_y"] + mouth / 2, s["mouth"]
    out[Z] += s["lips"] * (
        _blob(0, s["mouth_y"] - 5, half * 0.75, 4) + _blob(0, s["mouth_y"] + 5 + mouth, 14, 5)
    )
    out[Z] -= (3 + mouth) * _blob(0, mouth_y, half, 2.5 + mouth / 2)
    out[Z] += 2 * smile * _pair(38, 20 - 4 * smile, 16, 14)
    red, green, blue, nir = skin_of(s, wavelength)
    paint(
        out, disc(0, mouth_y, half, 7.5 + mouth / 2, 3), (red * 0.82, green * 0.52, blue * 0.55), nir * 0.94
    )
    paint(out, _blob(0, mouth_y, half * 0.8, 1.6 + mouth / 2), (0.12, 0.05, 0.05), 0.2, keep=0.2)
    paint(out, eyes(s, 5.8, 5.2, gaze), (0.10, 0.07, 0.05), 0.16)
    if fixed.random() < 0.15:
        frame = np.clip(eyes(s, 22, 18) - eyes(s, 19, 15) + disc(0, s["eye_y"] - 3, 10, 2), 0, 1)
        paint(out, frame, (0.06, 0.05, 0.05), 0.1)
        out[GLOSS] += 0.3 * eyes(s, 19, 15)
    return out


def skin_of(s: Shape, wavelength: int) -> tuple[float, float, float, float]:
    """Returns the reflectance of this person's skin: red, green, blue, NIR."""
    tone = float(np.clip(s["tone"], 0.02, 0.98))
    red, green, blue = (
        light * (1 - tone) + dark * tone for light, dark in ((0.82, 0.30), (0.60, 0.18), (0.48, 0.12))
    )
    return red, green, blue, (0.60 if wavelength < 900 else 0.47) - 0.05 * tone


def torso(rng: np.random.Generator) -> Map:
    """Draws shoulders in clothing; textiles are often bright in NIR whatever their colour."""
    out = np.zeros((8, N, N), np.float32)
    weave = grain(rng, 30)
    out[:3] = column(rng.uniform(0.04, 0.8, 3)) * (1 + 0.08 * weave)
    out[NIR] = rng.uniform(0.2, 0.8) * (1 + 0.05 * weave)
    out[ALPHA] = np.clip((Y - 104 - 0.0012 * X**2 - 16 * np.exp(-((X / 36) ** 2))) / 5, 0, 1)
    out[Z] = 5 + 0.25 * np.clip(Y - 115, 0, 60) - (X / 22) ** 2
    out[SOFT] = 0.2
    return out


def wall(rng: np.random.Generator, side: int) -> Map:
    """Draws a backdrop in shades of one colour with blocks (a shelf, a door), well behind the face."""
    maps = np.zeros((8, side, side), np.float32)
    colour, nir = rng.uniform(0.1, 0.8) * rng.uniform(0.8, 1.2, 3), rng.uniform(0.15, 0.7)
    blocks = cv2.resize(
        rng.uniform(0.6, 1.3, (3, 3)).astype(np.float32), (side, side), interpolation=cv2.INTER_NEAREST
    )
    shade = cv2.GaussianBlur(blocks, (0, 0), 1 + side / 40) * (1 + 0.05 * grain(rng, 12, side))
    maps[:4] = np.clip(shade * column([*colour, nir]), 0, 1)
    maps[Z] = -rng.uniform(350, 1500) + 30 * grain(rng, 3, side)
    maps[SOFT] = 0.2
    return maps


def eyes(s: Shape, rx: float, ry: float, dx: float = 0.0) -> Map:
    """Returns both eyes as ellipses."""
    return np.maximum(disc(s["eye_x"] + dx, s["eye_y"], rx, ry), disc(-s["eye_x"] + dx, s["eye_y"], rx, ry))


def disc(x: float, y: float, rx: float, ry: float, soft: float = 2.5) -> Map:
    """Returns an ellipse of value 1 with an edge about ``soft`` mm wide."""
    q = np.sqrt(((X - x) / rx) ** 2 + ((Y - y) / ry) ** 2)
    return np.clip(0.5 + (1 - q) * (min(rx, ry) / soft), 0, 1)


def box(half_width: float, half_height: float, y: float = 0.0, soft: float = 3.0) -> Map:
    """Returns a rectangle of value 1 around (0, y)."""
    edge = np.minimum(half_width - np.abs(X), half_height - np.abs(Y - y))
    return np.clip(0.5 + edge / soft, 0, 1)


def paint(
    solid: Map, mask: Map, colour: tuple[float, float, float], nir: float, *, keep: float = 0.0
) -> None:
    """Blends reflectances toward ``colour`` and ``nir`` where ``mask``, keeping the share ``keep``."""
    mask = (1 - keep) * mask
    for channel, value in zip(solid[:4], (*colour, nir), strict=True):
        channel += mask * (np.float32(value) - channel)


def grain(rng: np.random.Generator, cells: int, side: int = N) -> Map:
    """Returns smooth noise of unit variance at the cells, [side, side]."""
    noise = rng.standard_normal((cells, cells), dtype=np.float32)
    return cv2.resize(noise, (side, side), interpolation=cv2.INTER_LINEAR)


def column(values: Sequence[float] | np.ndarray) -> Map:
    """Returns values as [C, 1, 1], one per channel."""
    return np.array(values, np.float32)[:, None, None]


def _skull(s: Shape) -> Map:
    """Returns a superellipse that narrows to the chin: below 1 inside the outline of the face."""
    half = s["width"] * (1 - s["taper"] * np.clip((Y - 10) / s["bottom"], 0, 1) ** 1.6)
    return (np.abs(X) / half) ** 2.3 + (np.abs(Y) / np.where(Y < 0, s["top"], s["bottom"])) ** 2.3


def _dome(q: Map) -> Map:
    return 68 - 92 * (1 - (1 - np.clip(q, 0, 0.985)) ** np.float32(0.45))


def _hair(s: Shape, skull: Map) -> Map:
    line = s["hairline"] + 0.009 * X**2
    cap = np.clip((1.24 - skull) * 9, 0, 1) * np.clip((line - Y) / 5 + 0.5, 0, 1)
    if s["hair_long"] < 0.5:
        return cap
    sides = np.clip((np.abs(X) - s["width"] * 0.84) / 5, 0, 1) * np.clip(
        (s["width"] * 1.25 - np.abs(X)) / 5, 0, 1
    )
    return np.maximum(cap, sides * np.clip((100 - Y) / 8, 0, 1) * np.clip((Y + 75) / 8, 0, 1))


@lru_cache(maxsize=48)
def _at_rest(subject: int, wavelength: int) -> Map:
    """Returns the head without mouth, irises and expression; read only."""
    s = shape_of(subject)
    skull = _skull(s)
    face = np.clip(0.5 + (1 - skull) * 12, 0, 1)
    ears = disc(s["width"] + 3, 2, 9, 27) + disc(-s["width"] - 3, 2, 9, 27)
    neck = (
        np.clip((s["width"] * 0.72 - np.abs(X)) / 4, 0, 1)
        * np.clip((Y - 40) / 10, 0, 1)
        * np.clip((150 - Y) / 6, 0, 1)
    )
    hair = _hair(s, skull)
    behind = np.where(ears > 0.3, -8, np.where(neck > 0.5, 14 - (X / 14) ** 2, -55))
    out = np.zeros((8, N, N), np.float32)
    out[Z] = np.where(skull < 1, np.maximum(_dome(skull) + _relief(s) * face, behind), behind)
    out[Z] += hair * (np.maximum(_dome(skull / 1.3) + 4, out[Z]) - out[Z])
    out[ALPHA] = np.maximum(np.maximum(face, hair), np.maximum(ears, neck))
    out[GLOSS], out[SOFT] = 0.12 * face * (1 - hair), 1 - 0.7 * hair
    _complexion(out, s, np.random.default_rng([subject, 8]), wavelength)
    shade = 0.04 + max(0.0, s["hair_light"])
    paint(out, hair, (shade * 1.15, shade * 0.85, shade * 0.6), 0.2 + 0.6 * shade, keep=0.05)
    out[:4] *= 1 + 0.15 * hair * grain(np.random.default_rng([subject, 9]), 40)
    out.setflags(write=False)
    return out


def _relief(s: Shape) -> Map:
    """Returns the height of the face above the dome of the skull, mm; without the mouth."""
    tilt = 1 + 0.04 * s["skew"] * np.sign(X)
    z = s["brow"] * _pair(23, -32, 17, 7) - s["socket"] * _pair(s["eye_x"], s["eye_y"], 13, 9) * tilt
    z = z + 4 * _pair(s["eye_x"], s["eye_y"], 8, 5) + s["bridge"] * _blob(0, -4, 6, 18)
    z = (
        z
        + s["nose"] * _blob(s["skew"] * 0.5, s["nose_y"], s["nose_width"], 10)
        + 6 * _pair(11, s["nose_y"] + 4, 5, 5)
    )
    return z + s["cheek"] * _pair(38, 20, 16, 14) * tilt + s["chin"] * _blob(s["skew"], 84, 15, 10)


def _complexion(out: Map, s: Shape, rng: np.random.Generator, wavelength: int) -> None:
    """Draws skin, beard, brows, the white of the eyes and nostrils."""
    red, green, blue, nir = skin_of(s, wavelength)
    out[:4] = column([red, green, blue, nir]) * (1 + grain(rng, 28) * column([0.03, 0.045, 0.045, 0.035]))
    paint(out, 0.35 * _pair(38, 22, 14, 12), (red, green * 0.72, blue * 0.72), nir)
    if s["beard"] > 0.4:
        beard = np.clip(disc(0, 74, 52, 42, 20) * (Y > 30) - _blob(0, s["mouth_y"], 17, 7), 0, 1)
        paint(out, beard, (0.10, 0.08, 0.06), nir * 0.62, keep=0.35)
    paint(out, 0.9 * _pair(s["eye_x"] - 1, s["eye_y"] - 17, 11, 2.8), (0.09, 0.07, 0.05), 0.25)
    paint(out, 0.5 * _pair(s["eye_x"], s["eye_y"], 14, 8), (red * 0.6, green * 0.6, blue * 0.6), nir * 0.85)
    paint(out, eyes(s, 12, 4.8), (0.62, 0.58, 0.55), 0.42)
    paint(out, _pair(6, s["nose_y"] + 10, 3, 2), (0.10, 0.05, 0.04), 0.15, keep=0.2)


def _blob(x: float, y: float, sx: float, sy: float) -> Map:
    """Returns a separable Gaussian bump of height 1."""
    return np.exp(-(((Y - y) / sy) ** 2) / 2) * np.exp(-(((X - x) / sx) ** 2) / 2)


def _pair(x: float, y: float, sx: float, sy: float) -> Map:
    return np.exp(-(((Y - y) / sy) ** 2) / 2) * np.exp(-(((np.abs(X) - x) / sx) ** 2) / 2)
