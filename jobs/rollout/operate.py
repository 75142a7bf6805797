"""``palisade rollout``: the commands of people to a release; a rollback needs nothing but the ledger."""

from __future__ import annotations

import getpass
import time
from functools import partial
from typing import TYPE_CHECKING

from jobs.rollout.display import name_of, show_plan, show_status
from jobs.terminal import Exit, table
from pipeline import rollout as machine
from pipeline.control.candidates import candidates, candidates_of_source, pointer
from pipeline.control.deployment import now, open_ledger
from pipeline.control.rollout import (
    RUNNING,
    add_joiners,
    change,
    load,
    newest,
    reconcile,
    record,
    roll_back_now,
    save,
)
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
    """Plans a release of the sites' newest candidates that pass today's limits, or of a new source model."""
    if states not in ("rebase", "reset"):
        raise ValueError(f"--states {states!r}: allowed are rebase and reset")
    ledger = open_ledger(config, create=False)
    busy = next((r for r in ledger.plans.rollouts() if Status(r.status) not in machine.TERMINAL), None)
    if busy and Status(busy.status) != Status.PLANNED:
        end = "let it end, or `palisade rollout abort` it, before planning the next"
        raise ValueError(f"{busy.id} is {busy.status}; {end}")
    release = f"release-{len(ledger.plans.rollouts()) + 1:05d}"
    draft = _draft(config, ledger, terminal, release, source=source, states=states, dry_run=dry_run)
    if not draft.targets:
        reasons = "; ".join(sorted({e.reason for e in draft.excluded.values()})[:3])
        raise ValueError(
            f"nothing to release: {reasons or 'no site is registered'}; run `palisade cycle` first"
        )
    started = machine.start(draft.plan, now())
    if not dry_run:
        if busy:
            over = machine.supersede(load(busy), by="a newer plan", now=now())
            save(ledger, busy, over, over.reason, at=now())
        if source is None:
            # forget the challenger of a source release that ended or was never applied
            ledger.sources.set_challenger(None, now=now())
        ledger.plans.save(
            release,
            plan_hash=started.plan_hash,
            status=started.status,
            body=started.model_dump_json(),
            revision=0,
            event={"event": "planned", "sites": len(draft.targets)},
            now=now(),
            draft=draft,
        )
    show_plan(terminal, started, draft, stored=not dry_run)
    return Exit.DONE


def _draft(
    config: Config,
    ledger: Ledger,
    terminal: Terminal,
    release: str,
    *,
    source: int | None,
    states: str,
    dry_run: bool,
) -> machine.Draft:
    """Returns a plan for the candidates of the sites, or for a move to source model ``source``."""
    champion, shadow = ledger.sources.champion().version, config.guards.shadow
    if source is None:
        facts = candidates(config, ledger, terminal)
        return machine.plan(release, facts, champion, config.rollout, shadow=shadow)
    rebase = partial(_rebase, config, ledger, terminal, source) if states == "rebase" else None
    facts = candidates_of_source(config, ledger, terminal, version=source, rebase=rebase, dry_run=dry_run)
    return machine.plan(release, facts, source, config.rollout, source_before=champion, shadow=shadow)


def diff(config: Config, terminal: Terminal) -> int:
    """Shows the difference of the newest plan to what is served, and to the plan before it."""
    ledger = open_ledger(config, create=False)
    rows = newest(ledger)
    targets, serving = ledger.plans.targets(rows[0].id), ledger.releases.serving()
    served = {site: pointer(ledger, serving.get(site)) for site in targets}
    changes = [
        [site, name_of(served[site]), name_of(t.to), t.wave + 1]
        for site, t in sorted(targets.items(), key=lambda x: (x[1].wave, x[0]))
        if t.to != served[site]
    ]
    title = f"{rows[0].id} against what is served: {len(changes)} sites change"
    parts = [table(title, ["site", "serves", "would serve", "wave"], changes)]
    against = machine.diff(ledger.plans.targets(rows[1].id), targets).model_dump() if len(rows) > 1 else None
    if against:
        listed = [[k, ", ".join(map(str, v)) or None] for k, v in against.items()]
        parts.append(table(f"against {rows[1].id}", ["", "sites"], listed))
    listed_changes = [dict(zip(("site", "serves", "would_serve", "wave"), c, strict=True)) for c in changes]
    terminal.result({"release": rows[0].id, "changes": listed_changes, "previous": against}, *parts)
    return Exit.DONE


