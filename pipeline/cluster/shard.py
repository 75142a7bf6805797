"""The actor in which many sites are adapted and judged; it holds no truth, so killing it at any time is safe."""

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
    """The actor around ``adapt_sites``; torch runs on one thread in it, since a node holds one shard per core."""

    def __init__(self, job: ShardJob) -> None:
        torch.set_num_threads(1)
        self.job = job

    def pid(self) -> int:
        """Process id, for operators and chaos tests."""
        return os.getpid()

    def run(self, sites: Sequence[str]) -> dict[str, str]:
        """Adapt ``sites``; see ``adapt_sites``."""
        return adapt_sites(self.job, sites)


def remote_shard(*, cpus: float, memory_bytes: int) -> ActorClass:
    """The actor class with its share of a node; a dead shard is replaced by ``fleet``, not restarted by Ray."""
    made = cast("ActorClass", ray.remote(Shard))
    return made.options(num_cpus=cpus, memory=memory_bytes, max_restarts=0)
