"""``palisade audit verify``: checks the audit chain, the releases and every needed artifact."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from jobs.terminal import Exit
from pipeline.control.deployment import now, open_ledger
from pipeline.data import blobs
from pipeline.data.anchor import open_sealed
from pipeline.ledger.schema import GENESIS
from pipeline.models.manifest import BadCheckpoint, read_manifest
from pipeline.storage import place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jobs.terminal import Advance, Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger

AT_ONCE = 8  # blobs that are read at a time


def verify(config: Config, terminal: Terminal, *, head: str | None) -> int:
    """Checks the whole record and shows a line for each thing that does not hold."""
    ledger = open_ledger(config, create=False)
    findings: list[str] = []
    with terminal.progress("audit verify", "checks") as advance:
        for finding in _findings(config, ledger, head, advance):
            findings.append(finding)
            if not terminal.as_json:
                terminal.out.print(finding, markup=False)
    seq, last = ledger.audit.head()
    result = "the record holds" if not findings else f"{len(findings)} findings"
    terminal.result(
        {"findings": findings, "rows": seq, "head": last},
        f"{result}: {seq} audit rows, head {last}",
        "keep the head elsewhere: "
        "`palisade audit verify --head HASH` then also finds a chain that was cut or written anew",
    )
    return Exit.GUARD_FAILED if findings else Exit.DONE


def _findings(config: Config, ledger: Ledger, head: str | None, advance: Advance) -> Iterator[str]:
    wanted = sorted(ledger.garbage.needed(since=now()).states)
    anchors = ledger.verdicts.anchors()
    serving = {s.source_version for s in ledger.releases.serving().values()}
    champion = {ledger.sources.champion().version} if ledger.sources.all() else set()
    total, done = 3 + len(wanted) + len(anchors) + len(serving | champion), 0
    for check in (_chain(ledger, head), ledger.releases.verify(), ledger.releases.served_without_verdict()):
        yield from check
        advance(done := done + 1, total)
    for version in sorted(serving | champion):
        yield from _source(ledger, version)
        advance(done := done + 1, total)
    for digest in anchors:
        try:
            open_sealed(config.place("anchors"), digest)
        except blobs.BadBlob as e:
            yield f"anchor set {digest[:12]}: {e}"
        advance(done := done + 1, total)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for flaws in pool.map(lambda digest: _blob(config, digest), wanted):
            yield from flaws
            advance(done := done + 1, total)


def _chain(ledger: Ledger, head: str | None) -> list[str]:
    broken = ledger.audit.first_broken()
    flaws: list[str] = []
    if broken is not None:
        flaws.append(f"audit row {broken}: the chain does not hold from here on; rows were changed or cut")
    if head is not None and head != GENESIS and not ledger.audit.has(head):
        flaws.append(
            f"audit head {head[:12]}: no row of the chain has it; "
            "rows were cut, or the chain was written anew"
        )
    return flaws


def _source(ledger: Ledger, version: int) -> list[str]:
    row = ledger.sources.get(version)
    path = place(row.path)
    try:
        manifest = read_manifest(path)
        for name, digest in manifest.files.items():
            blobs.verified(path / name, digest)
    except (BadCheckpoint, blobs.BadBlob) as e:
        return [f"source v{version}: {e}"]
    if manifest.digest == row.digest:
        return []
    return [f"source v{version}: {row.path} holds another model, {manifest.digest[:12]}"]


def _blob(config: Config, digest: str) -> list[str]:
    try:
        blobs.get(config.place("states"), digest)
    except blobs.BadBlob as e:
        return [f"state blob {digest[:12]}: {e}"]
    return []
