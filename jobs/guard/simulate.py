"""``palisade guard simulate``: another policy on the stored evidence of recorded cycles, beside what was decided.

The candidates are those on record: had the policy decided otherwise, a site would have gone on from another state, and that
is not known. Holds in a row are counted along the policy's own decisions. Where sealed labels are known, a candidate's true
rates on its window are compared with the ceiling of the present configuration: the same yardstick for both sides.
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
from pipeline.guards import assess
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
LABELLED = 10  # presentations of a class or species below which a window says nothing of its rate
SIDES = ("recorded", "policy")


class Rates(NamedTuple):
    """A candidate's true rates on its window, by sealed labels; None with fewer than LABELLED presentations."""

    apcer: float | None  # of the worst species
    bpcer: float | None

    def over(self, ceiling: Ceiling) -> bool | None:
        """Whether a rate is over the ceiling; None where that is not known of both and none is over."""
        limit = ceiling.per_pattern.get("full", ceiling)
        found = [(self.apcer, limit.apcer), (self.bpcer, limit.bpcer)]
        if any(rate is not None and rate > highest for rate, highest in found):
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
    """From the first cycle in which a candidate was over the ceiling to the first in which it was kept back."""

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
    """Judge what is on record (of ``sites``, default all) by ``policy``."""
    if out and out.suffix not in FORMATS:
        raise ValueError(f"--out {out}: allowed are files that end in {' or '.join(FORMATS)}")
    ledger = open_ledger(config, create=False)
    for site in sites:
        ledger.streams.site(site)
    decisions = _decided(config, ledger, policy, terminal, sites)
    told = {
        "changed": changed(config.guards.model_dump(mode="json"), policy.model_dump(mode="json")),
        "verdicts": len(decisions),
        **{side: tally(decisions, side) for side in SIDES},
        "looser": [d.verdict for d in decisions if looser(d)],
        "sites": summaries(decisions),
    }
    if out:
        _write(out, told, decisions)
    show(terminal, told)
    if not decisions:
        return Exit.HOLD
    return Exit.GUARD_FAILED if told["looser"] else Exit.DONE


def judge_again(policy: GuardsConfig, evidence: Evidence, holds: int) -> Verdict:
    """The policy's verdict after ``holds`` holds of its own in a row."""
    return assess(policy, evidence.model_copy(update={"holds_before": holds}))


def looser(d: Decision) -> bool:
    """Whether the policy passes what the record stopped or held."""
    return d.recorded != "pass" and d.policy == "pass"


def lag(decisions: Sequence[Decision], side: str) -> Lag | None:
    """How late ``side`` kept back what was over the ceiling, of one site's decisions in order; None where nothing was."""
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
    """What ``side`` decided, how much of it was wrong by the sealed labels, and how late it was."""
    said = [getattr(d, side) for d in decisions]
    over = [s for d, s in zip(decisions, said, strict=True) if d.over]
    fine = [s for d, s in zip(decisions, said, strict=True) if d.over is False]
    late = [x for own in by_site(decisions).values() if (x := lag(own, side))]
    stopped = [x for x in late if x.cycles is not None]
    middle = {n: float(np.median([getattr(x, n) for x in stopped])) if stopped else None for n in Lag._fields}
    return {
        **{call: said.count(call) for call in ("pass", "hold", "fail")},
        "passed_over": share(over.count("pass"), len(over))._asdict(),
        "false_stops": share(fine.count("fail"), len(fine))._asdict(),
        "false_holds": share(fine.count("hold"), len(fine))._asdict(),
        "sites_over": len(late),
        "sites_never_stopped": len(late) - len(stopped),
        "median_lag": middle,
    }


def share(k: int, n: int) -> Share:
    """k of n with its interval."""
    low, high = metrics.clopper_pearson(k, n, confidence=0.975)
    return Share(k, n, float(low), float(high))


def by_site(decisions: Sequence[Decision]) -> dict[str, list[Decision]]:
    """Each site's decisions, in order."""
    found: dict[str, list[Decision]] = {}
    for d in decisions:
        found.setdefault(d.site, []).append(d)
    return found


def summaries(decisions: Sequence[Decision]) -> list[dict[str, object]]:
    """A line of each site that the sides differ on or that was ever over the ceiling; what the policy loosens first."""
    found: list[dict[str, object]] = []
    for site, own in by_site(decisions).items():
        differ = [d for d in own if d.recorded != d.policy]
        late = {side: lag(own, side) for side in SIDES}
        if differ or late["policy"]:
            why = next((d.reason for d in reversed(differ) if d.policy != "pass"), "")
            lags = {f"{side}_lag": None if x is None else x._asdict() for side, x in late.items()}
            found.append(
                {
                    "site": site,
                    **{side: [getattr(d, side) for d in own] for side in SIDES},
                    "over": [d.over for d in own],
                    **lags,
                    "looser": sum(map(looser, own)),
                    "differ": len(differ),
                    "reason": why,
                }
            )
    return sorted(found, key=lambda s: (-cast("int", s["looser"]), -cast("int", s["differ"]), str(s["site"])))


