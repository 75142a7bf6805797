"""What adaptation made: states and verdicts of a shard in one commit; and what it starts from: anchor sets, sources.

A shard's states, cursors, verdicts and counters of all its sites commit together, or nothing of them does.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.releases import newest_served
from pipeline.ledger.rows import LedgerError, SourceRow, StateRow, VerdictRow
from pipeline.ledger.store import Store
from pipeline.ledger.tables import anchors, dump, facts, iso, make_row, named, sites, sources, states, verdicts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.engine import Connection, Row

    from pipeline.ledger.rows import Cycle, ServingRow, ShardRow

MOVE = sites.update().where(sites.c.site == sa.bindparam("s"))
MOVE = MOVE.values({n: sa.bindparam(f"v_{n}") for n in ("learned", "learner", "holds", "status", "reason")})
LISTED = sa.select(
    *(c.label(f"{c.name}_json") if c.name in ("verdict", "evidence") else c for c in verdicts.c),
)


class Verdicts(Store):
    """Candidates with their verdicts, and the source models and anchor sets behind them."""

    def commit_shard(self, cycle: Cycle, rows: Sequence[ShardRow], *, now: datetime) -> list[str]:
        """States, cursors, verdicts and counters of many sites in one transaction → sites whose cursor had moved.

        Such a site is left as it is: its window was applied by somebody else, or by an earlier try of this call.
        """
        with self._write() as c:
            self._fence(c, cycle, shared=True)
            names = sorted({r.site for r in rows})
            locked = sa.select(sites).order_by(sites.c.site).with_for_update()
            found = {s.site: s for s in named(c, locked, sites.c.site, names)}
            own = [state_id(cycle.id, s) for s in names]
            judged = {s.site for s in named(c, sa.select(verdicts.c.site), verdicts.c.id, own)}
            fresh = [
                r for r in rows if r.site not in judged and r.site in found and found[r.site].learned == r.offset_from
            ]
            if fresh:
                current = newest_served(c, [r.site for r in fresh if r.verdict.outcome == "fail"])
                at = iso(now)
                made = [_state_values(r, cycle.id, at) for r in fresh if r.blob is not None]
                if made:
                    c.execute(states.insert(), made)
                c.execute(verdicts.insert(), [_verdict_values(r, cycle.id, at) for r in fresh])
                c.execute(MOVE, [_moved(r, cycle.id, found[r.site], current.get(r.site)) for r in fresh])
        done = {r.site for r in fresh}
        return [r.site for r in rows if r.site not in done]

    def state(self, state: str | None) -> StateRow | None:
        """A stored state by id."""
        return self.states([state]).get(state) if state else None

    def states(self, ids: Sequence[str | None]) -> dict[str, StateRow]:
        """Stored states by id."""
        wanted = [i for i in ids if i]
        with self._read() as c:
            rows = named(c, sa.select(states), states.c.id, wanted)
            return {r.id: make_row(StateRow, r) for r in rows}

    def verdicts(
        self, *, cycle: str | None = None, site: str | None = None, ids: Sequence[str] | None = None
    ) -> list[VerdictRow]:
        """Verdicts of a cycle, of a site or by id, oldest first."""
        query = LISTED.order_by(verdicts.c.at, verdicts.c.site, verdicts.c.offset_to)
        for column, value in ((verdicts.c.cycle, cycle), (verdicts.c.site, site)):
            query = query.where(column == value) if value is not None else query
        with self._read() as c:
            rows = c.execute(query) if ids is None else named(c, query, verdicts.c.id, ids)
            found = [make_row(VerdictRow, r) for r in rows]
        return found if ids is None else sorted(found, key=lambda v: (v.at, v.site, v.offset_to))

    def latest_verdicts(self) -> dict[str, VerdictRow]:
        """The newest verdict of every site."""
        with self._read() as c:
            return {r.site: make_row(VerdictRow, r) for r in c.execute(_newest(LISTED))}

    def outcomes(self, cycle: str | None = None) -> dict[str, str]:
        """pass, fail or hold by site, of a cycle or the newest of every site: a fleet's verdicts without what is in them."""
        query = sa.select(verdicts.c.site, verdicts.c.outcome)
        query = _newest(query) if cycle is None else query.where(verdicts.c.cycle == cycle)
        with self._read() as c:
            return {r.site: r.outcome for r in c.execute(query)}

    def pin_anchor(self, digest: str, *, trunk: str, summary: Mapping[str, object], now: datetime) -> None:
        """Seal an anchor set: from now on only the bytes with this digest count for this trunk."""
        with self._write(alone=True) as c:
            if not c.scalar(sa.select(anchors.c.digest).where(anchors.c.digest == digest)):
                values = {"digest": digest, "trunk": trunk, "summary": dump(dict(summary)), "sealed_at": iso(now)}
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
        with self._write(alone=True) as c:
            known = c.scalar(sa.select(sources.c.version).where(sources.c.digest == digest))
            if known is not None:
                return int(known)
            version = int(c.scalar(sa.select(sa.func.max(sources.c.version))) or 0) + 1
            values = {"version": version, "digest": digest, "trunk": trunk, "path": path,
                      "manifest": dump(dict(manifest)), "lineage": lineage, "created_at": iso(now)}  # fmt: skip
            c.execute(sources.insert(), values)
            self._append(c, "source", {"version": version, "digest": digest, "lineage": lineage}, now)
            if self._fact(c, "champion") is None:
                self._crown(c, version, now)
            return version

    def sources(self) -> list[SourceRow]:
        """Every source model version, oldest first."""
        with self._read() as c:
            rows = list(c.execute(sa.select(sources).order_by(sources.c.version)))
        return [make_row(SourceRow, r) for r in rows]

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
        with self._write(alone=True) as c:
            self._crown(c, version, now)

    def _crown(self, c: Connection, version: int, now: datetime) -> None:
        before = self._fact(c, "champion")
        c.execute(facts.delete().where(facts.c.key == "champion"))
        c.execute(facts.insert(), {"key": "champion", "value": str(version)})
        self._append(c, "champion", {"version": version, "before": before}, now)


