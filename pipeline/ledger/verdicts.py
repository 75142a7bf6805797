"""What adaptation made: states and verdicts of a shard in one commit; and the anchor sets that it is judged on.

A shard's states, cursors, verdicts and counters of all its sites commit together, or nothing of them does.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.releases import newest_served
from pipeline.ledger.rows import LedgerError, StateRow, VerdictRow
from pipeline.ledger.store import Store
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

MOVE = sites.update().where(sites.c.site == sa.bindparam("s"))
MOVE = MOVE.values({n: sa.bindparam(f"v_{n}") for n in ("learned", "learner", "holds", "status", "reason")})
LISTED = sa.select(
    *(c.label(f"{c.name}_json") if c.name in ("verdict", "evidence") else c for c in verdicts.c)
)
REBASES = sa.select(cycles.c.id).where(
    cycles.c.kind == "rebase"
)  # their verdicts lie beside the sites' streams


@dataclass(frozen=True)
class Verdicts:
    """Candidates with their verdicts, and the anchor sets behind them."""

    store: Store

    def commit(
        self, cycle: Cycle, rows: Sequence[ShardRow], *, now: datetime, rebased: bool = False
    ) -> list[str]:
        """States, cursors, verdicts and counters of many sites in one transaction → sites whose cursor had moved.

        Such a site is left as it is: its window was applied by somebody else, or by an earlier try of this call.
        ``rebased``: states and verdicts alone, on a window that ends at the cursor; the sites stay as they are.
        """
        with self.store.write() as c:
            self.store.fence(c, cycle, shared=True)
            names = sorted({r.site for r in rows})
            locked = sa.select(sites).order_by(sites.c.site).with_for_update()
            found = {s.site: s for s in named(c, locked, sites.c.site, names)}
            own = [state_id(cycle.id, s) for s in names]
            judged = {s.site for s in named(c, sa.select(verdicts.c.site), verdicts.c.id, own)}
            fresh = [
                r
                for r in rows
                if r.site not in judged
                and r.site in found
                and found[r.site].learned == (r.offset_to if rebased else r.offset_from)
            ]
            if fresh:
                current = newest_served(c, [r.site for r in fresh if r.verdict.outcome == "fail"])
                at = iso(now)
                made = [_state_values(r, cycle.id, at) for r in fresh if r.blob is not None]
                if made:
                    c.execute(states.insert(), made)
                c.execute(verdicts.insert(), [_verdict_values(r, cycle.id, at) for r in fresh])
                if not rebased:
                    c.execute(MOVE, [_moved(r, cycle.id, found[r.site], current.get(r.site)) for r in fresh])
        done = {r.site for r in fresh}
        return [r.site for r in rows if r.site not in done]

    def state(self, state: str | None) -> StateRow | None:
        """A stored state by id."""
        return self.states([state]).get(state) if state else None

    def states(self, ids: Sequence[str | None]) -> dict[str, StateRow]:
        """Stored states by id."""
        wanted = [i for i in ids if i]
        with self.store.read() as c:
            rows = named(c, sa.select(states), states.c.id, wanted)
            return {r.id: make_row(StateRow, r) for r in rows}

    def find(
        self, *, cycle: str | None = None, site: str | None = None, ids: Sequence[str] | None = None
    ) -> list[VerdictRow]:
        """Verdicts of a cycle, of a site or by id, oldest first; those of a rebase only by their cycle or id."""
        query = LISTED.order_by(verdicts.c.at, verdicts.c.site, verdicts.c.offset_to)
        for column, value in ((verdicts.c.cycle, cycle), (verdicts.c.site, site)):
            query = query.where(column == value) if value is not None else query
        if cycle is None and ids is None:
            query = query.where(verdicts.c.cycle.not_in(REBASES))
        with self.store.read() as c:
            rows = c.execute(query) if ids is None else named(c, query, verdicts.c.id, ids)
            found = [make_row(VerdictRow, r) for r in rows]
        return found if ids is None else sorted(found, key=lambda v: (v.at, v.site, v.offset_to))

    def page(self, cycle: str, *, after: str = "", limit: int = 1000) -> list[VerdictRow]:
        """At most ``limit`` verdicts of a cycle, of the sites behind ``after`` by id: a page of a fleet."""
        own = sa.and_(verdicts.c.cycle == cycle, verdicts.c.site > after)
        with self.store.read() as c:
            return [
                make_row(VerdictRow, r)
                for r in c.execute(LISTED.where(own).order_by(verdicts.c.site).limit(limit))
            ]

    def evidence_digest(self, cycle: str) -> str:
        """sha256 over every verdict of a cycle and its evidence, by site."""
        digest = hashlib.sha256()
        query = sa.select(verdicts.c.id, verdicts.c.verdict, verdicts.c.evidence).where(
            verdicts.c.cycle == cycle
        )
        with self.store.read() as c:
            for r in c.execute(query.order_by(verdicts.c.site)):
                parts = [hashlib.sha256(text.encode()).hexdigest() for text in (r.verdict, r.evidence)]
                digest.update(" ".join((r.id, *parts)).encode())
        return digest.hexdigest()

    def latest(self, names: Sequence[str] | None = None) -> dict[str, VerdictRow]:
        """The newest verdict of every site, or of ``names``."""
        query = newest(LISTED)
        with self.store.read() as c:
            rows = c.execute(query) if names is None else named(c, query, sites.c.site, names)
            return {r.site: make_row(VerdictRow, r) for r in rows}

    def outcomes(self, cycle: str | None = None) -> dict[str, str]:
        """pass, fail or hold by site, of a cycle or the newest of every site: a fleet's verdicts without what is in them."""
        query = sa.select(verdicts.c.site, verdicts.c.outcome)
        query = newest(query) if cycle is None else query.where(verdicts.c.cycle == cycle)
        with self.store.read() as c:
            return {r.site: r.outcome for r in c.execute(query)}

    def rebased(self, version: int, *, fingerprint: str | None = None) -> dict[str, VerdictRow]:
        """By site the newest verdict on a state that a rebase to this version made; ``fingerprint``: of such a cycle."""
        made = REBASES if fingerprint is None else REBASES.where(cycles.c.fingerprint == fingerprint)
        query = LISTED.join_from(verdicts, states, states.c.id == verdicts.c.state).order_by(verdicts.c.at)
        query = query.where(states.c.source_version == version, verdicts.c.cycle.in_(made))
        with self.store.read() as c:
            return {r.site: make_row(VerdictRow, r) for r in c.execute(query)}

    def findings(self) -> tuple[Counter[str], Counter[tuple[str, str]], datetime | None]:
        """Of the newest verdict of every site: outcomes, findings by guard and call, and when the last one was given."""
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
        """Seal an anchor set: from now on only the bytes with this digest count for this trunk.

        One that was sealed earlier counts again; the one that counts already stays as it is.
        """
        with self.store.write(exclusive=True) as c:
            newest = c.execute(_sealed(trunk)).first()
            if newest and newest.digest == digest:
                return
            at = iso(now)
            if newest and newest.sealed_at >= at:  # the clock was set back
                at = iso(datetime.fromisoformat(newest.sealed_at) + timedelta(microseconds=1))
            values = {"trunk": trunk, "summary": dump(dict(summary)), "sealed_at": at}
            again = anchors.update().where(anchors.c.digest == digest).values(values)
            if not c.execute(again).rowcount:
                c.execute(anchors.insert(), {"digest": digest, **values})
            self.store.append(c, "anchor", {"digest": digest, "trunk": trunk, **summary}, now)

    def anchor(self, trunk: str, *, at: datetime | None = None) -> str:
        """Digest of the anchor set that counts for a trunk, or counted ``at`` a time; LedgerError when none is sealed."""
        with self.store.read() as c:
            row = c.execute(_sealed(trunk)).first() if at is None else None
            found = row.digest if row else None
            if at is not None:
                told = sa.select(audit.c.payload).where(audit.c.kind == "anchor", audit.c.at <= iso(at))
                sealed = [json.loads(text) for text in c.scalars(told.order_by(audit.c.seq))]
                found = next((s["digest"] for s in reversed(sealed) if s["trunk"] == trunk), None)
        if found is None:
            raise LedgerError(f"no anchor set is sealed for trunk {trunk[:12]}; `palisade train` seals one")
        return str(found)

    def anchors(self) -> dict[str, str]:
        """Digest → trunk of every anchor set that was ever sealed, in the order in which they were."""
        with self.store.read() as c:
            query = sa.select(anchors.c.digest, anchors.c.trunk).order_by(anchors.c.sealed_at)
            return {r.digest: r.trunk for r in c.execute(query)}


