"""Sites and their streams: ingested segments, what was refused, and the cycle that may work on them."""

from __future__ import annotations

from datetime import datetime, timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.rows import Cycle, CycleBusy, QuarantineRow, SegmentRow, SiteRow, UnknownSite
from pipeline.ledger.store import Store
from pipeline.ledger.tables import cycles, dump, iso, make_row, named, quarantine, segments, sites

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.engine import Row

LEASE = timedelta(seconds=120)


class Streams(Store):
    """What came from the sites and who may work on it."""

    def register_sites(self, tags: Mapping[str, Mapping[str, str]], *, now: datetime) -> list[str]:
        """Add sites that are not known yet → their ids; known ones keep what they have."""
        with self._write() as c:
            known = set(c.scalars(sa.select(sites.c.site)))
            new = [s for s in tags if s not in known]
            rows = [{"site": s, "tags": dump(dict(tags[s])), "status": "active", "reason": "",
                     "registered_at": iso(now),
                     "ingested": 0, "learned": 0, "learner": None, "holds": 0} for s in new]  # fmt: skip
            if rows:
                c.execute(sites.insert(), rows)
        return new

    def sites(self) -> list[SiteRow]:
        """Every registered site, by id."""
        with self._read() as c:
            return [make_row(SiteRow, r) for r in c.execute(sa.select(sites).order_by(sites.c.site))]

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
            return make_row(SiteRow, row)

    def sites_named(self, names: Sequence[str]) -> list[SiteRow]:
        """These sites, in this order; UnknownSite for the first that is not registered."""
        with self._read() as c:
            found = {r.site: make_row(SiteRow, r) for r in named(c, sa.select(sites), sites.c.site, names)}
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
                c.execute(segments.insert(), [vars(r) | {"cycle": cycle.id, "ingested_at": iso(now)} for r in rows])
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
                lease = {"generation": row.generation + 1, "holder": holder, "lease_until": iso(now + LEASE)}
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
                      "config": config, "holder": holder, "lease_until": iso(now + LEASE), "started": iso(now),
                      "finished": None, "summary": "{}"}  # fmt: skip
            c.execute(cycles.insert(), values)
            return cycle

    def renew(self, cycle: Cycle, *, now: datetime) -> None:
        """Keep the lease."""
        with self._write() as c:
            self._fence(c, cycle)
            c.execute(cycles.update().where(cycles.c.id == cycle.id).values(lease_until=iso(now + LEASE)))

    def finish_cycle(self, cycle: Cycle, *, summary: Mapping[str, object], now: datetime) -> None:
        """Give the lease back; the cycle is done."""
        with self._write() as c:
            self._fence(c, cycle)
            values = {"status": "finished", "finished": iso(now), "summary": dump(dict(summary))}
            c.execute(cycles.update().where(cycles.c.id == cycle.id).values(values))
            self._append(c, "cycle", {"cycle": cycle.id, **summary}, now)

    def cycles(self, *, kinds: Sequence[str] = ()) -> list[Row[*tuple[object, ...]]]:
        """Cycle rows, newest first."""
        query = sa.select(cycles).order_by(cycles.c.started.desc(), cycles.c.id.desc())
        with self._read() as c:
            return [r for r in c.execute(query) if not kinds or r.kind in kinds]
