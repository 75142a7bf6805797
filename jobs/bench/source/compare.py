"""Held-out results → the tables of the source benchmark. All errors are at thresholds that source validation
fixed.

``Runs`` of a table: row (a method) → column (a target or protocol) → one Result per seed.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.protocols import PATTERNS, instrument
from pipeline.report.content import DetCurve, RadiusPanel
from pipeline.report.source import AblationCell, MethodRow, UnseenRow
from pipeline.stats import metrics
from pipeline.stats.intervals import Calls, Estimate, calls, mean_hter, paired_bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.source.holdout import Result, Split

    Runs = dict[str, dict[str, list[Result]]]

MISSING = tuple(p for p in PATTERNS if p != "full")
# column of the missing-modality table → what fills the gap, and whether its own threshold decides
STANDS_IN = {
    "complement": ("complement", True),
    "zero-fill": ("zero-fill", True),
    "zero-fill, complement's boundary": ("zero-fill", False),
}


def judged(
    results: Sequence[Result], pattern: str = "full", fill: str = "complement", *, own: bool = True
) -> Calls:
    """Every seed's calls on one target; without ``own`` at the boundary that the model has for the
    complement.
    """
    kept = np.isfinite(results[0].test.logit[:, list(PATTERNS).index(pattern), 0])
    test = results[0].test
    scores = [r.scores("test", pattern, fill)[0] for r in results]
    thresholds = [r.threshold(pattern, fill if own else "complement") for r in results]
    return calls(np.stack(scores), test.label[kept], test.subject[kept], thresholds)


def method_rows(runs: Runs, ours: str) -> tuple[MethodRow, ...]:
    """One row per method over the targets that all of them have."""
    targets = shared_targets(runs)
    if not targets:
        return ()
    called = {m: [judged(per[t]) for t in targets] for m, per in runs.items()}
    rows: list[MethodRow] = []
    for method, per in runs.items():
        pads = {t: [_pad(r) for r in per[t]] for t in targets}
        every = [p for ps in pads.values() for p in ps]
        worst = Counter(p.worst_species for p in every).most_common(1)[0][0]
        comparable = (
            ours in runs and method != ours and all(len(runs[ours][t]) == len(per[t]) for t in targets)
        )
        rows.append(
            MethodRow(
                method=method,
                hter_by_target={t: mean_hter([c]) for t, c in zip(targets, called[method], strict=True)},
                hter=mean_hter(called[method]),
                oracle_eer=float(np.mean([p.eer for p in every])),
                max_apcer=float(np.mean([p.max_apcer for p in every])),
                worst_species=worst,
                bpcer=float(np.mean([p.bpcer for p in every])),
                bpcer20=float(np.mean([p.bpcer20 for p in every])),
                auc=float(np.mean([p.auc for p in every])),
                seeds=min(len(rs) for rs in per.values()),
                paired=paired_bootstrap(called[ours], called[method]) if comparable else None,
            )
        )
    return tuple(rows)


def shared_targets(runs: Runs) -> list[str]:
    """Columns that every row has results for."""
    return [t for t in next(iter(runs.values()), {}) if all(per.get(t) for per in runs.values())]


def det_panels(runs: Runs) -> dict[str, list[tuple[str, DetCurve]]]:
    """Target → each method's curve of its first seed, with the point of the honest threshold."""
    panels: dict[str, list[tuple[str, DetCurve]]] = {}
    for target in shared_targets(runs):
        for method, per in runs.items():
            logit, label = per[target][0].scores("test")
            curve = metrics.det_curve(logit, label)
            at = metrics.far_frr(logit, label, per[target][0].threshold())
            panels.setdefault(target, []).append((method, DetCurve(curve.far, curve.frr, at)))
    return panels


def radius_panels(per_target: Mapping[str, Sequence[Result]]) -> dict[str, list[RadiusPanel]]:
    """Target → a panel per source domain (validation) and one of the target (test), of the first seed."""
    panels: dict[str, list[RadiusPanel]] = {}
    for target, results in per_target.items():
        r = results[0]
        radius = np.linalg.norm(r.dev.hidden, axis=1)
        centred = r.dev.hidden / radius[:, None].clip(1e-9)
        mean = centred.mean(axis=0)
        plane = np.linalg.svd(centred - mean, full_matrices=False)[2][
            :2
        ]  # of the sources; the target is laid into it
        panels[target] = [_panel(r, r.dev, e, mean, plane) for e in sorted(set(r.dev.domain.tolist()))]
        panels[target].append(_panel(r, r.test, None, mean, plane))
    return panels


def ablation(runs: Runs) -> dict[str, dict[str, AblationCell]]:
    """``row`` → column → cell; here a column's results are one per target."""
    return {row: {column: _cell(results) for column, results in per.items()} for row, per in runs.items()}


