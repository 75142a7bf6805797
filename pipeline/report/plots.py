"""Draws charts as inline SVG; the page gives the colours, so one file serves light, dark and print.

The browser stretches the shapes, and all text beside them is HTML, so no text shrinks on a phone. Only the
DET plot, which must stay square, scales as a whole. Every chart states its content in words as its ARIA
label.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.report.content import DetCurve, RadiusPanel

LONGEST = 1000  # characters of one untrusted string
SPARK_BINS, LINE_BINS, DET_POINTS = 28, 120, 400
DET_TICKS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
DET_SIDE, DET_LEFT, DET_TOP = 320.0, 58.0, 10.0
RADIUS_BINS, POINTS = 40, 250  # points of a class in one scatter

_STRETCHED = Markup(
    '<svg class="{}" role="img" aria-label="{}" viewBox="0 0 100 100" preserveAspectRatio="none">{}</svg>'
)


def clean(text: str) -> str:
    """Returns ``text`` cut to LONGEST characters, with controls, direction marks and surrogates escaped."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def number(value: float) -> str:
    """Formats ``value`` with three digits; a dash if it was not measured."""
    return f"{value:.3g}" if np.isfinite(value) else "–"


def percent(value: float) -> str:
    """Formats a share in [0, 1] as a percentage; a dash if it was not measured."""
    return f"{100 * value:.1f}%" if np.isfinite(value) else "–"


