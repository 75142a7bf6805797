"""The connection: opening, transactions, the fence against replaced writers, the audit chain.

SQLite in WAL mode by default, any SQLAlchemy URL. A writer must hold the newest generation of its cycle (fencing
token). Every audit row carries the hash of the row before it.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from pipeline.ledger.rows import LedgerUnavailable, StaleGeneration
from pipeline.ledger.tables import audit, cycles, dump, facts, iso, meta

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping

    from sqlalchemy.engine import Connection, Engine

    from pipeline.ledger.rows import Cycle

SCHEMA = 1
GENESIS = "0" * 64


class Store:
    """A database with the schema. Get it from ``open``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._reads = engine.execution_options(palisade_read=True)

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Self:
        """Connect and, with ``create``, make the schema where there is none. Raises LedgerUnavailable."""
        try:
            place = sa.make_url(url)
        except ArgumentError:
            raise LedgerUnavailable(f"ledger.url {url!r}: not a database URL, e.g. sqlite:///run/ledger.db") from None
        sqlite = place.get_backend_name() == "sqlite"
        if sqlite and place.database:
            path = Path(place.database)
            if not create and not path.exists():
                raise LedgerUnavailable(f"{path}: no ledger there yet; run `palisade train` or `palisade ingest` first")
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            engine = sa.create_engine(url, connect_args={"timeout": 30} if sqlite else {})
        except (ArgumentError, ModuleNotFoundError) as e:
            raise LedgerUnavailable(
                f"ledger.url {_shown(url)}: {e}; Postgres needs `pip install palisade[fleet]`"
            ) from None
        if sqlite:
            event.listen(engine, "connect", _sqlite_connect)
            event.listen(engine, "begin", _sqlite_begin)
        ledger = cls(engine)
        try:
            with engine.begin() as c:
                if not sa.inspect(c).has_table("meta"):
                    meta.create_all(c)
                    c.execute(
                        facts.insert(),
                        [{"key": "schema", "value": str(SCHEMA)}, {"key": "audit_head", "value": GENESIS}],
                    )
                found = int(ledger._fact(c, "schema") or 0)
        except (OperationalError, DatabaseError) as e:
            raise LedgerUnavailable(
                f"ledger {_shown(url)}: cannot be opened: {' '.join(str(e.orig).split())[:160]}"
            ) from None
        if found > SCHEMA:
            raise LedgerUnavailable(
                f"ledger {_shown(url)}: schema {found} is newer than this version's {SCHEMA}; upgrade palisade"
            )
        return ledger

    def note(self, kind: str, payload: Mapping[str, object], *, now: datetime) -> None:
        """Append to the audit chain."""
        with self._write() as c:
            self._append(c, kind, payload, now)

    def audit(self) -> list[tuple[int, datetime, str, dict[str, object]]]:
        """(seq, at, kind, payload) of every audit row."""
        with self._read() as c:
            rows = c.execute(sa.select(audit).order_by(audit.c.seq))
            return [(r.seq, datetime.fromisoformat(r.at), r.kind, json.loads(r.payload)) for r in rows]

    def broken_audit(self) -> int | None:
        """First sequence number at which the chain does not hold, None when it is whole."""
        previous, expected = GENESIS, 1
        with self._read() as c:
            for r in c.execute(sa.select(audit).order_by(audit.c.seq)):
                if r.seq != expected or r.prev_hash != previous or r.hash != _link(previous, r.at, r.kind, r.payload):
                    return expected
                previous, expected = r.hash, expected + 1
            return None if self._fact(c, "audit_head") == previous else expected

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as c:
                yield c
        except DatabaseError as e:
            raise LedgerUnavailable(
                f"ledger {_shown(str(self.engine.url))}: {' '.join(str(e.orig).split())[:160]}"
            ) from None

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        try:
            with self._reads.connect() as c:
                yield c
        except OperationalError as e:
            raise LedgerUnavailable(
                f"ledger {_shown(str(self.engine.url))}: {' '.join(str(e.orig).split())[:160]}"
            ) from None

    def _fact(self, c: Connection, key: str) -> str | None:
        return c.scalar(sa.select(facts.c.value).where(facts.c.key == key))

    def _fence(self, c: Connection, cycle: Cycle) -> None:
        row = c.execute(
            sa.select(cycles.c.generation, cycles.c.status).where(cycles.c.id == cycle.id).with_for_update()
        ).first()
        if row is None or row.generation != cycle.generation or row.status != "running":
            raise StaleGeneration(f"cycle {cycle.id}: generation {cycle.generation} was replaced; nothing was written")

    def _append(self, c: Connection, kind: str, payload: Mapping[str, object], now: datetime) -> None:
        """The audit head is a row that is read for update, so two writers cannot fork the chain."""
        head = str(c.scalar(sa.select(facts.c.value).where(facts.c.key == "audit_head").with_for_update()))
        at, body = iso(now), dump(dict(payload))
        link = _link(head, at, kind, body)
        c.execute(audit.insert(), {"at": at, "kind": kind, "payload": body, "prev_hash": head, "hash": link})
        c.execute(facts.update().where(facts.c.key == "audit_head").values(value=link))


def _sqlite_connect(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late for write locks
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(c: Connection) -> None:
    """Writers queue from their first statement; readers see one snapshot and wait for nobody."""
    c.exec_driver_sql("BEGIN" if c.get_execution_options().get("palisade_read") else "BEGIN IMMEDIATE")


def _link(previous: str, at: str, kind: str, payload: str) -> str:
    return hashlib.sha256("\n".join((previous, at, kind, payload)).encode()).hexdigest()


def _shown(url: str) -> str:
    return sa.make_url(url).render_as_string(hide_password=True)
