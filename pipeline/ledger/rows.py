"""What the ledger hands out and takes: one frozen class per kind of row, and its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.guards import Call, Evidence, Verdict

if TYPE_CHECKING:
    from datetime import datetime


class LedgerError(ValueError):
    """A request the ledger cannot serve: one line with the next step."""


class LedgerUnavailable(RuntimeError):
    """The database cannot be opened or is of a newer version."""


class UnknownSite(LedgerError):
    """No site of that name is registered."""


class CycleBusy(RuntimeError):
    """Another driver holds the lease."""


class StaleGeneration(RuntimeError):
    """This writer was replaced; nothing of what it brought was written."""


@dataclass(frozen=True)
class SegmentRow:
    """One ingested capture segment."""

    site: str
    name: str
    sha256: str
    rows: int
    base_offset: int
    good: int
    quarantined: int


@dataclass(frozen=True)
class QuarantineRow:
    """One refused row (``row`` -1: the whole file)."""

    site: str
    segment: str
    row: int
    sample_id: str | None
    reason: str


@dataclass(frozen=True)
class Cycle:
    """A cycle that this process holds; ``generation`` fences off everybody who held it before."""

    id: str
    generation: int
    resumed: bool


@dataclass(frozen=True, slots=True)  # a hundred thousand of them
class SiteRow:
    """A registered site and how far its stream was read."""

    site: str
    tags: dict[str, str]
    status: str
    reason: str
    registered_at: datetime
    ingested: int  # next offset that ingest will assign
    learned: int  # next offset that adaptation will use
    learner: str | None  # state that learning goes on from; None = the source model's
    holds: int  # verdicts "hold" in a row


@dataclass(frozen=True)
class StateRow:
    """A stored site state: slot ``slot`` of blob ``blob``."""

    id: str
    site: str
    cycle: str
    source_version: int
    method: str
    blob: str
    slot: int
    offset_from: int
    offset_to: int
    parent: str | None
    created_at: datetime


@dataclass(frozen=True)
class ShardRow:
    """One site's share of a shard commit. ``blob`` None: no candidate (an empty window), only a verdict."""

    site: str
    offset_from: int
    offset_to: int
    source_version: int
    method: str
    blob: str | None
    slot: int
    parent: str | None
    counters: dict[str, object]
    verdict: Verdict
    evidence: Evidence


@dataclass(frozen=True)
class VerdictRow:
    """A stored verdict with everything it was decided on. A fleet's parsed evidence fills the memory: parsed when asked."""

    id: str
    site: str
    cycle: str
    state: str | None
    outcome: Call  # that of the verdict
    verdict_json: str
    evidence_json: str
    counters: dict[str, object]
    offset_from: int
    offset_to: int
    at: datetime

    @property
    def verdict(self) -> Verdict:
        """What was decided and why."""
        return Verdict.model_validate_json(self.verdict_json)

    @property
    def evidence(self) -> Evidence:
        """What it was decided on."""
        return Evidence.model_validate_json(self.evidence_json)


@dataclass(frozen=True)
class ServingRow:
    """What a site serves since when; ``state`` None = the source model as it is."""

    site: str
    counter: int
    state: str | None
    source_version: int
    rollout: str
    wave: int
    kind: str  # promote or rollback
    since: datetime


@dataclass(frozen=True)
class SourceRow:
    """A source model version."""

    version: int
    digest: str
    trunk: str
    path: str
    manifest: dict[str, object]
    lineage: str  # MLflow run
    created_at: datetime


@dataclass(frozen=True)
class RolloutRow:
    """A stored rollout; ``body`` is the state machine's JSON."""

    id: str
    plan_hash: str
    status: str
    body: str
    revision: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Needed:
    """What the ledger still needs of the stores beside it. See ``Garbage.needed``."""

    states: frozenset[str]  # digests of state blobs
    outcomes: frozenset[str]  # digests of outcome blobs
    features: dict[str, int]  # by site: offset of the first sample whose features are needed
