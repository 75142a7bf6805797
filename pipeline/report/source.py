"""What the source benchmark found, as plain numbers; ``render`` turns a SourceBench into one HTML file
without script.

Rates and shares are in [0, 1]; NaN and None mean not measured. Every string may be hostile: the page escapes
all of them. An HTER is at the threshold that source validation fixed; only what is named oracle chose its
threshold on the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report import plots, timelines
from pipeline.report.page import environment, publish

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from pipeline.report.content import DetCurve, Figure, RadiusPanel
    from pipeline.stats.intervals import Estimate, Paired
    from pipeline.stats.metrics import Rate

    Grid = dict[str, dict[str, Estimate]]  # row -> column -> HTER

OURS, BASELINE = "rise", "erm"
SECTIONS = ("methods", "det", "radii", "ablation", "missing", "limited", "unseen", "speed")
SPAN = 0.05  # rates that lie closer than this are not spread over all shades
METHODS = {
    "erm": "empirical risk minimisation: the same loss over all domains, no invariance",
    "irm": "invariant risk minimisation, IRMv1 (Arjovsky et al., 2019)",
    "vrex": "penalises the variance of the risk over domains (Krueger et al., 2021)",
    "pgirm": "a boundary per domain (here a sphere), drawn together: PG-IRM (Sun et al., 2023)",
    "mmdg": "single-side prototypes and modality-wise gradient balance, after MMDG",
    "dadm": "mutual information and dual alignment of modalities and domains, after DADM",
    "ctnet": "transitions between modalities alike in bona fide, other in attacks, after CTNet",
    "rise": "spherical boundary, cues in the angle, synergy disentanglement: rebuilt from RiSe's "
    "abstract, not a reproduction",
}


@dataclass(frozen=True)
class MethodRow:
    """One method, trained without the target and measured on it, over all targets and seeds."""

    method: str
    hter_by_target: dict[str, Estimate]
    hter: Estimate  # mean over targets and seeds
    oracle_eer: float  # mean
    max_apcer: float
    worst_species: str
    bpcer: float
    bpcer20: float  # threshold from source validation
    auc: float
    seeds: int
    paired: Paired | None  # rise against this method; None for rise itself

    @property
    def score_shift(self) -> float:
        """What the transfer of the threshold costs: honest HTER - oracle EER."""
        return self.hter[0] - self.oracle_eer


@dataclass(frozen=True)
class AblationCell:
    """Mean over ``n`` runs (targets x seeds)."""

    hter: Estimate
    oracle_eer: float
    n: int


@dataclass(frozen=True)
class UnseenRow:
    """A PAI species of a target that no source domain has: its APCER by method."""

    target: str
    species: str
    apcer: dict[str, Rate]


@dataclass(frozen=True)
class SpeedRow:
    """Seconds of one optimizer step by part, and the throughput of the loop."""

    loop: str
    load: float
    forward: float
    backward: float
    optimizer: float
    samples_per_second: float

    @property
    def parts(self) -> tuple[float, ...]:
        """In the order of the page's columns."""
        return self.load, self.forward, self.backward, self.optimizer

    @property
    def total(self) -> float:
        """Sum of the parts that were measured."""
        return float(np.nansum(self.parts))


@dataclass(frozen=True)
class SourceBench:
    """Everything that the page of a source benchmark shows;
    a section without data is replaced by its reason.
    """

    title: str
    created: datetime
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]
    methods: tuple[MethodRow, ...]
    det: dict[str, Sequence[tuple[str, DetCurve]]]  # target -> (method, curve)
    radii: dict[str, Sequence[RadiusPanel]]  # target -> panels
    ablation: dict[str, dict[str, AblationCell]]  # boundary -> synergy
    missing: Grid  # pattern -> what stands in
    limited: Grid  # protocol -> method
    unseen: tuple[UnseenRow, ...]
    speed: tuple[SpeedRow, ...]
    context: dict[str, str]  # versions, cores, seeds, seconds, config, revision
    left_out: dict[str, str]  # section -> why it has no data


