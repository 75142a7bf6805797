"""What one cycle did to the fleet, as plain numbers; ``page.render`` turns a CycleReport into one HTML file.

Rates and shares are in [0, 1]; NaN means not measured. Every string may be hostile: the page escapes all of them.
A reason starts with its cause, as in ``ceiling: APCER of replay without IR 9.1 % > 7 %``.
``before`` is what the site served when the cycle began, ``after`` is the candidate, served only where ``promoted``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np

Status = Literal["ok", "held", "failed", "broken"]
Outcome = Literal["pass", "fail", "hold"]


@dataclass(frozen=True)
class PadSummary:
    """ISO/IEC 30107-3 numbers of one state on a site's sealed labels, at the deployed threshold."""

    hter: float
    max_apcer: float
    worst_species: str
    bpcer: float
    n_attack: int
    n_bona_fide: int


@dataclass(frozen=True)
class PseudoLabels:
    """Shares of all samples that were learned from with that label, and how many of those were right."""

    accepted_attack: float
    accepted_bona_fide: float
    precision_attack: float
    precision_bona_fide: float


@dataclass(frozen=True)
class SiteReport:
    """One site in one cycle: ok adapted, held waits for evidence, failed was refused, broken gave nothing usable.

    An ok site without a verdict (a control, or no shift to adapt to) was left unchanged.
    """

    site: str
    tags: tuple[str, ...]
    rig: str
    status: Status
    samples: int
    offset_from: int
    offset_to: int
    captured: tuple[datetime, datetime] | None  # first and last capture
    quarantined: int
    availability: np.ndarray  # [T, 3] share of captures with RGB, depth, IR per time bin
    before: PadSummary | None  # None without sealed labels
    after: PadSummary | None
    pseudo_labels: PseudoLabels | None
    omega: np.ndarray  # [T] loss weight per step
    instability: np.ndarray  # [T] D_t per step
    restores: int
    verdict: Outcome | None  # None where there was no candidate
    reasons: tuple[str, ...]
    wave: int | None
    promoted: bool
    serving: str  # "source v7" or a state digest


@dataclass(frozen=True)
class DetCurve:
    """Error rates over all thresholds, in threshold order; ``at`` = (apcer, bpcer) at the deployed threshold."""

    apcer: np.ndarray  # [N]
    bpcer: np.ndarray  # [N]
    at: tuple[float, float] | None


@dataclass(frozen=True)
class Det:
    """Curves before and after, pooled over the sites with sealed labels and over species."""

    before: DetCurve
    after: DetCurve
    sites: int
    n_attack: int
    n_bona_fide: int


@dataclass(frozen=True)
class QuarantineRow:
    """``count`` rows of one segment that were put aside for one reason; ``row`` is the first, None = the segment."""

    site: str
    segment: str
    row: int | None
    reason: str
    count: int


@dataclass(frozen=True)
class WaveReport:
    """One wave: ``share`` of the fleet, of its ``sites`` so many promoted and failing."""

    index: int
    share: float
    sites: int
    promoted: int
    failing: int
    state: str
    started: datetime | None


@dataclass(frozen=True)
class RolloutEvent:
    """Something that happened to the rollout, and by whom."""

    at: datetime
    actor: str
    text: str


@dataclass(frozen=True)
class RolloutReport:
    """The rollout that this cycle ticked."""

    state: str
    plan_hash: str
    waves: tuple[WaveReport, ...]
    events: tuple[RolloutEvent, ...]


@dataclass(frozen=True)
class FleetTotals:
    """What the sites of this cycle do not tell by themselves."""

    registered: int  # sites in the ledger
    idle: int  # of those, without new captures in this cycle
    controls: int  # of those, kept on the source model for good
    stage_seconds: tuple[tuple[str, float], ...]  # ("ingest", 41.0), …


@dataclass(frozen=True)
class CycleReport:
    """Everything that the page of one cycle shows."""

    cycle_id: str
    started: datetime
    finished: datetime
    source_version: str
    source_digest: str
    fingerprint: str
    code_revision: str
    config_name: str
    method: str
    threshold: float
    ceiling: float | None  # hard limit on APCER per species, for the charts
    exit_code: int
    exit_summary: str
    digests: tuple[tuple[str, str], ...]  # further provenance, as in ("anchor set", "sha256:…")
    sites: tuple[SiteReport, ...]
    det: Det | None
    quarantine: tuple[QuarantineRow, ...]
    rollout: RolloutReport | None
    totals: FleetTotals
    notes: tuple[str, ...]
