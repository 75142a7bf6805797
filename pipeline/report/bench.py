"""Records of a benchmark, and its page: figures with targets, tables and charts by section, and the context.

Each benchmark fills one ``Report``. ``render`` turns it into one HTML file without script; the terminal, JSON
and Markdown show the same record. Rates and shares are in [0, 1]; NaN means not measured. Every string may be
hostile: the page escapes all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from markupsafe import Markup

from pipeline.report import plots
from pipeline.report.page import environment
from pipeline.stats.metrics import HARM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from pipeline.stats.intervals import Estimate

    Value = float | str | tuple[float, ...] | Mapping[str, float | str | tuple[float, ...]] | None
    Column = tuple[str, str, Callable[["T"], "Cell | str | None"]]  # key in JSON, heading, cell of a record

T = TypeVar("T")
Among = Literal["", "row", "column", "table"]
Medium = Literal["everywhere", "page", "text"]  # text: the terminal and the Markdown

FULL = 0.1  # a difference of rates that gets the whole shade
SPAN = 0.02  # rates that lie closer than this are not spread over all shades
TALL = 16  # rows above which a table scrolls by itself
MINUS = str.maketrans("-", "\N{MINUS SIGN}")
TONES = {"▲": "worse", "▼": "better"}  # marks of a difference of error rates: colour alone never tells it
DASH = '<span class="muted"><span aria-hidden="true">–</span><span class="sr">not measured</span></span>'
SYMBOLS = {  # of the legends
    "interval": '<path class="span" d="M2 7h30"/><circle class="after" cx="17" cy="7" r="4.5"/>',
    "oracle": '<circle class="before" cx="17" cy="7" r="4"/>',
    "shift": '<line class="shift" x1="2" x2="32" y1="7" y2="7"/>',
    "reference": '<line class="ref" x1="17" x2="17" y1="0" y2="14"/>',
    "bona fide": '<path class="bona-fide" d="M17 7h.01"/>',
    "attack": '<path class="attack" d="M15 5l4 4m0-4l-4 4"/>',
    "boundary": '<path class="edge" d="M2 7h28"/>',
}


@dataclass(frozen=True)
class Figure:
    """A promised number: ``limit`` is the most it may be, or with ``least`` the least."""

    name: str
    value: float | None  # None or NaN: could not be measured, and does not hold
    limit: float
    note: str = ""
    least: bool = False
    strict: bool = False  # the limit itself does not hold

    @property
    def measured(self) -> float | None:
        """The value; None if there is no finite one."""
        return None if self.value is None or not math.isfinite(self.value) else float(self.value)

    @property
    def target(self) -> str:
        """The limit in words, such as "<= 0.15"."""
        return f"{'>' if self.least else '<'}{'' if self.strict else '='} {self.limit:g}"

    @property
    def holds(self) -> bool:
        """Whether the value was measured and lies on its side of the limit."""
        if self.measured is None:
            return False
        past = self.measured - self.limit if self.least else self.limit - self.measured
        return past > 0 if self.strict else past >= 0


def at_most(name: str, value: float | None, limit: float, note: str = "") -> Figure:
    """Returns a figure that holds up to ``limit``."""
    return Figure(name, value, limit, note)


def at_least(name: str, value: float | None, limit: float, note: str = "", *, strict: bool = False) -> Figure:
    """Returns a figure that holds from ``limit`` on, with ``strict`` above it."""
    return Figure(name, value, limit, note, least=True, strict=strict)


class Cell(NamedTuple):
    """One value of a table: ``value`` is for JSON, ``text`` for people."""

    value: Value
    text: str  # empty: not measured
    small: tuple[str, ...] = ()  # lines below it on the page; the first one stands beside it elsewhere
    rise: float | None = None  # difference of error rates that colours the cell
    rank: float | None = None  # is compared with the others that the table names
    drawn: Markup | None = None  # stands on the page instead of the text


class Group(NamedTuple):
    """A heading between the rows of a table."""

    title: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; the first cell names its row, None was not measured."""

    key: str  # in JSON; empty: the numbers are in another table
    title: str
    columns: Mapping[str, str]  # key in JSON -> heading; the keys "x.a" and "x.b" become an object x
    rows: Sequence[Sequence[Cell | str | None] | Group]
    among: Among = ""  # which ranked cells are compared: the lowest is bold, the shade goes to the highest
    medium: Medium = "everywhere"
    shown: tuple[str, ...] = ()  # keys of the columns that terminal and Markdown show; empty: all
    grouped: str = "group"  # key in JSON of the heading above a row
    keyed: bool = False  # JSON is an object by the names of the rows, not a list


