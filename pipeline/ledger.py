"""Everything durable that is not a tensor: sites and their cursors, states, verdicts, rollouts, the audit chain.

SQLite in WAL mode by default, any SQLAlchemy URL by choice; the only SQLAlchemy. Every write is one transaction, so a crash
leaves the old truth or the new one. Writers are fenced: a cycle by its generation, a cursor by compare-and-swap, a rollout by
its revision. Times are passed in, aware. A promotion needs a stored passing verdict on that site and state.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa

from pipeline.guards import Evidence, Verdict
from pipeline.rollout import TERMINAL, Candidate, Plan, Pointer, Promote, Rollback, Rollout, SiteFacts, Status, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pipeline.rollout import Action

SCHEMA = 1
BUSY_SECONDS = 30
LEASE_SECONDS = 120
CHUNK = 500  # ids in one IN (...)
GENESIS = "0" * 64
T = TypeVar("T")


class LedgerError(ValueError):
    """A person's mistake, or a write that the stored truth does not allow."""


class UnknownSite(LedgerError):
    """A site that is not registered."""


class CycleBusy(LedgerError):
    """Another process holds the fleet's lease."""


class StaleGeneration(LedgerError):
    """This process lost the cycle or the rollout to another one; nothing was written."""


class LedgerUnavailable(RuntimeError):
    """The database does not answer."""


class _Utc(sa.TypeDecorator[datetime]):
    """Aware datetimes as ISO text in UTC, equal and sortable on every database."""

    impl = sa.String(32)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> str | None:
        assert value is None or value.tzinfo is not None, "naive datetime"
        return value.astimezone(UTC).isoformat(timespec="microseconds") if value else None

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> datetime | None:
        return datetime.fromisoformat(value) if value else None


def _table(name: str, *columns: sa.schema.SchemaItem) -> sa.Table:
    return sa.Table(name, METADATA, *columns)


def _text(name: str, *more: sa.schema.SchemaItem, key: bool = False, null: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, *more, primary_key=key, nullable=null)


def _int(name: str, *, key: bool = False, null: bool = False, default: int | None = None) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=key, nullable=null, default=default)


def _time(name: str, *, null: bool = False) -> sa.Column[datetime]:
    return sa.Column(name, _Utc, nullable=null)


METADATA = sa.MetaData()
META = _table("meta", _text("key", key=True), _text("value"))
SITES = _table(
    "sites", _text("site", key=True), sa.Column("tags", sa.JSON), sa.Column("control", sa.Boolean, default=False),
    sa.Column("status", sa.Text, default="ok"), _text("reason", null=True), _time("registered_at"), _int("ingested", default=0),
    _time("ingested_at", null=True), _int("learned", default=0), _text("learner", null=True), _int("holds", default=0),
)  # fmt: skip
SEGMENTS = _table(
    "segments", _text("site", key=True), _text("name", key=True), _text("sha256"), _int("rows"), _int("base_offset"),
    _int("good"), _int("quarantined"), _int("cycle"), _time("at"),
)  # fmt: skip
QUARANTINE = _table(
    "quarantine", _int("id", key=True), _text("site"), _text("segment"), _int("row"), _text("sample_id", null=True),
    _text("reason"), sa.Column("cycle", sa.Integer, index=True), _time("at"),
)  # fmt: skip
STATES = _table(
    "states", _text("id", key=True), _text("site"), _int("cycle"), _int("generation"), _int("source_version"), _text("method"),
    _text("blob"), _int("slot"), _int("offset_from"), _int("offset_to"), _text("parent", null=True),
    sa.Column("counters", sa.JSON), _time("created_at"), sa.Index("states_site", "site", "created_at"),
)  # fmt: skip
VERDICTS = _table(
    "verdicts", _int("id", key=True), _text("site"), _int("cycle"), _text("state", null=True), _int("source_version"),
    _text("outcome"), _text("verdict"), _text("evidence"), sa.Column("counters", sa.JSON), _time("at"),
    sa.Index("verdicts_site", "site", "id"), sa.Index("verdicts_cycle", "cycle"),
)  # fmt: skip
ANCHORS = _table("anchors", _text("digest", key=True), _text("trunk"), sa.Column("summary", sa.JSON), _time("sealed_at"))
SOURCES = _table(
    "sources", _int("version", key=True), _text("digest", key=False), _text("trunk"), _text("path"),
    sa.Column("manifest", sa.JSON), _text("lineage", null=True), _time("at"), sa.UniqueConstraint("digest"),
)  # fmt: skip
CYCLES = _table(
    "cycles", _int("id", key=True), _int("generation"), _text("kind"), _text("status"), _text("fingerprint"), _text("config"),
    sa.Column("summary", sa.JSON), _time("started"), _time("finished", null=True), _text("holder"), _time("lease_expires"),
)  # fmt: skip
SERVING = _table(
    "serving", _text("site", key=True), _text("state", null=True), _int("source_version"), _text("good_state", null=True),
    _int("good_source", null=True), _int("counter"), _int("rollout", null=True), _int("wave", null=True), _time("since"),
)  # fmt: skip
HISTORY = _table(
    "serving_history", _text("site", key=True), _int("counter", key=True), _text("kind"), _text("state", null=True),
    _int("source_version"), _int("verdict", null=True), _int("rollout", null=True), _int("wave", null=True), _time("at"),
)  # fmt: skip
ROLLOUTS = _table(
    "rollouts", _int("id", key=True), _text("release"), _text("plan"), _text("plan_hash"), _text("state"), _text("status"),
    _int("revision"), _time("created"),
)  # fmt: skip
AUDIT = _table("audit", _int("seq", key=True), _time("at"), _text("kind"), _text("subject"), _text("payload"),
               _text("prev_hash"), _text("hash"))  # fmt: skip


