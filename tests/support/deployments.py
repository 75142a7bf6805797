"""Builds small deployments, each in a folder of its own, and acts on them as a user does."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from jobs.__main__ import main
from pipeline.config import Config, load
from pipeline.ledger import Ledger

Settings = Mapping[str, object]  # a value by its dotted key; {root} stands for the folder

SITES = ("lobby-north", "terminal-gate", "vault-ir-dead", "yard-broken", "edge-untrusted")
STORES: Settings = {
    "data.captures": "{root}/captures",
    "data.labels": "{root}/labels",
    "data.frame_px": 32,
    "ledger.url": "sqlite:///{root}/ledger.db",
    "ledger.artifacts": "{root}/artifacts",
}
SETTINGS: Settings = {
    **STORES,
    "data.corpora": "{root}/corpora",
    "data.sealed": "{root}/sealed",
    "model.trunk": {"kind": "tiny", "width": 8, "features": 32},
    "model.tail": {"width": 16, "rank": 4},
    "source": {"kind": "erm", "steps": 60, "batch": 16},
    "site": {"kind": "danet", "reservoir": 8},
    "bank": {"slots": 2, "batch_size": 8},
    "guards.ceiling": {"apcer": 1.0, "bpcer": 1.0},
    "guards.noninferiority": {"attacks": 1.0, "worst_species": 1.0, "bona_fide": 1.0},
    "guards.trust": {"rho": 5.0, "margin": 5.0},
    "guards.no_data": {"stream_min": 40, "anchor_min": 1},
    "rollout.waves": [0.4, 1.0],
    "rollout.stage_seconds": 5,
    "rollout.bake_seconds": 0,
    "rollout.health_samples": 0,
    "rollout.health_presentations": 0,
    "rollout.second_approval_from_share": None,
    "rollout.control_share": 0,
    "cluster": {"shards": 2, "ingest_workers": 1},
    "lineage": {"uri": "sqlite:///{root}/mlflow.db", "artifacts": "{root}/mlflow"},
    "search": {
        "site_space": {"lr": {"choice": [0.0001, 0.01]}},
        "sites": ["lobby-north"],
        "trials": 2,
        "rungs": 2,
    },
}


@dataclass(frozen=True)
class Deployment:
    """A folder with a configuration file, and the commands that a user runs on it."""

    root: Path

    @property
    def yaml(self) -> str:
        return str(self.root / "palisade.yaml")

    @property
    def config(self) -> Config:
        return load(Path(self.yaml))

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.config.ledger.url)

    def run(self, *words: str) -> int:
        """Runs the command in this process and returns its exit code."""
        return main([*words, "--config", self.yaml])


def new_deployment(root: Path, settings: Settings = SETTINGS) -> Deployment:
    """Writes the configuration file; everything else is still to be made."""
    document: dict[str, dict[str, object]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        node = document.setdefault(section, {})
        node.update({name: value} if name else dict(value))
    root.mkdir(exist_ok=True)
    (root / "palisade.yaml").write_text(yaml.safe_dump(document).replace("{root}", str(root)))
    return Deployment(root)


def copy_deployment(d: Deployment, to: Path) -> Deployment:
    """Copies the folder and lets the configuration and the source models' paths point into the copy.

    Another process copies: closing a second handle on an open SQLite file in this one would drop its locks.
    """
    assert not to.exists(), to
    subprocess.run(["cp", "-r", str(d.root), str(to)], check=True)
    text = Path(d.yaml).read_text().replace(str(d.root), str(to))
    (to / "palisade.yaml").write_text(text)
    with sqlite3.connect(to / "ledger.db") as c:
        c.execute("update sources set path = replace(path, ?, ?)", (str(d.root), str(to)))
    return Deployment(to)


def printed(capsys) -> dict:
    """The JSON object that the commands printed since the last look."""
    return json.loads(capsys.readouterr().out)
