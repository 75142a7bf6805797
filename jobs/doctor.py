"""``palisade doctor``: checks that machine, environment and deployment have what the jobs need."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from jobs.terminal import Exit, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from jobs.terminal import Terminal
    from pipeline.config import Config

GB = 1024**3
DISK_LOW_GB, DISK_FULL_GB = 10, 1
PROBE_SECONDS = 3.0
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """One check; ``advice`` is the next step if ``state`` is not ok."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str  # result in a few words
    advice: str = ""


def doctor(config: Config, terminal: Terminal) -> int:
    """Runs every check on its own; returns 5 if one failed. A warning does not stop any job."""
    checks = [
        _guarded(check, config)
        for check in (
            _python,
            _packages,
            _torch,
            _gpu,
            _ray,
            _auth,
            _mlflow,
            _ledger,
            _store,
            _folders,
            _disk,
            _corpora,
            _captures,
        )
    ]
    failed = any(c.state == "fail" for c in checks)
    rows = [(c.name, f"[{COLOURS[c.state]}]{c.state}[/]", c.found, c.advice) for c in checks]
    shown = table("", ("check", "state", "found", "next step"), rows)
    for column in shown.columns[1:]:
        column.justify = "left"
    terminal.result({"ok": not failed, "checks": [asdict(c) for c in checks]}, shown)
    return Exit.INFRASTRUCTURE if failed else Exit.DONE


def _guarded(check: Callable[[Config], Check], config: Config) -> Check:
    try:
        return check(config)
    except (ImportError, OSError, RuntimeError, ValueError) as e:  # what is broken is the finding
        line = " ".join(str(e).split())[:160]
        return Check(
            check.__name__.strip("_"), "fail", f"{type(e).__name__}: {line}", "reinstall: make install"
        )


def _python(config: Config) -> Check:
    summary = f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPUs"
    if sys.version_info[:2] == (3, 11):
        return Check("python", "ok", summary)
    return Check("python", "fail", summary, "the pins are for CPython 3.11")


def _packages(config: Config) -> Check:
    wrong: list[str] = []
    needed = [Requirement(r) for r in metadata.requires("palisade") or []]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    for r in needed:
        try:
            version = metadata.version(r.name)
        except metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not r.specifier.contains(version, prereleases=True):
            wrong.append(f"{r.name} {version} (needs {r.specifier})")
    if wrong:
        return Check("packages", "fail", ", ".join(wrong), "make install")
    return Check("packages", "ok", f"{len(needed)} requirements met")


def _torch(config: Config) -> Check:
    import torch

    summary = f"{torch.__version__}, {torch.get_num_threads()} threads"
    assert float(torch.ones(3).sum()) == 3.0
    return Check("torch", "ok", summary)


