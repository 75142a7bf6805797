"""Turns captures into features: one Ray Data execution per cycle for the new segments of the whole fleet.

The driver lists segments; one task at a time works on a site, so that its stream has one order: it validates,
decodes, runs the trunks, writes feature files and counts offsets on from the site's last. One ledger
transaction at the end makes them count; a crash before it repeats the same files with the same offsets. A
segment counts when it has its features under every trunk: the champion's, and the challenger's while there is
one.

A segment that counts is known by its name: later bytes under that name are not read. A file that was refused
as a whole is known by name and content (``segment-0003.parquet@<sha256, 12>``), so that a file which was
mended counts as new.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import cv2
import torch

from pipeline.control.loaders import load_model
from pipeline.data import DataConfig
from pipeline.data.captures import BadRow, BadSegment, list_segments, read_segment
from pipeline.data.features import delete_range
from pipeline.data.featurise import NewSegment, recent_offsets, store_segment
from pipeline.ledger import QuarantineRow, SegmentRow
from pipeline.storage import place, version

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import numpy as np

    from pipeline.config import Config
    from pipeline.models.checkpoint import SourceModel
    from pipeline.sections import ClusterConfig
    from pipeline.storage import Place

BLOCK_BYTES = (
    32 * 2**20
)  # of captures in a task: seconds, so that progress moves and a lost worker costs little
SITE_BYTES = 2**16  # what a site costs however little it sent, in bytes of captures


@dataclass(frozen=True)
class Backlog:
    """Lists new segments of one site in stream order."""

    site: str
    base_offset: int  # of the first row
    paths: tuple[str, ...]  # or URLs
    size: int  # bytes


@dataclass(frozen=True)
class IngestListing:
    """Lists what the captures hold beyond the ledger."""

    sites: tuple[str, ...]
    new: tuple[Backlog, ...]
    counted: Mapping[str, tuple[Place, ...]]  # segments that the ledger has and that are still there, by site
    strays: tuple[str, ...]  # folders that are no site, one line each


@dataclass(frozen=True)
class Ingested:
    """Holds the result of a Ray Data execution, ready to be committed."""

    segments: tuple[SegmentRow, ...]
    quarantined: tuple[QuarantineRow, ...]
    failed: tuple[
        tuple[str, str], ...
    ]  # (site, reason): the next cycle tries again from the segment that failed
    orphans: tuple[tuple[str, int, int], ...]  # (site, start, end): offsets whose features must not be read


class SegmentResult(TypedDict):
    """Reports one segment: ``refused`` is final, ``error`` is tried again."""

    site: str
    name: str
    base_offset: int
    rows: int
    sha256: str
    bad: list[BadRow]
    refused: str
    error: str


def find(
    limits: DataConfig,
    known: Mapping[str, Collection[str]],
    next_offset: Callable[[str], int],
    *,
    most: int | None = None,
    without: Collection[str] = (),
) -> IngestListing:
    """Lists the segments that the ledger does not know; ``known`` maps a site to its segment names.

    At most ``most`` of them, every site's first before any site's second; none of the sites in ``without``.
    """
    listing = list_segments(place(limits.captures))
    fresh: dict[str, list[Place]] = {}
    counted: dict[str, tuple[Place, ...]] = {}
    for site, paths in listing.segments.items():
        names = known.get(site, ())
        new = _not_refused([p for p in paths if p.name not in names], names, limits.max_bytes)
        if new and site not in without:
            fresh[site] = new
        if len(new) < len(paths):
            counted[site] = tuple(p for p in paths if p.name in names)
    turns = sorted((turn, site) for site, paths in fresh.items() for turn in range(len(paths)))[:most]
    last_turn = {site: turn + 1 for turn, site in turns}  # the last turn of each site counts
    backlogs = (
        _backlog(site, next_offset(site), fresh[site][:n], listing.sizes)
        for site, n in sorted(last_turn.items())
    )
    return IngestListing(tuple(listing.segments), tuple(backlogs), counted, tuple(listing.rejected))


def run(
    config: Config,
    new: Sequence[Backlog],
    *,
    checkpoints: Sequence[str],
    history: Callable[[str], Mapping[str, str]],
    on_progress: Callable[[int, int], None],
) -> Ingested:
    """Makes features of ``new`` with the trunks in ``checkpoints``, the champion's first.

    Needs a connected Ray. ``history`` returns the sha256 of the site's segments that count → their names.
    """
    if not new:
        return Ingested((), (), (), ())
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its remarks would drown ours
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a worker that a file killed costs the sites of its task, not the fleet
    limits, workers = config.data.model_dump_json(), config.cluster.ingest_workers
    items, (cpus, gpus) = _dealt(new, workers), resources(config.cluster)
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _ingest_batch,  # pyright: ignore[reportArgumentType]: what reaches it is the numpy batch format
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=workers),
        fn_kwargs={
            "limits": limits,
            "checkpoints": list(checkpoints),
            "features": str(config.place("features")),
        },
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    done: list[SegmentResult] = []
    total = sum(len(b.paths) for b in new)
    on_progress(0, total)
    for row in dataset.iter_rows():
        done += json.loads(row["result"])
        on_progress(len(done), total)
    return collect(new, done, {b.site: history(b.site) for b in new if b.base_offset})


def resources(cluster: ClusterConfig) -> tuple[float, float]:
    """(CPUs, GPUs) that a task asks Ray for."""
    return (
        cluster.cpus / cluster.ingest_workers / 2 if cluster.address == "local" else 1.0,
        cluster.ingest_gpus,
    )


def forget_orphans(config: Config, trunks: Sequence[str], done: Ingested) -> None:
    """Remove the features of segments that do not count, before a commit can make later ones count."""
    for site, start, end in done.orphans:
        for trunk in trunks:
            delete_range(config.place("features"), trunk, site, start=start, end=end)


def collect(
    new: Sequence[Backlog], done: Sequence[SegmentResult], history: Mapping[str, Mapping[str, str]]
) -> Ingested:
    """Results in stream order. After a failed segment the site's later ones wait: its rows come before
    theirs."""
    by_key = {(d["site"], d["name"]): d for d in done}
    segments: list[SegmentRow] = []
    quarantined: list[QuarantineRow] = []
    failed: dict[str, str] = {}
    orphans: list[tuple[str, int, int]] = []
    for backlog in new:
        site, same = backlog.site, dict(history.get(backlog.site, {}))
        for name in (segment_at(p).name for p in backlog.paths):
            d = by_key.get((site, name))
            if d is None or d["error"]:
                failed[site] = f"{name}: {d['error'] if d else 'its worker died or was killed'}"
                break
            first = same.setdefault(d["sha256"], name) if d["rows"] else name
            refused = d["refused"] or (
                f"{site}/{name}: has the very bytes of {first}" if first != name else ""
            )
            base, end = d["base_offset"], d["base_offset"] + d["rows"]
            if refused:
                segments.append(SegmentRow(site, _marked(name, d["sha256"]), d["sha256"], 0, base, 0, 0))
                quarantined.append(QuarantineRow(site, name, -1, None, refused))
                orphans += [(site, base, end)] if d["rows"] else []
                continue
            bad = [QuarantineRow(site, name, row, sample, reason) for row, sample, reason in d["bad"]]
            segments.append(
                SegmentRow(site, name, d["sha256"], d["rows"], base, d["rows"] - len(bad), len(bad))
            )
            quarantined += bad
    return Ingested(tuple(segments), tuple(quarantined), tuple(failed.items()), tuple(orphans))


def ingest_site(
    backlog: Backlog, limits: DataConfig, checkpoints: Sequence[str], features: Place
) -> list[SegmentResult]:
    """Works through one site's segments in order; a failure is reported, so it stops no other site."""
    done: list[SegmentResult] = []
    site, base, earlier = backlog.site, backlog.base_offset, None
    for path in map(segment_at, backlog.paths):
        result = SegmentResult(
            site=site, name=path.name, base_offset=base, rows=0, sha256="", bad=[], refused="", error=""
        )
        done.append(result)
        try:
            models = [task_model(c) for c in checkpoints]
            if earlier is None:
                earlier = recent_offsets(features, models[0], site, end=base) if base else {}
            read = read_segment(path, site=site, limits=limits)
            segment = NewSegment(site, path.name, str(path), len(read.good) + len(read.bad), base)
            bad = store_segment(segment, read, earlier, limits.frame_px, models, features)
            result.update(rows=segment.rows, sha256=read.sha256, bad=bad)
            base += segment.rows
        except BadSegment as e:
            result.update(sha256=digest(path, limits.max_bytes), refused=str(e))
        except FileNotFoundError:
            result["error"] = "it vanished after it was listed"
            break
        except Exception as e:  # a site may fail, the fleet may not: the reason is kept and shown
            result["error"] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            break
    return done


