"""Runs the trunks in the tasks and actors of ingest.

It imports neither the ledger nor, for a trunk that has its graph, torch: a worker that starts takes its time
from the cores that decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from pipeline.data.featurise import add_features, load_trunk

if TYPE_CHECKING:
    from pipeline.data.featurise import Featurise
    from pipeline.data.segments import Columns


class Featuriser:
    """An actor of the pool: the trunks, on its GPU where it has one."""

    def __init__(self, checkpoints: list[str]) -> None:
        self.trunks = [task_trunk(c) for c in checkpoints]

    def __call__(self, columns: Columns) -> Columns:
        return add_features(columns, self.trunks)


def featurise(columns: Columns, *, checkpoints: list[str]) -> Columns:
    """Replaces frames by features in a task; its worker keeps the trunks for the next one."""
    return add_features(columns, [task_trunk(c) for c in checkpoints])


def task_trunk(path: str) -> Featurise:
    """Returns the trunk of the checkpoint ``path``, on the GPU that Ray gave this process, if any."""
    return load_trunk(path, gpu=ray.is_initialized() and bool(ray.get_gpu_ids()))
