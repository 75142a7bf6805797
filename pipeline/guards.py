"""May a candidate serve? Pure rules over counted evidence; this file holds the section ``guards``.

Evidence is what was counted on the sealed anchor set (with labels) and on the site's own stream (without). Evidence
without labels may stop or hold a candidate, never approve it: a pass needs anchor counts for every pattern that a guard
applies to. ``assess`` on stored evidence gives the stored verdict again. Bounds are one-sided 95 %.

Ceiling: Clopper-Pearson upper bound of the candidate's APCER per PAI species and pattern, and of its BPCER.
Non-inferiority: upper bound of the paired difference (worse - better) / n on the same anchor items: the Wald interval
with Bonett & Price's adjustment (J. Educ. Behav. Stat. 37, 2012; recommended by Fagerland et al., Stat. Med. 33, 2014):
unlike plain Wald it keeps a width without discordant items. A cell too small to show the margin even then
("under-resolved": n < 231 for 1 pp) is judged by what no discordant item would give at its n, or held.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from pipeline.metrics import BONA_FIDE, MIN_SPECIES, clopper_pearson, merge_small
from pipeline.types import Section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

REAL = "bona_fide"  # the row of a pattern whose errors are bona fide presentations called attack
ATTACKS = "all attacks"  # the sum of a pattern's species
Z95 = 1.6448536269514722
CLIP = 1e-6  # scores nearer to 0 or 1 have no larger margin

Call = Literal["pass", "fail", "hold"]


# None = not measured; NaN and infinity become None, so that JSON holds everything
Measured = Annotated[
    float | None, BeforeValidator(lambda v: None if isinstance(v, float) and not math.isfinite(v) else v)
]


class PatternLimit(Section):
    """Highest upper bounds of one missing-modality pattern."""

    apcer: float = Field(default=0.07, gt=0, le=1)
    bpcer: float = Field(default=0.15, gt=0, le=1)


class Ceiling(PatternLimit):
    """Guard ``ceiling``: bounds on the candidate alone. Default APCER: NIST SP 800-63A-4, IAPAR < 0.07."""

    advisory: bool = False
    apcer_target: float | None = Field(default=0.02, description="exceeding it is reported, never decisive")
    patterns: tuple[str, ...] = Field(default=(), description="patterns it applies to; empty = all")
    per_pattern: dict[str, PatternLimit] = Field(default={}, description="other limits for these patterns")


class NonInferiority(Section):
    """Guard ``noninferiority``: how much worse than the champion a candidate may be, in shares of presentations."""

    advisory: bool = False
    attacks: float = Field(default=0.005, gt=0, le=1, description="all attacks of a pattern together")
    worst_species: float = Field(default=0.01, gt=0, le=1)
    bona_fide: float = Field(default=0.01, gt=0, le=1)
    patterns: tuple[str, ...] = Field(default=(), description="patterns it applies to; empty = all")
    under_resolved: Literal["floor", "hold"] = Field(default="floor", description="cells too small for the margin")


class TrustRegion(Section):
    """Guard ``trust``: how far adaptation may move a site."""

    advisory: bool = False
    rho: float = Field(default=0.1, gt=0, description="|theta_c - theta_0| / |theta_0|")
    margin: float = Field(default=0.5, gt=0, description="fall of the mean attack margin of any species, logits")


class NoData(Section):
    """Guard ``no_data``: what is missing holds. It cannot be advisory."""

    n_min: int = Field(default=100, ge=0, description="samples of the stream behind a candidate")
    anchor_min: int = Field(default=30, ge=1, description="anchor presentations per species and pattern")
    stale_seconds: float = Field(default=86_400, gt=0)
    max_holds: int = Field(default=2, ge=0, description="more holds in a row than this abort")


class GuardsConfig(Section):
    """Section ``guards``."""

    ceiling: Ceiling = Ceiling()
    noninferiority: NonInferiority = NonInferiority()
    trust: TrustRegion = TrustRegion()
    no_data: NoData = NoData()


class Cell(Section):
    """Counts of one pattern and species on the anchor set; worse = candidate wrong where the champion is right."""

    pattern: str
    species: str  # REAL for bona fide
    n: int
    errors: int
    worse: int
    better: int


class Evidence(Section):
    """Everything ``assess`` looks at."""

    cells: tuple[Cell, ...]
    trust_ratio: Measured  # without labels
    margin_drop: Measured  # logits, worst species and pattern
    stream_n: int
    age_seconds: Measured  # of the newest stream sample or of the anchor replay, the older one
    finite: bool  # every score and state tensor
    holds_before: int = 0  # holds in a row before this one
    merged: tuple[str, ...] = ()  # species counted together as "other"
    labels: str = "anchor"  # where the attack labels come from


class Reason(Section):
    """One finding, decisive or not."""

    guard: str
    call: Call
    where: str  # pattern/species
    number: Measured
    limit: Measured
    text: str
    advisory: bool = False


class Verdict(Section):
    """What was decided and why."""

    outcome: Call
    reasons: tuple[Reason, ...]
    abort: bool = False  # too many holds in a row
    labels: str = "anchor"


def assess(limits: GuardsConfig, evidence: Evidence) -> Verdict:
    """The verdict on one candidate. fail before hold before pass; scores that are not finite can only hold."""
    reasons = list(_no_data(limits, evidence))
    if evidence.finite:
        reasons += _ceiling(limits, evidence.cells)
        reasons += _noninferiority(limits, evidence.cells)
        reasons += _trust(limits.trust, evidence)
    calls = {r.call for r in reasons if not r.advisory}
    outcome: Call = "fail" if "fail" in calls else "hold" if "hold" in calls else "pass"
    abort = outcome == "hold" and evidence.holds_before + 1 > limits.no_data.max_holds
    return Verdict(outcome=outcome, reasons=tuple(reasons), abort=abort, labels=evidence.labels)


def evidence_of(
    candidate: ArrayLike, stable: ArrayLike, label: ArrayLike, species: Sequence[str], patterns: Sequence[str],
    threshold: float, *, trust_ratio: float, stream_n: int, age_seconds: float, stable_threshold: float | None = None,
    stream_finite: bool = True, valid: ArrayLike | None = None, holds_before: int = 0, merge_below: int = MIN_SPECIES,
) -> Evidence:  # fmt: skip
    """Count the anchor scores [P, N] of candidate and champion; label and species are per anchor item [N].

    ``valid`` [P, N] leaves out items that a pattern cannot show. A score that is not finite clears ``finite``.
    """
    c, s = np.asarray(candidate, np.float64), np.asarray(stable, np.float64)
    y = np.ascontiguousarray(label, np.int8)
    if not c.shape == s.shape == (len(patterns), len(y)) or len(species) != len(y):
        want = f"[{len(patterns)} patterns, {len(y)} items] and one species per item"
        raise ValueError(f"anchor scores {c.shape} and {s.shape}, {len(species)} species: {want} are needed")
    ok = np.ones(c.shape, np.bool_) if valid is None else np.asarray(valid, np.bool_)
    names, member, merged = _groups(y.tobytes(), tuple(species), merge_below)
    good_c, good_s = np.isfinite(c), np.isfinite(s)
    wrong_c = ((c >= threshold) != (y == BONA_FIDE)) | ~good_c
    wrong_s = ((s >= (threshold if stable_threshold is None else stable_threshold)) != (y == BONA_FIDE)) | ~good_s
    flags = np.stack([ok, wrong_c & ok, wrong_c & ~wrong_s & ok, wrong_s & ~wrong_c & ok])
    n, errors, worse, better = np.rint(flags.astype(np.float64) @ member).astype(int).tolist()  # each [P][species]
    finite = bool(stream_finite and (good_c & good_s | ~ok).all())
    return Evidence(
        cells=tuple(Cell(pattern=p, species=j, n=n[i][k], errors=errors[i][k], worse=worse[i][k], better=better[i][k])
                    for i, p in enumerate(patterns) for k, j in enumerate(names) if n[i][k]),
        trust_ratio=float(trust_ratio), margin_drop=_margin_drop(c, s, ok, member[:, 1:]) if finite else None,
        stream_n=int(stream_n), age_seconds=float(age_seconds), finite=finite, holds_before=holds_before, merged=merged,
    )  # fmt: skip


@lru_cache(maxsize=8)  # the anchor set is the same for all candidates of a shard
def _groups(label: bytes, species: tuple[str, ...], merge_below: int) -> tuple[list[str], Floats, tuple[str, ...]]:
    y = np.frombuffer(label, np.int8)
    merged_names, merged = merge_small(species, y, merge_below)
    attacks = [str(a) for a in np.unique(merged_names[y != BONA_FIDE])]
    columns = [y == BONA_FIDE] + [(merged_names == a) & (y != BONA_FIDE) for a in attacks]
    return [REAL, *attacks], np.stack(columns, axis=1).astype(np.float64), merged


def _margin_drop(c: Floats, s: Floats, ok: NDArray[np.bool_], member: Floats) -> float | None:
    """Largest rise of the mean attack logit over species and patterns; the threshold cancels out."""
    c, s = np.clip(c, CLIP, 1 - CLIP), np.clip(s, CLIP, 1 - CLIP)
    rise = np.where(ok, np.log(c * (1 - s) / ((1 - c) * s)), 0.0)
    n = ok.astype(np.float64) @ member
    return float(((rise @ member)[n > 0] / n[n > 0]).max()) if (n > 0).any() else None


def _no_data(limits: GuardsConfig, e: Evidence) -> Iterator[Reason]:
    rule = limits.no_data
    if not e.finite:
        yield _hold("stream", None, None, "a score or a state tensor is not finite; nothing else was judged")
    if e.stream_n < rule.n_min:
        yield _hold("stream", e.stream_n, rule.n_min, f"{e.stream_n} stream samples, at least {rule.n_min} are needed")
    if e.age_seconds is None or e.age_seconds > rule.stale_seconds:
        old = "unknown" if e.age_seconds is None else f"{e.age_seconds:.0f} s"
        text = f"age of the evidence: {old}, at most {rule.stale_seconds:.0f} s are allowed"
        yield _hold("stream", e.age_seconds, rule.stale_seconds, text)
    have = {(c.pattern, c.species == REAL) for c in e.cells if c.n}
    decisive = [g.patterns for g in (limits.ceiling, limits.noninferiority) if not g.advisory]
    wanted = {p: None for patterns in decisive for p in patterns}
    if not decisive or not all(decisive):
        wanted |= {c.pattern: None for c in e.cells}
    for pattern in wanted or ["anchor"]:
        for real, what in ((False, "attacks"), (True, "bona fide presentations")):
            if (pattern, real) not in have:
                yield _hold(pattern, 0, rule.anchor_min, f"no anchor {what} were replayed under pattern {pattern}")
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
    own = [rule.per_pattern.get(c.pattern, rule) for c in cells]
    limit = np.array([o.bpcer if c.species == REAL else o.apcer for o, c in zip(own, cells)], np.float64)
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
    rows = [(c.pattern, c.species, c.n, c.worse, c.better) for c in all_cells
            if c.n and (not rule.patterns or c.pattern in rule.patterns)]  # fmt: skip
    for pattern in dict.fromkeys(r[0] for r in rows):
        own = [r[2:] for r in rows if r[0] == pattern and r[1] != REAL]
        if own:
            rows.append((pattern, ATTACKS, sum(r[0] for r in own), sum(r[1] for r in own), sum(r[2] for r in own)))
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
    guard: str, advisory: bool, where: list[str], number: Floats, limit: Floats, call: NDArray[np.str_],
    text: Callable[[int], str],
) -> Iterator[Reason]:  # fmt: skip
    """Every fail and hold, and the pass that is nearest to its limit; texts are made only for these."""
    shown = np.flatnonzero((call == "fail") | (call == "hold")).tolist()
    passed = np.flatnonzero(call == "pass")
    if len(passed):
        shown.append(int(passed[np.argmax(number[passed] / limit[passed])]))
    for i in shown:
        yield Reason(guard=guard, call=call[i].item(), where=where[i], number=float(number[i]), limit=float(limit[i]),
                     text=text(i), advisory=advisory)  # fmt: skip


def paired_upper95(worse: Floats, better: Floats, n: Floats) -> Floats:
    """One-sided upper 95 % bound of (worse - better) / n of paired calls, Wald with Bonett & Price's adjustment."""
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
            guard="trust", call=call, where=where, number=number, limit=limit, text=text, advisory=rule.advisory
        )
