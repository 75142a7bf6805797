"""``palisade replay``: the recorded streams again under other settings, beside the present ones. Nothing is recorded.

Every site starts from the source model, as its first cycle did, and is fed its whole stored stream since then in one go:
predict, then learn. A verdict is that of the state at the end, with the source model as champion and fresh evidence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.terminal import Exit, percent, table
from pipeline.control import whatif
from pipeline.control.deployment import open_ledger, source_model
from pipeline.control.judge import Window, features_of, judge, slot_of, stream_scores
from pipeline.control.scoring import site_labels
from pipeline.data.anchor import open_sealed
from pipeline.data.blobs import BadBlob
from pipeline.data.features import read_features
from pipeline.ledger import LedgerError
from pipeline.models import checkpoint
from pipeline.site import bank
from pipeline.storage import write_atomic
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.data.anchor import AnchorSet
    from pipeline.data.features import FeatureBlock
    from pipeline.guards import Evidence, Verdict
    from pipeline.ledger import Ledger, SiteRow, SourceRow
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import SiteMethod, State

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
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    pa.ArrowException,
)  # BadBlob, and columns of another kind
STRIDE = 32  # steps between two signs of progress
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


class Recording(NamedTuple):
    """What is stored of one site."""

    row: SiteRow
    block: FeatureBlock
    truth: whatif.Truth


def replay(
    config: Config, what_if: Config, terminal: Terminal, *, sites: Sequence[str], out: Path | None
) -> int:
    """Replay ``sites`` (default: all) under both configurations and show what would change."""
    if out and out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: allowed are files that end in {' or '.join(FORMATS)}")
    ledger = open_ledger(config, create=False)
    rows = ledger.streams.named(list(dict.fromkeys(sites))) if sites else ledger.streams.sites()
    if not rows:
        raise ValueError("no site is registered; run `palisade ingest` first")
    source = source_model(ledger)
    differences, failed = _compared(config, what_if, ledger, source, rows, terminal)
    told = {
        "changed": whatif.changed_settings(
            *(c.model_dump(mode="json", include=set(SECTIONS)) for c in (config, what_if))
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


def _compared(
    config: Config,
    what_if: Config,
    ledger: Ledger,
    source: SourceRow,
    rows: Sequence[SiteRow],
    terminal: Terminal,
) -> tuple[list[whatif.Difference], dict[str, str]]:
    """(sites worst first, reason by site of those that could not be replayed)."""
    torch.set_num_threads(1)  # as the shards compute
    model = checkpoint.load(source.path)
    anchor = _anchor(config, ledger, source, terminal)
    for c in (config, what_if):
        cast("SiteMethod", c.site).init(
            model.tail
        )  # a method that cannot start says so before anything is computed
    total, done = 2 * sum(s.good for r in rows for s, _ in ledger.streams.segments(r.site)), 0
    size = max(config.bank.slots, what_if.bank.slots)
    found: list[whatif.Difference] = []
    failed: dict[str, str] = {}

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        advance(done, max(done, total))

    with terminal.progress("replay", "samples") as advance:
        for start in range(0, len(rows), size):
            part: list[Recording] = []
            for row in rows[start : start + size]:
                try:
                    part.append(_recording(config, ledger, model, row))
                except UNREADABLE as e:
                    failed[row.site] = " ".join(str(e).split())[:300]
            now = _replayed(config, model, anchor, part, slots=len(rows), on_samples=count)
            then = _replayed(what_if, model, anchor, part, slots=len(rows), on_samples=count)
            found += [
                whatif.compare_site(r.row.site, a, b, r.truth, model.manifest.threshold)
                for r, a, b in zip(part, now, then, strict=True)
            ]
    for site, reason in failed.items():
        terminal.say(f"warning: {site}: not replayed: {reason}")
    return whatif.worst_first(found), failed


def _anchor(config: Config, ledger: Ledger, source: SourceRow, terminal: Terminal) -> AnchorSet | None:
    try:
        digest = ledger.verdicts.anchor(source.trunk)
    except LedgerError as e:
        terminal.say(f"warning: no verdicts: {e}")
        return None
    return open_sealed(config.place("anchors"), digest)


def _recording(config: Config, ledger: Ledger, model: SourceModel, row: SiteRow) -> Recording:
    """The samples that have features of this source model, all of them or BadBlob, with their sealed labels."""
    manifest = model.manifest
    block = read_features(
        config.place("features"),
        manifest.trunk_digest,
        row.site,
        start=0,
        end=row.ingested,
        features=manifest.config.trunk.features,
    )
    if not len(block):
        raise BadBlob("no stored features of this source model; run `palisade ingest` first")
    first = int(block.offset[0])
    want = sum(s.good for s, _ in ledger.streams.segments(row.site) if s.base_offset + s.rows > first)
    if len(block) != want:
        raise BadBlob(f"{len(block)} of the {want} samples since offset {first} have features; ingest again")
    known = site_labels(config.data.sealed, row.site)
    found = [known.get(str(s), (-1, "unknown")) for s in block.sample_id]
    truth = whatif.Truth(np.array([k[0] for k in found]), np.array([k[1] for k in found], np.str_))
    return Recording(row, block, truth)


def _replayed(
    config: Config,
    model: SourceModel,
    anchor: AnchorSet | None,
    recordings: Sequence[Recording],
    *,
    slots: int,
    on_samples: Callable[[int], None],
) -> list[whatif.ReplayedSite]:
    """Every recording from the source model's own state, ``bank.slots`` at a time; at most ``slots`` are needed."""
    method = cast("SiteMethod", config.site)
    fresh = method.init(model.tail)
    found: list[whatif.ReplayedSite] = []
    for start in range(0, len(recordings), config.bank.slots):
        part = recordings[start : start + config.bank.slots]
        states, traces = _run(config, model, fresh, part, min(config.bank.slots, slots), on_samples)
        windows = [Window(r.row, r.block, fresh, fresh, None, None, 0.0) for r in part]
        judged = _judged(config, model, anchor, windows, states, traces) if anchor else []
        verdicts = [verdict for _, verdict in judged] or [None] * len(part)
        found += [
            whatif.ReplayedSite(trace, bank.distance(model.tail, states, k), verdict)
            for k, (trace, verdict) in enumerate(zip(traces, verdicts, strict=True))
        ]
    return found


