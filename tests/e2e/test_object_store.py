"""The whole loop with its artifacts in an S3 store: nothing that matters lies on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data import blobs
from pipeline.data.anchor import open_sealed
from pipeline.data.corpora import synth
from pipeline.data.fleet import demo_fleet, simulate
from pipeline.models import checkpoint
from pipeline.storage import files
from tests.e2e.conftest import SITES, Deployment, fresh
from tests.test_object_store import endpoint, url  # noqa: F401  # a fixture

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def remote(tmp_path, endpoint, monkeypatch) -> Deployment:  # noqa: F811
    d = fresh(tmp_path)
    text = Path(d.yaml).read_text()
    Path(d.yaml).write_text(
        text.replace(f"artifacts: {tmp_path}/artifacts", f'artifacts: "{url(endpoint, "artifacts/fleet")}"')
    )
    monkeypatch.chdir(tmp_path)
    synth.write(Path(d.config.data.corpora), size=32, domains=("A", "B"), samples=90)
    simulate(d.root, [replace(s, rate=3.0) for s in demo_fleet() if s.site in SITES], phase=1)
    return d


def palisade(d: Deployment, *words: str) -> dict[str, object]:
    """In a process of its own: its Ray starts with the credentials of this environment."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *words, "--json", "--config", d.yaml],
        cwd=d.root, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr[-3000:]
    return json.loads(done.stdout)


def test_train_and_cycle_on_an_object_store(remote):
    made = palisade(remote, "train")
    assert str(made["path"]).startswith("s3://artifacts/fleet/models/")
    told = palisade(remote, "cycle")
    assert told["failed_sites"] == 0
    assert told["adapted"] == len(SITES)
    config, ledger = remote.config, remote.ledger
    there = {f.inside[0] for f in files(config.place())}
    assert there == {"models", "anchors", "features", "states", "outcomes"}
    assert checkpoint.load(ledger.source().path).manifest.trunk_digest == ledger.source().trunk
    assert len(open_sealed(config.place("anchors"), ledger.anchor(ledger.source().trunk)).species)
    for site in ledger.sites():
        assert site.learned == site.ingested
    for state in ledger.states([s.learner for s in ledger.sites()]).values():
        blobs.get(config.place("states"), state.blob)
    assert Path(str(told["report"])).is_file(), "a page is for people: it lies on this machine"
    assert not (remote.root / "artifacts").exists()
    kept = palisade(remote, "gc", "--grace-hours", "0")
    assert (kept["states"], kept["outcomes"]) == ({"files": 0, "bytes": 0},) * 2
