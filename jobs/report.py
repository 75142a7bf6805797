"""``palisade report``: writes the HTML page of a cycle from the ledger and the stored outcomes."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jobs.adapt import exit_code
from jobs.site.show import serving_name
from jobs.terminal import Exit
from pipeline.config import parse
from pipeline.control.deployment import open_ledger
from pipeline.control.rollout import load
from pipeline.control.scoring import ScoredStream, join_labels
from pipeline.data.blobs import BadBlob
from pipeline.data.captures import BadSegment
from pipeline.data.features import mask_to_bool
from pipeline.guards.why import why
from pipeline.report.content import (
    CycleReport,
    Det,
    DetCurve,
    FleetTotals,
    PadSummary,
    PseudoLabels,
    QuarantineRow,
    RolloutEvent,
    RolloutReport,
    SiteReport,
    WaveReport,
)
from pipeline.report.page import write
from pipeline.revision import code_revision
from pipeline.stats.metrics import det_curve, far_frr

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, ServingRow, SiteRow, SourceRow, VerdictRow
    from pipeline.ledger import QuarantineRow as Refused
    from pipeline.rollout import Rollout

BINS = 48  # of the availability strip
STEPS = 200  # points of a curve over time
NEVER = datetime.min.replace(tzinfo=UTC)
NOTES = (
    "RiSe and MFAS-DANet are reconstructions from the papers' abstracts.",
    "Numbers before → after are on sealed labels that no site method saw; "
    "after is the candidate on the whole window.",
)


class StoredSummary(BaseModel):
    """The counts that ``cycle`` or ``adapt`` stored in the ledger, as far as the page shows them."""

    model_config = ConfigDict(frozen=True)

    source_version: int
    failed_sites: int = 0
    passed: int = Field(default=0, alias="pass")
    hold: int = 0
    fail: int = 0
    ingest_seconds: float | None = None
    adapt_seconds: float | None = None

    def stages(self) -> tuple[tuple[str, float], ...]:
        """Returns the seconds of the stages that were measured."""
        seconds = (("ingest", self.ingest_seconds), ("adapt", self.adapt_seconds))
        return tuple((name, s) for name, s in seconds if s is not None)


class SiteParts(NamedTuple):
    """Everything that is known of one site in one cycle."""

    row: SiteRow
    verdict: VerdictRow | None
    stream: ScoredStream | None
    refused: int  # rows in quarantine
    wave: int | None
    serving: ServingRow | None


def report(config: Config, terminal: Terminal, *, cycle: str | None) -> int:
    """Writes the page of ``cycle`` (default: the last one that adapted anything)."""
    ledger = open_ledger(config, create=False)
    finished = [c.id for c in ledger.cycles.history(kinds=("cycle", "adapt")) if c.status == "finished"]
    if not finished:
        raise ValueError("no finished cycle; run `palisade cycle` first")
    if cycle is not None and cycle not in finished:
        raise ValueError(f"cycle {cycle!r}: not there; the last ones are {', '.join(finished[:5])}")
    path = write_report(config, ledger, cycle or finished[0])
    terminal.result({"report": str(path)}, f"report: {path}")
    return Exit.DONE


def write_report(config: Config, ledger: Ledger, cycle: str) -> Path:
    """Writes the page of ``cycle`` and returns its path."""
    path = config.folder("reports", f"{cycle}.html")
    write(gather(config, ledger, cycle), path)
    return path


def gather(config: Config, ledger: Ledger, cycle: str) -> CycleReport:
    """Returns all content of the page of ``cycle``."""
    row = next(c for c in ledger.cycles.history() if c.id == cycle)
    cycle_config = parse(row.config_json, f"config of {cycle}")
    summary = StoredSummary.model_validate_json(row.summary_json)
    source = ledger.sources.get(summary.source_version)
    threshold = source.manifest.threshold
    verdicts = {v.site: v for v in ledger.verdicts.find(cycle=cycle)}
    refused = _refused(ledger, cycle)
    release = _release(ledger, verdicts)
    sites = _sites(config, ledger, source, verdicts, refused, release)
    return CycleReport(
        cycle_id=cycle,
        started=row.started,
        finished=row.finished or row.started,
        source_version=f"v{source.version}",
        source_digest=source.digest,
        fingerprint=row.fingerprint,
        code_revision=code_revision(),
        config_name=cycle_config.lineage.experiment,
        method=getattr(cycle_config.site, "kind", ""),
        threshold=threshold,
        ceiling=cycle_config.guards.ceiling.apcer,
        exit_code=int(exit_code(list(verdicts.values()), failed=summary.failed_sites)),
        exit_summary=f"{summary.passed} pass, {summary.hold} hold, {summary.fail} fail",
        digests=(
            ("anchor set", ledger.verdicts.anchor(source.trunk)),
            ("trunk", source.trunk),
            ("MLflow run of the source", source.lineage),
        ),
        sites=tuple(_site(parts, threshold, serving_name(ledger, parts.serving)) for parts in sites),
        det=_det([s.stream for s in sites if s.stream], threshold),
        quarantine=_quarantine(refused),
        rollout=_rollout(ledger, release),
        totals=FleetTotals(
            registered=len(ledger.streams.sites()),
            idle=sum(not v.window.samples for v in verdicts.values()),
            controls=release.plan.controls if release else 0,
            stage_seconds=summary.stages(),
        ),
        notes=NOTES,
    )


def _refused(ledger: Ledger, cycle: str) -> list[Refused]:
    """Returns the rows that were quarantined since the full cycle before this one."""
    rows = ledger.cycles.history()
    this = next(c for c in rows if c.id == cycle)
    before = max((c.started for c in rows if c.kind == "cycle" and c.started < this.started), default=NEVER)
    return [
        q
        for c in reversed(rows)
        if before < c.started <= this.started
        for q in ledger.streams.quarantined(cycle=c.id)
    ]


def _release(ledger: Ledger, verdicts: Mapping[str, VerdictRow]) -> Rollout | None:
    """Returns the newest rollout that carries a candidate of this cycle."""
    ids = {v.id for v in verdicts.values()}
    for row in ledger.plans.rollouts():
        if any(t.verdict_id in ids for t in ledger.plans.targets(row.id).values()):
            return load(row)
    return None


def _sites(
    config: Config,
    ledger: Ledger,
    source: SourceRow,
    verdicts: Mapping[str, VerdictRow],
    refused: Sequence[Refused],
    release: Rollout | None,
) -> list[SiteParts]:
    """Returns the sites that the cycle judged and those that failed."""
    serving = ledger.releases.serving()
    targets = ledger.plans.targets(release.plan.release) if release else {}
    counts = Counter(q.site for q in refused)
    return [
        SiteParts(
            row,
            verdict := verdicts.get(row.site),
            _stream(config, source, verdict) if verdict else None,
            counts[row.site],
            targets[row.site].wave + 1 if row.site in targets else None,
            serving.get(row.site),
        )
        for row in ledger.streams.sites()
        if row.site in verdicts or row.status == "failed"
    ]


def _stream(config: Config, source: SourceRow, verdict: VerdictRow) -> ScoredStream | None:
    try:
        return join_labels(config, source, [verdict])
    except (BadBlob, BadSegment):  # the page of an old cycle outlives its features
        return None


def _site(parts: SiteParts, threshold: float, serving: str) -> SiteReport:
    row, v, stream = parts.row, parts.verdict, parts.stream
    samples = v.window.samples if v else 0
    outcome = v.outcome if v else None
    status = "failed" if outcome == "fail" else "ok" if outcome == "pass" else "held"
    if v is None or (samples == 0 and parts.refused):
        status = "broken"
    return SiteReport(
        site=row.site,
        tags=tuple(f"{k}={x}" for k, x in row.tags.items()),
        rig=row.tags.get("hardware", ""),
        status=status,
        samples=samples,
        offset_from=v.offset_from if v else row.learned_offset,
        offset_to=v.offset_to if v else row.learned_offset,
        captured=_span(stream) if stream else None,
        quarantined=parts.refused,
        availability=_availability(stream) if stream else np.zeros((0, 3)),
        before=_pad(stream, "before", threshold) if stream else None,
        after=_pad(stream, "after", threshold) if stream else None,
        pseudo_labels=_pseudo_labels(stream) if stream else None,
        omega=_thin(stream.omega) if stream else np.zeros(0),
        instability=_thin(stream.instability) if stream else np.zeros(0),
        restores=(v.window.restores or 0) if v else 0,
        verdict=outcome,
        why=why(v.evidence) if v else "",
        reasons=tuple([f"cluster: {row.reason}"] if row.reason else []) + (_reasons(v) if v else ()),
        wave=parts.wave,
        promoted=bool(parts.serving and v and v.state and parts.serving.state == v.state),
        serving=serving,
    )


def _reasons(v: VerdictRow) -> tuple[str, ...]:
    """Returns all findings of a verdict, the decisive one first."""
    first = v.verdict.decisive
    findings = [f"{r.guard}: {r.text}{' (advisory)' if r.advisory else ''}" for r in v.verdict.reasons]
    return tuple(dict.fromkeys([first, *findings] if first else findings))


def _span(stream: ScoredStream) -> tuple[datetime, datetime]:
    """Returns the times of the first and the last capture."""
    first, last = (
        datetime.fromtimestamp(int(t.astype("datetime64[us]").astype(np.int64)) / 1e6, UTC)
        for t in (stream.captured_at.min(), stream.captured_at.max())
    )
    return first, last


def _availability(stream: ScoredStream) -> np.ndarray:
    """Returns the share [BINS, 3] of captures with each modality in equal bins of time."""
    at = stream.captured_at.astype(np.int64).astype(float)
    bins = np.minimum(((at - at.min()) / max(np.ptp(at), 1) * BINS).astype(int), BINS - 1)
    present = mask_to_bool(stream.present).astype(float)
    counts = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, weights=column, minlength=BINS) for column in present.T]
    with np.errstate(invalid="ignore"):
        return np.stack(sums, axis=1) / counts[:, None]


def _pad(stream: ScoredStream, which: str, threshold: float) -> PadSummary | None:
    pad = stream.pad(which, threshold)
    if pad is None:
        return None
    return PadSummary(pad.hter, pad.max_apcer, pad.worst_species, pad.bpcer, pad.n_attack, pad.n_bona_fide)


def _pseudo_labels(stream: ScoredStream) -> PseudoLabels | None:
    """Returns how many pseudo labels were learned from and how many agree with the sealed labels."""
    used, truth = stream.pseudo_label, stream.label
    if not (used >= 0).any():
        return None
    precision: list[float] = []
    for label in (0, 1):
        checked = truth[(used == label) & (truth >= 0)]
        precision.append(float((checked == label).mean()) if len(checked) else float("nan"))
    return PseudoLabels(float((used == 0).mean()), float((used == 1).mean()), precision[0], precision[1])


def _thin(values: np.ndarray) -> np.ndarray:
    """Returns at most STEPS of ``values``, evenly spaced."""
    return values[np.linspace(0, len(values) - 1, min(len(values), STEPS)).astype(int)]


def _det(streams: Sequence[ScoredStream], threshold: float) -> Det | None:
    """Returns the DET curves, pooled over the streams; None without labels of both classes."""
    labelled = [
        (s.label[s.label >= 0], s.before[s.label >= 0], s.after[s.label >= 0])
        for s in streams
        if (s.label >= 0).any()
    ]
    if not labelled:
        return None
    label, before, after = (np.concatenate(parts) for parts in zip(*labelled, strict=True))
    if len(np.unique(label)) < 2:
        return None
    curves: list[DetCurve] = []
    for score in (before, after):
        det = det_curve(score, label)
        far, frr = far_frr(score, label, threshold)
        curves.append(DetCurve(det.far, det.frr, (float(far), float(frr))))
    return Det(curves[0], curves[1], len(labelled), int((label == 0).sum()), int((label == 1).sum()))


def _quarantine(refused: Sequence[Refused]) -> tuple[QuarantineRow, ...]:
    """Returns one row for all refusals of a segment with the same reason."""
    grouped: dict[tuple[str, str, str], list[int]] = {}
    for q in refused:
        grouped.setdefault((q.site, q.segment, q.reason), []).append(q.row)
    return tuple(
        QuarantineRow(site, segment, None if min(rows) < 0 else min(rows), text, len(rows))
        for (site, segment, text), rows in grouped.items()
    )


def _rollout(ledger: Ledger, r: Rollout | None) -> RolloutReport | None:
    if r is None:
        return None
    waves: list[WaveReport] = []
    for i, w in enumerate(r.plan.waves):
        observed = ledger.plans.observe_wave(r.plan.release, i, without=())
        promoted = observed.sites - sum(observed.not_serving.values())
        done = i < r.wave or r.status == "completed"
        state = "done" if done else str(r.status) if i == r.wave else "waiting"
        failing = sum(wave == i for wave in r.failed.values())
        waves.append(WaveReport(i + 1, w.share, observed.sites, promoted, failing, state, None))
    events = [
        RolloutEvent(at, "palisade", f"{payload.get('event', kind)}")
        for _, at, kind, payload in ledger.audit.rows()
        if payload.get("rollout") == r.plan.release and kind == "rollout"
    ]
    return RolloutReport(str(r.status), r.plan_hash, tuple(waves), tuple(events))
