"""Turns captures into features: one Ray Data execution per cycle for the new segments of the whole fleet.

The driver lists segments. Tasks validate and decode them in any order and put the frames through the trunks,
or leave that to actors with GPUs, and the driver gives every site's samples their offsets, in stream order on
from the site's last, and stores them. One ledger transaction at the end makes them count; a crash before it
repeats the same files with the same offsets. A segment counts when it has its features under every trunk: the
champion's, and the challenger's while there is one.

A segment that counts is known by its name: later bytes under that name are not read. A file that was refused
as a whole is known by name and content (``segment-0003.parquet@<sha256, 12>``), so that a file which was
mended counts as new.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from pipeline.cluster.trunks import Featuriser, decode_and_featurise, task_trunk
from pipeline.data import DataConfig
from pipeline.data.assemble import Backlog, Gathered, Trunk, store_site
from pipeline.data.captures import list_segments
from pipeline.data.features import delete_range
from pipeline.data.featurise import add_features
from pipeline.data.segments import Listed, decode_batch, decode_segments, marked, not_refused, segment_at
from pipeline.ledger import QuarantineRow, SegmentRow
from pipeline.models.manifest import read_manifest
from pipeline.storage import place, version

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from pipeline.config import Config
    from pipeline.data.assemble import SegmentResult
    from pipeline.data.segments import Columns
    from pipeline.sections import ClusterConfig
    from pipeline.storage import Place

BLOCK_BYTES = 32 * 2**20  # of captures in a task: seconds, so that a lost worker costs little
SEGMENT_BYTES = 2**14  # what a segment costs however little is in it, in bytes of captures
FRAME_BYTES = 16 * 2**20  # of frames in a block on its way to a GPU
HANDS = 4  # a task gets this part of a worker's share of what is left
GPU_BATCH = 512  # frames in the trunks at once
DECODING = 0.25  # of the CPUs of ingest, where GPUs run the trunks
WRITERS = 8  # threads that store features


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
        new = not_refused([p for p in paths if p.name not in names], names, limits.max_bytes)
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
    listed = list_all(new)
    on_progress(0, len(listed))
    batches = featurised(config, new, listed, checkpoints)
    done = assemble(config, new, batches, checkpoints, on_progress=lambda n: on_progress(n, len(listed)))
    return collect(new, done, {b.site: history(b.site) for b in new if b.base_offset})


def list_all(new: Sequence[Backlog]) -> list[Listed]:
    """Returns every segment of ``new`` with its number."""
    each = ((b.site, path) for b in new for path in b.paths)
    return [Listed(number, site, path) for number, (site, path) in enumerate(each)]


def featurised(
    config: Config, new: Sequence[Backlog], listed: Sequence[Listed], checkpoints: Sequence[str]
) -> Iterator[Columns]:
    """Yields rows with features as workers have them: one Ray Data execution.

    On CPUs a task decodes its segments and runs the trunks on them: frames stay in its process, and a worker
    keeps its trunks for the next task. With GPUs, tasks decode for a pool of actors that hold the trunks, and
    Ray holds decoding back where these are slower. A worker that a file killed costs its task's segments, not
    the fleet.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its remarks would drown ours
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    context.target_max_block_size = FRAME_BYTES
    workers, (cpus, gpus) = config.cluster.ingest_workers, resources(config.cluster)
    trunks = {"checkpoints": list(checkpoints)}
    decoding = {"limits": config.data.model_dump_json()}
    items = _dealt(listed, [b.size / len(b.paths) for b in new for _ in b.paths], workers)
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        decode_batch if gpus else decode_and_featurise,  # pyright: ignore[reportArgumentType]: numpy arrive
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=workers),
        fn_kwargs=decoding if gpus else {**decoding, **trunks},
        num_cpus=DECODING * cpus if gpus else cpus,
    )
    if gpus:
        dataset = dataset.map_batches(
            Featuriser,  # pyright: ignore[reportArgumentType]: as above
            batch_size=GPU_BATCH,
            compute=ray.data.ActorPoolStrategy(size=workers),
            fn_constructor_kwargs=trunks,
            num_cpus=(1 - DECODING) * cpus,
            num_gpus=gpus,
        )
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        yield cast("Columns", batch)


