"""Renders presentations: bona fide faces and attack instruments as maps of reflectance and height.

Everything follows from the ``Presentation`` and the frame number: the same presentation under two rigs
(``rig.py``) differs only in what the rig does to it. Materials in NIR: paper and resin are bright, inks fade,
displays are dark, silicone is nearer to skin at 850 nm than at 940.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from pipeline.simulate.heads import (
    ALPHA,
    FACE_Z,
    GLOSS,
    HALF,
    NIR,
    SOFT,
    N,
    X,
    Y,
    Z,
    box,
    column,
    disc,
    eyes,
    grain,
    paint,
    person,
    shape_of,
    torso,
    wall,
)

if TYPE_CHECKING:
    from pipeline.simulate.heads import Map, Shape

    Vector = np.ndarray  # float64, few elements

BONA_FIDE = "bona_fide"
HELD = ("print_flat", "print_bent", "print_cutout", "replay")
WORN = ("mask_rigid", "mask_silicone", "partial_glasses", "partial_eyes")
PAINTED = ("makeup", "tattoo")  # obfuscation: the attacker's own face under cosmetics, or under stickers
SPECIES = HELD + WORN + PAINTED
RGB = slice(0, 3)
VIEW = np.array([0.0, 0.0, 1.0])  # toward the camera
VICTIMS = 1_000_003  # subject ids from here on are only ever portrayed


class Presentation(NamedTuple):
    """One subject before a sensor: ``bona_fide`` or one of SPECIES; ``seed`` fixes everything else."""

    subject: int
    species: str
    seed: int


class Scene(NamedTuple):
    """What a sensor sees."""

    maps: Map  # [8, R, R] channels of a solid; Z in mm toward the camera
    distance: float  # mm from the camera to the plane of the face (Z = FACE_Z)


def scene(
    what: Presentation, frame: int, *, side: int, field: float, distance: float, wavelength: int
) -> Scene:
    """Frame number ``frame`` of a presentation on ``side`` x ``side`` pixels over ``field`` mm."""
    if what.species != BONA_FIDE and what.species not in SPECIES:
        raise ValueError(f"species {what.species!r}: allowed are {BONA_FIDE}, {', '.join(SPECIES)}")
    fixed = np.random.default_rng([what.seed, what.subject])
    moving = np.random.default_rng([what.seed, what.subject, 1 + frame])
    away = distance * float(np.exp(fixed.normal(0, 0.08) + moving.normal(0, 0.02)))
    turn = np.clip(fixed.normal(0, 0.13, 3) + moving.normal(0, 0.05, 3), -0.35, 0.35) * (1, 0.8, 0.5)
    shift = moving.normal(0, 4, 2)
    maps = wall(fixed, side)
    if what.species in HELD:
        layers = _held(what, fixed, moving, turn, wavelength)
    else:
        head = person(what.subject, fixed, moving, wavelength)
        if what.species in WORN:
            _wear(head, what, fixed, wavelength)
        elif what.species == "makeup":
            _make_up(head, shape_of(what.subject), fixed)
        elif what.species == "tattoo":
            _tattoo(head, shape_of(what.subject), fixed)
        layers = [(_shoulders(what), turn * 0.2), (head, turn)]
    for solid, angles in layers:
        maps = over(maps, posed(solid, angles, side=side, field=field, shift=shift))
    return Scene(maps, away)


def posed(solid: Map, angles: Vector, *, side: int, field: float, shift: Vector) -> Map:
    """Returns the solid turned by (yaw, pitch, roll) rad and projected to [8, side, side].

    Occlusion is approximate.
    """
    turn = _rotation(angles)
    inverse = np.linalg.inv(turn[:2, :2])
    axis = (np.arange(side, dtype=np.float32) + 0.5) * np.float32(field / side) - np.float32(field / 2)
    x, y = np.meshgrid(axis - np.float32(shift[0]), axis - np.float32(shift[1]))
    u, v = x, y
    for _ in range(3):  # fixed point of (u, v) = A^-1 ((x, y) - b z(u, v))
        z = _sample(solid[Z], u, v) - np.float32(FACE_Z / 2)
        a, b = x - turn[0, 2] * z, y - turn[1, 2] * z
        u, v = inverse[0, 0] * a + inverse[0, 1] * b, inverse[1, 0] * a + inverse[1, 1] * b
    halves = (cv2.merge([*solid[:4]]), cv2.merge([*solid[4:]]))  # remap takes four channels at most
    seen = np.stack([plane for half in halves for plane in cv2.split(_sample(half, u, v))])
    seen[Z] = (
        turn[2, 0] * u
        + turn[2, 1] * v
        + turn[2, 2] * (seen[Z] - np.float32(FACE_Z / 2))
        + np.float32(FACE_Z / 2)
    )
    return seen


def over(far: Map, near: Map) -> Map:
    """Both layers by depth; edges blend in reflectance, never in height."""
    front = near[ALPHA] * (near[Z] > far[Z])
    out = far + front * (near - far)
    out[Z] = np.where(front > 0.5, near[Z], far[Z])
    return out


def normals(z: Map, pixel: float) -> Map:
    """Unit normals [3, R, R] of a height map in mm at ``pixel`` mm per pixel."""
    smooth = cv2.GaussianBlur(z, (3, 3), 0)
    dx = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=-1 / (8 * pixel))
    dy = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=-1 / (8 * pixel))
    up = 1 / np.sqrt(1 + dx * dx + dy * dy)
    return np.stack([dx * up, dy * up, up])


def lit(
    maps: Map, n: Map, light: Map, half: Map, *, ambient: float, channels: slice, wrap: float = 0.0
) -> Map:
    """Returns the reflected light [C, H, W]: ambient, Lambert and a specular lobe.

    Lambert is wrapped by ``wrap`` where light bleeds under skin.

    ``light`` and ``half`` (between light and camera) are unit vectors [3, 1, 1] or [3, R, R].
    """
    bleed = np.float32(wrap) * np.clip(maps[SOFT], 0, 1)
    lambert = np.clip(((n * light).sum(0) + bleed) / (1 + bleed), 0, None)
    lobe = np.clip((n * half).sum(0), 0, 1) ** 24
    glass = maps[SOFT] < -0.5
    if glass.any():
        lobe = np.where(glass, lobe**16, lobe)  # a display mirrors the lamp as a small spot
    return maps[channels] * (np.float32(ambient) + np.float32(1 - ambient) * lambert) + lobe * maps[GLOSS]


def unit(vector: Vector | Map) -> Map:
    """The vector at length 1 as float32 [3, ...]; a bare vector becomes [3, 1, 1]."""
    v = np.asarray(vector, np.float32)
    v = v[:, None, None] if v.ndim == 1 else v
    return v / np.sqrt((v * v).sum(0))


def _held(
    what: Presentation, fixed: np.random.Generator, moving: np.random.Generator, turn: Vector, wavelength: int
) -> list[tuple[Map, Vector]]:
    """A picture of somebody, far to near; for a cut-out the attacker's own face is behind the holes."""
    close, tilt = fixed.random() < 0.4, fixed.normal(0, 0.05, 3)
    cut = what.species == "print_cutout"
    layers = [(_prop(what), turn if cut else turn * 0.8 + tilt)]
    if close or cut:
        head = person(what.subject, fixed, moving, wavelength)
        head[Z] -= 0 if cut else 60
        layers = [(_shoulders(what), turn * 0.2), (head, turn), *layers]
    return layers


