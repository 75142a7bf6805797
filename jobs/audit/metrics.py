"""``palisade metrics``: rollout, guards and audit in Prometheus' text format, from the ledger alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from jobs.terminal import Exit
from pipeline.control.deployment import open_ledger
from pipeline.control.rollout import load
from pipeline.rollout import TERMINAL, Status, approvals_needed, approvers
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger
    from pipeline.rollout import Rollout

CALLS = ("pass", "hold", "fail")


def metrics(config: Config, terminal: Terminal, *, out: Path | None) -> int:
    """Prints the figures, or writes them to ``out`` whole, for the node exporter's textfile collector."""
    registry = collect(open_ledger(config, create=False))
    text = generate_latest(registry)
    samples = [
        {"name": s.name, "labels": s.labels, "value": s.value} for m in registry.collect() for s in m.samples
    ]
    if out is not None:
        write_atomic(out.resolve(), text)
        terminal.result({"metrics": samples, "out": str(out)}, f"{len(samples)} samples in {out}")
        return Exit.DONE
    terminal.result({"metrics": samples})
    if not terminal.as_json:
        print(text.decode(), end="", file=terminal.out.file)  # a terminal's width must not break lines
    return Exit.DONE


def collect(ledger: Ledger) -> CollectorRegistry:
    """Returns the present figures."""
    registry = CollectorRegistry()
    _fleet(registry, ledger)
    rows = ledger.plans.rollouts()
    if rows:
        newest = next((r for r in rows if r.status not in TERMINAL), rows[0])
        _rollout(registry, ledger, newest.id, load(newest))
    return registry


def _fleet(registry: CollectorRegistry, ledger: Ledger) -> None:
    by_status, holding = ledger.streams.count_by_status()
    outcomes, findings, last = ledger.verdicts.findings()
    sites = Gauge("palisade_sites", "Registered sites by status.", ["status"], registry=registry)
    for status in sorted({"active", "failed", "retired", *by_status}):
        sites.labels(status).set(by_status.get(status, 0))
    Gauge("palisade_sites_on_hold", "Sites whose last verdict was a hold.", registry=registry).set(holding)
    verdicts = Gauge(
        "palisade_verdicts", "Newest verdict of every site by outcome.", ["outcome"], registry=registry
    )
    for outcome in CALLS:
        verdicts.labels(outcome).set(outcomes[outcome])
    guards = Gauge(
        "palisade_guard_findings",
        "Findings in the newest verdict of every site.",
        ["guard", "call"],
        registry=registry,
    )
    for guard in sorted({g for g, _ in findings}):
        for call in CALLS:
            guards.labels(guard, call).set(findings[guard, call])
    if last is not None:
        age = Gauge(
            "palisade_verdict_newest_timestamp_seconds",
            "When the newest verdict was given.",
            registry=registry,
        )
        age.set(last.timestamp())
    head = Gauge(
        "palisade_audit_head_sequence", "Number of the last row of the audit chain.", registry=registry
    )
    head.set(ledger.audit.head()[0])
    unsent = Gauge("palisade_notices_unsent", "Notices that no sink took yet.", registry=registry)
    unsent.set(sum(r.sent_at is None for r in ledger.notices.latest()))


def _rollout(registry: CollectorRegistry, ledger: Ledger, release: str, r: Rollout) -> None:
    def gauge(name: str, text: str, value: float) -> None:
        Gauge(f"palisade_rollout_{name}", text, ["release"], registry=registry).labels(release).set(value)

    status = Gauge(
        "palisade_rollout_status",
        "1 for the status that the rollout has.",
        ["release", "status"],
        registry=registry,
    )
    for s in Status:
        status.labels(release, s.value).set(s == r.status)
    gauge("since_timestamp_seconds", "Since when it has this status.", r.since.timestamp())
    gauge("waves", "Waves of its plan.", len(r.plan.waves))
    gauge("wave", "Last wave that was started, from 1; 0: none.", min(r.wave + 1, len(r.plan.waves)))
    ahead = r.plan.waves and r.status not in TERMINAL
    want = max((approvals_needed(r.plan, i) for i in range(len(r.plan.waves))), default=0) if ahead else 0
    gauge(
        "approvals_missing",
        "People who still have to approve before its last wave.",
        max(0, want - len(approvers(r))),
    )
    sites = Gauge(
        "palisade_rollout_wave_sites",
        "Sites of each wave: planned, promoted (serve their target), failed "
        "(rolled back one by one), silent (promoted, no capture since).",
        ["release", "wave", "state"],
        registry=registry,
    )
    failed = list(r.failed.values())
    for w in ledger.plans.wave_counts(release):
        states = {
            "planned": w.sites,
            "promoted": w.promoted,
            "failed": failed.count(w.wave),
            "silent": w.silent,
        }
        for state, n in states.items():
            sites.labels(release, str(w.wave + 1), state).set(n)
