"""``palisade rollout``: carry out what ``pipeline.rollout`` decides; rolling back needs nothing but the ledger."""

from __future__ import annotations

import getpass
import time
from typing import TYPE_CHECKING

from jobs import Exit, table
from jobs.deployment import now, open_ledger
from jobs.waves import name_of, show_plan, show_status
from pipeline import rollout as machine
from pipeline.guards import assess
from pipeline.ledger import StaleGeneration
from pipeline.rollout import Candidate, HealthReport, Pointer, Rollout, SiteFacts, Status, WaveEvidence

if TYPE_CHECKING:
    from jobs import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, RolloutRow, ServingRow

RUNNING = machine.FLYING | {Status.APPROVED, Status.ABORTING, Status.ROLLING_BACK}
POLL_SECONDS = 0.5
OVERTAKEN = 5  # times that a rollback tries again after a tick that was faster


def plan(config: Config, terminal: Terminal) -> int:
    """Plan a release of every site's newest candidate that passes under today's limits."""
    ledger = open_ledger(config, create=False)
    busy = next((r for r in ledger.rollouts() if Status(r.status) not in machine.TERMINAL), None)
    if busy and Status(busy.status) != Status.PLANNED:
        raise ValueError(
            f"{busy.id} is {busy.status}; let it end, or `palisade rollout abort` it, before planning the next"
        )
    release = f"release-{len(ledger.rollouts()) + 1:05d}"
    made = machine.plan(release, _facts(config, ledger), ledger.source().version, config.rollout)
    if not made.targets:
        reasons = "; ".join(sorted({e.reason for e in made.excluded.values()})[:3]) or "no site is registered"
        raise ValueError(f"nothing to release: {reasons}; run `palisade cycle` first")
    if busy:
        _save(ledger, busy, machine.supersede(_load(busy), by="a newer plan", now=now()), "superseded by a newer plan")
    started = machine.start(made, now())
    ledger.save_rollout(
        release, plan_hash=started.plan_hash, status=started.status, body=started.model_dump_json(), revision=0,
        event={"event": "planned", "sites": len(made.targets)}, now=now(),
    )  # fmt: skip
    show_plan(terminal, started)
    return Exit.DONE


def diff(config: Config, terminal: Terminal) -> int:
    """What the newest plan would change against what is served, and against the plan before it."""
    ledger = open_ledger(config, create=False)
    rows = _newest(ledger)
    current, serving = _load(rows[0]), ledger.serving()
    changes = [
        [site, name_of(_pointer(ledger, serving.get(site))), name_of(target.to), wave + 1]
        for wave, w in enumerate(current.plan.waves) for site in w.sites
        if (target := current.plan.targets[site]).to != _pointer(ledger, serving.get(site))
    ]  # fmt: skip
    parts = [
        table(
            f"{rows[0].id} against what is served: {len(changes)} sites change",
            ["site", "serves", "would serve", "wave"],
            changes,
        )
    ]
    against = machine.diff(_load(rows[1]).plan, current.plan).model_dump() if len(rows) > 1 else None
    if against:
        parts.append(
            table(
                f"against {rows[1].id}",
                ["", "sites"],
                [[k, ", ".join(map(str, v)) or None] for k, v in against.items()],
            )
        )
    listed = [dict(zip(("site", "serves", "would_serve", "wave"), c, strict=True)) for c in changes]
    terminal.result({"release": rows[0].id, "changes": listed, "previous": against}, *parts)
    return Exit.DONE


def apply(config: Config, terminal: Terminal, *, plan_hash: str, watch: bool) -> int:
    """Approve the plan with this hash (or resume it when it is paused) and move it on."""
    ledger = open_ledger(config, create=False)
    row = _newest(ledger)[0]
    if len(plan_hash) < 8 or not row.plan_hash.startswith(plan_hash):
        raise ValueError(
            f"plan hash {plan_hash!r}: the newest plan is {row.plan_hash[:8]} ({row.id}); "
            "look at `palisade rollout diff`, then apply that"
        )
    if Status(row.status) == Status.PLANNED:
        row = _tick(config, ledger, row, terminal)  # it may have expired
    current = _load(row)
    who = getpass.getuser()
    if current.status == Status.PLANNED:
        row = _save(ledger, row, machine.approve(current, hash=row.plan_hash, who=who, now=now()), f"approved by {who}")
    elif current.status == Status.PAUSED:
        row = _save(ledger, row, machine.resume(current, now=now()), f"resumed by {who}")
    elif current.status in machine.TERMINAL:
        raise ValueError(f"{row.id} is {row.status}; plan a new release")
    row = _tick(config, ledger, row, terminal)
    while watch and _load(row).status in RUNNING - {Status.HOLD}:
        time.sleep(POLL_SECONDS)
        row = _tick(config, ledger, row, terminal)
    _record(config, ledger, row, terminal)
    code = _show(terminal, ledger, row)
    return Exit.GUARD_FAILED if Status(row.status) in {Status.ROLLING_BACK, Status.ROLLED_BACK} else code


