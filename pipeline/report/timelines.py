"""Draws the timelines of the site benchmark and its bars of rises: inline SVG like that of ``plots``.

A method keeps its look on the whole page: ``looks`` gives it a class of the style sheet. Colour and dashes
differ among ten methods besides ours and the baseline, one of them among 110.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.report import plots
from pipeline.report.bench import html, joined, signed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.report.content import Timeline

    Floats = NDArray[np.float64]

COLOURS, DASHES = 10, 11  # looks in the style sheet, of methods that are neither ours nor the baseline
POINTS = 120  # of one line; longer ones are averaged
NARROW, LETTER = 300.0, 6.2  # pixels: the panel of a phone, a letter of a label
RATES = {"bpcer": "BPCER", "max_apcer": "max APCER"}


class Label(NamedTuple):
    """A word over a timeline: ``at`` in per cent of its width, to one side of it; ``lane`` 0 is lowest."""

    at: float
    lane: int
    leftwards: bool
    text: str


class Panel(NamedTuple):
    """One drawn panel with the words of its vertical axis, from the top."""

    drawn: Markup
    ticks: tuple[str, ...]


def looks(methods: Sequence[str], ours: str, baseline: str) -> dict[str, str]:
    """Returns the CSS classes of every method's line."""
    fixed = {ours: "own", baseline: "frozen"}
    others = [m for m in methods if m not in fixed]
    drawn = {m: f"c{i % COLOURS} d{i % DASHES}" for i, m in enumerate(others)}
    return {m: drawn.get(m, fixed.get(m, "")) for m in methods}


def figure(timeline: Timeline, look: Mapping[str, str], ours: str) -> Markup:
    """Draws one stream: both error rates of every method, and how far ``ours`` moved its boundary."""
    form = '<span{} style="{}:{:.2f}%;max-width:{:.2f}%;height:{}px">{}</span>'
    sides = {True: (Markup(" class=leftwards"), "right"), False: ("", "left")}
    words = labels(timeline)
    ends = [(100 - w.at, w.at) if w.leftwards else (w.at, 100 - w.at) for w in words]
    lines = [15 * (w.lane + 1) for w in words]
    parts = ((*sides[w.leftwards], *e, line, w.text) for w, e, line in zip(words, ends, lines, strict=True))
    height = max(lines) + 2 if words else 0
    above = html(
        '<div class="labels" aria-hidden="true" style="height:{}px">{}</div>', height, joined(form, parts)
    )
    panels = [(rates(timeline, "bpcer", look), "BPCER"), (rates(timeline, "max_apcer", look), "max APCER")]
    if timeline.boundary:
        panels.append((shift(timeline), f"boundary moved by {ours}, logits; above 0 it accepts less"))
    form = '<span></span><h4>{}</h4>{}<div class="y" aria-hidden="true">{}</div>{}'
    ticks = [joined("<span>{}</span>", ((tick,) for tick in panel.ticks)) for panel, _ in panels]
    tops = [Markup("<span></span>{}").format(above), "", ""]
    drawn = joined(form, ((title, top, y, p.drawn) for (p, title), top, y in zip(panels, tops, ticks)))
    marks = [f"{text} at {at:,.0f}" for at, text in timeline.events if np.isfinite(at)]
    marks += [f"{text} from {a:,.0f} to {b:,.0f}" for a, b, text in timeline.spans if np.isfinite(a + b)]
    swatch = '<span><svg class="trace" aria-hidden="true" style="width:32px" viewBox="0 0 32 12">'
    key = joined(
        swatch + '<path class="{}" d="M1 6h30"/></svg>{}</span>', ((look[m], m) for m in timeline.lines)
    )
    form = '<figure><h3>{}</h3><p class="small muted">{}</p><div class="time">{}</div><div class="x"'
    form += ' aria-hidden="true"><span>0</span><span>samples</span><span>{:,.0f}</span></div><figcaption>{}'
    form += '</figcaption><div class="key time-key">{}</div></figure>\n'
    return html(form, timeline.stream, timeline.what, drawn, end(timeline), "; ".join(marks), key)


