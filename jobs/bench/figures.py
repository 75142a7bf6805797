"""What every ``palisade bench`` ends with: figures against their targets, and where they were measured."""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.revision import code_revision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from jobs.terminal import Terminal

LIBRARIES = ("torch", "ray", "numpy", "pyarrow", "scikit-learn")


@dataclass(frozen=True)
class Figure:
    """One number that was promised: ``limit`` is the most it may be, or the least where ``least``."""

    name: str
    value: float | None  # None or NaN: could not be measured, and does not hold
    limit: float
    least: bool
    note: str
    strict: bool = False  # the limit itself is not enough

    @property
    def measured(self) -> float | None:
        return None if self.value is None or not math.isfinite(self.value) else float(self.value)

    @property
    def target(self) -> str:
        return f"{'>' if self.least else '<'}{'' if self.strict else '='} {self.limit:g}"

    @property
    def holds(self) -> bool:
        if self.measured is None:
            return False
        past = self.measured - self.limit if self.least else self.limit - self.measured
        return past > 0 if self.strict else past >= 0


def conclude(
    terminal: Terminal, figures: Sequence[Figure], context: dict[str, object], *shown: Table | str
) -> int:
    """Print everything; 0 when every figure holds, 3 otherwise."""
    found = {f.name: {"value": f.measured, "target": f.target, "holds": f.holds} for f in figures}
    rows = [
        [
            f.name,
            "not measured" if f.measured is None else f"{f.measured:.4g}",
            f.target,
            "yes" if f.holds else "no",
            f.note,
        ]
        for f in figures
    ]
    missed = [f.name for f in figures if not f.holds]
    said = f"{len(figures) - len(missed)} of {len(figures)} figures hold" + (
        f"; not {', '.join(missed)}" if missed else ""
    )
    terminal.result(
        {"figures": found, "context": context},
        *shown,
        table("figures", ["figure", "value", "target", "holds", ""], rows),
        said,
    )
    return Exit.HOLD if missed else Exit.DONE


def context(started: float, **more: object) -> dict[str, object]:
    """Where and with what the figures were measured; ``started`` is a ``time.monotonic``."""
    return {
        "revision": code_revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        **more,
        "seconds": round(time.monotonic() - started, 1),
    }
