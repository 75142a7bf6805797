"""Source models by version: the champion that the fleet adapts from, and the challenger that it may go over
to.

The champion is what a site without a state of its own serves. While there is a challenger, every sample gets
features under its trunk too, so that sites can go over to it and back.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.rows import LedgerError, SourceRow, SourceVerdictRow
from pipeline.ledger.tables import dump, iso, make_row, source_verdicts, sources

if TYPE_CHECKING:
    from datetime import datetime

    from pipeline.guards import Evidence, GuardsConfig, Verdict
    from pipeline.ledger.store import Store
    from pipeline.models.manifest import Manifest


@dataclass(frozen=True)
class Sources:
    """Source models, their champion, their challenger, and the verdicts on them."""

    store: Store

    def add(self, manifest: Manifest, *, path: str, lineage: str, now: datetime) -> int:
        """Records the source model at ``path`` and returns its version; the same digest keeps its version.

        The first one becomes the champion. ``lineage`` is the MLflow run that fitted it.
        """
        digest = manifest.digest
        with self.store.write(exclusive=True) as c:
            known = c.scalar(sa.select(sources.c.version).where(sources.c.digest == digest))
            if known is not None:
                return int(known)
            version = int(c.scalar(sa.select(sa.func.max(sources.c.version))) or 0) + 1
            values = {
                "version": version,
                "digest": digest,
                "trunk": manifest.trunk_digest,
                "path": path,
                "manifest": dump(manifest.model_dump(mode="json")),
                "lineage": lineage,
                "created_at": iso(now),
            }
            c.execute(sources.insert(), values)
            self.store.append(c, "source", {"version": version, "digest": digest, "lineage": lineage}, now)
            if self.store.fact(c, "champion") is None:
                self.store.set_role(c, "champion", version, now)
            return version

    def all(self) -> list[SourceRow]:
        """Returns every source model version, oldest first."""
        with self.store.read() as c:
            rows = list(c.execute(sa.select(sources).order_by(sources.c.version)))
        return [make_row(SourceRow, r) for r in rows]

    def get(self, version: int | None) -> SourceRow:
        """Returns a version (None: the champion). LedgerError names the versions that there are."""
        if version is None:
            return self.champion()
        known = {s.version: s for s in self.all()}
        if version not in known:
            raise LedgerError(f"source version {version}: not there; versions: {', '.join(map(str, known))}")
        return known[version]

    def champion(self) -> SourceRow:
        """Returns the version that the fleet adapts from. LedgerError says how to get one."""
        with self.store.read() as c:
            version = self.store.fact(c, "champion")
        if version is None:
            raise LedgerError("no source model yet; run `palisade train` first")
        return self.get(int(version))

    def set_champion(self, version: int, *, now: datetime) -> None:
        """Makes ``version`` the source model that the fleet adapts from."""
        self.get(version)
        with self.store.write(exclusive=True) as c:
            self.store.set_role(c, "champion", version, now)

    def challenger(self) -> int | None:
        """Returns the version that a release is planned or carried out for."""
        with self.store.read() as c:
            version = self.store.fact(c, "challenger")
        return int(version) if version else None

    def set_challenger(self, version: int | None, *, now: datetime) -> None:
        """From now on every sample gets features under this version's trunk too; None: no longer."""
        if version is not None:
            self.get(version)
        with self.store.write(exclusive=True) as c:
            self.store.set_role(c, "challenger", version, now)

    def add_verdict(
        self, version: int, verdict: Verdict, evidence: Evidence, *, limits: GuardsConfig, now: datetime
    ) -> str:
        """Stores the verdict on the bare source model ``version`` and returns its id; the same verdict keeps
        its id.

        ``limits`` are the guard limits that it was given under.
        """
        verdict_json, evidence_json = verdict.model_dump_json(), evidence.model_dump_json()
        digest = hashlib.sha256((verdict_json + evidence_json).encode()).hexdigest()
        verdict_id = f"source-{version}-{digest[:8]}"
        values = {
            "id": verdict_id,
            "version": version,
            "outcome": verdict.outcome,
            "verdict": verdict_json,
            "evidence": evidence_json,
            "guards": dump(limits.model_dump(mode="json")),
            "at": iso(now),
        }
        known = sa.select(source_verdicts.c.id).where(source_verdicts.c.id == verdict_id)
        with self.store.write(exclusive=True) as c:
            if c.scalar(known) is None:
                c.execute(source_verdicts.insert(), values)
                payload = {"id": verdict_id, "outcome": verdict.outcome, "why": verdict.decisive}
                self.store.append(c, "verdict", payload, now)
        return verdict_id

    def verdict(self, verdict_id: str) -> SourceVerdictRow | None:
        """Returns the verdict on a bare source model of that id, None where there is none."""
        query = sa.select(source_verdicts).where(source_verdicts.c.id == verdict_id)
        with self.store.read() as c:
            row = c.execute(query).first()
        return make_row(SourceVerdictRow, row) if row else None
