"""``palisade cycle``: ingest → adapt → judge → report, then move a running rollout on. What a scheduler calls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jobs.adapt import adapt_step, exit_code, record, show
from jobs.ingest import ingest_step
from pipeline.cluster import connected
from pipeline.control.deployment import lease, now, open_ledger, source_model

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config


def cycle(config: Config, terminal: Terminal) -> int:
    """One cycle over the fleet; an unfinished one goes on where it stopped."""
    from jobs.report import write_report
    from jobs.rollout.operate import tick_running

    ledger = open_ledger(config)
    source_model(ledger)
    try:
        with lease(config, ledger, "cycle") as held:
            if held.resumed:
                terminal.say(f"{held.id} was not finished; going on")
            with connected(config.cluster):
                started = time.monotonic()
                taken = ingest_step(config, ledger, held, terminal)
                ingested = time.monotonic()
                summary: dict[str, object] = {**taken, **adapt_step(config, ledger, held, terminal)}
            summary |= {"ingest_seconds": ingested - started, "adapt_seconds": time.monotonic() - ingested}
            ledger.cycles.finish(held, summary=summary, now=now())
    finally:  # a release that does harm goes back whatever became of the cycle
        tick_running(config, ledger, terminal)
    path = write_report(config, ledger, held.id)
    record(config, ledger, held, summary)
    verdicts = ledger.verdicts.find(cycle=held.id)
    show(terminal, held, {**summary, "report": str(path)}, verdicts)
    terminal.say(f"report: {path}")
    return exit_code(verdicts, failed=int(str(summary["failed_sites"])))
