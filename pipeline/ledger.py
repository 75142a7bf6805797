"""Everything durable that is not a tensor: sites, offsets, state pointers, verdicts, rollouts, the audit chain.

SQLite in WAL mode by default, any SQLAlchemy URL. Every public write is one transaction. A shard's states, cursors,
verdicts and counters of all its sites commit together; a stale writer is refused by the cycle's generation (fencing
token). The clock is always an argument, in UTC.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from pipeline.guards import Evidence, Verdict

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy.engine import Connection, Engine, Row

SCHEMA = 1
LEASE = timedelta(seconds=120)
GENESIS = "0" * 64
T = TypeVar("T")
CHUNK = 1000  # names in one IN (...)
meta = sa.MetaData()


def _table(name: str, *columns: sa.Column[object] | sa.Index) -> sa.Table:
    return sa.Table(name, meta, *columns)


def _text(name: str, **options: bool) -> sa.Column[object]:
    return sa.Column(name, sa.Text, nullable=options.pop("nullable", False), **options)  # pyright: ignore


def _int(name: str, **options: bool) -> sa.Column[object]:
    return sa.Column(name, sa.BigInteger, nullable=options.pop("nullable", False), **options)  # pyright: ignore


facts = _table("meta", _text("key", primary_key=True), _text("value"))
sites = _table(
    "sites", _text("site", primary_key=True), _text("tags"), _text("status"), _text("reason"), _text("registered_at"),
    _int("ingested"), _int("learned"), _text("learner", nullable=True), _int("holds"),
)  # fmt: skip
segments = _table(
    "segments", _text("site", primary_key=True), _text("name", primary_key=True), _text("sha256"), _int("rows"),
    _int("base_offset"), _int("good"), _int("quarantined"), _text("cycle"), _text("ingested_at"),
)  # fmt: skip
quarantine = _table(
    "quarantine", sa.Column("id", sa.Integer, primary_key=True), _text("site"), _text("segment"), _int("row"),
    _text("sample_id", nullable=True), _text("reason"), _text("cycle"), sa.Index("quarantine_site", "site"),
)  # fmt: skip
states = _table(
    "states", _text("id", primary_key=True), _text("site"), _text("cycle"), _int("source_version"), _text("method"),
    _text("blob"), _int("slot"), _int("offset_from"), _int("offset_to"), _text("parent", nullable=True),
    _text("created_at"), sa.Index("states_site", "site"),
)  # fmt: skip
verdicts = _table(
    "verdicts", _text("id", primary_key=True), _text("site"), _text("cycle"), _text("state", nullable=True),
    _text("outcome"), _text("verdict"), _text("evidence"), _text("counters"), _int("offset_from"), _int("offset_to"),
    _text("at"),
    sa.Index("verdicts_site", "site"), sa.Index("verdicts_cycle", "cycle"),
)  # fmt: skip
cycles = _table(
    "cycles", _text("id", primary_key=True), _text("kind"), _int("generation"), _text("status"), _text("fingerprint"),
    _text("config"), _text("holder"), _text("lease_until"), _text("started"), _text("finished", nullable=True),
    _text("summary"),
)  # fmt: skip
anchors = _table("anchors", _text("digest", primary_key=True), _text("trunk"), _text("summary"), _text("sealed_at"))
sources = _table(
    "sources", sa.Column("version", sa.Integer, primary_key=True), _text("digest"), _text("trunk"), _text("path"),
    _text("manifest"), _text("lineage"), _text("created_at"),
)  # fmt: skip
served = _table(
    "served", _text("site", primary_key=True), _int("counter", primary_key=True), _text("state", nullable=True),
    _int("source_version"), _text("rollout"), _int("wave"), _text("kind"), _text("since"),
)  # fmt: skip
rollouts = _table(
    "rollouts", _text("id", primary_key=True), _text("plan_hash"), _text("status"), _text("body"), _int("revision"),
    _text("created_at"), _text("updated_at"),
)  # fmt: skip
audit = _table(
    "audit", sa.Column("seq", sa.Integer, primary_key=True), _text("at"), _text("kind"), _text("payload"),
    _text("prev_hash"), _text("hash"),
)  # fmt: skip


READ: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("registered_at", "created_at", "updated_at", "since", "at"), datetime.fromisoformat),
    **dict.fromkeys(("tags", "manifest", "counters"), json.loads),
    "verdict": Verdict.model_validate_json, "evidence": Evidence.model_validate_json,
}  # fmt: skip


class LedgerError(ValueError):
    """A request the ledger cannot serve: one line with the next step."""


class LedgerUnavailable(RuntimeError):
    """The database cannot be opened or is of a newer version."""


class UnknownSite(LedgerError):
    """No site of that name is registered."""


class CycleBusy(RuntimeError):
    """Another driver holds the lease."""


class StaleGeneration(RuntimeError):
    """This writer was replaced; nothing of what it brought was written."""


@dataclass(frozen=True)
class SegmentRow:
    """One ingested capture segment."""

    site: str
    name: str
    sha256: str
    rows: int
    base_offset: int
    good: int
    quarantined: int


@dataclass(frozen=True)
class QuarantineRow:
    """One refused row (``row`` -1: the whole file)."""

    site: str
    segment: str
    row: int
    sample_id: str | None
    reason: str


@dataclass(frozen=True)
class Cycle:
    """A cycle that this process holds; ``generation`` fences off everybody who held it before."""

    id: str
    generation: int
    resumed: bool


@dataclass(frozen=True)
class SiteRow:
    """A registered site and how far its stream was read."""

    site: str
    tags: dict[str, str]
    status: str
    reason: str
    registered_at: datetime
    ingested: int  # next offset that ingest will assign
    learned: int  # next offset that adaptation will use
    learner: str | None  # state that learning goes on from; None = the source model's
    holds: int  # verdicts "hold" in a row


@dataclass(frozen=True)
class StateRow:
    """A stored site state: slot ``slot`` of blob ``blob``."""

    id: str
    site: str
    cycle: str
    source_version: int
    method: str
    blob: str
    slot: int
    offset_from: int
    offset_to: int
    parent: str | None
    created_at: datetime


@dataclass(frozen=True)
class ShardRow:
    """One site's share of a shard commit. ``blob`` None: no candidate (an empty window), only a verdict."""

    site: str
    offset_from: int
    offset_to: int
    source_version: int
    method: str
    blob: str | None
    slot: int
    parent: str | None
    counters: dict[str, object]
    verdict: Verdict
    evidence: Evidence


