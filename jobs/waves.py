"""How a plan and a rollout are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs import Exit, table
from pipeline.rollout import Pointer, Rollout, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jobs import Terminal


def show_plan(terminal: Terminal, r: Rollout) -> None:
    """Waves, who is in none and why, and what to do next."""
    p = r.plan
    waves = [
        [i + 1, f"{w.share:.0%}", len(w.sites), w.abort_at, ", ".join(w.sites[:4]) + (" …" if len(w.sites) > 4 else "")]
        for i, w in enumerate(p.waves)
    ]
    parts = [
        table(
            f"{p.release}: {len(p.targets)} sites in {len(p.waves)} waves",
            ["wave", "up to", "sites", "aborts at", ""],
            waves,
        )
    ]
    if p.excluded:
        parts.append(table("in no wave", ["site", "why"], [[s, e.reason] for s, e in p.excluded.items()][:20]))
    terminal.result(
        {"release": p.release, "plan_hash": r.plan_hash, **p.model_dump(mode="json", include={"waves", "excluded", "controls"}),
         "duration_seconds": p.duration_seconds, "rollback_seconds": p.rollback_seconds},
        *parts,
        f"controls, kept on the source model: {', '.join(p.controls) or 'none'}",
        f"takes {p.duration_seconds:.0f} s when nothing holds; a rollback reaches every site within {p.rollback_seconds:.0f} s",
        f"plan hash {r.plan_hash[:8]}; look at `palisade rollout diff`, then `palisade rollout apply {r.plan_hash[:8]}`",
    )  # fmt: skip


def show_status(terminal: Terminal, release: str, r: Rollout, serving: Mapping[str, Pointer]) -> Exit:
    """Wave by wave what is served; HOLD where the rollout waits for data or a person."""
    rows: list[list[object]] = []
    for i, w in enumerate(r.plan.waves):
        on = sum(serving[s] == r.plan.targets[s].to for s in w.sites)
        rows.append([i + 1, f"{w.share:.0%}", len(w.sites), on, sum(s in r.failed for s in w.sites)])
    next_step = {
        Status.PLANNED: f"`palisade rollout apply {r.plan_hash[:8]}` starts it",
        Status.PAUSED: f"`palisade rollout apply {r.plan_hash[:8]}` goes on, `palisade rollout abort` goes back",
        Status.HOLD: "waits for data; it pauses for a person after rollout.hold_seconds",
        Status.BAKING: "the next `palisade rollout apply` or `palisade cycle` moves it on",
    }.get(r.status, "")
    said = f"{release} is {r.status}{f': {r.reason}' if r.reason else ''}{f'; {next_step}' if next_step else ''}"
    listed = [dict(zip(("wave", "share", "sites", "promoted", "failed"), x, strict=True)) for x in rows]
    terminal.result(
        {"release": release, "status": r.status, "reason": r.reason, "plan_hash": r.plan_hash, "waves": listed},
        table(release, ["wave", "up to", "sites", "serving it", "failed"], rows), said,
    )  # fmt: skip
    return Exit.HOLD if r.status in {Status.HOLD, Status.PAUSED} else Exit.DONE


def name_of(pointer: Pointer) -> str:
    """What a pointer points to, in a word."""
    return f"state {pointer.state_id}" if pointer.state_id else f"source v{pointer.source_version}"