def segment_at(text: str) -> Place:
    """Returns the place of one of ``Backlog.paths``; a link keeps its own name."""
    return place(text) if "://" in text else Path(text)


def digest(path: Place, limit: int) -> str:
    """Returns the sha256 of a file of at most ``limit`` bytes; empty if it is larger or unreadable."""
    try:
        if isinstance(path, Path) and not path.is_file():
            return ""
        size, written = version(path)
        return _hashed(path, size, written) if size <= limit else ""
    except OSError:
        return ""


def task_model(path: str) -> SourceModel:
    """Returns the source model of this process's tasks, on the GPU that Ray gave the task, if any."""
    import ray

    torch.set_num_threads(1)
    cv2.setNumThreads(1)  # tasks fill the cores; threads of their own make decoding 1.6 times as slow
    model = load_model(path)
    if ray.is_initialized() and ray.get_gpu_ids():
        model.trunk.to("cuda")
    return model


def _backlog(site: str, base: int, paths: Sequence[Place], sizes: Mapping[Place, int]) -> Backlog:
    held = sum(sizes[p] if p in sizes else version(p)[0] for p in paths)
    return Backlog(site, base, tuple(map(str, paths)), held)


def _not_refused(paths: list[Place], names: Collection[str], limit: int) -> list[Place]:
    """Returns ``paths`` without refused content; a file is read for it only if its name was refused."""
    marks = {n for n in names if "@" in n} if paths else set()
    if not marks:
        return paths
    suspects = {n.partition("@")[0] for n in marks}
    return [p for p in paths if p.name not in suspects or _marked(p.name, digest(p, limit)) not in marks]


