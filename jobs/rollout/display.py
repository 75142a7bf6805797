"""Shows a plan and the status of a rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.rollout import TERMINAL, Draft, Plan, Pointer, Rollout, Status, approvals_needed, approvers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from jobs.terminal import Terminal
    from pipeline.ledger import Ledger

LISTED = 20
SHARE, CLEAN, HARMED = "5 %", "2", "10"  # the harm that a plan says it can detect, see pipeline.rollout.power


def show_plan(terminal: Terminal, r: Rollout, draft: Draft, *, stored: bool) -> None:
    """Shows the waves with what each can detect, the sites in no wave with the reason, and the next step."""
    p, hash8 = r.plan, r.plan_hash[:8]
    sites = [draft.wave(i) for i in range(len(p.waves))]
    next_step = f"look at `palisade rollout diff`, then `palisade rollout apply {hash8}`"
    per_day = f"{p.config.presentations_per_day:g} labelled attack presentations per site and day"
    duration, rollback = _span(p.duration_seconds), _span(p.rollback_seconds)
    terminal.result(
        {
            "release": p.release,
            "plan_hash": r.plan_hash,
            "kind": p.kind,
            "source_version": p.source_version,
            "stored": stored,
            "waves": [{**w.model_dump(mode="json"), "sites": list(sites[i])} for i, w in enumerate(p.waves)],
            "excluded": {s: e._asdict() for s, e in draft.excluded.items()},
            "controls": list(draft.controls),
            "duration_seconds": p.duration_seconds,
            "rollback_seconds": p.rollback_seconds,
        },
        *_plan_tables(p, draft, sites),
        f"controls, kept on the source model: {_some(draft.controls) or 'none'}",
        f"detects in: until a wave stops when {SHARE} of its sites go from APCER {CLEAN} to {HARMED} %, "
        f"with {per_day}",
        f"takes {duration} when nothing holds; a rollback reaches every site within {rollback}",
        f"plan hash {hash8}; {next_step}"
        if stored
        else "a draft: nothing was stored; without --dry-run it is",
    )


def _plan_tables(p: Plan, draft: Draft, sites: Sequence[tuple[str, ...]]) -> list[Table]:
    """Returns the table of waves, and the table of the sites that are in none."""
    rows = [
        [
            i + 1,
            f"{w.share:.0%}",
            w.sites,
            w.abort_at,
            approvals_needed(p, i),
            "nothing" if w.detects_days is None else f"{w.detects_days:.1f} days",
            ", ".join(sites[i][:3]) + (" …" if w.sites > 3 else ""),
        ]
        for i, w in enumerate(p.waves)
    ]
    what = f"source v{p.source_version}" if p.kind == "source" else "candidates"
    parts = [
        table(
            f"{p.release}: {what} for {len(draft.targets)} sites in {len(p.waves)} waves",
            ["wave", "up to", "sites", "aborts at", "approvals", "detects in", ""],
            rows,
        )
    ]
    out = [[s, e.reason] for s, e in draft.excluded.items() if s not in set(draft.controls)]
    if out:
        more, out = f" ({LISTED} of {len(out)})" if len(out) > LISTED else "", out[:LISTED]
        parts.append(table(f"in no wave{more}", ["site", "why"], out))
    return parts


def show_status(terminal: Terminal, ledger: Ledger, release: str, r: Rollout) -> Exit:
    """Shows each wave's sites; returns HOLD if the rollout waits for data or a person, else DONE."""
    rows: list[list[object]] = []
    for i, w in enumerate(r.plan.waves):
        observed = ledger.plans.observe_wave(release, i, without=())
        failed = sum(wave == i for wave in r.failed.values())
        rows.append(
            [
                i + 1,
                f"{w.share:.0%}",
                observed.sites,
                observed.sites - sum(observed.not_serving.values()),
                failed,
                w.abort_at,
            ]
        )
    who = ", ".join(sorted(approvers(r))) or "nobody"
    summary = f"{release} is {r.status}{f': {r.reason}' if r.reason else ''}"
    terminal.result(
        {
            "release": release,
            "status": r.status,
            "reason": r.reason,
            "plan_hash": r.plan_hash,
            "joined": r.joined,
            "approvals": sorted(approvers(r)),
            "failed": sorted(r.failed),
            "waves": [
                dict(zip(("wave", "share", "sites", "promoted", "failed", "aborts_at"), x, strict=True))
                for x in rows
            ],
        },
        table(release, ["wave", "up to", "sites", "serving it", "failed", "aborts at"], rows),
        f"approved by {who}" + (f"; {r.joined} sites joined the last wave" if r.joined else ""),
        f"{summary}{'; ' if (step := _next(r)) else ''}{step}",
    )
    return Exit.HOLD if r.status in {Status.HOLD, Status.PAUSED} else Exit.DONE


def name_of(pointer: Pointer) -> str:
    """Returns the name of the state or source model that a pointer names."""
    return f"state {pointer.state_id}" if pointer.state_id else f"source v{pointer.source_version}"


def _next(r: Rollout) -> str:
    hash8 = r.plan_hash[:8]
    if r.status in TERMINAL:
        return (
            "`palisade rollout plan` makes the next"
            if r.status != Status.COMPLETED
            else "`palisade rollout rollback` undoes it"
        )
    steps = {
        Status.PLANNED: f"`palisade rollout apply {hash8}` starts it",
        Status.PAUSED: f"`palisade rollout apply {hash8}` goes on, `palisade rollout abort` goes back",
        Status.HOLD: "`palisade rollout watch` goes on when that is over; "
        "it pauses for a person after rollout.hold_seconds",
    }
    return steps.get(r.status, "`palisade rollout watch` or the next `palisade cycle` moves it on")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
