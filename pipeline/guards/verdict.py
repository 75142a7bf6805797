"""Holds ``assess`` and the guards on labelled evidence.

Ceiling: Clopper-Pearson upper bound of the candidate's APCER per PAI species and pattern, and of its BPCER.
Non-inferiority: upper bound of the paired difference (worse - better) / n on the same anchor items, by the
Wald interval with Bonett and Price's adjustment (J. Educ. Behav. Stat. 37, 2012; recommended by Fagerland et
al., Stat. Med. 33, 2014): unlike plain Wald it keeps a width without discordant items. A cell too small to
show the margin even then ("under-resolved": n < 231 for 1 pp) is judged by what no discordant item would give
at its n, or held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.guards.labelled import enough, labelled
from pipeline.guards.records import ATTACKS, REAL, Call, Cell, Evidence, Reason, Verdict
from pipeline.guards.unlabelled import unlabelled
from pipeline.stats.metrics import clopper_pearson

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pipeline.guards.limits import GuardsConfig, TrustRegion

    Floats = NDArray[np.float64]

Z95 = 1.6448536269514722


def assess(limits: GuardsConfig, evidence: Evidence) -> Verdict:
    """Returns the verdict: fail before hold before pass; scores that are not finite can only hold."""
    reasons = list(_no_data(limits, evidence))
    if evidence.finite:
        reasons += labelled(limits, evidence)  # first: reversed labels explain what the others find
        reasons += _ceiling(limits, evidence.cells)
        reasons += _noninferiority(limits, evidence.cells)
        reasons += _trust(limits.trust, evidence)
        reasons += unlabelled(limits, evidence)
    calls = {r.call for r in reasons if not r.advisory}
    outcome: Call = "fail" if "fail" in calls else "hold" if "hold" in calls else "pass"
    abort = outcome == "hold" and evidence.holds_before + 1 > limits.no_data.max_holds
    return Verdict(outcome=outcome, reasons=tuple(reasons), abort=abort, labels=evidence.labels)


def _no_data(limits: GuardsConfig, e: Evidence) -> Iterator[Reason]:
    rule = limits.no_data
    if not e.finite:
        yield _hold("stream", None, None, "a score or a state tensor is not finite; nothing else was judged")
    if e.stream_n < rule.stream_min and not enough(limits, e):
        yield _hold(
            "stream",
            e.stream_n,
            rule.stream_min,
            f"{e.stream_n} stream samples, at least {rule.stream_min} are needed",
        )
    if e.age_seconds is None or e.age_seconds > rule.stale_seconds:
        old = "unknown" if e.age_seconds is None else f"{e.age_seconds:.0f} s"
        text = f"age of the evidence: {old}, at most {rule.stale_seconds:.0f} s are allowed"
        yield _hold("stream", e.age_seconds, rule.stale_seconds, text)
    replayed = {(c.pattern, c.species == REAL) for c in e.cells if c.n}
    decisive = [g.patterns for g in (limits.ceiling, limits.noninferiority) if not g.advisory]
    wanted = {p: None for patterns in decisive for p in patterns}
    if not decisive or not all(decisive):
        wanted |= {c.pattern: None for c in e.cells}
    wanted = {p: None for p in wanted if p not in e.unseen}
    if e.rig and not wanted:
        text = f"no pattern that a guard applies to shows anything of the rig {'+'.join(e.rig)}"
        yield _hold("rig", 0, 1, text)
        return
    for pattern in wanted or ["anchor"]:
        for real, what in ((False, "attacks"), (True, "bona fide presentations")):
            if (pattern, real) not in replayed:
                yield _hold(
                    pattern, 0, rule.anchor_min, f"no anchor {what} were replayed under pattern {pattern}"
                )
    for c in e.cells:
        if c.n < rule.anchor_min and c.pattern in wanted:
            text = f"{c.n} anchor presentations of {c.species}, at least {rule.anchor_min} are needed"
            yield _hold(f"{c.pattern}/{c.species}", c.n, rule.anchor_min, text)


def _hold(where: str, number: float | None, limit: float | None, text: str) -> Reason:
    return Reason(guard="no_data", call="hold", where=where, number=number, limit=limit, text=text)


def _ceiling(limits: GuardsConfig, all_cells: tuple[Cell, ...]) -> Iterator[Reason]:
    rule = limits.ceiling
    cells = [c for c in all_cells if not rule.patterns or c.pattern in rule.patterns]
    errors, n = np.array([(c.errors, c.n) for c in cells], np.float64).reshape(-1, 2).T
    lower, upper = clopper_pearson(errors, n)
    limits_of = [rule.per_pattern.get(c.pattern, rule) for c in cells]
    limit = np.array(
        [o.bpcer if c.species == REAL else o.apcer for o, c in zip(limits_of, cells)], np.float64
    )
    small = (n < limits.no_data.anchor_min) & (lower <= limit)  # no_data holds these
    call = np.where(small, "", np.where(upper > limit, "fail", "pass"))

    def text(i: int) -> str:
        c, name = cells[i], "BPCER" if cells[i].species == REAL else "APCER"
        counts = f"{c.errors} of {c.n}, upper95 {upper[i]:.2%}, limit {limit[i]:.2%}"
        return f"{name} of {c.species} under {c.pattern}: {counts}"

    where = [f"{c.pattern}/{c.species}" for c in cells]
    yield from _findings("ceiling", rule.advisory, where, upper, limit, call, text)
    if rule.apcer_target is not None:
        attack = np.array([c.species != REAL for c in cells], np.bool_)
        target = np.full(len(cells), rule.apcer_target)
        over = np.where(attack & (call == "pass") & (upper > target), "hold", "")
        yield from _findings(
            "ceiling", True, where, upper, target, over, lambda i: f"{text(i)}, target {target[i]:.2%}"
        )


def _noninferiority(limits: GuardsConfig, all_cells: tuple[Cell, ...]) -> Iterator[Reason]:
    rule = limits.noninferiority
    rows = [
        (c.pattern, c.species, c.n, c.worse, c.better)
        for c in all_cells
        if c.n and (not rule.patterns or c.pattern in rule.patterns)
    ]
    for pattern in dict.fromkeys(r[0] for r in rows):
        species = [r[2:] for r in rows if r[0] == pattern and r[1] != REAL]
        if species:
            rows.append(
                (
                    pattern,
                    ATTACKS,
                    sum(r[0] for r in species),
                    sum(r[1] for r in species),
                    sum(r[2] for r in species),
                )
            )
    n, worse, better = np.array([r[2:] for r in rows], np.float64).reshape(-1, 3).T
    upper, floor = paired_upper95(worse, better, n), paired_upper95(0 * n, 0 * n, n)
    margins = {REAL: rule.bona_fide, ATTACKS: rule.attacks}
    margin = np.array([margins.get(r[1], rule.worst_species) for r in rows], np.float64)
    limit = np.maximum(margin, floor)
    resolved = "hold" if rule.under_resolved == "hold" else "pass"
    call = np.where(upper > limit + 1e-12, "fail", np.where(floor > margin, resolved, "pass"))

    def text(i: int) -> str:
        pattern, species, count, w, b = rows[i]
        note = f"; {count} items resolve {floor[i]:.2%} only" if floor[i] > margin[i] else ""
        counts = f"{w} worse, {b} better of {count}, upper95 {upper[i]:+.2%}, margin {margin[i]:.2%}"
        return f"{species} under {pattern}: {counts}{note}"

    where = [f"{r[0]}/{r[1]}" for r in rows]
    yield from _findings("noninferiority", rule.advisory, where, upper, limit, call, text)


def _findings(
    guard: str,
    advisory: bool,
    where: list[str],
    number: Floats,
    limit: Floats,
    call: NDArray[np.str_],
    text: Callable[[int], str],
) -> Iterator[Reason]:
    """Yields every fail and hold, and the pass that is nearest to its limit; texts are made only for
    these."""
    shown = np.flatnonzero((call == "fail") | (call == "hold")).tolist()
    passed = np.flatnonzero(call == "pass")
    if len(passed):
        shown.append(int(passed[np.argmax(number[passed] / limit[passed])]))
    for i in shown:
        yield Reason(
            guard=guard,
            call=call[i].item(),
            where=where[i],
            number=float(number[i]),
            limit=float(limit[i]),
            text=text(i),
            advisory=advisory,
        )


def paired_upper95(worse: Floats, better: Floats, n: Floats) -> Floats:
    """Returns the one-sided upper 95 % bound of (worse - better) / n, Wald with Bonett and Price's
    adjustment."""
    p, q, m = (worse + 1) / (n + 2), (better + 1) / (n + 2), n + 2
    return np.minimum(p - q + Z95 * np.sqrt((p + q - (p - q) ** 2) / m), 1.0)


def _trust(rule: TrustRegion, e: Evidence) -> Iterator[Reason]:
    for where, number, limit, what in (
        ("state", e.trust_ratio, rule.rho, "distance from the source state over its norm"),
        ("anchor", e.margin_drop, rule.margin, "fall of the attack margin in logits"),
    ):
        call: Call = "hold" if number is None else "fail" if number > limit else "pass"
        text = f"{what}: {'not measured' if number is None else format(number, '.3f')}, limit {limit:.3f}"
        yield Reason(
            guard="trust",
            call=call,
            where=where,
            number=number,
            limit=limit,
            text=text,
            advisory=rule.advisory,
        )
