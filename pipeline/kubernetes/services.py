"""Builds the manifests of Postgres and MLflow, and the parts that all manifests of a deployment share."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.config import Config

Doc = dict[str, object]

NAME = "palisade"
USER, POSTGRES_USER = 10001, 999
POSTGRES_IMAGE = "postgres:17"
POSTGRES, MLFLOW = 5432, 5000
POD_DEFAULTS: Doc = {
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,  # else a service called mlflow sets MLFLOW_PORT=tcp://…, and mlflow reads it
}
BASIC_AUTH = """[mlflow]
default_permission = READ
database_uri = {url}
admin_username = {user}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def doc(api: str, kind: str, name: str, config: Config, *, spec: Doc) -> Doc:
    """Returns a namespaced Kubernetes object with a spec."""
    meta = {"name": name, "namespace": config.cluster.namespace, "labels": labels(name)}
    return {"apiVersion": api, "kind": kind, "metadata": meta, "spec": spec}


def config_map(config: Config, name: str, *, data: Mapping[str, str]) -> Doc:
    """Returns a ConfigMap of texts by file name."""
    meta = {"name": name, "namespace": config.cluster.namespace, "labels": labels(name)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": dict(data)}


def labels(name: str) -> Doc:
    """Returns the labels that Kubernetes recommends."""
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": NAME}


def secret(variable: str, name: str, key: str) -> Doc:
    """Returns an environment variable that is read from a Secret."""
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def pod_security(user: int) -> Doc:
    """Returns a pod's security context that meets the restricted Pod Security Standard."""
    ids = {"runAsNonRoot": True, "runAsUser": user, "runAsGroup": user, "fsGroup": user}
    return {**ids, "seccompProfile": {"type": "RuntimeDefault"}}


def container_security() -> Doc:
    """Returns a container's security context that meets the restricted Pod Security Standard."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def own_service(url: str, config: Config) -> str | None:
    """Returns the name of the service if ``url`` points into the deployment's namespace, else None."""
    host = (urlsplit(url).hostname or "").split(".")
    return host[0] if host[0] and (len(host) == 1 or host[1] == config.cluster.namespace) else None


def postgres(config: Config, name: str) -> list[Doc]:
    """Returns one Postgres with the databases of the ledger, of MLflow and of MLflow's users."""
    databases = f"CREATE DATABASE {NAME};\nCREATE DATABASE mlflow;\nCREATE DATABASE mlflow_auth;\n"
    user = urlsplit(config.ledger.url).username or NAME
    container = {
        "name": name,
        "image": POSTGRES_IMAGE,
        "env": [
            {"name": "POSTGRES_USER", "value": user},
            {"name": "POSTGRES_DB", "value": "postgres"},
            {"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"},
            secret("POSTGRES_PASSWORD", "postgres", "password"),
        ],
        "ports": [{"name": name, "containerPort": POSTGRES}],
        "readinessProbe": {"exec": {"command": ["pg_isready", "-U", user]}, "periodSeconds": 10},
        "resources": _resources("1", "2Gi"),
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "data", "mountPath": "/var/lib/postgresql/data"},
            {"name": "init", "mountPath": "/docker-entrypoint-initdb.d"},
        ],
    }
    pod = {
        **POD_DEFAULTS,
        "securityContext": pod_security(POSTGRES_USER),
        "containers": [container],
        "volumes": [{"name": "init", "configMap": {"name": name}}],
    }
    claim = {"metadata": {"name": "data"}, "spec": _claim("ReadWriteOnce", "50Gi")}
    spec = {**_pods(name, pod), "serviceName": name, "replicas": 1, "volumeClaimTemplates": [claim]}
    return [
        config_map(config, name, data={"databases.sql": databases}),
        doc("apps/v1", "StatefulSet", name, config, spec=spec),
        _service(config, name, POSTGRES),
    ]


