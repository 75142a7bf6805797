"""``palisade guard explain``: a site's newest verdict, its evidence, and the changes that would pass."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from jobs.terminal import Exit, table
from pipeline.control.deployment import open_ledger
from pipeline.control.recheck import find_verdict, limits_of, verdict_basis
from pipeline.guards import ATTACKS, REAL, GuardsConfig
from pipeline.guards.verdict import paired_upper95
from pipeline.ledger import VerdictRow
from pipeline.stats.metrics import clopper_pearson

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.control.recheck import StoredLimits
    from pipeline.guards import Evidence, Reason, Verdict
    from pipeline.ledger import Ledger, SourceVerdictRow

ORDER = {"fail": 0, "hold": 1, "pass": 2}
SHARES = ("ceiling", "noninferiority")  # their numbers are shares of presentations
LABELS = {"anchor": "the sealed anchor set; labels of the stream were not used"}
REMEDIES = 8  # lines on changes that would give a pass


def explain(config: Config, terminal: Terminal, *, what: str) -> int:
    """Shows every finding, the decisive one first, the evidence, and the changes that would give a pass."""
    ledger = open_ledger(config, create=False)
    row = find_verdict(ledger, what)
    verdict, evidence, limits = row.verdict, row.evidence, limits_of(ledger, row)
    findings = decisive_first(verdict)
    rests = _rests_on(ledger, row, evidence, limits)
    change = changes(verdict, limits.guards, evidence)
    aborts = " Too many holds in a row: the candidate is given up." if verdict.abort else ""
    terminal.result(
        {
            "site": row.site if isinstance(row, VerdictRow) else None,
            "verdict": row.id,
            "outcome": verdict.outcome,
            "abort": verdict.abort,
            "findings": [r.model_dump(mode="json") for r in findings],
            "evidence": dict(rests),
            "to_pass": change,
        },
        f"{row.subject}: {_sentence(verdict)}{aborts}",
        table(
            f"findings of verdict {row.id}",
            ["guard", "where", "number", "limit", "call", "advisory"],
            [
                [
                    r.guard,
                    r.where,
                    _number(r, r.number),
                    _number(r, r.limit),
                    r.call,
                    "advisory" if r.advisory else "",
                ]
                for r in findings
            ],
        ),
        table("what it rests on", ["", ""], rests),
        *change,
        f"the same again from the stored evidence: palisade guard recheck {row.id}",
    )
    return Exit.DONE


def decisive_first(verdict: Verdict) -> list[Reason]:
    """Returns the findings: the decisive ones, then the others, then the advisory ones."""
    return sorted(verdict.reasons, key=lambda r: (r.advisory, r.call != verdict.outcome, ORDER[r.call]))


def changes(verdict: Verdict, limits: GuardsConfig, evidence: Evidence) -> list[str]:
    """Returns the changes that would give a pass, the nearest limit first; for a pass, its nearest limit."""
    if verdict.outcome == "pass":
        near = [r for r in verdict.reasons if not r.advisory and r.number is not None and r.limit]
        if not near:
            return []
        r = max(near, key=lambda r: (r.number or 0) / (r.limit or 1))
        return [f"nearest to a limit: {r.guard} {r.where}: {_number(r, r.number)} of {_number(r, r.limit)}"]
    against = [r for r in verdict.reasons if not r.advisory and r.call != "pass"]
    against.sort(key=_distance)
    remedies = [f"to pass: {_remedy(r, limits, evidence)}" for r in against[:REMEDIES]]
    more = [f"and {len(against) - REMEDIES} more findings"] if len(against) > REMEDIES else []
    return remedies + more


def _sentence(verdict: Verdict) -> str:
    aside = sum(r.advisory and r.call != "pass" for r in verdict.reasons)
    return {
        "pass": "the candidate may serve: no guard that decides objects"
        + (f", {aside} advisory findings do" if aside else ""),
        "fail": f"the candidate may not serve. {verdict.decisive}",
        "hold": f"not decided, so the site keeps what it serves. {verdict.decisive}",
    }[verdict.outcome] + "."


def _rests_on(
    ledger: Ledger, row: VerdictRow | SourceVerdictRow, evidence: Evidence, limits: StoredLimits
) -> list[tuple[str, str]]:
    """Returns what the verdict was based on, as (name, text)."""
    merged = f"counted together as other: {', '.join(evidence.merged)}"
    changed = "" if limits.sound else ", CHANGED since the cycle began"
    of_site = isinstance(row, VerdictRow)
    return [
        *(_site_basis(ledger, row, evidence) if of_site else _source_basis(row, evidence)),
        *([("merged", merged)] if evidence.merged else []),
        (
            "limits",
            f"configuration {limits.fingerprint[:12]}{changed}" if of_site else "stored with the verdict",
        ),
        ("evidence", f"sha256 {hashlib.sha256(row.evidence_json.encode()).hexdigest()}"),
    ]


def _site_basis(ledger: Ledger, row: VerdictRow, evidence: Evidence) -> list[tuple[str, str]]:
    basis, window = verdict_basis(ledger, row), row.window
    by_time = "" if basis.recorded else " (by time)"
    champion = (
        f"state {basis.champion_state}"
        if basis.champion_state
        else f"source v{basis.source.version} as it is"
    )
    age = "unknown" if evidence.age_seconds is None else f"{evidence.age_seconds:.0f} s"
    sessions = "?" if window.sessions is None else window.sessions
    size = f"{window.samples} samples of {sessions} sessions, {age} old"
    when = f"{row.at:%Y-%m-%d %H:%M:%S} UTC in {row.cycle}, holds before it: {evidence.holds_before}"
    return [
        ("verdict", f"{row.outcome} at {when}"),
        ("candidate", f"state {row.state}" if row.state else "none: the window was empty"),
        ("champion", champion + by_time),
        ("window", f"offsets {row.offset_from}–{row.offset_to}, {size}"),
        ("labels", LABELS.get(evidence.labels, evidence.labels)),
        ("anchor set", f"{basis.anchor[:12]}{by_time}, {_presentations(evidence)}"),
    ]


def _source_basis(row: SourceVerdictRow, evidence: Evidence) -> list[tuple[str, str]]:
    return [
        ("verdict", f"{row.outcome} at {row.at:%Y-%m-%d %H:%M:%S} UTC"),
        ("candidate", f"source v{row.version} as it is"),
        ("labels", LABELS.get(evidence.labels, evidence.labels)),
        ("anchor set", f"the samples that both source models have, {_presentations(evidence)}"),
    ]


def _presentations(evidence: Evidence) -> str:
    return f"{sum(c.n for c in evidence.cells)} presentations over all patterns"


def _number(r: Reason, x: float | None) -> str:
    if x is None:
        return "not known"
    return f"{x:.2%}" if r.guard in SHARES else f"{x:.4g}" if abs(x) < 1e4 else f"{x:.0f}"


def _distance(r: Reason) -> float:
    if r.number is None or not r.limit:
        return float("inf")
    return abs(r.number - r.limit) / abs(r.limit)


def _remedy(r: Reason, limits: GuardsConfig, evidence: Evidence) -> str:
    """Returns the change that would turn a finding into a pass."""
    pattern, _, species = r.where.partition("/")
    cells = [
        c
        for c in evidence.cells
        if c.pattern == pattern and (c.species != REAL if species == ATTACKS else c.species == species)
    ]
    n, head = sum(c.n for c in cells), f"{r.guard} {r.where}"
    if r.guard == "ceiling" and r.limit is not None and cells:
        _, upper = clopper_pearson(np.arange(n + 1), np.full(n + 1, n))
        return f"{head}: {_at_most(upper, r.limit, sum(c.errors for c in cells), n, 'errors')}"
    if r.guard == "noninferiority" and r.limit is not None and cells:
        worse, better = sum(c.worse for c in cells), sum(c.better for c in cells)
        if r.call == "hold":
            few = f"{n} anchor presentations are too few for the margin"
            return f"{head}: {few}; add to data.anchor and seal it anew"
        upper = paired_upper95(np.arange(n + 1.0), np.full(n + 1, float(better)), np.full(n + 1, float(n)))
        return (
            f"{head}: {_at_most(upper, r.limit + 1e-12, worse, n, 'presentations worse than the champion')}"
        )
    if r.guard == "no_data" and species and r.limit is not None:
        need = f"at least {r.limit:.0f} anchor presentations (there are {n})"
        return f"{head}: {need}; add to data.anchor and run `palisade anchor seal`"
    if r.guard == "no_data" and r.number is not None and r.limit is not None and r.number < r.limit:
        need = f"a window of at least {r.limit:.0f} instead of {r.number:.0f}"
        return f"{head}: {need}; the next cycle brings another"
    if r.number is None:
        return f"{head}: {r.text}"
    return f"{head}: from {_number(r, r.number)} to {_number(r, r.limit)}; {r.text}"


def _at_most(upper: np.ndarray, limit: float, now: int, n: int, what: str) -> str:
    """Returns how many of ``n`` the limit allows; ``upper`` [n + 1] is the upper bound of each count."""
    fit = np.flatnonzero(upper <= limit)
    if not len(fit):
        return f"no count of {n} can show it; more anchor presentations are needed"
    return f"at most {int(fit.max())} {what} of {n} instead of {now}"