@dataclass(frozen=True)
class Section:
    """A part of the page: tables and charts with the words around them."""

    key: str
    title: str
    intro: str
    parts: Sequence[Table | Markup]
    note: str = ""
    why: str = ""  # why something, or everything, is not there

    @property
    def shown(self) -> list[Table | Markup]:
        """The parts that have something to show on the page."""
        return [p for p in self.parts if (p.rows and p.medium != "text" if isinstance(p, Table) else p)]


@dataclass(frozen=True)
class Report:
    """Everything that one run of a benchmark found."""

    name: str  # of the command
    title: str
    created: datetime
    figures: Sequence[Figure]
    sections: Sequence[Section]
    context: Mapping[str, object]  # versions, machine, seeds: what is needed to run it again
    answer: Sequence[str] = ()  # the result in one sentence, by its parts
    notes: Sequence[str] = ()
    own: tuple[str, ...] = ()  # names of the rows and columns in colour
    glossary: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def tables(self) -> list[Table]:
        """The tables that have rows, in the order of the sections."""
        return [p for s in self.sections for p in s.parts if isinstance(p, Table) and p.rows]

    @property
    def targets(self) -> Table:
        """The figures as a table."""
        columns = {name: name for name in ("figure", "value", "target", "holds", "note")}
        return Table("", "figures", columns, [_figure(f) for f in self.figures])

    @property
    def summary(self) -> str:
        """How many figures hold, and the names of the others."""
        missed = [f.name for f in self.figures if not f.holds]
        held = f"{len(self.figures) - len(missed)} of {len(self.figures)} figures hold"
        return held + (f"; not {', '.join(missed)}" if missed else "")


def tabled(
    key: str, title: str, records: Iterable[T], columns: Sequence[Column[T]], among: Among = ""
) -> Table:
    """Returns a table with a row per record, keyed by its name."""
    rows = [[cell(r) for *_, cell in columns] for r in records]
    return Table(key, title, {k: heading for k, heading, _ in columns}, rows, among, keyed=True)


def grid(
    key: str, title: str, head: str, cells: Mapping[str, Mapping[str, Cell]], among: Among = ""
) -> Table:
    """Returns a table of cells by the names of rows and columns; ``head`` stands over the rows."""
    names = dict.fromkeys(name for row in cells.values() for name in row)
    rows = [[name, *(row.get(n) for n in names)] for name, row in cells.items()]
    return Table(key, title, {"row": head, **{n: n for n in names}}, rows, among, keyed=True)


def rate(value: float, *small: str, rise: float | None = None, ranked: bool = False) -> Cell:
    """Returns the cell of a share in [0, 1]; ``rise`` colours it."""
    text = plots.percent(value).translate(MINUS) if np.isfinite(value) else ""
    return Cell(value, text, tuple(filter(None, small)), rise, value if ranked else None)


def estimate(value: Estimate, *small: str) -> Cell:
    """Returns the ranked cell of an error rate with its interval."""
    return rate(value[0], span(value[1], value[2]), *small, ranked=True)._replace(value=value)


def points(value: float, *small: str) -> Cell:
    """Returns the cell of a difference of rates in percentage points."""
    return Cell(value, signed(value) if np.isfinite(value) else "", small)


def rise(value: float, *small: str, toned: bool = True) -> Cell:
    """Returns the cell of a difference of error rates: ▲ above zero, ▼ below, and ``toned`` by colour."""
    return Cell(value, marked(value), tuple(filter(None, small)), value if toned else None)


