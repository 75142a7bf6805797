"""``palisade guard simulate``: judges the evidence of recorded cycles by another policy, beside the record.

The candidates are those on record: had the policy decided otherwise, a site would have gone on from another
state, which is not known. Holds in a row are counted along the policy's own decisions. Where sealed labels
are known, a candidate's true rates on its window are compared with the ceiling of the present configuration,
for both sides.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.guard.simulate_table import show
from jobs.terminal import Exit
from pipeline.control.deployment import open_ledger
from pipeline.control.recheck import cycle_verdicts
from pipeline.control.scoring import join_labels, site_labels
from pipeline.data.blobs import BadBlob
from pipeline.guards.verdict import assess
from pipeline.ledger import LedgerError
from pipeline.stats import metrics
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.guards import Ceiling, Evidence, GuardsConfig, Verdict
    from pipeline.ledger import Ledger, VerdictRow

KINDS = ("cycle", "adapt")
FORMATS = (".parquet", ".json")
LABELLED = 10  # presentations of a class or species that its rate needs at least
SIDES = ("recorded", "policy")


class Rates(NamedTuple):
    """A candidate's true rates on its window, by sealed labels; None below LABELLED presentations."""

    apcer: float | None  # of the worst species
    bpcer: float | None

    def over(self, ceiling: Ceiling) -> bool | None:
        """Returns True if a rate is over the ceiling, False if both are under it, None if unknown."""
        limit = ceiling.per_pattern.get("full", ceiling)
        rates = [(self.apcer, limit.apcer), (self.bpcer, limit.bpcer)]
        if any(rate is not None and rate > highest for rate, highest in rates):
            return True
        return None if None in (self.apcer, self.bpcer) else False


@dataclass(frozen=True)
class Decision:
    """One verdict on record and what the policy says on the same evidence."""

    site: str
    cycle: str
    verdict: str
    samples: int
    at: datetime  # when it was judged
    recorded: str  # pass, hold or fail
    policy: str
    reason: str  # the policy's finding that decided
    over: bool | None  # the candidate's true rates were over the ceiling; None = not known
    apcer: float | None = None
    bpcer: float | None = None
    until: datetime | None = None  # when the window's newest sample was captured, where that is known


class Lag(NamedTuple):
    """Distance from the first cycle with a candidate over the ceiling to the first that stopped one."""

    cycles: int | None  # None: it never was
    samples: int
    hours: float


class Share(NamedTuple):
    """k of n with a two-sided 95 % Clopper-Pearson interval."""

    k: int
    n: int
    low: float
    high: float


def simulate(
    config: Config, policy: GuardsConfig, terminal: Terminal, *, sites: Sequence[str], out: Path | None
) -> int:
    """Judges the recorded evidence of ``sites`` (default: all) by ``policy`` and shows both decisions."""
    if out and out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: allowed are files that end in {' or '.join(FORMATS)}")
    ledger = open_ledger(config, create=False)
    for site in sites:
        ledger.streams.site(site)
    decisions = _decided(config, ledger, policy, terminal, sites)
    result = {
        "changed": changed(config.guards.model_dump(mode="json"), policy.model_dump(mode="json")),
        "verdicts": len(decisions),
        **{side: tally(decisions, side) for side in SIDES},
        "looser": [d.verdict for d in decisions if looser(d)],
        "sites": summaries(decisions),
    }
    if out:
        _write(out, result, decisions)
    show(terminal, result)
    if not decisions:
        return Exit.HOLD
    return Exit.GUARD_FAILED if result["looser"] else Exit.DONE


def judge_again(policy: GuardsConfig, evidence: Evidence, holds: int) -> Verdict:
    """The policy's verdict after ``holds`` holds of its of_site in a row."""
    return assess(policy, evidence.model_copy(update={"holds_before": holds}))


def looser(d: Decision) -> bool:
    """Returns True if the policy passes a candidate that the record stopped or held."""
    return d.recorded != "pass" and d.policy == "pass"


