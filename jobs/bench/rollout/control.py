"""Times releases that go out and come back, every step decided, audited and durable in the ledger."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from pipeline.rollout import TERMINAL, Observation, Status, WaveObservation
from pipeline.simulate import cloned_sites
from pipeline.simulate.release_fleet import LedgerFleet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipeline.rollout import Candidate, RolloutConfig

START = datetime(2026, 3, 2, tzinfo=UTC)
SINGLE = 300  # sites that are served one commit each


class Cost(NamedTuple):
    """Wall and CPU seconds."""

    wall: float
    cpu: float


class Control(NamedTuple):
    """The costs of one size of fleet, of several repetitions the median."""

    sites: int
    plan: Cost  # made and stored
    waves: Cost  # from approved to completed
    back: Cost  # from the wish to rolled back
    single: float  # seconds per site of one commit each


def measure(config: RolloutConfig, folder: Path, *, sites: int, repeat: int) -> Control:
    """Releases to ``sites`` and takes it back, ``repeat`` times, each on a fresh copy of the same ledger."""
    folder.mkdir(parents=True, exist_ok=True)
    ground, tags = folder / "ground.db", {s: {} for s in cloned_sites.names(sites)}
    delete(ground)
    with closing(LedgerFleet.create(f"sqlite:///{ground}", tags, START)) as fleet:
        candidates = fleet.learn(dict.fromkeys(tags, 0))
    runs, single = list[tuple[Cost, Cost, Cost]](), float("nan")
    for _ in range(repeat):
        delete(copy := folder / "run.db")
        shutil.copyfile(ground, copy)
        with copy.open("rb") as f:
            os.fsync(f.fileno())
        with closing(LedgerFleet(f"sqlite:///{copy}", tags, START)) as fleet:
            runs.append(_run(config, fleet, candidates))
            single = _one_by_one(fleet, candidates) if len(runs) == repeat else single
    medians = (Cost(median(c.wall for c in x), median(c.cpu for c in x)) for x in zip(*runs, strict=True))
    return Control(sites, *medians, single=single)


def delete(path: Path) -> None:
    """Deletes the ledger at ``path``, and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _run(
    config: RolloutConfig, fleet: LedgerFleet, candidates: Mapping[str, Candidate]
) -> tuple[Cost, Cost, Cost]:
    facts = fleet.facts(list(candidates), candidates, ())
    at = [_clock()]
    fleet.plan(facts, config)
    at.append(_clock())
    fleet.approve("ann", "ben")
    at.append(_clock())
    _carry(fleet)
    at.append(_clock())
    _check(fleet, Status.COMPLETED, len(candidates))
    at.append(_clock())
    fleet.roll_back("bench")
    at.append(_clock())
    _check(fleet, Status.ROLLED_BACK, 0)
    plan, waves, back = (Cost(b.wall - a.wall, b.cpu - a.cpu) for a, b in zip(at[::2], at[1::2], strict=True))
    return plan, waves, back


def _clock() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


def _carry(fleet: LedgerFleet) -> None:
    """Steps until the rollout ends; a baking wave is looked at again when it has baked."""
    while (r := fleet.r).status not in TERMINAL:
        fleet.now += timedelta(seconds=r.plan.config.bake_seconds if r.status == Status.BAKING else 0)
        before, observation = fleet.row.revision, Observation()
        if r.wave >= 0:  # every site's report is that all is well
            last = min(r.wave, len(r.plan.waves) - 1)
            newest = fleet.ledger.plans.observe_wave(fleet.row.id, last, without=())
            observation = Observation(
                waves=(*(WaveObservation(w.sites) for w in r.plan.waves[:last]), newest)
            )
        if not fleet.step(observation) and fleet.row.revision == before:
            raise AssertionError(f"{fleet.row.id} is {r.status}: {r.reason}")


def _one_by_one(fleet: LedgerFleet, candidates: Mapping[str, Candidate]) -> float:
    """Returns the seconds per site where every promotion is a commit of its own, on the fleet as it is."""
    names = list(candidates)[:SINGLE]
    release, started = {"rollout": "single", "wave": 1, "kind": "promote", "reason": ""}, time.perf_counter()
    for site in names:
        fleet.ledger.releases.serve({site: candidates[site].to}, now=START, **release)
    return (time.perf_counter() - started) / len(names)


def _check(fleet: LedgerFleet, status: Status, on: int) -> None:
    """Raises AssertionError for a run that did not do its work, or that the audit chain does not cover."""
    serving = sum(s.state is not None for s in fleet.ledger.releases.serving().values())
    if fleet.r.status != status or serving != on or fleet.ledger.audit.first_broken() is not None:
        raise AssertionError(
            f"{fleet.row.id} is {fleet.r.status}, {serving} sites serve it: {fleet.r.reason}"
        )
