"""Killed shards change nothing: every offset counts once, states are those of an undisturbed run.

A shard process does what a Ray actor does: ``adapt_sites`` on one call after another. Instants are random
with fixed seeds; the assertions hold whichever instant is hit.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import torch

from pipeline.cluster import fleet
from tests.support.crowds import (
    DAYS,
    FORK,
    HOSTILE,
    INSTANTS,
    QUIET,
    SITES,
    STALE,
    Crowd,
    States,
    assert_same,
    copy_crowd,
    dealt,
    new_crowd,
    undisturbed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from pipeline.ledger import Cycle

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]
KILLED = -signal.SIGKILL
ORDER = ("a blob under its temporary name", *(name for name in INSTANTS if "temporary" not in name))
EXACT, RANDOM, PAIRED, RAY = 36, 44, 24, 12  # kills at least
PER_RUN = 6  # kills of Ray's shards: one that dies with a site alone five times gives the site up
SHARD_SECONDS = 1.5  # that a shard of Ray lives at most when it is to be killed


@dataclass(frozen=True)
class Born:
    """A crowd to copy, and what becomes of it when nobody is killed."""

    crowd: Crowd
    states: States
    seconds: float  # of a process that adapts a day

    def days(self, folder: Path, enough: Callable[[], bool]) -> Iterator[tuple[Crowd, Cycle]]:
        """Days to adapt, crowd after crowd until ``enough``; each must end in the undisturbed states (I7)."""
        for k in itertools.count():
            crowd = copy_crowd(self.crowd, folder / str(k))
            for day in range(DAYS):
                crowd.arrive(day)
                yield crowd, crowd.begin()
                cycle = crowd.newest()
                crowd.finish(cycle)
            assert_same(crowd.states(), self.states)
            crowd.ledger.close()
            if enough():
                return


@pytest.fixture(scope="module")
def born(tmp_path_factory) -> Born:
    root = tmp_path_factory.mktemp("crowd")
    (root / "template").mkdir()
    crowd = new_crowd(root / "template")
    undisturbed(copy_crowd(crowd, root / "warm"))  # starts the process that all others are forked from
    began = time.monotonic()
    states = undisturbed(copy_crowd(crowd, root / "calm"))
    return Born(crowd, states, (time.monotonic() - began) / DAYS)


def test_every_site_learns_and_a_hostile_one_stays_alone(born, tmp_path):
    """I9, and that bit-equality says something: each day moves each state."""
    for site in SITES:
        days = [state["site.gamma"] for (s, _), state in sorted(born.states.items()) if s == site]
        assert len(days) == DAYS
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(days))
        assert all(bool(torch.isfinite(d).all()) for d in days), site
    (tmp_path / "clean").mkdir()
    clean = undisturbed(new_crowd(tmp_path / "clean", hostile=False))
    assert_same(clean, born.states, without=[HOSTILE])
    hit = [key for key in clean if key[0] == HOSTILE]
    assert all(not torch.equal(clean[key]["site.gamma"], born.states[key]["site.gamma"]) for key in hit)


def test_killed_at_exact_instants(born, tmp_path):
    rng, kills = np.random.default_rng(1), Counter[str]()
    for crowd, cycle in born.days(tmp_path, lambda: kills.total() >= EXACT):
        for instant in ORDER:
            child = crowd.start(cycle, dealt(rng), instant=(instant, int(rng.integers(1, 4))))
            child.join()
            assert child.exitcode == KILLED, instant
            kills[instant] += 1
            crowd.check(cycle)
        complete(crowd, cycle, rng)
    assert kills.total() >= EXACT


def test_killed_at_random_instants(born, tmp_path):
    rng, kills = np.random.default_rng(2), Counter[str]()
    for crowd, cycle in born.days(tmp_path, lambda: kills.total() >= RANDOM):
        ended = False
        while not ended:
            child = crowd.start(cycle, dealt(rng))
            child.join(rng.uniform(0, born.seconds))
            child.kill()
            child.join()
            assert child.exitcode in (0, KILLED)
            ended = child.exitcode == 0
            kills["shard"] += not ended
            crowd.check(cycle)
    assert kills.total() >= RANDOM


def test_two_at_once_on_the_same_sites(born, tmp_path):
    rng, kills = np.random.default_rng(3), Counter[str]()
    for crowd, cycle in born.days(tmp_path, lambda: kills.total() >= PAIRED):
        ended = False
        while not ended:
            pair = [crowd.start(cycle, dealt(rng)) for _ in range(2)]
            began = time.monotonic()
            for child, at in zip(pair, np.sort(rng.uniform(0, 2 * born.seconds, 2)), strict=True):
                child.join(max(0.0, began + at - time.monotonic()))
                child.kill()
                child.join()
                crowd.check(cycle)
            codes = [child.exitcode for child in pair]
            assert set(codes) <= {0, KILLED}
            kills["shard"] += codes.count(KILLED)
            ended = 0 in codes
    assert kills.total() >= PAIRED


def test_a_stale_generation_commits_nothing(born, tmp_path):
    rng, fenced = np.random.default_rng(4), Counter[str]()
    for crowd, old in born.days(tmp_path, lambda: fenced.total() >= DAYS):
        here, there = FORK.Pipe()
        name = next(n for n in ("before a blob", "after a blob", "before a commit") if not fenced[n])
        stale = crowd.start(old, dealt(rng), instant=(name, 2), gate=there)
        assert here.recv()
        before, new = crowd.check(old), crowd.begin()
        assert (new.id, new.generation) == (old.id, old.generation + 1)
        here.send(True)
        stale.join()
        assert stale.exitcode == STALE
        assert crowd.check(new) == before
        fenced[name] += 1
        late = crowd.start(new, dealt(rng))  # replaced at any moment, by one that works beside it
        late.join(rng.uniform(0, born.seconds))
        complete(crowd, crowd.begin(), rng)
        late.join()
        assert late.exitcode in (0, STALE)


@pytest.mark.usefixtures("ray_local")
def test_killed_actors(tmp_path):
    born = quiet(tmp_path)
    rng, kills = np.random.default_rng(5), Counter[str]()
    for crowd, cycle in born.days(tmp_path, lambda: kills.total() >= RAY):
        if kills.total() < RAY:
            kills["shard"] += struck(crowd, cycle, rng)
        else:
            complete(crowd, cycle, rng)
    assert kills.total() >= RAY


@pytest.mark.usefixtures("ray_local")
def test_one_damaged_site_does_not_stop_the_others(born, tmp_path):
    crowd = copy_crowd(born.crowd, tmp_path / "damaged")
    crowd.arrive(0)
    broken = next((crowd.d.root / "artifacts" / "features").rglob(f"site={SITES[5]}/*.parquet"))
    broken.write_bytes(b"not parquet")
    cycle = crowd.begin()
    failed = adapt(crowd, cycle)
    assert list(failed) == [SITES[5]]
    assert "ingest" in failed[SITES[5]]
    assert crowd.check(cycle) == set(SITES) - {SITES[5]}


def quiet(folder: Path) -> Born:
    """A crowd without gradients, which need four seconds of imports in each new worker."""
    (folder / "template").mkdir()
    crowd = new_crowd(folder / "template", QUIET)
    return Born(crowd, undisturbed(copy_crowd(crowd, folder / "calm")), 0.0)


def adapt(crowd: Crowd, cycle: Cycle, *, on_shard: Callable[[int], None] | None = None) -> dict[str, str]:
    bank = crowd.d.config.bank
    pending = {s.site: s.ingested_offset - s.learned_offset for s in crowd.ledger.streams.sites()}
    placement = fleet.Placement(shards=2, cpus=1, slots=bank.slots, cache_mb=bank.cache_mb)
    return fleet.run_fleet(
        crowd.job(cycle), pending, placement=placement, on_progress=lambda *_: None, on_shard=on_shard
    )


def struck(crowd: Crowd, cycle: Cycle, rng: np.random.Generator) -> int:
    """Adapt under Ray while the first shards are killed → how many were."""
    waits = rng.uniform(0, SHARD_SECONDS, PER_RUN).tolist()
    strikes: list[Future[bool]] = []

    def strike(pid: int, wait: float) -> bool:
        time.sleep(wait)
        try:
            process = psutil.Process(pid)
            if not any("Shard" in part for part in process.cmdline()):
                return False
            process.kill()
        except psutil.NoSuchProcess:
            return False
        crowd.check(cycle)
        return True

    with ThreadPoolExecutor(PER_RUN) as pool:

        def joined(pid: int) -> None:
            if waits:
                strikes.append(pool.submit(strike, pid, waits.pop()))

        assert adapt(crowd, cycle, on_shard=joined) == {}
        return sum(s.result() for s in strikes)


def complete(crowd: Crowd, cycle: Cycle, rng: np.random.Generator) -> None:
    child = crowd.start(cycle, dealt(rng))
    child.join()
    assert child.exitcode == 0
