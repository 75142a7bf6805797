"""``palisade what-if``: replays recorded streams under other settings beside the present ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.terminal import Exit, percent, table
from pipeline.control import whatif
from pipeline.control.deployment import open_ledger, source_model
from pipeline.control.replay import replay_sites
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.table import Table

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.control.whatif import Difference, FleetDifference

SECTIONS = ("site", "bank")  # sections that a what-if may change
SHOWN = 40  # sites that the terminal lists
COLUMNS: dict[str, tuple[str, Callable[[float], str | None]]] = {  # heading → (field of both sides, format)
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


@dataclass(frozen=True)
class WhatIf:
    """Result of one what-if over the fleet."""

    changed: Mapping[str, tuple[object, object]]  # settings that differ: section.key → (now, what-if)
    source_version: int
    differences: Sequence[Difference]  # the worst site first
    fleet: FleetDifference
    failed: Mapping[str, str]  # sites that could not be replayed, with the reason

    def to_json(self) -> dict[str, object]:
        """Returns the result for ``--json`` and ``--out``."""
        return {
            "changed": self.changed,
            "source_version": self.source_version,
            "sites": [d.row() for d in self.differences],
            "fleet": self.fleet.to_json(),
            "failed": self.failed,
        }


def what_if(
    config: Config, changed: Config, terminal: Terminal, *, sites: Sequence[str], out: Path | None
) -> int:
    """Replays ``sites`` (default: all) under ``config`` and under ``changed`` and shows the differences."""
    if out and out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: allowed are files that end in {' or '.join(FORMATS)}")
    ledger = open_ledger(config, create=False)
    rows = ledger.streams.named(list(dict.fromkeys(sites))) if sites else ledger.streams.sites()
    if not rows:
        raise ValueError("no site is registered; run `palisade ingest` first")
    source = source_model(ledger)
    differences, failed = replay_sites(config, changed, ledger, source, rows, terminal)
    settings = [c.model_dump(mode="json", include=set(SECTIONS)) for c in (config, changed)]
    result = WhatIf(
        whatif.changed_settings(*settings),
        source.version,
        differences,
        whatif.fleet_summary(differences),
        failed,
    )
    if out:
        _write(out, result)
    _show(terminal, result)
    if not differences:
        return Exit.HOLD
    return Exit.GUARD_FAILED if result.fleet.worse_verdicts else Exit.DONE


def _write(path: Path, result: WhatIf) -> None:
    """Writes the whole result as JSON, or its sites as a table with a column per side."""
    if path.suffix == ".json":
        text = json.dumps(result.to_json(), allow_nan=False, indent=1)
        write_atomic(path, lambda tmp: tmp.write_text(text))
        return
    schema = pa.schema([*SINGLE.items(), *((f"{n}_{side}", t) for n, t in PAIRS.items() for side in SIDES)])
    rows: list[dict[str, object]] = []
    for difference in result.differences:
        row = difference.row()
        sides = [side.row() for side in (difference.now, difference.what_if)]
        pairs = {f"{n}_{name}": side[n] for n in PAIRS for name, side in zip(SIDES, sides, strict=True)}
        rows.append({**{n: row[n] for n in SINGLE}, **pairs})
    write_atomic(path, lambda tmp: pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp))


def _show(terminal: Terminal, result: WhatIf) -> None:
    """Shows a line per site, the worst first, the reasons of worse verdicts, and a sentence on the fleet."""
    flips = ["newly accepted %", "newly refused %"]
    rows = [
        [
            d.site,
            d.samples,
            percent(d.newly_accepted),
            percent(d.newly_refused),
            *(_pair(d, field, form) for field, form in COLUMNS.values()),
        ]
        for d in result.differences[:SHOWN]
    ]
    title = (
        f"recorded streams from source v{result.source_version}, now → what-if: {_changes(result.changed)}"
    )
    parts: list[Table | str] = [table(title, ["site", "samples", *flips, *COLUMNS], rows)] if rows else []
    if len(result.differences) > SHOWN:
        parts.append(f"and {len(result.differences) - SHOWN} more; --out writes all")
    worse = [d for d in result.differences if d.worse_verdict]
    parts += [f"{d.site}: would {d.what_if.verdict}: {d.what_if.reason}" for d in worse[:SHOWN]]
    terminal.result(result.to_json(), *parts, _summary(result))


def _pair(d: Difference, field: str, form: Callable[[float], str | None]) -> str | None:
    values = [getattr(side, field) for side in (d.now, d.what_if)]
    before, after = (None if v is None else form(v) for v in values)
    return None if before is None or after is None else f"{before} → {after}"


def _changes(changed: Mapping[str, tuple[object, object]]) -> str:
    pairs = [
        f"{k} {before} → {after}" for k, (before, after) in changed.items() if None not in (before, after)
    ]
    return ", ".join(pairs) or "nothing is different"


def _summary(result: WhatIf) -> str:
    fleet = result.fleet
    parts = [f"{fleet.sites} sites replayed, {len(result.failed)} not"]
    if fleet.labelled_sites:
        before, after = (percent(x) for x in fleet.means["hter"])
        parts.append(
            f"mean HTER {before} → {after} % over {fleet.labelled_sites} with sealed labels; "
            f"{percent(fleet.harmed)} % of them harmed and {percent(fleet.improved)} % improved "
            f"by more than {100 * whatif.HARM:g} point"
        )
    return "; ".join([*parts, f"{len(fleet.worse_verdicts)} verdicts would be worse"])