def _gpu(config: Config) -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("gpu", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    if config.cluster.train_gpu and config.cluster.address == "local":
        return Check("gpu", "fail", "none", "cluster.train_gpu: false, or a machine with a GPU")
    return Check("gpu", "ok", "none; training runs on the CPU")


def _ray(config: Config) -> Check:
    version, address = importlib.import_module("ray").__version__, config.cluster.address
    if address == "local":
        summary, cpus = f"{version}, embedded with {config.cluster.cpus} CPUs", os.cpu_count() or 1
        if config.cluster.cpus > 2 * cpus:
            return Check("ray", "warn", summary, f"cluster.cpus: this machine has {cpus}")
        return Check("ray", "ok", summary)
    host = urlsplit(address if "://" in address else f"//{address}")
    if not host.port:
        return Check("ray", "ok", f"{version}, attaches to the cluster it runs on ({address})")
    try:
        socket.create_connection((host.hostname or "", host.port), PROBE_SECONDS).close()
    except OSError as e:
        return Check("ray", "fail", f"{version}, {address}: {e}", "start the head or correct cluster.address")
    return Check("ray", "ok", f"{version}, {address} answers")


def _auth(config: Config) -> Check:
    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    if config.cluster.address == "local":
        return Check("auth", "ok", f"embedded cluster on loopback, RAY_AUTH_MODE {mode}")
    sources = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    sources += ["~/.ray/auth_token"] if Path("~/.ray/auth_token").expanduser().exists() else []
    if mode == "disabled":
        return Check(
            "auth",
            "fail",
            "RAY_AUTH_MODE=disabled",
            "set RAY_AUTH_MODE=token: whoever reaches the head runs code",
        )
    if not sources:
        return Check(
            "auth", "fail", f"RAY_AUTH_MODE {mode}, no token", "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
    return Check("auth", "ok", f"RAY_AUTH_MODE {mode}, token from {sources[0]}")


def _mlflow(config: Config) -> Check:
    lineage = importlib.import_module("pipeline.lineage")
    version, uri = metadata.version("mlflow"), config.lineage.uri
    try:
        lineage.probe(uri)
    except (RuntimeError, ValueError) as e:
        return Check("mlflow", "fail", str(e), "start the server or correct lineage.uri")
    file = Path(uri.removeprefix("sqlite:///"))
    condition = (
        "answers"
        if not uri.startswith("sqlite")
        else ("exists" if file.exists() else "is created by the first run")
    )
    return Check("mlflow", "ok", f"{version}, {lineage.redacted(uri)} {condition}")


def _ledger(config: Config) -> Check:
    from pipeline.ledger import SCHEMA, Ledger, LedgerError, LedgerUnavailable

    url = config.ledger.url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return Check("ledger", "ok", "is created by the first job")
    try:
        Ledger.open(url, create=False)
    except ModuleNotFoundError as e:  # the driver that the URL names
        return Check("ledger", "fail", str(e), "pip install 'palisade[fleet]'")
    except LedgerUnavailable as e:
        return Check("ledger", "fail", str(e), "start the database or correct ledger.url")
    except LedgerError as e:
        return Check("ledger", "fail", str(e), "use the palisade that wrote it, or another ledger.url")
    return Check("ledger", "ok", f"schema {SCHEMA}")


def _store(config: Config) -> Check:
    from pipeline.storage import TEMPORARY, write_atomic

    probe = config.place(f"{TEMPORARY}doctor")
    if isinstance(probe, Path):
        return Check("store", "ok", "artifacts lie on this machine")
    try:
        write_atomic(probe, b"palisade")
        same = probe.read_bytes() == b"palisade"
        probe.unlink()
    except OSError as e:
        place, _, message = str(e).partition(": ")
        problem, _, advice = message.partition("; ")
        return Check("store", "fail", f"{place}: {problem}", advice)
    if not same:
        return Check(
            "store",
            "fail",
            f"{config.ledger.artifacts} returns other bytes",
            "use a store that is consistent",
        )
    return Check("store", "ok", f"{config.ledger.artifacts} is written, read and deleted")


def _folders(config: Config) -> Check:
    names = {"ledger.artifacts": str(config.folder()), "data.corpora": config.data.corpora}
    if config.ledger.url.startswith("sqlite:///"):
        names["ledger.url"] = str(Path(config.ledger.url.removeprefix("sqlite:///")).parent)
    for field, name in names.items():
        if not os.access(_existing(name), os.W_OK):
            return Check(
                "folders", "fail", f"{field}: {name} cannot be written", f"allow it, or change {field}"
            )
    return Check("folders", "ok", f"{', '.join(names)} can be written")


def _disk(config: Config) -> Check:
    free = shutil.disk_usage(_existing(str(config.folder()))).free / GB
    summary = f"{free:.0f} GB free for {config.folder()}"
    if free < DISK_LOW_GB:
        return Check(
            "disk", "fail" if free < DISK_FULL_GB else "warn", summary, "make room, or move ledger.artifacts"
        )
    return Check("disk", "ok", summary)


def _corpora(config: Config) -> Check:
    imported = sorted(p.parent.name for p in Path(config.data.corpora).glob("*/manifest.json"))
    missing = sorted(set(config.data.domains) - set(imported))
    if not imported or missing:
        summary = f"{len(imported)} in {config.data.corpora}" + (
            f", without {', '.join(missing)}" if missing else ""
        )
        return Check("corpora", "warn", summary, "palisade import KIND FOLDER (needed to train)")
    return Check("corpora", "ok", ", ".join(imported))


def _captures(config: Config) -> Check:
    from pipeline.data.captures import list_segments
    from pipeline.storage import place

    root = place(config.data.captures)
    if isinstance(root, Path) and not root.is_dir():
        return Check(
            "captures", "warn", f"no folder {root}", "let sites write data.captures/<site>/segment-*.parquet"
        )
    listing = list_segments(root)
    summary = (
        f"{len(listing.segments)} sites, {sum(len(files) for files in listing.segments.values())} segments"
    )
    if listing.rejected:
        return Check(
            "captures", "warn", f"{summary}, {len(listing.rejected)} refused", str(listing.rejected[0])
        )
    return Check("captures", "ok", summary)


def _existing(name: str) -> Path:
    path = Path(name).resolve()
    while not path.exists():
        path = path.parent
    return path
