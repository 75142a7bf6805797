"""``palisade site commission``: what to present at a site, what has arrived, and its candidate."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from jobs.adapt import adapt
from jobs.terminal import Exit, table
from pipeline.control.commissioning import Commissioning, commissioning
from pipeline.control.deployment import open_ledger
from pipeline.stats.metrics import clopper_pearson

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.guards.records import Judged


def commission(
    config: Config, terminal: Terminal, *, site: str | None, file: Path | None, dry_run: bool
) -> int:
    """Shows how far the sites are; makes candidates of those that miss nothing unless ``dry_run``.

    Exit HOLD while something is missing everywhere, else what the verdicts say.
    """
    if (site is None) == (file is None):
        raise ValueError("site commission: write either SITE or --from FILE.csv with a column site")
    sites = [site] if site is not None else _listed(file) if file else []
    ledger = open_ledger(config, create=False)
    found = [commissioning(config, ledger, s) for s in sites]
    ready = [c.site for c in found if not c.missing]
    tables = [_table(c) for c in found]
    lines = [_line(c) for c in found]
    if dry_run or not ready:
        terminal.result({"sites": [_json(c) for c in found]}, *tables, *lines)
        return Exit.DONE if len(ready) == len(found) else Exit.HOLD
    for shown in tables:
        terminal.err.print(shown)
    for line in lines:
        terminal.say(line)
    return adapt(config, terminal, sites=ready)


def _table(c: Commissioning) -> Table:
    rows = [[what, n, c.arrived[what], c.missing.get(what)] for what, n in c.asked.items()]
    extra = [[what, None, n, None] for what, n in c.arrived.items() if what not in c.asked and n]
    return table(f"commissioning of {c.site}", ["present", "asked", "arrived", "missing"], [*rows, *extra])


def _line(c: Commissioning) -> str:
    """Returns what is known of the site's gain, and the next step."""
    waiting = f"{c.waiting} labels wait for their captures; `palisade ingest`. " if c.waiting else ""
    gain = ""
    if c.gain:
        parts = [("bona fide", c.gain.bona_fide), ("attacks", c.gain.attack)]
        gain = "On those that judge: " + ", ".join(_judged(n, j) for n, j in parts if j.n) + ". "
    if c.missing:
        names = ", ".join(f"{n} {what}" for what, n in c.missing.items())
        then = f"then `palisade site label {c.site} --from FILE`"
        return f"{c.site}: {waiting}{gain}Still to present: {names}; {then}."
    return f"{c.site}: {waiting}{gain}Nothing is missing; without --dry-run its candidate is made and judged."


def _judged(name: str, j: Judged) -> str:
    low, high = clopper_pearson(j.errors, j.n)
    return f"{name} {j.errors_before} → {j.errors} errors of {j.n} [{float(low):.0%}–{float(high):.0%}]"


def _json(c: Commissioning) -> dict[str, object]:
    gain = c.gain.model_dump() if c.gain else None
    return {
        "site": c.site,
        "asked": dict(c.asked),
        "arrived": dict(c.arrived),
        "missing": c.missing,
        "waiting": c.waiting,
        "gain": gain,
    }


def _listed(file: Path) -> Sequence[str]:
    """Returns the sites of a CSV file with a column ``site``; raises ValueError."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            sites = [row.get("site") or "" for row in csv.DictReader(text)]
    except (OSError, csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: cannot be read: {' '.join(str(e).split())[:200]}") from None
    if not sites or not all(sites):
        raise ValueError(f"{file}: a column site with an id in every row is needed")
    return list(dict.fromkeys(sites))
