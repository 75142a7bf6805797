"""Connects to Ray for the length of a job; this is the only package that imports Ray."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.sections import ClusterConfig

ENVIRONMENT = {  # of this process and of every Ray process that it starts
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # it warns of actors whose arguments lie in the object store
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    # glibc gives freed memory back at once and gets it again, page by page, for the next convolution: up to
    # half of a trunk's time. Workers keep 256 MiB instead.
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
}


class ClusterError(PalisadeError, RuntimeError):
    """Ray cannot be reached or started."""

    exit_code = 5


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """Connects to the Ray at ``address``, or to an embedded cluster that this process owns and ends.

    Inside a process that is connected already (tests, a job that calls another) it does nothing. Raises
    ClusterError.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    local = config.address == "local"
    if (
        local
    ):  # a loopback cluster of one user that nobody else can reach; anything else keeps Ray's token mode
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        if local:
            ray.init(
                address="local",
                num_cpus=config.cpus,
                include_dashboard=False,
                object_store_memory=config.object_store_mb * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=tempfile.mkdtemp(prefix="plsd-"),
            )
        else:
            ray.init(
                address=config.address,
                namespace=config.namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, OSError, RuntimeError, ValueError) as e:
        raise ClusterError(
            f"Ray at {config.address!r}: {' '.join(str(e).split())[:200]}; check cluster.address"
        ) from e
    try:
        yield
    finally:
        ray.shutdown()
