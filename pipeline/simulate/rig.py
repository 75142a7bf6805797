"""Turns a rendered scene into the frames of a colour, a depth and an NIR camera.

Four families are for training (A-D) and four are never trained on (E-H); ``shifted_rigs.py`` has four more.
They differ as deployed devices do: field and distance, light, colour, depth convention and noise, NIR
wavelength and power, and what stands before the lens (``optics.py``). Each training family also carries one
modest nuisance that is linked to attacks inside it alone, as collected sets do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import cv2
import numpy as np

from pipeline.simulate.heads import FACE_Z, NIR, SOFT, Z, column, grain
from pipeline.simulate.optics import Beam, Fringes, Glare, bent, with_beam, with_fringes, with_glare
from pipeline.simulate.render import BONA_FIDE, RGB, VIEW, Presentation, Scene, lit, normals, scene, unit

if TYPE_CHECKING:
    from pipeline.simulate.heads import Map

NO_RETURN = 0  # depth value of a pixel without a measurement, in every convention
CUT = -140.0  # mm; a rig without backdrop keeps what is nearer than this


@dataclass(frozen=True)
class SensorRig:
    """One device and its place. Lengths in mm, angles as direction vectors, everything else relative to 1."""

    name: str
    side: int = 64  # pixels of the square crop
    field: float = 250.0  # mm across the crop at the face
    distance: float = 600.0  # mm to the face
    backdrop: bool = True  # False: everything behind the head is cut away, as some sets do
    light: tuple[float, float, float] = (0.3, -0.4, 1.0)
    light_spread: float = 0.3  # standard deviation of the light's direction between sessions
    ambient: float = 0.5
    exposure: float = 1.0
    white: tuple[float, float, float] = (1.0, 1.0, 1.0)
    saturation: float = 1.0
    gamma: float = 1.0
    rgb_noise: float = 0.012
    rgb_blur: float = 0.5  # pixels
    jpeg: int = 92
    depth_form: Literal["mm", "range16", "range8", "frame8"] = "mm"
    depth_inverted: bool = False  # near is bright
    depth_range: tuple[float, float] = (300.0, 1500.0)  # outside: no return
    depth_noise: float = 1.2  # mm at 500 mm, grows with the square of the distance
    depth_blur: float = 0.6
    depth_step: float = 0.5  # mm of quantisation
    depth_holes: float = 0.02  # share of pixels lost at random; edges and dark surfaces come on top
    wavelength: int = 850  # nm
    ir_power: float = 1.0
    ir_leak: float = 0.05  # ambient NIR beside the illuminator
    ir_noise: float = 0.012
    ir_blur: float = 0.6
    ir_gamma: float = 1.0
    parallax: float = 0.0  # pixels by which RGB is off the other two
    linked: tuple[str, float] | None = None  # this field is multiplied by this factor in most attacks
    barrel: float = 0.0  # by which a wide lens shrinks the edges of the frame
    rgb_glare: Glare | None = None
    ir_glare: Glare | None = None  # the illuminator in a pane
    ir_beam: Beam | None = None  # None: the illuminator fills the frame
    depth_fringes: Fringes | None = None


class Capture(NamedTuple):
    """One capture before any file format."""

    rgb: np.ndarray  # [R, R, 3] uint8
    depth: np.ndarray  # [R, R] uint8 or uint16; 0 = no return
    ir: np.ndarray  # [R, R] uint8


TRAINING = {
    "A": SensorRig(
        "A",
        side=64,
        field=262,
        distance=560,
        depth_form="range8",
        depth_range=(350, 1100),
        depth_noise=1.6,
        white=(1.05, 1.0, 0.93),
        jpeg=90,
        ir_power=1.1,
        linked=("exposure", 1.12),
    ),
    "B": SensorRig(
        "B",
        side=64,
        field=290,
        distance=820,
        depth_form="frame8",
        depth_inverted=True,
        depth_noise=1.5,
        depth_holes=0.04,
        ambient=0.35,
        light_spread=0.6,
        gamma=1.15,
        white=(0.94, 1.0, 1.06),
        ir_power=1.6,
        ir_leak=0.12,
        ir_noise=0.02,
        parallax=1.0,
        linked=("rgb_blur", 1.6),
    ),
    "C": SensorRig(
        "C",
        side=72,
        field=236,
        distance=620,
        wavelength=940,
        depth_noise=2.2,
        depth_blur=1.0,
        depth_range=(300, 1100),
        ambient=0.65,
        light=(0.0, -0.2, 1.0),
        saturation=1.2,
        gamma=0.9,
        ir_power=1.35,
        ir_gamma=0.9,
        linked=("distance", 1.06),
    ),
    "D": SensorRig(
        "D",
        side=64,
        field=240,
        distance=700,
        backdrop=False,
        depth_form="frame8",
        depth_noise=1.1,
        depth_holes=0.05,
        saturation=0.8,
        exposure=0.9,
        jpeg=80,
        rgb_blur=0.7,
        ir_power=1.2,
        ir_noise=0.016,
        linked=("ir_power", 1.1),
    ),
}
UNSEEN = {
    "E": SensorRig(
        "E",
        side=72,
        field=270,
        distance=740,
        wavelength=940,
        depth_form="range16",
        depth_inverted=True,
        depth_noise=2.2,
        depth_range=(350, 1200),
        light=(-0.7, -0.5, 1.0),
        ambient=0.3,
        white=(1.16, 1.0, 0.8),
        gamma=1.2,
        ir_power=1.5,
        ir_leak=0.2,
        ir_gamma=0.8,
    ),
    "F": SensorRig(
        "F",
        side=80,
        field=230,
        distance=430,
        depth_form="mm",
        depth_step=2.0,
        depth_noise=2.0,
        depth_holes=0.06,
        ambient=0.75,
        exposure=1.25,
        saturation=1.25,
        jpeg=75,
        ir_power=0.72,
        ir_blur=1.2,
        rgb_blur=0.9,
    ),
    "G": SensorRig(
        "G",
        side=64,
        field=214,
        distance=390,
        wavelength=940,
        depth_form="range16",
        depth_blur=1.8,
        depth_step=3.0,
        depth_noise=1.8,
        depth_range=(200, 900),
        white=(0.96, 1.0, 1.08),
        saturation=1.35,
        gamma=0.85,
        ir_power=0.5,
        ir_gamma=1.2,
        parallax=1.5,
    ),
    "H": SensorRig(
        "H",
        side=64,
        field=300,
        distance=980,
        depth_form="mm",
        depth_noise=1.2,
        depth_holes=0.1,
        ambient=0.25,
        light=(0.1, -0.9, 0.8),
        light_spread=0.5,
        rgb_noise=0.035,
        exposure=0.75,
        white=(1.1, 1.0, 0.88),
        ir_power=1.9,
        ir_leak=0.15,
        ir_noise=0.035,
        ir_gamma=1.15,
    ),
}


def capture(what: Presentation, rig: SensorRig, frame: int = 0) -> Capture:
    """Frame number ``frame`` of a presentation as ``rig`` records it."""
    rng = np.random.default_rng([what.seed, what.subject, 1_000 + frame])
    session = np.random.default_rng([what.seed, what.subject, 999])
    if rig.linked and what.species != BONA_FIDE and session.random() < 0.7:
        field, factor = rig.linked
        rig = replace(rig, **{field: getattr(rig, field) * factor})
    seen = scene(
        what, frame, side=rig.side, field=rig.field, distance=rig.distance, wavelength=rig.wavelength
    )
    if not rig.backdrop:
        seen.maps[:4] *= seen.maps[Z] > CUT
    if rig.barrel:
        seen = seen._replace(maps=bent(seen.maps, rig.barrel))
    n = normals(seen.maps[Z], rig.field / rig.side)
    ir = _infrared(seen, n, rig, rng)
    return Capture(_colour(seen, n, rig, rng, session), _depth(seen, n, ir, rig, rng), _bytes(ir))


def variant(rig: SensorRig, seed: int) -> SensorRig:
    """The same product in another place: slightly other light, colour, distance and gains."""
    rng = np.random.default_rng([seed, 5])
    f = np.exp(rng.normal(0, 0.07, 8))
    white = (rig.white[0] * float(f[0]), rig.white[1], rig.white[2] * float(f[1]))
    x, y, z = rig.light
    return replace(
        rig,
        white=white,
        light=(x + float(rng.normal(0, 0.2)), y, z),
        exposure=rig.exposure * float(f[2]),
        distance=rig.distance * float(f[3]),
        ir_power=rig.ir_power * float(f[4]),
        gamma=rig.gamma * float(f[5]),
        depth_noise=rig.depth_noise * float(f[6]),
        field=rig.field * float(f[7]) ** 0.5,
        linked=None,
    )


def _colour(
    seen: Scene, n: Map, rig: SensorRig, rng: np.random.Generator, session: np.random.Generator
) -> np.ndarray:
    light = unit(np.array(rig.light) + session.normal(0, rig.light_spread, 3) * (1, 1, 0))
    image = lit(seen.maps, n, light, unit(light + unit(VIEW)), ambient=rig.ambient, channels=RGB)
    image += np.clip(-seen.maps[SOFT], 0, 1) * (seen.maps[:3] - image)
    image *= np.float32(
        rig.exposure * (0.42 / max(0.08, float(image.mean()))) ** 0.6
    )  # a lazy automatic exposure
    grey = image.mean(0)
    image = cv2.merge((grey + np.float32(rig.saturation) * (image - grey)) * column(rig.white))
    if rig.rgb_glare:
        image = with_glare(image, rig.rgb_glare)
    if rig.parallax:
        image = np.roll(image, round(rig.parallax), axis=1)
    image = cv2.GaussianBlur(image, (0, 0), rig.rgb_blur) if rig.rgb_blur > 0.3 else image
    image = np.clip(image, 0, 1) ** np.float32(rig.gamma / 1.5)
    image += np.float32(rig.rgb_noise) * rng.standard_normal(image.shape, dtype=np.float32)
    return _compressed(_bytes(image), rig.jpeg)


def _infrared(seen: Scene, n: Map, rig: SensorRig, rng: np.random.Generator) -> Map:
    """Returns the light of a lamp beside the lens, which falls with the square of the distance.

    Skin lets it bleed, so it looks soft.
    """
    away = np.clip(np.float32(seen.distance + FACE_Z) - seen.maps[Z], 150, None)
    axis = (np.arange(rig.side, dtype=np.float32) + 0.5) * np.float32(rig.field / rig.side) - np.float32(
        rig.field / 2
    )
    beam = unit(
        np.stack([np.broadcast_to(-axis, away.shape), np.broadcast_to(-axis[:, None], away.shape), away])
    )
    image = lit(seen.maps, n, beam, beam, ambient=0.0, channels=slice(NIR, NIR + 1), wrap=0.5)[0]
    image = image * np.float32(rig.ir_power) * (600 / away) ** 2 + np.float32(rig.ir_leak) * seen.maps[NIR]
    if rig.ir_beam:
        image = with_beam(image, rig.ir_beam)
    if rig.ir_glare:
        image = with_glare(image, rig.ir_glare)
    image = np.clip(cv2.GaussianBlur(image, (0, 0), rig.ir_blur), 0, 1) ** np.float32(rig.ir_gamma)
    return image + np.float32(rig.ir_noise) * rng.standard_normal(image.shape, dtype=np.float32)


def _depth(seen: Scene, n: Map, ir: Map, rig: SensorRig, rng: np.random.Generator) -> np.ndarray:
    """Distances in the rig's own convention; returns fail at steep edges, on dark surfaces and at random."""
    away = np.float32(seen.distance + FACE_Z) - seen.maps[Z]
    mm = cv2.GaussianBlur(away, (0, 0), rig.depth_blur) if rig.depth_blur > 0.3 else away
    lost = np.abs(mm - away) > 25  # flying pixels between two surfaces
    if rig.depth_fringes:
        mm = with_fringes(mm, rig.depth_fringes, rng)
    noise = 0.7 * rng.standard_normal(mm.shape, dtype=np.float32) + 0.5 * grain(rng, rig.side // 4, rig.side)
    mm = mm + np.float32(rig.depth_noise) * (mm / 500) ** 2 * noise
    mm = np.round(mm / rig.depth_step) * rig.depth_step
    near, far = rig.depth_range
    fails = rig.depth_holes + 0.35 * (n[2] < 0.3) + 0.25 * (ir < 0.03)
    lost |= (rng.random(mm.shape, dtype=np.float32) < fails) | (mm < near) | (mm > far)
    if not rig.backdrop:
        lost |= seen.maps[Z] < CUT
    if rig.depth_form == "mm":
        return np.where(lost, NO_RETURN, np.clip(mm, 1, 65535)).astype(np.uint16)
    good = mm[~lost]
    if rig.depth_form == "frame8" and good.size:
        near, far = float(good.min()), float(good.max()) + 1
    low, top, kind = (1, 65535, np.uint16) if rig.depth_form == "range16" else (16, 255, np.uint8)
    share = np.clip((mm - near) / (far - near), 0, 1)
    return np.where(lost, NO_RETURN, low + (top - low) * (1 - share if rig.depth_inverted else share)).astype(
        kind
    )


def _bytes(image: Map) -> np.ndarray:
    return np.clip(image * 255 + np.float32(0.5), 0, 255).astype(np.uint8)


def _compressed(rgb: np.ndarray, quality: int) -> np.ndarray:
    if quality >= 100:
        return rgb
    _, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    back = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
    assert back is not None
    return back
