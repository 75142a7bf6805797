"""``palisade audit keygen``: makes the key that release manifests are signed with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from jobs.terminal import Exit
from pipeline.rollout.manifest import fingerprint, new_key, public_key
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from jobs.terminal import Terminal


def keygen(terminal: Terminal, *, out: Path) -> int:
    """Writes a new ed25519 key to ``out``, readable by its owner alone, and its public half beside it.

    Raises ValueError if either file exists: keys are never overwritten.
    """
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
