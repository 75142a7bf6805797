"""Drives the shards over the fleet: each site has its shard, shards come and go, a failing site is isolated.

A shard that cannot be placed yet joins when it can; one that dies, with its process or its node, leaves, and
its calls go to idle shards. Every call is safe to repeat (``shard``), so nothing here is durable.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from pipeline.cluster import ClusterError
from pipeline.cluster.shard import remote_shard
from pipeline.control.assign import group_calls, home_shards
from pipeline.ledger import LedgerUnavailable, StaleGeneration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray.actor import ActorHandle, ActorProxy

    from pipeline.config import Config
    from pipeline.control.adapt import ShardJob

RETRIES = 5  # of a site whose shard died; of a shard that does not start
PLACED_SECONDS = 120  # to wait for a first shard before saying that none fits
BASE_MB = 700  # of a shard beside its hot states
DIED = (RayActorError, OutOfMemoryError)  # the latter: killed by its node, which had no memory left


@dataclass(frozen=True)
class Placement:
    """Says how many shards there may be, and what each asks of Ray."""

    shards: int
    cpus: float
    slots: int  # sites stepped together
    cache_mb: int


def placement(config: Config) -> Placement:
    """Returns what the deployment gives its shards."""
    size = config.cluster
    return Placement(size.shards, min(1.0, size.cpus / size.shards), config.bank.slots, config.bank.cache_mb)


@dataclass
class _Work:
    """Holds the calls that are left, by shard, and the failures so far."""

    queues: dict[int, deque[list[str]]]
    died: Counter[str] = field(default_factory=Counter[str])  # deaths while a site was alone in a call
    unstarted: Counter[int] = field(default_factory=Counter[int])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    done: int = 0


def run_fleet(
    job: ShardJob,
    pending: Mapping[str, int],
    *,
    placement: Placement,
    on_progress: Callable[[int, int], None],
    on_shard: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Adapts and judges every site in ``pending`` (→ samples); returns {site: reason} of those that failed.

    Needs a connected Ray. ``on_shard`` gets the process id of every shard that joins. A call that breaks is
    halved until one site is left, so one site cannot hide others.
    """
    work = _planned(pending, placement)
    memory_bytes = (BASE_MB + placement.cache_mb) * 2**20
    shard_class = remote_shard(cpus=placement.cpus, memory_bytes=memory_bytes)
    shards: dict[int, ActorProxy] = {}
    starting: dict[ray.ObjectRef, int] = {}
    running: dict[ray.ObjectRef, tuple[int, list[str]]] = {}

    def start(k: int) -> None:
        shards[k] = shard_class.remote(job)
        starting[shards[k].pid.remote()] = k

    try:
        for k in work.queues:
            start(k)
        on_progress(0, len(pending))
        while running or any(work.queues.values()):
            ready = _next(running, starting, placement)
            if ready in starting:
                free = starting.pop(ready)
                if reason := _joined(ready, free, work, on_shard):
                    if _may_restart(free, work, shards, reason):
                        start(free)
                    continue
            else:
                free, sites = running.pop(ready)
                if not _settled(ready, sites, free, work):
                    start(free)
                on_progress(work.done, len(pending))
            for k in _idle(shards, starting, running):
                if sites := _take(work, k):
                    running[shards[k].run.remote(sites)] = k, sites
    finally:
        for shard in shards.values():
            ray.kill(cast("ActorHandle", shard))
    return work.failed


def _may_restart(k: int, work: _Work, shards: dict[int, ActorProxy], reason: str) -> bool:
    """Returns whether to start the shard again; else it leaves. Raises ClusterError for the last one."""
    if work.unstarted[k] <= RETRIES:
        return True
    if len(shards) == 1:
        raise ClusterError(f"the last shard died {RETRIES} times while it started: {reason}")
    del shards[k]  # its node is sick: its calls go to the others
    return False


def _planned(pending: Mapping[str, int], placement: Placement) -> _Work:
    sites = sorted(pending)
    count = max(1, min(placement.shards, -(-len(sites) // placement.slots)))
    home = home_shards(sites, count)
    by_shard = [
        {s: pending[s] for s, k in zip(sites, home, strict=True) if k == shard} for shard in range(count)
    ]
    return _Work({k: deque(group_calls(part, slots=placement.slots)) for k, part in enumerate(by_shard)})


def _next(
    running: Mapping[ray.ObjectRef, object], starting: Mapping[ray.ObjectRef, object], placement: Placement
) -> ray.ObjectRef:
    ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=None if running else PLACED_SECONDS)
    if not ready:
        has = ray.cluster_resources()
        raise ValueError(
            f"cluster.shards: no shard with {placement.cpus:g} CPU and {BASE_MB + placement.cache_mb} "
            "MiB could be placed; the "
            f"cluster has {has.get('CPU', 0):g} CPU, {has.get('memory', 0) / 2**20:.0f} MiB; ask for "
            "less or add a node"
        )
    return ready[0]


def _joined(ready: ray.ObjectRef, k: int, work: _Work, on_shard: Callable[[int], None] | None) -> str:
    """Returns why the shard has not started; empty if it has."""
    try:
        pid = ray.get(ready)
    except DIED as e:
        work.unstarted[k] += 1
        return " ".join(str(e).split())[:300]
    work.unstarted[k] = 0
    if on_shard:
        on_shard(pid)
    return ""


def _settled(ready: ray.ObjectRef, sites: list[str], k: int, work: _Work) -> bool:
    """Takes in a call's result or its failure; returns whether its shard lives."""
    try:
        work.failed |= ray.get(ready)
        work.done += len(sites)
    except RayTaskError as e:
        cause = e.cause if isinstance(e.cause, Exception) else e
        if isinstance(cause, StaleGeneration | LedgerUnavailable):
            raise cause from None
        _halve(sites, k, work, reason=f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
    except DIED:
        if len(sites) == 1:
            work.died[sites[0]] += 1
        if len(sites) == 1 and work.died[sites[0]] <= RETRIES:
            work.queues[k].appendleft(sites)
        else:
            _halve(sites, k, work, reason="its shard died every time it was adapted")
        return False
    return True


def _halve(sites: list[str], k: int, work: _Work, *, reason: str) -> None:
    if len(sites) == 1:
        work.failed[sites[0]] = reason
        work.done += 1
        return
    middle = len(sites) // 2
    work.queues[k].extendleft([sites[middle:], sites[:middle]])


def _idle(
    shards: Mapping[int, object],
    starting: Mapping[ray.ObjectRef, int],
    running: Mapping[ray.ObjectRef, tuple[int, list[str]]],
) -> list[int]:
    busy = {*starting.values(), *(k for k, _ in running.values())}
    return [k for k in shards if k not in busy]


def _take(work: _Work, k: int) -> list[str]:
    """Returns the shard's own next call, else the last one of the shard with the most left."""
    if work.queues[k]:
        return work.queues[k].popleft()
    longest = max(work.queues.values(), key=len)
    return longest.pop() if longest else []