def lag(decisions: Sequence[Decision], side: str) -> Lag | None:
    """Returns how late ``side`` stopped a site's candidates over the ceiling; None if none was over.

    ``decisions`` are those of one site, in order.
    """
    first = next((i for i, d in enumerate(decisions) if d.over), None)
    if first is None:
        return None
    stop = next((i for i, d in enumerate(decisions) if i >= first and getattr(d, side) != "pass"), None)
    last = len(decisions) - 1 if stop is None else stop
    passed = decisions[first + 1 : last + 1]
    a, b = decisions[first], decisions[last]
    hours = ((b.until - a.until) if a.until and b.until else (b.at - a.at)).total_seconds() / 3600
    return Lag(None if stop is None else stop - first, sum(d.samples for d in passed), hours)


def tally(decisions: Sequence[Decision], side: str) -> dict[str, object]:
    """Returns the decisions of ``side``, those that were wrong by the sealed labels, and the median lag."""
    calls = [getattr(d, side) for d in decisions]
    over = [s for d, s in zip(decisions, calls, strict=True) if d.over]
    fine = [s for d, s in zip(decisions, calls, strict=True) if d.over is False]
    late = [x for of_site in by_site(decisions).values() if (x := lag(of_site, side))]
    stopped = [x for x in late if x.cycles is not None]
    middle = {n: float(np.median([getattr(x, n) for x in stopped])) if stopped else None for n in Lag._fields}
    return {
        **{call: calls.count(call) for call in ("pass", "hold", "fail")},
        "passed_over": share(over.count("pass"), len(over))._asdict(),
        "false_stops": share(fine.count("fail"), len(fine))._asdict(),
        "false_holds": share(fine.count("hold"), len(fine))._asdict(),
        "sites_over": len(late),
        "sites_never_stopped": len(late) - len(stopped),
        "median_lag": middle,
    }


def share(k: int, n: int) -> Share:
    """Returns k of n with its interval."""
    low, high = metrics.clopper_pearson(k, n, confidence=0.975)
    return Share(k, n, float(low), float(high))


def by_site(decisions: Sequence[Decision]) -> dict[str, list[Decision]]:
    """Returns each site's decisions, in order."""
    groups: dict[str, list[Decision]] = {}
    for d in decisions:
        groups.setdefault(d.site, []).append(d)
    return groups


def summaries(decisions: Sequence[Decision]) -> list[dict[str, object]]:
    """Returns a line for each site that differs or was over the ceiling, loosened sites first."""
    lines: list[dict[str, object]] = []
    for site, of_site in by_site(decisions).items():
        differ = [d for d in of_site if d.recorded != d.policy]
        late = {side: lag(of_site, side) for side in SIDES}
        if differ or late["policy"]:
            why = next((d.reason for d in reversed(differ) if d.policy != "pass"), "")
            lags = {f"{side}_lag": None if x is None else x._asdict() for side, x in late.items()}
            lines.append(
                {
                    "site": site,
                    **{side: [getattr(d, side) for d in of_site] for side in SIDES},
                    "over": [d.over for d in of_site],
                    **lags,
                    "looser": sum(map(looser, of_site)),
                    "differ": len(differ),
                    "reason": why,
                }
            )
    return sorted(lines, key=lambda s: (-cast("int", s["looser"]), -cast("int", s["differ"]), str(s["site"])))


def changed(
    now: Mapping[str, object], then: Mapping[str, object], prefix: str = "guards"
) -> dict[str, list[object]]:
    """Returns [now, policy] of the limits that differ, by section.key."""
    limits: dict[str, list[object]] = {}
    for key in {**now, **then}:
        a, b = now.get(key), then.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            limits |= changed(a, b, f"{prefix}.{key}")
        elif a != b:
            limits[f"{prefix}.{key}"] = [a, b]
    return limits


