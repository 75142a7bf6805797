"""Tests of the generated manifests: golden files, KubeRay's schemas, Kubernetes' rules, each refusal."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.config import Config, load, parse
from pipeline.kubernetes.manifests import RAY_VERSION, render, write
from pipeline.kubernetes.rules import ManifestError, at, check, check_fleet, check_schedule

REPO = Path(__file__).resolve().parents[2]
GOLDEN = REPO / "infra" / "kuberay"


@pytest.fixture(scope="module")
def fleet() -> Config:
    return load(REPO / "conf" / "fleet.yaml")


@pytest.fixture(scope="module")
def docs(fleet: Config) -> dict[str, dict]:
    loaded = [doc for text in render(fleet).values() for doc in yaml.safe_load_all(text)]
    return {f"{doc['kind']}/{doc['metadata']['name']}": doc for doc in loaded}


def changed(config: Config, *overrides: str) -> Config:
    raw = config.model_dump(mode="json")
    for override in overrides:
        name, _, value = override.partition("=")
        section, key = name.split(".")
        raw[section][key] = yaml.safe_load(value)
    return parse(yaml.safe_dump(raw), "test")


def pods(node: object) -> list[dict]:
    if isinstance(node, list):
        return [pod for item in node for pod in pods(item)]
    if isinstance(node, dict):
        itself = [node] if "containers" in node else []
        return itself + [pod for value in node.values() for pod in pods(value)]
    return []


def test_files_in_infra_are_what_the_config_says(fleet: Config) -> None:
    files = render(fleet)
    assert sorted(files) == sorted(p.name for p in GOLDEN.glob("*.yaml"))
    for name, text in files.items():
        same = (GOLDEN / name).read_text() == text
        assert same, f"infra/kuberay/{name} is not what conf/fleet.yaml gives; run: make manifests"


def test_ray_kinds_fit_the_operators_schemas(docs: dict[str, dict], schemas: Path) -> None:
    kinds = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
    seen = set()
    for doc in docs.values():
        if name := kinds.get(doc["kind"]):
            seen.add(doc["kind"])
            schema = json.loads((schemas / f"{name}.v1.schema.json").read_text())
            assert [e.message for e in Draft202012Validator(schema).iter_errors(doc)] == []
    assert seen == set(kinds)


def test_gpu_workers_ask_for_gpus_everywhere(fleet: Config, schemas: Path) -> None:
    text = render(changed(fleet, "cluster.gpus_per_worker=2"))["40-raycluster.yaml"]
    cluster = yaml.safe_load(text)
    group = cluster["spec"]["workerGroupSpecs"][0]
    assert group["rayStartParams"]["num-gpus"] == "2"
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    schema = json.loads((schemas / "rayclusters.v1.schema.json").read_text())
    Draft202012Validator(schema).validate(cluster)


def test_cluster_runs_the_pinned_ray(docs: dict[str, dict]) -> None:
    assert version("ray") == RAY_VERSION == docs["RayCluster/palisade"]["spec"]["rayVersion"]


def test_cluster_is_sized_by_its_section(docs: dict[str, dict], fleet: Config) -> None:
    group = docs["RayCluster/palisade"]["spec"]["workerGroupSpecs"][0]
    c = fleet.cluster
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] == c.workers
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": str(c.worker_cpu), "memory": f"{c.worker_memory_gb}Gi"}
    assert group["rayStartParams"]["object-store-memory"] == str(c.object_store_mb * 2**20)
    assert c.shards <= c.workers * c.worker_cpu


def test_cycle_is_submitted_once_per_tick(docs: dict[str, dict], fleet: Config) -> None:
    spec = docs["CronJob/palisade-cycle"]["spec"]
    assert (spec["concurrencyPolicy"], spec["schedule"]) == ("Forbid", fleet.cluster.schedule)
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert command[-3:] == ["--id", "$(TICK)", "cycle"]
    assert "http://palisade-head-svc.palisade.svc:8265" in command
    env = {e["name"]: e for e in pod["containers"][0]["env"]}
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "palisade", "key": "auth_token"}
    assert (
        env["TICK"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
    )


def test_pods_read_the_deployment_and_run_attached_to_their_cluster(
    docs: dict[str, dict], fleet: Config
) -> None:
    stored = parse(docs["ConfigMap/palisade"]["data"]["deployment.yaml"], "stored")
    assert stored.fingerprint() == fleet.fingerprint()
    assert stored.cluster.address == "auto"


def test_every_pod_is_unprivileged_and_every_object_is_in_the_namespace(docs: dict[str, dict]) -> None:
    every = pods(list(docs.values()))
    assert len(every) == 2 * 3 + 3  # head and worker of three cluster specs; cycle, mlflow, postgres
    for pod in every:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        mounted = {v["name"] for v in pod["volumes"]} | {"data"}
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert {m["name"] for m in container["volumeMounts"]} <= mounted
    for doc in docs.values():
        assert doc["kind"] == "Namespace" or doc["metadata"]["namespace"] == "palisade"


def test_what_refers_to_each_other_exists(docs: dict[str, dict]) -> None:
    for doc in docs.values():
        for pod in pods(doc):
            for volume in pod["volumes"]:
                if "configMap" in volume:
                    assert f"ConfigMap/{volume['configMap']['name']}" in docs
                else:
                    assert f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}" in docs
        if doc["kind"] in ("Deployment", "StatefulSet"):
            assert doc["spec"]["selector"]["matchLabels"] == doc["spec"]["template"]["metadata"]["labels"]
            service = docs[f"Service/{doc['metadata']['name']}"]
            assert service["spec"]["selector"] == doc["spec"]["selector"]["matchLabels"]


def test_no_secret_value_is_written(docs: dict[str, dict]) -> None:
    for pod in pods(list(docs.values())):
        for container in pod["containers"]:
            for variable in container["env"]:
                hidden = any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "SECRET"))
                assert ("secretKeyRef" in variable.get("valueFrom", {})) == hidden, variable["name"]
    assert "Secret" not in {doc["kind"] for doc in docs.values()}


def test_mlflow_is_locked_and_keeps_or_delegates_artifacts(docs: dict[str, dict], fleet: Config) -> None:
    command = docs["Deployment/mlflow"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--app-name") + 1] == "basic-auth"
    assert "mlflow.palisade.svc:5000" in command[command.index("--allowed-hosts") + 1]
    assert "--serve-artifacts" in command
    other = render(changed(fleet, "lineage.artifacts=s3://bucket/mlflow"))["30-mlflow.yaml"]
    assert "--no-serve-artifacts" in other
    assert "s3://bucket/mlflow" in other


def test_services_of_others_are_not_deployed(fleet: Config, tmp_path: Path) -> None:
    elsewhere = changed(
        fleet,
        "ledger.url=postgresql+psycopg://palisade@db.example.org/p",
        "lineage.uri=https://mlflow.example.org",
    )
    write(fleet, tmp_path)
    assert (tmp_path / "20-postgres.yaml").exists()
    names = [path.name for path in write(elsewhere, tmp_path)]
    assert not [n for n in names if n.startswith(("20", "30"))]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cluster.schedule=0 3 * *", "cluster.schedule: '0 3 * *': needs five fields"),
        ("cluster.schedule=TZ=UTC 0 3 * * *", "TZ= is refused"),
        ("cluster.schedule=0 25 * * *", "hour '25': allowed are 0-23"),
        ("cluster.time_zone=Mars/Base", "cluster.time_zone: 'Mars/Base': no such zone"),
        (
            "ledger.url=sqlite:////data/ledger.db",
            "ledger.url: 'sqlite:////data/ledger.db': pods share no SQLite file",
        ),
        ("ledger.url=postgresql://u:hunter2@postgres/p", "ledger.url: holds a password"),
        ("data.captures=run/captures", "data.captures: 'run/captures': is relative"),
    ],
)
def test_a_deployment_that_cannot_work_is_refused(fleet: Config, override: str, says: str) -> None:
    with pytest.raises(ManifestError) as caught:
        check_fleet(changed(fleet, override))
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("schedule", ["* * * * *", "*/5 0-6,22 1 1-12 0", "0 3 * * 7"])
def test_usual_schedules_pass(schedule: str) -> None:
    check_schedule(schedule, "s")


CLUSTER, JOB, RETRAIN, CYCLE = (
    "RayCluster/palisade",
    "RayJob/palisade-train",
    "RayCronJob/palisade-retrain",
    "CronJob/palisade-cycle",
)


@pytest.mark.parametrize(
    ("name", "path", "value", "says"),
    [
        (CLUSTER, "metadata.name", "p" * 54, "at most 53"),
        (JOB, "metadata.name", "p" * 48, "at most 47"),
        (RETRAIN, "metadata.name", "p" * 37, "at most 36"),
        (CYCLE, "metadata.name", "p" * 53, "at most 52"),
        (CLUSTER, "metadata.name", "9lives", "starting with a letter"),
        (CLUSTER, "spec.rayVersion", "2.51.0", "2.52 or later"),
        (CLUSTER, "spec.rayVersion", None, "2.52 or later"),
        (CLUSTER, "spec.workerGroupSpecs.0.minReplicas", None, "minReplicas and maxReplicas"),
        (CLUSTER, "spec.workerGroupSpecs.0.replicas", 99, "replicas: 99"),
        (
            CLUSTER,
            "spec.headGroupSpec.template.spec.containers.0.env.0.name",
            "RAY_REDIS_ADDRESS",
            "gcsFaultTolerance",
        ),
        (JOB, "spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished"),
        (JOB, "spec.deletionStrategy", {"deletionRules": [{}]}, "exclude each other"),
        (JOB, "spec.clusterSelector", {"ray.io/cluster": "palisade"}, "exactly one"),
        (JOB, "spec.rayClusterSpec", None, "exactly one"),
        (JOB, "spec.submissionMode", "InteractiveMode", "backoffLimit"),
        (JOB, "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True, "enableK8sTokenAuth"),
        (RETRAIN, "spec.concurrencyPolicy", "Forbid", "spec.concurrencyPolicy: no such field"),
        (RETRAIN, "spec.schedule", "TZ=UTC 0 1 * * 0", "TZ= is refused"),
        (RETRAIN, "spec.jobTemplate.rayClusterSpec.rayVersion", "2.9.0", "2.52 or later"),
        (CYCLE, "spec.concurrencyPolicy", "Allow", "concurrencyPolicy: Forbid"),
        (CYCLE, "spec.startingDeadlineSeconds", None, "startingDeadlineSeconds"),
    ],
)
def test_each_rule_refuses(docs: dict[str, dict], name: str, path: str, value: object, says: str) -> None:
    doc = copy.deepcopy(docs[name])
    check(doc)
    node, *keys = doc, *path.split(".")
    for key in keys[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[keys[-1]] = value
    with pytest.raises(ManifestError, match="(?s).") as caught:
        check(doc)
    assert says in str(caught.value)


def test_autoscaler_v2_needs_pods_that_do_not_restart(docs: dict[str, dict]) -> None:
    doc = copy.deepcopy(docs[CLUSTER])
    doc["spec"] |= {"enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2"}}
    with pytest.raises(ManifestError, match="autoscaler v2 needs Never"):
        check(doc)
    doc["spec"]["workerGroupSpecs"][0]["template"]["spec"]["restartPolicy"] = "Never"
    check(doc)


def test_at_walks_and_gives_up_quietly() -> None:
    assert at({"a": {"b": 1}}, "a.b") == 1
    assert at({"a": 3}, "a.b") is None
