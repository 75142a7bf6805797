"""``palisade rollout``: what people say to a release; rolling back needs nothing but the ledger."""

from __future__ import annotations

import getpass
import time
from functools import partial
from typing import TYPE_CHECKING

from jobs.rollout.display import name_of, show_plan, show_status
from jobs.terminal import Exit, table
from pipeline import rollout as machine
from pipeline.control.candidates import candidates, candidates_of_source, joiners, pointer
from pipeline.control.deployment import now, open_ledger
from pipeline.control.rollout import RUNNING, change, load, newest, reconcile, record, roll_back_now, save
from pipeline.rollout import Status

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.control.rebase import Rebased
    from pipeline.ledger import Ledger, RolloutRow

POLL_SECONDS = 0.5


def plan(
    config: Config,
    terminal: Terminal,
    *,
    source: int | None = None,
    states: str = "reset",
    dry_run: bool = False,
) -> int:
    """Plan a release of every site's newest candidate that passes under today's limits, or of a new source model."""
    if states not in ("rebase", "reset"):
        raise ValueError(f"--states {states!r}: allowed are rebase and reset")
    ledger = open_ledger(config, create=False)
    busy = next((r for r in ledger.plans.rollouts() if Status(r.status) not in machine.TERMINAL), None)
    if busy and Status(busy.status) != Status.PLANNED:
        raise ValueError(
            f"{busy.id} is {busy.status}; let it end, or `palisade rollout abort` it, before planning the next"
        )
    release = f"release-{len(ledger.plans.rollouts()) + 1:05d}"
    before = ledger.sources.champion().version
    if source is None:
        facts = candidates(config, ledger, terminal)
        made = machine.plan(release, facts, before, config.rollout, shadow=config.guards.shadow)
    else:
        rebase = partial(_rebase, config, ledger, terminal, source) if states == "rebase" else None
        facts = candidates_of_source(config, ledger, terminal, version=source, rebase=rebase, dry_run=dry_run)
        made = machine.plan(
            release, facts, source, config.rollout, source_before=before, shadow=config.guards.shadow
        )
    if not made.targets:
        reasons = "; ".join(sorted({e.reason for e in made.excluded.values()})[:3]) or "no site is registered"
        raise ValueError(f"nothing to release: {reasons}; run `palisade cycle` first")
    started = machine.start(made.plan, now())
    if not dry_run:
        if busy:
            over = machine.supersede(load(busy), by="a newer plan", now=now())
            save(ledger, busy, over, over.reason, at=now())
        if source is None:
            ledger.sources.set_challenger(
                None, now=now()
            )  # of a source release that ended or was never carried out
        ledger.plans.save(
            release,
            plan_hash=started.plan_hash,
            status=started.status,
            body=started.model_dump_json(),
            revision=0,
            event={"event": "planned", "sites": len(made.targets)},
            now=now(),
            draft=made,
        )
    show_plan(terminal, started, made, stored=not dry_run)
    return Exit.DONE


def diff(config: Config, terminal: Terminal) -> int:
    """What the newest plan would change against what is served, and against the plan before it."""
    ledger = open_ledger(config, create=False)
    rows = newest(ledger)
    targets, serving = ledger.plans.targets(rows[0].id), ledger.releases.serving()
    here = {site: pointer(ledger, serving.get(site)) for site in targets}
    changes = [
        [site, name_of(here[site]), name_of(t.to), t.wave + 1]
        for site, t in sorted(targets.items(), key=lambda x: (x[1].wave, x[0]))
        if t.to != here[site]
    ]
    title = f"{rows[0].id} against what is served: {len(changes)} sites change"
    parts = [table(title, ["site", "serves", "would serve", "wave"], changes)]
    against = machine.diff(ledger.plans.targets(rows[1].id), targets).model_dump() if len(rows) > 1 else None
    if against:
        listed = [[k, ", ".join(map(str, v)) or None] for k, v in against.items()]
        parts.append(table(f"against {rows[1].id}", ["", "sites"], listed))
    told = [dict(zip(("site", "serves", "would_serve", "wave"), c, strict=True)) for c in changes]
    terminal.result({"release": rows[0].id, "changes": told, "previous": against}, *parts)
    return Exit.DONE


def apply(
    config: Config, terminal: Terminal, *, plan_hash: str, who: str | None = None, watch: bool = False
) -> int:
    """Approve the plan with this hash (or resume it when it is paused) and move it on."""
    ledger = open_ledger(config, create=False)
    row = _named(ledger, plan_hash)
    if Status(row.status) == Status.PLANNED:
        row = reconcile(config, ledger, row, terminal)  # it may have expired
    person = who or getpass.getuser()
    if Status(row.status) in machine.TERMINAL:
        raise ValueError(f"{row.id} is {row.status}; plan a new release")
    if Status(row.status) == Status.PAUSED:
        row = change(ledger, row, lambda r: machine.resume(r, now=now()), f"resumed by {person}")
    row = _approved(ledger, row, person)
    return _go_on(config, ledger, row, terminal, watch=watch)


def approve(config: Config, terminal: Terminal, *, plan_hash: str, who: str | None = None) -> int:
    """One more person's approval; nothing moves by it until the next tick."""
    ledger = open_ledger(config, create=False)
    row = _approved(ledger, _named(ledger, plan_hash), who or getpass.getuser())
    return show_status(terminal, ledger, row.id, load(row))


