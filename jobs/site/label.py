"""``palisade site label`` and ``unlabel``: what people know of presentations, and what they take back."""

from __future__ import annotations

import csv
import getpass
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.deployment import now, open_ledger
from pipeline.control.labels import record_files
from pipeline.data.presentations import KINDS, PREFIX, SCHEMA, read_label_file, write_label_file
from pipeline.storage import place, write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobs.terminal import Terminal
    from pipeline.config import Config

SHOWN = 20  # bad rows that are printed


def label(
    config: Config, terminal: Terminal, *, site: str, file: Path, kind: str | None, actor: str | None
) -> int:
    """Writes the rows of ``file`` as the site's next label file and records it."""
    if config.data.labels is None:
        raise ValueError("data.labels: not set; name the folder in which label files are kept")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--kind {kind!r}: allowed are {', '.join(KINDS)}")
    ledger = open_ledger(config, create=False)
    ledger.streams.site(site)
    who = actor or getpass.getuser()
    with tempfile.TemporaryDirectory() as folder:
        checked = _as_label_file(file, Path(folder) / "labels.parquet", kind=kind, who=who)
        read, content = read_label_file(checked, site=site), checked.read_bytes()
    if read.bad:
        bad = [[b.row + 1, b.sample_id, b.reason] for b in read.bad]
        terminal.result(
            {"site": site, "recorded": 0, "bad": [dict(zip(("row", "sample_id", "reason"), b)) for b in bad]},
            table("bad rows", ["row", "sample", "reason"], bad[:SHOWN]),
            f"{file}: {len(bad)} of {read.rows} rows are bad; nothing was recorded",
        )
        return Exit.USAGE
    known = ledger.labels.file_names([site]).get(site, set())
    if (name := f"{PREFIX}-{read.sha256[:16]}.parquet") in known:
        terminal.result({"site": site, "recorded": 0}, f"{site}: these labels are recorded already")
        return Exit.DONE
    target = place(config.data.labels) / site / name
    write_atomic(target, content)
    record_files(ledger, terminal, {site: [target]}, cycle="site label")
    terminal.result({"site": site, "recorded": read.rows}, f"{site}: {read.rows} labels recorded, by {who}")
    return Exit.DONE


def unlabel(
    config: Config, terminal: Terminal, *, site: str, samples: Sequence[str], reason: str, actor: str | None
) -> int:
    """Retracts the labels of ``samples``."""
    ledger = open_ledger(config, create=False)
    ledger.streams.site(site)
    who = actor or getpass.getuser()
    count = ledger.labels.retract(site, samples, by=who, reason=reason, now=now())
    terminal.result({"site": site, "retracted": count}, f"{site}: {count} labels retracted, by {who}")
    return Exit.DONE


def _as_label_file(file: Path, made: Path, *, kind: str | None, who: str) -> Path:
    """Returns ``file`` if it is Parquet, else its CSV rows as a label file at ``made``; raises ValueError."""
    if file.suffix.lower() == ".parquet":
        if kind is not None:
            raise ValueError("--kind: a Parquet file says it per row, in its column kind")
        return file
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = [_complete(row, kind=kind, who=who) for row in csv.DictReader(text)]
    except (OSError, csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: cannot be read: {' '.join(str(e).split())[:200]}") from None
    write_label_file(made, rows)
    return made


def _complete(row: Mapping[str, str | None], *, kind: str | None, who: str) -> dict[str, object]:
    """Returns a row as SCHEMA has it; what the file leaves out comes from the options."""
    if odd := sorted(set(row) - set(SCHEMA.names) - {None}):
        raise ValueError(f"column {odd[0]!r}: allowed are {', '.join(SCHEMA.names)}")
    text = {n: v for n, v in row.items() if n and v and n != "labelled_at"}
    return {"kind": kind, "who": who, **text, "labelled_at": _time(row.get("labelled_at"))}


def _time(text: str | None) -> datetime:
    if not text:
        return now()
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"labelled_at {text[:40]!r}: write it as 2026-05-04T12:00:00Z") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)