@lru_cache(maxsize=4)
def _shoulders(what: Presentation) -> Map:
    """The clothes of a session; read only."""
    return torso(np.random.default_rng([what.seed, what.subject, 501]))


@lru_cache(maxsize=4)
def _prop(what: Presentation) -> Map:
    """The thing that is held, the same in all frames; read only."""
    rng = np.random.default_rng([what.seed, what.subject, 502])
    victim = VICTIMS + int(rng.integers(100_000))
    if what.species == "replay":
        return _display(_portrait(victim), rng)
    sheet = _sheet(_portrait(victim), rng, what.species)
    if what.species != "print_cutout":
        return sheet
    s, used = shape_of(victim), rng.random(3) < 0.75
    holes = (eyes(s, 14, 8), disc(0, s["nose_y"], 13, 15), disc(0, s["mouth_y"], 21, 9))
    for cut_out, hole in zip(used | (used.sum() == 0), holes, strict=True):
        sheet[ALPHA] *= 1 - hole * cut_out
    if rng.random() < 0.5:
        sheet[ALPHA] *= disc(0, 0, s["width"] * 1.12, s["top"] * 1.02)
    sheet[Z] += 14
    return sheet


@lru_cache(maxsize=32)
def _portrait(victim: int) -> Map:
    """A photograph of ``victim`` [3, N, N] in its own light; read only."""
    rng = np.random.default_rng([victim, 9])
    maps = wall(rng, N)
    turn = rng.normal(0, 0.08, 3)
    for solid in (torso(rng), person(victim, rng, rng, 850)):
        maps = over(maps, posed(solid, turn, side=N, field=2 * HALF, shift=np.zeros(2)))
    light = unit(np.array([rng.normal(0, 0.4), rng.normal(-0.3, 0.2), 1.0]))
    n = normals(maps[Z], 2 * HALF / N)
    return np.clip(1.1 * lit(maps, n, light, unit(light + unit(VIEW)), ambient=0.5, channels=RGB), 0, 1)


