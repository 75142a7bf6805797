"""States that sites serve, and the promotions and rollbacks that changed them.

A promotion needs the stored passing verdict on that very state. A rollout's plan is rows of ``targets``:
moving any number of sites is one statement in one transaction, and its audit row carries a digest over the
rows that it made.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from pipeline.ledger.plans import beside_of, champion, has_verdict, living, moves, of_wave, passes, remember
from pipeline.ledger.rows import LedgerError, ServingRow, StaleGeneration
from pipeline.ledger.tables import (
    audit,
    iso,
    make_row,
    named,
    rollouts,
    served,
    sites,
    states,
    targets,
    verdicts,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.engine import Connection, Row

    from pipeline.ledger.store import Store
    from pipeline.rollout import Action, Promote

    Line = tuple[object, ...] | Row[*tuple[object, ...]]

COLUMNS = ("site", "counter", "state", "source_version", "rollout", "wave", "kind", "since", "audit")


STILL = (
    sa.select(rollouts.c.id)
    .where(rollouts.c.id == sa.bindparam("of"), rollouts.c.revision == sa.bindparam("at"))
    .with_for_update()
)


class Memory(NamedTuple):
    """What the state machine remembers after a step."""

    status: str
    body: str
    event: str
    roles: Mapping[str, int | None]  # source models that become champion or challenger with it


@dataclass(frozen=True)
class Releases:
    """Champion pointers."""

    store: Store

    def serving(self, names: Sequence[str] | None = None) -> dict[str, ServingRow]:
        """Returns the newest served row by site, of all or of ``names``.

        A site without a row serves the champion source model as it is.
        """
        with self.store.read() as c:
            return newest_served(c, names)

    def history(self, site: str) -> list[ServingRow]:
        """Everything the site has served, oldest first."""
        with self.store.read() as c:
            rows = c.execute(sa.select(served).where(served.c.site == site).order_by(served.c.counter))
            return [make_row(ServingRow, r) for r in rows]

    def promoted_by(self, rollouts: Collection[str]) -> dict[str, ServingRow]:
        """Returns each site's newest promotion under these rollouts; other sites are left out."""
        chosen = sa.and_(served.c.kind == "promote", served.c.rollout.in_(list(rollouts)))
        with self.store.read() as c:
            return {r.site: make_row(ServingRow, r) for r in c.execute(last_served(chosen))}

    def carry_out(
        self,
        rollout: str,
        actions: Sequence[Action],
        *,
        without: Collection[str],
        reason: str,
        revision: int,
        now: datetime,
        memory: Memory | None = None,
    ) -> int:
        """Carries out the state machine's decision in one transaction and returns how many sites moved.

        It stores ``memory`` first. Of a wave to promote those sites move that do not serve their target yet,
        in the action's time zones, and none of ``without``. Nothing is written unless each of them has its
        stored passing verdict and the rollout is still at ``revision``.
        """
        with self.store.write(exclusive=True) as c:
            if memory is None:
                self._still(c, rollout, revision)
            else:
                remember(c, rollout, status=memory.status, body=memory.body, revision=revision, now=now)
                for role, version in memory.roles.items():
                    self.store.set_role(c, role, version, now)
                self.store.append(
                    c, "rollout", {"rollout": rollout, "status": memory.status, "event": memory.event}, now
                )
            moved = 0
            for a in actions:
                if a.kind == "promote":
                    moved += self._promote(c, rollout, a, without=without, reason=reason, now=now)
                elif a.kind == "rollback":
                    moved += self._bring_back(c, rollout, a.sites, reason=reason, now=now)
        return moved

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
        """Points single sites at (state, source version); kind promote needs the passing verdict.

        The counters of a site only grow.
        """
        if not changes:
            return
        with self.store.write(exclusive=True) as c:
            if kind == "promote":
                _check_verdicts(c, changes)
            current = newest_served(c, list(changes))
            rows = [
                {
                    "site": s,
                    "counter": current[s].counter + 1 if s in current else 1,
                    "state": state,
                    "source_version": version,
                }
                for s, (state, version) in changes.items()
            ]
            self._move(c, rows, rollout=rollout, wave=wave, kind=kind, reason=reason, now=now)

    def verify(self) -> list[str]:
        """What is wrong with the record of what sites served: a line for each mistake.

        Every row belongs to an audit row, whose digest covers exactly its rows; a site's counter grows by one
        from row to row.
        """
        with self.store.read() as c:
            moves = sa.select(audit).where(audit.c.kind.in_(("promote", "rollback"))).order_by(audit.c.seq)
            by_row = groupby(
                c.execute(sa.select(served).where(served.c.audit != 0).order_by(served.c.audit)),
                lambda r: r.audit,
            )
            rows = {seq: list(own) for seq, own in by_row}
            covered = [(r.seq, *_covers(c, r, rows.pop(r.seq, []))) for r in c.execute(moves).all()]
            found = [
                f"audit row {seq}: the rows that it covers were changed"
                for seq, same, _ in covered
                if not same
            ]
            total = int(c.scalar(sa.select(sa.func.count()).select_from(served)) or 0)
            orphans = total - sum(count for _, _, count in covered)
            n, last = sa.func.count(), sa.func.max(served.c.counter)
            gaps = c.execute(
                sa.select(served.c.site, n.label("n"), last.label("last"))
                .group_by(served.c.site)
                .having(n != last)
            )
            found += [
                f"site {r.site}: {r.n} rows of what it served, but its counter is at {r.last}" for r in gaps
            ]
        return found + (
            [f"{orphans} rows of what sites served belong to no audit row"] if orphans > 0 else []
        )

    def served_without_verdict(self) -> list[str]:
        """Returns one line per release that the record does not justify.

        That is a release that went back without being a rollback, a promotion without a stored verdict that
        passes it, and a pointer to a state that is not stored.
        """
        with self.store.read() as c:
            found = [*_went_back(c.execute(_history())), *map(_unproven, c.execute(_without_verdict()))]
            for what, table, pointer in (
                ("learns from", sites, sites.c.learner),
                ("served", served, served.c.state),
            ):
                lost = sa.select(table.c.site, pointer.label("state")).join_from(
                    table, states, states.c.id == pointer, isouter=True
                )
                lost = lost.where(pointer.is_not(None), states.c.id.is_(None)).order_by(table.c.site)
                found += [
                    f"site {r.site}: {what} state {r.state}, which is not stored" for r in c.execute(lost)
                ]
            return found

    def _still(self, c: Connection, rollout: str, revision: int) -> None:
        if c.scalar(STILL, {"of": rollout, "at": revision}) is None:
            raise StaleGeneration(f"{rollout}: somebody else moved it on; see `palisade rollout status`")

    def _promote(
        self, c: Connection, rollout: str, a: Promote, *, without: Collection[str], reason: str, now: datetime
    ) -> int:
        unjudged, rows = _late(champion(c), a.zones is None)
        which: dict[str, object] = {"rollout": rollout, "wave": a.wave, "without": list(without)}
        which |= {} if a.zones is None else {"zones": list(a.zones)}
        if (site := c.scalar(unjudged, which)) is not None:
            raise LedgerError(
                f"site {site}: no stored verdict passes what it would serve; nothing was promoted"
            )
        return self._move(
            c, rows, rollout=rollout, wave=a.wave + 1, kind="promote", reason=reason, now=now, which=which
        )

    def _bring_back(
        self, c: Connection, rollout: str, only: Collection[str] | None, *, reason: str, now: datetime
    ) -> int:
        which = {"rollout": rollout} if only is None else {"rollout": rollout, "only": list(only)}
        rows = _returning(champion(c), only is None)
        return self._move(
            c, rows, rollout=rollout, wave=0, kind="rollback", reason=reason, now=now, which=which
        )

    def _move(
        self,
        c: Connection,
        rows: sa.Insert | Sequence[Mapping[str, object]],
        *,
        rollout: str,
        wave: int,
        kind: str,
        reason: str,
        now: datetime,
        which: Mapping[str, object] | None = None,
    ) -> int:
        """Adds ``rows`` to ``served`` with the audit row that covers them, and returns how many there are.

        ``which``: values of a query's own parameters.
        """
        seq = self.store.next_audit(c)
        rest = {"rollout": rollout, "wave": wave, "kind": kind, "since": iso(now), "audit": seq}
        made: Sequence[Line]
        if isinstance(rows, sa.Insert):
            made = c.execute(rows, {**(which or {}), **{f"v_{k}": v for k, v in rest.items()}}).all()
        else:
            c.execute(served.insert(), [{**r, **rest} for r in rows])
            made = [(r["site"], r["counter"], r["state"], r["source_version"]) for r in rows]
        count, digest = len(made), _digest(made)
        if count:
            payload = {"rollout": rollout, "wave": wave, "reason": reason, "sites": count, "digest": digest}
            self.store.append(c, kind, payload, now)
        return count


