"""Wraps the work on many sites in an actor; it holds no truth, so killing it at any time is safe."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import ray
import torch

from pipeline.control.adapt import ShardJob, adapt_sites

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray.actor import ActorClass


class Shard:
    """Runs ``adapt_sites`` on one torch thread, since a node holds one shard per core."""

    def __init__(self, job: ShardJob) -> None:
        torch.set_num_threads(1)
        self.job = job

    def pid(self) -> int:
        """Returns the process id, for operators and chaos tests."""
        return os.getpid()

    def run(self, sites: Sequence[str]) -> dict[str, str]:
        """Adapts ``sites``; see ``adapt_sites``."""
        return adapt_sites(self.job, sites)


def remote_shard(*, cpus: float, memory_bytes: int) -> ActorClass:
    """Returns the actor class with its share of a node; ``fleet`` replaces a dead shard, Ray does not."""
    actor_class = cast("ActorClass", ray.remote(Shard))
    return actor_class.options(num_cpus=cpus, memory=memory_bytes, max_restarts=0)
