"""One small deployment, built once by the jobs themselves: two rendered domains, five sites, a model of a few steps."""

from __future__ import annotations

import sqlite3
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jobs.__main__ import main
from pipeline.config import Config, load
from pipeline.data.corpora import synth
from pipeline.data.fleet import demo_fleet, simulate
from pipeline.ledger import Ledger

SITES = ("lobby-north", "terminal-gate", "vault-ir-dead", "yard-broken", "edge-untrusted")

YAML = """
data: {{corpora: {root}/corpora, captures: {root}/captures, sealed: {root}/sealed, redteam: {root}/redteam, size: 32}}
model: {{trunk: {{kind: tiny, width: 8, features: 32}}, tail: {{width: 16, rank: 4}}}}
source: {{kind: erm, steps: 60, batch: 16}}
site: {{kind: danet, reservoir: 8}}
bank: {{sites: 2, batch: 8}}
guards:
  ceiling: {{apcer: 1.0, bpcer: 1.0}}
  noninferiority: {{attacks: 1.0, worst_species: 1.0, bona_fide: 1.0}}
  trust: {{rho: 5.0, margin: 5.0}}
  no_data: {{n_min: 40, anchor_min: 1}}
rollout: {{waves: [0.4, 1.0], stage_seconds: 5, bake_seconds: 0, health_samples: 0, health_presentations: 0,
          two_people_from: null, control_share: 0}}
cluster: {{shards: 2, ingest_workers: 1}}
ledger: {{url: "sqlite:///{root}/ledger.db", artifacts: {root}/artifacts}}
lineage: {{uri: "sqlite:///{root}/mlflow.db", artifacts: {root}/mlflow}}
search: {{space: {{lr: {{choice: [0.0001, 0.01]}}}}, sites: [lobby-north], samples: 2, rungs: 2}}
"""


@dataclass(frozen=True)
class Deployment:
    """A folder with a YAML, and ways to act on it as a user does."""

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
        return main([*words, "--config", self.yaml])


def copy(root: Path, to: Path) -> None:
    """Copy a deployment by another process: closing a second handle on an open SQLite file here would drop its locks."""
    subprocess.run(["cp", "-r", str(root), str(to)], check=True)


def fresh(root: Path, text: str = YAML) -> Deployment:
    (root / "palisade.yaml").write_text(text.format(root=root))
    return Deployment(root)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, ray_local) -> Deployment:
    """Corpora, captures of day 1 and a source model; nothing is ingested."""
    d = fresh(tmp_path_factory.mktemp("trained"))
    synth.write(Path(d.config.data.corpora), size=32, domains=("A", "B"), samples=90)
    scripts = [replace(s, rate=3.0) for s in demo_fleet() if s.site in SITES]
    simulate(d.root, scripts, phase=1)
    assert d.run("train") == 0
    return d


@pytest.fixture
def deployment(trained, tmp_path) -> Deployment:
    """A copy of its own for each test."""
    root = tmp_path / "d"
    copy(trained.root, root)
    d = fresh(root)
    moved = str(trained.root), str(root)
    with sqlite3.connect(root / "ledger.db") as c:
        c.execute("update sources set path = replace(path, ?, ?)", moved)
    return d