def missing_grid(per_target: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, Estimate]]:
    """Pattern → what stands in → mean HTER over targets and seeds; the last row is the mean over the
    patterns.
    """
    if not per_target:
        return {}
    grid: dict[str, dict[str, Estimate]] = {}
    for pattern in MISSING:
        grid[pattern] = {
            name: mean_hter([judged(rs, pattern, fill, own=own) for rs in per_target.values()])
            for name, (fill, own) in STANDS_IN.items()
        }
    return {**grid, "mean": {name: mean_hter(_over_patterns(per_target, name)) for name in STANDS_IN}}


def complement_saves(per_target: Mapping[str, Sequence[Result]]) -> Estimate | None:
    """Share of zero-fill's HTER that the complement avoids, over all patterns, targets and seeds; None
    without results.
    """
    if not per_target:
        return None
    return paired_bootstrap(
        _over_patterns(per_target, "complement"), _over_patterns(per_target, "zero-fill")
    ).relative


def _over_patterns(per_target: Mapping[str, Sequence[Result]], name: str) -> list[Calls]:
    """Every target's calls under all patterns together: a subject is drawn with all of them, or the interval
    lies.
    """
    fill, own = STANDS_IN[name]
    together: list[Calls] = []
    for results in per_target.values():
        parts = [judged(results, pattern, fill, own=own) for pattern in MISSING]
        wrong = np.concatenate([p.wrong for p in parts], axis=1)
        label = np.concatenate([p.label for p in parts])
        cluster = np.concatenate([p.cluster for p in parts])
        together.append(Calls(wrong, label, cluster))
    return together


def limited_grid(runs: Runs) -> dict[str, dict[str, Estimate]]:
    """Protocol → method → HTER on all its targets together."""
    return {
        name: {method: mean_hter([judged(per[name])]) for method, per in runs.items()}
        for name in shared_targets(runs)
    }


def unseen_rows(runs: Runs, methods: Sequence[str]) -> tuple[UnseenRow, ...]:
    """APCER on instruments that no training sample of the sources shows, calls of all seeds together."""
    rows: list[UnseenRow] = []
    methods = [m for m in methods if m in runs]
    for target in shared_targets(runs) if methods else ():
        first = runs[methods[0]][target][0]
        known = {instrument(s) for s in first.known}
        kinds = np.array([instrument(s) for s in first.test.pai.tolist()])
        for kind in sorted(set(kinds[first.test.label == 0].tolist()) - known):
            rates = {m: _accepted(runs[m][target], kinds == kind) for m in methods}
            rows.append(UnseenRow(target, kind, rates))
    return tuple(rows)


def _accepted(results: Sequence[Result], which: NDArray[np.bool_]) -> metrics.Rate:
    """APCER over the attacks in ``which``: the bounds count a sample once, the rate is the mean over the
    seeds.
    """
    wrong = np.stack([r.test.logit[which & (r.test.label == 0), 0, 0] >= r.threshold() for r in results])
    return metrics.rate(round(float(wrong.mean()) * wrong.shape[1]), wrong.shape[1])


def _pad(r: Result) -> metrics.PadReport:
    logit, label = r.scores("test")
    dev, dev_label = r.scores("dev")
    return metrics.report(
        logit, label, _merged(r.test), r.threshold(), dev=metrics.Dev(dev, dev_label, _merged(r.dev))
    )


def _merged(split: Split) -> NDArray[np.str_]:
    """Species; those of PADISI, of which a split has a handful each, by instrument (the code's first two
    digits).
    """
    return np.array(
        [f"{s[:4]}xx" if instrument(s) != s and s[:2] == "m5" else s for s in split.pai.tolist()], np.str_
    )


def _panel(r: Result, split: Split, domain: str | None, mean: np.ndarray, plane: np.ndarray) -> RadiusPanel:
    def of(label: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.flatnonzero((split.label == label) & ((split.domain == domain) | (domain is None)))
        hidden = split.hidden[rows]
        radius = np.linalg.norm(hidden, axis=1)
        flat = (hidden / radius[:, None].clip(1e-9) - mean) @ plane.T
        return radius, np.arctan2(flat[:, 1], flat[:, 0])

    (bona_fide, angle), (attack, attack_angle) = of(1), of(0)
    return RadiusPanel(domain or "target", bona_fide, attack, r.radius, angle, attack_angle)


def _cell(results: Sequence[Result]) -> AblationCell:
    eers = [metrics.eer(*r.scores("test")) for r in results]
    return AblationCell(mean_hter([judged([r]) for r in results]), float(np.mean(eers)), len(results))