@dataclass(frozen=True)
class VerdictRow:
    """A stored verdict with everything it was decided on."""

    id: str
    site: str
    cycle: str
    state: str | None
    verdict: Verdict
    evidence: Evidence
    counters: dict[str, object]
    offset_from: int
    offset_to: int
    at: datetime


@dataclass(frozen=True)
class ServingRow:
    """What a site serves since when; ``state`` None = the source model as it is."""

    site: str
    counter: int
    state: str | None
    source_version: int
    rollout: str
    wave: int
    kind: str  # promote or rollback
    since: datetime


@dataclass(frozen=True)
class SourceRow:
    """A source model version."""

    version: int
    digest: str
    trunk: str
    path: str
    manifest: dict[str, object]
    lineage: str  # MLflow run
    created_at: datetime


@dataclass(frozen=True)
class RolloutRow:
    """A stored rollout; ``body`` is the state machine's JSON."""

    id: str
    plan_hash: str
    status: str
    body: str
    revision: int
    created_at: datetime
    updated_at: datetime


class Ledger:
    """A connection to the record. Get it from ``Ledger.open``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._reads = engine.execution_options(palisade_read=True)

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Ledger:
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
        engine = sa.create_engine(url, connect_args={"timeout": 30} if sqlite else {})
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

    # -- sites and streams ------------------------------------------------------------------------------------------

    def register_sites(self, tags: Mapping[str, Mapping[str, str]], *, now: datetime) -> list[str]:
        """Add sites that are not known yet → their ids; known ones keep what they have."""
        with self._write() as c:
            known = set(c.scalars(sa.select(sites.c.site)))
            new = [s for s in tags if s not in known]
            rows = [{"site": s, "tags": _dump(dict(tags[s])), "status": "active", "reason": "",
                     "registered_at": _iso(now),
                     "ingested": 0, "learned": 0, "learner": None, "holds": 0} for s in new]  # fmt: skip
            if rows:
                c.execute(sites.insert(), rows)
        return new

    def sites(self) -> list[SiteRow]:
        """Every registered site, by id."""
        with self._read() as c:
            return [_make(SiteRow, r) for r in c.execute(sa.select(sites).order_by(sites.c.site))]

    def site(self, site: str) -> SiteRow:
        """One site; UnknownSite names similar ones."""
        with self._read() as c:
            row = c.execute(sa.select(sites).where(sites.c.site == site)).first()
            if row is None:
                known = list(c.scalars(sa.select(sites.c.site)))
                close = get_close_matches(site, known, 3)
                hint = (
                    f"did you mean {' or '.join(close)}?"
                    if close
                    else f"{len(known)} sites are registered; see `palisade site list`"
                )
                raise UnknownSite(f"site {site!r}: not registered; {hint}")
            return _make(SiteRow, row)

    def sites_named(self, names: Sequence[str]) -> list[SiteRow]:
        """These sites, in this order; UnknownSite for the first that is not registered."""
        with self._read() as c:
            found = {r.site: _make(SiteRow, r) for r in _named(c, sa.select(sites), sites.c.site, names)}
        return [found[n] if n in found else self.site(n) for n in names]

    def set_status(self, reasons: Mapping[str, str]) -> None:
        """Mark sites as failed with a reason, or as active where it is empty."""
        with self._write() as c:
            for site, reason in reasons.items():
                values = {"status": "failed" if reason else "active", "reason": reason}
                c.execute(sites.update().where(sites.c.site == site).values(values))

    def known_segments(self) -> dict[str, set[str]]:
        """Names of the ingested segments by site."""
        known: dict[str, set[str]] = {}
        with self._read() as c:
            for site, name in c.execute(sa.select(segments.c.site, segments.c.name)):
                known.setdefault(site, set()).add(name)
        return known

    def segments(self, site: str) -> list[tuple[SegmentRow, datetime]]:
        """The site's segments in stream order with the time they were ingested."""
        query = sa.select(segments).where(segments.c.site == site).order_by(segments.c.base_offset, segments.c.name)
        with self._read() as c:
            return [(SegmentRow(*r[:7]), datetime.fromisoformat(r.ingested_at)) for r in c.execute(query)]

    def ingested_at(self, names: Sequence[str]) -> dict[str, datetime]:
        """When the newest segment of each site was ingested."""
        query = sa.select(segments.c.site, sa.func.max(segments.c.ingested_at)).group_by(segments.c.site)
        wanted = set(names)
        with self._read() as c:
            return {s: datetime.fromisoformat(at) for s, at in c.execute(query) if s in wanted}

    def commit_ingest(
        self, cycle: Cycle, rows: Sequence[SegmentRow], bad: Sequence[QuarantineRow], *, now: datetime
    ) -> None:
        """Make ingested segments count: rows, quarantine and each site's next offset together."""
        with self._write() as c:
            self._fence(c, cycle)
            if rows:
                c.execute(segments.insert(), [vars(r) | {"cycle": cycle.id, "ingested_at": _iso(now)} for r in rows])
            if bad:
                c.execute(quarantine.insert(), [vars(q) | {"cycle": cycle.id} for q in bad])
            ends: dict[str, int] = {}
            for r in rows:
                ends[r.site] = max(ends.get(r.site, 0), r.base_offset + r.rows)
            for site, end in ends.items():
                c.execute(sites.update().where(sites.c.site == site, sites.c.ingested < end).values(ingested=end))

    def quarantined(self, site: str | None = None, *, cycle: str | None = None) -> list[QuarantineRow]:
        """Refused rows, all or of one site or cycle."""
        query = sa.select(*(quarantine.c[n] for n in QuarantineRow.__dataclass_fields__)).order_by(quarantine.c.id)
        if site is not None:
            query = query.where(quarantine.c.site == site)
        if cycle is not None:
            query = query.where(quarantine.c.cycle == cycle)
        with self._read() as c:
            return [QuarantineRow(*r) for r in c.execute(query)]

    # -- cycles -----------------------------------------------------------------------------------------------------

    def begin_cycle(
        self, kind: str, fingerprint: str, config: str, *, holder: str, dead: Callable[[str], bool], now: datetime
    ) -> Cycle:
        """Take the fleet's lease: go on with an unfinished cycle of the same kind and fingerprint, else begin one.

        ``dead(holder)`` says that a holder cannot come back, so its lease need not run out. Raises CycleBusy.
        """
        with self._write() as c:
            for row in c.execute(sa.select(cycles).where(cycles.c.status == "running")):
                if datetime.fromisoformat(row.lease_until) > now and not dead(row.holder):
                    raise CycleBusy(
                        f"cycle {row.id} is running ({row.holder}); wait for it, or until {row.lease_until[:19]}"
                    )
                same = (row.kind, row.fingerprint) == (kind, fingerprint)
                lease = {"generation": row.generation + 1, "holder": holder, "lease_until": _iso(now + LEASE)}
                c.execute(
                    cycles.update()
                    .where(cycles.c.id == row.id)
                    .values(lease if same else {**lease, "status": "abandoned"})
                )
                if same:
                    return Cycle(row.id, row.generation + 1, True)
            number = c.scalar(sa.select(sa.func.count()).select_from(cycles)) or 0
            cycle = Cycle(f"{kind}-{number + 1:05d}", 1, False)
            values = {"id": cycle.id, "kind": kind, "generation": 1, "status": "running", "fingerprint": fingerprint,
                      "config": config, "holder": holder, "lease_until": _iso(now + LEASE), "started": _iso(now),
                      "finished": None, "summary": "{}"}  # fmt: skip
            c.execute(cycles.insert(), values)
            return cycle

    def renew(self, cycle: Cycle, *, now: datetime) -> None:
        """Keep the lease."""
        with self._write() as c:
            self._fence(c, cycle)
            c.execute(cycles.update().where(cycles.c.id == cycle.id).values(lease_until=_iso(now + LEASE)))

    def finish_cycle(self, cycle: Cycle, *, summary: Mapping[str, object], now: datetime) -> None:
        """Give the lease back; the cycle is done."""
        with self._write() as c:
            self._fence(c, cycle)
            values = {"status": "finished", "finished": _iso(now), "summary": _dump(dict(summary))}
            c.execute(cycles.update().where(cycles.c.id == cycle.id).values(values))
            self._append(c, "cycle", {"cycle": cycle.id, **summary}, now)

    def cycles(self, *, kinds: Sequence[str] = ()) -> list[Row[*tuple[object, ...]]]:
        """Cycle rows, newest first."""
        query = sa.select(cycles).order_by(cycles.c.started.desc(), cycles.c.id.desc())
        with self._read() as c:
            return [r for r in c.execute(query) if not kinds or r.kind in kinds]

    # -- states and verdicts ----------------------------------------------------------------------------------------

    def commit_shard(self, cycle: Cycle, rows: Sequence[ShardRow], *, now: datetime) -> list[str]:
        """States, cursors, verdicts and counters of many sites in one transaction → sites whose cursor had moved.

        Such a site is left as it is: its window was applied by somebody else, or by an earlier try of this call.
        """
        with self._write() as c:
            self._fence(c, cycle)
            wanted = [r.site for r in rows]
            found = {s.site: s for s in _named(c, sa.select(sites).with_for_update(), sites.c.site, wanted)}
            earlier = sa.select(verdicts.c.site).where(verdicts.c.cycle == cycle.id)
            judged = {s.site for s in _named(c, earlier, verdicts.c.site, wanted)}
            fresh = [
                r for r in rows if r.site not in judged and r.site in found and found[r.site].learned == r.offset_from
            ]
            current = self._serving(c, [r.site for r in fresh])
            if fresh:
                made = [_state_values(r, cycle.id, now) for r in fresh if r.blob is not None]
                if made:
                    c.execute(states.insert(), made)
                c.execute(verdicts.insert(), [_verdict_values(r, cycle.id, now) for r in fresh])
                move = sites.update().where(sites.c.site == sa.bindparam("s"))
                move = move.values(
                    {n: sa.bindparam(f"v_{n}") for n in ("learned", "learner", "holds", "status", "reason")}
                )
                c.execute(move, [_moved(r, cycle.id, found[r.site], current.get(r.site)) for r in fresh])
        done = {r.site for r in fresh}
        return [r.site for r in rows if r.site not in done]

    def state(self, state: str | None) -> StateRow | None:
        """A stored state by id."""
        return self.states([state]).get(state) if state else None

    def states(self, ids: Sequence[str | None]) -> dict[str, StateRow]:
        """Stored states by id."""
        wanted = [i for i in ids if i]
        with self._read() as c:
            rows = _named(c, sa.select(states), states.c.id, wanted)
            return {r.id: _make(StateRow, r) for r in rows}

    def verdicts(
        self, *, cycle: str | None = None, site: str | None = None, ids: Sequence[str] | None = None
    ) -> list[VerdictRow]:
        """Verdicts of a cycle, of a site or by id, oldest first."""
        query = sa.select(verdicts).order_by(verdicts.c.at, verdicts.c.site)
        for column, value in ((verdicts.c.cycle, cycle), (verdicts.c.site, site)):
            query = query.where(column == value) if value is not None else query
        query = query.where(verdicts.c.id.in_(list(ids))) if ids is not None else query
        with self._read() as c:
            return [_make(VerdictRow, r) for r in c.execute(query)]

    def latest_verdicts(self) -> dict[str, VerdictRow]:
        """The newest verdict of every site."""
        newest = sa.select(verdicts.c.site, sa.func.max(verdicts.c.at).label("at")).group_by(verdicts.c.site).subquery()
        query = sa.select(verdicts).join(
            newest, sa.and_(verdicts.c.site == newest.c.site, verdicts.c.at == newest.c.at)
        )
        with self._read() as c:
            return {r.site: _make(VerdictRow, r) for r in c.execute(query)}

    # -- anchor sets and source models ------------------------------------------------------------------------------

    def pin_anchor(self, digest: str, *, trunk: str, summary: Mapping[str, object], now: datetime) -> None:
        """Seal an anchor set: from now on only the bytes with this digest count for this trunk."""
        with self._write() as c:
            if not c.scalar(sa.select(anchors.c.digest).where(anchors.c.digest == digest)):
                values = {"digest": digest, "trunk": trunk, "summary": _dump(dict(summary)), "sealed_at": _iso(now)}
                c.execute(anchors.insert(), values)
                self._append(c, "anchor", {"digest": digest, "trunk": trunk, **summary}, now)

    def anchor(self, trunk: str) -> str:
        """Digest of the newest anchor set of a trunk; LedgerError when none is sealed."""
        with self._read() as c:
            query = sa.select(anchors.c.digest).where(anchors.c.trunk == trunk).order_by(anchors.c.sealed_at.desc())
            found = c.scalar(query)
        if found is None:
            raise LedgerError(f"no anchor set is sealed for trunk {trunk[:12]}; `palisade train` seals one")
        return str(found)

    def add_source(
        self, digest: str, *, trunk: str, path: str, manifest: Mapping[str, object], lineage: str, now: datetime
    ) -> int:
        """Record a source model → its version; the same digest keeps its version. The first becomes the champion."""
        with self._write() as c:
            known = c.scalar(sa.select(sources.c.version).where(sources.c.digest == digest))
            if known is not None:
                return int(known)
            version = int(c.scalar(sa.select(sa.func.max(sources.c.version))) or 0) + 1
            values = {"version": version, "digest": digest, "trunk": trunk, "path": path,
                      "manifest": _dump(dict(manifest)), "lineage": lineage, "created_at": _iso(now)}  # fmt: skip
            c.execute(sources.insert(), values)
            self._append(c, "source", {"version": version, "digest": digest, "lineage": lineage}, now)
            if self._fact(c, "champion") is None:
                self._crown(c, version, now)
            return version

    def sources(self) -> list[SourceRow]:
        """Every source model version, oldest first."""
        with self._read() as c:
            rows = list(c.execute(sa.select(sources).order_by(sources.c.version)))
        return [_make(SourceRow, r) for r in rows]

    def source(self, version: int | None = None) -> SourceRow:
        """A version, by default the champion; LedgerError says how to get one."""
        with self._read() as c:
            champion = self._fact(c, "champion")
        wanted = version if version is not None else int(champion) if champion else None
        known = {s.version: s for s in self.sources()}
        if wanted is None:
            raise LedgerError("no source model yet; run `palisade train` first")
        if wanted not in known:
            raise LedgerError(f"source version {wanted}: not there; versions: {', '.join(map(str, known))}")
        return known[wanted]

    def set_champion(self, version: int, *, now: datetime) -> None:
        """Make ``version`` the source model that the fleet adapts from."""
        self.source(version)
        with self._write() as c:
            self._crown(c, version, now)

    # -- serving and rollouts ---------------------------------------------------------------------------------------

    def serving(self, names: Sequence[str] | None = None) -> dict[str, ServingRow]:
        """What sites serve, of all or of ``names``; a site without a row serves the champion source model as it is."""
        with self._read() as c:
            return self._serving(c, names)

    def served(self, site: str) -> list[ServingRow]:
        """Everything the site has served, oldest first."""
        with self._read() as c:
            rows = c.execute(sa.select(served).where(served.c.site == site).order_by(served.c.counter))
            return [_make(ServingRow, r) for r in rows]

    def serve(
        self,
        changes: Mapping[str, tuple[str | None, int]],
        *,
        rollout: str,
        wave: int,
        kind: str,
        reason: str,
        now: datetime,
    ) -> None:
        """Point sites at (state, source version), all in one transaction with one audit row; counters only grow.

        ``kind`` promote needs the stored passing verdict on that very state of that very site.
        """
        if not changes:
            return
        with self._write() as c:
            if kind == "promote":
                _check_verdicts(c, changes)
            current = self._serving(c, list(changes))
            rows = [
                {"site": s, "counter": current[s].counter + 1 if s in current else 1, "state": state,
                 "source_version": version, "rollout": rollout, "wave": wave, "kind": kind, "since": _iso(now)}
                for s, (state, version) in changes.items()
            ]  # fmt: skip
            c.execute(served.insert(), rows)
            pointers = {r["site"]: [r["counter"], r["state"], r["source_version"]] for r in rows}
            self._append(c, kind, {"rollout": rollout, "wave": wave, "reason": reason, "sites": pointers}, now)

    def save_rollout(
        self,
        rollout: str,
        *,
        plan_hash: str,
        status: str,
        body: str,
        revision: int,
        event: Mapping[str, object],
        now: datetime,
    ) -> int:
        """Store a rollout's state if nobody did since ``revision`` (0 = new) → the new revision; audits ``event``."""
        with self._write() as c:
            values = {
                "plan_hash": plan_hash,
                "status": status,
                "body": body,
                "revision": revision + 1,
                "updated_at": _iso(now),
            }
            if revision == 0:
                c.execute(rollouts.insert(), {"id": rollout, "created_at": _iso(now), **values})
            else:
                same = sa.and_(rollouts.c.id == rollout, rollouts.c.revision == revision)
                if c.execute(rollouts.update().where(same).values(values)).rowcount != 1:
                    raise StaleGeneration(
                        f"rollout {rollout}: somebody else moved it on; look at `palisade rollout status`"
                    )
            self._append(c, "rollout", {"rollout": rollout, "status": status, **event}, now)
        return revision + 1

    def rollouts(self) -> list[RolloutRow]:
        """Every rollout, newest first."""
        with self._read() as c:
            rows = list(c.execute(sa.select(rollouts).order_by(rollouts.c.created_at.desc(), rollouts.c.id.desc())))
        return [_make(RolloutRow, r) for r in rows]

    # -- audit ------------------------------------------------------------------------------------------------------

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

    # -- private ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as c:
                yield c
        except OperationalError as e:
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

    def _crown(self, c: Connection, version: int, now: datetime) -> None:
        before = self._fact(c, "champion")
        c.execute(facts.delete().where(facts.c.key == "champion"))
        c.execute(facts.insert(), {"key": "champion", "value": str(version)})
        self._append(c, "champion", {"version": version, "before": before}, now)

    def _serving(self, c: Connection, names: Sequence[str] | None) -> dict[str, ServingRow]:
        newest = sa.select(served.c.site, sa.func.max(served.c.counter).label("n")).group_by(served.c.site)
        newest = newest.where(served.c.site.in_(list(names))) if names is not None and len(names) <= CHUNK else newest
        last = newest.subquery()
        query = sa.select(served).join(last, sa.and_(served.c.site == last.c.site, served.c.counter == last.c.n))
        wanted = None if names is None else set(names)
        return {r.site: _make(ServingRow, r) for r in c.execute(query) if wanted is None or r.site in wanted}

    def _append(self, c: Connection, kind: str, payload: Mapping[str, object], now: datetime) -> None:
        """The audit head is a row that is read for update, so two writers cannot fork the chain."""
        head = str(c.scalar(sa.select(facts.c.value).where(facts.c.key == "audit_head").with_for_update()))
        at, body = _iso(now), _dump(dict(payload))
        link = _link(head, at, kind, body)
        c.execute(audit.insert(), {"at": at, "kind": kind, "payload": body, "prev_hash": head, "hash": link})
        c.execute(facts.update().where(facts.c.key == "audit_head").values(value=link))


