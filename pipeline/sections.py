"""Sections of the configuration that belong to layers above it: cluster, ledger, lineage, notify, search,
bench.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.storage import check_place
from pipeline.types import Section

WEBHOOK = r"^(https?://\S+|\$[A-Z_][A-Z0-9_]*)$"
Severity = Literal["info", "warning", "critical"]


class ClusterConfig(Section):
    """Section ``cluster``: how much of Ray is used. ``address: local`` starts an embedded cluster."""

    address: str = Field(
        default="local", description="local: an embedded cluster; auto: the one of this machine; or host:port"
    )
    cpus: int = Field(default=2, ge=1, description="logical CPUs of the embedded cluster")
    train_workers: int = Field(default=1, ge=1, description="workers of a source fit")
    train_gpu: bool = Field(default=False, description="a GPU for every worker of a source fit")
    shards: int = Field(default=2, ge=1, description="shard actors; about one per core")
    ingest_workers: int = Field(
        default=2, ge=1, description="tasks of ingest at a time; with ingest_gpus also actors with the trunk"
    )
    ingest_gpus: float = Field(
        default=0, ge=0, description="share of a GPU per actor with the trunk; has not been run on a GPU"
    )
    object_store_mb: int = Field(default=512, ge=80, description="MiB of Ray's object store")
    image: str = Field(
        default="ghcr.io/palisade/palisade:0.1.0", description="container image of the manifests"
    )
    namespace: str = Field(default="palisade", description="Kubernetes namespace of the manifests")
    schedule: str = Field(default="0 3 * * *", description="cron expression of the cycle")
    time_zone: str = Field(default="Etc/UTC", description="time zone of the schedule")
    workers: int = Field(default=2, ge=0, description="KubeRay worker pods")
    worker_cpu: int = Field(default=4, ge=1, description="CPUs of a worker pod")
    worker_memory_gb: int = Field(default=16, ge=1, description="GiB of memory of a worker pod")
    gpus_per_worker: int = Field(default=0, ge=0, description="GPUs of a worker pod")


class LedgerConfig(Section):
    """Section ``ledger``: the durable record and the blobs it points to."""

    url: str = Field(default="sqlite:///run/ledger.db", description="SQLAlchemy URL")
    artifacts: Annotated[str, AfterValidator(check_place)] = Field(
        "run/artifacts", description="folder or s3://bucket/x"
    )
    signing_key: str | None = Field(
        default=None, description="ed25519 private key, PEM; null: nothing can be pulled"
    )
    manifest_hours: float = Field(
        default=168, gt=0, description="after which a signed release manifest expires"
    )


class LineageConfig(Section):
    """Section ``lineage``: MLflow."""

    uri: str = Field(default="sqlite:///run/mlflow.db", description="tracking and registry URI")
    artifacts: str = Field(default="run/mlflow-artifacts", description="artifact root of new experiments")
    experiment: str = Field(default="palisade", description="MLflow experiment")
    model: str = Field(
        default="palisade.source", description="registered model that holds the source versions"
    )


class NotifyConfig(Section):
    """Section ``notify``: who is told what a person should know. Without a webhook and a file nobody is."""

    webhook: str | None = Field(
        default=None,
        pattern=WEBHOOK,
        description="URL, or $NAME of an environment variable that holds it; gets JSON by POST",
    )
    file: str | None = Field(default=None, description="gets a JSON object a line")
    min_severity: Severity = Field(default="info", description="what is less severe is not recorded")
    repeat_seconds: float = Field(
        default=3600, ge=0, description="the same text is sent again only after this time"
    )
    timeout_seconds: float = Field(default=5, gt=0, le=60, description="a webhook that is slower has failed")


class Choice(Section):
    """A search dimension over listed values."""

    choice: tuple[float | int | bool | str, ...] = Field(min_length=1, description="listed values")


class LogUniform(Section):
    """A search dimension, log-uniform between two positive bounds."""

    loguniform: tuple[float, float] = Field(description="two positive bounds")


class Uniform(Section):
    """A search dimension, uniform between two bounds."""

    uniform: tuple[float, float] = Field(description="two bounds")


class SearchConfig(Section):
    """Section ``search``: ASHA over replayed features of sites, or over source training."""

    site_space: dict[str, Choice | LogUniform | Uniform] = Field(
        default={}, description="dimensions in section site, by key"
    )
    source_space: dict[str, Choice | LogUniform | Uniform] = Field(
        default={}, description="dimensions in section source, by key"
    )
    sites: tuple[str, ...] = Field(
        default=(), description="development sites with sealed labels; never a target"
    )
    trials: int = Field(default=8, ge=1, description="settings that are tried")
    rungs: int = Field(default=3, ge=1, description="times a trial reports on its way")
    reduction: int = Field(default=3, ge=2, description="one trial of so many goes on at each rung")
    concurrent_trials: int = Field(default=2, ge=1, description="trials that run at a time")
    seed: int = Field(default=0, description="seed of the sampled settings")


class BenchConfig(Section):
    """Section ``bench``: what ``palisade bench`` measures on. Nothing of a deployment reads it."""

    root: str | None = Field(
        default=None, description="folder of data sets in their own layouts, imported when needed"
    )
    sets: dict[str, str] = Field(default={}, description="domain (and subfolder of root) → kind of corpus")
    added_domains: tuple[str, ...] = Field(
        default=(), description="rendered domains that every fit has beside its sources"
    )
    pretrain: bool = Field(
        default=True, description="every fit begins from the one that palisade pretrain makes"
    )
    seeds: int = Field(default=3, ge=1, description="source fits per comparison")
    streams: str | None = Field(
        default=None, description="recorded site streams, sealed labels in its _sealed"
    )
    groups: dict[str, Literal["shifted", "clean", "one-class", "unseen", "missing", "poisoning"]] = Field(
        default={}, description="recorded site → what happens there"
    )
    quick_steps: int = Field(default=150, ge=1, description="optimizer steps of a fit with --quick")
