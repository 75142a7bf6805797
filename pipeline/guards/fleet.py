"""Judges promoted sites, compares them with control sites, and watches the fleet's error budget.

Everything is a count that may be looked at as often as one likes: the tests are e-processes
(``pipeline.stats.sequential``). A healthy wave is one whose sites keep to ``shadow.apcer`` and are not more
often worse than better than their rollback target. Of healthy waves at most ``shadow.alpha`` are ever
stopped: RATE of it by the rate, the rest by the pairs, both on the sites' e-values merged as is best where
FEW of them are bad (``sequential.merge_few``). A single bad site shows late in that; ``alpha_site`` rolls it
back alone sooner, and it goes on to count. As each wave joins, part of its alpha is spent on a new set of
sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.guards.records import Reason
from pipeline.stats import sequential

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from pipeline.guards.limits import GuardsConfig

    Counts = NDArray[np.int64]
    Floats = NDArray[np.float64]

# share of an alpha for the rate, which detects most; the rest is for the pairs
RATE = 0.9
FEW = 0.05  # share of a wave's sites
MONTH = 720  # hours
LARGEST = 690.0  # nats; larger e-values are shown as this


@dataclass(frozen=True)
class LabelledCounts:
    """Counts labelled presentations of S promoted sites, also of sites that were rolled back alone."""

    sites: Sequence[str]
    attacks: Counts
    accepted: Counts  # attacks that the served state calls bona fide
    worse: Counts  # attacks that the served state gets wrong and the rollback target right
    better: Counts  # the other way round
    bona_fide: Counts
    refused: Counts  # bona fide that the served state calls attack
    # bona fide that the rollback target calls attack; None: not known
    rollback_refused: Counts | None = None


@dataclass(frozen=True)
class PromotedFindings:
    """Names what must be rolled back: single sites, or with any ``breach`` the whole release."""

    failing: dict[str, tuple[Reason, ...]]
    breach: tuple[Reason, ...]  # their ``where`` is the site, or "wave"


def judge_promoted(limits: GuardsConfig, standing: LabelledCounts) -> PromotedFindings:
    """Returns the findings on promoted sites. What a rollback would not mend counts against no site.

    Not mended: worse <= better, or as many bona fide refused by the rollback target. Breach: the lower
    confidence-sequence bound of a site's APCER over the hard ceiling, at shadow.alpha over all sites together
    (Bonferroni); or the wave's merged e-value of rate or pairs over its limit. Failing: a site's own e-value
    of rate or pairs over 1/alpha_site, or the lower bound of its BPCER over the hard ceiling at alpha_site:
    by guarantee 10,000 healthy sites give 10 such rollbacks over the release, far from a wave's abort share.
    """
    s, rule = standing, limits.shadow
    count = len(s.sites)
    if not count or rule.advisory:  # the ceiling is judged here whether or not it decides on candidates
        return PromotedFindings({}, ())
    harmed = np.flatnonzero(s.worse > s.better)
    failing: dict[str, list[Reason]] = {}
    breach: list[Reason] = []
    breach += _over_ceiling(limits, s, harmed)
    for i in _beyond(s.refused, s.bona_fide, limits.ceiling.bpcer, rule.alpha_site):
        if s.rollback_refused is not None and s.refused[i] <= s.rollback_refused[i]:
            continue
        counts = int(s.refused[i]), int(s.bona_fide[i])
        finding = _rate("BPCER", s.sites[i], *counts, limits.ceiling.bpcer, rule.alpha_site)
        failing.setdefault(s.sites[i], []).append(finding)
    for name, share, log_e in (
        ("rate", RATE, sequential.bernoulli_e(s.accepted[harmed], s.attacks[harmed], rule.apcer)),
        ("pairs", 1 - RATE, sequential.paired_e(s.worse[harmed], s.better[harmed])),
    ):
        for at in np.flatnonzero(log_e >= -np.log(rule.alpha_site * share)).tolist():
            i = int(harmed[at])
            text = f"{_counts(name, s, i, rule.apcer)}: its own"
            finding = _finding(s.sites[i], float(log_e[at]), rule.alpha_site * share, text)
            failing.setdefault(finding.where, []).append(finding)
        every = np.full(count, -np.inf)
        every[harmed] = log_e
        merged = float(sequential.merge_few(every, FEW)) if len(harmed) else -np.inf
        if merged >= -np.log(rule.alpha * share):
            worst = int(harmed[np.argmax(log_e)])
            text = (
                f"{count} sites, most of it from {s.sites[worst]} "
                f"({_counts(name, s, worst, rule.apcer)}): their"
            )
            breach.append(_finding("wave", merged, rule.alpha * share, text))
    return PromotedFindings({site: tuple(found) for site, found in failing.items()}, tuple(breach))


def compare_with_controls(
    limits: GuardsConfig, treated: LabelledCounts, controls: LabelledCounts, *, strata: Mapping[str, str]
) -> tuple[Reason, ...]:
    """Returns the strata in which promoted sites err more than the control sites, APCER and BPCER apart.

    ``strata`` names the stratum of every site. The e-values of "the promoted sites' rate is at most the
    controls'" are ``sequential.two_sample_e``; e-BH keeps false findings at ``fdr`` of all findings, however
    strata depend on each other. Assumes that a stratum's presentations have one rate per group.
    """
    names = sorted({strata[s] for s in treated.sites} & {strata[s] for s in controls.sites})
    if not names:
        return ()
    rates = (("APCER", "accepted", "attacks"), ("BPCER", "refused", "bona_fide"))
    rows: list[tuple[str, str]] = [(rate[0], name) for rate in rates for name in names]
    x, n, y, m = (
        np.concatenate([_sum(group, getattr(group, columns[k]), strata, names) for columns in rates])
        for group in (treated, controls)
        for k in (1, 2)
    )
    log_e = sequential.two_sample_e(x, n, y, m)
    findings: list[Reason] = []
    for i in map(int, sequential.e_bh(log_e, limits.controls.fdr)):
        what, name = rows[i]
        text = (
            f"{what} in stratum {name}: {x[i]:.0f} of {n[i]:.0f} at promoted sites, {y[i]:.0f} of "
            f"{m[i]:.0f} at control sites: "
            f"e-value {_e(float(log_e[i])):.3g}, false findings at most {limits.controls.fdr:.1%}"
        )
        findings.append(
            Reason(
                guard="controls",
                call="fail",
                where=name,
                number=_e(float(log_e[i])),
                limit=limits.controls.fdr,
                text=text,
                advisory=limits.controls.advisory,
            )
        )
    return tuple(findings)


def error_budget(limits: GuardsConfig, errors: ArrayLike, total: ArrayLike) -> tuple[Reason, ...]:
    """Returns why promotions must freeze; empty if they need not.

    ``errors`` of ``total`` presentations of the fleet are per hour [H], newest last. A month's budget is
    ``allowed`` of its presentations; burning ``burn_1h`` of it within 1 h or ``burn_6h`` within 6 h is a rate
    of errors, and a finding is an e-value against every lower rate. Nothing presented burns nothing.
    """
    rule = limits.budget
    e, n = (np.asarray(x, np.float64) for x in (errors, total))
    findings: list[Reason] = []
    for hours, burn in ((1, rule.burn_1h), (6, rule.burn_6h)):
        bad, seen, rate = (
            float(e[-hours:].sum()),
            float(n[-hours:].sum()),
            burn * MONTH / hours * rule.allowed,
        )
        if rate >= 1 or not seen or sequential.bernoulli_e(bad, seen, rate) < -np.log(rule.alpha):
            continue
        burnt = bad / seen * hours / (MONTH * rule.allowed)
        text = (
            f"{bad:.0f} of {seen:.0f} presentations went wrong in {hours} h: {burnt:.1%} of the month's "
            "error budget, "
            f"limit {burn:.1%}"
        )
        findings.append(
            Reason(
                guard="budget",
                call="hold",
                where="fleet",
                number=burnt,
                limit=burn,
                text=text,
                advisory=rule.advisory,
            )
        )
    return tuple(findings)


def _over_ceiling(limits: GuardsConfig, s: LabelledCounts, harmed: NDArray[np.intp]) -> list[Reason]:
    alpha, limit = limits.shadow.alpha / len(s.sites), limits.ceiling.apcer
    over = [int(harmed[k]) for k in _beyond(s.accepted[harmed], s.attacks[harmed], limit, alpha)]
    findings = [_rate("APCER", s.sites[i], int(s.accepted[i]), int(s.attacks[i]), limit, alpha) for i in over]
    note = (f"; its way back errs on {s.better[i]} of them alone, it on {s.worse[i]}" for i in over)
    return [r.model_copy(update={"text": r.text + more}) for r, more in zip(findings, note, strict=True)]


def _beyond(errors: Counts, n: Counts, limit: float, alpha: float) -> list[int]:
    """Returns the sites whose lower confidence-sequence bound of a rate is over ``limit``."""
    high = np.flatnonzero(errors > n * limit)
    if limit >= 1 or not len(high):
        return []
    over = sequential.bernoulli_e(errors[high], n[high], limit) >= -np.log(alpha)
    return [int(i) for i in high[over]]


def _rate(what: str, site: str, errors: int, n: int, limit: float, alpha: float) -> Reason:
    lower = float(sequential.bernoulli_cs(errors, n, alpha)[0])
    text = (
        f"{what} of {site} {errors} of {n}, lower bound {lower:.2%} at alpha {alpha:.2g}, limit {limit:.2%}"
    )
    return Reason(guard="ceiling", call="fail", where=site, number=lower, limit=limit, text=text)


def _counts(name: str, s: LabelledCounts, i: int, null: float) -> str:
    if name == "rate":
        return f"{s.accepted[i]} of {s.attacks[i]} attacks accepted against {null:.1%}"
    return f"{s.worse[i]} attacks worse and {s.better[i]} better than the way back"


def _finding(where: str, log_e: float, alpha: float, text: str) -> Reason:
    limit = 1 / alpha
    text = f"{'' if where == 'wave' else where + ': '}{text} e-value {_e(log_e):.4g}, limit {limit:.4g}"
    return Reason(guard="shadow", call="fail", where=where, number=_e(log_e), limit=limit, text=text)


def _e(log_e: float) -> float:
    return float(np.exp(min(log_e, LARGEST)))


def _sum(g: LabelledCounts, values: Counts, strata: Mapping[str, str], names: Sequence[str]) -> Floats:
    place = {name: k for k, name in enumerate(names)}
    at = np.array([place.get(strata[s], len(names)) for s in g.sites], np.intp)
    return np.bincount(at, weights=values, minlength=len(names) + 1)[: len(names)].astype(np.float64)
