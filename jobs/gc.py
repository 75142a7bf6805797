"""``palisade gc``: deletes files that crashed writers left and files that nothing points to any more."""

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
    """Deletes garbage, or with ``dry_run`` only counts it; ``keep_days`` None means ``data.keep_days``.

    A file younger than the grace stays: a blob is written before the ledger points to it. No cycle may run
    meanwhile.
    """
    ledger = open_ledger(config, create=False)
    keep = config.data.keep_days if keep_days is None else keep_days
    period = {"keep": timedelta(days=keep), "grace": timedelta(hours=grace_hours)}
    if dry_run:
        return _show(terminal, list_garbage(config, ledger, at=now(), **period), "would be deleted")
    if running := [c for c in ledger.cycles.history() if c.status == "running" and c.kind != "gc"]:
        name, kind = running[0].id, running[0].kind
        command = kind if kind in ("ingest", "adapt") else "cycle"
        raise CycleBusy(
            f"{name} has not ended; wait for it, or end it with `palisade {command}`, then run gc again"
        )
    with lease(config, ledger, "gc") as held:
        garbage = list_garbage(config, ledger, at=now(), **period)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            files_to_delete = [f for kind in KINDS for f in garbage[kind]]
            list(pool.map(lambda f: f.place.unlink(missing_ok=True), files_to_delete))
        ledger.cycles.finish(held, summary={k: len(v) for k, v in garbage.items()}, now=now())
    return _show(terminal, garbage, "deleted")


def list_garbage(
    config: Config, ledger: Ledger, *, at: datetime, keep: timedelta, grace: timedelta
) -> Garbage:
    """Returns the files that may be deleted, by kind.

    The files are listed before the ledger is asked, so that it already points to every listed file that it
    will need.
    """
    listed = list(files(config.place()))
    needed = ledger.garbage.needed(since=at - keep)
    trunks = {s.trunk[:16] for s in ledger.sources.all()}
    return condemned(listed, needed, trunks, before=at - grace)


def condemned(
    listed: Iterable[StoredFile], needed: Needed, trunks: Collection[str], *, before: datetime
) -> Garbage:
    """Returns the ``listed`` files that were written before ``before`` and that nothing needs, by kind.

    A file whose name palisade does not write stays.
    """
    garbage: Garbage = {kind: [] for kind in KINDS}
    for file in listed:
        kind = file.parts[0]
        if file.modified_at >= before:
            continue
        if file.place.name.startswith(TEMPORARY):
            garbage["temporary"].append(file)
        elif kind in ("states", "outcomes"):
            digests = needed.states if kind == "states" else needed.outcomes
            if file.place.name.endswith(".safetensors") and file.place.stem not in digests:
                garbage[kind].append(file)
        elif kind == "features" and not _is_needed(file, needed, trunks):
            garbage[kind].append(file)
    return garbage


def _is_needed(file: StoredFile, needed: Needed, trunks: Collection[str]) -> bool:
    """Returns True if the file has offsets that its site still needs, under the trunk of any version."""
    _, trunk, folder, *_ = (*file.parts, "", "")
    span, site = offset_range(file.place), folder.removeprefix("site=")
    if span is None or not folder.startswith("site="):
        return True
    return trunk in trunks and site in needed.features and span[1] > needed.features[site]


def _show(terminal: Terminal, garbage: Garbage, what: str) -> int:
    counts = {k: {"files": len(v), "bytes": sum(f.size for f in v)} for k, v in garbage.items()}
    rows = [[k, c["files"], f"{c['bytes'] / 2**20:.1f}"] for k, c in counts.items()]
    total = sum(c["files"] for c in counts.values()), sum(c["bytes"] for c in counts.values())
    terminal.result(
        {
            "what": what,
            "files": total[0],
            "bytes": total[1],
            **counts,
            "names": {k: ["/".join(f.parts) for f in v[:SAMPLES]] for k, v in garbage.items()},
        },
        table(what, ["kind", "files", "MiB"], rows),
        f"{total[0]} files, {total[1] / 2**20:.1f} MiB {what}",
    )
    return Exit.DONE
