"""Declares the tables, and writes and reads the values of their columns: JSON as canonical text, times as ISO
text.
"""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sqlalchemy.engine import Connection, Row

    from pipeline.ledger.rows import QuarantineRow

T = TypeVar("T")
V = TypeVar("V")
RETIRED = "retired"  # status of a site that no release plans or waits for
CHUNK = 1000  # names in one IN (...)
# ordered by code point on every database, so that the same fleet is listed in the same order
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
meta = sa.MetaData()


def _table(name: str, *columns: sa.Column[object] | sa.Index, clustered: bool = False) -> sa.Table:
    """Returns a table; ``clustered``: SQLite keeps its rows in order of their key, as a fleet's are read and
    written.
    """
    return sa.Table(name, meta, *columns, sqlite_with_rowid=not clustered)


def _text(name: str, **options: bool) -> sa.Column[object]:
    return sa.Column(name, TEXT, nullable=options.pop("nullable", False), **options)  # pyright: ignore


def _int(name: str, **options: bool) -> sa.Column[object]:
    nullable = options.pop("nullable", False)
    return sa.Column(name, sa.BigInteger, nullable=nullable, **options)  # pyright: ignore


def _zero(name: str) -> sa.Column[object]:
    """Returns a whole number that rows of an older schema have as 0."""
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def _double(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.Double, nullable=True)


facts = _table("meta", _text("key", primary_key=True), _text("value"))
sites = _table(
    "sites",
    _text("site", primary_key=True),
    _text("tags"),
    _text("status"),
    _text("reason"),
    _text("registered_at"),
    _int("ingested_offset"),
    _int("learned_offset"),
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
label_files = _table(
    "label_files",
    _text("site", primary_key=True),
    _text("name", primary_key=True),
    _text("sha256"),
    _int("rows"),
    _int("good"),
    _text("cycle"),
    _text("recorded_at"),
)
labels = _table(
    "labels",
    _text("site", primary_key=True),
    _text("sample_id", primary_key=True),
    _text("file", primary_key=True),
    _int("label"),
    _text("instrument"),
    _text("kind"),
    _text("who"),
    _text("labelled_at"),
    _text("recorded_at"),
    _int("offset", nullable=True),
    _text("role", nullable=True),
    _text("retracted_at", nullable=True),
    _text("retracted_by", nullable=True),
    _text("retracted_why", nullable=True),
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
    _int("offset_from"),
    _int("offset_to"),
    _text("at"),
    # the window, column by column as in WindowRecord
    _zero("samples"),
    _text("outcomes_blob", nullable=True),
    _int("row_start", nullable=True),
    _int("row_end", nullable=True),
    _text("anchor_digest", nullable=True),
    _text("champion_state", nullable=True),
    _text("lost_state", nullable=True),
    _int("accepted_bona_fide", nullable=True),
    _int("accepted_attack", nullable=True),
    _double("called_bona_fide_share"),
    _int("restores", nullable=True),
    _double("omega"),
    _int("sessions", nullable=True),
    sa.Index("verdicts_site", "site", "offset_to", "at"),
    sa.Index("verdicts_cycle", "cycle", "site", "outcome"),
    sa.Index("verdicts_at", "at"),
)
source_verdicts = _table(
    "source_verdicts",
    _text("id", primary_key=True),
    _int("version"),
    _text("outcome"),
    _text("verdict"),
    _text("evidence"),
    _text("guards", nullable=True),
    _text("at"),
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
    _zero("audit"),
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


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


TIMES = (
    *("registered_at", "created_at", "updated_at", "since", "at"),
    *("lease_until", "started", "finished", "first_at", "last_at", "sent_at"),
    *("labelled_at", "recorded_at", "retracted_at"),
)
PARSERS: dict[str, Callable[[str], object]] = {**dict.fromkeys(TIMES, _time), "tags": json.loads}


def named(
    c: Connection, query: sa.Select[*tuple[object, ...]], column: sa.Column[object], names: Sequence[str]
) -> list[Row[*tuple[object, ...]]]:
    """Returns the rows whose ``column`` is one of ``names``; databases bound how many values a statement may
    have.
    """
    return [r for part in parts(names) for r in c.execute(query.where(column.in_(part)))]


def add(c: Connection, table: sa.Table, rows: Sequence[tuple[object, ...]]) -> None:
    """Inserts rows whose values are in the order of the table's columns.

    They may be a fleet's, so they go past SQLAlchemy's own handling of each value.
    """
    if not rows:
        return
    names = [column.name for column in table.columns]
    statement = table.insert().compile(c)
    values = rows if statement.positional else [dict(zip(names, row, strict=True)) for row in rows]
    c.exec_driver_sql(str(statement), values)  # pyright: ignore[reportArgumentType]


def names_by_site(c: Connection, table: sa.Table, sites: Sequence[str] | None = None) -> dict[str, set[str]]:
    """Returns the names of a table's files by site, of all sites or of ``sites``."""
    query = sa.select(table.c.site, table.c.name)
    known: dict[str, set[str]] = {}
    for r in c.execute(query) if sites is None else named(c, query, table.c.site, sites):
        known.setdefault(r.site, set()).add(r.name)
    return known


def stored_names(
    c: Connection, table: sa.Table, asked_for: Sequence[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Returns those (site, name) that ``table`` has, each looked up by its key; SQLite scans for pairs in an
    IN (...).
    """
    found: set[tuple[str, str]] = set()
    for part in parts(asked_for):
        asked = sa.values(sa.column("site", sa.Text), sa.column("name", sa.Text)).data(part).cte("asked")
        same = sa.and_(table.c.site == asked.c.site, table.c.name == asked.c.name)
        stored = sa.select(asked.c.site, asked.c.name).where(sa.exists().where(same).correlate(asked))
        found.update((site, name) for site, name in c.execute(stored))
    return found


def refuse(c: Connection, cycle: str, rows: Iterable[QuarantineRow]) -> None:
    """Puts ``rows`` into quarantine; what a file says of itself is made storable."""
    refused = [
        vars(q)
        | {"cycle": cycle, "sample_id": q.sample_id and storable(q.sample_id), "reason": storable(q.reason)}
        for q in rows
    ]
    if refused:
        c.execute(quarantine.insert(), refused)


def parts(values: Sequence[V]) -> Iterator[Sequence[V]]:
    """Yields ``values`` in pieces that one statement may hold."""
    return (values[i : i + CHUNK] for i in range(0, len(values), CHUNK))


def make_row(row: Callable[..., T], r: Row[*tuple[object, ...]], **more: object) -> T:
    """Returns a record from the columns of the same names; a field ``x_json`` is column ``x`` as it is
    stored.

    ``more`` are fields that are no column.
    """
    values = r._mapping
    read = {n: parse(values[c]) if parse else values[c] for n, c, parse in _fields(row) if n not in more}
    return row(**read, **more)


@lru_cache(maxsize=32)
def _fields(row: Callable[..., object]) -> tuple[tuple[str, str, Callable[[str], object] | None], ...]:
    """Returns for each field of a record its name, its column, and what parses that."""
    names = [f.name for f in fields(row)]  # pyright: ignore[reportArgumentType]
    return tuple((n, n.removesuffix("_json"), PARSERS.get(n)) for n in names)


def dump(value: object) -> str:
    """Returns canonical JSON: the audit chain hashes it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def iso(at: datetime) -> str:
    """Returns a time as text of one width, so that text sorts like time."""
    assert at.tzinfo is not None, "times are in UTC"
    return at.isoformat(timespec="microseconds")


def storable(text: str) -> str:
    """Returns text from a site as every database takes it: without NUL and halves of surrogate pairs."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
