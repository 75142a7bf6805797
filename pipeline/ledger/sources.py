"""Source models by version: which one the fleet adapts from, and which one it may go over to.

The champion is what a site without a state of its own serves. While there is a challenger, every sample gets features under
its trunk too, so that sites can go over to it and back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.rows import LedgerError, SourceRow
from pipeline.ledger.store import Store
from pipeline.ledger.tables import FLEET, dump, iso, make_row, sources, verdicts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from pipeline.guards import Evidence, Verdict


@dataclass(frozen=True)
class Sources:
    """Source models, their champion and their challenger."""

    store: Store

    def add(
        self,
        digest: str,
        *,
        trunk: str,
        path: str,
        manifest: Mapping[str, object],
        lineage: str,
        now: datetime,
    ) -> int:
        """Record a source model → its version; the same digest keeps its version. The first becomes the champion."""
        with self.store.write(exclusive=True) as c:
            known = c.scalar(sa.select(sources.c.version).where(sources.c.digest == digest))
            if known is not None:
                return int(known)
            version = int(c.scalar(sa.select(sa.func.max(sources.c.version))) or 0) + 1
            values = {
                "version": version,
                "digest": digest,
                "trunk": trunk,
                "path": path,
                "manifest": dump(dict(manifest)),
                "lineage": lineage,
                "created_at": iso(now),
            }
            c.execute(sources.insert(), values)
            self.store.append(c, "source", {"version": version, "digest": digest, "lineage": lineage}, now)
            if self.store.fact(c, "champion") is None:
                self.store.set_role(c, "champion", version, now)
            return version

    def all(self) -> list[SourceRow]:
        """Every source model version, oldest first."""
        with self.store.read() as c:
            rows = list(c.execute(sa.select(sources).order_by(sources.c.version)))
        return [make_row(SourceRow, r) for r in rows]

    def get(self, version: int | None) -> SourceRow:
        """A version (None: the champion); LedgerError names those that there are."""
        if version is None:
            return self.champion()
        known = {s.version: s for s in self.all()}
        if version not in known:
            raise LedgerError(f"source version {version}: not there; versions: {', '.join(map(str, known))}")
        return known[version]

    def champion(self) -> SourceRow:
        """The version that the fleet adapts from; LedgerError says how to get one."""
        with self.store.read() as c:
            version = self.store.fact(c, "champion")
        if version is None:
            raise LedgerError("no source model yet; run `palisade train` first")
        return self.get(int(version))

    def set_champion(self, version: int, *, now: datetime) -> None:
        """Make ``version`` the source model that the fleet adapts from."""
        self.get(version)
        with self.store.write(exclusive=True) as c:
            self.store.set_role(c, "champion", version, now)

    def challenger(self) -> int | None:
        """The version that a release is planned or carried out for."""
        with self.store.read() as c:
            found = self.store.fact(c, "challenger")
        return int(found) if found else None

    def set_challenger(self, version: int | None, *, now: datetime) -> None:
        """From now on every sample gets features under this version's trunk too; None: no longer."""
        if version is not None:
            self.get(version)
        with self.store.write(exclusive=True) as c:
            self.store.set_role(c, "challenger", version, now)

    def judge(
        self,
        version: int,
        verdict: Verdict,
        evidence: Evidence,
        *,
        now: datetime,
        limits: Mapping[str, object] | None = None,
    ) -> str:
        """Store the verdict on the bare source model ``version`` → its id; the same verdict keeps its id.

        ``limits`` is the section guards that it was given under.
        """
        said, on = verdict.model_dump_json(), evidence.model_dump_json()
        own = f"source-{version}-{hashlib.sha256((said + on).encode()).hexdigest()[:8]}"
        values = {
            "id": own,
            "site": FLEET,
            "cycle": own,
            "state": None,
            "outcome": verdict.outcome,
            "verdict": said,
            "evidence": on,
            "counters": dump({"samples": 0, "guards": limits}),
            "offset_from": version,
            "offset_to": version,
            "at": iso(now),
        }
        with self.store.write(exclusive=True) as c:
            if c.scalar(sa.select(verdicts.c.id).where(verdicts.c.id == own)) is None:
                c.execute(verdicts.insert(), values)
                self.store.append(
                    c, "verdict", {"id": own, "outcome": verdict.outcome, "why": verdict.decisive}, now
                )
        return own