def status(config: Config, terminal: Terminal) -> int:
    """Where the newest rollout stands."""
    ledger = open_ledger(config, create=False)
    return _show(terminal, ledger, _newest(ledger)[0])


def pause(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Stop before the next wave."""
    ledger = open_ledger(config, create=False)
    row = _newest(ledger)[0]
    row = _save(
        ledger, row, machine.pause(_load(row), reason=reason, now=now()), f"paused by {getpass.getuser()}: {reason}"
    )
    return _show(terminal, ledger, row)


def abort(config: Config, terminal: Terminal, *, reason: str) -> int:
    """End the running rollout and take every promoted site back."""
    ledger = open_ledger(config, create=False)
    row = _newest(ledger)[0]
    if Status(row.status) in machine.TERMINAL:
        raise ValueError(f"{row.id} is {row.status}, there is nothing to abort; `palisade rollout rollback` undoes it")
    return _go_back(ledger, terminal, row, reason)


def rollback(config: Config, terminal: Terminal, *, reason: str) -> int:
    """Undo the newest rollout that promoted anything."""
    ledger = open_ledger(config, create=False)
    row = next(
        (r for r in _newest(ledger) if Status(r.status) not in {Status.SUPERSEDED, Status.EXPIRED, Status.PLANNED}),
        None,
    )
    if row is None:
        raise ValueError("no rollout has promoted anything; see `palisade rollout status`")
    return _go_back(ledger, terminal, row, reason)


def tick_running(config: Config, ledger: Ledger, terminal: Terminal) -> None:
    """Move the running rollout on, if there is one; ``cycle`` calls it. A paused one may still have to be rolled back."""
    for row in ledger.rollouts():
        if Status(row.status) in RUNNING | {Status.PAUSED}:
            _record(config, ledger, _tick(config, ledger, row, terminal), terminal)


def _facts(config: Config, ledger: Ledger) -> dict[str, SiteFacts]:
    """What the plan needs of each site; a verdict counts only if its evidence passes under today's limits as well."""
    latest, serving = ledger.latest_verdicts(), ledger.serving()
    good = ledger.served_by([r.id for r in ledger.rollouts() if r.status == Status.COMPLETED])
    rows = ledger.sites()
    controls = set(machine.choose_controls({r.site: r.tags for r in rows}, config.rollout))
    champion = ledger.source().version
    states = ledger.states([v.state for v in latest.values()])
    facts: dict[str, SiteFacts] = {}
    for row in rows:
        verdict, served = latest.get(row.site), serving.get(row.site)
        candidate = None
        if verdict and verdict.state and states[verdict.state].source_version == champion:
            again = assess(config.guards, verdict.evidence)
            outcome = again.outcome if verdict.outcome == "pass" else verdict.outcome
            to = Pointer(state_id=verdict.state, source_version=champion)
            candidate = Candidate(to=to, verdict_id=verdict.id, outcome=outcome, reason=verdict.verdict.decisive)
        elif verdict:
            here = Pointer(state_id=None, source_version=champion)
            candidate = Candidate(
                to=here, verdict_id=verdict.id, outcome=verdict.outcome, reason=verdict.verdict.decisive
            )
            candidate = candidate if verdict.outcome != "pass" else None
        last_good = good.get(row.site)
        facts[row.site] = SiteFacts(
            serving=_pointer(ledger, served), candidate=candidate, control=row.site in controls,
            last_good=_pointer(ledger, last_good) if last_good else None,
        )  # fmt: skip
    return facts


def _tick(config: Config, ledger: Ledger, row: RolloutRow, terminal: Terminal) -> RolloutRow:
    """Ask the state machine and do what it says until it has nothing more to do now."""
    while True:
        current = _load(row)
        at = now()
        serving = _serving(ledger, current)
        evidence = WaveEvidence(serving=serving, health=_health(config, ledger, current, serving))
        new, actions = machine.advance(current, evidence, at)
        _perform(ledger, row, new, actions)
        if new != current:
            row = _save(ledger, row, new, _said(current, new))
            terminal.say(f"{row.id}: {_said(current, new)}")
        moving = [a for a in actions if a.kind != "notify"]
        if not moving and new.status == current.status and new.wave == current.wave:
            return row


def _go_back(ledger: Ledger, terminal: Terminal, row: RolloutRow, reason: str) -> int:
    """Abort and roll back at once: reads no health, waits for nothing, and comes back when a tick got in between."""
    who = getpass.getuser()
    for _ in range(OVERTAKEN):
        try:
            row = _save(
                ledger, row, machine.abort(_load(row), reason=f"{who}: {reason}", now=now()), f"aborted by {who}"
            )
            while _load(row).status in {Status.ABORTING, Status.ROLLING_BACK}:
                current = _load(row)
                new, actions = machine.advance(current, WaveEvidence(serving=_serving(ledger, current)), now())
                _perform(ledger, row, new, actions)
                row = _save(ledger, row, new, _said(current, new)) if new != current else row
            break
        except StaleGeneration:
            row = next(r for r in ledger.rollouts() if r.id == row.id)
    return _show(terminal, ledger, row)


def _record(config: Config, ledger: Ledger, row: RolloutRow, terminal: Terminal) -> None:
    """The ended rollout's run in MLflow; that it is out of reach costs the run, never the rollout."""
    if Status(row.status) not in machine.TERMINAL:
        return
    from pipeline.lineage import Lineage, LineageError
    from pipeline.revision import code_revision

    r = _load(row)
    tags = {"plan": row.plan_hash, "status": row.status, "reason": r.reason, "source.version": ledger.source().version}
    try:
        lineage = Lineage.open(config.lineage, code_revision=code_revision())
        with lineage.run("rollout", row.id, params={}, tags=tags, key=row.id) as run:
            run.metrics({"sites": len(r.plan.targets), "failed": len(r.failed), "waves": len(r.plan.waves)})
    except LineageError as e:
        terminal.say(f"warning: {e}")


def _perform(ledger: Ledger, row: RolloutRow, r: Rollout, actions: tuple[machine.Action, ...]) -> None:
    """Move the champion pointers of all actions of a kind in one transaction."""
    wave_of = {s: i + 1 for i, w in enumerate(r.plan.waves) for s in w.sites}
    for kind in ("promote", "rollback"):
        by_wave: dict[int, dict[str, tuple[str | None, int]]] = {}
        for a in actions:
            if a.kind == kind and a.kind != "notify":
                by_wave.setdefault(wave_of[a.site], {})[a.site] = (a.to.state_id, a.to.source_version)
        for wave, changes in by_wave.items():
            ledger.serve(changes, rollout=row.id, wave=wave, kind=kind, reason=r.reason, now=now(),
                         revision=row.revision)  # fmt: skip


def _health(config: Config, ledger: Ledger, r: Rollout, serving: dict[str, Pointer]) -> dict[str, HealthReport]:
    """Replay each promoted site's recorded red-team presentations through what it serves now."""
    promoted = [s for w in r.plan.waves[: r.wave + 1] for s in w.sites if serving.get(s) == r.plan.targets[s].to]
    if r.status in machine.TERMINAL or not promoted:
        return {}
    from jobs.health import replay_red_team

    return replay_red_team(config, ledger, {s: (r.plan.targets[s].to, r.plan.targets[s].back) for s in promoted})


def _serving(ledger: Ledger, r: Rollout) -> dict[str, Pointer]:
    rows = ledger.serving(list(r.plan.targets))
    return {site: _pointer(ledger, rows.get(site)) for site in r.plan.targets}


def _pointer(ledger: Ledger, served: ServingRow | None) -> Pointer:
    if served is None:
        return Pointer(state_id=None, source_version=ledger.source().version)
    return Pointer(state_id=served.state, source_version=served.source_version)


def _newest(ledger: Ledger) -> list[RolloutRow]:
    rows = ledger.rollouts()
    if not rows:
        raise ValueError("no rollout yet; run `palisade rollout plan` first")
    return rows


def _load(row: RolloutRow) -> Rollout:
    return Rollout.model_validate_json(row.body)


def _save(ledger: Ledger, row: RolloutRow, r: Rollout, event: str) -> RolloutRow:
    ledger.save_rollout(
        row.id, plan_hash=row.plan_hash, status=r.status, body=r.model_dump_json(), revision=row.revision,
        event={"event": event}, now=now(),
    )  # fmt: skip
    return next(x for x in ledger.rollouts() if x.id == row.id)


def _said(before: Rollout, after: Rollout) -> str:
    where = f" wave {after.wave + 1} of {len(after.plan.waves)}" if 0 <= after.wave < len(after.plan.waves) else ""
    reason = f": {after.reason}" if after.reason and after.reason != before.reason else ""
    return f"{after.status}{where}{reason}"


def _show(terminal: Terminal, ledger: Ledger, row: RolloutRow) -> Exit:
    current = _load(row)
    return show_status(terminal, row.id, current, _serving(ledger, current))
