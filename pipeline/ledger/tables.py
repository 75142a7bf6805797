"""The tables, and how values are written to and read from their columns: JSON as canonical text, times as ISO text."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy.engine import Connection, Row

T = TypeVar("T")
V = TypeVar("V")
RETIRED = "retired"  # status of a site that no release plans or waits for
FLEET = "*"  # the site of a verdict on a bare source model; its offsets are the version
CHUNK = 1000  # names in one IN (...)
# by code point on every database: the same fleet is listed in the same order
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
meta = sa.MetaData()


def _table(name: str, *columns: sa.Column[object] | sa.Index, clustered: bool = False) -> sa.Table:
    """``clustered``: SQLite keeps the rows in order of their key, as a fleet's rows are read and written."""
    return sa.Table(name, meta, *columns, sqlite_with_rowid=not clustered)


def _text(name: str, **options: bool) -> sa.Column[object]:
    return sa.Column(name, TEXT, nullable=options.pop("nullable", False), **options)  # pyright: ignore


def _int(name: str, **options: bool) -> sa.Column[object]:
    return sa.Column(name, sa.BigInteger, nullable=options.pop("nullable", False), **options)  # pyright: ignore


facts = _table("meta", _text("key", primary_key=True), _text("value"))
sites = _table(
    "sites",
    _text("site", primary_key=True),
    _text("tags"),
    _text("status"),
    _text("reason"),
    _text("registered_at"),
    _int("ingested"),
    _int("learned"),
    _text("learner", nullable=True),
    _int("holds"),
)
segments = _table(
    "segments",
    _text("site", primary_key=True),
    _text("name", primary_key=True),
    _text("sha256"),
    _int("rows"),
    _int("base_offset"),
    _int("good"),
    _int("quarantined"),
    _text("cycle"),
    _text("ingested_at"),
    sa.Index("segments_offset", "site", "base_offset", "ingested_at", "good"),
)
quarantine = _table(
    "quarantine",
    sa.Column("id", sa.Integer, primary_key=True),
    _text("site"),
    _text("segment"),
    _int("row"),
    _text("sample_id", nullable=True),
    _text("reason"),
    _text("cycle"),
    sa.Index("quarantine_site", "site"),
    sa.Index("quarantine_cycle", "cycle"),
)
states = _table(
    "states",
    _text("id", primary_key=True),
    _text("site"),
    _text("cycle"),
    _int("source_version"),
    _text("method"),
    _text("blob"),
    _int("slot"),
    _int("offset_from"),
    _int("offset_to"),
    _text("parent", nullable=True),
    _text("created_at"),
    sa.Index("states_created", "created_at"),
)
verdicts = _table(
    "verdicts",
    _text("id", primary_key=True),
    _text("site"),
    _text("cycle"),
    _text("state", nullable=True),
    _text("outcome"),
    _text("verdict"),
    _text("evidence"),
    _text("counters"),
    _int("offset_from"),
    _int("offset_to"),
    _text("at"),
    sa.Index("verdicts_site", "site", "offset_to", "at"),
    sa.Index("verdicts_cycle", "cycle", "site", "outcome"),
    sa.Index("verdicts_at", "at"),
)
cycles = _table(
    "cycles",
    _text("id", primary_key=True),
    _text("kind"),
    _int("generation"),
    _text("status"),
    _text("fingerprint"),
    _text("config"),
    _text("holder"),
    _text("lease_until"),
    _text("started"),
    _text("finished", nullable=True),
    _text("summary"),
)
anchors = _table(
    "anchors", _text("digest", primary_key=True), _text("trunk"), _text("summary"), _text("sealed_at")
)
sources = _table(
    "sources",
    sa.Column("version", sa.Integer, primary_key=True),
    _text("digest"),
    _text("trunk"),
    _text("path"),
    _text("manifest"),
    _text("lineage"),
    _text("created_at"),
)
served = _table(
    "served",
    _text("site", primary_key=True),
    _int("counter", primary_key=True),
    _text("state", nullable=True),
    _int("source_version"),
    _text("rollout"),
    _int("wave"),
    _text("kind"),
    _text("since"),
    sa.Column("audit", sa.BigInteger, nullable=False, server_default="0"),
    clustered=True,
)
targets = _table(
    "targets",
    _text("rollout", primary_key=True),
    _text("site", primary_key=True),
    _int("wave"),
    _text("zone"),
    _text("state", nullable=True),
    _int("source_version"),
    _text("back_state", nullable=True),
    _int("back_version"),
    _text("verdict"),
    _text("reason"),
    sa.Index("targets_wave", "rollout", "wave", "site"),
    clustered=True,
)
rollouts = _table(
    "rollouts",
    _text("id", primary_key=True),
    _text("plan_hash"),
    _text("status"),
    _text("body"),
    _int("revision"),
    _text("created_at"),
    _text("updated_at"),
)
audit = _table(
    "audit",
    sa.Column("seq", sa.Integer, primary_key=True),
    _text("at"),
    _text("kind"),
    _text("payload"),
    _text("prev_hash"),
    _text("hash"),
)
notices = _table(
    "notices",
    _text("key", primary_key=True),
    _text("severity"),
    _text("text"),
    _text("first_at"),
    _text("last_at"),
    _int("count"),
    _text("sent_at", nullable=True),
)


READ: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("registered_at", "created_at", "updated_at", "since", "at"), datetime.fromisoformat),
    **dict.fromkeys(("tags", "manifest", "counters"), json.loads),
}


def named(
    c: Connection, query: sa.Select[*tuple[object, ...]], column: sa.Column[object], names: Sequence[str]
) -> list[Row[*tuple[object, ...]]]:
    """Rows whose ``column`` is one of ``names``; databases bound how many values a statement may have."""
    return [r for part in parts(names) for r in c.execute(query.where(column.in_(part)))]


def add(c: Connection, table: sa.Table, rows: Sequence[tuple[object, ...]]) -> None:
    """Insert rows whose values are in the order of the table's columns; a fleet of them, so past the ORM's own handling."""
    if not rows:
        return
    names = [column.name for column in table.columns]
    made = table.insert().compile(c)
    given = rows if made.positional else [dict(zip(names, row, strict=True)) for row in rows]
    c.exec_driver_sql(str(made), given)  # pyright: ignore[reportArgumentType]


def parts(values: Sequence[V]) -> Iterator[Sequence[V]]:
    """``values`` in pieces that one statement may hold."""
    return (values[i : i + CHUNK] for i in range(0, len(values), CHUNK))


def make_row(row: Callable[..., T], r: Row[*tuple[object, ...]]) -> T:
    """A row class from the columns of the same names."""
    values = r._mapping
    names = [f.name for f in fields(row)]  # pyright: ignore[reportArgumentType]
    return row(**{n: READ[n](values[n]) if n in READ else values[n] for n in names})


def dump(value: object) -> str:
    """Canonical JSON: the audit chain hashes it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def iso(at: datetime) -> str:
    """Of one width, so that text sorts like time."""
    assert at.tzinfo is not None, "times are in UTC"
    return at.isoformat(timespec="microseconds")


def storable(text: str) -> str:
    """Text from a site as every database takes it: without NUL and halves of surrogate pairs."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
