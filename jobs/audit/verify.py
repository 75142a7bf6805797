"""``palisade audit``: the key that releases are signed with, the log, and whether the record holds."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.deployment import now, open_ledger
from pipeline.data import blobs
from pipeline.data.anchor import open_sealed
from pipeline.ledger.schema import GENESIS
from pipeline.models import checkpoint
from pipeline.storage import place, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jobs.terminal import Advance, Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger

AT_ONCE = 8
WIDTH = 100  # characters of a payload that the log shows
DIGEST = re.compile("[0-9a-f]{64}")


def keygen(terminal: Terminal, *, out: Path) -> int:
    """A new ed25519 key in ``out``, readable by its owner alone, and its public half beside it."""
    from pipeline.rollout.manifest import fingerprint, new_key, public_key

    secret, public = new_key()
    pub = out.with_name(f"{out.name}.pub")
    if pub.exists():
        raise ValueError(f"{pub}: exists already; keys are never overwritten, choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ValueError(f"{out}: exists already; keys are never overwritten, choose another name") from None
    with os.fdopen(handle, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    write_atomic(pub.resolve(), public)
    mark = fingerprint(public_key(public, str(pub)))
    terminal.result(
        {"private": str(out), "public": str(pub), "fingerprint": mark},
        f"{out}: private key {mark[:12]}, for this deployment alone: set ledger.signing_key={out}",
        f"{pub}: public key, for every edge box: `palisade site verify DIR --public-key {pub.name}`",
    )
    return Exit.DONE


def log(config: Config, terminal: Terminal, *, site: str | None, limit: int) -> int:
    """The latest decisions and overrides, newest first."""
    ledger = open_ledger(config, create=False)
    if site is not None:
        ledger.streams.site(site)
    rows = ledger.audit.latest(limit=limit, site=site)
    shown = [[r.seq, f"{r.at:%Y-%m-%d %H:%M:%S}", r.kind, _short(r.payload, site)] for r in rows]
    terminal.result(
        {"audit": [r._asdict() for r in rows]},
        table("audit log, newest first", ["seq", "at (UTC)", "kind", "what"], shown),
    )
    return Exit.DONE


def verify(config: Config, terminal: Terminal, *, head: str | None) -> int:
    """Check everything that the record says of itself; a line for each thing that does not hold."""
    ledger = open_ledger(config, create=False)
    findings: list[str] = []
    with terminal.progress("audit verify", "checks") as advance:
        for finding in _findings(config, ledger, head, advance):
            findings.append(finding)
            if not terminal.as_json:
                terminal.out.print(finding, markup=False)
    seq, last = ledger.audit.head()
    said = "the record holds" if not findings else f"{len(findings)} findings"
    terminal.result(
        {"findings": findings, "rows": seq, "head": last},
        f"{said}: {seq} audit rows, head {last}",
        "keep the head elsewhere: `palisade audit verify --head HASH` then also finds a chain that was cut or written anew",
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
        for found in pool.map(lambda digest: _blob(config, digest), wanted):
            yield from found
            advance(done := done + 1, total)


def _chain(ledger: Ledger, head: str | None) -> list[str]:
    broken = ledger.audit.first_broken()
    found = (
        []
        if broken is None
        else [f"audit row {broken}: the chain does not hold from here on; rows were changed or cut"]
    )
    if head is not None and head != GENESIS and not ledger.audit.has(head):
        found.append(
            f"audit head {head[:12]}: no row of the chain has it; rows were cut, or the chain was written anew"
        )
    return found


def _source(ledger: Ledger, version: int) -> list[str]:
    row = ledger.sources.get(version)
    path = place(row.path)
    try:
        manifest = checkpoint.read_manifest(path)
        blobs.verified(path / checkpoint.WEIGHTS, manifest.weights_digest)
    except (checkpoint.BadCheckpoint, blobs.BadBlob) as e:
        return [f"source v{version}: {e}"]
    found = manifest.digest
    return [] if found == row.digest else [f"source v{version}: {row.path} holds another model, {found[:12]}"]


def _blob(config: Config, digest: str) -> list[str]:
    try:
        blobs.get(config.place("states"), digest)
    except blobs.BadBlob as e:
        return [f"state blob {digest[:12]}: {e}"]
    return []


def _short(payload: dict[str, object], site: str | None) -> str:
    """A payload in a line; of many sites only the one that was asked for."""
    named = payload.get("sites")
    if isinstance(named, dict):
        payload = payload | {"sites": {site: named[site]} if site in named else f"{len(named)} sites"}
    text = DIGEST.sub(lambda m: m[0][:12], json.dumps(payload))
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
