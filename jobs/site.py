"""``palisade site``: what is known of a site, and why it serves what it serves."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from jobs import Exit, table
from jobs.deployment import open_ledger
from pipeline.models.checkpoint import Manifest

if TYPE_CHECKING:
    from jobs import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, ServingRow, VerdictRow


def list_sites(config: Config, terminal: Terminal) -> int:
    """Every site in one line."""
    ledger = open_ledger(config, create=False)
    latest, serving = ledger.latest_verdicts(), ledger.serving()
    rows: list[list[object]] = []
    listed: list[dict[str, object]] = []
    for row in ledger.sites():
        verdict, served = latest.get(row.site), serving.get(row.site)
        outcome = verdict.outcome if verdict else None
        rows.append(
            [row.site, row.status, row.learned, outcome, serving_name(ledger, served), served.wave if served else None]
        )
        listed.append({"site": row.site, "status": row.status, "reason": row.reason, "offset": row.learned, "verdict": outcome,
                       "serving": serving_name(ledger, served), "wave": served.wave if served else None})  # fmt: skip
    terminal.result({"sites": listed}, table("sites", ["site", "status", "offset", "verdict", "serves", "wave"], rows))
    return Exit.DONE


def show(config: Config, terminal: Terminal, *, site: str) -> int:
    """Stream, quarantine and verdicts of one site."""
    ledger = open_ledger(config, create=False)
    row = ledger.site(site)
    segments, verdicts, refused = ledger.segments(site), ledger.verdicts(site=site), ledger.quarantined(site)
    reasons = Counter(q.reason for q in refused)
    status = f"{row.status}: {row.reason}" if row.reason else row.status
    head = f"{site}: {status}; stream at offset {row.ingested}, adapted to {row.learned}"
    terminal.result(
        {"site": site, "status": row.status, "reason": row.reason, "ingested": row.ingested, "learned": row.learned,
         "segments": [vars(s) for s, _ in segments], "quarantine": dict(reasons),
         "verdicts": [{"cycle": v.cycle, "outcome": v.outcome, "reason": v.verdict.decisive} for v in verdicts]},
        head,
        table("segments", ["segment", "offsets", "good", "refused", "ingested"],
              [[s.name, f"{s.base_offset}–{s.base_offset + s.rows}", s.good, s.quarantined, f"{at:%Y-%m-%d %H:%M}"]
               for s, at in segments]),
        *([table("refused", ["reason", "count"], [[r, n] for r, n in reasons.most_common()])] if reasons else []),
        table("verdicts", ["cycle", "offsets", "samples", "verdict", "why"],
              [[v.cycle, f"{v.offset_from}–{v.offset_to}", v.counters["samples"], v.outcome, v.verdict.decisive]
               for v in verdicts]),
    )  # fmt: skip
    return Exit.DONE


def explain(config: Config, terminal: Terminal, *, site: str) -> int:
    """Source version → stream window → candidate → verdict → wave, of what the site serves now."""
    ledger = open_ledger(config, create=False)
    ledger.site(site)
    served = ledger.serving([site]).get(site)
    source = ledger.source(served.source_version if served else None)
    made = Manifest.model_validate(source.manifest)
    since = f" since {served.since:%Y-%m-%d %H:%M:%S} UTC, release {served.counter}" if served else ""
    steps: list[tuple[str, str]] = [
        ("serves", serving_name(ledger, served) + since),
        ("source", f"v{source.version} {source.digest[:12]} ({made.method} on {', '.join(made.domains)})"),
        ("lineage", f"MLflow run {source.lineage}"),
    ]  # fmt: skip
    state = ledger.state(served.state) if served else None
    if state:
        verdict = ledger.verdicts(ids=[state.id])[0]
        steps += [
            (
                "window",
                f"offsets {state.offset_from}–{state.offset_to}, {verdict.counters['samples']} samples, cycle {state.cycle}",
            ),
            (
                "candidate",
                f"{state.id} by {state.method}, blob {state.blob[:12]} slot {state.slot}, parent {state.parent or 'source'}",
            ),
            ("verdict", f"{verdict.outcome} at {verdict.at:%Y-%m-%d %H:%M:%S} UTC: {_findings(verdict)}"),
        ]
    if served:
        steps.append(("wave", _wave(ledger, served)))
    last = ledger.verdicts(site=site)[-1:]
    if last and (state is None or last[0].state != state.id):
        steps.append(
            (
                "newest",
                f"candidate of {last[0].cycle}: {last[0].outcome}: {last[0].verdict.decisive or 'not released yet'}",
            )
        )
    elif not last:
        steps.append(("newest", "no cycle has adapted this site yet"))
    history = [
        f"release {s.counter}: {s.kind} to {s.state or f'source v{s.source_version}'} by {s.rollout} wave {s.wave}"
        for s in ledger.served(site)
    ]
    terminal.result(
        {"site": site, **dict(steps), "history": history},
        table(f"why {site} serves what it serves", ["", ""], steps),
        *history,
    )
    return Exit.DONE


def serving_name(ledger: Ledger, served: ServingRow | None) -> str:
    """What a site serves, in a word."""
    if served is None:
        return "source (never released to)"
    return f"state {served.state}" if served.state else f"source v{served.source_version}"


def _findings(v: VerdictRow) -> str:
    return "; ".join(f"{r.guard}: {r.text}" for r in v.verdict.reasons if not r.advisory)


def _wave(ledger: Ledger, served: ServingRow) -> str:
    release = next((r for r in ledger.rollouts() if r.id == served.rollout), None)
    state = f" ({release.status}, plan {release.plan_hash[:8]})" if release else ""
    return f"{served.kind} in wave {served.wave} of {served.rollout}{state}"