def _sheet(picture: Map, rng: np.random.Generator, species: str) -> Map:
    """Printed paper; in NIR it shines and little of the ink is left. Fingers hold it at two edges."""
    out = np.zeros((8, N, N), np.float32)
    width, height = rng.uniform(92, 118), rng.uniform(122, 150)
    out[:3] = (rng.uniform(0.06, 0.16) + column(rng.uniform(0.66, 0.85, 3)) * picture) * (
        1 + 0.03 * grain(rng, N)
    )
    paper, ink = rng.uniform(0.62, 0.8), rng.uniform(0.0, 0.45)
    out[NIR] = (paper - ink * (1 - picture.mean(0))) * (1 + 0.015 * grain(rng, 20))
    out[ALPHA], out[GLOSS], out[SOFT] = box(width, height), rng.uniform(0.0, 0.25), 0.1
    out[Z] = FACE_Z - 8 + 0.8 * grain(rng, 4)
    if species == "print_bent" or (species == "print_cutout" and rng.random() < 0.5):
        radius, along = rng.uniform(110, 260), X if rng.random() < 0.7 else Y
        out[Z] += np.sqrt(np.clip(radius**2 - along**2, 900, None)) - radius
    side = 1 if rng.random() < 0.5 else -1
    for sign in (side, -side):
        finger = disc(sign * width, rng.uniform(20, 110), 20, 8)
        paint(out, finger, (0.62, 0.42, 0.33), 0.55)
        out[Z] += 7 * finger
        out[ALPHA] = np.maximum(out[ALPHA], finger)
    return out


def _display(picture: Map, rng: np.random.Generator) -> Map:
    """A tablet that shows the picture: its own light in RGB with moire, almost black glass in NIR."""
    out = np.zeros((8, N, N), np.float32)
    width, height, bezel = rng.uniform(88, 125), rng.uniform(118, 150), rng.uniform(4, 14)
    pitch, angle = rng.uniform(6, 14), rng.uniform(0, np.pi)
    moire = 1 + rng.uniform(0.02, 0.07) * np.sin(2 * np.pi / pitch * (X * np.cos(angle) + Y * np.sin(angle)))
    screen = box(width - bezel, height - bezel)
    out[:3] = 0.03 + screen * np.clip(picture * column(rng.uniform(0.85, 1.15, 3)) * moire, 0, 0.97)
    out[NIR] = 0.045 + 0.02 * (1 - screen)
    out[ALPHA], out[GLOSS], out[SOFT] = box(width, height), 0.5, -screen
    out[Z] = FACE_Z - 8
    return out


