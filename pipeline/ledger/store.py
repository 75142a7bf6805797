"""The connection: opening, transactions, the fence against replaced writers, the audit chain.

SQLite in WAL mode by default, any SQLAlchemy URL. A writer must hold the newest generation of its cycle
(fencing token). Every audit row carries the hash of the row before it.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DatabaseError

from pipeline.ledger import schema
from pipeline.ledger.rows import LedgerUnavailable, StaleGeneration
from pipeline.ledger.schema import SCHEMA
from pipeline.ledger.tables import audit, cycles, dump, facts, iso

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection

    from pipeline.ledger.rows import Cycle

VANISHED_SECONDS = 60
# made once: building a statement takes longer than a small fleet needs to answer it
HEAD = sa.select(facts.c.value).where(facts.c.key == "audit_head").with_for_update()
LAST = sa.select(sa.func.max(audit.c.seq))
ADVANCE = facts.update().where(facts.c.key == "audit_head").values(value=sa.bindparam("head"))
PATIENCE = 30  # seconds that a writer waits for another
# a wave of a large fleet is one transaction: 64 MiB (KiB, pages) are held in memory and in the log
LARGE = "cache_size=-65536", "wal_autocheckpoint=16384"


class Store:
    """A database with the schema. Get it from ``open``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        snapshot = {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        self._reads = engine.execution_options(palisade_read=True, **snapshot)

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Self:
        """Connect; bring an older schema up to this version's and, with ``create``, make it where there is
        none.

        Raises LedgerUnavailable.
        """
        try:
            place = sa.make_url(url)
        except ArgumentError:
            raise LedgerUnavailable(
                f"ledger.url {url!r}: not a database URL, e.g. sqlite:///run/ledger.db"
            ) from None
        sqlite = place.get_backend_name() == "sqlite"
        if sqlite and place.database:
            path = Path(place.database)
            if not create and not path.exists():
                raise LedgerUnavailable(
                    f"{path}: no ledger there yet; run `palisade train` or `palisade ingest` first"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
        options = {"connect_args": {"timeout": PATIENCE}} if sqlite else {"pool_pre_ping": True}
        try:
            engine = sa.create_engine(url, **options)
        except (ArgumentError, ModuleNotFoundError) as e:
            raise LedgerUnavailable(
                f"ledger.url {_shown(url)}: {e}; Postgres needs `pip install palisade[fleet]`"
            ) from None
        if sqlite:
            event.listen(engine, "begin", _sqlite_begin)
        event.listen(engine, "connect", _sqlite_connect if sqlite else _postgres_connect)
        ledger = cls(engine)
        try:
            ledger._settle(create=create)
        except LedgerUnavailable:
            ledger.close()
            raise
        except DatabaseError as e:
            ledger.close()
            raise LedgerUnavailable(
                f"ledger {_shown(url)}: cannot be opened: {' '.join(str(e.orig).split())[:160]}"
            ) from None
        return ledger

    def close(self) -> None:
        """Give the connections back; whoever uses the ledger again connects again."""
        self.engine.dispose()

    def _settle(self, *, create: bool) -> None:
        """Every step is one transaction: a crash leaves the version before it. Of many that open at once one
        does it.
        """
        with self._reads.connect() as c:
            found = schema.version(c)
        while found is None or found < SCHEMA:
            if found is None and not create:
                raise LedgerUnavailable(
                    f"ledger {self._place}: no ledger there yet; "
                    "run `palisade train` or `palisade ingest` first"
                )
            with self.engine.begin() as c:
                schema.lock(c)
                found = schema.version(c)
                if found is None:
                    schema.create(c)
                    found = SCHEMA
                elif found < SCHEMA:
                    found += 1
                    schema.step(c, found)
                    self.append(c, "schema", {"from": found - 1, "to": found}, _database_clock(c))
        if found > SCHEMA:
            raise LedgerUnavailable(
                f"ledger {self._place}: schema {found} is newer than this version's {SCHEMA}; "
                "upgrade palisade"
            )

    @property
    def _place(self) -> str:
        return _shown(str(self.engine.url))

    @contextmanager
    def write(self, *, exclusive: bool = False) -> Iterator[Connection]:
        """One transaction. ``alone``: after every other such one has ended, for what must see all that went
        before.

        SQLite has one writer; on Postgres it is the row of the audit head, locked first, so that nobody waits
        in a circle.
        """
        try:
            with self.engine.begin() as c:
                if exclusive:
                    self.audit_head(c)
                yield c
        except DatabaseError as e:
            raise LedgerUnavailable(f"ledger {self._place}: {' '.join(str(e.orig).split())[:160]}") from None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot, however many statements."""
        try:
            with self._reads.connect() as c:
                yield c
        except DatabaseError as e:
            raise LedgerUnavailable(f"ledger {self._place}: {' '.join(str(e.orig).split())[:160]}") from None

    def fact(self, c: Connection, key: str) -> str | None:
        return c.scalar(sa.select(facts.c.value).where(facts.c.key == key))

    def set_role(self, c: Connection, role: str, version: int | None, now: datetime) -> None:
        """Let a source model have a role (champion, challenger); None: nobody has it."""
        before = self.fact(c, role)
        if before == (None if version is None else str(version)):
            return
        c.execute(facts.delete().where(facts.c.key == role))
        if version is not None:
            c.execute(facts.insert(), {"key": role, "value": str(version)})
        self.append(c, role, {"version": version, "before": before}, now)

    def fence(self, c: Connection, cycle: Cycle, *, shared: bool = False) -> None:
        """Only the newest generation writes. ``shared``: beside other writers of the same cycle."""
        own = sa.select(cycles.c.generation, cycles.c.status).where(cycles.c.id == cycle.id)
        row = c.execute(own.with_for_update(read=shared)).first()
        if row is None or row.generation != cycle.generation or row.status != "running":
            raise StaleGeneration(
                f"cycle {cycle.id}: generation {cycle.generation} was replaced; nothing was written"
            )

    def audit_head(self, c: Connection) -> str:
        return str(c.scalar(HEAD))

    def next_audit(self, c: Connection) -> int:
        """Number of the next audit row; a sequence of the database would skip those of transactions that
        failed.
        """
        return int(c.scalar(LAST) or 0) + 1

    def append(self, c: Connection, kind: str, payload: Mapping[str, object], now: datetime) -> None:
        """The audit head is a row that is read for update, so two writers cannot fork the chain."""
        head = self.audit_head(c)
        at, body = iso(now), dump(dict(payload))
        hashed = link(head, at, kind, body)
        row = {
            "seq": self.next_audit(c),
            "at": at,
            "kind": kind,
            "payload": body,
            "prev_hash": head,
            "hash": hashed,
        }
        c.execute(audit.insert(), row)
        c.execute(ADVANCE, {"head": hashed})


def _sqlite_connect(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late for write locks
    connection.execute(f"PRAGMA busy_timeout={1000 * PATIENCE}")
    for _ in range(10 * PATIENCE):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except (
            sqlite3.OperationalError
        ):  # of many that open an old ledger one turns it; no busy timeout covers this
            time.sleep(0.1)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", *LARGE):
        connection.execute(f"PRAGMA {pragma}")


def _postgres_connect(connection: DBAPIConnection, _: object) -> None:
    """A machine that vanishes within a transaction must not hold its locks for hours."""
    cursor = connection.cursor()
    cursor.execute(f"set idle_in_transaction_session_timeout = '{VANISHED_SECONDS}s'")
    cursor.close()
    connection.commit()


def _sqlite_begin(c: Connection) -> None:
    """Writers queue from their first statement; readers see one snapshot and wait for nobody."""
    c.exec_driver_sql("BEGIN" if c.get_execution_options().get("palisade_read") else "BEGIN IMMEDIATE")


def _database_clock(c: Connection) -> datetime:
    """For the one write that no caller asked for."""
    at = c.scalar(sa.select(sa.func.current_timestamp()))
    assert isinstance(at, datetime)
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)


def link(previous: str, at: str, kind: str, payload: str) -> str:
    return hashlib.sha256("\n".join((previous, at, kind, payload)).encode()).hexdigest()


def _shown(url: str) -> str:
    return sa.make_url(url).render_as_string(hide_password=True)