def state_id(cycle: str, site: str) -> str:
    """Name of the one state (and verdict) that a site can get in a cycle."""
    return hashlib.sha256(f"{cycle}/{site}".encode()).hexdigest()[:16]


def _sealed(trunk: str) -> sa.Select[*tuple[object, ...]]:
    return (
        sa.select(anchors.c.digest, anchors.c.sealed_at)
        .where(anchors.c.trunk == trunk)
        .order_by(anchors.c.sealed_at.desc())
    )


def newest(query: sa.Select[*tuple[object, ...]]) -> sa.Select[*tuple[object, ...]]:
    """Of ``query`` over verdicts the newest row of each site: the one furthest in its stream."""
    v = verdicts.alias("v")
    own = sa.and_(v.c.site == sites.c.site, v.c.cycle.not_in(REBASES))
    last = sa.select(v.c.id).where(own).order_by(v.c.offset_to.desc(), v.c.at.desc()).limit(1)
    return query.join_from(sites, verdicts, verdicts.c.id == last.correlate(sites).scalar_subquery())


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
    own = state_id(cycle, r.site)
    return {
        "id": own,
        "site": r.site,
        "cycle": cycle,
        "state": own if r.blob else None,
        "outcome": r.verdict.outcome,
        "verdict": r.verdict.model_dump_json(),
        "evidence": r.evidence.model_dump_json(),
        "counters": dump(r.counters),
        "offset_from": r.offset_from,
        "offset_to": r.offset_to,
        "at": at,
    }


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
        "v_status": site.status if site.status == RETIRED else "active",
        "v_reason": site.reason if site.status == RETIRED else "",
    }
