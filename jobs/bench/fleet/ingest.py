"""Times ingest beside bare loops and beside a DataLoader, on the same files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from jobs.bench.fleet import bare
from jobs.ingest import ingest_step
from pipeline.control.deployment import lease, now, open_ledger
from pipeline.data.captures import list_segments, read_segment
from pipeline.data.decode import decode
from pipeline.data.featurise import compute_features, load_trunk
from pipeline.data.segments import decode_chunks
from pipeline.models import TinyConfig, checkpoint, tail, trunk
from pipeline.models.manifest import read_manifest

if TYPE_CHECKING:
    from jobs.bench.fleet.runs import Ground
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.data.segments import DecodedChunk

SMALLEST = TinyConfig(width=4, features=8)  # what is left of the trunk's share when a GPU does it
DECODED = 4  # segments in the decoding loop


def measure(ground: Ground, terminal: Terminal, *, sites: int, captures: int) -> dict[str, float | None]:
    """Returns ratios of captures per second; the workers of Ray are there when the clock starts."""
    _single(0)
    _ingested(ground.with_captures("warm", sites=2, captures=8), terminal)
    whole = ground.with_captures("whole", sites=sites, captures=captures)
    segments = list_segments(Path(whole.data.captures)).segments.values()
    paths = [p for of in segments for p in of if isinstance(p, Path)]
    loop = _decode_only(whole, paths[:DECODED]) * len(os.sched_getaffinity(0))
    floor = bare.rate(whole.data, paths, checkpoint=open_ledger(whole).sources.champion().path)
    ours, loader = _ingested(whole, terminal), _loaded(whole, paths)
    smallest = _with_smallest_trunk(ground.with_captures("plane", sites=sites, captures=captures))
    data_plane = _ingested(smallest, terminal)
    ratios = {"ingest": data_plane / loop, "ingest.trunk": ours / loop, "ingest.loader": ours / loader}
    return {**ratios, "ingest.bare": ours / floor, "ingest.rate": ours}


def _ingested(config: Config, terminal: Terminal) -> float:
    """Returns the captures per second of one ingest."""
    ledger = open_ledger(config)
    with lease(config, ledger, "ingest") as held:
        began = time.perf_counter()
        summary = ingest_step(config, ledger, held, terminal)
        seconds = time.perf_counter() - began
        ledger.cycles.finish(held, summary=summary.to_json(), now=now())
    return summary.samples / seconds


def _decode_only(config: Config, paths: list[Path]) -> float:
    """Returns the captures per second of a loop over what is already in memory, in one thread."""
    captures = [c for p in paths for c in read_segment(p, site=p.parent.name, limits=config.data).good]
    began = time.perf_counter()
    for c in captures:
        decode(c["rgb"], c["depth"], c["ir"], size=config.data.frame_px)
    return len(captures) / (time.perf_counter() - began)


def _loaded(config: Config, paths: list[Path]) -> float:
    """Returns the captures per second of a DataLoader that decodes in two workers, with the trunk here."""
    featurise = load_trunk(open_ledger(config).sources.champion().path)
    loader = DataLoader(
        _Segments(config, paths),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="spawn",
        worker_init_fn=_single,
        collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]: unbatched, it is given the item
    )
    count, began = 0, None
    for frames in loader:
        if began is None:
            began = time.perf_counter()  # its workers are there
        else:
            count += len(frames.captures)
        compute_features(featurise, frames.pixels, frames.present)
    return count / (time.perf_counter() - (began or 0))


def _with_smallest_trunk(config: Config) -> Config:
    ledger, random = open_ledger(config), torch.Generator().manual_seed(0)
    source = checkpoint.load(ledger.sources.champion().path)
    shape = source.manifest.config.model_copy(update={"trunk": SMALLEST})
    small = trunk.fold(trunk.build_trunk(SMALLEST, config.data.frame_px))
    params = tail.init_tail(shape.tail, SMALLEST.features, generator=random)
    sealed = checkpoint.seal(small, params, source.manifest.model_copy(update={"config": shape}))
    path = config.place("models", "smallest")
    checkpoint.save(path, sealed)
    version = ledger.sources.add(read_manifest(path), path=str(path), lineage="", now=now())
    ledger.sources.set_champion(version, now=now())
    return config


class _Segments(Dataset["DecodedChunk"]):
    """The frames of one segment an item."""

    def __init__(self, config: Config, paths: list[Path]) -> None:
        self.limits, self.paths = config.data, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> DecodedChunk:
        path = self.paths[index]
        good = read_segment(path, site=path.parent.name, limits=self.limits).good
        (frames,) = decode_chunks(good, self.limits.frame_px)
        bare = [{**c, "rgb": None, "depth": None, "ir": None} for c in frames.captures]
        return frames._replace(captures=bare)


def _single(_: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _as_it_is(frames: DecodedChunk) -> DecodedChunk:
    return frames