@lru_cache(maxsize=16)
def _late(champion: int, everywhere: bool) -> tuple[sa.Select[*tuple[object, ...]], sa.Insert]:
    """Returns the query for a late site without its verdict, and the insert that promotes all late sites."""
    t, (now_on, joined) = targets.c, beside_of(champion)
    chosen = sa.and_(of_wave(), living(), ~now_on)
    if not everywhere:
        chosen = sa.and_(chosen, t.zone.in_(sa.bindparam("zones", expanding=True)))
    unjudged = sa.select(t.site).select_from(joined).where(chosen, ~has_verdict()).limit(1)
    return unjudged, _rows(joined, t.state, t.source_version, chosen)


@lru_cache(maxsize=16)
def _returning(champion: int, every: bool) -> sa.Insert:
    """Sites that serve their target and go back, as rows of ``served``."""
    t, (now_on, joined) = targets.c, beside_of(champion)
    chosen = sa.and_(t.rollout == sa.bindparam("rollout"), now_on, moves())
    if not every:
        chosen = sa.and_(chosen, t.site.in_(sa.bindparam("only", expanding=True)))
    return _rows(joined, t.back_state, t.back_version, chosen)


def _rows(
    joined: sa.FromClause,
    state: sa.Column[object],
    version: sa.Column[object],
    chosen: sa.ColumnElement[bool],
) -> sa.Insert:
    counter = sa.func.coalesce(served.c.counter, 0) + 1
    rest = [sa.cast(sa.bindparam(f"v_{name}"), served.c[name].type).label(name) for name in COLUMNS[4:]]
    rows = sa.select(targets.c.site, counter, state, version, *rest).select_from(joined).where(chosen)
    return served.insert().from_select(COLUMNS, rows).returning(*(served.c[name] for name in COLUMNS[:4]))


