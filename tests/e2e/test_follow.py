"""``ingest --follow`` in a process: arrivals are counted, a bad file is survived, a signal ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.e2e


def until(true: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.2)


def drop(parts: Path, to: Path) -> None:
    """As an uploader should: under another name first."""
    to.parent.mkdir(exist_ok=True)
    tmp = to.with_name(f".{to.name}")
    tmp.write_bytes(parts.read_bytes())
    tmp.rename(to)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_follow(deployment, tmp_path: Path, number: signal.Signals) -> None:
    site, ledger = "lobby-north", deployment.ledger
    parts = sorted((deployment.root / "captures" / site).glob("segment-*.parquet"))
    (deployment.root / "captures").rename(tmp_path / "arriving")
    parts = [tmp_path / "arriving" / site / p.name for p in parts]
    folder = deployment.root / "captures" / site
    folder.mkdir(parents=True)

    def offset() -> int:
        return next((s.ingested_offset for s in ledger.streams.sites() if s.site == site), 0)

    words = ["ingest", "--follow", "--interval", "0.3", "--json", "--config", deployment.yaml]
    with (
        (tmp_path / "out").open("w") as out,
        (tmp_path / "err").open("w") as err,
        subprocess.Popen(
            [sys.executable, "-m", "jobs", *words], stdout=out, stderr=err, text=True
        ) as process,
    ):
        try:
            until(lambda: "following" in (tmp_path / "err").read_text(), process)
            drop(parts[0], folder / parts[0].name)
            until(lambda: offset() > 0, process)
            first = offset()
            (folder / "segment-9000.parquet").write_bytes(b"rubbish")
            until(lambda: len(ledger.streams.quarantined(site)) == 1, process)
            drop(parts[1], folder / parts[1].name)
            until(lambda: offset() > first, process)
            until(lambda: not [c for c in ledger.cycles.history() if c.status == "running"], process)
            os.kill(process.pid, number)
            assert process.wait(60) == 0, (tmp_path / "err").read_text()
        finally:
            process.kill()
    rounds = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert len(rounds) == 3
    assert sum(r["samples"] for r in rounds) == sum(s.good for s, _ in ledger.streams.segments(site))
    assert sum(r["quarantined"] for r in rounds) == len(ledger.streams.quarantined(site))
    assert [r["segments"] for r in rounds] == [1, 0, 1]
    assert rounds[1]["refused"][0]["reason"] == f"{site}/segment-9000.parquet: is no Parquet file"
    assert {c.status for c in ledger.cycles.history(kinds=["ingest"])} == {"finished"}
    assert not list(deployment.root.rglob(".tmp-*"))