def change(value: float, limit: float, *, name: str, low: float, high: float) -> Markup:
    """Draws a bar from zero to ``value`` on [low, high], and the line of the ``limit`` that it must not pass.

    Lengths are square roots, or a rise of the limit's size could not be seen beside that of half the attacks.
    """
    zero, at, most = (_share(_root(v), _root(low), _root(high)) for v in (0.0, value, limit))
    line = '<line class="{0}" x1="{1:.2f}%" x2="{1:.2f}%" y1="0" y2="100%"/>'
    bar = Markup("")
    if at is not None and zero is not None:
        form = '<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="22%" height="56%"/>'
        bar = html(form, "over" if value > limit else "under", min(at, zero), abs(at - zero))
    marks = html(line, "zero", zero) + bar + html(line, "limit", most)
    return html(
        '<svg class="change" role="img" aria-label="{}: {} points">{}</svg>', name, signed(value), marks
    )


def axis(values: Sequence[float], floor: float) -> tuple[float, float]:
    """Returns the ends of an axis that holds zero and all ``values``; below zero only as far as needed."""
    finite = [v for v in values if np.isfinite(v)]
    high, low = max([floor, *finite]), min([0.0, *finite])
    room = 0.04 * (high - low)
    return low - room, high + room


def end(timeline: Timeline) -> float:
    """Returns the last position of a timeline, in samples; it begins at zero."""
    marks = [at for at, _ in timeline.events] + [stop for _, stop, _ in timeline.spans]
    lines = [line.position for line in timeline.lines.values()]
    lines += [timeline.boundary[0]] if timeline.boundary else []
    every = np.concatenate([np.asarray(marks, dtype=float), *lines])
    every = every[np.isfinite(every)]
    return float(every.max()) if len(every) and every.max() > 0 else 1.0


def rates(timeline: Timeline, rate: str, look: Mapping[str, str]) -> Panel:
    """Draws every method's ``rate`` ("bpcer" or "max_apcer"); the dashed baseline lies over ours."""
    lines = {m: (line.position, getattr(line, rate)) for m, line in timeline.lines.items()}
    top = min(1.0, plots.scale([v for _, values in lines.values() for v in values.tolist()], 0.04))
    order = sorted(lines, key=lambda m: {"own": 1, "frozen": 2}.get(look[m], 0))
    path = '<path class="{}" d="{}"/>'
    inner = joined(path, ((look[m], _path(*lines[m], end(timeline), 0, top)) for m in order))
    each = "; ".join(f"{plots.clean(m)} {_range(values)}" for m, (_, values) in lines.items()) or "no method"
    words = f"{RATES[rate]} over {plots.clean(timeline.stream)}: {each}"
    return Panel(_panel("trace", words, timeline, inner), tuple(f"{100 * top * q:g}%" for q in (1, 0.5, 0)))


def shift(timeline: Timeline) -> Panel:
    """Draws how far our method moved the boundary, around zero."""
    assert timeline.boundary
    position, logits = timeline.boundary
    most = plots.scale(np.abs(logits).tolist(), 0.1)
    inner = html('<path class="own" d="{}"/>', _path(position, logits, end(timeline), -most, most))
    finite, summary = logits[np.isfinite(logits)], "not measured"
    if len(finite):
        last, low, high = (_minus(f"{v:+.2g}") for v in (finite[-1], finite.min(), finite.max()))
        summary = f"last {last}, {low} to {high} logits"
    panel = _panel("trace thin", f"Boundary over {plots.clean(timeline.stream)}: {summary}", timeline, inner)
    return Panel(panel, (f"{most:+g}", "0", _minus(f"{-most:+g}")))


