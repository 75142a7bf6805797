"""Keeps lineage in MLflow: one run per training, cycle, rollout or search, and source models as versions.

The only ``import mlflow``, called by drivers alone. It is a projection for people: the ledger is the record.
No flavour is used and nothing is pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pipeline.types import PalisadeError

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = (
    "false"  # default true: a pyfunc would run code when loaded
)
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while mlflow is imported
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default keeps a job waiting for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pyarrow as pa
    from mlflow.entities.model_registry import ModelVersion

    from pipeline.sections import LineageConfig

CHARS = 6000  # of a parameter or tag
PROBE_SECONDS = 5.0
WEIGHTS = "model.safetensors"
SQLITE = "sqlite:///"

Kind = Literal["train", "cycle", "rollout", "tune"]
Alias = Literal["champion", "challenger"]
Value = str | int | float | bool | None


class LineageError(PalisadeError, RuntimeError):
    """MLflow cannot be used; one line naming its URI and what to do."""

    exit_code = 5


@dataclass(frozen=True)
class SourceVersion:
    """A registered source model."""

    version: int
    sha256: str  # of model.safetensors
    parent: int | None
    fingerprint: str
    code_revision: str
    data: dict[str, str]  # digest by domain
    aliases: tuple[str, ...]
    run_id: str


@dataclass(frozen=True)
class Run:
    """One MLflow run being written. Get it from ``Lineage.run``."""

    id: str
    resumed: bool
    client: MlflowClient
    place: str  # the URI, as errors show it

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Log the numbers of one step."""
        self.history({name: [(step, value)] for name, value in values.items()})

    def history(self, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Log whole curves, (step, value) by name, batched: single calls are 60 times slower."""
        now = time.time_ns() // 1_000_000
        rows = [
            Metric(_key(name), float(v), now, step) for name, curve in series.items() for step, v in curve
        ]
        with _named(self.place):
            self.client.log_batch(self.id, metrics=rows)

    def params(self, values: Mapping[str, Value]) -> None:
        """Log parameters by dotted name (see ``flat``); they cannot change, so a resumed run keeps what it
        has."""
        with _named(self.place):
            had = self.client.get_run(self.id).data.params
            new = {_key(k): str(v)[:CHARS] for k, v in values.items() if _key(k) not in had}
            self.client.log_batch(self.id, params=[Param(k, v) for k, v in new.items()])

    def tags(self, values: Mapping[str, Value]) -> None:
        """Set tags."""
        with _named(self.place):
            self.client.log_batch(self.id, tags=[RunTag(_key(k), str(v)[:CHARS]) for k, v in values.items()])

    def artifact(self, path: Path, *, folder: str = "") -> None:
        """Upload a file, or the content of a directory, under ``folder``."""
        upload = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        with _named(self.place):
            upload(self.id, str(path), folder or None)

    def table(self, name: str, table: pa.Table) -> None:
        """Upload a table, e.g. one row per site, as ``<name>.parquet``."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.parquet"
            pq.write_table(table, file, compression="zstd")
            self.artifact(file)


@dataclass(frozen=True)
class Lineage:
    """A connection to one experiment and one registered model. Get it from ``Lineage.open``."""

    client: MlflowClient
    experiment_id: str
    place: str  # the URI, as errors show it
    model: str
    code_revision: str

    @classmethod
    def open(cls, config: LineageConfig, *, code_revision: str) -> Lineage:
        """Connect; create database, experiment and artifact root where there are none. LineageError = out of
        reach."""
        logging.getLogger("alembic").setLevel(logging.WARNING)
        file = Path(config.uri.removeprefix(SQLITE)).resolve() if config.uri.startswith(SQLITE) else None
        uri = f"{SQLITE}{file}" if file else config.uri
        probe(uri)
        with _named(redacted(uri)), _alone(file.with_suffix(".lock")) if file else nullcontext():
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = client.get_experiment_by_name(config.experiment)
            location = _artifact_location(config.artifacts, uri)
            number = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(config.experiment, location)
            )
        return cls(client, number, redacted(uri), config.model, code_revision)

    @contextmanager
    def run(
        self,
        kind: Kind,
        name: str,
        *,
        params: Mapping[str, Value],
        tags: Mapping[str, Value],
        key: str | None = None,
        parent: str | None = None,
    ) -> Iterator[Run]:
        """A run that ends FINISHED, KILLED (interrupt) or FAILED (any other exception, which goes on).

        ``key`` names the work: a job started again with the same kind and key continues its run. ``parent``
        is a run.
        """
        with _named(self.place):
            unfinished = self._find(kind, key) if key else None
            if unfinished:
                self.client.update_run(unfinished, status="RUNNING")
            run_id = unfinished or self.client.create_run(self.experiment_id, run_name=name).info.run_id
        run = Run(run_id, unfinished is not None, self.client, self.place)
        identity = {
            "palisade.kind": kind,
            "palisade.code_revision": self.code_revision,
            "palisade.key": key or run_id,
        }
        run.tags({**tags, **identity, **({"mlflow.parentRunId": parent} if parent else {})})
        run.params(params)
        try:
            yield run
        except BaseException as e:
            try:
                run.tags({"palisade.error": f"{type(e).__name__}: {e}"})
                with _named(self.place):
                    killed = isinstance(e, KeyboardInterrupt | SystemExit)
                    self.client.set_terminated(run_id, "KILLED" if killed else "FAILED")
            except LineageError as lost:  # what went wrong first is what matters
                e.add_note(str(lost))
            raise
        with _named(self.place):
            self.client.set_terminated(run_id, "FINISHED")

    def register_source(
        self,
        run: Run,
        checkpoint: Path,
        *,
        fingerprint: str,
        data: Mapping[str, str],
        parent: int | None,
        tags: Mapping[str, Value],
    ) -> SourceVersion:
        """Register the checkpoint folder as the next version; the same weights from the same run stay one
        version.

        ``data`` is the digest of each domain it was trained on, ``parent`` the version it was trained from.
        """
        sha256 = _sha256(checkpoint / WEIGHTS)
        for registered in self.versions():
            if (registered.sha256, registered.run_id) == (sha256, run.id):
                return registered
        facts = {"sha256": sha256, "fingerprint": fingerprint, "code_revision": self.code_revision}
        facts |= {"parent": str(parent or ""), "data": json.dumps(dict(data), sort_keys=True)}
        facts = {**{k: str(v) for k, v in tags.items()}, **facts}
        with _named(self.place):
            if not self.client.search_registered_models(f"name = '{self.model}'"):
                self.client.create_registered_model(self.model)
            logged = self.client.create_logged_model(self.experiment_id, "source", run.id, facts)
            self.client.log_model_artifacts(logged.model_id, str(checkpoint))
            self.client.finalize_logged_model(logged.model_id, "READY")
            where = logged.artifact_location
            version = self.client.create_model_version(
                self.model, where, run.id, facts, model_id=logged.model_id
            )
        return self.version(int(version.version))

    def versions(self) -> list[SourceVersion]:
        """Every registered source version, oldest first."""
        with _named(self.place):
            versions = self.client.search_model_versions(f"name = '{self.model}'")
            # versions that were searched for say that they have no aliases
            aliases = self.client.get_registered_model(self.model).aliases if versions else {}
        return sorted((_source_version(v, aliases) for v in versions), key=lambda v: v.version)

    def version(self, which: int | Alias) -> SourceVersion:
        """The version with this number or alias; LineageError names what there is."""
        registered = self.versions()
        if not (matching := [v for v in registered if v.version == which or which in v.aliases]):
            have = ", ".join(str(v.version) for v in registered) or "none"
            raise LineageError(
                f"MLflow at {self.place}: {self.model} has no version {which!r}; versions: {have}"
            )
        return matching[0]

    def set_alias(self, alias: Alias, version: int) -> None:
        """Point ``champion`` or ``challenger`` at a version. The ledger decides and remembers; this shows
        it."""
        self.version(version)
        with _named(self.place):
            self.client.set_registered_model_alias(self.model, alias, str(version))

    def _find(self, kind: Kind, key: str) -> str | None:
        assert "'" not in key, key
        query = f"tags.`palisade.kind` = '{kind}' and tags.`palisade.key` = '{key}'"
        runs = self.client.search_runs([self.experiment_id], query, max_results=1)
        return runs[0].info.run_id if runs else None