def newest_served(c: Connection, names: Sequence[str] | None) -> dict[str, ServingRow]:
    """The newest row of each site, of all or of ``names``."""
    query = last_served(sa.true())
    rows = c.execute(query) if names is None else named(c, query, sites.c.site, names)
    return {r.site: make_row(ServingRow, r) for r in rows}


def last_served(chosen: sa.ColumnElement[bool]) -> sa.Select[*tuple[object, ...]]:
    """Returns the query for each site's newest ``chosen`` row, which is looked up per site."""
    last = sa.select(served.c.counter).where(served.c.site == sites.c.site, chosen)
    newest = last.order_by(served.c.counter.desc()).limit(1).correlate(sites).scalar_subquery()
    row = served.alias("row")
    return sa.select(*row.c).join_from(
        sites, row, sa.and_(row.c.site == sites.c.site, row.c.counter == newest)
    )


def _check_verdicts(c: Connection, changes: Mapping[str, tuple[str | None, int]]) -> None:
    query = sa.select(verdicts.c.site, verdicts.c.state).where(verdicts.c.outcome == "pass")
    wanted = [s for s, _ in changes.values() if s]  # a verdict has the id of its state
    passed = {(r.site, r.state) for r in named(c, query, verdicts.c.id, wanted)}
    for site, (state, _) in changes.items():
        if (site, state) not in passed:
            raise LedgerError(
                f"site {site}: no stored verdict passes state {state or 'of the source model'}; "
                "nothing was promoted"
            )


def _covers(
    c: Connection, row: Row[*tuple[object, ...]], own: Sequence[Row[*tuple[object, ...]]]
) -> tuple[bool, int]:
    """Whether the rows ``own`` of an audit row are what it says, and how many it says there are."""
    said = json.loads(str(row.payload))
    if "digest" in said:
        same = {(r.rollout, r.wave, r.kind, r.since) for r in own} == {
            (said["rollout"], said["wave"], row.kind, row.at)
        }
        told = len(own), _digest([(r.site, r.counter, r.state, r.source_version) for r in own])
        return same and told == (said["sites"], said["digest"]), said["sites"]
    # schema 2 had the rows in the audit
    of = sa.and_(
        served.c.rollout == said["rollout"], served.c.wave == said["wave"], served.c.kind == row.kind
    )
    found = named(
        c, sa.select(served).where(of, served.c.since == row.at), served.c.site, list(said["sites"])
    )
    pointers = {(r.site, r.counter): [r.counter, r.state, r.source_version] for r in found}
    same = all(pointers.get((site, wanted[0])) == wanted for site, wanted in said["sites"].items())
    return same, len(said["sites"])


def _digest(rows: Sequence[Line]) -> str:
    """sha256 over rows (site, counter, state, source version), a line each, in order of the site."""
    lines = sorted([f"{site} {counter} {state or '-'} {version}" for site, counter, state, version in rows])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _history() -> sa.Select[*tuple[object, ...]]:
    """Everything that was ever served, with how far in its stream each state was."""
    query = sa.select(served, states.c.offset_to).join_from(
        served, states, states.c.id == served.c.state, isouter=True
    )
    return query.order_by(served.c.site, served.c.counter)


def _went_back(rows: sa.CursorResult[*tuple[object, ...]]) -> Iterator[str]:
    site, before = "", (0, 0)
    for r in rows:
        reached = (r.source_version, r.offset_to or 0)
        if r.site == site and r.kind != "rollback" and reached < before:
            yield f"site {site}: release {r.counter} by {r.rollout} went back without a rollback record"
        site, before = r.site, reached


def _without_verdict() -> sa.Select[*tuple[object, ...]]:
    """Promotions whose verdict, of the plan or of the state itself, is not stored, of another site or state,
    or no pass.
    """
    s = served.c
    planned = sa.and_(targets.c.rollout == s.rollout, targets.c.site == s.site)
    verdict = sa.func.coalesce(sa.func.nullif(targets.c.verdict, ""), s.state)
    passed = passes(verdict, site=s.site, state=s.state, version=s.source_version)
    query = sa.select(served).join_from(served, targets, planned, isouter=True)
    query = query.where(s.kind == "promote", ~passed)
    return query.order_by(served.c.site, served.c.counter)


def _unproven(r: Row[*tuple[object, ...]]) -> str:
    what = f"state {r.state}" if r.state else f"source v{r.source_version}"
    release = f"site {r.site}: release {r.counter} by {r.rollout}"
    return f"{release} promoted {what} without a stored verdict that passes it"