def state_id(cycle: str, site: str) -> str:
    """Name of the one state (and verdict) that a site can get in a cycle."""
    return hashlib.sha256(f"{cycle}/{site}".encode()).hexdigest()[:16]


def _newest(query: sa.Select[*tuple[object, ...]]) -> sa.Select[*tuple[object, ...]]:
    """Of ``query`` over verdicts the newest row of each site: the one furthest in its stream."""
    v = verdicts.alias("v")
    last = sa.select(v.c.id).where(v.c.site == sites.c.site).order_by(v.c.offset_to.desc(), v.c.at.desc()).limit(1)
    return query.join_from(sites, verdicts, verdicts.c.id == last.correlate(sites).scalar_subquery())


def _state_values(r: ShardRow, cycle: str, at: str) -> dict[str, object]:
    return {"id": state_id(cycle, r.site), "site": r.site, "cycle": cycle, "source_version": r.source_version,
            "method": r.method, "blob": r.blob, "slot": r.slot, "offset_from": r.offset_from, "offset_to": r.offset_to,
            "parent": r.parent, "created_at": at}  # fmt: skip


def _verdict_values(r: ShardRow, cycle: str, at: str) -> dict[str, object]:
    own = state_id(cycle, r.site)
    return {"id": own, "site": r.site, "cycle": cycle, "state": own if r.blob else None, "outcome": r.verdict.outcome,
            "verdict": r.verdict.model_dump_json(), "evidence": r.evidence.model_dump_json(),
            "counters": dump(r.counters), "offset_from": r.offset_from, "offset_to": r.offset_to,
            "at": at}  # fmt: skip


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