@dataclass(frozen=True)
class SiteRow:
    """A site with its cursors: offsets below ``ingested`` are stored, below ``learned`` have had their effect."""

    site: str
    tags: dict[str, str]
    control: bool
    status: str  # ok | failed
    reason: str | None
    registered_at: datetime
    ingested: int
    ingested_at: datetime | None
    learned: int
    learner: str | None  # state that learning goes on from
    holds: int  # verdicts "hold" in a row


@dataclass(frozen=True)
class SegmentRow:
    """An ingested segment: offsets base_offset … base_offset + rows, of which ``good`` have features."""

    site: str
    name: str
    sha256: str
    rows: int
    base_offset: int
    good: int
    quarantined: int


@dataclass(frozen=True)
class QuarantineRow:
    """A refused row; row -1 is the whole segment."""

    site: str
    segment: str
    row: int
    sample_id: str | None
    reason: str


@dataclass(frozen=True)
class ShardRow:
    """What one site's window gave; without ``blob`` nothing was learned."""

    site: str
    offset_from: int
    offset_to: int
    source_version: int
    method: str
    blob: str | None
    slot: int
    parent: str | None
    counters: Mapping[str, object]
    verdict: Verdict
    evidence: Evidence


@dataclass(frozen=True)
class StateRow:
    """A site state: where its tensors are and what they come from."""

    id: str
    site: str
    cycle: int
    generation: int
    source_version: int
    method: str
    blob: str
    slot: int
    offset_from: int
    offset_to: int
    parent: str | None
    counters: dict[str, object]
    created_at: datetime


@dataclass(frozen=True)
class VerdictRow:
    """A stored verdict with the evidence that gives it again."""

    id: int
    site: str
    cycle: int
    state: str | None
    source_version: int
    outcome: str
    verdict: Verdict
    evidence: Evidence
    counters: dict[str, object]
    at: datetime


@dataclass(frozen=True)
class AnchorRow:
    """A sealed anchor set under one trunk."""

    digest: str
    trunk: str
    summary: dict[str, object]
    sealed_at: datetime


@dataclass(frozen=True)
class SourceRow:
    """A source model version."""

    version: int
    digest: str
    trunk: str
    path: str
    manifest: dict[str, object]
    lineage: str | None
    at: datetime


@dataclass(frozen=True)
class Cycle:
    """A cycle and the generation that may write it."""

    id: int
    generation: int
    kind: str
    status: str  # running | done | abandoned
    fingerprint: str
    config: str
    summary: dict[str, object]
    started: datetime
    finished: datetime | None
    holder: str
    lease_expires: datetime


@dataclass(frozen=True)
class ServingRow:
    """What a site serves (``state`` None = the bare source model) and what it served last under a completed release."""

    site: str
    state: str | None
    source_version: int
    good_state: str | None
    good_source: int | None
    counter: int
    rollout: int | None
    wave: int | None
    since: datetime

    @property
    def pointer(self) -> Pointer:
        """What it serves."""
        return Pointer(state_id=self.state, source_version=self.source_version)

    @property
    def good(self) -> Pointer | None:
        """What a rollback goes to."""
        return None if self.good_source is None else Pointer(state_id=self.good_state, source_version=self.good_source)


@dataclass(frozen=True)
class ServingChange:
    """One step of a site's release counter."""

    site: str
    counter: int
    kind: str  # install | promote | rollback
    state: str | None
    source_version: int
    verdict: int | None
    rollout: int | None
    wave: int | None
    at: datetime


@dataclass(frozen=True)
class RolloutRow:
    """A stored rollout; ``revision`` is what the next save must name."""

    id: int
    revision: int
    created: datetime
    rollout: Rollout


@dataclass(frozen=True)
class AuditRow:
    """A link of the audit chain."""

    seq: int
    at: datetime
    kind: str
    subject: str
    payload: str
    prev_hash: str
    hash: str


@dataclass(frozen=True)
class Explanation:
    """Why a site serves what it serves."""

    site: SiteRow
    serving: ServingRow | None
    state: StateRow | None
    verdict: VerdictRow | None  # that let the served state in
    latest: VerdictRow | None  # on the newest candidate
    rollout: RolloutRow | None
    source: SourceRow | None
    history: tuple[ServingChange, ...]  # newest first
    segments: int
    quarantined: int
