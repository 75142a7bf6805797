"""Rollouts and their plans: the state machine's memory is one row, each planned site a row of ``targets``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from pipeline.ledger.rows import RolloutRow, StaleGeneration
from pipeline.ledger.store import Store
from pipeline.ledger.tables import (
    RETIRED,
    add,
    facts,
    iso,
    make_row,
    named,
    parts,
    rollouts,
    segments,
    served,
    sites,
    source_verdicts,
    targets,
    verdicts,
)
from pipeline.rollout import Excluded, Pointer, Target, WaveObservation

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from sqlalchemy.engine import Connection

    from pipeline.rollout import Draft

    Where = sa.ColumnElement[bool]
    Column = sa.ColumnElement[object]

CHAMPION = sa.select(facts.c.value).where(facts.c.key == "champion")
OUT = -1  # wave of a site that is in none
REMEMBER = (
    rollouts.update()
    .where(rollouts.c.id == sa.bindparam("of"), rollouts.c.revision == sa.bindparam("at"))
    .values({name: sa.bindparam(name) for name in ("status", "body", "revision", "updated_at")})
)


class Promoted(NamedTuple):
    """A site that serves what the plan gave it."""

    site: str
    wave: int
    to: Pointer
    back: Pointer


class WaveCount(NamedTuple):
    """Sites of one wave of a rollout."""

    wave: int  # index
    sites: int
    promoted: int  # serve their target
    silent: int  # of those, without any capture since


@dataclass(frozen=True)
class Plans:
    """Rollouts and their plans."""

    store: Store

    def save(
        self,
        rollout: str,
        *,
        plan_hash: str,
        status: str,
        body: str,
        revision: int,
        event: Mapping[str, object],
        now: datetime,
        draft: Draft | None = None,
        joined: Mapping[str, Target] | None = None,
        roles: Mapping[str, int | None] | None = None,
    ) -> int:
        """Stores a rollout's state if nobody did since ``revision`` (0 = new); returns the new revision.

        ``draft`` is its plan with the first state; ``joined`` are sites added to it. ``roles`` are source
        models that become champion or challenger with it (None: nobody), so that no overtaken driver names
        one.
        """
        with self.store.write(exclusive=True) as c:
            if revision == 0:
                new = {
                    "id": rollout,
                    "plan_hash": plan_hash,
                    "status": status,
                    "body": body,
                    "revision": 1,
                    "created_at": _after_all(c, now),
                    "updated_at": iso(now),
                }
                c.execute(rollouts.insert(), new)
            else:
                remember(c, rollout, status=status, body=body, revision=revision, now=now)
            if joined:
                for part in parts(list(joined)):
                    c.execute(targets.delete().where(targets.c.rollout == rollout, targets.c.site.in_(part)))
            add(c, targets, _target_rows(rollout, draft, joined or {}))
            for role, version in (roles or {}).items():
                self.store.set_role(c, role, version, now)
            self.store.append(c, "rollout", {"rollout": rollout, "status": status, **event}, now)
        return revision + 1

    def rollouts(self) -> list[RolloutRow]:
        """Every rollout, newest first."""
        with self.store.read() as c:
            rows = list(
                c.execute(sa.select(rollouts).order_by(rollouts.c.created_at.desc(), rollouts.c.id.desc()))
            )
        return [make_row(RolloutRow, r) for r in rows]

    def rollout(self, rollout: str) -> RolloutRow:
        """One rollout as it is stored now."""
        with self.store.read() as c:
            return make_row(RolloutRow, c.execute(sa.select(rollouts).where(rollouts.c.id == rollout)).one())

    def targets(self, rollout: str, names: Sequence[str] | None = None) -> dict[str, Target]:
        """What the plan says of its sites, of all or of ``names``."""
        query = (
            sa.select(targets)
            .where(targets.c.rollout == rollout, targets.c.wave != OUT)
            .order_by(targets.c.site)
        )
        with self.store.read() as c:
            rows = c.execute(query) if names is None else named(c, query, targets.c.site, names)
            return {
                r.site: Target(
                    r.wave,
                    Pointer(r.state, r.source_version),
                    Pointer(r.back_state, r.back_version),
                    r.verdict,
                    r.zone,
                )
                for r in rows
            }

    def sites(self, rollout: str) -> frozenset[str]:
        """Sites that the plan says anything of, and the controls that it knew."""
        with self.store.read() as c:
            return frozenset(c.scalars(sa.select(targets.c.site).where(targets.c.rollout == rollout)))

    def excluded(self, rollout: str, names: Sequence[str] | None = None) -> dict[str, Excluded]:
        """Why sites, all or of ``names``, are in no wave of the plan."""
        query = (
            sa.select(targets)
            .where(targets.c.rollout == rollout, targets.c.wave == OUT)
            .order_by(targets.c.site)
        )
        with self.store.read() as c:
            rows = c.execute(query) if names is None else named(c, query, targets.c.site, names)
            return {r.site: Excluded(r.reason, r.verdict or None) for r in rows}

    def observe_wave(self, rollout: str, wave: int, *, without: Collection[str]) -> WaveObservation:
        """Counts a wave's sites in service without the sites ``without``, and the late ones among them."""
        with self.store.read() as c:
            rows = list(
                c.execute(_seen(champion(c)), {"rollout": rollout, "wave": wave, "without": list(without)})
            )
        names = sorted(r.first for r in rows if r.first is not None)
        return WaveObservation(
            sites=sum(r.n for r in rows),
            not_serving={r.zone: int(r.late) for r in rows if r.late},
            first_not_serving=names[0] if names else "",
        )

    def returnable(self, rollout: str, only: Collection[str] | None = None) -> int:
        """How many sites, of all or of ``only``, serve their target and could go back."""
        t = targets.c
        with self.store.read() as c:
            query = _still_there(champion(c)).where(t.rollout == rollout)
            return int(c.scalar(query if only is None else query.where(t.site.in_(only))) or 0)

    def promoted(self, rollout: str, *, upto: int, names: Sequence[str]) -> list[Promoted]:
        """Of the sites ``names`` those of the waves up to index ``upto`` that serve their target, by name."""
        t = targets.c
        with self.store.read() as c:
            now_on, joined = beside(c)
            query = (
                sa.select(targets)
                .select_from(joined)
                .where(t.rollout == rollout, t.wave.between(0, upto), now_on, living())
            )
            rows = named(c, query, t.site, names)
        return sorted(
            Promoted(
                r.site, r.wave, Pointer(r.state, r.source_version), Pointer(r.back_state, r.back_version)
            )
            for r in rows
        )

    def silent(
        self, rollout: str, *, upto: int, samples: int, without: Collection[str]
    ) -> dict[int, tuple[int, str]]:
        """Returns by wave the number of sites with fewer good ``samples`` since, and the first of them.

        Of the waves up to index ``upto``; only sites in service that serve their target count.
        """
        t, s = targets.c, segments.c
        if samples <= 0:
            return {}
        with self.store.read() as c:
            now_on, joined = beside(c)
            since = sa.select(sa.func.sum(s.good)).where(
                s.site == t.site, s.ingested_at > sa.func.coalesce(served.c.since, "")
            )
            brought = sa.func.coalesce(since.correlate(targets, served).scalar_subquery(), 0)
            query = sa.select(
                t.wave, sa.func.count().label("n"), sa.func.min(t.site).label("first")
            ).select_from(joined)
            query = query.where(
                t.rollout == rollout,
                t.wave.between(0, upto),
                t.site.not_in(without),
                now_on,
                living(),
                brought < samples,
            ).group_by(t.wave)
            return {r.wave: (r.n, r.first) for r in c.execute(query)}

    def plan_hash(self, rollout: str) -> str | None:
        """The plan hash of a rollout."""
        with self.store.read() as c:
            return c.scalar(sa.select(rollouts.c.plan_hash).where(rollouts.c.id == rollout))

    def wave_counts(self, rollout: str) -> list[WaveCount]:
        """How far each wave of a rollout is, by what its sites serve and have sent since."""
        newest = sa.select(segments.c.ingested_at).where(segments.c.site == targets.c.site)
        newest = newest.order_by(segments.c.base_offset.desc()).limit(1).correlate(targets).scalar_subquery()
        with self.store.read() as c:
            now_on, joined = beside(c)
            quiet = sa.and_(now_on, sa.func.coalesce(newest, "") <= sa.func.coalesce(served.c.since, ""))
            sums = (sa.func.sum(sa.case((w, 1), else_=0)) for w in (now_on, quiet))
            query = (
                sa.select(targets.c.wave, sa.func.count(), *sums).select_from(joined).group_by(targets.c.wave)
            )
            query = query.where(targets.c.rollout == rollout, targets.c.wave != OUT, living())
            return [WaveCount(*map(int, r)) for r in c.execute(query.order_by(targets.c.wave))]


