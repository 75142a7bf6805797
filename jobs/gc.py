"""``palisade gc``: delete what crashed writers left and what nothing points to any more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.deployment import lease, now, open_ledger
from pipeline.data.features import offset_range
from pipeline.ledger import CycleBusy
from pipeline.storage import TEMPORARY, files

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from datetime import datetime

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, Needed
    from pipeline.storage import StoredFile

    Garbage = dict[str, list[StoredFile]]

KINDS = ("states", "outcomes", "features", "temporary")
AT_ONCE = 16  # a store answers a deletion in tens of milliseconds
SAMPLES = 5  # names that --json shows of each kind


def gc(
    config: Config, terminal: Terminal, *, dry_run: bool, keep_days: int | None, grace_hours: float
) -> int:
    """Delete, or with ``dry_run`` only count. ``keep_days`` None: as ``data.keep_days`` says.

    What is younger than the grace stays: a blob is written before the ledger is told of it. No cycle runs meanwhile.
    """
    ledger = open_ledger(config, create=False)
    keep = config.data.keep_days if keep_days is None else keep_days
    if dry_run:
        found = garbage(
            config, ledger, at=now(), keep=timedelta(days=keep), grace=timedelta(hours=grace_hours)
        )
        return _show(terminal, found, "would be deleted")
    if left := [c for c in ledger.cycles.history() if c.status == "running" and c.kind != "gc"]:
        again = "cycle" if left[0].kind not in ("ingest", "adapt") else left[0].kind
        raise CycleBusy(
            f"{left[0].id} has not ended; wait for it, or end it with `palisade {again}`, then run gc again"
        )
    with lease(config, ledger, "gc") as held:
        found = garbage(
            config, ledger, at=now(), keep=timedelta(days=keep), grace=timedelta(hours=grace_hours)
        )
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(
                lambda f: f.place.unlink(missing_ok=True), (f for kind in KINDS for f in found[kind])
            ):
                pass
        ledger.cycles.finish(held, summary={k: len(v) for k, v in found.items()}, now=now())
    return _show(terminal, found, "deleted")


def garbage(config: Config, ledger: Ledger, *, at: datetime, keep: timedelta, grace: timedelta) -> Garbage:
    """What may go, by kind. The ledger is asked after the files were listed, so that it knows of all that it ever will."""
    listed = list(files(config.place()))
    pointed = ledger.garbage.needed(since=at - keep)
    trunks = {s.trunk[:16] for s in ledger.sources.all()}
    return condemned(listed, pointed, trunks, before=at - grace)


def condemned(
    listed: Iterable[StoredFile], pointed: Needed, trunks: Collection[str], *, before: datetime
) -> Garbage:
    """Those of ``listed`` that were written earlier than ``before`` and that nothing needs; a name that is not ours stays."""
    found: Garbage = {kind: [] for kind in KINDS}
    for file in listed:
        kind = file.inside[0]
        if file.at >= before:
            continue
        if file.place.name.startswith(TEMPORARY):
            found["temporary"].append(file)
        elif kind in ("states", "outcomes"):
            digests = pointed.states if kind == "states" else pointed.outcomes
            if file.place.name.endswith(".safetensors") and file.place.stem not in digests:
                found[kind].append(file)
        elif kind == "features" and not _needed(file, pointed, trunks):
            found[kind].append(file)
    return found


def _needed(file: StoredFile, pointed: Needed, trunks: Collection[str]) -> bool:
    """A feature file is needed from its site's first needed offset on, under every trunk that a version has."""
    _, trunk, folder, *_ = (*file.inside, "", "")
    span, site = offset_range(file.place), folder.removeprefix("site=")
    if span is None or not folder.startswith("site="):
        return True
    return trunk in trunks and site in pointed.features and span[1] > pointed.features[site]


def _show(terminal: Terminal, found: Garbage, what: str) -> int:
    counts = {k: {"files": len(v), "bytes": sum(f.size for f in v)} for k, v in found.items()}
    rows = [[k, c["files"], f"{c['bytes'] / 2**20:.1f}"] for k, c in counts.items()]
    total = sum(c["files"] for c in counts.values()), sum(c["bytes"] for c in counts.values())
    terminal.result(
        {
            "what": what,
            "files": total[0],
            "bytes": total[1],
            **counts,
            "names": {k: ["/".join(f.inside) for f in v[:SAMPLES]] for k, v in found.items()},
        },
        table(what, ["kind", "files", "MiB"], rows),
        f"{total[0]} files, {total[1] / 2**20:.1f} MiB {what}",
    )
    return Exit.DONE
