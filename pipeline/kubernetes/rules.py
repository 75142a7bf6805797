"""Checks manifests for mistakes that KubeRay v1.7 and Kubernetes refuse, or accept and then run wrongly.

The operator checks a manifest only inside a cluster, and its CRDs accept misspelled fields. So these rules
run before anything is applied. Source of the rules: the controllers of KubeRay v1.7.0.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeGuard
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipeline.config import Config

    Doc = Mapping[str, object]

# the operator appends to these names, and the result must stay a DNS label of 63 characters
NAME_CHARS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "RayService": 47, "CronJob": 52}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
TOKEN_AUTH = (2, 52)  # first Ray version that the operator gives a token


class ManifestError(PalisadeError, ValueError):
    """A deployment that cannot work on Kubernetes; the message names the field and the allowed values."""


def check(doc: Doc) -> None:
    """Raises ManifestError if the Kubernetes object ``doc`` breaks a rule of its kind."""
    kind, name = str(doc["kind"]), str(at(doc, "metadata.name"))
    where, limit = f"{kind} {name}", NAME_CHARS.get(kind, 63)
    if not DNS_1035.fullmatch(name) or len(name) > limit:
        raise ManifestError(
            f"{where}: metadata.name: allowed are at most {limit} of a-z 0-9 -, starting with a letter"
        )
    rules = {"RayCluster": _cluster, "RayJob": _job, "RayCronJob": _ray_cron_job, "CronJob": _cron_job}
    if kind in rules:
        rules[kind](at(doc, "spec"), where)


def check_paths(config: Config) -> None:
    """Raises ManifestError for a relative path: a submitted job runs in a folder of its own on the head."""
    paths = {
        "data.corpora": config.data.corpora,
        "data.captures": config.data.captures,
        "data.sealed": config.data.sealed,
        "data.labels": config.data.labels,
        "ledger.artifacts": config.ledger.artifacts,
        "ledger.url": config.ledger.url.removeprefix("sqlite:///"),
        "lineage.uri": config.lineage.uri.removeprefix("sqlite:///"),
        "lineage.artifacts": config.lineage.artifacts,
    }
    for field, given in paths.items():
        if given and not given.startswith("/") and not re.match(r"[a-z][a-z0-9+-]+:", given):
            raise ManifestError(
                f"{field}: {given!r}: is relative; a job on a cluster needs an absolute path or a URL"
            )


def check_fleet(config: Config) -> None:
    """Raises ManifestError if a deployment of pods cannot work: paths, database URLs, schedule, time zone."""
    check_paths(config)
    for field, url in (("ledger.url", config.ledger.url), ("lineage.uri", config.lineage.uri)):
        if url.startswith("sqlite:"):
            allowed = "allowed: a server, e.g. postgresql+psycopg://…"
            raise ManifestError(f"{field}: {url!r}: pods share no SQLite file; {allowed}")
        if urlsplit(url).password:
            raise ManifestError(
                f"{field}: holds a password, which a ConfigMap would show; put it into a Secret"
            )
    check_schedule(config.cluster.schedule, "cluster.schedule")
    zone = config.cluster.time_zone
    try:
        ZoneInfo(zone)
    except (KeyError, OSError, ValueError):
        raise ManifestError(f"cluster.time_zone: {zone!r}: no such zone, e.g. Europe/Vienna") from None


def check_schedule(schedule: str, field: str) -> None:
    """Raises ManifestError unless ``schedule`` is five cron fields of numbers, lists, ranges and steps."""
    if "TZ=" in schedule:
        raise ManifestError(f"{field}: {schedule!r}: TZ= is refused by Kubernetes; set cluster.time_zone")
    parts = schedule.split()
    if len(parts) != len(CRON_FIELDS):
        raise ManifestError(
            f"{field}: {schedule!r}: needs five fields: minute hour day month weekday, e.g. '0 3 * * *'"
        )
    for part, (name, low, high) in zip(parts, CRON_FIELDS, strict=True):
        for item in part.split(","):
            match = re.fullmatch(r"(\*|(\d+)(-(\d+))?)(/([1-9]\d*))?", item)
            numbers = [int(n) for n in (match[2], match[4]) if n] if match else []
            if not match or not all(low <= n <= high for n in numbers) or numbers != sorted(numbers):
                raise ManifestError(
                    f"{field}: {schedule!r}: {name} {item!r}: allowed are {low}-{high}, lists, ranges, */n"
                )


def at(doc: object, path: str) -> object:
    """Returns the value at a dotted path of nested objects, or None."""
    node = doc
    for part in path.split("."):
        node = node.get(part) if _is_object(node) else None
    return node


def _cluster(spec: object, where: str) -> None:
    assert _is_object(spec)
    version = str(spec.get("rayVersion", ""))
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if at(spec, "authOptions.mode") == "token" and numbers < TOKEN_AUTH:
        raise ManifestError(f"{where}: rayVersion: {version!r}: token auth needs it set to 2.52 or later")
    for group in _objects(spec.get("workerGroupSpecs")):
        _workers(spec, group, f"{where}: worker group {at(group, 'groupName')}")
    for variable in _variables(spec):
        if variable in ("RAY_REDIS_ADDRESS", "RAY_external_storage_namespace"):
            raise ManifestError(
                f"{where}: {variable}: GCS fault tolerance is set through gcsFaultToleranceOptions only"
            )


def _workers(spec: Doc, group: Doc, where: str) -> None:
    low, count, high = (at(group, k) for k in ("minReplicas", "replicas", "maxReplicas"))
    if not (isinstance(low, int) and isinstance(high, int)):
        raise ManifestError(f"{where}: minReplicas and maxReplicas must both be set")
    if not low <= (count if isinstance(count, int) else low) <= high:
        raise ManifestError(f"{where}: replicas: {count}: allowed are {low}-{high}")
    autoscaled = spec.get("enableInTreeAutoscaling") is True
    v2 = at(spec, "autoscalerOptions.version") == "v2"
    if autoscaled and v2 and at(group, "template.spec.restartPolicy") != "Never":
        raise ManifestError(f"{where}: restartPolicy: autoscaler v2 needs Never")


def _job(spec: object, where: str) -> None:
    assert _is_object(spec)
    cluster, selector = spec.get("rayClusterSpec"), spec.get("clusterSelector")
    if (cluster is None) == (selector is None):
        raise ManifestError(f"{where}: needs exactly one of rayClusterSpec and clusterSelector")
    ends = spec.get("shutdownAfterJobFinishes") is True
    if not ends and spec.get("ttlSecondsAfterFinished"):
        raise ManifestError(
            f"{where}: ttlSecondsAfterFinished: allowed only with shutdownAfterJobFinishes: true"
        )
    if ends and at(spec, "deletionStrategy.deletionRules"):
        raise ManifestError(
            f"{where}: deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude each other"
        )
    if spec.get("backoffLimit") and (selector or spec.get("submissionMode") == "InteractiveMode"):
        raise ManifestError(f"{where}: backoffLimit: not with clusterSelector or InteractiveMode")
    if at(spec, "rayClusterSpec.authOptions.enableK8sTokenAuth"):
        raise ManifestError(f"{where}: enableK8sTokenAuth: not supported for a RayJob")
    if cluster is not None:
        _cluster(cluster, where)


def _ray_cron_job(spec: object, where: str) -> None:
    assert _is_object(spec)
    unknown = set(spec) - {"schedule", "jobTemplate", "timeZone", "suspend"}
    if unknown:  # e.g. concurrencyPolicy: the job itself must hold a lease and be idempotent
        raise ManifestError(
            f"{where}: spec.{min(unknown)}: no such field; allowed: schedule jobTemplate timeZone suspend"
        )
    check_schedule(str(spec["schedule"]), f"{where}: schedule")
    _job(spec["jobTemplate"], where)


def _cron_job(spec: object, where: str) -> None:
    assert _is_object(spec)
    check_schedule(str(spec["schedule"]), f"{where}: schedule")
    if spec.get("concurrencyPolicy") != "Forbid" or not spec.get("startingDeadlineSeconds"):
        raise ManifestError(
            f"{where}: needs concurrencyPolicy: Forbid and startingDeadlineSeconds, or missed ticks pile up"
        )


def _variables(node: object) -> Iterator[str]:
    """Yields the names of all environment variables below ``node``."""
    if _is_object(node):
        for variable in _objects(node.get("env")):
            yield str(at(variable, "name"))
        for value in node.values():
            yield from _variables(value)
    for item in _objects(node):
        yield from _variables(item)


def _is_object(value: object) -> TypeGuard[Doc]:
    return isinstance(value, dict)


def _objects(value: object) -> list[Doc]:
    return value if _is_list(value) else []


def _is_list(value: object) -> TypeGuard[list[Doc]]:
    return isinstance(value, list)
