"""Compares the held-out results of source methods. All errors are at thresholds that source validation fixed.

``Runs`` of a table: row (a method) -> column (a target or protocol) -> one Result per seed.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.data.protocols import PATTERNS, instrument
from pipeline.models import tail as tails
from pipeline.report.content import DetCurve, RadiusPanel
from pipeline.stats import metrics
from pipeline.stats.intervals import Calls, Estimate, Paired, calls, mean_hter, paired_bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from jobs.bench.source.fits import Result
    from pipeline.source.holdout import Split

    Runs = dict[str, dict[str, list[Result]]]

CEILING = 0.07  # NIST SP 800-63A-4: IAPAR below 0.07
MISSING = tuple(p for p in PATTERNS if p != "full")
MEANS = ("eer", "max_apcer", "bpcer", "bpcer20", "auc")  # of a PadReport, over targets and seeds
STANDS_IN = {  # column of the table -> what fills the gap, and whether its own threshold decides
    "complement": ("complement", True),
    "zero-fill": ("zero-fill", True),
    "zero-fill, complement's boundary": ("zero-fill", False),
}


class MethodRow(NamedTuple):
    """One method, trained without the target and measured on it, over all targets and seeds."""

    method: str
    hter_by_target: dict[str, Estimate]
    hter: Estimate  # mean over targets and seeds
    oracle_eer: float
    max_apcer: float
    worst_species: str
    bpcer: float
    bpcer20: float  # threshold from source validation
    auc: float
    seeds: int
    paired: Paired | None  # ours against this method; None for ours

    @property
    def score_shift(self) -> float:
        """What the transfer of the threshold costs: honest HTER - oracle EER."""
        return self.hter.value - self.oracle_eer


class SpeciesRow(NamedTuple):
    """The APCER on one PAI species where every set is a source."""

    species: str
    apcer: metrics.Rate

    @property
    def holds(self) -> bool:
        """Whether the one-sided 95 % upper bound is at most CEILING."""
        return self.apcer.upper95 <= CEILING


class Contribution(NamedTuple):
    """What a modality adds to the logit: the mean over presentations of the logit with it minus without it.

    Interventional: the modality is replaced by its complement from the others, nothing else changes.
    """

    modality: str
    bona_fide: float
    attack: float


class UnseenRow(NamedTuple):
    """The APCER by method on a PAI species of a target that no source domain has."""

    target: str
    species: str
    apcer: dict[str, metrics.Rate]


def judged(
    results: Sequence[Result], pattern: str = "full", fill: str = "complement", *, own: bool = True
) -> Calls:
    """Returns every seed's calls on one target; without ``own`` at the complement's boundary."""
    test = results[0].test
    kept = np.isfinite(test.logit[:, list(PATTERNS).index(pattern), 0])
    scores = [r.scores("test", pattern, fill)[0] for r in results]
    thresholds = [r.threshold(pattern, fill if own else "complement") for r in results]
    return calls(np.stack(scores), test.label[kept], test.subject[kept], thresholds)


def method_rows(runs: Runs, ours: str) -> tuple[MethodRow, ...]:
    """Returns one row per method over the targets that all of them have, best first."""
    targets = shared_targets(runs)
    called = {m: {t: judged(per[t]) for t in targets} for m, per in runs.items()} if targets else {}

    def row(method: str, of: dict[str, Calls]) -> MethodRow:
        per, base = runs[method], runs.get(ours, {}) if method != ours else {}
        pads = [_pad(r) for t in targets for r in per[t]]
        seeds = {t: min(len(base[t]), len(per[t])) for t in (targets if base else ())}  # that both have
        pair = [[judged(of_one[t][:n]) for t, n in seeds.items()] for of_one in (base, per)]
        mean = {n: float(np.mean([getattr(p, n) for p in pads])) for n in MEANS}
        return MethodRow(
            method=method,
            hter_by_target={t: mean_hter([c]) for t, c in of.items()},
            hter=mean_hter([*of.values()]),
            oracle_eer=mean.pop("eer"),
            worst_species=Counter(p.worst_species for p in pads).most_common(1)[0][0],
            seeds=min(len(results) for results in per.values()),
            paired=paired_bootstrap(*pair) if base else None,
            **mean,
        )

    rows = (row(method, of) for method, of in called.items())
    return tuple(sorted(rows, key=lambda r: (np.isnan(r.hter.value), r.hter.value)))


def shared_targets(runs: Runs) -> list[str]:
    """Returns the columns that every row has results for."""
    return [t for t in next(iter(runs.values()), {}) if all(per.get(t) for per in runs.values())]


def det_curves(runs: Runs, target: str) -> list[tuple[str, DetCurve]]:
    """Returns each method's curve of its first seed, with the point of the honest threshold."""

    def curve(r: Result) -> DetCurve:
        logit, label = r.scores("test")
        whole = metrics.det_curve(logit, label)
        return DetCurve(whole.far, whole.frr, metrics.far_frr(logit, label, r.threshold()))

    return [(method, curve(per[target][0])) for method, per in runs.items()]


def radius_panels(r: Result) -> list[RadiusPanel]:
    """Returns a panel per source domain (validation) and one of the target (test), in the sources' plane."""
    centred = r.dev.hidden / np.linalg.norm(r.dev.hidden, axis=1)[:, None].clip(1e-9)
    mean = centred.mean(axis=0)
    plane = np.linalg.svd(centred - mean, full_matrices=False)[2][:2]
    panels = [_panel(r, r.dev, e, mean, plane) for e in sorted(set(r.dev.domain.tolist()))]
    return [*panels, _panel(r, r.test, None, mean, plane)]


