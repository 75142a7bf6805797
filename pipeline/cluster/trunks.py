"""Makes features in the tasks and actors of ingest.

It imports neither the ledger nor, for a trunk that has its graph, torch: a worker that starts takes its time
from the cores that decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from pipeline.data.featurise import add_features, load_trunk
from pipeline.data.segments import decode_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from pipeline.data.featurise import Featurise
    from pipeline.data.segments import Columns


def decode_and_featurise(
    batch: dict[str, np.ndarray], *, limits: str, checkpoints: list[str]
) -> Iterator[Columns]:
    """Yields what ``decode_batch`` does, with features in place of frames: a task on CPUs alone.

    A chunk of a segment goes through the trunks by itself, so what it gives depends on no other.
    """
    trunks = [task_trunk(c) for c in checkpoints]
    for columns in decode_batch(batch, limits=limits):
        yield add_features(columns, trunks)


class Featuriser:
    """An actor with the trunks on its GPU, for frames that tasks decode."""

    def __init__(self, checkpoints: list[str]) -> None:
        self.trunks = [task_trunk(c) for c in checkpoints]

    def __call__(self, columns: Columns) -> Columns:
        return add_features(columns, self.trunks)


def task_trunk(path: str) -> Featurise:
    """Returns the trunk of the checkpoint ``path``, on the GPU that Ray gave this process, if any."""
    return load_trunk(path, gpu=ray.is_initialized() and bool(ray.get_gpu_ids()))
