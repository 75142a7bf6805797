"""What KubeRay v1.7 and Kubernetes refuse, or accept and then do wrongly, checked before anything is applied.

The operator's own checks run only in a cluster, and its CRDs let misspelled fields through.
Source: the v1.7.0 controllers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipeline.config import Config

    Doc = Mapping[str, object]

# the operator appends to these names, and the sum has to stay a DNS label
NAME_CHARS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "RayService": 47, "CronJob": 52}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))


class ManifestError(ValueError):
    """A deployment that cannot work on Kubernetes; one line naming the field and what is allowed."""


def check(doc: Doc) -> None:
    """Raise ManifestError if ``doc`` breaks a rule of its kind."""
    kind, name = str(doc["kind"]), str(at(doc, "metadata.name"))
    where, limit = f"{kind} {name}", NAME_CHARS.get(kind, 63)
    if not DNS_1035.fullmatch(name) or len(name) > limit:
        raise ManifestError(
            f"{where}: metadata.name: allowed are at most {limit} of a-z 0-9 -, starting with a letter"
        )
    if kind == "RayCluster":
        _cluster(at(doc, "spec"), where)
    elif kind == "RayJob":
        _job(at(doc, "spec"), where)
    elif kind == "RayCronJob":
        _ray_cron_job(at(doc, "spec"), where)
    elif kind == "CronJob":
        _cron_job(at(doc, "spec"), where)


def check_paths(config: Config) -> None:
    """A submitted job runs in a folder of its own on the head, so whatever it reads must not be relative to ours."""
    paths = {
        "data.corpora": config.data.corpora,
        "data.captures": config.data.captures,
        "data.sealed": config.data.sealed,
        "data.redteam": config.data.redteam,
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
    """What a deployment of pods needs beyond ``check_paths``."""
    check_paths(config)
    for field, url in (("ledger.url", config.ledger.url), ("lineage.uri", config.lineage.uri)):
        if url.startswith("sqlite:"):
            raise ManifestError(
                f"{field}: {url!r}: pods share no SQLite file; allowed: a server, e.g. postgresql+psycopg://…"
            )
        if urlsplit(url).password:
            raise ManifestError(
                f"{field}: holds a password, which a ConfigMap would show; put it into a Secret"
            )
    check_schedule(config.cluster.schedule, "cluster.schedule")
    try:
        ZoneInfo(config.cluster.time_zone)
    except (KeyError, OSError, ValueError):
        raise ManifestError(
            f"cluster.time_zone: {config.cluster.time_zone!r}: no such zone, e.g. Europe/Vienna"
        ) from None


def check_schedule(schedule: str, field: str) -> None:
    """Five cron fields of numbers, lists, ranges and steps."""
    if "TZ=" in schedule:
        raise ManifestError(f"{field}: {schedule!r}: TZ= is refused by Kubernetes; set cluster.time_zone")
    parts = schedule.split()
    if len(parts) != len(CRON_FIELDS):
        raise ManifestError(
            f"{field}: {schedule!r}: needs five fields: minute hour day month weekday, e.g. '0 3 * * *'"
        )
    for part, (name, low, high) in zip(parts, CRON_FIELDS, strict=True):
        for item in part.split(","):
            found = re.fullmatch(r"(\*|(\d+)(-(\d+))?)(/([1-9]\d*))?", item)
            numbers = [int(n) for n in (found[2], found[4]) if n] if found else []
            if not found or not all(low <= n <= high for n in numbers) or numbers != sorted(numbers):
                raise ManifestError(
                    f"{field}: {schedule!r}: {name} {item!r}: allowed are {low}-{high}, lists, ranges, */n"
                )


def at(doc: Doc, path: str) -> object:
    """The value at a dotted path, or None."""
    node: object = doc
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _cluster(spec: object, where: str) -> None:
    assert isinstance(spec, dict)
    version = str(spec.get("rayVersion", ""))
    if at(spec, "authOptions.mode") == "token" and tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 52):
        raise ManifestError(f"{where}: rayVersion: {version!r}: token auth needs it set to 2.52 or later")
    autoscaled = spec.get("enableInTreeAutoscaling") is True
    for group in _list(spec.get("workerGroupSpecs")):
        named = f"{where}: worker group {at(group, 'groupName')}"
        low, count, high = (at(group, k) for k in ("minReplicas", "replicas", "maxReplicas"))
        if not (isinstance(low, int) and isinstance(high, int)):
            raise ManifestError(f"{named}: minReplicas and maxReplicas must both be set")
        if not low <= (count if isinstance(count, int) else low) <= high:
            raise ManifestError(f"{named}: replicas: {count}: allowed are {low}-{high}")
        v2 = at(spec, "autoscalerOptions.version") == "v2"
        if autoscaled and v2 and at(group, "template.spec.restartPolicy") != "Never":
            raise ManifestError(f"{named}: restartPolicy: autoscaler v2 needs Never")
    for variable in _environment(spec):
        if variable in ("RAY_REDIS_ADDRESS", "RAY_external_storage_namespace"):
            raise ManifestError(
                f"{where}: {variable}: GCS fault tolerance is set through gcsFaultToleranceOptions only"
            )


def _job(spec: object, where: str) -> None:
    assert isinstance(spec, dict)
    own, selected = spec.get("rayClusterSpec"), spec.get("clusterSelector")
    if (own is None) == (selected is None):
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
    if spec.get("backoffLimit") and (selected or spec.get("submissionMode") == "InteractiveMode"):
        raise ManifestError(f"{where}: backoffLimit: not with clusterSelector or InteractiveMode")
    if at(spec, "rayClusterSpec.authOptions.enableK8sTokenAuth"):
        raise ManifestError(f"{where}: enableK8sTokenAuth: not supported for a RayJob")
    if own is not None:
        _cluster(own, where)


def _ray_cron_job(spec: object, where: str) -> None:
    assert isinstance(spec, dict)
    unknown = set(spec) - {"schedule", "jobTemplate", "timeZone", "suspend"}
    if unknown:  # e.g. concurrencyPolicy: the job itself must hold a lease and be idempotent
        raise ManifestError(
            f"{where}: spec.{min(unknown)}: no such field; allowed: schedule jobTemplate timeZone suspend"
        )
    check_schedule(str(spec["schedule"]), f"{where}: schedule")
    _job(spec["jobTemplate"], where)


def _cron_job(spec: object, where: str) -> None:
    assert isinstance(spec, dict)
    check_schedule(str(spec["schedule"]), f"{where}: schedule")
    if spec.get("concurrencyPolicy") != "Forbid" or not spec.get("startingDeadlineSeconds"):
        raise ManifestError(
            f"{where}: needs concurrencyPolicy: Forbid and startingDeadlineSeconds, or missed ticks pile up"
        )


def _environment(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for variable in _list(node.get("env")):
            yield str(at(variable, "name"))
        for value in node.values():
            yield from _environment(value)
    for item in _list(node):
        yield from _environment(item)


def _list(value: object) -> list[dict[str, object]]:
    return value if isinstance(value, list) else []
