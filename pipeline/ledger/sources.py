"""Source models by version: which one the fleet adapts from, and which one it may go over to.

The champion is what a site without a state of its own serves. While there is a challenger, every sample gets features under
its trunk too, so that sites can go over to it and back.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.rows import LedgerError, SourceRow, VerdictRow
from pipeline.ledger.store import Store
from pipeline.ledger.tables import FLEET, cycles, dump, iso, make_row, sources, states, verdicts
from pipeline.ledger.verdicts import LISTED, REBASES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from pipeline.guards import Evidence, Verdict


class Sources(Store):
    """Source models, their champion and their challenger."""

    def add_source(
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
        with self._write(exclusive=True) as c:
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
            self._append(c, "source", {"version": version, "digest": digest, "lineage": lineage}, now)
            if self._fact(c, "champion") is None:
                self._name(c, "champion", version, now)
            return version

    def sources(self) -> list[SourceRow]:
        """Every source model version, oldest first."""
        with self._read() as c:
            rows = list(c.execute(sa.select(sources).order_by(sources.c.version)))
        return [make_row(SourceRow, r) for r in rows]

    def source(self, version: int | None = None) -> SourceRow:
        """A version, by default the champion; LedgerError says how to get one."""
        with self._read() as c:
            champion = self._fact(c, "champion")
        wanted = version if version is not None else int(champion) if champion else None
        known = {s.version: s for s in self.sources()}
        if wanted is None:
            raise LedgerError("no source model yet; run `palisade train` first")
        if wanted not in known:
            raise LedgerError(f"source version {wanted}: not there; versions: {', '.join(map(str, known))}")
        return known[wanted]

    def set_champion(self, version: int, *, now: datetime) -> None:
        """Make ``version`` the source model that the fleet adapts from."""
        self.source(version)
        with self._write(exclusive=True) as c:
            self._name(c, "champion", version, now)

    def challenger(self) -> int | None:
        """The version that a release is planned or carried out for."""
        with self._read() as c:
            found = self._fact(c, "challenger")
        return int(found) if found else None

    def set_challenger(self, version: int | None, *, now: datetime) -> None:
        """From now on every sample gets features under this version's trunk too; None: no longer."""
        if version is not None:
            self.source(version)
        with self._write(exclusive=True) as c:
            self._name(c, "challenger", version, now)

    def judge_source(
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
        with self._write(exclusive=True) as c:
            if c.scalar(sa.select(verdicts.c.id).where(verdicts.c.id == own)) is None:
                c.execute(verdicts.insert(), values)
                self._append(
                    c, "verdict", {"id": own, "outcome": verdict.outcome, "why": verdict.decisive}, now
                )
        return own

    def rebased(self, version: int, *, fingerprint: str | None = None) -> dict[str, VerdictRow]:
        """By site the newest verdict on a state that a rebase to this version made; ``fingerprint``: of such a cycle."""
        made = REBASES if fingerprint is None else REBASES.where(cycles.c.fingerprint == fingerprint)
        query = LISTED.join_from(verdicts, states, states.c.id == verdicts.c.state).order_by(verdicts.c.at)
        query = query.where(states.c.source_version == version, verdicts.c.cycle.in_(made))
        with self._read() as c:
            return {r.site: make_row(VerdictRow, r) for r in c.execute(query)}