def changed(
    now: Mapping[str, object], then: Mapping[str, object], prefix: str = "guards"
) -> dict[str, list[object]]:
    """section.key → [now, policy] of the limits that differ."""
    found: dict[str, list[object]] = {}
    for key in {**now, **then}:
        a, b = now.get(key), then.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= changed(a, b, f"{prefix}.{key}")
        elif a != b:
            found[f"{prefix}.{key}"] = [a, b]
    return found


def _decided(
    config: Config, ledger: Ledger, policy: GuardsConfig, terminal: Terminal, sites: Sequence[str]
) -> list[Decision]:
    cycles = [c.id for c in reversed(ledger.cycles.history(kinds=KINDS))]
    total = sum(len(ledger.verdicts.outcomes(c)) for c in cycles) if not sites else 0
    holds: dict[str, int] = {}
    found: list[Decision] = []
    with terminal.progress("simulate", "verdicts") as advance:
        for row in _rows(ledger, cycles, sites):
            try:
                verdict = judge_again(policy, row.evidence, holds.get(row.site, 0))
            except ValueError:
                raise LedgerError(
                    f"verdict {row.id}: its evidence cannot be read; see `palisade guard recheck --all`"
                ) from None
            holds[row.site] = holds.get(row.site, 0) + 1 if verdict.outcome == "hold" else 0
            made = Decision(
                row.site,
                row.cycle,
                row.id,
                int(str(row.counters["samples"])),
                row.at,
                row.outcome,
                verdict.outcome,
                "" if verdict.outcome == "pass" else verdict.decisive,
                None,
            )
            found.append(_with_truth(config, ledger, row, made))
            advance(len(found), max(total, len(found)))
    return found


def _rows(ledger: Ledger, cycles: Sequence[str], sites: Sequence[str]) -> Iterator[VerdictRow]:
    """Each site's verdicts in the order of its cycles."""
    for site in dict.fromkeys(sites):
        yield from (v for v in ledger.verdicts.find(site=site) if v.cycle in cycles)
    for cycle in () if sites else cycles:
        yield from cycle_verdicts(ledger, cycle)


def _with_truth(config: Config, ledger: Ledger, row: VerdictRow, made: Decision) -> Decision:
    """``made`` with what sealed labels say, where they and the window are still there."""
    if row.state is None or not site_labels(config.data.sealed, row.site):
        return made
    state = ledger.verdicts.state(row.state)
    source = ledger.sources.get(state.source_version if state else None)
    try:
        window = join_labels(config, source, [row])
    except (BadBlob, OSError, KeyError):  # its outcomes or features are older than what gc keeps
        return made
    if window is None:
        return made
    known = window.label >= 0
    rates = true_rates(
        window.after[known], window.label[known], window.pai[known], float(str(source.manifest["threshold"]))
    )
    until = window.captured_at.max().item().replace(tzinfo=row.at.tzinfo)
    return replace(
        made, over=rates.over(config.guards.ceiling), apcer=rates.apcer, bpcer=rates.bpcer, until=until
    )


def true_rates(score: np.ndarray, label: np.ndarray, pai: np.ndarray, threshold: float) -> Rates:
    """Rates of a window of labelled samples; species of fewer than LABELLED presentations count together."""
    names, _ = metrics.merge_small(pai, label, LABELLED)
    attacks = [
        r.rate for r in metrics.apcer_by_species(score, label, names, threshold).values() if r.n >= LABELLED
    ]
    real = metrics.bpcer(score, label, threshold)
    return Rates(max(attacks, default=None), real.rate if real.n >= LABELLED else None)


def _write(path: Path, told: Mapping[str, object], decisions: Sequence[Decision]) -> None:
    """Everything as JSON, or a table with a row per decision."""
    rows = [
        {**asdict(d), "at": d.at.isoformat(), "until": d.until and d.until.isoformat()} for d in decisions
    ]
    if path.suffix == ".json":
        text = json.dumps({**told, "decisions": rows}, allow_nan=False, indent=1)
        write_atomic(path, lambda tmp: tmp.write_text(text))
        return
    text, real = pa.string(), pa.float64()
    kinds = {"samples": pa.int64(), "over": pa.bool_(), "apcer": real, "bpcer": real}
    schema = pa.schema([(name, kinds.get(name, text)) for name in Decision.__dataclass_fields__])
    write_atomic(path, lambda tmp: pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp))
