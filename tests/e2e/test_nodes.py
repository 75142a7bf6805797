"""Several nodes of which some die: drivers and raylets are killed, and every result stays the same."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pytest
from rich.console import Console

from jobs.adapt import adapt_step
from jobs.bench.fleet.runs import plain
from jobs.ingest import ingest_step
from jobs.terminal import Terminal
from pipeline.cluster import connected, fleet
from pipeline.config import Config
from pipeline.control.deployment import lease, now
from pipeline.simulate.cloned_sites import write_captures
from tests.support.crowds import FORK, QUIET, Crowd, assert_same, copy_crowd, new_crowd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

    from tests.support.deployments import Deployment

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
KILLS, RAYLETS = 20, 0.3  # at least; the share of raylets among them
KILLED = -signal.SIGKILL
MIB = 2**20
NODE = {"num_cpus": 1, "memory": 2048 * MIB, "object_store_memory": 80 * MIB}
NOTICED = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
CROWD, CAPTURES = 40, 80
STARVED = 3  # seconds between two kills by a node without memory: a shard is given up after five
INGESTS = "ray::MapBatches("  # decodes or makes features: which of both is left depends on the machine
WAIT = 60.0  # seconds for anything that must come


@dataclass(frozen=True)
class Nodes:
    """A cluster in a process of its own. Nodes are named by their raylet's process id."""

    address: str
    pipe: Connection
    alive: list[int]

    def add(self, **environment: str) -> int:
        self.pipe.send(environment)
        self.alive.append(self.pipe.recv())
        return self.alive[-1]

    def kill(self, raylet: int) -> None:
        """SIGKILL; what ran on the node ends by itself."""
        os.kill(raylet, signal.SIGKILL)
        self.alive.remove(raylet)

    def named(self, raylet: int, task: str) -> bool:
        """Whether a worker of the node calls itself ``task``."""
        return any(task in " ".join(_cmdline(child)) for child in psutil.Process(raylet).children())


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head that runs nothing and two nodes of one CPU."""
    temp = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: unix sockets below it may have 107 characters
    here, there = FORK.Pipe()
    process = FORK.Process(target=_host, args=(there, temp))
    process.start()
    there.close()
    nodes = Nodes(here.recv(), here, [])
    nodes.add()
    nodes.add()
    yield nodes
    here.close()
    process.join(WAIT)
    assert process.exitcode == 0
    shutil.rmtree(temp, ignore_errors=True)


def test_killed_drivers_and_raylets(nodes, tmp_path):
    rng, killed = np.random.default_rng(6), Counter[str]()
    (tmp_path / "template").mkdir()
    template = new_crowd(tmp_path / "template", QUIET)
    calm = copy_crowd(template, tmp_path / "calm")
    calm.arrive(0)
    began = time.monotonic()
    assert _ran(_adapt, calm.d, nodes.address) == 0
    seconds = time.monotonic() - began
    wanted = calm.states()
    assert len(wanted) == len(calm.ledger.streams.sites())
    lives = count()  # a driver may come through unharmed: every crowd needs a folder of its own
    while killed.total() < KILLS:
        crowd = copy_crowd(template, tmp_path / f"crowd {next(lives)}")
        crowd.arrive(0)
        ended = False
        while not ended:
            child = _started(_adapt, crowd.d, nodes.address)
            child.join(rng.uniform(0, seconds) if killed.total() < KILLS else None)
            if killed["raylet"] < RAYLETS * killed.total() and child.is_alive():
                nodes.kill(nodes.alive[0])
                killed["raylet"] += 1
                nodes.add()
                crowd.check()
                child.join(rng.uniform(0, seconds))
            child.kill()
            child.join()
            assert child.exitcode in (0, KILLED), child.exitcode
            killed["driver"] += child.exitcode == KILLED
            # one that was killed after its last write has ended as well: the next would begin another cycle
            ended = any(c.status == "finished" for c in crowd.ledger.cycles.history(kinds=["adapt"]))
            assert ended or child.exitcode == KILLED
            crowd.check()
        assert crowd.ledger.cycles.history(kinds=["adapt"])[0].status == "finished"
        assert crowd.ledger.audit.first_broken() is None
        assert_same(crowd.states(), wanted)
        crowd.ledger.close()
    assert killed["raylet"] >= RAYLETS * KILLS - 1


def test_a_shard_that_its_node_kills_for_want_of_memory_is_replaced(nodes, tmp_path):
    (tmp_path / "template").mkdir()
    crowd = new_crowd(tmp_path / "template", QUIET)
    crowd.arrive(0)
    for raylet in list(nodes.alive):
        nodes.kill(raylet)
    starving = nodes.add(
        RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms=f"{1000 * STARVED}"
    )
    driver = _started(_adapt, crowd.d, nodes.address)
    _until(lambda: bool(crowd.ledger.cycles.history(kinds=["adapt"])))
    time.sleep(2 * STARVED + 2)
    nodes.kill(starving)
    nodes.add()
    nodes.add()
    driver.join()
    assert driver.exitcode == 0
    assert crowd.check() == {row.site for row in crowd.ledger.streams.sites()}


def test_a_cycle_on_three_nodes_of_which_some_die(nodes, tmp_path):
    """One dies while it ingests and one while it adapts; each time a new one joins and takes its part."""
    (tmp_path / "template").mkdir()
    template = new_crowd(tmp_path / "template", QUIET, days=0)
    write_captures(tmp_path / "template" / "captures", _images(), sites=CROWD, captures=CAPTURES)
    alone, crowd = (copy_crowd(template, tmp_path / name) for name in ("alone", "nodes"))
    assert _ran(plain, alone.d.config) == 0

    here, there = FORK.Pipe()
    driver = _started(_cycle, crowd.d, nodes.address, there)
    there.close()
    features = Path(crowd.d.config.ledger.artifacts) / "features"
    _until(lambda: any(features.rglob("[0-9]*.parquet")))
    _until(lambda: any(nodes.named(raylet, INGESTS) for raylet in nodes.alive))
    nodes.kill(next(raylet for raylet in nodes.alive if nodes.named(raylet, INGESTS)))
    assert not crowd.ledger.streams.segment_names(), "it died in the middle of ingest"
    nodes.add()
    assert here.recv() == {
        "segments": CROWD,
        "samples": CROWD * CAPTURES,
        "failed_sites": 0,
        "quarantined": 0,
    }
    homes = [psutil.Process(_joined(here)).ppid()]
    here.send(True)
    homes.append(psutil.Process(_joined(here)).ppid())
    assert sorted(homes) == sorted(nodes.alive)
    new = nodes.add()
    _until(lambda: nodes.named(new, "ray::Shard") and not nodes.named(new, "ray::Shard."))
    here.send(True)
    assert psutil.Process(_joined(here)).ppid() == new
    here.send(True)
    nodes.kill(homes[0])
    done = crowd.check()
    assert len(done) < CROWD, "it died in the middle of adaptation"
    while (told := here.recv()) != {}:
        assert isinstance(told, int)
        here.send(True)
    driver.join()
    assert driver.exitcode == 0
    assert crowd.check() == {row.site for row in crowd.ledger.streams.sites()}
    assert crowd.ledger.audit.first_broken() is None
    assert _files(features) == _files(Path(alone.d.config.ledger.artifacts) / "features")
    assert len(crowd.states()) == CROWD
    assert_same(crowd.states(), alone.states())


def _started(work: Callable[..., object], *given: object) -> ForkServerProcess:
    child = FORK.Process(target=work, args=given, daemon=True)
    child.start()
    return child


def _ran(work: Callable[..., object], *given: object) -> int | None:
    child = _started(work, *given)
    child.join()
    return child.exitcode


def _joined(pipe: Connection) -> int:
    """Process id of the next shard."""
    assert pipe.poll(WAIT)
    pid = pipe.recv()
    assert isinstance(pid, int), pid
    return pid


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def _images() -> pa.Table:
    rng = np.random.default_rng(0)
    drawn = {"rgb": (32, 32, 3), "depth": (32, 32), "ir": (32, 32)}
    kinds = {"rgb": (".jpg", np.uint8), "depth": (".png", np.uint16), "ir": (".png", np.uint8)}
    return pa.table(
        {
            name: pa.array(
                [
                    cv2.imencode(kinds[name][0], rng.integers(0, 250, shape).astype(kinds[name][1]))[
                        1
                    ].tobytes()
                    for _ in range(40)
                ],
                pa.binary(),
            )
            for name, shape in drawn.items()
        }
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}


def _cycle(d: Deployment, address: str, pipe: Connection) -> None:
    """A driver of a whole cycle: sends what was ingested, then each shard that joins, waiting for answers."""
    config, ledger = _at(d.config, address, shards=3), d.ledger

    def joined(pid: int) -> None:
        pipe.send(pid)
        pipe.recv()

    with lease(config, ledger, "cycle") as cycle, connected(config.cluster):
        summary = ingest_step(config, ledger, cycle, _silent()).to_json()
        pipe.send({k: summary[k] for k in ("segments", "samples", "failed_sites", "quarantined")})
        crowd = Crowd(d, ledger)
        pending = {s.site: s.ingested_offset - s.learned_offset for s in ledger.streams.sites()}
        placement = fleet.Placement(3, 1, config.bank.slots, config.bank.cache_mb)
        failed = fleet.run_fleet(
            crowd.job(cycle), pending, placement=placement, on_progress=lambda *_: None, on_shard=joined
        )
        ledger.cycles.finish(cycle, summary={}, now=now())
    pipe.send(failed)


def _adapt(d: Deployment, address: str) -> None:
    """A driver of `palisade adapt` that connects to a running cluster."""
    config, ledger = _at(d.config, address), d.ledger
    with lease(config, ledger, "adapt") as cycle:
        summary = adapt_step(config, ledger, cycle, _silent())
        assert not summary.failed_sites
        ledger.cycles.finish(cycle, summary=summary.to_json(), now=now())


def _at(config: Config, address: str, *, shards: int = 2) -> Config:
    size = config.cluster.model_copy(update={"address": address, "shards": shards})
    return config.model_copy(update={"cluster": size})


def _silent() -> Terminal:
    return Terminal(out=Console(file=StringIO()), err=Console(file=StringIO()))


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _host(pipe: Connection, temp: str) -> None:
    """Starts a cluster and sends its address; adds a node for every message, in the environment it holds."""
    os.environ.update(NOTICED, RAY_TMPDIR=temp)  # its address must not become everybody's default
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, shutdown_at_exit=True, head_node_args=head)
    try:
        pipe.send(cluster.address)
        while True:
            own = pipe.recv()
            os.environ.update(own)
            node = cluster.add_node(wait=True, **NODE)
            for name in own:
                del os.environ[name]
            pipe.send(node.all_processes["raylet"][0].process.pid)
    except EOFError:
        pass
    finally:
        cluster.shutdown()