def watch(config: Config, terminal: Terminal) -> int:
    """Move the newest rollout on until it ends or waits for a person or for data."""
    ledger = open_ledger(config, create=False)
    return _go_on(config, ledger, newest(ledger)[0], terminal, watch=True)


def status(config: Config, terminal: Terminal) -> int:
    """Where the newest rollout stands."""
    ledger = open_ledger(config, create=False)
    row = newest(ledger)[0]
    return show_status(terminal, ledger, row.id, load(row))


def pause(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Stop before the next wave."""
    ledger = open_ledger(config, create=False)
    said = f"paused by {getpass.getuser()}: {reason}"
    row = change(ledger, newest(ledger)[0], lambda r: machine.pause(r, reason=said, now=now()), said)
    return show_status(terminal, ledger, row.id, load(row))


def retry(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Give the sites that failed another try."""
    ledger = open_ledger(config, create=False)
    row = newest(ledger)[0]
    said = f"retried by {getpass.getuser()}: {reason}"
    row = change(ledger, row, lambda r: machine.retry(r, now=now()), said)
    return show_status(terminal, ledger, row.id, load(row))


def override(config: Config, terminal: Terminal, *, reason: str, who: str | None = None) -> int:
    """One person's wish to go on in spite of a hold; two people's count, for a while."""
    ledger = open_ledger(config, create=False)
    row, person = newest(ledger)[0], who or getpass.getuser()
    said = f"override by {person}: {reason}"
    row = change(ledger, row, lambda r: machine.override(r, who=person, reason=reason, now=now()), said)
    if machine.override_active(load(row), now()):
        row = reconcile(config, ledger, row, terminal)
    return show_status(terminal, ledger, row.id, load(row))


def abort(config: Config, terminal: Terminal, *, reason: str) -> int:
    """End the running rollout and take every promoted site back."""
    ledger = open_ledger(config, create=False)
    row = newest(ledger)[0]
    if Status(row.status) in machine.TERMINAL:
        raise ValueError(
            f"{row.id} is {row.status}, there is nothing to abort; `palisade rollout rollback` undoes it"
        )
    row = roll_back_now(config, ledger, row, terminal, who=getpass.getuser(), reason=reason)
    return show_status(terminal, ledger, row.id, load(row))


def rollback(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Undo the newest rollout that promoted anything."""
    ledger = open_ledger(config, create=False)
    never = {Status.SUPERSEDED, Status.EXPIRED, Status.PLANNED}
    row = next((r for r in newest(ledger) if Status(r.status) not in never), None)
    if row is None:
        raise ValueError("no rollout has promoted anything; see `palisade rollout status`")
    row = roll_back_now(config, ledger, row, terminal, who=getpass.getuser(), reason=reason)
    return show_status(terminal, ledger, row.id, load(row))


def tick_running(config: Config, ledger: Ledger, terminal: Terminal) -> None:
    """Move the running rollout on, if there is one; ``cycle`` calls it. A paused one may still have to be rolled back."""
    for row in ledger.plans.rollouts():
        if Status(row.status) in RUNNING | {Status.PAUSED}:
            row = _joined(config, ledger, row, terminal)
            record(config, ledger, reconcile(config, ledger, row, terminal), terminal)


def _go_on(config: Config, ledger: Ledger, row: RolloutRow, terminal: Terminal, *, watch: bool) -> int:
    row = reconcile(config, ledger, _joined(config, ledger, row, terminal), terminal)
    while watch and load(row).status in RUNNING - {Status.HOLD}:
        time.sleep(POLL_SECONDS)
        row = reconcile(config, ledger, row, terminal)
    record(config, ledger, row, terminal)
    code = show_status(terminal, ledger, row.id, load(row))
    return Exit.GUARD_FAILED if Status(row.status) in {Status.ROLLING_BACK, Status.ROLLED_BACK} else code


def _joined(config: Config, ledger: Ledger, row: RolloutRow, terminal: Terminal) -> RolloutRow:
    """With the sites that came after the plan."""
    current = load(row)
    new = joiners(config, ledger, terminal, row.id, current)
    if not new:
        return row
    listed = ", ".join(sorted(new)[:3])
    said = f"{len(new)} sites joined: {listed}"
    return save(ledger, row, machine.join(current, count=len(new)), said, at=now(), joined=new)


def _approved(ledger: Ledger, row: RolloutRow, who: str) -> RolloutRow:
    return change(
        ledger,
        row,
        lambda r: machine.approve(r, hash=row.plan_hash, who=who, now=now()),
        f"approved by {who}",
    )


def _named(ledger: Ledger, plan_hash: str) -> RolloutRow:
    """The newest rollout, if it has this plan."""
    row = newest(ledger)[0]
    if len(plan_hash) < 8 or not row.plan_hash.startswith(plan_hash):
        raise ValueError(
            f"plan hash {plan_hash!r}: the newest plan is {row.plan_hash[:8]} ({row.id}); "
            "look at `palisade rollout diff`, then apply that"
        )
    return row


def _rebase(config: Config, ledger: Ledger, terminal: Terminal, version: int) -> Rebased:
    from jobs.rollout.rebase import rebase_fleet  # Ray loads only for a plan that fits states anew

    return rebase_fleet(config, ledger, terminal, version=version)
