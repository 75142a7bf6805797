"""The results of adaptation: states and verdicts of a shard in one commit, and the anchor sets that verdicts
rest on.

A shard's states, cursors, verdicts and window records of all its sites commit together, or none of them does.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.releases import newest_served
from pipeline.ledger.rows import LedgerError, StateRow, VerdictRow, WindowRecord
from pipeline.ledger.tables import (
    RETIRED,
    anchors,
    audit,
    cycles,
    dump,
    iso,
    make_row,
    named,
    sites,
    states,
    verdicts,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.engine import Row

    from pipeline.ledger.rows import Cycle, ServingRow, ShardRow
    from pipeline.ledger.store import Store

CURSOR = ("learned_offset", "learner", "holds", "status", "reason")
MOVE_CURSOR = sites.update().where(sites.c.site == sa.bindparam("s"))
MOVE_CURSOR = MOVE_CURSOR.values({n: sa.bindparam(f"v_{n}") for n in CURSOR})
WINDOW = tuple(f.name for f in fields(WindowRecord))
# the verdicts of a rebase lie beside the sites' streams, so they are found by their cycle or id alone
REBASES = sa.select(cycles.c.id).where(cycles.c.kind == "rebase")


@dataclass(frozen=True)
class Verdicts:
    """Candidate states with their verdicts, and the anchor sets behind them."""

    store: Store

    def commit(
        self, cycle: Cycle, rows: Sequence[ShardRow], *, now: datetime, rebased: bool = False
    ) -> list[str]:
        """Writes states, cursors and verdicts of many sites in one transaction; returns the sites that it
        left alone.

        Those are the sites whose cursor had moved: their window was applied by another process, or by an
        earlier try of this call. ``rebased``: writes states and verdicts alone, for windows that end at the
        cursor.
        """
        with self.store.write() as c:
            self.store.fence(c, cycle, shared=True)
            names = sorted({r.site for r in rows})
            locked = sa.select(sites).order_by(sites.c.site).with_for_update()
            stored = {s.site: s for s in named(c, locked, sites.c.site, names)}
            ids = [state_id(cycle.id, s) for s in names]
            judged = {s.site for s in named(c, sa.select(verdicts.c.site), verdicts.c.id, ids)}
            fresh = [
                r
                for r in rows
                if r.site not in judged
                and r.site in stored
                and stored[r.site].learned_offset == (r.offset_to if rebased else r.offset_from)
            ]
            if fresh:
                serving = newest_served(c, [r.site for r in fresh if r.verdict.outcome == "fail"])
                at = iso(now)
                candidates = [_state_values(r, cycle.id, at) for r in fresh if r.blob is not None]
                if candidates:
                    c.execute(states.insert(), candidates)
                c.execute(verdicts.insert(), [_verdict_values(r, cycle.id, at) for r in fresh])
                if not rebased:
                    c.execute(
                        MOVE_CURSOR,
                        [_cursor_update(r, cycle.id, stored[r.site], serving.get(r.site)) for r in fresh],
                    )
        written = {r.site for r in fresh}
        return [r.site for r in rows if r.site not in written]

    def state(self, state: str | None) -> StateRow | None:
        """Returns a stored state by id, None where there is none."""
        return self.states([state]).get(state) if state else None

    def states(self, ids: Sequence[str | None]) -> dict[str, StateRow]:
        """Returns stored states by id; a None among the ids is skipped."""
        wanted = [i for i in ids if i]
        with self.store.read() as c:
            rows = named(c, sa.select(states), states.c.id, wanted)
            return {r.id: make_row(StateRow, r) for r in rows}

    def find(
        self, *, cycle: str | None = None, site: str | None = None, ids: Sequence[str] | None = None
    ) -> list[VerdictRow]:
        """Returns the verdicts of a cycle, of a site or by id, oldest first; those of a rebase only by cycle
        or id.
        """
        query = sa.select(verdicts).order_by(verdicts.c.at, verdicts.c.site, verdicts.c.offset_to)
        for column, value in ((verdicts.c.cycle, cycle), (verdicts.c.site, site)):
            query = query.where(column == value) if value is not None else query
        if cycle is None and ids is None:
            query = query.where(verdicts.c.cycle.not_in(REBASES))
        with self.store.read() as c:
            rows = c.execute(query) if ids is None else named(c, query, verdicts.c.id, ids)
            found = [_verdict_row(r) for r in rows]
        return found if ids is None else sorted(found, key=lambda v: (v.at, v.site, v.offset_to))

    def page(self, cycle: str, *, after: str = "", limit: int = 1000) -> list[VerdictRow]:
        """Returns at most ``limit`` verdicts of a cycle, by site id, of the sites behind ``after``."""
        rest = sa.and_(verdicts.c.cycle == cycle, verdicts.c.site > after)
        query = sa.select(verdicts).where(rest).order_by(verdicts.c.site).limit(limit)
        with self.store.read() as c:
            return [_verdict_row(r) for r in c.execute(query)]

    def evidence_digest(self, cycle: str) -> str:
        """Returns the sha256 over every verdict of a cycle and its evidence, by site."""
        digest = hashlib.sha256()
        query = sa.select(verdicts.c.id, verdicts.c.verdict, verdicts.c.evidence)
        query = query.where(verdicts.c.cycle == cycle).order_by(verdicts.c.site)
        with self.store.read() as c:
            for r in c.execute(query):
                parts = [hashlib.sha256(text.encode()).hexdigest() for text in (r.verdict, r.evidence)]
                digest.update(" ".join((r.id, *parts)).encode())
        return digest.hexdigest()

    def latest(self, names: Sequence[str] | None = None) -> dict[str, VerdictRow]:
        """Returns the newest verdict of every site, or of ``names``."""
        query = newest(sa.select(verdicts))
        with self.store.read() as c:
            rows = c.execute(query) if names is None else named(c, query, sites.c.site, names)
            return {r.site: _verdict_row(r) for r in rows}

    def outcomes(self, cycle: str | None = None) -> dict[str, str]:
        """Returns pass, fail or hold by site, of a cycle or of every site's newest verdict, without reading
        the rest.
        """
        query = sa.select(verdicts.c.site, verdicts.c.outcome)
        query = newest(query) if cycle is None else query.where(verdicts.c.cycle == cycle)
        with self.store.read() as c:
            return {r.site: r.outcome for r in c.execute(query)}

    def rebased(self, version: int, *, fingerprint: str | None = None) -> dict[str, VerdictRow]:
        """Returns by site the newest verdict on a state that a rebase to source model ``version`` fitted.

        ``fingerprint``: only of cycles under that configuration.
        """
        rebases = REBASES if fingerprint is None else REBASES.where(cycles.c.fingerprint == fingerprint)
        query = sa.select(verdicts).join_from(verdicts, states, states.c.id == verdicts.c.state)
        query = query.where(states.c.source_version == version, verdicts.c.cycle.in_(rebases))
        with self.store.read() as c:
            return {r.site: _verdict_row(r) for r in c.execute(query.order_by(verdicts.c.at))}

    def findings(self) -> tuple[Counter[str], Counter[tuple[str, str]], datetime | None]:
        """Counts in every site's newest verdict: outcomes, (guard, call) of its findings; and when the last
        was given.
        """
        outcomes: Counter[str] = Counter()
        calls: Counter[tuple[str, str]] = Counter()
        last = ""
        query = newest(sa.select(verdicts.c.outcome, verdicts.c.verdict, verdicts.c.at))
        with self.store.read() as c:
            for r in c.execute(query):
                outcomes[r.outcome] += 1
                calls.update((x["guard"], x["call"]) for x in json.loads(r.verdict)["reasons"])
                last = max(last, r.at)
        return outcomes, calls, datetime.fromisoformat(last) if last else None

    def pin_anchor(self, digest: str, *, trunk: str, summary: Mapping[str, object], now: datetime) -> None:
        """Seals an anchor set: from now on only the bytes with this digest count for this trunk.

        A set that was sealed earlier counts again; the one that counts already stays as it is.
        """
        with self.store.write(exclusive=True) as c:
            current = c.execute(_sealed(trunk)).first()
            if current and current.digest == digest:
                return
            at = iso(now)
            if current and current.sealed_at >= at:  # the clock was set back
                at = iso(datetime.fromisoformat(current.sealed_at) + timedelta(microseconds=1))
            values = {"trunk": trunk, "summary": dump(dict(summary)), "sealed_at": at}
            again = anchors.update().where(anchors.c.digest == digest).values(values)
            if not c.execute(again).rowcount:
                c.execute(anchors.insert(), {"digest": digest, **values})
            self.store.append(c, "anchor", {"digest": digest, "trunk": trunk, **summary}, now)

    def anchor(self, trunk: str, *, at: datetime | None = None) -> str:
        """Returns the digest of the anchor set that counts for a trunk, or counted ``at`` a time.

        Raises LedgerError where none is sealed.
        """
        with self.store.read() as c:
            row = c.execute(_sealed(trunk)).first() if at is None else None
            digest = row.digest if row else None
            if at is not None:
                until = sa.select(audit.c.payload).where(audit.c.kind == "anchor", audit.c.at <= iso(at))
                sealed = [json.loads(text) for text in c.scalars(until.order_by(audit.c.seq))]
                digest = next((s["digest"] for s in reversed(sealed) if s["trunk"] == trunk), None)
        if digest is None:
            raise LedgerError(f"no anchor set is sealed for trunk {trunk[:12]}; `palisade train` seals one")
        return str(digest)

    def anchors(self) -> dict[str, str]:
        """Returns digest → trunk of every anchor set that was ever sealed, in the order of sealing."""
        with self.store.read() as c:
            query = sa.select(anchors.c.digest, anchors.c.trunk).order_by(anchors.c.sealed_at)
            return {r.digest: r.trunk for r in c.execute(query)}


def state_id(cycle: str, site: str) -> str:
    """Returns the id of the one state (and verdict) that a site can get in a cycle."""
    return hashlib.sha256(f"{cycle}/{site}".encode()).hexdigest()[:16]


def newest(query: sa.Select[*tuple[object, ...]]) -> sa.Select[*tuple[object, ...]]:
    """Returns a query over verdicts narrowed to each site's newest: the one furthest in its stream."""
    v = verdicts.alias("v")
    of_site = sa.and_(v.c.site == sites.c.site, v.c.cycle.not_in(REBASES))
    last = sa.select(v.c.id).where(of_site).order_by(v.c.offset_to.desc(), v.c.at.desc()).limit(1)
    return query.join_from(sites, verdicts, verdicts.c.id == last.correlate(sites).scalar_subquery())


