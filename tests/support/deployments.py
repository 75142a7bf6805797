"""A small deployment in a folder, and the ways in which a user acts on it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from jobs.__main__ import main
from pipeline.config import Config, load
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
