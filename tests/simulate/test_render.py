"""Renderer and rigs: same seed same pixels, and the physics that separates attacks from faces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.simulate.heads import ALPHA, HALF, N, Z, person
from pipeline.simulate.render import BONA_FIDE, SPECIES, Presentation, scene
from pipeline.simulate.rig import TRAINING, UNSEEN, SensorRig, capture, variant
from pipeline.simulate.shifted_rigs import SHIFTED

ALL = (BONA_FIDE, *SPECIES)
RIGS = {**TRAINING, **UNSEEN, **SHIFTED}
CLEAN = SensorRig(
    "clean", side=64, rgb_noise=0, ir_noise=0, depth_noise=0, depth_holes=0, depth_step=0.01, jpeg=100
)


def _centre(image: np.ndarray, share: float = 0.35) -> np.ndarray:
    side = image.shape[0]
    half = round(side * share / 2)
    return image[side // 2 - half : side // 2 + half, side // 2 - half : side // 2 + half]


def _relief(what: Presentation) -> float:
    """Standard deviation in mm of the depth around the nose after the best plane is taken out."""
    depth = _centre(capture(what, CLEAN).depth).astype(float)
    y, x = np.nonzero(depth)
    plane = np.stack([x, y, np.ones_like(x)], axis=1)
    z = depth[y, x]
    return float((z - plane @ np.linalg.lstsq(plane, z, rcond=None)[0]).std())


def _ir(species: str, rig: SensorRig = CLEAN) -> float:
    return float(np.mean([_centre(capture(Presentation(k, species, k), rig).ir).mean() for k in range(4)]))


@pytest.mark.parametrize("species", ALL)
def test_capture_follows_from_its_seed(species: str) -> None:
    what = Presentation(3, species, 17)
    first, again = capture(what, TRAINING["B"], 1), capture(what, TRAINING["B"], 1)
    other = capture(what._replace(seed=18), TRAINING["B"], 1)
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("name", RIGS)
def test_shapes_and_types_of_every_rig(name: str) -> None:
    rig = RIGS[name]
    shot = capture(Presentation(1, BONA_FIDE, 1), rig)
    assert shot.rgb.shape == (rig.side, rig.side, 3)
    assert shot.depth.shape == shot.ir.shape == (rig.side, rig.side)
    assert (shot.rgb.dtype, shot.ir.dtype) == (np.uint8, np.uint8)
    assert shot.depth.dtype == (np.uint8 if rig.depth_form.endswith("8") else np.uint16)
    assert 0.1 < (shot.depth > 0).mean() < 1.0
    top = 256 if name == "flooded" else 235
    assert 25 < _centre(shot.ir).mean() < top, "the illuminator neither fails nor saturates on a face"


def test_frames_of_a_video_differ_but_little() -> None:
    a, b = (capture(Presentation(5, BONA_FIDE, 9), CLEAN, k).rgb.astype(int) for k in range(2))
    c = capture(Presentation(6, BONA_FIDE, 10), CLEAN).rgb.astype(int)
    assert 0 < np.abs(a - b).mean() < np.abs(a - c).mean()


def test_flat_media_have_no_relief() -> None:
    faces = [_relief(Presentation(k, BONA_FIDE, k)) for k in range(5)]
    for species in ("print_flat", "replay"):
        flat = [_relief(Presentation(k, species, k)) for k in range(5)]
        assert max(flat) < 0.5 * min(faces), (species, flat, faces)


def test_display_is_dark_in_infrared_and_paper_bright() -> None:
    face = _ir(BONA_FIDE)
    assert _ir("replay") < 0.5 * face
    assert _ir("print_flat", replace(CLEAN, wavelength=940)) > 1.1 * _ir(
        BONA_FIDE, replace(CLEAN, wavelength=940)
    )


@pytest.mark.parametrize("species", ["mask_rigid", "mask_silicone", "partial_glasses", "partial_eyes"])
def test_worn_artefacts_show_in_infrared(species: str) -> None:
    rig = replace(CLEAN, wavelength=940)
    for seed in range(3):
        face, worn = (capture(Presentation(2, s, seed), rig).ir.astype(int) for s in (BONA_FIDE, species))
        assert np.abs(face - worn).max() > 25


def test_silicone_is_closer_to_skin_at_850_than_at_940() -> None:
    rigs = [replace(CLEAN, wavelength=w) for w in (850, 940)]
    at_850, at_940 = (_ir("mask_silicone", rig) / _ir(BONA_FIDE, rig) for rig in rigs)
    assert 1.0 < at_850 < at_940


def test_head_stands_out_and_turning_moves_the_nose() -> None:
    rng = np.random.default_rng(0)
    head = person(4, rng, rng, 850)
    assert head.shape == (8, N, N)
    nose = np.unravel_index(np.argmax(head[Z] * head[ALPHA]), (N, N))
    assert abs(nose[1] - N / 2) * 2 * HALF / N < 12
    seen = scene(Presentation(4, BONA_FIDE, 3), 0, side=64, field=250, distance=600, wavelength=850)
    assert seen.maps[Z].max() > 75
    assert seen.maps[Z].min() < -200, "the wall is behind"


def test_near_surfaces_return_more_light_and_less_depth() -> None:
    near, far = (capture(Presentation(1, BONA_FIDE, 1), replace(CLEAN, distance=d)) for d in (450, 800))
    assert _centre(near.ir).mean() > 1.5 * _centre(far.ir).mean()
    assert np.median(_centre(near.depth)) < np.median(_centre(far.depth))


def test_inverted_depth_is_the_other_way_round() -> None:
    what, form = Presentation(1, BONA_FIDE, 1), replace(CLEAN, depth_form="range16")
    plain, inverted = (capture(what, replace(form, depth_inverted=i)).depth for i in (False, True))
    both = (plain > 0) & (inverted > 0)
    assert np.corrcoef(plain[both], inverted[both])[0, 1] < -0.99


def test_linked_nuisance_touches_attacks_only() -> None:
    linked, plain = replace(CLEAN, linked=("exposure", 1.5)), CLEAN
    bona_fide = [capture(Presentation(1, BONA_FIDE, k), r).rgb for k in range(6) for r in (linked, plain)]
    attacks = [capture(Presentation(1, "print_flat", k), r).rgb for k in range(6) for r in (linked, plain)]
    assert all(np.array_equal(a, b) for a, b in zip(bona_fide[::2], bona_fide[1::2], strict=True))
    same = [np.array_equal(a, b) for a, b in zip(attacks[::2], attacks[1::2], strict=True)]
    assert not all(same)


def test_variant_is_near_its_family() -> None:
    rig = TRAINING["A"]
    other = variant(rig, 3)
    assert other == variant(rig, 3)
    assert other != variant(rig, 4)
    assert other.depth_form == rig.depth_form
    assert abs(other.distance / rig.distance - 1) < 0.3


def test_unknown_species_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'hologram': allowed are bona_fide, print_flat"):
        capture(Presentation(1, "hologram", 1), CLEAN)
