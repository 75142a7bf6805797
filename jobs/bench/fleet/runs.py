"""The runs that ``palisade bench fleet`` times: whole cycles over crowds, beside plain loops, killed,
resumed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
import yaml

from jobs.adapt import adapt_step, record
from jobs.ingest import ingest_step
from pipeline.cluster import fleet
from pipeline.cluster import ingest as cluster_ingest
from pipeline.control import assign
from pipeline.control.adapt import adapt_sites, shard_job
from pipeline.control.deployment import lease, now, open_ledger, source_model
from pipeline.data.features import FeatureBlock, read_features
from pipeline.ledger import SegmentRow
from pipeline.simulate import cloned_sites as crowd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pyarrow as pa

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger

KILL_SECONDS = 10.0
BLOCK = 1000  # sites registered or committed at once by the fixtures
STARTED_SHARE = 0.3  # of the sites that are done when the driver is killed


class Timed(NamedTuple):
    """Seconds of a cycle's parts."""

    ingest: float
    adapt: float
    lineage: float
    sites: int

    @property
    def cycle(self) -> float:
        return self.ingest + self.adapt


@dataclass(frozen=True)
class Ground:
    """What every run starts from: a deployment with a source model, and a pool of images."""

    config: Config
    images: pa.Table
    root: Path  # of the runs' deployments

    def named(self, name: str) -> Config:
        """The configuration of a run's deployment."""
        root = self.root / name
        ledger = {"url": f"sqlite:///{root}/ledger.db", "artifacts": str(root / "artifacts")}
        return moved(self.config, data={"captures": str(root / "captures")}, ledger=ledger)

    def deployment(self, name: str) -> Config:
        """A deployment of its own with the same source model and anchor set; whatever was there before is
        gone.
        """
        shutil.rmtree(self.root / name, ignore_errors=True)
        config = self.named(name)
        mine, theirs = open_ledger(config), open_ledger(self.config)
        source = theirs.sources.champion()
        mine.sources.add(source.manifest, path=source.path, lineage=source.lineage, now=now())
        digest = theirs.verdicts.anchor(source.trunk)
        mine.verdicts.pin_anchor(digest, trunk=source.trunk, summary={}, now=now())
        shutil.copytree(str(self.config.place("anchors")), str(config.place("anchors")))
        return config

    def crowd(self, name: str, *, sites: int, captures: int) -> Config:
        """A deployment with captures that nobody has ingested."""
        config = self.deployment(name)
        crowd.write_captures(Path(config.data.captures), self.images, sites=sites, captures=captures)
        return config

    def fed(self, name: str, seen: FeatureBlock, *, sites: int, samples: int) -> Config:
        """A deployment whose sites are ingested and not adapted."""
        config = self.deployment(name)
        ledger = open_ledger(config)
        source, names = source_model(ledger), crowd.names(sites)
        crowd.store_features(config.place("features"), source.trunk, seen, sites=sites, samples=samples)
        ledger.streams.register({site: {} for site in names}, now=now())
        with lease(config, ledger, "ingest") as held:
            rows = [SegmentRow(site, "segment-0001.parquet", "", samples, 0, samples, 0) for site in names]
            ledger.streams.commit(held, rows, [], now=now())
            ledger.cycles.finish(held, summary={}, now=now())
        return config


def moved(config: Config, **sections: Mapping[str, object]) -> Config:
    """``config`` with other values in some sections, as they are given."""
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def cycle(config: Config, terminal: Terminal) -> Timed:
    """A whole cycle under the connected Ray."""
    ledger = open_ledger(config)
    with lease(config, ledger, "cycle") as held:
        began = time.perf_counter()
        ingest = ingest_step(config, ledger, held, terminal)
        ingested = time.perf_counter()
        summary = {**ingest.to_json(), **adapt_step(config, ledger, held, terminal).to_json()}
        ledger.cycles.finish(held, summary=summary, now=now())
        adapted = time.perf_counter()
    record(config, ledger, held, summary)
    _check(ledger)
    return Timed(
        ingested - began, adapted - ingested, time.perf_counter() - adapted, len(ledger.streams.sites())
    )


