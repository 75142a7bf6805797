"""A cycle with its captures and artifacts in an S3 store: nothing that matters lies on the machine."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data import blobs
from pipeline.data.anchor import open_sealed
from pipeline.models import checkpoint
from pipeline.storage import files, place, write_atomic
from tests.support.deployments import SITES, Deployment
from tests.support.object_stores import url

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def remote(deployment, endpoint) -> Deployment:
    """The trained deployment with its two folders moved into the bucket."""
    root, yaml = deployment.root, Path(deployment.yaml)
    for name in ("captures", "artifacts"):
        there = url(endpoint, f"artifacts/fleet/{name}")  # a bucket named artifacts
        yaml.write_text(yaml.read_text().replace(f"{name}: '{root}/{name}'", f'{name}: "{there}"'))
    assert deployment.config.data.captures.startswith("s3:")
    with sqlite3.connect(root / "ledger.db") as c:
        ((path,),) = c.execute("select path from sources")
        inside = Path(path).relative_to(root / "artifacts").parts
        c.execute("update sources set path = ?", [str(deployment.config.place(*inside))])
    for name in ("captures", "artifacts/models", "artifacts/anchors"):
        for found in files(root / name):
            there = place(url(endpoint, f"artifacts/fleet/{name}")).joinpath(*found.parts)
            write_atomic(there, found.place.read_bytes())
    for name in ("captures", "artifacts"):
        shutil.rmtree(root / name)
    return deployment


def test_a_cycle_on_an_object_store(remote, capsys):
    told = cycle(remote)
    assert told["failed_sites"] == 0
    assert told["adapted"] == len(SITES)
    config, ledger = remote.config, remote.ledger
    there = {f.parts[0] for f in files(config.place())}
    assert there == {"models", "anchors", "features", "states", "outcomes"}
    assert (
        checkpoint.load(ledger.sources.champion().path).manifest.trunk_digest
        == ledger.sources.champion().trunk
    )
    assert len(
        open_sealed(config.place("anchors"), ledger.verdicts.anchor(ledger.sources.champion().trunk)).species
    )
    for site in ledger.streams.sites():
        assert 0 < site.learned_offset == site.ingested_offset
    for state in ledger.verdicts.states([s.learner for s in ledger.streams.sites()]).values():
        blobs.get(config.place("states"), state.blob)
    left = {f.parts[-2:] for f in files(place(config.data.captures))}
    doubtful = {(q.site, q.segment) for q in ledger.streams.quarantined()}
    assert left == doubtful, "frames do not outlive ingest, but for those that somebody may look into"
    assert Path(str(told["report"])).is_file(), "a page is for people: it lies on this machine"
    assert not (remote.root / "artifacts").exists()
    assert not (remote.root / "captures").exists()
    capsys.readouterr()
    assert remote.run("gc", "--grace-hours", "0", "--json") == 0
    kept = json.loads(capsys.readouterr().out)
    assert (kept["states"], kept["outcomes"]) == ({"files": 0, "bytes": 0},) * 2


def cycle(d: Deployment) -> dict[str, object]:
    """In a process of its own: its Ray starts with the credentials of this environment."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jobs",
            "cycle",
            "data.retention=until_ingested",
            "--json",
            "--config",
            d.yaml,
        ],
        cwd=d.root,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr[-3000:]
    return json.loads(done.stdout)