def _wear(head: Map, what: Presentation, rng: np.random.Generator, wavelength: int) -> None:
    """Put the artefact on the attacker's head, in place."""
    s, victim = shape_of(what.subject), shape_of(VICTIMS + int(rng.integers(100_000)))
    if what.species == "mask_rigid":
        _rigid(head, s, victim, rng)
    elif what.species == "mask_silicone":
        _silicone(head, s, victim, rng, wavelength)
    elif what.species == "partial_glasses":
        band = np.clip(box(s["width"] * 0.86, 21, s["eye_y"]) - disc(0, s["eye_y"] + 24, 13, 20), 0, 1)
        paint(head, band, (0.68, 0.50, 0.41), rng.uniform(0.64, 0.82), keep=0.05)
        paint(head, eyes(s, 13, 5.5) * 0.9, (0.7, 0.68, 0.66), 0.74)
        paint(head, eyes(s, 6, 5.6), (0.15, 0.1, 0.1), 0.6)
        head[Z] += band * (FACE_Z - 4 - 0.0035 * X**2 - head[Z])
        head[SOFT] *= 1 - band
    else:  # funny eyes: printed or metal discs in front of the eyes
        cover, metal = eyes(s, 17, 14), rng.random() < 0.5
        paint(head, cover, (0.8, 0.78, 0.74), 0.95 if metal else 0.78)
        red, green, blue = (float(c) for c in rng.uniform(0.05, 0.5, 3))
        paint(head, eyes(s, 8, 8, rng.normal(0, 2)), (red, green, blue), 0.12 if metal else 0.66)
        head[Z] += cover * (FACE_Z - 6 - head[Z])
        head[GLOSS] = np.maximum(head[GLOSS], cover * (0.5 if metal else 0.1))
        head[SOFT] *= 1 - cover


def _make_up(head: Map, s: Shape, rng: np.random.Generator) -> None:
    """Paints a face to look like another one, in place: foundation, shadows that bend its shape, lips, brows.

    Nothing changes in height. Pigments hide part of the skin in NIR and dry its gloss or add some.
    """
    nir = rng.uniform(0.5, 0.72)
    tone = rng.uniform(0, 1)
    red, green, blue = (
        float(c) for c in ((1 - tone) * np.array([0.88, 0.68, 0.57]) + tone * np.array([0.4, 0.25, 0.17]))
    )
    face = disc(0, 4, s["width"] * 0.98, s["top"] * 0.88, 8) * head[ALPHA] * (1 - eyes(s, 12, 5.5))
    paint(head, face, (red, green, blue), nir, keep=rng.uniform(0.25, 0.7))
    lids, side = rng.uniform(0.02, 0.55, 3), rng.uniform(0.4, 0.95)
    shadow = np.maximum(
        disc(s["eye_x"], s["eye_y"] - 8, 17, 10, 5), disc(-s["eye_x"], s["eye_y"] - 8, 17, 10, 5)
    )
    paint(head, side * shadow * (1 - eyes(s, 9, 4)), tuple(map(float, lids)), nir * 0.9)  # pyright: ignore
    brown = (red * 0.6, green * 0.52, blue * 0.48)
    for x in (-1, 1):
        cheek = disc(x * s["width"] * 0.68, 28, 11, rng.uniform(24, 38), 6)
        paint(head, rng.uniform(0.2, 0.8) * cheek * head[ALPHA], brown, nir * 0.92)
        paint(head, 0.6 * disc(x * 10, s["nose_y"] - 14, 4, 26, 4), brown, nir * 0.92)
        paint(
            head, disc(x * s["eye_x"], s["eye_y"] - 17, rng.uniform(11, 17), 3), (0.1, 0.07, 0.06), nir * 0.7
        )
    lips = (float(rng.uniform(0.35, 0.75)), float(rng.uniform(0.02, 0.25)), float(rng.uniform(0.05, 0.3)))
    paint(head, disc(0, s["mouth_y"], s["mouth"] * 1.1, 9, 3), lips, nir * 0.95, keep=0.1)
    head[GLOSS] += face * rng.uniform(-0.05, 0.2)
    head[SOFT] -= rng.uniform(0.1, 0.4) * face * (head[SOFT] > 0)


def _tattoo(head: Map, s: Shape, rng: np.random.Generator) -> None:
    """Puts stickers, ink or strips of paper on a face, in place; carbon stays dark in NIR, dyes vanish."""
    carbon, paper = rng.random() < 0.6, rng.random() < 0.3
    for _ in range(int(rng.integers(2, 7))):
        x, y = rng.normal(0, s["width"] * 0.45), rng.normal(10, 45)
        patch = disc(x, y, rng.uniform(5, 26), rng.uniform(4, 22), 2) * disc(0, 0, s["width"], s["top"])
        if not paper:  # lines, not areas
            waves = np.sin((X * np.cos(x) + Y * np.sin(x)) / rng.uniform(1.2, 4.0) + y)
            patch = patch * np.clip(waves * 3 + rng.uniform(-0.5, 1.5), 0, 1)
        patch = patch * head[ALPHA] * (1 - eyes(s, 10, 5))
        dark = rng.uniform(0.55, 0.9, 3) if paper else rng.uniform(0.02, 0.3, 3)
        nir = 0.78 if paper else float(rng.uniform(0.1, 0.3)) if carbon else 0.5
        paint(head, patch, tuple(map(float, dark)), nir, keep=0.08)  # pyright: ignore
        head[GLOSS] += 0.1 * patch
        head[Z] += 0.6 * patch * paper