def plain(config: Config) -> Timed:
    """The same work by the same functions in one loop of this process."""
    torch.set_num_threads(1)
    ledger = open_ledger(config)
    source = source_model(ledger)
    with lease(config, ledger, "cycle") as held:
        began = time.perf_counter()
        found = cluster_ingest.find(config.data, {}, lambda _: 0)
        ledger.streams.register({site: {} for site in found.sites}, now=now())
        place = config.place("features")
        done = [
            d for b in found.new for d in cluster_ingest.ingest_site(b, config.data, [source.path], place)
        ]
        taken = cluster_ingest.collect(found.new, done, {})
        ledger.streams.commit(held, taken.segments, taken.quarantined, now=now())
        ingested = time.perf_counter()
        pending = {r.site: r.ingested_offset - r.learned_offset for r in ledger.streams.sites()}
        for call in assign.group_calls(pending, slots=config.bank.slots):
            adapt_sites(shard_job(config, ledger, held), call)
        ledger.cycles.finish(held, summary={}, now=now())
        adapted = time.perf_counter()
    _check(ledger)
    return Timed(ingested - began, adapted - ingested, 0.0, len(pending))


def seen(config: Config) -> FeatureBlock:
    """Features of a site that a cycle has ingested."""
    ledger = open_ledger(config)
    source, row = source_model(ledger), ledger.streams.sites()[0]
    width = int(config.model.trunk.features)
    return read_features(
        config.place("features"), source.trunk, row.site, start=0, end=row.ingested_offset, features=width
    )


def adapted(
    config: Config, terminal: Terminal, *, kill_every: float | None = None, most: int = sys.maxsize
) -> tuple[float, int]:
    """(seconds to adapt everything that is pending, shards killed by SIGKILL on the way) under the connected
    Ray.
    """
    ledger = open_ledger(config)
    alive: list[int] = []
    killed: list[int] = []
    with lease(config, ledger, "adapt") as held, _killing(alive, killed, kill_every, most):
        pending = {r.site: r.ingested_offset - r.learned_offset for r in ledger.streams.sites()}
        began = time.perf_counter()
        with terminal.progress("bench fleet, adapt", "sites") as advance:
            failed = fleet.run_fleet(
                shard_job(config, ledger, held),
                pending,
                placement=fleet.placement(config),
                on_progress=advance,
                on_shard=alive.append,
            )
        seconds = time.perf_counter() - began
        ledger.cycles.finish(held, summary={}, now=now())
    if failed:
        raise RuntimeError(f"{len(failed)} sites were not adapted, first {next(iter(failed.items()))}")
    _check(ledger)
    return seconds, len(killed)


def resumed(config: Config, terminal: Terminal) -> tuple[float, int]:
    """Kill a driver by SIGKILL in the middle of ``palisade adapt`` → (seconds until the next one has
    committed, sites left).
    """
    ledger = open_ledger(config)
    path = Path(config.ledger.artifacts).parent / "palisade.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs", "adapt", "--config", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sites = len(ledger.streams.sites())
    try:
        while driver.poll() is None and len(ledger.verdicts.outcomes()) < STARTED_SHARE * sites:
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    before = len(ledger.verdicts.outcomes())
    first: list[float] = []
    began = time.perf_counter()

    def committed(done: int, _: int) -> None:
        if done and not first:
            first.append(time.perf_counter() - began)

    with lease(config, ledger, "adapt") as held:
        assert held.resumed, "the killed driver's cycle is the one that goes on"
        pending = {
            r.site: r.ingested_offset - r.learned_offset
            for r in ledger.streams.sites()
            if r.learned_offset < r.ingested_offset
        }
        fleet.run_fleet(
            shard_job(config, ledger, held), pending, placement=fleet.placement(config), on_progress=committed
        )
        ledger.cycles.finish(held, summary={}, now=now())
    _check(ledger)
    terminal.say(f"resumed with {sites - before} of {sites} sites left")
    return (first[0] if first else float("nan")), sites - before


def resident(url: str) -> float:
    """GiB that this process holds when it drives every registered site of the ledger at ``url``."""
    from pipeline.ledger import Ledger

    ledger = Ledger.open(url)
    pending = {r.site: r.ingested_offset - r.learned_offset for r in ledger.streams.sites()}
    ledger.verdicts.outcomes()
    ledger.releases.serving()
    assign.home_shards(list(pending), 28)
    assign.group_calls(pending, slots=256)
    return psutil.Process().memory_info().rss / 2**30


def _check(ledger: Ledger) -> None:
    """A run that did not do its work has no time."""
    rows, judged = ledger.streams.sites(), ledger.verdicts.outcomes()
    left = [r.site for r in rows if r.learned_offset != r.ingested_offset or r.site not in judged]
    if left or not rows:
        raise RuntimeError(f"{len(left)} of {len(rows)} sites are not adapted, first {left[:1]}")


@contextmanager
def _killing(alive: list[int], killed: list[int], every: float | None, most: int) -> Iterator[None]:
    """SIGKILL the youngest shard every so often, ``most`` times."""
    ended = threading.Event()

    def strike() -> None:
        while every is not None and len(killed) < most and not ended.wait(every):
            for pid in reversed(alive):
                if psutil.pid_exists(pid) and pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
