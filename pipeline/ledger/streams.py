"""Sites and their streams: ingested segments, what was refused, and the cycle that may work on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.rows import Cycle, LedgerError, QuarantineRow, SegmentRow, SiteRow, UnknownSite
from pipeline.ledger.store import Store
from pipeline.ledger.tables import (
    RETIRED,
    dump,
    iso,
    make_row,
    named,
    names_by_site,
    quarantine,
    refuse,
    segments,
    sites,
    storable,
    stored_names,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.engine import Connection


@dataclass(frozen=True)
class Streams:
    """What came from the sites and who may work on it."""

    store: Store

    def register(self, tags: Mapping[str, Mapping[str, str]], *, now: datetime) -> list[str]:
        """Add sites that are not known yet → their ids; known ones keep what they have."""
        with self.store.write(exclusive=True) as c:
            known = {r.site for r in named(c, sa.select(sites.c.site), sites.c.site, list(tags))}
            new = [s for s in tags if s not in known]
            rows = [
                {
                    "site": s,
                    "tags": dump(dict(tags[s])),
                    "status": "active",
                    "reason": "",
                    "registered_at": iso(now),
                    "ingested_offset": 0,
                    "learned_offset": 0,
                    "learner": None,
                    "holds": 0,
                }
                for s in new
            ]
            if rows:
                c.execute(sites.insert(), rows)
        return new

    def set_tags(self, changes: Mapping[str, Mapping[str, str]], *, now: datetime) -> list[str]:
        """Give sites these tags beside those they have; an empty value takes one away → sites that changed.
        Audited.
        """
        with self.store.write(exclusive=True) as c:
            query = sa.select(sites.c.site, sites.c.tags)
            before = {r.site: json.loads(r.tags) for r in named(c, query, sites.c.site, list(changes))}
            if unknown := sorted(changes.keys() - before.keys()):
                raise UnknownSite(
                    f"site {unknown[0]!r}: not registered ({len(unknown)} in all); nothing was changed; "
                    "see `palisade site list`"
                )
            after = {
                s: {k: v for k, v in (before[s] | dict(tags)).items() if v} for s, tags in changes.items()
            }
            moved = sorted(s for s in after if after[s] != before[s])
            if moved:
                change = (
                    sites.update()
                    .where(sites.c.site == sa.bindparam("s"))
                    .values(tags=sa.bindparam("v_tags"))
                )
                c.execute(change, [{"s": s, "v_tags": dump(after[s])} for s in moved])
                self.store.append(c, "tags", {"sites": {s: dict(changes[s]) for s in moved}}, now)
        return moved

    def set_retired(self, site: str, *, retired: bool, reason: str, now: datetime) -> bool:
        """Take a site out of service (status retired), or back into it → whether that changed anything.
        Audited.
        """
        self.site(site)
        other = sites.c.status != RETIRED if retired else sites.c.status == RETIRED
        values = (
            {"status": RETIRED, "reason": storable(reason)} if retired else {"status": "active", "reason": ""}
        )
        with self.store.write(exclusive=True) as c:
            changed = (
                c.execute(sites.update().where(sites.c.site == site, other).values(values)).rowcount == 1
            )
            if changed:
                self.store.append(
                    c, "retire" if retired else "restore", {"site": site, "reason": storable(reason)}, now
                )
        return changed

    def sites(self) -> list[SiteRow]:
        """Every registered site, by id."""
        with self.store.read() as c:
            return [make_row(SiteRow, r) for r in c.execute(sa.select(sites).order_by(sites.c.site))]

    def site(self, site: str) -> SiteRow:
        """One site; UnknownSite names similar ones."""
        with self.store.read() as c:
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
            return make_row(SiteRow, row)

    def named(self, names: Sequence[str]) -> list[SiteRow]:
        """These sites, in this order; UnknownSite for the first that is not registered."""
        with self.store.read() as c:
            found = {r.site: make_row(SiteRow, r) for r in named(c, sa.select(sites), sites.c.site, names)}
        return [found[n] if n in found else self.site(n) for n in names]

    def set_status(self, reasons: Mapping[str, str]) -> None:
        """Mark sites as failed with a reason, or as active where it is empty; a retired one stays retired."""
        change = sites.update().where(sites.c.site == sa.bindparam("s"), sites.c.status != RETIRED)
        change = change.values(status=sa.bindparam("v_status"), reason=sa.bindparam("v_reason"))
        rows = [
            {"s": s, "v_status": "failed" if reason else "active", "v_reason": storable(reason)}
            for s, reason in sorted(reasons.items())
        ]
        with self.store.write() as c:
            if rows:
                c.execute(change, rows)

    def segment_names(self, names: Sequence[str] | None = None) -> dict[str, set[str]]:
        """Names of the ingested segments by site, of all sites or of ``names``."""
        with self.store.read() as c:
            return names_by_site(c, segments, names)

    def segments(self, site: str) -> list[tuple[SegmentRow, datetime]]:
        """The site's segments in stream order with the time they were ingested."""
        query = (
            sa.select(segments)
            .where(segments.c.site == site)
            .order_by(segments.c.base_offset, segments.c.name)
        )
        with self.store.read() as c:
            return [(SegmentRow(*r[:7]), datetime.fromisoformat(r.ingested_at)) for r in c.execute(query)]

    def pending(self, names: Sequence[str]) -> dict[str, tuple[int, datetime | None]]:
        """By site: good samples that it has not learned from yet, and when its newest segment was ingested
        (None: never).

        Costs what is pending, not what was ever ingested.
        """
        own = segments.c.site == sites.c.site
        ahead = sa.and_(
            segments.c.base_offset >= sites.c.learned_offset, segments.c.base_offset < sites.c.ingested_offset
        )
        good = sa.select(sa.func.coalesce(sa.func.sum(segments.c.good), 0)).where(own, ahead)
        newest = sa.select(segments.c.ingested_at).where(own)
        newest = newest.order_by(segments.c.base_offset.desc(), segments.c.ingested_at.desc()).limit(1)
        query = sa.select(sites.c.site, good.label("good"), newest.label("newest"))
        with self.store.read() as c:
            return {
                r.site: (int(r.good), datetime.fromisoformat(r.newest) if r.newest else None)
                for r in named(c, query, sites.c.site, names)
            }

    def commit(
        self, cycle: Cycle, rows: Sequence[SegmentRow], bad: Sequence[QuarantineRow], *, now: datetime
    ) -> list[tuple[str, str]]:
        """Make ingested segments count: rows, quarantine and each site's next offset together → (site, name)
        known before.

        Such a segment is left as it is, and nothing of it counts twice. LedgerError when offsets are taken
        already.
        """
        with self.store.write() as c:
            self.store.fence(c, cycle, shared=True)
            ends = _lock_ends(c, [r.site for r in rows])
            known = stored_names(c, segments, [(r.site, r.name) for r in rows])
            fresh = [r for r in rows if (r.site, r.name) not in known]
            moved = _moved_ends(ends, fresh)
            if fresh:
                extra = {"cycle": cycle.id, "ingested_at": iso(now)}
                c.execute(segments.insert(), [vars(r) | extra for r in fresh])
            refuse(c, cycle.id, (q for q in bad if (q.site, q.segment) not in known))
            if moved:
                move = (
                    sites.update()
                    .where(sites.c.site == sa.bindparam("s"))
                    .values(ingested_offset=sa.bindparam("v_end"))
                )
                c.execute(move, [{"s": s, "v_end": end} for s, end in sorted(moved.items())])
        return [(r.site, r.name) for r in rows if (r.site, r.name) in known]

    def quarantine_lost(
        self, cycle: Cycle, lost: Sequence[tuple[str, str]], *, reason: str, now: datetime
    ) -> None:
        """Quarantine, with ``reason``, every sample that still counts of segments (site, name) whose features
        are lost.

        Their offsets stay taken, so that the site goes on behind them. In the audit chain.
        """
        with self.store.write(exclusive=True) as c:
            self.store.fence(c, cycle)
            for site, name in lost:
                own = sa.and_(segments.c.site == site, segments.c.name == name)
                row = c.execute(sa.select(segments).where(own)).first()
                if row is None or not row.good:
                    continue
                told = sa.and_(quarantine.c.site == site, quarantine.c.segment == name)
                refused = set(c.scalars(sa.select(quarantine.c.row).where(told)))
                gone = [
                    {
                        "site": site,
                        "segment": name,
                        "row": n,
                        "sample_id": None,
                        "reason": reason,
                        "cycle": cycle.id,
                    }
                    for n in range(row.rows)
                    if n not in refused
                ]
                c.execute(quarantine.insert(), gone)
                c.execute(segments.update().where(own).values(good=0, quarantined=row.rows))
                span = [row.base_offset, row.base_offset + row.rows]
                said = {
                    "site": site,
                    "segment": name,
                    "samples": len(gone),
                    "offsets": span,
                    "cycle": cycle.id,
                }
                self.store.append(c, reason, said, now)

    def quarantined(self, site: str | None = None, *, cycle: str | None = None) -> list[QuarantineRow]:
        """Refused rows, all or of one site or cycle."""
        query = sa.select(*(quarantine.c[n] for n in QuarantineRow.__dataclass_fields__)).order_by(
            quarantine.c.id
        )
        if site is not None:
            query = query.where(quarantine.c.site == site)
        if cycle is not None:
            query = query.where(quarantine.c.cycle == cycle)
        with self.store.read() as c:
            return [QuarantineRow(*r) for r in c.execute(query)]

    def count_by_status(self) -> tuple[dict[str, int], int]:
        """Sites by status, and those whose last verdict was a hold."""
        count = sa.func.count()
        with self.store.read() as c:
            by = {
                r.status: r.n
                for r in c.execute(sa.select(sites.c.status, count.label("n")).group_by(sites.c.status))
            }
            return by, int(c.scalar(sa.select(count).select_from(sites).where(sites.c.holds > 0)) or 0)


def _lock_ends(c: Connection, names: Sequence[str]) -> dict[str, int]:
    """Next offset of each site, which nobody else moves meanwhile; in one order, so that nobody waits in a
    circle.
    """
    query = sa.select(sites.c.site, sites.c.ingested_offset).order_by(sites.c.site).with_for_update()
    return {r.site: r.ingested_offset for r in named(c, query, sites.c.site, sorted(set(names)))}


def _moved_ends(ends: Mapping[str, int], fresh: Sequence[SegmentRow]) -> dict[str, int]:
    """The next offset of each site after ``fresh``; two samples may not have one offset."""
    moved: dict[str, int] = {}
    for r in sorted(fresh, key=lambda r: (r.site, r.base_offset)):
        if r.site not in ends:
            raise UnknownSite(f"site {r.site!r}: not registered; its segments were not counted")
        end = moved.get(r.site, ends[r.site])
        if r.rows and r.base_offset < end:
            raise LedgerError(
                f"site {r.site}: {r.name} starts at offset {r.base_offset}, "
                f"but offsets up to {end} are taken; ingest again"
            )
        moved[r.site] = max(end, r.base_offset + r.rows)
    return moved