def beside(c: Connection) -> tuple[Where, sa.FromClause]:
    """Returns the condition that a site serves its target, and the tables that it is asked of."""
    return beside_of(champion(c))


def champion(c: Connection) -> int:
    """The source model that sites without a row serve."""
    return int(c.scalar(CHAMPION) or 0)


@lru_cache(maxsize=8)
def beside_of(champion: int) -> tuple[Where, sa.FromClause]:
    """The same for a champion source model."""
    earlier = served.alias("earlier")
    last = (
        sa.select(sa.func.max(earlier.c.counter)).where(earlier.c.site == targets.c.site).correlate(targets)
    )
    newest = sa.and_(served.c.site == targets.c.site, served.c.counter == last.scalar_subquery())
    version = sa.func.coalesce(served.c.source_version, champion)
    on = sa.and_(
        targets.c.state.is_not_distinct_from(served.c.state),
        targets.c.source_version == version,
        targets.c.wave != OUT,
    )
    return on, targets.outerjoin(served, newest)


@lru_cache(maxsize=8)
def _seen(champion: int) -> sa.Select[*tuple[object, ...]]:
    t, (now_on, joined) = targets.c, beside_of(champion)
    n, late = sa.func.count(), sa.func.sum(sa.case((now_on, 0), else_=1))
    first = sa.func.min(sa.case((now_on, None), else_=t.site))
    query = sa.select(t.zone, n.label("n"), late.label("late"), first.label("first")).select_from(joined)
    return query.where(of_wave(), living()).group_by(t.zone)  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=8)
