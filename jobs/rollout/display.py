"""How a plan and a rollout are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.rollout import TERMINAL, Draft, Pointer, Rollout, Status, approvals_needed, approvers

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.ledger import Ledger

LISTED = 20
SHARE, CLEAN, HARMED = "5 %", "2", "10"  # what a plan says it can detect: see pipeline.rollout.power


def show_plan(terminal: Terminal, r: Rollout, draft: Draft, *, stored: bool) -> None:
    """Waves, what each can detect, who is in none and why, and what to do next."""
    p, hash8 = r.plan, r.plan_hash[:8]
    sites = [draft.wave(i) for i in range(len(p.waves))]
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
    per_day = p.config.presentations_per_day
    known = f"with {per_day:g} labelled attack presentations per site and day"
    next_step = f"look at `palisade rollout diff`, then `palisade rollout apply {hash8}`"
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
        *parts,
        f"controls, kept on the source model: {_some(draft.controls) or 'none'}",
        f"detects in: until a wave stops when {SHARE} of its sites go from APCER {CLEAN} to {HARMED} %, {known}",
        f"takes {_span(p.duration_seconds)} when nothing holds; a rollback reaches every site within {_span(p.rollback_seconds)}",
        f"plan hash {hash8}; {next_step}"
        if stored
        else "a draft: nothing was stored; without --dry-run it is",
    )


def show_status(terminal: Terminal, ledger: Ledger, release: str, r: Rollout) -> Exit:
    """Wave by wave what is served; HOLD where the rollout waits for data or a person."""
    rows: list[list[object]] = []
    for i, w in enumerate(r.plan.waves):
        seen = ledger.plans.observe_wave(release, i, without=())
        failed = sum(wave == i for wave in r.failed.values())
        rows.append(
            [
                i + 1,
                f"{w.share:.0%}",
                seen.sites,
                seen.sites - sum(seen.not_serving.values()),
                failed,
                w.abort_at,
            ]
        )
    who = ", ".join(sorted(approvers(r))) or "nobody"
    said = f"{release} is {r.status}{f': {r.reason}' if r.reason else ''}"
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
        f"{said}{'; ' if (step := _next(r)) else ''}{step}",
    )
    return Exit.HOLD if r.status in {Status.HOLD, Status.PAUSED} else Exit.DONE


def name_of(pointer: Pointer) -> str:
    """What a pointer points to, in a word."""
    return f"state {pointer.state_id}" if pointer.state_id else f"source v{pointer.source_version}"


def _next(r: Rollout) -> str:
    hash8 = r.plan_hash[:8]
    if r.status in TERMINAL:
        return (
            "`palisade rollout plan` makes the next"
            if r.status != Status.COMPLETED
            else "`palisade rollout rollback` undoes it"
        )
    return {
        Status.PLANNED: f"`palisade rollout apply {hash8}` starts it",
        Status.PAUSED: f"`palisade rollout apply {hash8}` goes on, `palisade rollout abort` goes back",
        Status.HOLD: "`palisade rollout watch` goes on when that is over; it pauses for a person after rollout.hold_seconds",
    }.get(r.status, "`palisade rollout watch` or the next `palisade cycle` moves it on")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