def apply(
    config: Config, terminal: Terminal, *, plan_hash: str, who: str | None = None, watch: bool = False
) -> int:
    """Approves the plan with this hash, or resumes it if it is paused, and moves it on."""
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
    """Adds one person's approval; nothing moves before the next step of the rollout."""
    ledger = open_ledger(config, create=False)
    row = _approved(ledger, _named(ledger, plan_hash), who or getpass.getuser())
    return show_status(terminal, ledger, row.id, load(row))


def watch(config: Config, terminal: Terminal) -> int:
    """Moves the newest rollout on until it ends or waits for a person or for data."""
    ledger = open_ledger(config, create=False)
    return _go_on(config, ledger, newest(ledger)[0], terminal, watch=True)


def status(config: Config, terminal: Terminal) -> int:
    """Shows the status of the newest rollout."""
    ledger = open_ledger(config, create=False)
    row = newest(ledger)[0]
    return show_status(terminal, ledger, row.id, load(row))


def pause(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Stops the newest rollout before its next wave."""
    ledger = open_ledger(config, create=False)
    text = f"paused by {getpass.getuser()}: {reason}"
    row = change(ledger, newest(ledger)[0], lambda r: machine.pause(r, reason=text, now=now()), text)
    return show_status(terminal, ledger, row.id, load(row))


def retry(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Gives the sites that failed another try."""
    ledger = open_ledger(config, create=False)
    row = newest(ledger)[0]
    text = f"retried by {getpass.getuser()}: {reason}"
    row = change(ledger, row, lambda r: machine.retry(r, now=now()), text)
    return show_status(terminal, ledger, row.id, load(row))


def override(config: Config, terminal: Terminal, *, reason: str, who: str | None = None) -> int:
    """Adds one person's override of a hold; two persons' overrides count, for a limited time."""
    ledger = open_ledger(config, create=False)
    row, person = newest(ledger)[0], who or getpass.getuser()
    text = f"override by {person}: {reason}"
    row = change(ledger, row, lambda r: machine.override(r, who=person, reason=reason, now=now()), text)
    if machine.override_active(load(row), now()):
        row = reconcile(config, ledger, row, terminal)
    return show_status(terminal, ledger, row.id, load(row))


def abort(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Ends the running rollout and rolls every promoted site back."""
    ledger = open_ledger(config, create=False)
    row = newest(ledger)[0]
    if Status(row.status) in machine.TERMINAL:
        raise ValueError(
            f"{row.id} is {row.status}, there is nothing to abort; `palisade rollout rollback` undoes it"
        )
    row = roll_back_now(config, ledger, row, terminal, who=getpass.getuser(), reason=reason)
    return show_status(terminal, ledger, row.id, load(row))


def rollback(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Rolls back the newest rollout that promoted anything."""
    ledger = open_ledger(config, create=False)
    never = {Status.SUPERSEDED, Status.EXPIRED, Status.PLANNED}
    row = next((r for r in newest(ledger) if Status(r.status) not in never), None)
    if row is None:
        raise ValueError("no rollout has promoted anything; see `palisade rollout status`")
    row = roll_back_now(config, ledger, row, terminal, who=getpass.getuser(), reason=reason)
    return show_status(terminal, ledger, row.id, load(row))


def _go_on(config: Config, ledger: Ledger, row: RolloutRow, terminal: Terminal, *, watch: bool) -> int:
    row = reconcile(config, ledger, add_joiners(config, ledger, row, terminal), terminal)
    while watch and load(row).status in RUNNING - {Status.HOLD}:
        time.sleep(POLL_SECONDS)
        row = reconcile(config, ledger, row, terminal)
    record(config, ledger, row, terminal)
    code = show_status(terminal, ledger, row.id, load(row))
    return Exit.GUARD_FAILED if Status(row.status) in {Status.ROLLING_BACK, Status.ROLLED_BACK} else code


def _approved(ledger: Ledger, row: RolloutRow, who: str) -> RolloutRow:
    return change(
        ledger,
        row,
        lambda r: machine.approve(r, hash=row.plan_hash, who=who, now=now()),
        f"approved by {who}",
    )


def _named(ledger: Ledger, plan_hash: str) -> RolloutRow:
    """Returns the newest rollout if its plan has this hash; raises ValueError otherwise."""
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