def _judged(
    config: Config,
    model: SourceModel,
    anchor: AnchorSet,
    windows: Sequence[Window],
    states: State,
    traces: Sequence[bank.Trace],
) -> list[tuple[Evidence, Verdict]]:
    scored = [
        stream_scores(model, w, slot_of(states, k), features_of(w.block)) for k, w in enumerate(windows)
    ]
    return judge(config, model, anchor, windows, states, traces, scored=scored)


def _run(
    config: Config,
    model: SourceModel,
    fresh: State,
    part: Sequence[Recording],
    slots: int,
    on_samples: Callable[[int], None],
) -> tuple[State, list[bank.Trace]]:
    """``bank.run`` in strides of whole batches, which changes no bit and shows how far it is."""
    method, batch = cast("SiteMethod", config.site), config.bank.batch_size
    streams = [features_of(r.block) for r in part]
    states = bank.stack([fresh for _ in part])
    parts: list[list[bank.Trace]] = [[] for _ in part]
    for start in range(0, max(len(s.z) for s in streams), batch * STRIDE):
        here = [Features(*(t[start : start + batch * STRIDE] for t in s)) for s in streams]
        states, traces = bank.run(method, model.tail, states, here, batch=batch, slots=slots)
        for kept, trace in zip(parts, traces, strict=True):
            kept.append(trace)
        on_samples(sum(len(h.z) for h in here))
    return states, [bank.Trace(*map(torch.cat, zip(*p, strict=True))) for p in parts]


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