def _rigid(head: Map, s: Shape, victim: Shape, rng: np.random.Generator) -> None:
    """Returns a cast resin or paper mask: smooth, one paint, a sharp rim, holes for the attacker's eyes."""
    shell = disc(0, -4, s["width"] * 1.02, s["top"] * 0.93, 3) * (1 - eyes(s, 11, 5.5) * (rng.random() < 0.8))
    red, green, blue = (
        float(c) for c in np.array([0.75, 0.57, 0.47]) * rng.uniform(0.5, 1.1) * rng.uniform(0.9, 1.1, 3)
    )
    nir = rng.uniform(0.66, 0.82)
    paint(head, shell, (red, green, blue), nir, keep=rng.uniform(0.0, 0.12))
    paint(
        head,
        shell * disc(0, victim["mouth_y"], 21, 7, 3),
        (red * 0.85, green * 0.45, blue * 0.45),
        nir * 0.97,
    )
    paint(head, shell * 0.8 * (disc(30, -32, 14, 3) + disc(-30, -32, 14, 3)), (0.15, 0.1, 0.08), nir * 0.9)
    head[Z] += shell * (cv2.GaussianBlur(head[Z], (0, 0), 2.2) + 7 - head[Z])
    head[GLOSS] += shell * (rng.uniform(0.15, 0.5) - head[GLOSS])
    head[SOFT] *= 1 - shell


def _silicone(head: Map, s: Shape, victim: Shape, rng: np.random.Generator, wavelength: int) -> None:
    """Returns a flexible full mask: right geometry and painted skin.

    The seam at the neck and missing lips in NIR give it away.
    """
    top = -1.12 * s["top"] if rng.random() < 0.5 else -0.62 * s["top"]  # over the hair, or under a wig
    skin = np.clip((118 - Y) / 4, 0, 1) * np.clip((Y - top) / 5, 0, 1) * (1 - eyes(s, 12, 5.5)) * head[ALPHA]
    tone = float(np.clip(victim["tone"], 0.05, 0.9))
    red, green, blue = (
        float(c) for c in (1 - tone) * np.array([0.8, 0.58, 0.47]) + tone * np.array([0.34, 0.21, 0.15])
    )
    nir = (0.84 if wavelength < 900 else 0.82) * rng.uniform(0.95, 1.08)  # no water in it: 940 nm comes back
    paint(head, skin, (red, green, blue), nir, keep=0.12)
    paint(
        head,
        skin * disc(0, s["mouth_y"], s["mouth"], 7.5, 3),
        (red * 0.85, green * 0.55, blue * 0.57),
        nir * 0.99,
    )
    brows = disc(s["eye_x"], s["eye_y"] - 17, 12, 3) + disc(-s["eye_x"], s["eye_y"] - 17, 12, 3)
    paint(head, skin * 0.8 * brows, (0.1, 0.08, 0.06), nir * 0.6)
    head[Z] += skin * (cv2.GaussianBlur(head[Z], (0, 0), 1.0) + 3 - head[Z])
    head[GLOSS] += skin * (rng.uniform(0.12, 0.28) - head[GLOSS])
    head[SOFT] -= 0.55 * skin * (head[SOFT] > 0)


def _rotation(angles: Vector) -> Map:
    (a, b, c), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    yaw, pitch = (
        np.array([[a, 0, sa], [0, 1, 0], [-sa, 0, a]]),
        np.array([[1, 0, 0], [0, b, -sb], [0, sb, b]]),
    )
    return (np.array([[c, -sc, 0], [sc, c, 0], [0, 0, 1]]) @ pitch @ yaw).astype(np.float32)


def _sample(image: Map, u: Map, v: Map) -> Map:
    scale, edge = np.float32((N - 1) / (2 * HALF)), np.float32(HALF)
    return cv2.remap(
        image, (u + edge) * scale, (v + edge) * scale, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