def _still_there(champion: int) -> sa.Select[int]:
    """Returns the query for the number of targets that their sites serve and could leave."""
    t = targets.c
    same = sa.and_(served.c.state.is_not_distinct_from(t.state), served.c.source_version == t.source_version)
    newest = (
        sa.select(same)
        .where(served.c.site == t.site)
        .order_by(served.c.counter.desc())
        .limit(1)
        .correlate(targets)
    )
    bare = sa.and_(t.state.is_(None), t.source_version == champion)  # what a site without a row serves
    on = sa.func.coalesce(newest.scalar_subquery(), bare)
    return sa.select(sa.func.count()).select_from(targets).where(t.wave != OUT, on, moves())


def of_wave() -> Where:
    """That a target is of the ``wave`` of ``rollout`` and not among those that are left out (``without``)."""
    t, without = targets.c, sa.bindparam("without", expanding=True)
    return sa.and_(
        t.rollout == sa.bindparam("rollout"), t.wave == sa.bindparam("wave"), t.site.not_in(without)
    )


def living() -> Where:
    """That a target's site is not retired."""
    return targets.c.site.not_in(sa.select(sites.c.site).where(sites.c.status == RETIRED))


def moves() -> Where:
    """Whether going back changes what a site serves."""
    t = targets.c
    return ~sa.and_(t.state.is_not_distinct_from(t.back_state), t.source_version == t.back_version)


def has_verdict() -> Where:
    """Returns the condition that the passing verdict on a target is stored."""
    t = targets.c
    return passes(t.verdict, site=t.site, state=t.state, version=t.source_version)


def passes(verdict: Column, *, site: Column, state: Column, version: Column) -> Where:
    """Returns the condition that ``verdict`` is the id of a stored pass on ``state`` of ``site``.

    Without a state it must be a pass on the bare source model ``version``.
    """
    v, s = verdicts.c, source_verdicts.c
    on_state = sa.exists().where(v.id == verdict, v.outcome == "pass", v.site == site, v.state == state)
    on_source = sa.exists().where(s.id == verdict, s.outcome == "pass", s.version == version)
    return sa.or_(on_state, sa.and_(state.is_(None), on_source))


def _after_all(c: Connection, now: datetime) -> str:
    """Returns a creation time behind that of every other rollout, even if the clock was set back."""
    last = c.scalar(sa.select(sa.func.max(rollouts.c.created_at)))
    return iso(now if last is None else max(now, datetime.fromisoformat(last) + timedelta(microseconds=1)))


def _target_rows(rollout: str, draft: Draft | None, joined: Mapping[str, Target]) -> list[tuple[object, ...]]:
    """Returns the rows of a plan's sites, or of those that joined it, and of the excluded ones."""
    return [
        *(_target_row(rollout, s, t) for s, t in (draft.targets if draft else joined).items()),
        *(
            (rollout, s, OUT, "UTC", None, 0, None, 0, e.verdict_id or "", e.reason)
            for s, e in (draft.excluded if draft else {}).items()
        ),
    ]


def _target_row(rollout: str, site: str, t: Target) -> tuple[object, ...]:
    return (
        rollout,
        site,
        t.wave,
        t.zone,
        t.to.state_id,
        t.to.source_version,
        t.back.state_id,
        t.back.source_version,
        t.verdict_id,
        "",
    )


def remember(c: Connection, rollout: str, *, status: str, body: str, revision: int, now: datetime) -> None:
    """Store a state, unless somebody else moved it on: a tick that was overtaken must not undo a rollback."""
    values = {
        "of": rollout,
        "at": revision,
        "status": status,
        "body": body,
        "revision": revision + 1,
        "updated_at": iso(now),
    }
    if c.execute(REMEMBER, values).rowcount != 1:
        raise StaleGeneration(
            f"rollout {rollout}: somebody else moved it on; look at `palisade rollout status`"
        )