def mlflow(config: Config, name: str) -> list[Doc]:
    """Returns MLflow behind basic auth.

    With ``lineage.artifacts: mlflow-artifacts:/`` it serves artifacts from its own volume, else from their
    store.
    """
    pod = {
        **POD_DEFAULTS,
        "securityContext": pod_security(USER),
        "containers": [_mlflow_container(config, name)],
        "volumes": [
            {"name": "auth", "configMap": {"name": name}},
            {"name": "artifacts", "persistentVolumeClaim": {"claimName": f"{name}-artifacts"}},
        ],
    }
    recreate = {"type": "Recreate"}  # the volume has one writer
    spec = {**_pods(name, pod), "replicas": 1, "strategy": recreate}
    ini = BASIC_AUTH.format(user=NAME, url=_database(config.ledger.url, "mlflow_auth"))
    claim = _claim("ReadWriteOnce", "100Gi")
    return [
        config_map(config, name, data={"basic_auth.ini": ini}),
        doc("v1", "PersistentVolumeClaim", f"{name}-artifacts", config, spec=claim),
        doc("apps/v1", "Deployment", name, config, spec=spec),
        _service(config, name, MLFLOW),
    ]


def _mlflow_container(config: Config, name: str) -> Doc:
    health = {"path": "/health", "port": MLFLOW}
    return {
        "name": name,
        "image": config.cluster.image,
        "command": _mlflow_command(config, name),
        "env": [
            {"name": "MLFLOW_AUTH_CONFIG_PATH", "value": "/etc/mlflow/basic_auth.ini"},
            {"name": "MLFLOW_DISABLE_TELEMETRY", "value": "true"},
            # else the server forks eight idle workers
            {"name": "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "value": "false"},
            {"name": "MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "value": "false"},
            secret("PGPASSWORD", "postgres", "password"),
            secret("MLFLOW_AUTH_ADMIN_PASSWORD", "mlflow", "password"),
            secret("MLFLOW_FLASK_SERVER_SECRET_KEY", "mlflow", "flask-secret-key"),
        ],
        "ports": [{"name": name, "containerPort": MLFLOW}],
        "readinessProbe": {"httpGet": health, "periodSeconds": 10},
        "livenessProbe": {"httpGet": health, "initialDelaySeconds": 60, "periodSeconds": 30},
        "resources": _resources("1", "2Gi"),
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "auth", "mountPath": "/etc/mlflow", "readOnly": True},
            {"name": "artifacts", "mountPath": "/mlflow"},
        ],
    }


def _mlflow_command(config: Config, name: str) -> list[str]:
    host = f"{name}.{config.cluster.namespace}.svc"
    command = [
        *("mlflow", "server", "--host", "0.0.0.0", "--port", str(MLFLOW), "--workers", "2"),
        *("--app-name", "basic-auth", "--allowed-hosts", f"{name}:{MLFLOW},{host}:{MLFLOW}"),
        *("--backend-store-uri", _database(config.ledger.url, "mlflow")),
    ]
    if config.lineage.artifacts.startswith("mlflow-artifacts:"):
        return [*command, "--serve-artifacts", "--artifacts-destination", "/mlflow"]
    return [*command, "--no-serve-artifacts", "--default-artifact-root", config.lineage.artifacts]


def _database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _service(config: Config, name: str, port: int) -> Doc:
    ports = [{"name": name, "port": port, "targetPort": port}]
    spec: Doc = {"selector": labels(name), "ports": ports}
    return doc("v1", "Service", name, config, spec=spec)


def _pods(name: str, pod: Mapping[str, object]) -> Doc:
    return {
        "selector": {"matchLabels": labels(name)},
        "template": {"metadata": {"labels": labels(name)}, "spec": pod},
    }


def _claim(mode: str, size: str) -> Doc:
    return {"accessModes": [mode], "resources": {"requests": {"storage": size}}}


def _resources(cpu: str, memory: str) -> Doc:
    size = {"cpu": cpu, "memory": memory}
    return {"requests": size, "limits": {"memory": memory}}