def count(value: float | None) -> Cell:
    """Returns the cell of a number of things."""
    text = "" if value is None or math.isnan(value) else f"{value:,.0f}" if math.isfinite(value) else "∞"
    return Cell(value, text)


def number(value: float, unit: str = "") -> Cell:
    """Returns the cell of a number with three digits."""
    return Cell(value, f"{plots.number(value)}{unit}" if np.isfinite(value) else "")


def signed(value: float) -> str:
    """Formats a difference of rates in percentage points, without a sign where it rounds to zero."""
    if not np.isfinite(value):
        return "–"
    return "0.0" if abs(value) < 5e-4 else f"{100 * value:+.1f}".translate(MINUS)


def marked(value: float) -> str:
    """Formats a difference of error rates with its mark; an empty string if it was not measured."""
    mark = "" if abs(value) < 5e-4 else "▲ " if value > 0 else "▼ "
    return mark + signed(value) if np.isfinite(value) else ""


def span(low: float, high: float) -> str:
    """Formats an interval of rates in per cent, without the sign; an empty string if it was not measured."""
    text = f"{100 * low:.1f}{'–' if low >= 0 else ' to '}{100 * high:.1f}".translate(MINUS)
    return text if np.isfinite(low + high) else ""


def shade(value: float, among: Iterable[float]) -> str:
    """Returns the share of the full shade for ``value``: 0 for the lowest of ``among``, 1 for the highest."""
    finite = [v for v in among if np.isfinite(v)]
    if not np.isfinite(value) or not finite:
        return "0"
    return f"{(value - min(finite)) / max(max(finite) - min(finite), SPAN):.2f}"


def html(form: str, *parts: object) -> Markup:
    """Fills ``form``, which is ours, with ``parts``; strings are escaped and invisible characters spelled."""
    visible = (plots.clean(p) if isinstance(p, str) and not isinstance(p, Markup) else p for p in parts)
    return Markup(form).format(*visible)


def joined(form: str, parts: Iterable[Sequence[object]]) -> Markup:
    """Fills ``form`` with each of ``parts``, one after the other."""
    return Markup("").join(html(form, *p) for p in parts)


def legend(words: Mapping[str, str]) -> Markup:
    """Returns what the symbols of a chart mean."""
    form = '<span><svg class="bell" width="34" height="14">{}</svg>{}</span>'
    symbols = joined(form, ((Markup(SYMBOLS[s]), w) for s, w in words.items()))
    return html('<div class="key" aria-hidden="true">{}</div>', symbols)


def bells(rows: Sequence[tuple[str, Estimate, Markup]], top: float) -> Markup:
    """Returns a chart on [0, ``top``] with a row per name: its whisker, and the estimate in words."""
    ticks = joined('<span style="left:{}%">{:g}%</span>', ((25 * q, 25 * q * top) for q in range(5)))
    line = '<span class="site" title="{0}">{0}</span>{1}<span class="v">{2} <small>{3}</small></span>\n'
    cells = ((name, whisker, plots.percent(e[0]), span(e[1], e[2])) for name, e, whisker in rows)
    lines = joined(line, cells)
    form = '<div class="bells wider"><span></span><div class="ticks" aria-hidden="true">{}</div>'
    form += "<span></span>\n{}</div>"
    return html(form, ticks, lines)


def render(report: Report) -> str:
    """Returns the whole page."""
    template = environment().get_template("bench.html.j2")
    own = Section("figures", "Figures that decide", "Each value beside its target.", [report.targets])
    pages = [*([own] if report.figures else []), *report.sections]
    return template.render(
        report=report,
        answer=report.answer or [report.summary],
        pages=pages,
        table=lambda t: _table(t, report.own),
        words=_context,
    )


