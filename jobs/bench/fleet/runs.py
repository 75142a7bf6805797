"""Runs the cycles over cloned sites that ``palisade bench fleet`` times: plain, under kills, resumed."""

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
from pipeline.ledger import Ledger, SegmentRow
from pipeline.simulate import cloned_sites

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import pyarrow as pa

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Cycle

KILL_SECONDS = 10.0
STARTED_SHARE = 0.3  # of the sites that are done when the driver is killed


class Timed(NamedTuple):
    """Seconds of a cycle's parts."""

    ingest: float
    adapt: float
    lineage: float
    sites: int

    @property
    def cycle(self) -> float:
        """Seconds of the cycle without its lineage."""
        return self.ingest + self.adapt


@dataclass(frozen=True)
class Ground:
    """What every run starts from: a deployment with a source model, and a pool of images."""

    config: Config
    images: pa.Table
    root: Path  # of the runs' deployments

    def named(self, name: str) -> Config:
        """Returns the configuration of a run's deployment."""
        root = self.root / name
        ledger = {"url": f"sqlite:///{root}/ledger.db", "artifacts": str(root / "artifacts")}
        return with_sections(self.config, data={"captures": str(root / "captures")}, ledger=ledger)

    def deployment(self, name: str) -> Config:
        """Makes a deployment with the same source model and anchor set; what was there before is deleted."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        config = self.named(name)
        mine, theirs = open_ledger(config), open_ledger(self.config)
        s = theirs.sources.champion()
        mine.sources.add(s.manifest, path=s.path, lineage=s.lineage, now=now())
        mine.verdicts.pin_anchor(theirs.verdicts.anchor(s.trunk), trunk=s.trunk, summary={}, now=now())
        shutil.copytree(str(self.config.place("anchors")), str(config.place("anchors")))
        return config

    def with_captures(self, name: str, *, sites: int, captures: int) -> Config:
        """Makes a deployment with captures that nobody has ingested."""
        config = self.deployment(name)
        cloned_sites.write_captures(Path(config.data.captures), self.images, sites=sites, captures=captures)
        return config

    def with_features(self, name: str, block: FeatureBlock, *, sites: int, samples: int) -> Config:
        """Makes a deployment whose sites are ingested and not adapted."""
        config, names = self.deployment(name), cloned_sites.names(sites)
        ledger = open_ledger(config)
        place, trunk = config.place("features"), source_model(ledger).trunk
        cloned_sites.store_features(place, trunk, block, sites=sites, samples=samples)
        ledger.streams.register({site: {} for site in names}, now=now())
        with lease(config, ledger, "ingest") as held:
            rows = [SegmentRow(site, "segment-0001.parquet", "", samples, 0, samples, 0) for site in names]
            ledger.streams.commit(held, rows, [], now=now())
            ledger.cycles.finish(held, summary={}, now=now())
        return config


def with_sections(config: Config, **sections: Mapping[str, object]) -> Config:
    """Returns ``config`` with other values in some sections, which are not validated."""
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def cycle(config: Config, terminal: Terminal) -> Timed:
    """Runs and times a whole cycle under the connected Ray."""
    ledger = open_ledger(config)
    with lease(config, ledger, "cycle") as held:
        at = [time.perf_counter()]
        summary = ingest_step(config, ledger, held, terminal).to_json()
        at.append(time.perf_counter())
        summary = {**summary, **adapt_step(config, ledger, held, terminal).to_json()}
        ledger.cycles.finish(held, summary=summary, now=now())
        at.append(time.perf_counter())
    record(config, ledger, held, summary)
    sites = _check(ledger)
    return Timed(at[1] - at[0], at[2] - at[1], time.perf_counter() - at[2], sites)


def plain(config: Config) -> Timed:
    """Does the same work by the same functions in one loop of this process."""
    torch.set_num_threads(1)
    ledger = open_ledger(config)
    models = [source_model(ledger).path]
    with lease(config, ledger, "cycle") as held:
        at = [time.perf_counter()]
        listing = cluster_ingest.find(config.data, {}, lambda _: 0)
        ledger.streams.register({site: {} for site in listing.sites}, now=now())
        batches = cluster_ingest.featurised_here(config, listing.new, models)
        done = cluster_ingest.assemble(config, listing.new, batches, models)
        ingested = cluster_ingest.collect(listing.new, done, {})
        ledger.streams.commit(held, ingested.segments, ingested.quarantined, now=now())
        at.append(time.perf_counter())
        for call in assign.group_calls(_pending(ledger), slots=config.bank.slots):
            adapt_sites(shard_job(config, ledger, held), call)
        ledger.cycles.finish(held, summary={}, now=now())
        at.append(time.perf_counter())
    return Timed(at[1] - at[0], at[2] - at[1], 0.0, _check(ledger))


def features_of(config: Config) -> FeatureBlock:
    """Returns the features of a site that a cycle has ingested."""
    ledger, width = open_ledger(config), int(config.model.trunk.features)
    source, row = source_model(ledger), ledger.streams.sites()[0]
    place = config.place("features")
    return read_features(place, source.trunk, row.site, start=0, end=row.ingested_offset, features=width)


def adapted(
    config: Config, terminal: Terminal, *, kill_every: float | None = None, most: int = sys.maxsize
) -> tuple[float, int]:
    """Adapts everything that is pending; returns its seconds and the shards killed on the way. Needs Ray."""
    ledger, alive, killed = open_ledger(config), list[int](), list[int]()
    with lease(config, ledger, "adapt") as held, _killing(alive, killed, kill_every, most):
        began = time.perf_counter()
        with terminal.progress("bench fleet, adapt", "sites") as advance:
            failed = _run_fleet(config, ledger, held, advance, alive.append)
        seconds = time.perf_counter() - began
        ledger.cycles.finish(held, summary={}, now=now())
    if failed:
        raise RuntimeError(f"{len(failed)} sites were not adapted, first {next(iter(failed.items()))}")
    _check(ledger)
    return seconds, len(killed)


def resumed(config: Config, terminal: Terminal) -> tuple[float, int]:
    """Kills ``palisade adapt`` by SIGKILL; returns the seconds to the next commit, and the sites left."""
    ledger, path = open_ledger(config), Path(config.ledger.artifacts).parent / "palisade.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs", "adapt", "--config", str(path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sites = len(ledger.streams.sites())
    try:
        while driver.poll() is None and len(ledger.verdicts.outcomes()) < STARTED_SHARE * sites:
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()
    left, first, began = sites - len(ledger.verdicts.outcomes()), list[float](), time.perf_counter()

    def committed(done: int, _: int) -> None:
        if done and not first:
            first.append(time.perf_counter() - began)

    with lease(config, ledger, "adapt") as held:
        assert held.resumed, "the killed driver's cycle is the one that goes on"
        _run_fleet(config, ledger, held, committed)
        ledger.cycles.finish(held, summary={}, now=now())
    _check(ledger)
    terminal.say(f"resumed with {left} of {sites} sites left")
    return (first[0] if first else float("nan")), left


def resident(url: str) -> float:
    """Returns the GiB that this process holds when it drives every site of the ledger at ``url``."""
    ledger = Ledger.open(url)
    pending = {r.site: r.ingested_offset - r.learned_offset for r in ledger.streams.sites()}
    ledger.verdicts.outcomes()
    ledger.releases.serving()
    assign.home_shards(list(pending), 28)
    assign.group_calls(pending, slots=256)
    return psutil.Process().memory_info().rss / 2**30


def _pending(ledger: Ledger) -> dict[str, int]:
    """Returns how many samples each site has not learned from yet."""
    left = {r.site: r.ingested_offset - r.learned_offset for r in ledger.streams.sites()}
    return {site: samples for site, samples in left.items() if samples > 0}


def _run_fleet(
    config: Config,
    ledger: Ledger,
    held: Cycle,
    on_progress: Callable[[int, int], None],
    on_shard: Callable[[int], object] | None = None,
) -> Mapping[str, str]:
    job, placement = shard_job(config, ledger, held), fleet.placement(config)
    callbacks = {"on_progress": on_progress, "on_shard": on_shard}
    return fleet.run_fleet(job, _pending(ledger), placement=placement, **callbacks)


def _check(ledger: Ledger) -> int:
    """Returns the number of sites; a run that did not do its work has no time."""
    rows, judged = ledger.streams.sites(), ledger.verdicts.outcomes()
    left = [r.site for r in rows if r.learned_offset != r.ingested_offset or r.site not in judged]
    if left or not rows:
        raise RuntimeError(f"{len(left)} of {len(rows)} sites are not adapted, first {left[:1]}")
    return len(rows)


@contextmanager
def _killing(alive: list[int], killed: list[int], every: float | None, most: int) -> Iterator[None]:
    """Kills the youngest shard by SIGKILL every so often, ``most`` times."""
    ended = threading.Event()

    def strike() -> None:
        while every is not None and len(killed) < most and not ended.wait(every):
            living = [pid for pid in reversed(alive) if psutil.pid_exists(pid) and pid not in killed]
            for pid in living[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
