"""Judges a candidate by the site's own labelled presentations: guard ``presentations``.

Those that judge never taught. A candidate that errs on more of them than its champion fails by a one-sided
sign test (the exact test of McNemar, 1947); few labels resolve little, and the anchor set decides as before.
Labels whose two classes the source model ranks the other way round look reversed: a careless installer, or an
attack.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

from pipeline.guards.records import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.guards.limits import GuardsConfig, Presentations
    from pipeline.guards.records import Evidence, Labelled


def labelled(limits: GuardsConfig, evidence: Evidence) -> Iterator[Reason]:
    """Yields the findings; none for a site without labelled presentations."""
    if evidence.labelled is not None:
        yield from _reversed(limits.presentations, evidence.labelled)
        yield from _judged(limits.presentations, evidence.labelled)


def enough(limits: GuardsConfig, evidence: Evidence) -> bool:
    """Returns whether as many of a class judged as the guard asks: then a stream is not needed besides."""
    e = evidence.labelled
    return e is not None and max(e.bona_fide.n, e.attack.n) >= limits.presentations.minimum


def sign_test(worse: int, better: int) -> float:
    """Returns P(at least ``worse`` of the ``worse + better`` pairs) if both were as likely."""
    n = worse + better
    return sum(comb(n, k) for k in range(worse, n + 1)) / 2**n


def _reversed(rule: Presentations, e: Labelled) -> Iterator[Reason]:
    """By ranks: a shift of the site moves both classes past the boundary, and seldom past each other."""
    if e.ranked is None or min(e.taught_bona_fide, e.taught_attack) < rule.minimum:
        return
    share = 1 - e.ranked
    text = (
        f"the source model ranks {share:.0%} of the pairs of {e.taught_bona_fide} bona fide and "
        f"{e.taught_attack} attacks that teach the other way round"
    )
    looks = share >= rule.reversed
    yield Reason(
        guard="presentations",
        call="fail" if looks else "pass",
        where="taught",
        number=share,
        limit=rule.reversed,
        text=f"labels look reversed: {text}" if looks else text,
        advisory=rule.advisory,
    )


def _judged(rule: Presentations, e: Labelled) -> Iterator[Reason]:
    for where, j in (("bona_fide", e.bona_fide), ("attack", e.attack)):
        if j.n < rule.minimum:
            continue
        chance = sign_test(j.worse, j.better)
        name = "bona fide" if where == "bona_fide" else "attacks"
        yield Reason(
            guard="presentations",
            call="fail" if j.worse > j.better and chance <= rule.alpha else "pass",
            where=where,
            number=chance,
            limit=rule.alpha,
            text=f"errors on {j.n} labelled {name} that judge: {j.errors_before} before, {j.errors} now "
            f"({j.worse} worse, {j.better} better)",
            advisory=rule.advisory,
        )
