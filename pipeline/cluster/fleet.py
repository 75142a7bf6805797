"""Drive the shards over the fleet: hand out chunks of sites, survive the death of any of them, isolate what breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.cluster.shard import Shard, ShardJob

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ray.actor import ActorClass, ActorHandle, ActorProxy

RETRIES = 5  # of a chunk whose actor died; a chunk that kills its actor every time is taken apart


def adapt(
    job: ShardJob, sites: Sequence[str], *, shards: int, cpus: float, chunk: int,
    on_progress: Callable[[int, int], None], on_shards: Callable[[list[int]], None] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Adapt and judge every site in ``sites`` → {site: reason} of those that could not be processed. Needs a connected Ray.

    ``on_shards`` is told the process ids. A chunk that breaks is tried site by site, so that one site cannot hide others.
    """
    todo = [list(sites[i : i + chunk]) for i in range(0, len(sites), chunk)]
    remote = cast("ActorClass", ray.remote(Shard)).options(num_cpus=cpus, max_restarts=-1, max_task_retries=RETRIES)
    idle = [remote.remote(job) for _ in range(min(shards, max(len(todo), 1)))]
    if on_shards:
        on_shards(ray.get([a.pid.remote() for a in idle]))
    running: dict[ray.ObjectRef, tuple[ActorProxy[Shard], list[str]]] = {}
    failed: dict[str, str] = {}
    done = 0
    on_progress(0, len(sites))
    while todo or running:
        while todo and idle:
            actor, part = idle.pop(), todo.pop(0)
            running[actor.adapt.remote(part)] = (actor, part)
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor, part = running.pop(ready)
        try:
            failed |= ray.get(ready)
            done += len(part)
        except RayTaskError as e:
            cause = e.cause if isinstance(e.cause, Exception) else e
            if type(cause).__name__ in ("StaleGeneration", "LedgerUnavailable"):
                raise cause from None
            done += _take_apart(part, todo, failed, f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
        except RayActorError:
            actor = remote.remote(job)
            done += _take_apart(part, todo, failed, "its shard died every time it was adapted")
        idle.append(actor)
        on_progress(done, len(sites))
    for actor in idle:
        ray.kill(cast("ActorHandle", actor))
    return failed


def _take_apart(part: list[str], todo: list[list[str]], failed: dict[str, str], reason: str) -> int:
    """Queue the sites of a broken chunk one by one; a chunk of one is given up → how many were given up."""
    if len(part) > 1:
        todo.extend([site] for site in part)
        return 0
    failed[part[0]] = reason
    return 1
