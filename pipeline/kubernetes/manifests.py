"""Generates the Kubernetes manifests of a deployment from its Config.

Short, frequent cycles run on a standing RayCluster (CronJob → Jobs API); training brings its own (RayJob,
RayCronJob). Postgres and MLflow are part of the deployment if their URLs name a service of its namespace;
else somebody else runs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from pipeline.kubernetes.rules import check, check_fleet
from pipeline.kubernetes.services import (
    NAME,
    POD_DEFAULTS,
    USER,
    Doc,
    config_map,
    container_security,
    doc,
    labels,
    mlflow,
    own_service,
    pod_security,
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
RETRAIN = "0 1 * * 0"  # schedule: Sundays at 01:00
FINISHED_KEPT_S, START_LIMIT_S = 3600, 900
TRAIN_LIMIT_S, CYCLE_LIMIT_S = 12 * 3600, 6 * 3600
SECRETS = {
    "postgres": "# Reads Secret postgres: key password.",
    "mlflow": "# Reads Secret mlflow: keys password (12 characters or more), flask-secret-key.",
}


def render(config: Config) -> dict[str, str]:
    """Returns YAML text by file name, in the order of ``kubectl apply -f FOLDER``.

    Raises ManifestError if the deployment cannot work on Kubernetes.
    """
    check_fleet(config)
    retrain = doc("ray.io/v1", "RayCronJob", f"{NAME}-retrain", config, spec=_retrain(config))
    files: dict[str, list[Doc]] = {
        "00-base.yaml": [_namespace(config), _deployment_yaml(config), _volume(config)],
        "40-raycluster.yaml": [doc("ray.io/v1", "RayCluster", NAME, config, spec=_cluster(config))],
        "50-cycle-cronjob.yaml": [doc("batch/v1", "CronJob", f"{NAME}-cycle", config, spec=_cycle(config))],
        "60-train-rayjob.yaml": [doc("ray.io/v1", "RayJob", f"{NAME}-train", config, spec=_train(config))],
        "61-retrain-raycronjob.yaml": [retrain],
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
    """Writes the manifests into ``folder``, removes manifests that are not among them, returns the paths."""
    files = render(config)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]-*.yaml"):
        if old.name not in files:
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


def jobs_url(config: Config) -> str:
    """Returns the URL at which a pod submits jobs to the standing cluster."""
    return f"http://{NAME}-head-svc.{config.cluster.namespace}.svc:{DASHBOARD}"


class _Dumper(yaml.SafeDumper):
    """Writes YAML as people do: indented lists, text of several lines as a block, no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(name: str, docs: Sequence[Doc]) -> str:
    head = ["# Generated: palisade manifests render infra/kuberay --config conf/fleet.yaml"]
    body = "---\n".join(
        yaml.dump(d, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) for d in docs
    )
    head += [SECRETS[s] for s in SECRETS if f"name: {s}\n" in body and "secretKeyRef" in body]
    if "RayCronJob" in body:
        gate = "featureGates: [{name: RayCronJob, enabled: true}]"
        head.append(f"# Needs KubeRay 1.6 or later with {gate} (alpha).")
    return "\n".join(head) + "\n" + body


def _block_text(_: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block_text)


def _namespace(config: Config) -> Doc:
    # every pod below meets "restricted"; the pod with which the operator submits a RayJob does not
    security: Doc = {
        "pod-security.kubernetes.io/enforce": "baseline",
        "pod-security.kubernetes.io/warn": "restricted",
    }
    meta = {"name": config.cluster.namespace, "labels": labels(NAME) | security}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": meta}


def _deployment_yaml(config: Config) -> Doc:
    resolved = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
    text = yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False)
    return config_map(config, NAME, data={"deployment.yaml": text})


def _volume(config: Config) -> Doc:
    spec: Doc = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "500Gi"}}}
    return doc("v1", "PersistentVolumeClaim", f"{NAME}-data", config, spec=spec)


