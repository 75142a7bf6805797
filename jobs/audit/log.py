"""``palisade audit log``: shows the latest decisions and overrides."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.deployment import open_ledger

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config

WIDTH = 100  # characters of a payload that are shown
DIGEST = re.compile("[0-9a-f]{64}")


def log(config: Config, terminal: Terminal, *, site: str | None, limit: int) -> int:
    """Shows the latest ``limit`` rows, newest first; with ``site``, those about this site."""
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


def _short(payload: dict[str, object], site: str | None) -> str:
    """Returns the payload in one line; of many sites only ``site``."""
    named = payload.get("sites")
    if isinstance(named, dict):
        payload = payload | {"sites": {site: named[site]} if site in named else f"{len(named)} sites"}
    text = DIGEST.sub(lambda m: m[0][:12], json.dumps(payload))
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