def _decided(
    config: Config, ledger: Ledger, policy: GuardsConfig, terminal: Terminal, sites: Sequence[str]
) -> list[Decision]:
    cycles = [c.id for c in reversed(ledger.cycles.history(kinds=KINDS))]
    total = sum(len(ledger.verdicts.outcomes(c)) for c in cycles) if not sites else 0
    holds: dict[str, int] = {}
    decisions: list[Decision] = []
    with terminal.progress("simulate", "verdicts") as advance:
        for row in _rows(ledger, cycles, sites):
            try:
                verdict = judge_again(policy, row.evidence, holds.get(row.site, 0))
            except ValueError:
                raise LedgerError(
                    f"verdict {row.id}: its evidence cannot be read; see `palisade guard recheck --all`"
                ) from None
            holds[row.site] = holds.get(row.site, 0) + 1 if verdict.outcome == "hold" else 0
            decision = Decision(
                row.site,
                row.cycle,
                row.id,
                row.window.samples,
                row.at,
                row.outcome,
                verdict.outcome,
                "" if verdict.outcome == "pass" else verdict.decisive,
                None,
            )
            decisions.append(_with_truth(config, ledger, row, decision))
            advance(len(decisions), max(total, len(decisions)))
    return decisions


def _rows(ledger: Ledger, cycles: Sequence[str], sites: Sequence[str]) -> Iterator[VerdictRow]:
    """Yields each site's verdicts in the order of its cycles."""
    for site in dict.fromkeys(sites):
        yield from (v for v in ledger.verdicts.find(site=site) if v.cycle in cycles)
    for cycle in () if sites else cycles:
        yield from cycle_verdicts(ledger, cycle)


def _with_truth(config: Config, ledger: Ledger, row: VerdictRow, decision: Decision) -> Decision:
    """Returns ``decision`` with the true rates, if sealed labels and the window are still stored."""
    if row.state is None or not site_labels(config.data.sealed, row.site):
        return decision
    state = ledger.verdicts.state(row.state)
    source = ledger.sources.get(state.source_version if state else None)
    try:
        window = join_labels(config, source, [row])
    except (BadBlob, OSError, KeyError):  # its outcomes or features are older than what gc keeps
        return decision
    if window is None:
        return decision
    labelled = window.label >= 0
    threshold = source.manifest.threshold
    rates = true_rates(window.after[labelled], window.label[labelled], window.pai[labelled], threshold)
    until = window.captured_at.max().item().replace(tzinfo=row.at.tzinfo)
    return replace(
        decision, over=rates.over(config.guards.ceiling), apcer=rates.apcer, bpcer=rates.bpcer, until=until
    )


def true_rates(score: np.ndarray, label: np.ndarray, pai: np.ndarray, threshold: float) -> Rates:
    """Returns the rates of labelled samples; species of fewer than LABELLED presentations count together."""
    names, _ = metrics.merge_small(pai, label, LABELLED)
    attacks = [
        r.rate for r in metrics.apcer_by_species(score, label, names, threshold).values() if r.n >= LABELLED
    ]
    real = metrics.bpcer(score, label, threshold)
    return Rates(max(attacks, default=None), real.rate if real.n >= LABELLED else None)


def _write(path: Path, result: Mapping[str, object], decisions: Sequence[Decision]) -> None:
    """Writes everything as JSON, or a table with a row per decision."""
    rows = [
        {**asdict(d), "at": d.at.isoformat(), "until": d.until and d.until.isoformat()} for d in decisions
    ]
    if path.suffix == ".json":
        text = json.dumps({**result, "decisions": rows}, allow_nan=False, indent=1)
        write_atomic(path, lambda tmp: tmp.write_text(text))
        return
    text, real = pa.string(), pa.float64()
    kinds = {"samples": pa.int64(), "over": pa.bool_(), "apcer": real, "bpcer": real}
    schema = pa.schema([(name, kinds.get(name, text)) for name in Decision.__dataclass_fields__])
    write_atomic(path, lambda tmp: pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp))
