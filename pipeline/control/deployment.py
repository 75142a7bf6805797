"""Opens a deployment: its ledger, corpora, source models, clock, and the lease of the fleet."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.ledger import Ledger, LedgerError, LedgerUnavailable, StaleGeneration
from pipeline.storage import place

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    from pipeline.config import Config
    from pipeline.ledger import Cycle, SourceRow

RENEW_SECONDS = 30
CLOCK_SECONDS = 2  # by which a start may seem to move when the boot time is corrected


class Reporter(Protocol):
    """Receives the progress of long work; the command line's ``Terminal`` is one."""

    def say(self, text: str) -> None: ...
    def progress(self, label: str, unit: str = "") -> AbstractContextManager[Callable[[int, int], None]]: ...


def now() -> datetime:
    """Returns the time, UTC; decisions get it as an argument."""
    return datetime.now(UTC)


def open_ledger(config: Config, *, create: bool = True) -> Ledger:
    """Opens the deployment's ledger."""
    return Ledger.open(config.ledger.url, create=create)


def corpora(config: Config) -> list[Path]:
    """Returns the folders of ``data.domains``, or of all corpora that are not rendered for training alone."""
    from pipeline.data.corpus import read_manifest  # loads OpenCV, which reading the ledger does without

    root = Path(config.data.corpora)
    imported = sorted(p.parent.name for p in root.glob("*/manifest.json"))
    if not imported:
        raise ValueError(
            f"data.corpora: {root} holds no imported corpus; run `palisade import KIND FOLDER` first"
        )
    missing = [d for d in config.data.domains if d not in imported]
    if missing:
        raise ValueError(f"data.domains: {missing[0]!r} is not imported; there are {', '.join(imported)}")
    folders = [
        root / d
        for d in config.data.domains or imported
        if config.data.domains or read_manifest(root / d).kind != "rendered"
    ]
    for path in folders:
        size = read_manifest(path).size
        if size != config.data.frame_px:
            raise ValueError(
                f"data.frame_px: {config.data.frame_px}, but {path} was imported at {size}; import it "
                "again or change data.frame_px"
            )
    return folders


def check_size(config: Config, source: SourceRow) -> None:
    """Raises ValueError if the model saw frames of another size: features would only look right."""
    if (size := source.manifest.size) != config.data.frame_px:
        raise ValueError(
            f"data.frame_px: {config.data.frame_px}, but source v{source.version} was trained at {size}"
        )


def source_model(ledger: Ledger, version: int | None = None) -> SourceRow:
    """Returns a source version (default: the champion) whose checkpoint exists. Raises LedgerError."""
    row = ledger.sources.get(version)
    if not place(row.path).exists():
        raise LedgerError(
            f"source v{row.version}: its model {row.path} is missing; restore it or run `palisade train`"
        )
    return row


def ingest_sources(config: Config, ledger: Ledger) -> list[SourceRow]:
    """Returns the source models whose trunks every new sample goes through: champion, then challenger."""
    rows, challenger = [source_model(ledger)], ledger.sources.challenger()
    if challenger is not None:
        rows.append(source_model(ledger, challenger))
    for row in rows:
        check_size(config, row)
    return rows if rows[-1].trunk != rows[0].trunk else rows[:1]


@contextmanager
def lease(config: Config, ledger: Ledger, kind: str, *, purpose: str = "") -> Generator[Cycle]:
    """Holds the fleet's lease for a cycle of ``kind``; a cycle whose driver died is resumed by the next call.

    The caller ends the cycle. A cycle that was begun for another ``purpose`` is not resumed.
    """
    import psutil  # here, as below: too slow for commands that only read

    host = socket.gethostname()
    process = psutil.Process()
    holder = f"{host}:{process.pid}:{process.create_time():.0f}"
    cycle = ledger.cycles.begin(
        kind, config.fingerprint() + purpose, config.model_dump_json(), holder=holder, dead=_dead, now=now()
    )
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(RENEW_SECONDS):
            try:
                ledger.cycles.renew(cycle, now=now())
            except LedgerUnavailable:
                continue  # the lease lasts longer than a hiccup
            except StaleGeneration:
                return  # the next commit says so

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield cycle
    finally:
        ended.set()
        thread.join()


def _dead(holder: str) -> bool:
    """Returns whether a holder on this host is gone; on other hosts only the lease's end tells."""
    host, _, rest = holder.partition(":")
    pid, _, started = rest.partition(":")
    if host != socket.gethostname() or not (pid.isdigit() and started.isdigit()):
        return False
    if int(pid) == os.getpid():
        return True  # this process itself, from an earlier job that did not end well
    import psutil

    try:
        process = psutil.Process(int(pid))
        another = abs(process.create_time() - float(started)) > CLOCK_SECONDS
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
