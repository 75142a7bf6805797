"""``palisade cycle``, for a scheduler: ingest → adapt → judge → report, then a step of a running rollout."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.adapt import adapt_step, exit_code, record, show
from jobs.ingest import ingest_step
from pipeline.cluster import connected
from pipeline.control.deployment import lease, now, open_ledger, source_model

if TYPE_CHECKING:
    from jobs.adapt import AdaptSummary
    from jobs.ingest import IngestSummary
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger


@dataclass(frozen=True)
class CycleSummary:
    """Counts of one cycle and the seconds of its stages."""

    ingest: IngestSummary
    adapt: AdaptSummary
    ingest_seconds: float
    adapt_seconds: float

    def to_json(self) -> dict[str, int | float | str]:
        """Returns the counts for ledger, MLflow and terminal; ``failed_sites`` counts those of adapt."""
        seconds = {"ingest_seconds": self.ingest_seconds, "adapt_seconds": self.adapt_seconds}
        return {**self.ingest.to_json(), **self.adapt.to_json(), **seconds}


def cycle(config: Config, terminal: Terminal) -> int:
    """Runs one cycle over the fleet; an unfinished cycle resumes where it stopped."""
    from jobs.report import write_report
    from pipeline.control.rollout import reconcile_running

    ledger = open_ledger(config)
    source_model(ledger)
    try:
        with lease(config, ledger, "cycle") as held:
            if held.resumed:
                terminal.say(f"{held.id} was not finished; going on")
            summary = _steps(config, ledger, held, terminal)
            ledger.cycles.finish(held, summary=summary.to_json(), now=now())
    finally:  # a harmful release is rolled back even if the cycle failed
        reconcile_running(config, ledger, terminal)
    path = write_report(config, ledger, held.id)
    record(config, ledger, held, summary.to_json())
    verdicts = ledger.verdicts.find(cycle=held.id)
    show(terminal, held, {**summary.to_json(), "report": str(path)}, verdicts)
    terminal.say(f"report: {path}")
    return exit_code(verdicts, failed=summary.adapt.failed_sites)


def _steps(config: Config, ledger: Ledger, held: Cycle, terminal: Terminal) -> CycleSummary:
    """Ingests and adapts under one Ray connection."""
    with connected(config.cluster):
        started = time.monotonic()
        ingest = ingest_step(config, ledger, held, terminal)
        ingested = time.monotonic()
        adapt = adapt_step(config, ledger, held, terminal)
        return CycleSummary(ingest, adapt, ingested - started, time.monotonic() - ingested)