def flat(nested: Mapping[str, object], prefix: str = "") -> dict[str, Value]:
    """Dotted names for a nested config, lists as JSON: MLflow refuses nested parameters."""
    out: dict[str, Value] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value if isinstance(value, str | int | float | None) else json.dumps(value)
    return out


@contextmanager
def _named(place: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as e:
        raise LineageError(f"MLflow at {place}: {' '.join(str(e).split())[:300]}") from e


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time: several that open a new SQLite database together all fail in its migrations."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def probe(uri: str) -> None:
    """Fail in seconds when nothing answers; MLflow itself would retry a silent database for minutes."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return
    if not parts.hostname:
        raise ValueError(
            f"lineage.uri: {redacted(uri)!r}: allowed are sqlite:///path, postgresql://…, http(s)://…"
        )
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 5432)
        socket.create_connection((parts.hostname, port), PROBE_SECONDS).close()
    except OSError as e:
        raise LineageError(
            f"MLflow at {redacted(uri)}: nothing answers ({e}); start it or set lineage.uri"
        ) from e


def _artifact_location(artifacts: str, uri: str) -> str | None:
    """Always explicit and absolute: MLflow's default is relative to whoever reads. None = the server
    decides."""
    if "://" in artifacts or artifacts.startswith("mlflow-artifacts:"):
        return artifacts
    return (
        None if uri.startswith("http") else Path(artifacts).resolve().as_uri()
    )  # a server has no paths of ours


def redacted(uri: str) -> str:
    return re.sub(r"://([^:/@]*):[^@/]*@", r"://\1:***@", uri)


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _source_version(model: ModelVersion, aliases: Mapping[str, int]) -> SourceVersion:
    tags, version = model.tags, int(model.version)
    return SourceVersion(
        version=version,
        sha256=tags.get("sha256", ""),
        parent=int(tags["parent"]) if tags.get("parent") else None,
        fingerprint=tags.get("fingerprint", ""),
        code_revision=tags.get("code_revision", ""),
        data=json.loads(tags.get("data", "{}")),
        aliases=tuple(sorted(a for a, n in aliases.items() if int(n) == version)),
        run_id=model.run_id or "",
    )
