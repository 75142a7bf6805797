"""What sites serve, and the rollouts that changed it. A promotion needs the stored passing verdict on that very state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.rows import LedgerError, RolloutRow, ServingRow, StaleGeneration
from pipeline.ledger.store import Store
from pipeline.ledger.tables import iso, make_row, named, rollouts, served, sites, verdicts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.engine import Connection


class Releases(Store):
    """Champion pointers and rollouts."""

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

    def serve(
        self,
        changes: Mapping[str, tuple[str | None, int]],
        *,
        rollout: str,
        wave: int,
        kind: str,
        reason: str,
        now: datetime,
        revision: int | None = None,
    ) -> None:
        """Point sites at (state, source version), all in one transaction with one audit row; counters only grow.

        ``kind`` promote needs the stored passing verdict on that very state of that very site. With ``revision``, nothing
        moves unless the rollout is still at that revision: a tick that was overtaken must not undo a rollback.
        """
        if not changes:
            return
        with self._write(alone=True) as c:
            if revision is not None:
                same = sa.and_(rollouts.c.id == rollout, rollouts.c.revision == revision)
                if c.scalar(sa.select(rollouts.c.id).where(same).with_for_update()) is None:
                    raise StaleGeneration(f"{rollout}: somebody else moved it on; see `palisade rollout status`")
            if kind == "promote":
                _check_verdicts(c, changes)
            current = newest_served(c, list(changes))
            rows = [
                {"site": s, "counter": current[s].counter + 1 if s in current else 1, "state": state,
                 "source_version": version, "rollout": rollout, "wave": wave, "kind": kind, "since": iso(now)}
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
        with self._write(alone=True) as c:
            values = {
                "plan_hash": plan_hash,
                "status": status,
                "body": body,
                "revision": revision + 1,
                "updated_at": iso(now),
            }
            if revision == 0:
                c.execute(rollouts.insert(), {"id": rollout, "created_at": iso(now), **values})
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
        return [make_row(RolloutRow, r) for r in rows]


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
