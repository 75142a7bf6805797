"""``palisade adapt``: adapts every site on its ingested samples, judges the candidates, records lineage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.terminal import Exit, table
from pipeline.cluster import connected
from pipeline.control.deployment import lease, now, open_ledger, source_model
from pipeline.ledger import RETIRED
from pipeline.lineage import Lineage, flat
from pipeline.revision import code_revision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger, VerdictRow

SHOWN = 40  # sites that the terminal lists
STATISTICS = (  # of a verdict's window, as columns of the per-site table
    *("samples", "accepted_bona_fide", "accepted_attack", "called_bona_fide_share"),
    *("restores", "omega", "sessions"),
)


@dataclass(frozen=True)
class AdaptSummary:
    """Counts of one adaptation of the fleet."""

    source_version: int
    failed_sites: int
    evidence: str  # digest of the cycle's evidence; in the audit chain, so that nobody changes it unseen
    outcomes: Mapping[str, int]  # candidates by outcome of their verdict: pass, hold, fail

    def to_json(self) -> dict[str, int | str]:
        """Returns the counts as the ledger, MLflow and the terminal get them."""
        return {
            "source_version": self.source_version,
            "adapted": sum(self.outcomes.values()),
            "failed_sites": self.failed_sites,
            "evidence": self.evidence,
            **self.outcomes,
        }


def adapt(config: Config, terminal: Terminal, *, sites: Sequence[str]) -> int:
    """Adapts ``sites`` (default: all) once and shows the verdicts."""
    ledger = open_ledger(config)
    source_model(ledger)
    for site in sites:
        ledger.streams.site(site)
    with lease(config, ledger, "adapt") as cycle:
        summary = adapt_step(config, ledger, cycle, terminal, sites=sites)
        ledger.cycles.finish(cycle, summary=summary.to_json(), now=now())
    record(config, ledger, cycle, summary.to_json())
    verdicts = ledger.verdicts.find(cycle=cycle.id)
    show(terminal, cycle, summary.to_json(), verdicts)
    return exit_code(verdicts, failed=summary.failed_sites)


def adapt_step(
    config: Config, ledger: Ledger, cycle: Cycle, terminal: Terminal, *, sites: Sequence[str] = ()
) -> AdaptSummary:
    """Adapts and judges, in the shards, the sites that this cycle has not judged yet; also for ``cycle``."""
    from pipeline.cluster import fleet
    from pipeline.control.adapt import shard_job

    source = source_model(ledger)
    pending = {
        r.site: r.ingested_offset - r.learned_offset
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
    return AdaptSummary(
        source_version=source.version,
        failed_sites=len(failed),
        evidence=ledger.verdicts.evidence_digest(cycle.id),
        outcomes=Counter(ledger.verdicts.outcomes(cycle.id).values()),
    )


def record(
    config: Config, ledger: Ledger, cycle: Cycle, summary: Mapping[str, object], *, version: int | None = None
) -> None:
    """Writes the cycle's MLflow run: its counts, a table with a row per site, its parents and digests.

    ``version`` is the source model that the cycle adapted from (default: the champion).
    """
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
    params = flat(config.model_dump(mode="json"))
    with lineage.run("cycle", cycle.id, params=params, tags=tags, key=cycle.id) as run:
        run.metrics({k: float(v) for k, v in summary.items() if isinstance(v, int | float)})
        run.table("sites", pa.Table.from_pylist([_row(v) for v in verdicts]))


def show(
    terminal: Terminal, cycle: Cycle, summary: Mapping[str, object], verdicts: Sequence[VerdictRow]
) -> None:
    """Shows one line per site, the worst first."""
    order = {"fail": 0, "hold": 1, "pass": 2}
    worst = sorted(verdicts, key=lambda v: (order[v.outcome], v.site))
    rows = [
        [v.site, v.window.samples, v.outcome, "" if v.outcome == "pass" else v.verdict.decisive]
        for v in worst[:SHOWN]
    ]
    more = [f"and {len(worst) - SHOWN} more; see `palisade site list`"] if len(worst) > SHOWN else []
    listed = [
        {"site": v.site, "outcome": v.outcome, "reason": v.verdict.decisive, "samples": v.window.samples}
        for v in worst
    ]
    terminal.result(
        {"cycle": cycle.id, **summary, "verdicts": listed},
        table(f"verdicts of {cycle.id}", ["site", "samples", "verdict", "why"], rows),
        *more,
    )


def exit_code(verdicts: Sequence[VerdictRow], *, failed: int) -> Exit:
    """Returns DONE if any candidate passed or there was none, else the code for the reason that none did.

    ``failed`` is the number of sites that the shards could not adapt.
    """
    outcomes = {v.outcome for v in verdicts}
    if not outcomes and failed:
        return Exit.INFRASTRUCTURE
    if "pass" in outcomes or not outcomes:
        return Exit.DONE
    return Exit.GUARD_FAILED if "fail" in outcomes else Exit.HOLD


def _row(v: VerdictRow) -> dict[str, object]:
    return {
        "site": v.site,
        "state": v.state,
        "outcome": v.outcome,
        "reason": v.verdict.decisive,
        "offset_from": v.offset_from,
        "offset_to": v.offset_to,
        "trust_ratio": v.evidence.trust_ratio,
        **{name: getattr(v.window, name) for name in STATISTICS},
    }
