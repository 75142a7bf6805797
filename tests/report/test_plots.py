"""Charts of radii: two classes are told apart by shape, and no sample is lost."""

from __future__ import annotations

import re

import numpy as np

from pipeline.report import plots
from pipeline.report.content import RadiusPanel


def panel(domain: str, rng: np.random.Generator, shift: float = 0.0) -> RadiusPanel:
    real = np.abs(rng.normal(0.72 + shift, 0.13, 300))
    attack = np.abs(rng.normal(1.5 + shift / 2, 0.35, 700))
    turn = rng.uniform(0, 2 * np.pi)
    return RadiusPanel(domain, real, attack, 1.04, rng.normal(turn, 0.4, 300), rng.normal(turn + 2, 0.9, 700))


def test_classes_of_a_scatter_differ_in_shape_and_stay_on_the_disc() -> None:
    p = RadiusPanel(
        "target", np.array([0.5, 9.0]), np.array([1.0]), 0.8, np.array([0.0, np.pi / 2]), np.array([np.pi])
    )
    drawn = plots.sphere(p, top=2.0)
    assert 'class="bona-fide" d="M25.0 0.0h.01M0.0 -100.0h.01"' in drawn.replace("-0.0h", "0.0h").replace(
        "M-0.0", "M0.0"
    )
    assert 'class="attack" d="M-50.0 -0.0m-2-2l4 4m0-4l-4 4"' in drawn
    assert 'class="edge" r="40.0"' in drawn
    assert (p.outside, p.inside) == (0.5, 0.0)
    many = panel("wmca", np.random.default_rng(0))
    assert plots.sphere(many, top=2.0).count("m-2-2") == plots.POINTS


def test_radius_bars_hold_every_sample() -> None:
    p = panel("target", np.random.default_rng(0), 1.5)
    drawn = plots.radii(p, top=2.0)
    for kind, sign in (("bona-fide", -1), ("attack", 1)):
        path = re.search(rf'class="area {kind}" d="M0 50(.*?)V50Z"', drawn)
        assert path
        heights = [sign * (float(y) - 50) for y in re.findall(r"V([\d.]+)H", path[1])]
        assert len(heights) == plots.RADIUS_BINS
        assert min(heights) >= 0
        radius = np.clip(p.bona_fide if sign < 0 else p.attack, 0, 2.0)
        assert np.argmax(heights) == np.argmax(np.histogram(radius, plots.RADIUS_BINS, (0, 2.0))[0])
