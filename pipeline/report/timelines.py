"""Charts and marks of the site benchmark: inline SVG, drawn like those of ``plots``: stretched shapes, words
beside them in HTML.

A method keeps its look on the whole page: ``looks`` gives it a class whose colour and dashes are in the
template. Both differ among ten methods besides ours and the baseline, one of them among 110.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.report import plots

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from pipeline.report.content import Timeline
    from pipeline.stats.intervals import Estimate

    Floats = NDArray[np.float64]

COLOURS, DASHES = 10, 11  # of the methods that are neither ours nor the baseline
POINTS = 120  # of one line; longer ones are averaged
FULL = 0.1  # a difference of rates that gets the whole shade
SPAN = 0.02  # rates that lie closer than this are not spread over all shades
NARROW, LETTER = 300.0, 6.2  # pixels: the panel of a phone, a letter of a label
MARKS = {"bpcer": "BPCER", "max_apcer": "max APCER"}


class Tone(NamedTuple):
    """How a rise is marked: never by its colour alone."""

    kind: str  # "worse", "better", "same" or "" if not known
    mark: str
    shade: str  # share of the full shade


class Label(NamedTuple):
    """A word over a timeline: ``at`` in per cent of its width, ``lane`` 0 next to the panel, text to one side
    of ``at``.
    """

    at: float
    lane: int
    leftwards: bool
    text: str


class Panel(NamedTuple):
    """One drawn panel with the words of its vertical axis, from the top."""

    drawn: Markup
    ticks: tuple[str, ...]


def points(value: float) -> str:
    """A difference of rates in percentage points, without a sign where it rounds to zero."""
    return "0.0" if abs(value) < 5e-4 else _signed(100 * value, "+.1f")


def span(low: float, high: float) -> str:
    """An interval of rates in per cent, without the sign; empty if it is not known."""
    if not np.isfinite([low, high]).all():
        return ""
    between = "–" if low >= 0 else " to "
    return f"{100 * low:.1f}{between}{100 * high:.1f}".replace("-", "\N{MINUS SIGN}")


def tone(rise: float) -> Tone:
    """Of a difference of error rates, below zero better; what rounds to zero on the page is the same."""
    if not np.isfinite(rise):
        return Tone("", "", "0")
    if abs(rise) < 5e-4:
        return Tone("same", "", "0")
    return Tone(*(("worse", "▲") if rise > 0 else ("better", "▼")), f"{min(1.0, abs(rise) / FULL):.2f}")


def shade(value: float, among: Iterable[float]) -> str:
    """Share of the full shade that ``value`` gets: 0 for the lowest of ``among``, 1 for the highest."""
    finite = [v for v in among if np.isfinite(v)]
    if not np.isfinite(value) or not finite:
        return "0"
    return f"{(value - min(finite)) / max(max(finite) - min(finite), SPAN):.2f}"


def lowest(value: float, among: Iterable[float]) -> bool:
    finite = [v for v in among if np.isfinite(v)]
    return len(finite) > 1 and value == min(finite)


def count(value: float | None) -> str:
    """Samples; empty if not measured."""
    return "" if value is None or np.isnan(value) else f"{value:,.0f}" if np.isfinite(value) else "∞"


def looks(methods: Sequence[str], ours: str, baseline: str) -> dict[str, str]:
    """The CSS classes of every method's line."""
    fixed = {ours: "own", baseline: "frozen"}
    others = [m for m in methods if m not in fixed]
    drawn = {m: f"c{i % COLOURS} d{i % DASHES}" for i, m in enumerate(others)}
    return {m: drawn.get(m, fixed.get(m, "")) for m in methods}