def render(report: SourceBench) -> str:
    """The whole page; methods come best first."""
    assert set(report.left_out) <= set(SECTIONS), report.left_out
    rows = sorted(report.methods, key=lambda m: (np.isnan(m.hter[0]), m.hter[0]))
    spans = [m.hter[2] if np.isfinite(m.hter[2]) else m.hter[0] for m in rows]
    return (
        environment()
        .get_template("source.html.j2")
        .render(
            report=report,
            answer=_answer(rows),
            rows=rows,
            targets=_keys(m.hter_by_target for m in rows),
            top=plots.scale([*spans, *(m.oracle_eer for m in rows)], 0.02),
            others=[m for m in _names(report) if m not in (OURS, BASELINE)],
            tops={target: _top(panels) for target, panels in report.radii.items()},
            columns=lambda table: _keys(table.values()),
            judged=_keys(r.apcer for r in report.unseen),
            longest=max((r.total for r in report.speed), default=0.0),
            ours=OURS,
            baseline=BASELINE,
            described=METHODS,
            drawn=plots.POINTS,
            shade=_shade,
            lowest=timelines.lowest,
            span=timelines.span,
            points=_points,
            why={s: report.left_out.get(s, "Not part of this run.") for s in SECTIONS},
        )
    )


def write(report: SourceBench, path: Path) -> None:
    """Render to ``path``."""
    publish(render(report), path)


def _answer(rows: Sequence[MethodRow]) -> list[str]:
    """The benchmark in one sentence, by its parts."""
    known = [m for m in rows if np.isfinite(m.hter[0])]
    if not known:
        return ["No method was measured"]
    best, targets = known[0], len(_keys(m.hter_by_target for m in known))
    parts = [
        f"{best.method} errs least: mean HTER {plots.percent(best.hter[0])} over {targets} unseen domains"
    ]
    ours = next((m for m in known if m.method == OURS), None)
    if ours and ours is not best:
        parts.append(f"{OURS} has {plots.percent(ours.hter[0])}")
    paired = next((m.paired for m in known if m.method == BASELINE and m.paired), None)
    if paired and np.isfinite([*paired.difference, *paired.relative]).all():
        value, low, high = paired.difference
        if low <= 0 <= high:
            parts.append(
                f"{OURS} and {BASELINE} are not told apart ({_points(low)} to {_points(high)} points)"
            )
        elif value < 0:
            parts.append(
                f"{plots.percent(paired.relative[0])} less than {BASELINE} "
                f"({timelines.span(*paired.relative[1:])}%)"
            )
        else:
            parts.append(f"{_points(value)} points more than {BASELINE} ({_points(low)} to {_points(high)})")
    return parts


def _keys(maps: Iterable[Mapping[str, object]]) -> list[str]:
    """All keys in the order of their first appearance."""
    return list(dict.fromkeys(k for m in maps for k in m))


def _names(report: SourceBench) -> list[str]:
    return list(dict.fromkeys(method for curves in report.det.values() for method, _ in curves))


def _top(panels: Sequence[RadiusPanel]) -> float:
    """End of the common radius axis of a target's panels: 99 of 100 samples are within."""
    radii = np.concatenate([r for p in panels for r in (p.bona_fide, p.attack)] or [np.zeros(0)])
    radii = radii[np.isfinite(radii)]
    far = float(np.quantile(radii, 0.99)) if len(radii) else 0.0
    return plots.scale([far, *(1.1 * p.rho for p in panels)], 0.1)


def _shade(value: float, among: Iterable[float]) -> str:
    """Share of the full shade that ``value`` gets: 0 for the lowest of ``among``, 1 for the highest."""
    finite = [v for v in among if np.isfinite(v)]
    if not np.isfinite(value) or not finite:
        return "0"
    return f"{(value - min(finite)) / max(max(finite) - min(finite), SPAN):.2f}"


def _points(value: float) -> str:
    """A difference of rates in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}") if np.isfinite(value) else "–"