def _named(
    c: Connection, query: sa.Select[*tuple[object, ...]], column: sa.Column[object], names: Sequence[str]
) -> list[Row[*tuple[object, ...]]]:
    """Rows whose ``column`` is one of ``names``; databases bound how many values a statement may have."""
    parts = (names[i : i + CHUNK] for i in range(0, len(names), CHUNK))
    return [r for part in parts for r in c.execute(query.where(column.in_(part)))]


def _check_verdicts(c: Connection, changes: Mapping[str, tuple[str | None, int]]) -> None:
    query = sa.select(verdicts.c.site, verdicts.c.state).where(verdicts.c.outcome == "pass")
    passed = {(r.site, r.state) for r in _named(c, query, verdicts.c.state, [s for s, _ in changes.values() if s])}
    for site, (state, _) in changes.items():
        if (site, state) not in passed:
            raise LedgerError(
                f"site {site}: no stored verdict passes state {state or 'of the source model'}; nothing was promoted"
            )


def state_id(cycle: str, site: str) -> str:
    """Name of the one state (and verdict) that a site can get in a cycle."""
    return hashlib.sha256(f"{cycle}/{site}".encode()).hexdigest()[:16]


def _state_values(r: ShardRow, cycle: str, now: datetime) -> dict[str, object]:
    return {"id": state_id(cycle, r.site), "site": r.site, "cycle": cycle, "source_version": r.source_version,
            "method": r.method, "blob": r.blob, "slot": r.slot, "offset_from": r.offset_from, "offset_to": r.offset_to,
            "parent": r.parent, "created_at": _iso(now)}  # fmt: skip