def _context(value: object) -> str:
    """Returns a value of the context in words: names before their values, no brackets or quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_context(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_context(inner) for inner in value)
    return {"True": "yes", "False": "no", "None": "–"}.get(str(value), str(value))


def _table(t: Table, own: Sequence[str]) -> Markup:
    rows = [r for r in t.rows if not isinstance(r, Group)]
    values = [[_rank(c) for c in row] for row in rows]
    numeric = [any(isinstance(c, Cell) for c in column) for column in zip(*rows, strict=True)]
    kinds = [
        "n" * (n and i > 0) + " own" * (name in own)
        for i, (name, n) in enumerate(zip(t.columns.values(), numeric))
    ]
    head = joined('<th scope="col" class="{}">{}</th>', zip(kinds, t.columns.values(), strict=True))
    body, at = Markup(""), iter(range(len(rows)))
    for row in t.rows:
        if isinstance(row, Group):
            form = '<tr class="group"><th scope="rowgroup" colspan="{}"><span>{}<small>{}</small></span></th>'
            body += html(form + "</tr>\n", len(t.columns), *row)
            continue
        line = values[next(at)]
        every = {"row": line, "table": [v for other in values for v in other]}
        among = [every.get(t.among, [v[i] for v in values] if t.among else []) for i in range(len(row))]
        cells = [_cell(c, others) for c, others in zip(row[1:], among[1:], strict=True)]
        name = row[0] if isinstance(row[0], Cell) else Cell(None, row[0] or "")
        form = '<tr{}><th scope="row">{}{}</th>{}</tr>\n'
        body += html(
            form,
            Markup(" class=own") * (name.text in own),
            _breakable(name.text),
            _small(name),
            Markup("").join(cells),
        )
    form = '<div class="scroll{}" tabindex="0" role="region" aria-label="{}"><table class="data">'
    form += "<thead><tr>{}</tr></thead><tbody>\n{}</tbody></table></div>"
    return html(form, " tall" * (len(t.rows) > TALL), t.title, head, body)


def _breakable(name: str) -> Markup:
    """Returns a name that a narrow column breaks after an underscore, not within a word."""
    return Markup("_<wbr>").join(html("{}", part) for part in name.split("_"))


def _cell(c: Cell | str | None, among: Sequence[float]) -> Markup:
    """Draws a cell: coloured by its rise, or shaded ``among`` others and bold if it is the lowest of them."""
    if isinstance(c, str):
        return html('<td class="wrap">{}</td>', c)
    if c is None or not (c.text or c.drawn):
        return html('<td class="n">{}{}</td>', Markup(DASH), _small(c) if c else "")
    kind, style, text = "n", "", _marked(c.text) if c.drawn is None else c.drawn
    if c.rise is not None and np.isfinite(c.rise):
        tone = TONES.get(marked(c.rise)[:1], "same")
        kind += f" {tone}" + " harmed" * (c.rise > HARM)
        style = f"{min(1.0, abs(c.rise) / FULL):.2f}" if tone != "same" else "0"
    elif c.rank is not None and among:
        kind, style, finite = "n heat", shade(c.rank, among), [v for v in among if np.isfinite(v)]
        text = html("<b>{}</b>", text) if len(finite) > 1 and c.rank == min(finite) else text
    return html(
        '<td class="{}"{}>{}{}</td>', kind, html(' style="--h:{}"', style) if style else "", text, _small(c)
    )


def _small(c: Cell) -> Markup:
    return joined("<small>{}</small>", ((_marked(text),) for text in c.small if text))


def _marked(text: str) -> str | Markup:
    """Returns a difference with its mark in colour and hidden from screen readers; other words as is."""
    form = '<span class="rise {}"><span aria-hidden="true">{}</span>{}</span>'
    return html(form, TONES[text[0]], text[0], text[1:]) if text[:1] in TONES else text


def _rank(c: Cell | str | None) -> float:
    return c.rank if isinstance(c, Cell) and c.rank is not None else math.nan


def _figure(f: Figure) -> list[Cell | str | None]:
    """Returns the row of a figure."""
    value = "not measured" if f.measured is None else f"{f.measured:.4g}".translate(MINUS)
    target = f.target.replace("<=", "≤").replace(">=", "≥")
    tone, mark, word = ("good", "✓", "yes") if f.holds else ("bad", "✕", "no")
    form = '<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>'
    held = Cell(f.holds, word, drawn=html(form, tone, mark, word))
    return [f.name, Cell(f.measured, value), Cell(f.target, target), held, f.note]