def labels(timeline: Timeline) -> list[Label]:
    """Returns the words of events and spans, equal ones once, in lanes where no two touch on a phone.

    A label hangs on a line at its position; towards the end of the stream it is written leftwards. The lines
    of higher lanes pass the lower ones, so those nearest the middle come first; the highest is drawn first.
    """
    last = end(timeline)
    marks: dict[str, float] = {}
    for at, text in sorted(
        [(at, text) for at, text in timeline.events] + [(a, text) for a, _, text in timeline.spans]
    ):
        if np.isfinite(at):
            marks.setdefault(plots.clean(text), 100 * float(np.clip(at / last, 0, 1)))
    placed: list[tuple[Label, float, float]] = []  # with the ends of its text
    for text, at in sorted(marks.items(), key=lambda m: (abs(m[1] - 50), m[0])):
        leftwards = at > 50
        wide = min(100 * (LETTER * len(text) + 12) / NARROW, at if leftwards else 100 - at)
        left, right = (at - wide, at) if leftwards else (at, at + wide)
        fits = [n for n in range(len(marks)) if not _meets(placed, n, left, right)]
        lane = next((n for n in fits if not _crosses(placed, n, at, left, right)), fits[0])
        placed.append((Label(at, lane, leftwards, text), left, right))
    return sorted((label for label, _, _ in placed), key=lambda w: (-w.lane, w.at))


def _meets(placed: Sequence[tuple[Label, float, float]], lane: int, left: float, right: float) -> bool:
    """Returns whether a text would touch another one in ``lane``."""
    return any(other.lane == lane and left < stop and start < right for other, start, stop in placed)


def _crosses(
    placed: Sequence[tuple[Label, float, float]], lane: int, at: float, left: float, right: float
) -> bool:
    """Returns whether its line would run behind a lower text, or its text before a line from above."""
    below = any(other.lane < lane and start < at < stop for other, start, stop in placed)
    return below or any(other.lane > lane and left < other.at < right for other, _, _ in placed)


def _panel(kind: str, words: str, timeline: Timeline, inner: Markup) -> Markup:
    """Draws the shaded spans and the lines of the events behind ``inner``."""
    last = end(timeline)
    ends = [(_share(a, 0, last), _share(b, 0, last)) for a, b, _ in timeline.spans]
    form = '<rect class="shaded" x="{:.2f}" width="{:.2f}" height="100"/>'
    spans = joined(form, ((a, max(0.0, b - a)) for a, b in ends if a is not None and b is not None))
    lines = [x for x in (_share(at, 0, last) for at, _ in timeline.events) if x is not None]
    form = '<svg class="{}" role="img" aria-label="{}" viewBox="0 0 100 100" preserveAspectRatio="none">{}'
    form += '<path class="grid" d="M0 0H100M0 50H100M0 100H100"/><path class="event" d="{}"/>{}</svg>'
    return Markup(form).format(kind, words, spans, "".join(f"M{x:.2f} 0V100" for x in lines), inner)


def _path(position: Floats, values: Floats, last: float, low: float, high: float) -> Markup:
    """Draws a line through the finite values, with gaps, and a dash where a value stands alone."""
    x, y = 100 * np.clip(position / last, 0, 1), 100 - 100 * np.clip((values - low) / (high - low), 0, 1)
    if len(x) > POINTS:
        chunks = np.array_split(np.arange(len(x)), POINTS)
        x, y = (np.array([plots.mean(side[c]) for c in chunks]) for side in (x, y))
    d = ""
    for run in np.split(np.arange(len(y)), np.flatnonzero(np.diff(np.isfinite(x + y).astype(int))) + 1):
        if not len(run) or not np.isfinite(x[run[0]] + y[run[0]]):
            continue
        d += "M" + "L".join(f"{x[i]:.1f} {y[i]:.1f}" for i in run)
        d += "m-.5 0h1" if len(run) == 1 else ""
    return Markup(d)


def _share(value: float, low: float, high: float) -> float | None:
    """Where ``value`` lies on [low, high], in per cent; None if it is not known."""
    return float(np.clip(100 * (value - low) / (high - low), 0, 100)) if np.isfinite(value) else None


def _root(value: float) -> float:
    return float(np.sign(value) * np.sqrt(abs(value)))


def _range(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "not measured"
    return f"mean {plots.percent(float(finite.mean()))}, highest {plots.percent(float(finite.max()))}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
