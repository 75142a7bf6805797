"""Killing what adapts changes nothing: every offset has effect exactly once, states are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest
import torch

from jobs.deployment import lease, now
from pipeline.cluster import fleet
from pipeline.cluster.shard import ShardJob
from pipeline.data import blobs
from pipeline.ledger import StaleGeneration
from tests.e2e.conftest import copy

pytestmark = pytest.mark.e2e


def adapt(d, *, on_shard=None) -> dict[str, str]:
    config, ledger = d.config, d.ledger
    source = ledger.source()
    with lease(config, ledger, "adapt") as cycle:
        job = ShardJob(config.model_dump_json(), source.path, source.version, ledger.anchor(source.trunk), cycle)
        placement = fleet.Placement(shards=2, cpus=1, slots=config.bank.sites, hot_mb=config.bank.hot_mb)
        pending = {s.site: s.ingested - s.learned for s in ledger.sites()}
        failed = fleet.adapt(job, pending, placement=placement, on_progress=lambda *_: None, on_shard=on_shard)
        ledger.finish_cycle(cycle, summary={"source_version": source.version}, now=now())
    return failed


def states(d) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for s in d.ledger.states([v.state for v in d.ledger.verdicts()]).values():
        found[s.site] = {k: t[s.slot] for k, t in blobs.get(d.config.place("states"), s.blob).items()}
    return found


def killer(d, pids: list[int]) -> None:
    """One shard at once, every shard that is alive once the first chunk is committed."""
    os.kill(pids[0], signal.SIGKILL)
    ledger, deadline = d.ledger, time.monotonic() + 60
    while not ledger.verdicts() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in pids[1:]:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_killed_shards_lose_and_repeat_nothing(deployment, tmp_path):
    assert deployment.run("ingest") == 0
    undisturbed = type(deployment)(tmp_path / "copy")
    copy(deployment.root, undisturbed.root)
    text = (deployment.root / "palisade.yaml").read_text().replace(str(deployment.root), str(undisturbed.root))
    (undisturbed.root / "palisade.yaml").write_text(text)
    assert adapt(undisturbed) == {}

    killed: list[int] = []

    def strike(pids: list[int]) -> None:
        killed.extend(pids)
        threading.Thread(target=killer, args=(deployment, pids), daemon=True).start()

    assert adapt(deployment, on_shards=strike) == {}
    assert killed
    ledger = deployment.ledger
    assert all(s.learned == s.ingested for s in ledger.sites())
    verdicts = ledger.verdicts()
    assert sorted(v.site for v in verdicts) == [s.site for s in ledger.sites()]
    assert {v.site: (v.offset_from, v.offset_to) for v in verdicts} == {s.site: (0, s.ingested) for s in ledger.sites()}
    mine, theirs = states(deployment), states(undisturbed)
    assert mine.keys() == theirs.keys()
    for site, state in mine.items():
        assert all(torch.equal(t, theirs[site][k]) for k, t in state.items()), site


def test_a_replaced_driver_cannot_write(deployment):
    assert deployment.run("ingest") == 0
    ledger, config = deployment.ledger, deployment.config
    old = ledger.begin_cycle(
        "adapt", config.fingerprint(), "{}", holder="elsewhere:1:1", dead=lambda _: False, now=now()
    )
    new = ledger.begin_cycle("adapt", config.fingerprint(), "{}", holder="here:1:1", dead=lambda _: True, now=now())
    assert new.resumed and new.generation == old.generation + 1
    before = ledger.sites()
    with pytest.raises(StaleGeneration):
        ledger.commit_shard(old, [], now=now())
    assert ledger.sites() == before


def test_one_damaged_site_does_not_stop_the_others(deployment):
    assert deployment.run("ingest") == 0
    broken = next((deployment.root / "artifacts" / "features").rglob("site=lobby-north/*.parquet"))
    broken.write_bytes(b"not parquet")
    failed = adapt(deployment)
    assert list(failed) == ["lobby-north"]
    assert "ingest" in failed["lobby-north"]
    assert {v.site for v in deployment.ledger.verdicts()} == {s.site for s in deployment.ledger.sites()} - {
        "lobby-north"
    }