def _marked(name: str, sha256: str) -> str:
    return f"{name}@{sha256[:12]}"


def _dealt(new: Sequence[Backlog], workers: int) -> list[dict[str, str]]:
    """Returns the sites in groups of about equal size, the large ones dealt first."""
    n = min(len(new), max(4 * workers, sum(b.size for b in new) // BLOCK_BYTES))
    hands: list[list[Backlog]] = [[] for _ in range(n)]
    heap = [(0, k) for k in range(n)]
    for b in sorted(new, key=lambda b: -b.size):
        held, k = heap[0]
        hands[k].append(b)
        heapq.heapreplace(heap, (held + b.size + SITE_BYTES, k))
    return [{"sites": json.dumps([asdict(b) for b in hand])} for hand in hands]


def _ingest_batch(
    batch: dict[str, np.ndarray], *, limits: str, checkpoints: list[str], features: str
) -> dict[str, list[str]]:
    """Ingests one group of sites; the function that Ray Data maps over groups."""
    data = DataConfig.model_validate_json(limits)
    sites = [Backlog(**b) for text in batch["sites"] for b in json.loads(text)]
    return {"result": [json.dumps(ingest_site(b, data, checkpoints, place(features))) for b in sites]}


@lru_cache(maxsize=4096)
def _hashed(path: Place, size: int, written: int) -> str:
    """``written`` (and ``size``) tell that the file is no longer the one that was read."""
    digest_of = hashlib.sha256()
    with path.open("rb") as f:
        while data := f.read(2**20):
            digest_of.update(data)
    return digest_of.hexdigest()