def _cluster(config: Config) -> Doc:
    c = config.cluster
    ports = [("gcs", GCS), ("dashboard", DASHBOARD), ("client", CLIENT)]
    head = _container(config, "ray-head", cpu=2, memory_gb=8, gpus=0)
    head["ports"] = [{"name": name, "containerPort": port} for name, port in ports]
    size = {"cpu": c.worker_cpu, "memory_gb": c.worker_memory_gb, "gpus": c.gpus_per_worker}
    worker = _container(config, "ray-worker", **size)
    start = {"num-cpus": str(c.worker_cpu), "object-store-memory": str(c.object_store_mb * 2**20)}
    if c.gpus_per_worker:
        start["num-gpus"] = str(c.gpus_per_worker)
    group = {
        "groupName": "workers",
        "replicas": c.workers,
        "minReplicas": c.workers,
        "maxReplicas": c.workers,
        "rayStartParams": start,
        "template": {"spec": _pod(worker)},
    }
    return {
        "rayVersion": RAY_VERSION,
        # the operator makes the token: the Secret has the cluster's name, the key is auth_token
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # the head drives, the workers work
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": {"spec": _pod(head)},
        },
        "workerGroupSpecs": [group],
    }


def _cycle(config: Config) -> Doc:
    """The name of a run's Job is its submission id, so that a retried pod finds its own job again."""
    submit = ["submit", "--wait", "--address", jobs_url(config), "--id", "$(TICK)", "cycle"]
    container = _container(config, "submit", cpu=1, memory_gb=1, gpus=0)
    container["command"] = ["palisade", "--config", MOUNTED, *submit]
    label = "metadata.labels['batch.kubernetes.io/job-name']"
    container["env"] = [
        *_environment(config),
        {"name": "TICK", "valueFrom": {"fieldRef": {"fieldPath": label}}},
        {"name": "RAY_AUTH_MODE", "value": "token"},
        secret("RAY_AUTH_TOKEN", NAME, "auth_token"),
    ]
    # exit codes 2 config, 3 hold, 4 guard failed: another try would end the same
    final = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3, 4]}}
    job = {
        "backoffLimit": 3,
        "activeDeadlineSeconds": CYCLE_LIMIT_S,
        "ttlSecondsAfterFinished": FINISHED_KEPT_S,
        "podFailurePolicy": {"rules": [final]},
        "template": {"spec": _pod(container) | {"restartPolicy": "Never"}},
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
        "backoffLimit": 2,  # each retry is a new cluster; training resumes from its last checkpoint
        "rayClusterSpec": _cluster(config),
    }


def _retrain(config: Config) -> Doc:
    return {"schedule": RETRAIN, "timeZone": config.cluster.time_zone, "jobTemplate": _train(config)}


def _container(config: Config, name: str, *, cpu: int, memory_gb: int, gpus: int) -> Doc:
    size: Doc = {"cpu": str(cpu), "memory": f"{memory_gb}Gi"}
    if gpus:
        size["nvidia.com/gpu"] = str(gpus)
    return {
        "name": name,
        "image": config.cluster.image,
        "env": _environment(config),
        "resources": {"requests": size, "limits": size},
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "config", "mountPath": MOUNTED.rpartition("/")[0], "readOnly": True},
            {"name": "data", "mountPath": "/data"},
        ],
    }


def _pod(container: Doc) -> Doc:
    volumes = [
        {"name": "config", "configMap": {"name": NAME}},
        {"name": "data", "persistentVolumeClaim": {"claimName": f"{NAME}-data"}},
    ]
    return {
        **POD_DEFAULTS,
        "securityContext": pod_security(USER),
        "containers": [container],
        "volumes": volumes,
    }


def _environment(config: Config) -> list[Doc]:
    # libpq reads PGPASSWORD, so no URL holds a password
    env: list[Doc] = [secret("PGPASSWORD", "postgres", "password")]
    if config.lineage.uri.startswith("http"):
        env.append({"name": "MLFLOW_TRACKING_USERNAME", "value": NAME})
        env.append(secret("MLFLOW_TRACKING_PASSWORD", "mlflow", "password"))
    return env
