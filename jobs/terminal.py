"""The command line's shared floor: what a job is given, how it shows progress and how it ends."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    Advance = Callable[[int, int], None]


SIGNS = "+-−≤≥▲▼ "  # before the digits of a number


class Exit(IntEnum):
    """Exit codes of every command; they are part of the interface."""

    DONE = 0
    USAGE = 2
    HOLD = 3
    GUARD_FAILED = 4
    INFRASTRUCTURE = 5


@dataclass(frozen=True)
class Terminal:
    """Where a job speaks: results on stdout (one JSON object with ``--json``), progress and remarks on
    stderr.
    """

    as_json: bool = False
    out: Console = field(default_factory=lambda: _console(sys.stdout))
    err: Console = field(default_factory=lambda: _console(sys.stderr))

    def say(self, text: str) -> None:
        """A remark for a person."""
        self.err.print(text, markup=False)

    def result(self, data: Mapping[str, object], *shown: Table | str) -> None:
        """The outcome: ``data`` with ``--json``, else what is ``shown``."""
        if self.as_json:
            print(json.dumps(_known(data), default=str, allow_nan=False), file=self.out.file)
        for part in () if self.as_json else shown:
            if isinstance(part, str):
                self.out.print(part, markup=False)
            else:
                self.out.print(part)
        self.out.file.flush()  # whoever follows a job reads it now

    @contextmanager
    def progress(self, label: str, unit: str = "") -> Generator[Advance, None, None]:
        """Yield ``advance(done, total)``: a bar on a terminal, else a plain line every few seconds."""
        if self.err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
            with Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.err, transient=True
            ) as bar:
                task = bar.add_task(label, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
            return
        started = spoken = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal spoken
            now = time.monotonic()
            if now - spoken >= 5:
                spoken = now
                self.say(f"{label}: {done}/{total} {unit} after {now - started:.0f} s".replace("  ", " "))

        yield line


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A result table: words to the left, columns of numbers to the right."""
    result = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        cells = [str(row[i]) for row in rows if row[i] is not None]
        numbers = i > 0 and all(cell == "-" or cell.lstrip(SIGNS)[:1].isdigit() for cell in cells)
        result.add_column(name, justify="right" if numbers else "left", no_wrap=i == 0, overflow="fold")
    for row in rows:
        result.add_row(*("-" if cell is None else str(cell) for cell in row))
    return result


def _known(data: object) -> object:
    """``data`` with null for every number that is not one: JSON has no NaN."""
    if isinstance(data, dict):
        return {k: _known(v) for k, v in cast("dict[object, object]", data).items()}
    if isinstance(data, list | tuple):
        return [_known(v) for v in cast("Sequence[object]", data)]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _console(stream: TextIO) -> Console:
    wide = None if stream.isatty() else 200  # a pipe has no width to wrap at
    return Console(file=stream, highlight=False, width=wide, soft_wrap=wide is not None)


def percent(x: float | None) -> str | None:
    """0.0312 → '3.1'; None stays None."""
    return None if x is None or x != x else f"{100 * x:.1f}"
