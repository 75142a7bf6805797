"""``palisade report``: the HTML page of a cycle, from the ledger and the stored outcomes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
    from collections.abc import Sequence

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, ServingRow, SiteRow, SourceRow, VerdictRow
    from pipeline.ledger import QuarantineRow as Refused
    from pipeline.rollout import Rollout

BINS = 48  # of the availability strip
STEPS = 200  # points of a curve over time


def report(config: Config, terminal: Terminal, *, cycle: str | None) -> int:
    """Write the page of ``cycle`` (default: the last one that adapted anything)."""
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
    """Gather and write; returns the path."""
    path = config.folder("reports", f"{cycle}.html")
    write(gather(config, ledger, cycle), path)
    return path


def gather(config: Config, ledger: Ledger, cycle: str) -> CycleReport:
    """Everything the page of ``cycle`` shows."""
    row = next(c for c in ledger.cycles.history() if c.id == cycle)
    ran = parse(row.config, f"config of {cycle}")
    summary = json.loads(row.summary)
    source = ledger.sources.get(int(summary["source_version"]))
    threshold = float(str(source.manifest["threshold"]))
    verdicts = {v.site: v for v in ledger.verdicts.find(cycle=cycle)}
    sites = [s for s in ledger.streams.sites() if s.site in verdicts or s.status == "failed"]
    joined = {site: _joined(config, source, v) for site, v in verdicts.items()}
    refused = _refused(ledger, cycle)
    serving, release = ledger.releases.serving(), _release(ledger, verdicts)
    waves = {s: t.wave + 1 for s, t in ledger.plans.targets(release.plan.release).items()} if release else {}
    counts = {s.site: sum(q.site == s.site for q in refused) for s in sites}
    return CycleReport(
        cycle_id=cycle,
        started=datetime.fromisoformat(row.started),
        finished=datetime.fromisoformat(row.finished),
        source_version=f"v{source.version}",
        source_digest=source.digest,
        fingerprint=row.fingerprint,
        code_revision=code_revision(),
        config_name=ran.lineage.experiment,
        method=getattr(ran.site, "kind", ""),
        threshold=threshold,
        ceiling=ran.guards.ceiling.apcer,
        exit_code=int(exit_code(list(verdicts.values()), failed=int(summary.get("failed_sites", 0)))),
        exit_summary=f"{summary.get('pass', 0)} pass, {summary.get('hold', 0)} hold, {summary.get('fail', 0)} fail",
        digests=(
            ("anchor set", ledger.verdicts.anchor(source.trunk)),
            ("trunk", source.trunk),
            ("MLflow run of the source", source.lineage),
        ),
        sites=tuple(
            _site(
                s,
                verdicts.get(s.site),
                joined.get(s.site),
                threshold,
                counts[s.site],
                waves.get(s.site),
                ledger,
                serving.get(s.site),
            )
            for s in sites
        ),
        det=_det([j for j in joined.values() if j], threshold),
        quarantine=_quarantine(refused),
        rollout=_rollout(ledger, release),
        totals=FleetTotals(
            registered=len(ledger.streams.sites()),
            idle=sum(not v.counters["samples"] for v in verdicts.values()),
            controls=release.plan.controls if release else 0,
            stage_seconds=tuple(
                (k.removesuffix("_seconds"), float(v)) for k, v in summary.items() if k.endswith("_seconds")
            ),
        ),
        notes=(
            "RiSe and MFAS-DANet are reconstructions from the papers' abstracts.",
            "Numbers before → after are on sealed labels that no site method saw; after is the candidate on the whole window.",
        ),
    )


def _joined(config: Config, source: SourceRow, verdict: VerdictRow) -> ScoredStream | None:
    try:
        return join_labels(config, source, [verdict])
    except (BadBlob, BadSegment):  # the page of an old cycle outlives its features
        return None


def _site(
    row: SiteRow,
    v: VerdictRow | None,
    joined: ScoredStream | None,
    threshold: float,
    refused: int,
    wave: int | None,
    ledger: Ledger,
    served: ServingRow | None,
) -> SiteReport:
    samples = int(str(v.counters["samples"])) if v else 0
    outcome = v.outcome if v else None
    status = "failed" if outcome == "fail" else "ok" if outcome == "pass" else "held"
    if v is None or (samples == 0 and refused):
        status = "broken"
    return SiteReport(
        site=row.site,
        tags=tuple(f"{k}={x}" for k, x in row.tags.items()),
        rig=row.tags.get("hardware", ""),
        status=status,
        samples=samples,
        offset_from=v.offset_from if v else row.learned,
        offset_to=v.offset_to if v else row.learned,
        captured=_span(joined),
        quarantined=refused,
        availability=_availability(joined),
        before=_pad(joined, "before", threshold),
        after=_pad(joined, "after", threshold),
        pseudo_labels=_pseudo(joined),
        omega=_thin(joined.omega) if joined else np.zeros(0),
        instability=_thin(joined.instability) if joined else np.zeros(0),
        restores=int(str(v.counters["restores"])) if v else 0,
        verdict=outcome,
        reasons=tuple([f"cluster: {row.reason}"] if row.reason else []) + (_reasons(v) if v else ()),
        wave=wave,
        promoted=bool(served and v and v.state and served.state == v.state),
        serving=serving_name(ledger, served),
    )


def _reasons(v: VerdictRow) -> tuple[str, ...]:
    verdict = v.verdict
    first = verdict.decisive
    every = [f"{r.guard}: {r.text}{' (advisory)' if r.advisory else ''}" for r in verdict.reasons]
    return tuple(dict.fromkeys([first, *every] if first else every))


def _span(joined: ScoredStream | None) -> tuple[datetime, datetime] | None:
    if joined is None:
        return None
    ends = (joined.captured_at.min(), joined.captured_at.max())
    first, last = (
        datetime.fromtimestamp(int(t.astype("datetime64[us]").astype(np.int64)) / 1e6, UTC) for t in ends
    )
    return first, last


def _availability(joined: ScoredStream | None) -> np.ndarray:
    """[T, 3] share of captures with each modality in equal bins of time."""
    if joined is None:
        return np.zeros((0, 3))
    at = joined.captured_at.astype(np.int64).astype(float)
    bins = np.minimum(((at - at.min()) / max(np.ptp(at), 1) * BINS).astype(int), BINS - 1)
    there = mask_to_bool(joined.present).astype(float)
    counts = np.bincount(bins, minlength=BINS)
    sums = np.stack(
        [np.bincount(bins, weights=there[:, m], minlength=BINS) for m in range(there.shape[1])], axis=1
    )
    with np.errstate(invalid="ignore"):
        return sums / counts[:, None]


def _pad(joined: ScoredStream | None, which: str, threshold: float) -> PadSummary | None:
    pad = joined.pad(which, threshold) if joined else None
    if pad is None:
        return None
    return PadSummary(pad.hter, pad.max_apcer, pad.worst_species, pad.bpcer, pad.n_attack, pad.n_bona_fide)


def _pseudo(joined: ScoredStream | None) -> PseudoLabels | None:
    if joined is None or not (joined.pseudo_label >= 0).any():
        return None
    used, truth = joined.pseudo_label, joined.label
    precision = []
    for label in (0, 1):
        mine = (used == label) & (truth >= 0)
        precision.append(float((truth[mine] == label).mean()) if mine.any() else float("nan"))
    return PseudoLabels(float((used == 0).mean()), float((used == 1).mean()), precision[0], precision[1])


def _thin(values: np.ndarray) -> np.ndarray:
    return values[np.linspace(0, len(values) - 1, min(len(values), STEPS)).astype(int)]


def _det(joined: list[ScoredStream], threshold: float) -> Det | None:
    labelled = [
        (j.label[j.label >= 0], j.before[j.label >= 0], j.after[j.label >= 0])
        for j in joined
        if (j.label >= 0).any()
    ]
    if not labelled:
        return None
    label, before, after = (np.concatenate(parts) for parts in zip(*labelled, strict=True))
    if len(np.unique(label)) < 2:
        return None
    curves = []
    for score in (before, after):
        det = det_curve(score, label)
        far, frr = far_frr(score, label, threshold)
        curves.append(DetCurve(det.far, det.frr, (float(far), float(frr))))
    return Det(curves[0], curves[1], len(labelled), int((label == 0).sum()), int((label == 1).sum()))


def _refused(ledger: Ledger, cycle: str) -> list[Refused]:
    """What was refused since the full cycle before this one."""
    rows = ledger.cycles.history()
    own = next(c for c in rows if c.id == cycle)
    before = max((c.started for c in rows if c.kind == "cycle" and c.started < own.started), default="")
    return [
        q
        for c in reversed(rows)
        if before < c.started <= own.started
        for q in ledger.streams.quarantined(cycle=c.id)
    ]


def _quarantine(refused: Sequence[Refused]) -> tuple[QuarantineRow, ...]:
    grouped: dict[tuple[str, str, str], list[int]] = {}
    for q in refused:
        grouped.setdefault((q.site, q.segment, q.reason), []).append(q.row)
    return tuple(
        QuarantineRow(site, segment, None if min(rows) < 0 else min(rows), text, len(rows))
        for (site, segment, text), rows in grouped.items()
    )


def _release(ledger: Ledger, verdicts: dict[str, VerdictRow]) -> Rollout | None:
    """The newest rollout that carries a candidate of this cycle."""
    ids = {v.id for v in verdicts.values()}
    for row in ledger.plans.rollouts():
        if any(t.verdict_id in ids for t in ledger.plans.targets(row.id).values()):
            return load(row)
    return None


def _rollout(ledger: Ledger, r: Rollout | None) -> RolloutReport | None:
    if r is None:
        return None
    waves = []
    for i, w in enumerate(r.plan.waves):
        seen = ledger.plans.observe_wave(r.plan.release, i, without=())
        state = (
            "done" if i < r.wave or r.status == "completed" else str(r.status) if i == r.wave else "waiting"
        )
        failing = sum(wave == i for wave in r.failed.values())
        waves.append(
            WaveReport(
                i + 1, w.share, seen.sites, seen.sites - sum(seen.not_serving.values()), failing, state, None
            )
        )
    events = [
        RolloutEvent(at, "palisade", f"{payload.get('event', kind)}")
        for _, at, kind, payload in ledger.audit.rows()
        if payload.get("rollout") == r.plan.release and kind == "rollout"
    ]
    return RolloutReport(str(r.status), r.plan_hash, tuple(waves), tuple(events))
