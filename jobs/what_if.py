"""``palisade what-if``: the recorded streams again under other settings, beside the present ones. Nothing is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.terminal import Exit, percent, table
from pipeline.control import whatif
from pipeline.control.deployment import open_ledger, source_model
from pipeline.control.replay import replay_sites
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from jobs.terminal import Terminal
    from pipeline.config import Config

SECTIONS = ("site", "bank")  # what a what-if may change
SHOWN = 40
COLUMNS = {  # heading → what of both sides stands there, and how
    "accepted %": ("accepted", percent),
    "taught bona fide": ("pseudo_bona_fide", str),
    "taught attack": ("pseudo_attack", str),
    "moved": ("trust_ratio", "{:.3f}".format),
    "HTER %": ("hter", percent),
    "BPCER %": ("bpcer", percent),
    "max APCER %": ("max_apcer", percent),
    "verdict": ("verdict", str),
}
FORMATS = (".parquet", ".json")
REAL, COUNT, TEXT = pa.float64(), pa.int64(), pa.string()
SINGLE = {
    "site": TEXT,
    "samples": COUNT,
    "labelled": COUNT,
    "flipped": REAL,
    "newly_accepted": REAL,
    "newly_refused": REAL,
    "hter_rise": REAL,
    "worse_verdict": pa.bool_(),
}
PAIRS = {
    "accepted": REAL,
    "pseudo_bona_fide": COUNT,
    "pseudo_attack": COUNT,
    "trust_ratio": REAL,
    "hter": REAL,
    "bpcer": REAL,
    "max_apcer": REAL,
    "verdict": TEXT,
    "reason": TEXT,
}
SIDES = ("now", "what_if")


def what_if(
    config: Config, changed: Config, terminal: Terminal, *, sites: Sequence[str], out: Path | None
) -> int:
    """Replay ``sites`` (default: all) under both configurations and show what would change."""
    if out and out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: allowed are files that end in {' or '.join(FORMATS)}")
    ledger = open_ledger(config, create=False)
    rows = ledger.streams.named(list(dict.fromkeys(sites))) if sites else ledger.streams.sites()
    if not rows:
        raise ValueError("no site is registered; run `palisade ingest` first")
    source = source_model(ledger)
    differences, failed = replay_sites(config, changed, ledger, source, rows, terminal)
    told = {
        "changed": whatif.changed_settings(
            *(c.model_dump(mode="json", include=set(SECTIONS)) for c in (config, changed))
        ),
        "source_version": source.version,
        "sites": [d.row() for d in differences],
        "fleet": whatif.fleet_summary(differences),
        "failed": failed,
    }
    if out:
        _write(out, told)
    _show(terminal, told, differences)
    if not differences:
        return Exit.HOLD
    return Exit.GUARD_FAILED if any(d.worse_verdict for d in differences) else Exit.DONE


def _write(path: Path, told: dict[str, object]) -> None:
    """The whole result as JSON, or its sites as a table with a column per side."""
    if path.suffix == ".json":
        text = json.dumps(told, allow_nan=False, indent=1)
        write_atomic(path, lambda tmp: tmp.write_text(text))
        return
    schema = pa.schema([*SINGLE.items(), *((f"{n}_{side}", t) for n, t in PAIRS.items() for side in SIDES)])
    rows = [
        {
            **row,
            **{
                f"{n}_{s}": v for n in PAIRS for s, v in zip(SIDES, cast("list[object]", row[n]), strict=True)
            },
        }
        for row in cast("list[dict[str, object]]", told["sites"])
    ]
    write_atomic(path, lambda tmp: pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp))


def _show(terminal: Terminal, told: dict[str, object], differences: Sequence[whatif.Difference]) -> None:
    """One line per site, worst first; why a verdict is what it is; the fleet in a sentence."""
    flips = ["newly accepted %", "newly refused %"]
    rows = [
        [
            d.site,
            d.samples,
            percent(d.newly_accepted),
            percent(d.newly_refused),
            *(_pair(d, name, form) for name, form in COLUMNS.values()),
        ]
        for d in differences[:SHOWN]
    ]
    title = f"recorded streams from source v{told['source_version']}, now → what-if: {_changes(told)}"
    shown: list[Table | str] = [table(title, ["site", "samples", *flips, *COLUMNS], rows)] if rows else []
    if len(differences) > SHOWN:
        shown.append(f"and {len(differences) - SHOWN} more; --out writes all")
    worse = [d for d in differences if d.worse_verdict]
    shown += [f"{d.site}: would {d.what_if.verdict}: {d.what_if.reason}" for d in worse[:SHOWN]]
    terminal.result(told, *shown, _summary(told))


def _pair(d: whatif.Difference, name: str, form: Callable[[float], str | None]) -> str | None:
    both = [getattr(side, name) for side in (d.now, d.what_if)]
    said = [None if x is None else form(x) for x in both]
    return f"{said[0]} → {said[1]}" if None not in said else None


def _changes(told: dict[str, object]) -> str:
    changed = cast("dict[str, list[object]]", told["changed"])
    both = {k: v for k, v in changed.items() if None not in v}
    return ", ".join(f"{k} {now} → {then}" for k, (now, then) in both.items()) or "nothing is different"


def _summary(told: dict[str, object]) -> str:
    fleet = cast("dict[str, object]", told["fleet"])
    mean = cast("dict[str, list[float | None]]", fleet["mean"])
    failed = cast("dict[str, str]", told["failed"])
    said = [f"{fleet['sites']} sites replayed, {len(failed)} not"]
    if fleet["labelled_sites"]:
        harmed, improved = (percent(cast("float", fleet[k])) for k in ("harmed", "improved"))
        said.append(
            f"mean HTER {percent(mean['hter'][0])} → {percent(mean['hter'][1])} % over {fleet['labelled_sites']} with sealed "
            f"labels; {harmed} % of them harmed and {improved} % improved by more than {100 * whatif.HARM:g} point"
        )
    worse = cast("list[str]", fleet["worse_verdicts"])
    return "; ".join([*said, f"{len(worse)} verdicts would be worse"])
