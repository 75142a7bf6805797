"""May a candidate serve? Pure rules over counted evidence; this file holds the section ``guards``.

Evidence is what was counted on the sealed anchor set (with labels) and on the site's own stream (without). Evidence without
labels may stop or hold a candidate, never approve it: a pass needs anchor counts for every pattern that a guard applies to.
``assess`` on stored evidence gives the stored verdict again. Bounds are one-sided 95 % throughout.

Ceiling: Clopper-Pearson upper bound of the candidate's APCER per PAI species and pattern, and of its BPCER.
Non-inferiority: upper bound of the paired difference (worse - better) / n on the same anchor items, by the Wald interval with
the adjustment of Bonett & Price (J. Educ. Behav. Stat. 37, 2012), which Fagerland et al. (Stat. Med. 33, 2014) recommend: it
does not shrink to width 0 without discordant items, as plain Wald does. Cells too small to show the margin even then
("under-resolved", n < 231 for 1 pp) are judged by what zero discordant items would give at their n, or held.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field

from pipeline.metrics import BONA_FIDE, MIN_SPECIES, clopper_pearson, merge_small
from pipeline.types import Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

REAL = "bona_fide"  # the row of a pattern whose errors are bona fide presentations called attack
Z95 = 1.6448536269514722
CLIP = 1e-6  # scores nearer to 0 or 1 have no larger margin

Call = Literal["pass", "fail", "hold"]


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[float | None, BeforeValidator(_finite)]  # None = not measured; NaN and infinity become None


class PatternLimit(Section):
    """Ceilings of one missing-modality pattern."""

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


class _Table(NamedTuple):
    """Cells as arrays [cells]."""

    cells: tuple[Cell, ...]
    n: Floats
    errors: Floats
    worse: Floats
    better: Floats


def assess(limits: GuardsConfig, evidence: Evidence) -> Verdict:
    """The verdict on one candidate. fail before hold before pass; scores that are not finite can only hold."""
    reasons = list(_no_data(limits, evidence))
    if evidence.finite:
        t = _table(evidence.cells)
        reasons += _ceiling(limits, t)
        reasons += _noninferiority(limits, t)
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

    ``valid`` [P, N] leaves out items that a pattern cannot show. A score that is not finite is an error and clears ``finite``.
    """
    c, s = np.asarray(candidate, np.float64), np.asarray(stable, np.float64)
    y = np.ascontiguousarray(label, np.int8)
    if not c.shape == s.shape == (len(patterns), len(y)) or len(species) != len(y):
        raise ValueError(f"anchor scores {c.shape} and {s.shape} must be [{len(patterns)} patterns, {len(y)} items], "
                         f"with one species per item ({len(species)} given)")  # fmt: skip
    ok = np.ones(c.shape, np.bool_) if valid is None else np.asarray(valid, np.bool_)
    names, member, merged = _groups(y.tobytes(), tuple(species), merge_below)
    good_c, good_s = np.isfinite(c), np.isfinite(s)
    wrong_c = ((c >= threshold) != (y == BONA_FIDE)) | ~good_c
    wrong_s = ((s >= (threshold if stable_threshold is None else stable_threshold)) != (y == BONA_FIDE)) | ~good_s
    flags = np.stack([ok, wrong_c & ok, wrong_c & ~wrong_s & ok, wrong_s & ~wrong_c & ok])
    counts = np.rint(flags.astype(np.float64) @ member).astype(int).tolist()  # [4][P][species]
    finite = bool(stream_finite and (good_c & good_s | ~ok).all())
    return Evidence(
        cells=tuple(
            Cell(pattern=p, species=j, n=counts[0][i][k], errors=counts[1][i][k], worse=counts[2][i][k],
                 better=counts[3][i][k])
            for i, p in enumerate(patterns) for k, j in enumerate(names) if counts[0][i][k]
        ),
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
    if e.age_seconds is None:
        yield _hold("stream", None, rule.stale_seconds, "the age of the evidence is not known")
    elif e.age_seconds > rule.stale_seconds:
        yield _hold("stream", e.age_seconds, rule.stale_seconds,
                    f"evidence is {e.age_seconds:.0f} s old, at most {rule.stale_seconds:.0f} s are allowed")  # fmt: skip
    have = {(c.pattern, c.species == REAL) for c in e.cells if c.n}
    found = list(dict.fromkeys(c.pattern for c in e.cells))
    decisive = [g.patterns for g in (limits.ceiling, limits.noninferiority) if not g.advisory]
    wanted = list(dict.fromkeys(p for g in decisive for p in g)) if decisive and all(decisive) else found
    for pattern in wanted or ["anchor"]:
        for real, what in ((False, "attacks"), (True, "bona fide presentations")):
            if (pattern, real) not in have:
                yield _hold(pattern, 0, rule.anchor_min, f"no anchor {what} were replayed under pattern {pattern}")
    for c in e.cells:
        if c.n < rule.anchor_min and c.pattern in wanted:
            yield _hold(f"{c.pattern}/{c.species}", c.n, rule.anchor_min,
                        f"{c.n} anchor presentations of {c.species}, at least {rule.anchor_min} are needed")  # fmt: skip


def _hold(where: str, number: float | None, limit: float | None, text: str) -> Reason:
    return Reason(guard="no_data", call="hold", where=where, number=number, limit=limit, text=text)


def _table(cells: tuple[Cell, ...]) -> _Table:
    n, errors, worse, better = (
        np.array([(c.n, c.errors, c.worse, c.better) for c in cells], np.float64).reshape(-1, 4).T
    )
    return _Table(cells, n, errors, worse, better)


def _ceiling(limits: GuardsConfig, t: _Table) -> Iterator[Reason]:
    rule = limits.ceiling
    lower, upper = clopper_pearson(t.errors, t.n)
    best: tuple[float, Reason] | None = None
    for i, c in enumerate(t.cells):
        if rule.patterns and c.pattern not in rule.patterns:
            continue
        own = rule.per_pattern.get(c.pattern, rule)
        limit, name = (own.bpcer, "BPCER") if c.species == REAL else (own.apcer, "APCER")
        if c.n < limits.no_data.anchor_min and lower[i] <= limit:
            continue  # no_data holds it
        call: Call = "fail" if upper[i] > limit else "pass"
        text = (
            f"{name} of {c.species} under {c.pattern}: {c.errors} of {c.n}, upper95 {upper[i]:.2%}, limit {limit:.2%}"
        )
        reason = Reason(guard="ceiling", call=call, where=f"{c.pattern}/{c.species}", number=float(upper[i]), limit=limit,
                        text=text, advisory=rule.advisory)  # fmt: skip
        if call == "fail":
            yield reason
        elif best is None or upper[i] / limit > best[0]:
            best = (upper[i] / limit, reason)
        if name == "APCER" and rule.apcer_target is not None and rule.apcer_target < upper[i] <= limit:
            yield reason.model_copy(update={"call": "hold", "advisory": True, "limit": rule.apcer_target,
                                            "text": f"{text}, target {rule.apcer_target:.2%}"})  # fmt: skip
    if best:
        yield best[1]


def _noninferiority(limits: GuardsConfig, t: _Table) -> Iterator[Reason]:
    rule = limits.noninferiority
    rows = [(c.pattern, c.species, c.n, c.worse, c.better) for c in t.cells]
    for pattern in dict.fromkeys(c.pattern for c in t.cells):
        pooled = np.array([c.species != REAL and c.pattern == pattern for c in t.cells])
        rows.append((pattern, "all attacks", *(int(v[pooled].sum()) for v in (t.n, t.worse, t.better))))
    rows = [r for r in rows if r[2] and (not rule.patterns or r[0] in rule.patterns)]
    n, worse, better = np.array([r[2:] for r in rows], np.float64).reshape(-1, 3).T
    upper, floor = paired_upper95(worse, better, n), paired_upper95(0 * n, 0 * n, n)
    best: tuple[float, Reason] | None = None
    for i, (pattern, species, count, w, b) in enumerate(rows):
        margin = {REAL: rule.bona_fide, "all attacks": rule.attacks}.get(species, rule.worst_species)
        limit = max(margin, float(floor[i]))
        call: Call = "fail" if upper[i] > limit + 1e-12 else "pass"
        text = (
            f"{species} under {pattern}: {w} worse, {b} better of {count}, upper95 {upper[i]:+.2%}, margin {margin:.2%}"
        )
        if limit > margin:
            text += f"; {count} items resolve {limit:.2%} only"
            call = "hold" if call == "pass" and rule.under_resolved == "hold" else call
        reason = Reason(guard="noninferiority", call=call, where=f"{pattern}/{species}", number=float(upper[i]),
                        limit=limit, text=text, advisory=rule.advisory)  # fmt: skip
        if call != "pass":
            yield reason
        elif best is None or upper[i] / limit > best[0]:
            best = (upper[i] / limit, reason)
    if best:
        yield best[1]


def paired_upper95(worse: Floats, better: Floats, n: Floats) -> Floats:
    """One-sided upper 95 % bound of (worse - better) / n of paired calls, Wald with Bonett & Price's adjustment."""
    p, q, m = (worse + 1) / (n + 2), (better + 1) / (n + 2), n + 2
    return np.minimum(p - q + Z95 * np.sqrt((p + q - (p - q) ** 2) / m), 1.0)


def _trust(rule: TrustRegion, e: Evidence) -> Iterator[Reason]:
    measured = (
        ("state", e.trust_ratio, rule.rho, "distance from the source state over its norm"),
        ("anchor", e.margin_drop, rule.margin, "fall of the attack margin in logits"),
    )
    for where, number, limit, what in measured:
        if number is None:
            yield Reason(guard="trust", call="hold", where=where, number=None, limit=limit,
                         text=f"{what} was not measured", advisory=rule.advisory)  # fmt: skip
            continue
        call: Call = "fail" if number > limit else "pass"
        yield Reason(guard="trust", call=call, where=where, number=number, limit=limit,
                     text=f"{what}: {number:.3f}, limit {limit:.3f}", advisory=rule.advisory)  # fmt: skip
