"""Shows a benchmark's report on the terminal, as JSON, as a page and as Markdown in this folder's README."""

from __future__ import annotations

import os
import platform
import re
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from jobs.terminal import Exit, table
from pipeline.config import methods
from pipeline.report.bench import Cell, Group, Section, render
from pipeline.report.page import publish
from pipeline.revision import code_revision

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from markupsafe import Markup

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.report.bench import Report, Table

LIBRARIES = ("torch", "ray", "numpy", "pyarrow", "scikit-learn")
README = Path(__file__).with_name("README.md")
WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text())


def conclude(config: Config, terminal: Terminal, report: Report, *, write: bool = False) -> int:
    """Publishes the page, prints everything, with ``write`` into README.md; 0 if all figures hold, else 3."""
    quick = "-quick" if report.context.get("quick") else ""
    page = config.folder("reports", f"bench-{report.name}{quick}.html")
    publish(render(report), page)
    if write:
        write_section(README, report)
    figures = {f.name: {"value": f.measured, "target": f.target, "holds": f.holds} for f in report.figures}
    context = {**report.context, **{t.key: rows_of(t) for t in report.tables if t.key}, "page": str(page)}
    shown = [table(t.title, *cells_of(t)) for t in text_tables(report)]
    terminal.result({"figures": figures, "context": context}, *shown, f"page: {page}", report.summary)
    return Exit.DONE if all(f.holds for f in report.figures) else Exit.HOLD


def context(name: str, started: float, *, quick: bool, **more: object) -> dict[str, object]:
    """Returns where and with what the figures were measured; ``started`` is a ``time.monotonic``."""
    return {
        "command": f"palisade bench {name}{' --quick' * quick}",
        "revision": code_revision(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "processor": _processor(),
        "quick": quick,
        **more,
        "seconds": round(time.monotonic() - started, 1),
    }


def section(bench: str, key: str, parts: Sequence[Table | Markup], why: str = "", **facts: object) -> Section:
    """Returns a section around ``parts`` with the words of words.yaml, whose braces ``facts`` fill."""
    words = WORDS["sections"][bench][key]
    intro, note = (words.get(name, "").format(**facts) for name in ("intro", "note"))
    return Section(key, words["title"], intro, parts, note, why)


def notes(bench: str, **facts: object) -> list[str]:
    """Returns what a reader should know before the first number."""
    return [note.format(**facts) for note in WORDS["notes"][bench]]


def glossary(kind: str, names: Iterable[str]) -> dict[str, str]:
    """Returns the terms of the pages after the first line of each method's documentation."""
    modules = {n: import_module(f"pipeline.{kind}.methods.{n}") for n in sorted({*names} & {*methods(kind)})}
    return {n: (m.__doc__ or "").split("\n")[0] for n, m in modules.items()} | WORDS["glossary"]


def rows_of(t: Table) -> Mapping[str, object] | Sequence[object]:
    """Returns a table for JSON: an object per row by the columns' keys, with the heading above it."""
    records: dict[str, dict[str, object]] = {}
    group = ""
    for at, row in enumerate(t.rows):
        if isinstance(row, Group):
            group = row.title
            continue
        values = [c.value if isinstance(c, Cell) else c for c in row]
        record: dict[str, object] = {t.grouped: group} if group else {}
        inner: dict[str, dict[str, object]] = {}
        for key, value in zip(t.columns, values, strict=True):
            outer, _, last = key.partition(".")
            (inner.setdefault(outer, {}) if last else record)[last or outer] = value
        records[str(values[0]) if t.keyed else str(at)] = record | inner
    return records if t.keyed else list(records.values())


def text_tables(report: Report) -> list[Table]:
    """Returns the tables that terminal and Markdown show, the figures last."""
    return [*(t for t in report.tables if t.medium != "page"), report.targets]


def cells_of(t: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the headings and the rows of a table in words."""
    kept = [i for i, key in enumerate(t.columns) if not t.shown or key in t.shown]
    heads = list(t.columns.values())
    rows = [
        [r.title, *[""] * (len(kept) - 1)] if isinstance(r, Group) else [_words(r[i]) for i in kept]
        for r in t.rows
    ]
    return [heads[i] for i in kept], rows


def markdown(report: Report) -> str:
    """Returns the tables of a report with when, where and how they were measured."""
    c = report.context
    where = f"Measured on {report.created:%d %B %Y} by `{c['command']}` on {c['cores']} cores"
    how = f"({c['processor']}), seeds {c['seeds']}, revision {str(c['revision'])[:12]}"
    parts = [f"{where} {how}; {report.summary}."]
    for t in text_tables(report):
        heads, rows = cells_of(t)
        lines = [heads, ["---"] * len(heads), *rows]
        escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        parts += [f"**{t.title}**", "\n".join(f"| {' | '.join(line)} |" for line in escaped)]
    return "\n\n".join(parts)


def write_section(path: Path, report: Report) -> None:
    """Replaces the tables of this benchmark in ``path``; ValueError if it has no markers for them."""
    begin, end = (f"<!-- {word} of palisade bench {report.name} -->" for word in ("begin", "end"))
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path}: needs one line {begin} and one line {end}")
    written = f"{begin}\n\n{markdown(report)}\n\n{end}"
    path.write_text(text[: text.index(begin)] + written + text[text.index(end) + len(end) :])


def _words(cell: Cell | str | None) -> str:
    if not isinstance(cell, Cell):
        return cell or "-"
    return (cell.text or "-") + (f" [{cell.small[0]}]" if any(cell.small[:1]) else "")


def _processor() -> str:
    """Returns the model of the processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine()
