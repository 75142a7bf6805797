"""Records that the pages show: the report of one cycle, and the records that several pages or charts share.

Rates and shares are in [0, 1]; NaN means not measured. Every string may be hostile: the pages escape all of
them. A reason starts with its cause, as in ``ceiling: APCER of replay without IR 9.1 % > 7 %``. ``before`` is
the state that the site served when the cycle began, ``after`` is the candidate, which is served only where
``promoted`` is true. This module imports no other file of ``pipeline/report``, so charts and pages may all
import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Status = Literal["ok", "held", "failed", "broken"]
Outcome = Literal["pass", "fail", "hold"]


@dataclass(frozen=True)
class PadSummary:
    """ISO/IEC 30107-3 error rates of one site state on sealed labels, at the deployed threshold."""

    hter: float
    max_apcer: float
    worst_species: str
    bpcer: float
    n_attack: int
    n_bona_fide: int


@dataclass(frozen=True)
class PseudoLabels:
    """Share of all samples that were learned from under each pseudo label, and the labels' precision."""

    accepted_attack: float
    accepted_bona_fide: float
    precision_attack: float
    precision_bona_fide: float


@dataclass(frozen=True)
class SiteReport:
    """One site in one cycle.

    Status: ok = adapted, held = waits for evidence, failed = the guards refused the candidate, broken = no
    usable sample. An ok site without a verdict (a control, or a site without a shift to adapt to) was left
    unchanged.
    """

    site: str
    tags: tuple[str, ...]
    rig: str
    status: Status
    samples: int
    offset_from: int
    offset_to: int
    captured: tuple[datetime, datetime] | None  # time of the first and the last capture
    quarantined: int
    availability: np.ndarray  # [T, 3] share of captures with RGB, depth, IR per time bin
    before: PadSummary | None  # None without sealed labels
    after: PadSummary | None
    pseudo_labels: PseudoLabels | None
    omega: np.ndarray  # [T] loss weight per step
    instability: np.ndarray  # [T] D_t per step
    restores: int
    verdict: Outcome | None  # None where there was no candidate
    why: str  # in one line, why the candidate is what it is; empty: not measured
    reasons: tuple[str, ...]
    wave: int | None
    promoted: bool
    serving: str  # "source v7" or a state digest


@dataclass(frozen=True)
class DetCurve:
    """Error rates over all thresholds, ascending; ``at`` is (APCER, BPCER) at the deployed one."""

    apcer: np.ndarray  # [N]
    bpcer: np.ndarray  # [N]
    at: tuple[float, float] | None


@dataclass(frozen=True)
class Det:
    """DET curves before and after, pooled over PAI species and over all sites with sealed labels."""

    before: DetCurve
    after: DetCurve
    sites: int
    n_attack: int
    n_bona_fide: int


@dataclass(frozen=True)
class QuarantineRow:
    """Rows of one segment that were quarantined for one reason; ``row`` is the first, None = the segment."""

    site: str
    segment: str
    row: int | None
    reason: str
    count: int


@dataclass(frozen=True)
class WaveReport:
    """One wave of a rollout: its share of the fleet, and how many of its sites are promoted and failing."""

    index: int
    share: float
    sites: int
    promoted: int
    failing: int
    state: str
    started: datetime | None


@dataclass(frozen=True)
class RolloutEvent:
    """One event of a rollout and the actor who caused it."""

    at: datetime
    actor: str
    text: str


@dataclass(frozen=True)
class RolloutReport:
    """The rollout that this cycle moved on."""

    state: str
    plan_hash: str
    waves: tuple[WaveReport, ...]
    events: tuple[RolloutEvent, ...]


@dataclass(frozen=True)
class FleetTotals:
    """Numbers of the whole fleet, with the sites that this cycle had nothing to do for."""

    registered: int  # sites in the ledger
    idle: int  # registered sites without new captures in this cycle
    controls: int  # registered sites that stay on the source model for good
    stage_seconds: tuple[tuple[str, float], ...]  # ("ingest", 41.0), …


@dataclass(frozen=True)
class CycleReport:
    """All content of the page of one cycle."""

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
    digests: tuple[tuple[str, str], ...]  # more provenance, as in ("anchor set", "sha256:…")
    sites: tuple[SiteReport, ...]
    det: Det | None
    quarantine: tuple[QuarantineRow, ...]
    rollout: RolloutReport | None
    totals: FleetTotals
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RadiusPanel:
    """Radii of one domain's samples, and their angles in the plane of the first two components."""

    domain: str  # a source domain's name, or "target"
    bona_fide: np.ndarray  # [N] radius
    attack: np.ndarray  # [M] radius
    rho: float  # radius of the boundary
    bona_fide_angle: np.ndarray  # [N] radians
    attack_angle: np.ndarray  # [M] radians

    @property
    def outside(self) -> float:
        """Share of bona fide samples outside the boundary."""
        return _share(self.bona_fide > self.rho)

    @property
    def inside(self) -> float:
        """Share of attacks inside the boundary."""
        return _share(self.attack <= self.rho)


@dataclass(frozen=True)
class Line:
    """Error rates of one method in windows of a stream; NaN where a window lacks the class."""

    position: Floats  # [T] samples, centre of the window
    bpcer: Floats  # [T]
    max_apcer: Floats  # [T]


@dataclass(frozen=True)
class Timeline:
    """One stream over its samples: events, spans, and the error rates of every method."""

    stream: str
    what: str
    events: tuple[tuple[float, str], ...]  # (position, label)
    spans: tuple[tuple[float, float, str], ...]  # (from, to, label)
    lines: dict[str, Line]  # by method
    boundary: tuple[Floats, Floats] | None  # (position, shift of danet's boundary in logits)


def _share(hits: np.ndarray) -> float:
    """Share of True in ``hits`` [N]; NaN if N = 0."""
    return float(hits.mean()) if len(hits) else float("nan")
