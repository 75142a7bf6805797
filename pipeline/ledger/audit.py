"""The audit chain: every row carries the hash of the row before it, so that a changed row shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from pipeline.ledger.schema import GENESIS
from pipeline.ledger.store import link
from pipeline.ledger.tables import audit, facts, served

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.ledger.store import Store


class AuditRow(NamedTuple):
    """A row of the chain."""

    seq: int
    at: datetime
    kind: str
    payload: dict[str, object]
    hash: str


@dataclass(frozen=True)
class Audit:
    """What was done, in order."""

    store: Store

    def append(self, kind: str, payload: Mapping[str, object], *, now: datetime) -> None:
        """Append to the audit chain."""
        with self.store.write(exclusive=True) as c:
            self.store.append(c, kind, payload, now)

    def rows(self) -> list[tuple[int, datetime, str, dict[str, object]]]:
        """(seq, at, kind, payload) of every audit row."""
        with self.store.read() as c:
            rows = c.execute(sa.select(audit).order_by(audit.c.seq))
            return [(r.seq, datetime.fromisoformat(r.at), r.kind, json.loads(r.payload)) for r in rows]

    def first_broken(self) -> int | None:
        """First sequence number at which the chain does not hold, None when it is whole."""
        previous, expected = GENESIS, 1
        with self.store.read() as c:
            for r in c.execute(sa.select(audit).order_by(audit.c.seq)):
                if (
                    r.seq != expected
                    or r.prev_hash != previous
                    or r.hash != link(previous, r.at, r.kind, r.payload)
                ):
                    return expected
                previous, expected = r.hash, expected + 1
            return None if self.store.fact(c, "audit_head") == previous else expected

    def latest(self, *, limit: int, site: str | None = None) -> list[AuditRow]:
        """Returns the latest rows of the chain, newest first.

        ``site``: only rows that name it or that changed what it serves.
        """
        query = sa.select(audit).order_by(audit.c.seq.desc()).limit(limit)
        if site is not None:
            own = sa.select(served.c.audit).where(served.c.site == site)
            query = query.where(
                sa.or_(audit.c.seq.in_(own), audit.c.payload.contains(f'"{site}"', autoescape=True))
            )
        with self.store.read() as c:
            return [
                AuditRow(r.seq, datetime.fromisoformat(r.at), r.kind, json.loads(r.payload), r.hash)
                for r in c.execute(query)
            ]

    def head(self) -> tuple[int, str]:
        """Number and hash of the last row of the chain."""
        with self.store.read() as c:
            seq = c.scalar(sa.select(sa.func.max(audit.c.seq)))
            return int(seq or 0), str(c.scalar(sa.select(facts.c.value).where(facts.c.key == "audit_head")))

    def has(self, head: str) -> bool:
        """Whether a row of the chain has the hash ``head``."""
        with self.store.read() as c:
            return c.scalar(sa.select(audit.c.seq).where(audit.c.hash == head)) is not None