def mean(values: np.ndarray) -> float:
    """Returns the mean of the finite ``values``; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def measured(values: np.ndarray) -> bool:
    """Returns True if at least one of ``values`` is finite, so that there is something to draw."""
    return bool(np.isfinite(values).any())


def sparkline(values: np.ndarray, name: str, *, top: float) -> Markup:
    """Draws ``values`` [T] on [0, top] as a line of the size of a word."""
    binned = _bins(values, SPARK_BINS)
    return _STRETCHED.format("spark", f"{name} {_range(binned)}", _path(binned, top))


def line(values: np.ndarray, name: str, *, top: float, peaks: bool = False) -> Markup:
    """Draws ``values`` [T] over time on [0, top]; a bin is its mean, or with ``peaks`` its largest value."""
    grid = Markup('<path class="grid" d="M0 0H100M0 50H100M0 100H100"/>')
    return _STRETCHED.format(
        "line",
        f"{name} over time: {_range(values)}",
        grid + _path(_bins(values, LINE_BINS, peaks=peaks), top),
    )


def strip(share: np.ndarray, name: str) -> Markup:
    """Draws the share [T] of captures with a modality as filled height over time."""
    binned = np.nan_to_num(_bins(share, LINE_BINS)).clip(0, 1)
    edges = np.linspace(0, 100, len(binned) + 1)
    steps = "".join(f"V{100 - 100 * v:.0f}H{x:.4g}" for v, x in zip(binned, edges[1:], strict=True))
    area = Markup('<path class="area" d="M0 100{}V100Z"/>').format(steps)
    return _STRETCHED.format("strip", f"{name} available: {_range(share)}", area)


def dumbbell(before: float, after: float, *, name: str, top: float, limit: float | None, tone: str) -> Markup:
    """Draws one row of a before → after chart on [0, top]: before is hollow, after is filled."""
    at = [
        f"{min(100.0, 100 * v / top):.2f}%" if np.isfinite(v) else None
        for v in (before, after, limit or np.nan)
    ]
    label = f"{name}: {percent(before)} before, {percent(after)} after"
    marks = [
        Markup('<line class="grid" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(t)
        for t in (0, 25, 50, 75, 100)
    ]
    if at[2]:
        marks.append(Markup('<line class="limit" x1="{0}" x2="{0}" y1="0" y2="100%"/>').format(at[2]))
    if at[0] and at[1]:
        marks.append(Markup('<line class="way" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(at[0], at[1]))
    marks += [
        Markup('<circle class="{}" cx="{}" cy="50%" r="{}"/>').format(kind, x, radius)
        for kind, x, radius in (("before", at[0], 4), ("after", at[1], 4.5))
        if x
    ]
    return Markup('<svg class="bell {}" role="img" aria-label="{}">{}</svg>').format(
        tone, label, Markup("").join(marks)
    )


def whisker(
    value: float,
    low: float,
    high: float,
    oracle: float = float("nan"),
    *,
    name: str,
    top: float,
    reference: float = float("nan"),
) -> Markup:
    """Draws one row on [0, top]: the error and its interval, hollow the error at an oracle threshold.

    A ``reference`` that the error is held against is a line over the whole height.
    """
    values = (value, low, high, oracle, reference)
    at = [f"{100 * min(v / top, 1):.2f}%" if np.isfinite(v) else None for v in values]
    upright = '<line class="{0}" x1="{1}" x2="{1}" y1="0" y2="100%"/>'
    marks = [Markup(upright).format("grid", f"{t}%") for t in (0, 25, 50, 75, 100)]
    if at[4]:
        marks.append(Markup(upright).format("ref", at[4]))
    for kind, start, end in (("shift", at[3], at[0]), ("span", at[1], at[2])):
        if start and end:
            line = Markup('<line class="{}" x1="{}" x2="{}" y1="50%" y2="50%"/>')
            marks.append(line.format(kind, start, end))
    for kind, x, radius in (("before", at[3], 4), ("after", at[0], 4.5)):
        if x:
            marks.append(Markup('<circle class="{}" cx="{}" cy="50%" r="{}"/>').format(kind, x, radius))
    label = f"{name}: {percent(value)}, 95 % interval {percent(low)} to {percent(high)}"
    label += f", oracle EER {percent(oracle)}" if np.isfinite(oracle) else ""
    return Markup('<svg class="bell" role="img" aria-label="{}">{}</svg>').format(
        label, Markup("").join(marks)
    )


def det(before: DetCurve, after: DetCurve) -> Markup:
    """Draws the DET curves before (dashed) and after (solid) on normal deviate axes, 0.1 % to 60 %."""
    inner = Markup("").join(_curve(c, kind) for c, kind in ((before, "before"), (after, "after")))
    label = "; ".join(
        f"{kind}: at the deployed threshold "
        f"{percent(c.at[0])} of attacks and {percent(c.at[1])} of bona fide are wrong"
        for c, kind in ((before, "before"), (after, "after"))
        if c.at
    )
    return _axes(f"DET curves. {label}", inner)


def dets(curves: Sequence[tuple[str, DetCurve]], name: str, kinds: dict[str, str]) -> Markup:
    """Draws several methods' DET curves.

    ``kinds`` maps a method to its line style, "before" or "after"; the curves of all others are thin and
    behind.
    """
    front = [*kinds]
    order = sorted(curves, key=lambda c: front.index(c[0]) if c[0] in kinds else -1)
    inner = Markup("").join(
        Markup("<g><title>{}</title>{}</g>").format(
            clean(m), _curve(c if m in kinds else replace(c, at=None), kinds.get(m, "other"))
        )
        for m, c in order
    )
    errors = [f"{clean(m)} {percent(c.at[0])} and {percent(c.at[1])}" for m, c in curves if c.at]
    wrong = "; ".join(errors) or "not known"
    return _axes(
        f"DET curves on {clean(name)}. Attacks and bona fide that are wrong at the threshold: {wrong}", inner
    )


def sphere(panel: RadiusPanel, *, top: float) -> Markup:
    """Draws samples by radius and angle and the boundary as a circle; bona fide are dots, attacks crosses.

    Samples beyond ``top`` are drawn on the rim.
    """
    dots, crosses = (
        Markup("").join(Markup(mark).format(x, y) for x, y in _polar(radius, angle, top))
        for mark, radius, angle in (
            ("M{:.1f} {:.1f}h.01", panel.bona_fide, panel.bona_fide_angle),
            ("M{:.1f} {:.1f}m-2-2l4 4m0-4l-4 4", panel.attack, panel.attack_angle),
        )
    )
    edge = Markup("")
    if np.isfinite(panel.rho):
        edge = Markup('<circle class="edge" r="{:.1f}"/>').format(100 * panel.rho / top)
    label = (
        f"{clean(panel.domain)}: {percent(panel.outside)} of bona fide are outside "
        f"the boundary {number(panel.rho)}, {percent(panel.inside)} of attacks inside"
    )
    return Markup(
        '<svg class="sphere" role="img" aria-label="{}" viewBox="-106 -106 212 212">'
        '<circle class="ring" r="100"/><path class="attack" d="{}"/>'
        '<path class="bona-fide" d="{}"/>{}</svg>'
    ).format(label, crosses, dots, edge)


def radii(panel: RadiusPanel, *, top: float) -> Markup:
    """Draws a histogram of the radii on [0, top], bona fide upwards, attacks downwards, and the boundary."""
    bins = np.linspace(0, top, RADIUS_BINS + 1)
    shares: list[np.ndarray] = []
    for radius in (panel.bona_fide, panel.attack):
        finite = radius[np.isfinite(radius)]
        shares.append(np.histogram(np.clip(finite, 0, top), bins)[0] / max(1, len(finite)))
    most = max(float(s.max()) for s in shares) or 1.0
    areas = Markup("").join(
        Markup('<path class="area {}" d="M0 50{}V50Z"/>').format(
            kind,
            "".join(f"V{50 + sign * 48 * s / most:.1f}H{x:.4g}" for s, x in zip(share, 100 * bins[1:] / top)),
        )
        for kind, sign, share in (("bona-fide", -1, shares[0]), ("attack", 1, shares[1]))
    )
    edge = Markup("")
    if np.isfinite(panel.rho):
        edge = Markup('<path class="edge" d="M{:.2f} 0V100"/>').format(100 * panel.rho / top)
    bona_fide, attack = _quartiles(panel.bona_fide), _quartiles(panel.attack)
    label = f"{clean(panel.domain)}: bona fide radius {bona_fide}; attack radius {attack}"
    return _STRETCHED.format("radii", label, areas + Markup('<path class="grid" d="M0 50H100"/>') + edge)


def bar(parts: Sequence[float], names: Sequence[str], *, top: float) -> Markup:
    """Draws ``parts`` of a whole end to end on [0, top], in order, the darkest first."""
    widths = np.nan_to_num(np.asarray(parts, dtype=float)).clip(0) * 100 / (top or 1.0)
    start = np.concatenate([[0], np.cumsum(widths)])
    shapes = Markup("").join(
        Markup('<rect class="p{}" x="{:.2f}%" width="{:.2f}%" height="100%"/>').format(i, start[i], w)
        for i, w in enumerate(widths)
    )
    label = ", ".join(f"{n} {number(1000 * p)} ms" for n, p in zip(names, parts, strict=True))
    return Markup('<svg class="bar" role="img" aria-label="{}">{}</svg>').format(label, shapes)


def scale(values: Sequence[float], floor: float) -> float:
    """Returns the top of an axis for the finite ``values``: a number with round quarters, >= ``floor``."""
    most = max([floor, *(v for v in values if np.isfinite(v))])
    rounds = (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0)
    power = 10.0 ** np.floor(np.log10(most))
    return float(next(r for r in rounds if r * power >= most * (1 - 1e-9)) * power)


def _bins(values: np.ndarray, n: int, *, peaks: bool = False) -> np.ndarray:
    """Returns at most ``n`` bins of ``values``: each is the mean or, with ``peaks``, the largest value."""
    values = np.asarray(values, dtype=float).ravel()
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) <= n:
        return values
    first = np.linspace(0, len(values), n + 1).astype(int)[:-1]
    if peaks:
        return np.fmax.reduceat(values, first)
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0), first)
    count = np.add.reduceat(finite.astype(int), first)
    return np.divide(total, count, out=np.full(n, np.nan), where=count > 0)


def _path(values: np.ndarray, top: float) -> Markup:
    """Draws a line through the finite values, with a gap for missing ones and a dot for a single one."""
    d: list[str] = []
    pen_down = False
    x = np.linspace(0, 100, len(values)) if len(values) > 1 else np.full(len(values), 50.0)
    y = 100 - 100 * np.clip(values / top, 0, 1)
    for xi, yi in zip(x.tolist(), y.tolist(), strict=True):
        if yi == yi:
            d.append(f"{'L' if pen_down else 'M'}{xi:.1f} {yi:.1f}{'' if pen_down else 'h.01'}")
        pen_down = yi == yi
    return Markup('<path d="{}"/>').format("".join(d))


def _range(values: np.ndarray) -> str:
    finite = np.asarray(values, dtype=float).ravel()
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return "not measured"
    return (
        f"first {finite[0]:.2g}, last {finite[-1]:.2g}, lowest {finite.min():.2g}, highest {finite.max():.2g}"
    )


def _deviate(rate: float) -> float:
    """Returns the position in [0, DET_SIDE] of an error rate on a normal deviate axis."""
    low, high = (NormalDist().inv_cdf(t) for t in (DET_TICKS[0], DET_TICKS[-1]))
    return DET_SIDE * (NormalDist().inv_cdf(min(max(rate, 1e-5), 1 - 1e-5)) - low) / (high - low)


def _axes(label: str, inner: Markup) -> Markup:
    return Markup(
        '<svg class="det" role="img" aria-label="{label}" viewBox="0 0 390 384">{ticks}'
        '<svg x="{x}" y="{y}" width="{side}" height="{side}" viewBox="0 0 {side} {side}">{inner}</svg>'
        '<rect class="frame" x="{x}" y="{y}" width="{side}" height="{side}"/>'
        '<text class="axis" x="{mid}" y="376" text-anchor="middle">attacks accepted, species pooled, %</text>'
        '<text class="axis" transform="translate(13 {low}) rotate(-90)" text-anchor="middle">'
        "bona fide rejected (BPCER), %</text></svg>"
    ).format(
        label=label,
        ticks=Markup("").join(_tick(t) for t in DET_TICKS),
        inner=inner,
        x=DET_LEFT,
        y=DET_TOP,
        side=DET_SIDE,
        mid=DET_LEFT + DET_SIDE / 2,
        low=DET_TOP + DET_SIDE / 2,
    )


def _tick(rate: float) -> Markup:
    at = _deviate(rate)
    return Markup(
        '<path class="grid" d="M{x:.1f} {top}v{side}M{left} {y:.1f}h{side}"/>'
        '<text x="{x:.1f}" y="{below}" text-anchor="middle">{name}</text>'
        '<text x="{beside}" y="{y:.1f}" dy=".35em" text-anchor="end">{name}</text>'
    ).format(
        x=DET_LEFT + at,
        y=DET_TOP + DET_SIDE - at,
        top=DET_TOP,
        left=DET_LEFT,
        side=DET_SIDE,
        below=DET_TOP + DET_SIDE + 17,
        beside=DET_LEFT - 7,
        name=f"{100 * rate:g}",
    )


def _curve(curve: DetCurve, kind: str) -> Markup:
    finite = np.isfinite(curve.apcer) & np.isfinite(curve.bpcer)
    apcer, bpcer = curve.apcer[finite], curve.bpcer[finite]
    pick = np.unique(np.linspace(0, len(apcer) - 1, min(len(apcer), DET_POINTS)).astype(int))
    points = [
        f"{_deviate(a):.1f} {DET_SIDE - _deviate(b):.1f}"
        for a, b in zip(apcer[pick], bpcer[pick], strict=True)
    ]
    shapes = Markup('<path class="{}" d="{}"/>').format(kind, "M" + "L".join(points) if points else "")
    if curve.at and np.isfinite(curve.at).all():
        x, y = _deviate(curve.at[0]), DET_SIDE - _deviate(curve.at[1])
        shapes += Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(kind, x, y)
    return shapes


def _polar(radius: np.ndarray, angle: np.ndarray, top: float) -> list[tuple[float, float]]:
    """Returns at most POINTS of the finite samples, evenly thinned, as points on a disc of radius 100."""
    finite = np.flatnonzero(np.isfinite(radius) & np.isfinite(angle))
    pick = finite[np.linspace(0, len(finite) - 1, min(len(finite), POINTS)).astype(int)]
    r = 100 * np.clip(radius[pick] / top, 0, 1)
    return list(zip((r * np.cos(angle[pick])).tolist(), (-r * np.sin(angle[pick])).tolist(), strict=True))


def _quartiles(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "not measured"
    low, mid, high = np.quantile(finite, [0.25, 0.5, 0.75])
    return f"median {mid:.2g}, half of them between {low:.2g} and {high:.2g}"
