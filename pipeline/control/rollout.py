"""Moves a rollout on: observes its sites, asks the state machine, carries its actions out, stores its memory.

Every step is one transaction of the ledger that names the revision it was decided on. The next reconcile
mends a crash between two steps, and of two drivers at once the slower one's step is refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline import rollout as machine
from pipeline.config import translate_stored
from pipeline.control.candidates import joiners
from pipeline.control.deployment import now
from pipeline.control.health import observe, observe_rollback
from pipeline.control.notify import notify
from pipeline.ledger import Memory, StaleGeneration
from pipeline.rollout import IN_ROLLBACK, TERMINAL, Rollout, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from pipeline.config import Config
    from pipeline.control.deployment import Reporter
    from pipeline.ledger import Ledger, RolloutRow
    from pipeline.rollout import Observation, Target
    from pipeline.sections import Severity

RUNNING = machine.IN_PROGRESS | {Status.APPROVED, *IN_ROLLBACK}
OVERTAKEN = 5  # times that a person's step tries again after a tick that was faster
SEVERITY: dict[Status, Severity] = {
    Status.HOLD: "warning",
    Status.PAUSED: "warning",
    Status.EXPIRED: "warning",
    Status.ABORTING: "critical",
    Status.ROLLING_BACK: "critical",
    Status.ROLLED_BACK: "critical",
}


def load(row: RolloutRow) -> Rollout:
    """Returns the state machine's memory; a plan that an earlier version stored has its settings under their
    present names."""
    body = json.loads(row.body)
    body["plan"]["config"] = translate_stored({"rollout": body["plan"]["config"]})["rollout"]
    return Rollout.model_validate(body)


def newest(ledger: Ledger) -> list[RolloutRow]:
    """Returns every rollout, newest first; raises ValueError where there is none."""
    rows = ledger.plans.rollouts()
    if not rows:
        raise ValueError("no rollout yet; run `palisade rollout plan` first")
    return rows


def save(
    ledger: Ledger,
    row: RolloutRow,
    r: Rollout,
    event: str,
    *,
    at: datetime,
    joined: Mapping[str, Target] | None = None,
) -> RolloutRow:
    """Stores the memory of the state machine; raises StaleGeneration if another driver stored one."""
    ledger.plans.save(
        row.id,
        plan_hash=row.plan_hash,
        status=r.status,
        body=r.model_dump_json(),
        revision=row.revision,
        event={"event": event},
        now=at,
        joined=joined,
        roles=_roles(r),
    )
    return ledger.plans.rollout(row.id)


def change(ledger: Ledger, row: RolloutRow, to: Callable[[Rollout], Rollout], event: str) -> RolloutRow:
    """Applies a person's step on top of what a reconcile did meanwhile."""
    for _ in range(OVERTAKEN):
        current = load(row)
        new = to(current)
        if new == current:
            return row
        try:
            return save(ledger, row, new, event, at=now())
        except StaleGeneration:
            row = ledger.plans.rollout(row.id)
    raise StaleGeneration(
        f"{row.id}: others keep moving it on; look at `palisade rollout status` and try again"
    )


def step(ledger: Ledger, row: RolloutRow, observation: Observation, at: datetime) -> tuple[RolloutRow, int]:
    """Asks the state machine once and carries its actions out, in one transaction.

    Returns the rollout as it is now and how many sites moved.
    """
    current = load(row)
    new, actions = machine.advance(current, observation, at)
    if new == current:
        moved = (
            ledger.releases.carry_out(
                row.id, actions, without=list(new.failed), reason=new.reason, revision=row.revision, now=at
            )
            if actions
            else 0
        )
        return row, moved
    memory = Memory(new.status, new.model_dump_json(), describe_transition(current, new), _roles(new))
    moved = ledger.releases.carry_out(
        row.id,
        actions,
        without=list(new.failed),
        reason=new.reason,
        revision=row.revision,
        now=at,
        memory=memory,
    )
    return replace(row, status=new.status, body=memory.body, revision=row.revision + 1, updated_at=at), moved


def reconcile(config: Config, ledger: Ledger, row: RolloutRow, reporter: Reporter) -> RolloutRow:
    """Steps until there is nothing more to do now, and notifies people."""
    while True:
        before = load(row)
        row, moved = step(ledger, row, observe(config, ledger, row.id, before), now())
        after = load(row)
        _notify_transition(config, ledger, row.id, before, after, reporter)
        if not moved and (after.status, after.wave) == (before.status, before.wave):
            return row