def forest(hter: Estimate, reference: float, *, name: str, top: float) -> Markup:
    """One row on [0, top]: a mean with its interval, and the line of the ``reference`` it is held against."""
    marks = [
        Markup('<line class="grid" x1="{0}%" x2="{0}%" y1="0" y2="100%"/>').format(t)
        for t in (0, 25, 50, 75, 100)
    ]
    at, low, high, ref = (_share(v, 0, top) for v in (*hter, reference))
    if ref is not None:
        marks.append(Markup('<line class="ref" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(ref))
    if low is not None and high is not None:
        marks.append(
            Markup('<line class="span" x1="{:.2f}%" x2="{:.2f}%" y1="50%" y2="50%"/>').format(low, high)
        )
    if at is not None:
        marks.append(Markup('<circle class="after" cx="{:.2f}%" cy="50%" r="4.5"/>').format(at))
    words = (
        f"{name}: {plots.percent(hter[0])}, 95 % interval {plots.percent(hter[1])} to "
        f"{plots.percent(hter[2])}"
    )
    return Markup('<svg class="bell" role="img" aria-label="{}">{}</svg>').format(
        words, Markup("").join(marks)
    )


def change(value: float, limit: float, *, name: str, low: float, high: float) -> Markup:
    """A bar from zero to ``value`` on [low, high], and the line of the ``limit`` it must not pass.

    Lengths are square roots, or a rise of the limit's size could not be told from none beside one of half of
    all attacks.
    """
    zero, at, most = (_share(_root(v), _root(low), _root(high)) for v in (0.0, value, limit))
    marks = [Markup('<line class="zero" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(zero)]
    if at is not None and zero is not None:
        marks.append(
            Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="22%" height="56%"/>').format(
                "over" if value > limit else "under", min(at, zero), abs(at - zero)
            )
        )
    marks.append(Markup('<line class="limit" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="100%"/>').format(most))
    words = f"{name}: {points(value)} points"
    return Markup('<svg class="change" role="img" aria-label="{}">{}</svg>').format(
        words, Markup("").join(marks)
    )


def axis(values: Sequence[float], floor: float) -> tuple[float, float]:
    """Ends of an axis that holds zero and all ``values``; below zero only as far as needed."""
    finite = [v for v in values if np.isfinite(v)]
    high, low = max([floor, *finite]), min([0.0, *finite])
    room = 0.04 * (high - low)
    return low - room, high + room


def end(timeline: Timeline) -> float:
    """The last position of a timeline, in samples; it begins at zero."""
    marked = [at for at, _ in timeline.events] + [stop for _, stop, _ in timeline.spans]
    lines = [line.position for line in timeline.lines.values()] + (
        [timeline.boundary[0]] if timeline.boundary else []
    )
    every = np.concatenate([np.asarray(marked, dtype=float), *lines])
    every = every[np.isfinite(every)]
    return float(every.max()) if len(every) and every.max() > 0 else 1.0


def rates(timeline: Timeline, rate: str, look: dict[str, str]) -> Panel:
    """Every method's ``rate`` ("bpcer" or "max_apcer") over the stream; ours is drawn last,
    over the others.
    """
    lines = {m: (line.position, getattr(line, rate)) for m, line in timeline.lines.items()}
    top = min(1.0, plots.scale([v for _, values in lines.values() for v in values.tolist()], 0.04))
    front = {"own": 2, "frozen": 1}
    order = sorted(lines, key=lambda m: front.get(look[m], 0))
    inner = Markup("").join(
        Markup('<path class="{}" d="{}"/>').format(look[m], _path(*lines[m], end(timeline), 0, top))
        for m in order
    )
    said = "; ".join(f"{plots.clean(m)} {_range(values)}" for m, (_, values) in lines.items()) or "no method"
    words = f"{MARKS[rate]} over {plots.clean(timeline.stream)}: {said}"
    return Panel(_panel("trace", words, timeline, inner), tuple(f"{100 * top * q:g}%" for q in (1, 0.5, 0)))


def moved(timeline: Timeline) -> Panel:
    """How far ours moved the boundary, around zero."""
    assert timeline.boundary
    position, logits = timeline.boundary
    most = plots.scale(np.abs(logits).tolist(), 0.1)
    inner = Markup('<path class="own" d="{}"/>').format(_path(position, logits, end(timeline), -most, most))
    finite = logits[np.isfinite(logits)]
    said = "not measured"
    if len(finite):
        last, low, high = (_signed(float(v), "+.2g") for v in (finite[-1], finite.min(), finite.max()))
        said = f"last {last}, {low} to {high} logits"
    words = f"Boundary over {plots.clean(timeline.stream)}: {said}"
    return Panel(
        _panel("trace thin", words, timeline, inner), (_signed(most, "+g"), "0", _signed(-most, "+g"))
    )


def labels(timeline: Timeline) -> list[Label]:
    """Words of the events and spans, the first of equal ones, in lanes where no two touch on a phone.

    A label hangs on a line at its position; towards the end of the stream it is written leftwards. The lines
    of higher lanes pass the lower ones, so those nearest the middle come first. Returned from the highest
    lane down, as they are drawn.
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
    """Whether a text would touch another one in ``lane``."""
    return any(other.lane == lane and left < stop and start < right for other, start, stop in placed)


def _crosses(
    placed: Sequence[tuple[Label, float, float]], lane: int, at: float, left: float, right: float
) -> bool:
    """Whether its line would run behind a text of a lower lane, or the text before a line from above."""
    below = any(other.lane < lane and start < at < stop for other, start, stop in placed)
    return below or any(other.lane > lane and left < other.at < right for other, _, _ in placed)


def _panel(kind: str, words: str, timeline: Timeline, inner: Markup) -> Markup:
    """The shaded spans and the lines of the events behind ``inner``."""
    last = end(timeline)
    spans = Markup("").join(
        Markup('<rect class="shaded" x="{:.2f}" width="{:.2f}" height="100"/>').format(a, max(0.0, b - a))
        for a, b in ((_share(s, 0, last), _share(e, 0, last)) for s, e, _ in timeline.spans)
        if a is not None and b is not None
    )
    events = "".join(
        f"M{x:.2f} 0V100" for x in (_share(at, 0, last) for at, _ in timeline.events) if x is not None
    )
    return Markup(
        '<svg class="{}" role="img" aria-label="{}" viewBox="0 0 100 100" preserveAspectRatio="none">{}'
        '<path class="grid" d="M0 0H100M0 50H100M0 100H100"/><path class="event" d="{}"/>{}</svg>'
    ).format(kind, words, spans, events, inner)


def _path(position: Floats, values: Floats, last: float, low: float, high: float) -> str:
    """A line through the finite values; a gap where they are missing, a dash where a value stands alone."""
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
    return d


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


def _signed(value: float, how: str) -> str:
    return f"{value:{how}}".replace("-", "\N{MINUS SIGN}") if np.isfinite(value) else "–"
