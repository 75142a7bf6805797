"""What moving a fleet costs, durable and audited: every step decided by the state machine and carried out in
the ledger.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING

from jobs.bench.rollout import fleet
from pipeline import rollout as machine
from pipeline.control.health import observe_rollback
from pipeline.control.rollout import load, save, step
from pipeline.ledger import Ledger
from pipeline.rollout import IN_ROLLBACK, TERMINAL, Observation, SiteFacts, Status, WaveObservation
from pipeline.simulate import cloned_sites as crowd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.ledger import RolloutRow
    from pipeline.rollout import Candidate, Rollout, RolloutConfig

START = datetime(2026, 3, 2, tzinfo=UTC)
SINGLE = 300  # sites that are served one commit each


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Control:
    """One size of fleet; of several repetitions the median."""

    sites: int
    plan: Cost  # made and stored
    waves: Cost  # from approved to completed
    back: Cost  # from the wish to rolled back
    single: float  # seconds per site of one commit each


class Clock:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Cost:
        return Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def measure(config: RolloutConfig, folder: Path, *, sites: int, repeat: int) -> Control:
    """Release to ``sites`` and take it back, ``repeat`` times, each on a fresh copy of the same ledger."""
    origin, candidates = _ground(folder, sites)
    runs: list[tuple[Cost, Cost, Cost]] = []
    single = float("nan")
    for _ in range(repeat):
        path = _copied(origin, folder / "run.db")
        with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
            runs.append(_run(config, ledger, candidates))
            if len(runs) == repeat:
                single = _one_by_one(ledger, candidates)
    plan, waves, back = (
        Cost(median(c.wall for c in x), median(c.cpu for c in x)) for x in zip(*runs, strict=True)
    )
    return Control(sites, plan, waves, back, single)


def carry(ledger: Ledger, row: RolloutRow, at: datetime) -> tuple[RolloutRow, datetime]:
    """Step a rollout until it ends → when, on a clock on which the next look at a baking wave comes when it
    has baked.
    """
    while (r := load(row)).status not in TERMINAL:
        at = at + timedelta(seconds=r.plan.config.bake_seconds) if r.status == Status.BAKING else at
        before = row.revision
        row, count = step(ledger, row, healthy(ledger, row.id, r), at)
        if not count and row.revision == before:
            raise AssertionError(f"{row.id} is {r.status}: {r.reason}")
    return row, at


def healthy(ledger: Ledger, rollout: str, r: Rollout) -> Observation:
    """Who serves what, as the ledger has it; every site's report is that all is well."""
    if r.wave < 0:
        return Observation()
    last = min(r.wave, len(r.plan.waves) - 1)
    earlier = (WaveObservation(w.sites) for w in r.plan.waves[:last])
    return Observation(waves=(*earlier, ledger.plans.observe_wave(rollout, last, without=())))


def _ground(folder: Path, sites: int) -> tuple[Path, dict[str, Candidate]]:
    """A ledger whose sites all have a candidate that passes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ground.db"
    gone(path)
    names = crowd.names(sites)
    with closing(fleet.found(path, {s: {} for s in names}, START)) as ledger:
        candidates = fleet.learn(ledger, dict.fromkeys(names, 0), START)
    return path, candidates


def _run(config: RolloutConfig, ledger: Ledger, candidates: dict[str, Candidate]) -> tuple[Cost, Cost, Cost]:
    facts = {s: SiteFacts(serving=fleet.SOURCE, candidate=c) for s, c in candidates.items()}
    clock = Clock()
    fleet.planned(ledger, "release-00001", facts, config, START)
    plan = clock.read()
    row = ledger.plans.rollout("release-00001")
    row = save(ledger, row, fleet.approved(load(row), row, START), "approved", at=START)
    clock = Clock()
    row, at = carry(ledger, row, START)
    waves = clock.read()
    _check(ledger, row, Status.COMPLETED, len(candidates))
    clock = Clock()
    row = save(ledger, row, machine.abort(load(row), reason="bench", now=at), "aborted", at=at)
    while load(row).status in IN_ROLLBACK:
        row, _ = step(ledger, row, observe_rollback(ledger, row.id, load(row)), at)
    back = clock.read()
    _check(ledger, row, Status.ROLLED_BACK, 0)
    return plan, waves, back


def _one_by_one(ledger: Ledger, candidates: dict[str, Candidate]) -> float:
    """Seconds per site when every promotion is a commit of its own,
    on the fleet that was just rolled back.
    """
    names = list(candidates)[:SINGLE]
    started = time.perf_counter()
    for site in names:
        ledger.releases.serve(
            {site: candidates[site].to}, rollout="single", wave=1, kind="promote", reason="", now=START
        )
    return (time.perf_counter() - started) / len(names)


def _check(ledger: Ledger, row: RolloutRow, status: Status, on: int) -> None:
    """A figure counts only for a run that did its work, and that the audit chain covers."""
    r: Rollout = load(row)
    serving = sum(s.state is not None for s in ledger.releases.serving().values())
    if r.status != status or serving != on or ledger.audit.first_broken() is not None:
        raise AssertionError(f"{row.id} is {r.status}, {serving} sites serve it: {r.reason}")


def _copied(origin: Path, path: Path) -> Path:
    gone(path)
    shutil.copyfile(origin, path)
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return path


def gone(path: Path) -> None:
    """Without the ledger at ``path``, and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def as_context(found: Sequence[Control]) -> dict[str, object]:
    """Everything that was timed, in seconds."""
    return {
        str(c.sites): {
            "plan": round(c.plan.wall, 4),
            "waves": round(c.waves.wall, 4),
            "waves_cpu": round(c.waves.cpu, 4),
            "rollback": round(c.back.wall, 4),
            "rollback_cpu": round(c.back.cpu, 4),
            "one_commit_per_site": round(c.single, 6),
        }
        for c in found
    }