def missing_grid(per_target: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, Estimate]]:
    """Returns pattern -> what stands in -> mean HTER over targets and seeds; the last row is their mean."""
    if not per_target:
        return {}

    def hter(pattern: str, fill: str, own: bool) -> Estimate:
        return mean_hter([judged(results, pattern, fill, own=own) for results in per_target.values()])

    grid = {p: {name: hter(p, *how) for name, how in STANDS_IN.items()} for p in MISSING}
    return {**grid, "mean": {name: mean_hter(_over_patterns(per_target, name)) for name in STANDS_IN}}


def complement_saves(per_target: Mapping[str, Sequence[Result]]) -> Estimate | None:
    """Returns the share of zero-fill's HTER that the complement avoids; None without results."""
    if not per_target:
        return None
    complement, zeros = (_over_patterns(per_target, name) for name in ("complement", "zero-fill"))
    return paired_bootstrap(complement, zeros).relative


def _over_patterns(per_target: Mapping[str, Sequence[Result]], name: str) -> list[Calls]:
    """Returns each target's calls under all patterns: a subject is drawn with all, or intervals lie."""
    fill, own = STANDS_IN[name]
    together: list[Calls] = []
    for results in per_target.values():
        parts = [judged(results, pattern, fill, own=own) for pattern in MISSING]
        wrong = np.concatenate([p.wrong for p in parts], axis=1)
        label, cluster = (np.concatenate([getattr(p, n) for p in parts]) for n in ("label", "cluster"))
        together.append(Calls(wrong, label, cluster))
    return together


def unseen_rows(runs: Runs, methods: Sequence[str]) -> tuple[UnseenRow, ...]:
    """Returns the APCER on instruments that no training sample of the sources shows, over all seeds."""
    rows: list[UnseenRow] = []
    methods = [m for m in methods if m in runs]
    for target in shared_targets(runs) if methods else ():
        first = runs[methods[0]][target][0]
        known = {instrument(s) for s in first.known}
        kinds = np.array([instrument(s) for s in first.test.pai.tolist()])
        for kind in sorted(set(kinds[first.test.label == 0].tolist()) - known):
            apcer = {m: _accepted(runs[m][target], kinds == kind) for m in methods}
            rows.append(UnseenRow(target, kind, apcer))
    return tuple(rows)


def species_rows(results: Sequence[Result]) -> tuple[SpeciesRow, ...]:
    """Returns every species of the tests, the highest bound first."""
    if not results:
        return ()
    names, label = results[0].test.pai, results[0].test.label
    rows = [SpeciesRow(s, _accepted(results, names == s)) for s in sorted(set(names[label == 0].tolist()))]
    return tuple(sorted(rows, key=lambda r: -r.apcer.upper95))


def contributions(per_target: Mapping[str, Sequence[Result]]) -> tuple[Contribution, ...]:
    """Returns what each modality adds to the logit, mean over targets and seeds."""
    names, results = list(PATTERNS), [r for rs in per_target.values() for r in rs]

    def mean(modality: str, label: int) -> float:
        each: list[float] = []
        for r in results:
            logit = r.test.logit[r.test.label == label][:, :, 0]
            added = logit[:, names.index("full")] - logit[:, names.index(f"no-{modality}")]
            each.append(float(np.nanmean(added)))
        return float(np.mean(each))

    return tuple(Contribution(m, mean(m, 1), mean(m, 0)) for m in (("rgb", "depth", "ir") if results else ()))


def mean_eer(results: Sequence[Result]) -> float:
    """Returns the mean equal error rate on the targets themselves."""
    return float(np.mean([metrics.eer(*r.scores("test")) for r in results]))


def _accepted(results: Sequence[Result], which: NDArray[np.bool_]) -> metrics.Rate:
    """Returns the APCER over ``which`` attacks: bounds count a sample once, the rate is the seeds' mean."""
    wrong = np.stack([r.test.logit[which & (r.test.label == 0), 0, 0] >= r.threshold() for r in results])
    return metrics.rate(round(float(wrong.mean()) * wrong.shape[1]), wrong.shape[1])


def _pad(r: Result) -> metrics.PadReport:
    dev = metrics.Dev(*r.scores("dev"), _merged(r.dev))
    return metrics.report(*r.scores("test"), _merged(r.test), r.threshold(), dev=dev)


def _merged(split: Split) -> NDArray[np.str_]:
    """Returns the species; PADISI has few of each, so its codes are cut to the instrument's digits."""
    names = [f"{s[:4]}xx" if instrument(s) != s and s[:2] == "m5" else s for s in split.pai.tolist()]
    return np.array(names, np.str_)


def _panel(r: Result, split: Split, domain: str | None, mean: np.ndarray, plane: np.ndarray) -> RadiusPanel:
    def of(label: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.flatnonzero((split.label == label) & ((split.domain == domain) | (domain is None)))
        long = np.linalg.norm(split.hidden[rows], axis=1)[:, None].clip(1e-9)
        flat = (split.hidden[rows] / long - mean) @ plane.T
        scored = r.radius - split.heads[rows, tails.FUSED] / tails.KAPPA  # pooled over the heads
        return scored, np.arctan2(flat[:, 1], flat[:, 0])

    (bona_fide, angle), (attack, attack_angle) = of(1), of(0)
    return RadiusPanel(domain or "target", bona_fide, attack, r.radius, angle, attack_angle)
