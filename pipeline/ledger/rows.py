"""The records that the ledger takes and returns, one frozen class per kind of row, and its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.guards import Call, Evidence, Verdict
from pipeline.models.manifest import Manifest
from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from datetime import datetime


class LedgerError(PalisadeError, ValueError):
    """A request that the ledger cannot serve; the message is one line with the next step."""


class LedgerUnavailable(PalisadeError, RuntimeError):
    """The database cannot be opened, fails, or has a newer schema than this version."""

    exit_code = 5


class UnknownSite(LedgerError):
    """No site of that name is registered."""


class CycleBusy(PalisadeError, RuntimeError):
    """Another driver holds the lease."""

    exit_code = 5


class StaleGeneration(PalisadeError, RuntimeError):
    """This writer was replaced by a newer one; nothing of its transaction was written."""

    exit_code = 5


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
    """One refused row of a segment; ``row`` is -1 where the whole file was refused."""

    site: str
    segment: str
    row: int
    sample_id: str | None
    reason: str


@dataclass(frozen=True)
class LabelFileRow:
    """One recorded label file; a refused one has its content's digest in its name, and no good rows."""

    site: str
    name: str
    sha256: str
    rows: int
    good: int


@dataclass(frozen=True)
class LabelRow:
    """What somebody says about one presentation of a site."""

    site: str
    sample_id: str
    file: str  # that said so
    label: int  # 1 bona fide, 0 attack
    instrument: str  # PAI species; "bona_fide" for bona fide
    kind: str  # commissioning, red-team, incident or correction
    who: str
    labelled_at: datetime
    offset: int | None = None  # in the site's stream; None: no capture of this name was ingested yet
    role: str | None = None  # teach or judge, decided once, when its capture was found


@dataclass(frozen=True)
class Cycle:
    """A cycle that this process holds; ``generation`` fences off every earlier holder."""

    id: str
    generation: int
    resumed: bool


@dataclass(frozen=True)
class CycleRow:
    """A stored cycle, running or past."""

    id: str
    kind: str
    generation: int
    status: str  # running, finished or abandoned
    fingerprint: str
    config_json: (
        str  # the resolved configuration as JSON, under the key names of the version that began the cycle
    )
    holder: str
    lease_until: datetime
    started: datetime
    finished: datetime | None
    summary_json: str  # counts that the driver stored at the end; {} before it


@dataclass(frozen=True, slots=True)  # a fleet has a hundred thousand of them
class SiteRow:
    """A registered site and how far its stream was read."""

    site: str
    tags: dict[str, str]
    status: str
    reason: str
    registered_at: datetime
    ingested_offset: int  # next offset that ingest will assign
    learned_offset: int  # next offset that adaptation will learn from
    learner: str | None  # id of the state that learning goes on from; None = the source model's own
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


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """The window that a verdict judged: where its outcomes lie, what the candidate was compared with, and its
    statistics.

    None stands for a value that does not exist, or that the version which wrote the verdict did not keep.
    """

    samples: int
    outcomes_blob: str | None = (
        None  # digest of the blob that holds the outcomes of every site judged in that call
    )
    row_start: int | None = None  # first row of this site in the outcomes blob
    row_end: int | None = None  # row behind its last
    anchor_digest: str | None = None
    champion_state: str | None = (
        None  # id of the state that the site served; None = the source model as it is
    )
    lost_state: str | None = (
        None  # id of the state that learning should have gone on from, where its blob is corrupt
    )
    accepted_bona_fide: int | None = None  # samples with a pseudo label bona fide
    accepted_attack: int | None = None  # samples with a pseudo label attack
    called_bona_fide_share: float | None = (
        None  # share of the samples that score at least 0.5 before learning
    )
    restores: int | None = None  # steps that took the state back to an earlier one
    omega: float | None = None  # loss weight after the last sample; None for an empty window
    sessions: int | None = None


@dataclass(frozen=True)
class ShardRow:
    """One site's share of a shard commit; ``blob`` None: no candidate (an empty window), only a verdict."""

    site: str
    offset_from: int
    offset_to: int
    source_version: int
    method: str
    blob: str | None
    slot: int
    parent: str | None
    window: WindowRecord
    verdict: Verdict
    evidence: Evidence


@dataclass(frozen=True)
class VerdictRow:
    """A stored verdict on a site's candidate.

    The evidence of a whole fleet, parsed, fills the memory: verdict and evidence are parsed each time they
    are asked for.
    """

    id: str
    site: str
    cycle: str
    state: str | None
    outcome: Call  # that of the verdict
    verdict_json: str
    evidence_json: str
    offset_from: int
    offset_to: int
    at: datetime
    window: WindowRecord

    @property
    def subject(self) -> str:
        """The site whose candidate was judged."""
        return self.site

    @property
    def verdict(self) -> Verdict:
        """The decision and its reasons."""
        return Verdict.model_validate_json(self.verdict_json)

    @property
    def evidence(self) -> Evidence:
        """The evidence that was decided on."""
        return Evidence.model_validate_json(self.evidence_json)


@dataclass(frozen=True)
class SourceVerdictRow:
    """A stored verdict on a bare source model, with the guard limits that it was given under."""

    id: str
    version: int
    outcome: Call
    verdict_json: str
    evidence_json: str
    guards_json: str | None  # section guards of that time; None where an early version did not keep it
    at: datetime

    @property
    def subject(self) -> str:
        """The source model that was judged."""
        return f"source v{self.version}"

    @property
    def verdict(self) -> Verdict:
        """The decision and its reasons."""
        return Verdict.model_validate_json(self.verdict_json)

    @property
    def evidence(self) -> Evidence:
        """The evidence that was decided on."""
        return Evidence.model_validate_json(self.evidence_json)


@dataclass(frozen=True)
class ServingRow:
    """A state that a site serves, and since when; ``state`` None = the source model as it is."""

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
    manifest_json: str
    lineage: str  # MLflow run
    created_at: datetime

    @property
    def manifest(self) -> Manifest:
        """The manifest of the checkpoint, parsed each time it is asked for; an early version's may lack
        required keys.
        """
        return Manifest.model_validate_json(self.manifest_json)


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
