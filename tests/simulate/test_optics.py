"""What lies before a sensor does what its name says, and leaves other rigs as they were."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.simulate.optics import Beam, Fringes, Glare, bent, with_beam, with_fringes, with_glare
from pipeline.simulate.render import BONA_FIDE, Presentation
from pipeline.simulate.rig import SensorRig, capture, variant
from pipeline.simulate.shifted_rigs import SHIFTED

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.simulate.rig import Capture

PLAIN = SensorRig("plain", depth_form="mm", jpeg=100)
WHO = Presentation(5, BONA_FIDE, 8)
GREY = np.full((64, 64), 0.4, np.float32)


def test_a_beam_lights_where_it_points_and_nothing_far_from_there() -> None:
    lit = with_beam(GREY, Beam(0.3, 0.5, -0.5))
    y, x = np.unravel_index(lit.argmax(), lit.shape)
    assert (x, y) == (pytest.approx(48, abs=1), pytest.approx(16, abs=1))
    assert lit.max() == pytest.approx(0.4, rel=0.01)
    assert lit[60, 4] < 0.004
    assert lit.dtype == np.float32


def test_glare_adds_light_and_takes_contrast() -> None:
    stripes = GREY + 0.2 * (np.arange(64) % 2)[None, :].astype(np.float32)
    seen = with_glare(stripes, Glare(0.2, 0.6, 0.0, 0.0, 0.3))
    assert (seen > stripes).all()
    contrast = np.abs(np.diff(seen, axis=1))
    assert contrast[32, 30] < contrast[2, 2] < 0.2
    colour = with_glare(np.dstack([stripes] * 3), Glare(0.2, 0.6, 0.0, 0.0, 0.3, (0.5, 1.0, 0.0)))
    assert colour.shape == (64, 64, 3)
    assert np.allclose(colour[..., 1], seen)
    assert (colour[..., 2] < stripes).all(), "a pane that passes no blue light only takes some"


def test_fringes_have_their_period_and_amplitude_and_never_stand_still() -> None:
    rng = np.random.default_rng(0)
    first, second = (with_fringes(500 * np.ones((64, 64), np.float32), Fringes(5, 8, 0.0), rng) for _ in "12")
    assert np.allclose(first[0], first[-1])
    assert np.allclose(first[:, :-8], first[:, 8:], atol=0.01)
    assert np.ptp(first) == pytest.approx(10, rel=0.1)
    assert first.mean() == pytest.approx(500, abs=0.1)
    assert not np.allclose(first, second)


def test_a_wide_lens_keeps_the_centre_and_shrinks_what_is_far_from_it() -> None:
    x, y = np.meshgrid(np.arange(65, dtype=np.float32), np.arange(65, dtype=np.float32))
    disc = ((x - 32) ** 2 + (y - 32) ** 2 < 24**2).astype(np.float32)
    maps = np.stack([disc, x])
    seen = bent(maps, 0.25)
    assert seen[1, 32, 32] == pytest.approx(32, abs=0.01)
    assert 0.6 * disc.sum() < seen[0].sum() < 0.95 * disc.sum()
    assert np.allclose(bent(maps, 0.0), maps, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"rgb_glare": Glare(0.2, 0.8, -0.5, -0.5, 0.8)}, "rgb"),
        ({"ir_glare": Glare(0.2, 0.8, 0.5, -0.5, 0.3)}, "ir"),
        ({"ir_beam": Beam(0.5)}, "ir"),
        ({"depth_fringes": Fringes(5, 6, 0.3)}, "depth"),
    ],
)
def test_each_touches_one_sensor(change: dict[str, Glare | Beam | Fringes], changed: str) -> None:
    plain = capture(WHO, PLAIN)._asdict()
    seen = capture(WHO, replace(PLAIN, **change))._asdict()  # pyright: ignore[reportArgumentType]
    assert not np.array_equal(seen.pop(changed), plain.pop(changed))
    same = {name: np.array_equal(seen[name], plain[name]) for name in seen}
    dark = {"depth": changed == "ir"}  # depth loses returns where the infrared image is dark
    assert all(same[name] or dark.get(name) for name in same)


def test_a_place_of_a_family_keeps_what_makes_it_one() -> None:
    for name, rig in SHIFTED.items():
        place = variant(rig, 4)
        assert place.name == name
        assert place != rig
        assert (place.barrel, place.rgb_glare, place.ir_glare) == (rig.barrel, rig.rgb_glare, rig.ir_glare)
        assert (place.ir_beam, place.depth_fringes) == (rig.ir_beam, rig.depth_fringes)


def test_each_family_sees_people_as_its_story_says() -> None:
    rigs = {"plain": PLAIN, **{n: replace(r, depth_form="mm", depth_holes=0.0) for n, r in SHIFTED.items()}}

    def mean(measure: Callable[[Capture], float]) -> dict[str, float]:
        return {
            name: float(np.mean([measure(capture(Presentation(k, BONA_FIDE, k), rig)) for k in range(6)]))
            for name, rig in rigs.items()
        }

    corner = mean(lambda c: c.ir[-16:, :16].mean() / c.ir.mean())
    assert corner["spotlight"] < 0.3 * corner["plain"], "the lamp does not reach it"
    clipped = mean(lambda c: (c.ir > 250).mean())
    assert clipped["flooded"] > 0.15 > 0.01 > clipped["plain"]
    black = mean(lambda c: float(np.percentile(c.rgb, 5)))
    assert black["pane"] > 2 * black["plain"], "nothing is dark behind a veil"
    near = mean(lambda c: ((c.depth > 0) & (c.depth < np.median(c.depth[28:36, 28:36]) + 60)).mean())
    assert near["wide"] < 0.7 * near["plain"], "faces are small"