def _verdict_values(r: ShardRow, cycle: str, now: datetime) -> dict[str, object]:
    own = state_id(cycle, r.site)
    return {"id": own, "site": r.site, "cycle": cycle, "state": own if r.blob else None, "outcome": r.verdict.outcome,
            "verdict": r.verdict.model_dump_json(), "evidence": r.evidence.model_dump_json(),
            "counters": _dump(r.counters), "offset_from": r.offset_from, "offset_to": r.offset_to,
            "at": _iso(now)}  # fmt: skip


def _moved(
    r: ShardRow, cycle: str, site: Row[*tuple[object, ...]], now_serving: ServingRow | None
) -> dict[str, object]:
    """The site's new cursor and what it learns from next: a failed candidate is left behind for what is served."""
    learner = state_id(cycle, r.site) if r.blob else site.learner
    if r.verdict.outcome == "fail":
        learner = now_serving.state if now_serving else None
    holds = site.holds + 1 if r.verdict.outcome == "hold" else 0
    return {
        "s": r.site,
        "v_learned": r.offset_to,
        "v_learner": learner,
        "v_holds": holds,
        "v_status": "active",
        "v_reason": "",
    }


def _make(row: Callable[..., T], r: Row[*tuple[object, ...]]) -> T:
    """A row class from the columns of the same names."""
    values = r._mapping
    return row(**{f.name: READ[f.name](values[f.name]) if f.name in READ else values[f.name] for f in fields(row)})  # pyright: ignore


def _sqlite_connect(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late for write locks
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(c: Connection) -> None:
    """Writers queue from their first statement; readers see one snapshot and wait for nobody."""
    c.exec_driver_sql("BEGIN" if c.get_execution_options().get("palisade_read") else "BEGIN IMMEDIATE")


def _link(previous: str, at: str, kind: str, payload: str) -> str:
    return hashlib.sha256("\n".join((previous, at, kind, payload)).encode()).hexdigest()


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _iso(at: datetime) -> str:
    assert at.tzinfo is not None, "times are in UTC"
    return at.isoformat(timespec="microseconds")


def _shown(url: str) -> str:
    return sa.make_url(url).render_as_string(hide_password=True)
