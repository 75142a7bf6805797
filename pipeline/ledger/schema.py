"""Finds the schema that a database has, creates the newest one, and takes single steps from an older one to
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.steps import STEPS
from pipeline.ledger.tables import facts, meta

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

SCHEMA = 5
GENESIS = "0" * 64  # the hash that the first audit row names as the one before it
LOCK = 0x70616C69  # of Postgres' advisory locks, which are numbers


def version(c: Connection) -> int | None:
    """Returns the schema that the database has, None where there is none."""
    if not sa.inspect(c).has_table("meta"):
        return None
    return int(c.scalar(sa.select(facts.c.value).where(facts.c.key == "schema")) or 0)


def lock(c: Connection) -> None:
    """Waits until no other process creates or upgrades, and keeps others out until the transaction ends.

    SQLite has one writer anyway.
    """
    if c.dialect.name == "postgresql":
        c.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))


def create(c: Connection) -> None:
    """Creates the newest schema, empty."""
    meta.create_all(c)
    c.execute(
        facts.insert(), [{"key": "schema", "value": str(SCHEMA)}, {"key": "audit_head", "value": GENESIS}]
    )


def step(c: Connection, to: int) -> None:
    """Upgrades version ``to`` - 1 to ``to`` within the caller's transaction."""
    postgres = c.dialect.name == "postgresql"
    types = {
        "text": 'text collate "C"' if postgres else "text",
        "double": "double precision" if postgres else "double",
        "clustered": "" if postgres else " without rowid",
    }
    for part in STEPS[to]:
        if callable(part):
            part(c)
        else:
            c.exec_driver_sql(part.format(**types))
    c.execute(facts.update().where(facts.c.key == "schema").values(value=str(to)))
