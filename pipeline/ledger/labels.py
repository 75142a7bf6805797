"""What people know of a site's presentations: labels with their provenance, and their retraction."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.rows import LabelFileRow, LabelRow, LedgerError, QuarantineRow
from pipeline.ledger.store import Store
from pipeline.ledger.tables import (
    facts,
    iso,
    label_files,
    labels,
    make_row,
    named,
    names_by_site,
    parts,
    refuse,
    storable,
    stored_names,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime


SPLIT_KEY = sa.select(facts.c.value).where(facts.c.key == "split_key")


@dataclass(frozen=True)
class Labels:
    """The labels that count, and all that ever did; rows are marked as retracted and never deleted."""

    store: Store

    def file_names(self, sites: Sequence[str] | None = None) -> dict[str, set[str]]:
        """Returns the names of the recorded label files by site, of all sites or of ``sites``."""
        with self.store.read() as c:
            return names_by_site(c, label_files, sites)

    def commit(
        self,
        files: Sequence[LabelFileRow],
        rows: Sequence[LabelRow],
        bad: Sequence[QuarantineRow],
        *,
        cycle: str,
        now: datetime,
    ) -> None:
        """Makes label files count: their rows and what was refused of them, together and once.

        A file that is known already changes nothing, so any number of writers may record it, in a cycle or
        beside one. Audited, by the number of labels of each file.
        """
        with self.store.write(exclusive=True) as c:
            known = stored_names(c, label_files, [(f.site, f.name) for f in files])
            fresh = [f for f in files if (f.site, f.name) not in known]
            if not fresh:
                return
            if c.scalars(SPLIT_KEY).first() is None:
                c.execute(facts.insert(), {"key": "split_key", "value": secrets.token_hex(16)})
            names = {(f.site, f.name.partition("@")[0]) for f in fresh}  # a refused file's has its digest
            extra = {"cycle": cycle, "recorded_at": iso(now)}
            c.execute(label_files.insert(), [vars(f) | extra for f in fresh])
            said = [
                {
                    **vars(r),
                    **{n: storable(getattr(r, n)) for n in ("sample_id", "instrument", "who")},
                    "labelled_at": iso(r.labelled_at),
                    "recorded_at": iso(now),
                }
                for r in rows
                if (r.site, r.file) in names
            ]
            for part in parts(said):
                c.execute(labels.insert(), list(part))
            refuse(c, cycle, (q for q in bad if (q.site, q.segment) in names))
            counts = [{"site": f.site, "file": f.name, "sha256": f.sha256, "labels": f.good} for f in fresh]
            self.store.append(c, "labels", {"cycle": cycle, "files": counts}, now)

    def of(self, sites: Sequence[str]) -> dict[str, dict[str, LabelRow]]:
        """Returns by site and sample what is said of it now: of several files, the one recorded last."""
        query = (
            sa.select(labels)
            .where(labels.c.retracted_at.is_(None))
            .order_by(labels.c.site, labels.c.recorded_at, labels.c.file)
        )
        found: dict[str, dict[str, LabelRow]] = {site: {} for site in sites}
        with self.store.read() as c:
            for r in named(c, query, labels.c.site, sites):
                found[r.site][r.sample_id] = make_row(LabelRow, r)
        return found

    def sites(self) -> list[str]:
        """Returns the sites of which any label counts, sorted."""
        query = sa.select(labels.c.site).where(labels.c.retracted_at.is_(None)).distinct()
        with self.store.read() as c:
            return sorted(c.scalars(query))

    def split_key(self) -> bytes:
        """Returns the secret of this ledger by which sessions are split; made with the first labels."""
        with self.store.read() as c:
            return bytes.fromhex(c.scalars(SPLIT_KEY).one())

    def assign(self, site: str, found: Mapping[str, tuple[int, str]]) -> None:
        """Keeps offset and role of labelled samples whose captures were found; a role never changes."""
        own = sa.and_(labels.c.site == site, labels.c.role.is_(None))
        change = labels.update().where(own, labels.c.sample_id == sa.bindparam("s"))
        change = change.values(offset=sa.bindparam("o"), role=sa.bindparam("r"))
        with self.store.write() as c:
            c.execute(change, [{"s": s, "o": o, "r": r} for s, (o, r) in sorted(found.items())])

    def retract(self, site: str, samples: Sequence[str], *, by: str, reason: str, now: datetime) -> int:
        """Makes the labels of ``samples`` count no longer and returns how many did. Audited.

        Raises LedgerError, and changes nothing, if one of them has no label that counts.
        """
        own = sa.and_(labels.c.site == site, labels.c.retracted_at.is_(None))
        with self.store.write(exclusive=True) as c:
            query = sa.select(labels.c.sample_id).where(own)
            known = {r.sample_id for r in named(c, query, labels.c.sample_id, samples)}
            if unknown := [s for s in samples if s not in known]:
                raise LedgerError(
                    f"site {site}: {unknown[0]!r} has no label ({len(unknown)} such); nothing was retracted; "
                    f"see `palisade site show {site}`"
                )
            marks: Mapping[str, str] = {
                "retracted_at": iso(now),
                "retracted_by": storable(by),
                "retracted_why": storable(reason),
            }
            count = 0
            for part in parts(sorted(known)):
                change = labels.update().where(own, labels.c.sample_id.in_(part)).values(marks)
                count += c.execute(change).rowcount
            said = {"site": site, "samples": sorted(known), "by": storable(by), "reason": storable(reason)}
            self.store.append(c, "unlabel", said, now)
        return count