def _sealed(trunk: str) -> sa.Select[*tuple[object, ...]]:
    return (
        sa.select(anchors.c.digest, anchors.c.sealed_at)
        .where(anchors.c.trunk == trunk)
        .order_by(anchors.c.sealed_at.desc())
    )


def _verdict_row(r: Row[*tuple[object, ...]]) -> VerdictRow:
    return make_row(VerdictRow, r, window=make_row(WindowRecord, r))


def _state_values(r: ShardRow, cycle: str, at: str) -> dict[str, object]:
    return {
        "id": state_id(cycle, r.site),
        "site": r.site,
        "cycle": cycle,
        "source_version": r.source_version,
        "method": r.method,
        "blob": r.blob,
        "slot": r.slot,
        "offset_from": r.offset_from,
        "offset_to": r.offset_to,
        "parent": r.parent,
        "created_at": at,
    }


def _verdict_values(r: ShardRow, cycle: str, at: str) -> dict[str, object]:
    verdict_id = state_id(cycle, r.site)
    return {
        "id": verdict_id,
        "site": r.site,
        "cycle": cycle,
        "state": verdict_id if r.blob else None,
        "outcome": r.verdict.outcome,
        "verdict": r.verdict.model_dump_json(),
        "evidence": r.evidence.model_dump_json(),
        "offset_from": r.offset_from,
        "offset_to": r.offset_to,
        "at": at,
        **{name: getattr(r.window, name) for name in WINDOW},
    }


def _cursor_update(
    r: ShardRow, cycle: str, site: Row[*tuple[object, ...]], serving: ServingRow | None
) -> dict[str, object]:
    """Returns the site's new cursor and the state it learns from next; after a failed candidate that is what
    it serves.
    """
    learner = state_id(cycle, r.site) if r.blob else site.learner
    if r.verdict.outcome == "fail":
        learner = serving.state if serving else None
    holds = site.holds + 1 if r.verdict.outcome == "hold" else 0
    return {
        "s": r.site,
        "v_learned_offset": r.offset_to,
        "v_learner": learner,
        "v_holds": holds,
        "v_status": site.status if site.status == RETIRED else "active",
        "v_reason": site.reason if site.status == RETIRED else "",
    }
