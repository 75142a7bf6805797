"""What is still needed of the stores beside the ledger; everything else there may be deleted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.releases import last_served
from pipeline.ledger.rows import Needed
from pipeline.ledger.store import Store
from pipeline.ledger.tables import cycles, iso, named, rollouts, served, sites, states, targets, verdicts
from pipeline.rollout import TERMINAL, Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from sqlalchemy.engine import Connection

NEVER_STARTED = frozenset({Status.PLANNED, Status.SUPERSEDED, Status.EXPIRED})


@dataclass(frozen=True)
class Garbage:
    """What may not be deleted."""

    store: Store

    def needed(self, *, since: datetime) -> Needed:
        """Returns everything that is still needed, in one snapshot.

        ``since`` is the retention: rows of that time or later are kept with their blobs.

        State blobs: of what every site serves; of what it learns from next; of every state made or served
        since ``since``, or made by an unfinished cycle; and of what a rollback may return to: each site's
        newest promotion under a completed rollout, and every state that the plan of an unfinished rollout, or
        of the newest one that was ever started, names as target or as way back.

        Outcome blobs: of the verdicts of unfinished cycles and of those given since ``since``.

        Features: of each site from the first offset that it has not learned from, or from the window of the
        first verdict whose outcomes are kept: outcomes cannot be read without the features of their window.

        A shard writes its blobs before it commits. So the ledger may not name a new blob yet: the caller
        deletes nothing that was written after it asked, nor in the time before that a window takes.
        """
        with self.store.read() as c:
            kept = sa.or_(verdicts.c.at >= iso(since), verdicts.c.cycle.in_(_unfinished_cycles()))
            features = {
                r.site: r.learned_offset for r in c.execute(sa.select(sites.c.site, sites.c.learned_offset))
            }
            outcomes: set[str] = set()
            for r in c.execute(
                sa.select(verdicts.c.site, verdicts.c.offset_from, verdicts.c.outcomes_blob).where(kept)
            ):
                features[r.site] = min(features.get(r.site, r.offset_from), r.offset_from)
                if r.outcomes_blob:
                    outcomes.add(r.outcomes_blob)
            return Needed(frozenset(_state_blobs(c, iso(since))), frozenset(outcomes), features)


def _unfinished_cycles() -> sa.Select[tuple[str]]:
    return sa.select(cycles.c.id).where(cycles.c.status == "running")


def _state_blobs(c: Connection, since: str) -> set[str]:
    young = sa.or_(states.c.created_at >= since, states.c.cycle.in_(_unfinished_cycles()))
    blobs = set(c.scalars(sa.select(states.c.blob).where(young).distinct()))
    completed = sa.select(rollouts.c.id).where(rollouts.c.status == Status.COMPLETED)
    ids = {
        *c.scalars(sa.select(sites.c.learner)),
        *c.scalars(sa.select(served.c.state).where(served.c.since >= since)),
        *(r.state for r in c.execute(last_served(sa.true()))),
        *(
            r.state
            for r in c.execute(
                last_served(sa.and_(served.c.kind == "promote", served.c.rollout.in_(completed)))
            )
        ),
        *_planned(c),
    } - {None}
    return blobs | {r.blob for r in named(c, sa.select(states.c.blob), states.c.id, sorted(ids))}


def _planned(c: Connection) -> Iterator[str]:
    """States named by the plans that may still move a site."""
    started = False
    t = targets.c
    newest_first = sa.select(rollouts.c.id, rollouts.c.status)
    for r in list(c.execute(newest_first.order_by(rollouts.c.created_at.desc(), rollouts.c.id.desc()))):
        undone_next = not started and r.status not in NEVER_STARTED
        started = started or undone_next
        if undone_next or r.status not in TERMINAL:
            for state in (t.state, t.back_state):
                yield from c.scalars(sa.select(state).where(t.rollout == r.id, state.is_not(None)))
