"""Kubernetes manifests of a deployment, generated from its Config.

Short, frequent cycles run on a standing RayCluster (CronJob → Jobs API); training brings its own (RayJob, RayCronJob).
Postgres and MLflow are part of it when their URLs name a service of its namespace, else they are somebody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from pipeline.kubernetes.rules import check, check_fleet
from pipeline.kubernetes.services import (
    NAME,
    QUIET_POD,
    USER,
    Doc,
    config_map,
    doc,
    labels,
    locked,
    mlflow,
    nobody,
    own_service,
    postgres,
    secret,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.config import Config

RAY_VERSION = "2.60.0"
MOUNTED = "/etc/palisade/deployment.yaml"
DASHBOARD, CLIENT, GCS = 8265, 10001, 6379
RETRAIN = "0 1 * * 0"
FINISHED_KEPT_S, TRAIN_LIMIT_S, CYCLE_LIMIT_S, START_LIMIT_S = 3600, 12 * 3600, 6 * 3600, 900
SECRETS = {
    "postgres": "# Reads Secret postgres: key password.",
    "mlflow": "# Reads Secret mlflow: keys password (12 characters or more), flask-secret-key.",
}


def render(config: Config) -> dict[str, str]:
    """YAML text by file name, in the order in which ``kubectl apply -f FOLDER`` takes them. Raises ManifestError."""
    check_fleet(config)
    files: dict[str, list[Doc]] = {
        "00-base.yaml": [_namespace(config), _deployment_yaml(config), _volume(config)],
        "40-raycluster.yaml": [doc("ray.io/v1", "RayCluster", NAME, config, spec=_cluster(config))],
        "50-cycle-cronjob.yaml": [doc("batch/v1", "CronJob", f"{NAME}-cycle", config, spec=_cycle(config))],
        "60-train-rayjob.yaml": [doc("ray.io/v1", "RayJob", f"{NAME}-train", config, spec=_train(config))],
        "61-retrain-raycronjob.yaml": [
            doc("ray.io/v1", "RayCronJob", f"{NAME}-retrain", config, spec=_retrain(config))
        ],
    }
    if service := own_service(config.ledger.url, config):
        files["20-postgres.yaml"] = postgres(config, service)
    if service := own_service(config.lineage.uri, config):
        files["30-mlflow.yaml"] = mlflow(config, service)
    for docs in files.values():
        for each in docs:
            check(each)
    return {name: _text(name, docs) for name, docs in sorted(files.items())}


def write(config: Config, folder: Path) -> list[Path]:
    """Render into ``folder`` and return the files written; files that are no longer part of it are removed."""
    files = render(config)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]-*.yaml"):
        if old.name not in files:
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


def jobs_url(config: Config) -> str:
    """Where the standing cluster takes jobs, seen from a pod."""
    return f"http://{NAME}-head-svc.{config.cluster.namespace}.svc:{DASHBOARD}"


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: indented lists, block text, no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def _block_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block_text)


def _text(name: str, docs: Sequence[Doc]) -> str:
    head = ["# Generated: palisade submit --config conf/fleet.yaml --render infra/kuberay"]
    body = "---\n".join(
        yaml.dump(d, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) for d in docs
    )
    head += [SECRETS[s] for s in SECRETS if f"name: {s}\n" in body and "secretKeyRef" in body]
    if "RayCronJob" in body:
        head.append(
            "# Needs KubeRay 1.6 or later with featureGates: [{name: RayCronJob, enabled: true}] (alpha)."
        )
    return "\n".join(head) + "\n" + body


def _namespace(config: Config) -> Doc:
    # every pod of ours fits "restricted"; the pod by which the operator submits a RayJob does not
    security = {
        f"pod-security.kubernetes.io/{k}": v for k, v in (("enforce", "baseline"), ("warn", "restricted"))
    }
    meta = {"name": config.cluster.namespace, "labels": labels(NAME) | security}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": meta}


def _deployment_yaml(config: Config) -> Doc:
    resolved = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
    text = yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False)
    return config_map(config, NAME, data={"deployment.yaml": text})


def _volume(config: Config) -> Doc:
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "500Gi"}}}
    return doc("v1", "PersistentVolumeClaim", f"{NAME}-data", config, spec=spec)


def _cluster(config: Config) -> Doc:
    c = config.cluster
    head = _pod(config, "ray-head", cpu=2, memory_gb=8, gpus=0)
    ports = [("gcs", GCS), ("dashboard", DASHBOARD), ("client", CLIENT)]
    _container(head)["ports"] = [{"name": name, "containerPort": port} for name, port in ports]
    worker = _pod(
        config, "ray-worker", cpu=c.worker_cpu, memory_gb=c.worker_memory_gb, gpus=c.gpus_per_worker
    )
    start = {"num-cpus": str(c.worker_cpu), "object-store-memory": str(c.object_store_mb * 2**20)}
    if c.gpus_per_worker:
        start["num-gpus"] = str(c.gpus_per_worker)
    group = {
        "groupName": "workers",
        "replicas": c.workers,
        "minReplicas": c.workers,
        "maxReplicas": c.workers,
        "rayStartParams": start,
        "template": {"spec": worker},
    }
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {
            "mode": "token"
        },  # the operator makes the token: Secret of the cluster's name, key auth_token
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # the head drives, workers work
            "template": {"spec": head},
        },
        "workerGroupSpecs": [group],
    }


def _cycle(config: Config) -> Doc:
    """A tick has one Job name; it is the submission id, so that a retried pod finds its own job again."""
    pod = _pod(config, "submit", cpu=1, memory_gb=1, gpus=0)
    told = [
        "palisade",
        "--config",
        MOUNTED,
        "submit",
        "--wait",
        "--address",
        jobs_url(config),
        "--id",
        "$(TICK)",
        "cycle",
    ]
    container = _container(pod)
    container["command"] = told
    label = "metadata.labels['batch.kubernetes.io/job-name']"
    container["env"] = [
        *_environment(config),
        {"name": "TICK", "valueFrom": {"fieldRef": {"fieldPath": label}}},
        {"name": "RAY_AUTH_MODE", "value": "token"},
        secret("RAY_AUTH_TOKEN", NAME, "auth_token"),
    ]
    # 2 config, 3 hold, 4 guard failed: a repetition would say the same
    final = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3, 4]}}
    job = {
        "backoffLimit": 3,
        "activeDeadlineSeconds": CYCLE_LIMIT_S,
        "ttlSecondsAfterFinished": FINISHED_KEPT_S,
        "podFailurePolicy": {"rules": [final]},
        "template": {"spec": pod | {"restartPolicy": "Never"}},
    }
    return {
        "schedule": config.cluster.schedule,
        "timeZone": config.cluster.time_zone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": START_LIMIT_S,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": job},
    }


def _train(config: Config) -> Doc:
    return {
        "entrypoint": f"palisade --config {MOUNTED} train",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": FINISHED_KEPT_S,
        "activeDeadlineSeconds": TRAIN_LIMIT_S,
        "backoffLimit": 2,  # each retry is a new cluster; training goes on from its last checkpoint
        "rayClusterSpec": _cluster(config),
    }


def _retrain(config: Config) -> Doc:
    return {"schedule": RETRAIN, "timeZone": config.cluster.time_zone, "jobTemplate": _train(config)}


def _pod(config: Config, name: str, *, cpu: int, memory_gb: int, gpus: int) -> Doc:
    size: Doc = {"cpu": str(cpu), "memory": f"{memory_gb}Gi"}
    if gpus:
        size["nvidia.com/gpu"] = str(gpus)
    container = {
        "name": name,
        "image": config.cluster.image,
        "env": _environment(config),
        "resources": {"requests": size, "limits": size},
        "securityContext": locked(),
        "volumeMounts": [
            {"name": "config", "mountPath": MOUNTED.rpartition("/")[0], "readOnly": True},
            {"name": "data", "mountPath": "/data"},
        ],
    }
    volumes = [
        {"name": "config", "configMap": {"name": NAME}},
        {"name": "data", "persistentVolumeClaim": {"claimName": f"{NAME}-data"}},
    ]
    return {**QUIET_POD, "securityContext": nobody(USER), "containers": [container], "volumes": volumes}


def _environment(config: Config) -> list[Doc]:
    env: list[Doc] = [
        secret("PGPASSWORD", "postgres", "password")
    ]  # libpq reads it, so no URL holds a password
    if config.lineage.uri.startswith("http"):
        env.append({"name": "MLFLOW_TRACKING_USERNAME", "value": NAME})
        env.append(secret("MLFLOW_TRACKING_PASSWORD", "mlflow", "password"))
    return env


def _container(pod: Doc) -> Doc:
    containers = pod["containers"]
    assert isinstance(containers, list)
    return containers[0]
