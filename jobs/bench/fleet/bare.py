"""The floor that ingest is held against: a process per core that decodes its share and runs the trunk.

It imports as little as the workers of ingest do, because its processes start within the time.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import TYPE_CHECKING

import cv2

from pipeline.data.captures import read_segment
from pipeline.data.featurise import compute_features, load_trunk
from pipeline.data.segments import decode_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.data import DataConfig


def rate(limits: DataConfig, paths: Sequence[Path], *, checkpoint: str) -> float:
    """Returns the captures per second that all cores make features of; nothing is stored."""
    cores = len(os.sched_getaffinity(0))
    began, spawn = time.perf_counter(), multiprocessing.get_context("spawn")
    with spawn.Pool(cores) as pool:
        shares = [(limits, paths[i::cores], checkpoint) for i in range(cores)]
        count = sum(pool.starmap(_featurise, shares, chunksize=1))
        return count / (time.perf_counter() - began)


def _featurise(limits: DataConfig, paths: Sequence[Path], checkpoint: str) -> int:
    cv2.setNumThreads(1)
    count, trunk = 0, load_trunk(checkpoint)
    for path in paths:
        good = read_segment(path, site=path.parent.name, limits=limits).good
        for chunk in decode_chunks(good, limits.frame_px):
            count += len(compute_features(trunk, chunk.pixels, chunk.present))
    return count
