"""Which schema a database has, and the steps that bring an older one up to this version's.

A step is frozen SQL: it never follows later changes of ``tables``. Version 1 is what the first release wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.tables import facts, meta

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

SCHEMA = 2
GENESIS = "0" * 64  # what the first audit row names as the one before it
STEPS: dict[int, tuple[str, ...]] = {
    2: (  # a chunk of sites costs the same however large the fleet and its history are
        "create index segments_offset on segments (site, base_offset, ingested_at, good)",
        "create index quarantine_cycle on quarantine (cycle)",
        "drop index states_site",
        "create index states_created on states (created_at)",
        "drop index verdicts_site",
        "create index verdicts_site on verdicts (site, offset_to, at)",
        "drop index verdicts_cycle",
        "create index verdicts_cycle on verdicts (cycle, site, outcome)",
        "create index verdicts_at on verdicts (at)",
    ),
}
TABLES_1 = ("meta", "sites", "segments", "quarantine", "states", "verdicts", "cycles", "anchors", "sources", "served",
            "rollouts", "audit")  # fmt: skip
LOCK = 0x70616C69  # Postgres takes a number


def version(c: Connection) -> int | None:
    """The schema that the database has, None where there is none."""
    if not sa.inspect(c).has_table("meta"):
        return None
    return int(c.scalar(sa.select(facts.c.value).where(facts.c.key == "schema")) or 0)


def lock(c: Connection) -> None:
    """Be the only one who creates or upgrades, until the transaction ends; SQLite has one writer anyway."""
    if c.dialect.name == "postgresql":
        c.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))


def create(c: Connection) -> None:
    """The newest schema, empty."""
    meta.create_all(c)
    c.execute(facts.insert(), [{"key": "schema", "value": str(SCHEMA)}, {"key": "audit_head", "value": GENESIS}])


def step(c: Connection, to: int) -> None:
    """From version ``to`` - 1 to ``to``, within the caller's transaction."""
    if to == 2 and c.dialect.name == "postgresql":
        _order_by_code_point(c)
    for statement in STEPS[to]:
        c.exec_driver_sql(statement)
    c.execute(facts.update().where(facts.c.key == "schema").values(value=str(to)))


def _order_by_code_point(c: Connection) -> None:
    for table in TABLES_1:
        columns = [col["name"] for col in sa.inspect(c).get_columns(table) if isinstance(col["type"], sa.Text)]
        changes = ", ".join(f'alter column "{name}" type text collate "C"' for name in columns)
        c.exec_driver_sql(f'alter table "{table}" {changes}')
