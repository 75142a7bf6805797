"""``palisade adapt``: adapt every site on what was ingested, judge the candidates, keep the lineage."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.terminal import Exit, table
from pipeline.cluster import connected
from pipeline.control.deployment import lease, now, open_ledger, source_model
from pipeline.ledger import RETIRED
from pipeline.lineage import Lineage, flat
from pipeline.revision import code_revision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger, VerdictRow

SHOWN = 40


def adapt(config: Config, terminal: Terminal, *, sites: Sequence[str]) -> int:
    """Adapt ``sites`` (default: all) once and show the verdicts."""
    ledger = open_ledger(config)
    source_model(ledger)
    for site in sites:
        ledger.streams.site(site)
    with lease(config, ledger, "adapt") as cycle:
        summary = adapt_step(config, ledger, cycle, terminal, sites=sites)
        ledger.cycles.finish(cycle, summary=summary, now=now())
    record(config, ledger, cycle, summary)
    verdicts = ledger.verdicts.find(cycle=cycle.id)
    show(terminal, cycle, summary, verdicts)
    return exit_code(verdicts, failed=int(str(summary["failed_sites"])))


def adapt_step(
    config: Config, ledger: Ledger, cycle: Cycle, terminal: Terminal, *, sites: Sequence[str] = ()
) -> dict[str, object]:
    """Hand the sites to the shards → counts. The same step serves ``cycle``."""
    from pipeline.cluster import fleet
    from pipeline.control.adapt import shard_job

    source = source_model(ledger)
    pending = {
        r.site: r.ingested - r.learned
        for r in ledger.streams.sites()
        if r.site in sites or (not sites and r.status != RETIRED)
    }
    if not pending:
        raise ValueError("no site is registered; run `palisade ingest` first")
    judged = ledger.verdicts.outcomes(cycle.id)
    job = shard_job(config, ledger, cycle)
    with connected(config.cluster), terminal.progress("adapt", "sites") as advance:
        left = {site: n for site, n in pending.items() if site not in judged}
        failed = fleet.run_fleet(job, left, placement=fleet.placement(config), on_progress=advance)
    ledger.streams.set_status(failed)
    for site, reason in failed.items():
        terminal.say(f"warning: {site}: not adapted: {reason}")
    outcomes = Counter(ledger.verdicts.outcomes(cycle.id).values())
    return {
        "source_version": source.version,
        "adapted": sum(outcomes.values()),
        "failed_sites": len(failed),
        "evidence": ledger.verdicts.evidence_digest(
            cycle.id
        ),  # in the audit chain, so that nobody changes it unseen
        **outcomes,
    }


def record(
    config: Config, ledger: Ledger, cycle: Cycle, summary: dict[str, object], *, version: int | None = None
) -> None:
    """The cycle's run in MLflow: counts, the per-site table, parents, digests; ``version`` of the source, if not the champion."""
    lineage = Lineage.open(config.lineage, code_revision=code_revision())
    source = ledger.sources.get(version)
    verdicts = ledger.verdicts.find(cycle=cycle.id)
    tags = {
        "fingerprint": config.fingerprint(),
        "source.version": source.version,
        "source.digest": source.digest,
        "source.run": source.lineage,
        "anchor": ledger.verdicts.anchor(source.trunk),
        "cycle": cycle.id,
    }
    with lineage.run(
        "cycle", cycle.id, params=flat(config.model_dump(mode="json")), tags=tags, key=cycle.id
    ) as run:
        run.metrics({k: float(v) for k, v in summary.items() if isinstance(v, int | float)})
        run.table("sites", pa.Table.from_pylist([_row(v) for v in verdicts]))


def exit_code(verdicts: Sequence[VerdictRow], *, failed: int) -> Exit:
    """DONE when any candidate passed; else what kept all of them from it."""
    outcomes = {v.outcome for v in verdicts}
    if not outcomes and failed:
        return Exit.INFRASTRUCTURE
    if "pass" in outcomes or not outcomes:
        return Exit.DONE
    return Exit.GUARD_FAILED if "fail" in outcomes else Exit.HOLD


def show(
    terminal: Terminal, cycle: Cycle, summary: dict[str, object], verdicts: Sequence[VerdictRow]
) -> None:
    """One line per site, worst first."""
    order = {"fail": 0, "hold": 1, "pass": 2}
    worst = sorted(verdicts, key=lambda v: (order[v.outcome], v.site))
    rows = [
        [v.site, v.counters["samples"], v.outcome, "" if v.outcome == "pass" else v.verdict.decisive]
        for v in worst[:SHOWN]
    ]
    more = f"and {len(worst) - SHOWN} more; see `palisade site list`" if len(worst) > SHOWN else ""
    listed = [
        {"site": v.site, "outcome": v.outcome, "reason": v.verdict.decisive, "samples": v.counters["samples"]}
        for v in worst
    ]
    terminal.result(
        {"cycle": cycle.id, **summary, "verdicts": listed},
        table(f"verdicts of {cycle.id}", ["site", "samples", "verdict", "why"], rows),
        *([more] if more else []),
    )


def _row(v: VerdictRow) -> dict[str, object]:
    kept = {k: c for k, c in v.counters.items() if k not in ("outcomes", "rows", "lost", "anchor", "stable")}
    return {
        "site": v.site,
        "state": v.state,
        "outcome": v.outcome,
        "reason": v.verdict.decisive,
        "offset_from": v.offset_from,
        "offset_to": v.offset_to,
        "trust_ratio": v.evidence.trust_ratio,
        **kept,
    }