def reconcile_running(config: Config, ledger: Ledger, reporter: Reporter) -> None:
    """Moves the running rollout on, if there is one, with the sites that joined; ``cycle`` calls it.

    A paused rollout is included, because it may have to be rolled back.
    """
    for row in ledger.plans.rollouts():
        if Status(row.status) in RUNNING | {Status.PAUSED}:
            row = add_joiners(config, ledger, row, reporter)
            record(config, ledger, reconcile(config, ledger, row, reporter), reporter)


def add_joiners(config: Config, ledger: Ledger, row: RolloutRow, reporter: Reporter) -> RolloutRow:
    """Adds the sites that were registered after the plan to its last wave."""
    current = load(row)
    new = joiners(config, ledger, reporter, row.id, current)
    if not new:
        return row
    text = f"{len(new)} sites joined: {', '.join(sorted(new)[:3])}"
    return save(ledger, row, machine.join(current, count=len(new)), text, at=now(), joined=new)


def roll_back_now(
    config: Config, ledger: Ledger, row: RolloutRow, reporter: Reporter, *, who: str, reason: str
) -> RolloutRow:
    """Aborts and rolls back at once, without any site's health or report.

    Starts again from the newer state when a reconcile got in between.
    """
    for _ in range(OVERTAKEN):
        try:
            row = change(
                ledger,
                row,
                lambda r: machine.abort(r, reason=f"{who}: {reason}", now=now()),
                f"aborted by {who}",
            )
            while (before := load(row)).status in IN_ROLLBACK:
                row, _ = step(ledger, row, observe_rollback(ledger, row.id, before), now())
                _notify_transition(config, ledger, row.id, before, load(row), reporter)
            return row
        except StaleGeneration:
            row = ledger.plans.rollout(row.id)
    raise StaleGeneration(f"{row.id}: others keep moving it on; say it again")


def record(config: Config, ledger: Ledger, row: RolloutRow, reporter: Reporter) -> None:
    """Writes the run of an ended rollout to MLflow; if that is out of reach, the rollout stands anyway."""
    if Status(row.status) not in TERMINAL:
        return
    from pipeline.lineage import Lineage, LineageError
    from pipeline.revision import code_revision

    r = load(row)
    tags = {
        "plan": row.plan_hash,
        "status": row.status,
        "reason": r.reason,
        "source.version": ledger.sources.champion().version,
    }
    try:
        lineage = Lineage.open(config.lineage, code_revision=code_revision())
        with lineage.run("rollout", row.id, params={}, tags=tags, key=row.id) as run:
            sites = sum(w.sites for w in r.plan.waves) + r.joined
            run.metrics({"sites": sites, "failed": len(r.failed), "waves": len(r.plan.waves)})
    except LineageError as e:
        reporter.say(f"warning: {e}")


def describe_transition(before: Rollout, after: Rollout) -> str:
    """Returns the transition in one line."""
    where = (
        f" wave {after.wave + 1} of {len(after.plan.waves)}"
        if 0 <= after.wave < len(after.plan.waves)
        else ""
    )
    reason = f": {after.reason}" if after.reason and after.reason != before.reason else ""
    return f"{after.status}{where}{reason}"


def _roles(r: Rollout) -> dict[str, int | None]:
    """Returns the roles of the source models after an ended release of one."""
    if r.plan.kind != "source" or r.status not in {Status.COMPLETED, Status.ROLLED_BACK, Status.EXPIRED}:
        return {}  # whoever supersedes it names the next challenger
    if r.status == Status.COMPLETED:  # the old trunk's features go on, for the way back, until the next plan
        return {"champion": r.plan.source_version, "challenger": r.plan.source_before}
    return {"challenger": None} | (
        {"champion": r.plan.source_before} if r.status == Status.ROLLED_BACK else {}
    )


def _notify_transition(
    config: Config, ledger: Ledger, rollout: str, before: Rollout, after: Rollout, reporter: Reporter
) -> None:
    if after == before:
        return
    text = f"{rollout}: {describe_transition(before, after)}"
    reporter.say(text)
    if after.status != before.status and (after.status in SEVERITY or after.status in TERMINAL):
        context = {"rollout": rollout, "status": after.status, "wave": after.wave + 1, "reason": after.reason}
        for remark in notify(
            config,
            ledger,
            key=f"rollout/{rollout}/{after.status}",
            text=text,
            now=now(),
            severity=SEVERITY.get(after.status, "info"),
            context=context,
        ):
            reporter.say(remark)