def featurised_here(config: Config, new: Sequence[Backlog], checkpoints: Sequence[str]) -> Iterator[Columns]:
    """Yields what ``featurised`` yields, by the same functions in this process."""
    trunks = [task_trunk(c) for c in checkpoints]
    for columns in decode_segments(list_all(new), config.data):
        yield add_features(columns, trunks)


def assemble(
    config: Config,
    new: Sequence[Backlog],
    batches: Iterable[Columns],
    checkpoints: Sequence[str],
    *,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[SegmentResult]:
    """Stores each site as soon as its last segment is there; ``on_progress`` gets the segments that are.

    Sites do not wait for each other; a store that answers slowly is written to by several threads.
    """
    trunks = [Trunk.of(read_manifest(place(c))) for c in checkpoints]
    features = config.place("features")
    gathered = [[Gathered() for _ in b.paths] for b in new]
    owner = [(at, k) for at, b in enumerate(new) for k in range(len(b.paths))]
    waiting = [len(b.paths) for b in new]
    stored: dict[int, Future[list[SegmentResult]]] = {}
    with ThreadPoolExecutor(WRITERS) as pool:

        def finish(at: int) -> None:
            stored[at] = pool.submit(store_site, new[at], gathered[at], trunks, features)
            gathered[at] = []

        arrived = 0
        for columns in batches:
            numbers = columns["segment"]
            for number in np.unique(numbers).tolist():
                at, k = owner[number]
                if at in stored or (segment := gathered[at][k]).complete:
                    continue  # rows of a segment that failed after them
                segment.add({name: column[numbers == number] for name, column in columns.items()})
                if segment.complete:
                    arrived += 1
                    waiting[at] -= 1
                    if not waiting[at]:
                        finish(at)
            on_progress(arrived)
        for at in range(len(new)):  # what lost a worker is stored as far as it is there
            if at not in stored:
                finish(at)
        return [result for at in range(len(new)) for result in stored[at].result()]


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
                segments.append(SegmentRow(site, marked(name, d["sha256"]), d["sha256"], 0, base, 0, 0))
                quarantined.append(QuarantineRow(site, name, -1, None, refused))
                orphans += [(site, base, end)] if d["rows"] else []
                continue
            bad = [QuarantineRow(site, name, row, sample, reason) for row, sample, reason in d["bad"]]
            segments.append(
                SegmentRow(site, name, d["sha256"], d["rows"], base, d["rows"] - len(bad), len(bad))
            )
            quarantined += bad
    return Ingested(tuple(segments), tuple(quarantined), tuple(failed.items()), tuple(orphans))


def _backlog(site: str, base: int, paths: Sequence[Place], sizes: Mapping[Place, int]) -> Backlog:
    held = sum(sizes[p] if p in sizes else version(p)[0] for p in paths)
    return Backlog(site, base, tuple(map(str, paths)), held)


def _dealt(listed: Sequence[Listed], sizes: Sequence[float], workers: int) -> list[dict[str, str]]:
    """Returns the segments in hands that get smaller.

    Between two tasks a worker waits about 0.2 s for Ray Data, so the first are large, but not so large that a
    death costs much; the last are small, so that the workers end together.
    """
    left = sum(sizes) + SEGMENT_BYTES * len(listed)
    hands: list[list[Listed]] = []
    held = most = 0.0
    for segment, size in zip(listed, sizes, strict=True):
        if held >= most:
            most = min(BLOCK_BYTES, left / (HANDS * workers))
            hands.append([])
            held = 0.0
        hands[-1].append(segment)
        held += size + SEGMENT_BYTES
        left -= size + SEGMENT_BYTES
    return [{"segments": json.dumps(hand)} for hand in hands]
