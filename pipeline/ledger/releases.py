"""What sites serve, and the rollouts that changed it. A promotion needs the stored passing verdict on that very state.

A rollout's plan is rows of ``targets``: however many sites move, moving them is one statement in one transaction, and its
audit row carries a digest over the rows that it made.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.plans import Plans, beside, has_verdict, living, moves
from pipeline.ledger.rows import LedgerError, ServingRow, StaleGeneration
from pipeline.ledger.tables import audit, iso, make_row, named, rollouts, served, sites, targets, verdicts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.engine import Connection, Row

COLUMNS = ("site", "counter", "state", "source_version", "rollout", "wave", "kind", "since", "audit")


class Releases(Plans):
    """Champion pointers."""

    def serving(self, names: Sequence[str] | None = None) -> dict[str, ServingRow]:
        """What sites serve, of all or of ``names``; a site without a row serves the champion source model as it is."""
        with self._read() as c:
            return newest_served(c, names)

    def served(self, site: str) -> list[ServingRow]:
        """Everything the site has served, oldest first."""
        with self._read() as c:
            rows = c.execute(sa.select(served).where(served.c.site == site).order_by(served.c.counter))
            return [make_row(ServingRow, r) for r in rows]

    def served_by(self, rollouts: Collection[str]) -> dict[str, ServingRow]:
        """The newest promotion of each site under these rollouts; a site that they did not promote is left out."""
        chosen = sa.and_(served.c.kind == "promote", served.c.rollout.in_(list(rollouts)))
        with self._read() as c:
            return {r.site: make_row(ServingRow, r) for r in c.execute(last_served(chosen))}

    def promote(
        self, rollout: str, wave: int, *, zones: Sequence[str] | None, without: Collection[str], reason: str, now: datetime,
        revision: int,
    ) -> int:  # fmt: skip
        """Let the sites of a planned wave serve their target → how many did not yet.

        Only those in ``zones`` (None = all), and none of ``without``. Nothing moves unless every one of them has its stored
        passing verdict, and the rollout is still at ``revision``.
        """
        t = targets.c
        with self._write(alone=True) as c:
            self._still(c, rollout, revision)
            now_on, joined = beside(c)
            chosen = sa.and_(t.rollout == rollout, t.wave == wave, t.site.not_in(without), living(), ~now_on)
            if zones is not None:
                chosen = sa.and_(chosen, t.zone.in_(zones))
            judged = joined.outerjoin(verdicts, has_verdict())
            unjudged = sa.select(t.site).select_from(judged).where(chosen, verdicts.c.id.is_(None)).limit(1)
            if (site := c.scalar(unjudged)) is not None:
                raise LedgerError(f"site {site}: no stored verdict passes what it would serve; nothing was promoted")
            rows = sa.select(t.site, sa.func.coalesce(served.c.counter, 0) + 1, t.state, t.source_version)
            rows = rows.select_from(joined).where(chosen)
            return self._move(c, rows, rollout=rollout, wave=wave + 1, kind="promote", reason=reason, now=now)

    def bring_back(
        self, rollout: str, only: Collection[str] | None, *, reason: str, now: datetime, revision: int
    ) -> int:
        """Let sites that serve their target (all that do, or ``only``) serve what the plan says they go back to → how many."""
        t = targets.c
        with self._write(alone=True) as c:
            self._still(c, rollout, revision)
            now_on, joined = beside(c)
            rows = sa.select(t.site, sa.func.coalesce(served.c.counter, 0) + 1, t.back_state, t.back_version)
            rows = rows.select_from(joined).where(t.rollout == rollout, now_on, moves())
            rows = rows if only is None else rows.where(t.site.in_(only))
            return self._move(c, rows, rollout=rollout, wave=0, kind="rollback", reason=reason, now=now)

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
        """Point single sites at (state, source version); counters only grow. Kind promote needs the passing verdict."""
        if not changes:
            return
        with self._write(alone=True) as c:
            if kind == "promote":
                _check_verdicts(c, changes)
            current = newest_served(c, list(changes))
            rows = [
                {"site": s, "counter": current[s].counter + 1 if s in current else 1, "state": state,
                 "source_version": version}
                for s, (state, version) in changes.items()
            ]  # fmt: skip
            self._move(c, rows, rollout=rollout, wave=wave, kind=kind, reason=reason, now=now)

    def verify_served(self) -> list[str]:
        """What is wrong with the record of what sites served: a line for each mistake.

        Every row belongs to an audit row, whose digest covers exactly its rows; a site's counter grows by one from row to row.
        """
        with self._read() as c:
            moves = sa.select(audit).where(audit.c.kind.in_(("promote", "rollback"))).order_by(audit.c.seq)
            covered = [(r.seq, *_covers(c, r)) for r in c.execute(moves).all()]
            found = [f"audit row {seq}: the rows that it covers were changed" for seq, same, _ in covered if not same]
            rows = int(c.scalar(sa.select(sa.func.count()).select_from(served)) or 0)
            orphans = rows - sum(count for _, _, count in covered)
            n, last = sa.func.count(), sa.func.max(served.c.counter)
            gaps = c.execute(
                sa.select(served.c.site, n.label("n"), last.label("last")).group_by(served.c.site).having(n != last)
            )
            found += [f"site {r.site}: {r.n} rows of what it served, but its counter is at {r.last}" for r in gaps]
        return found + ([f"{orphans} rows of what sites served belong to no audit row"] if orphans > 0 else [])

    def _still(self, c: Connection, rollout: str, revision: int) -> None:
        """A tick that was overtaken must not undo a rollback."""
        same = sa.and_(rollouts.c.id == rollout, rollouts.c.revision == revision)
        if c.scalar(sa.select(rollouts.c.id).where(same).with_for_update()) is None:
            raise StaleGeneration(f"{rollout}: somebody else moved it on; see `palisade rollout status`")

    def _move(
        self, c: Connection, rows: sa.Select[*tuple[object, ...]] | Sequence[Mapping[str, object]], *, rollout: str,
        wave: int, kind: str, reason: str, now: datetime,
    ) -> int:  # fmt: skip
        """Add ``rows`` (site, counter, state, source version) to what sites served, and the audit row that covers them."""
        self._head(c)
        seq = int(c.scalar(sa.select(sa.func.max(audit.c.seq))) or 0) + 1
        rest = {"rollout": rollout, "wave": wave, "kind": kind, "since": iso(now), "audit": seq}
        if isinstance(rows, sa.Select):
            full = rows.add_columns(*(sa.literal(v).label(k) for k, v in rest.items()))
            c.execute(served.insert().from_select(COLUMNS, full))
        else:
            c.execute(served.insert(), [{**r, **rest} for r in rows])
        count, digest = _digest(c, seq)
        if count:
            payload = {"rollout": rollout, "wave": wave, "reason": reason, "sites": count, "digest": digest}
            self._append(c, kind, payload, now)
        return count


def newest_served(c: Connection, names: Sequence[str] | None) -> dict[str, ServingRow]:
    """The newest row of each site, of all or of ``names``."""
    query = last_served(sa.true())
    rows = c.execute(query) if names is None else named(c, query, sites.c.site, names)
    return {r.site: make_row(ServingRow, r) for r in rows}


def last_served(chosen: sa.ColumnElement[bool]) -> sa.Select[*tuple[object, ...]]:
    """The row of each site with the largest counter that is ``chosen``: looked up per site, however long its history."""
    last = sa.select(served.c.counter).where(served.c.site == sites.c.site, chosen)
    newest = last.order_by(served.c.counter.desc()).limit(1).correlate(sites).scalar_subquery()
    row = served.alias("row")
    return sa.select(*row.c).join_from(sites, row, sa.and_(row.c.site == sites.c.site, row.c.counter == newest))


def _check_verdicts(c: Connection, changes: Mapping[str, tuple[str | None, int]]) -> None:
    query = sa.select(verdicts.c.site, verdicts.c.state).where(verdicts.c.outcome == "pass")
    wanted = [s for s, _ in changes.values() if s]  # a verdict has the id of its state
    passed = {(r.site, r.state) for r in named(c, query, verdicts.c.id, wanted)}
    for site, (state, _) in changes.items():
        if (site, state) not in passed:
            raise LedgerError(
                f"site {site}: no stored verdict passes state {state or 'of the source model'}; nothing was promoted"
            )


def _covers(c: Connection, row: Row[*tuple[object, ...]]) -> tuple[bool, int]:
    """Whether the rows of an audit row are what it says, and how many it says there are."""
    said = json.loads(str(row.payload))
    own = sa.and_(served.c.rollout == said["rollout"], served.c.wave == said["wave"], served.c.kind == row.kind)
    if "digest" in said:
        return _digest(c, row.seq, own) == (said["sites"], said["digest"]), said["sites"]
    found = named(c, sa.select(served).where(own), served.c.site, list(said["sites"]))  # schema 2 had the rows in the audit
    pointers = {(r.site, r.counter): [r.counter, r.state, r.source_version] for r in found}
    same = all(pointers.get((site, wanted[0])) == wanted for site, wanted in said["sites"].items())
    return same, len(said["sites"])


def _digest(c: Connection, seq: int, own: sa.ColumnElement[bool] | None = None) -> tuple[int, str]:
    """Number of the rows (that are ``own``) of an audit row, and sha256 over them, a line each, in order of the site."""
    s = served.c
    parts = (
        s.site,
        sa.cast(s.counter, sa.Text),
        sa.func.coalesce(s.state, "-"),
        sa.cast(s.source_version, sa.Text),
        s.since,
    )
    line = parts[0]
    for part in parts[1:]:
        line = line + " " + part
    lines = sa.select(line.label("line")).where(s.audit == seq, sa.true() if own is None else own).order_by(s.site).subquery()
    count, text = c.execute(sa.select(sa.func.count(), sa.func.aggregate_strings(lines.c.line, "\n"))).one()
    return int(count), hashlib.sha256((text or "").encode()).hexdigest()
