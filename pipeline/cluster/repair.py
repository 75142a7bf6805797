"""Makes features again that are damaged, missing, or not made yet under another trunk.

They are made from captures that are still there. A sample that counts keeps its offset: only the segments
that the ledger has are made, from the very bytes that were ingested. Features that cannot be made again are
lost; the caller says so in the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.cluster.ingest import resources
from pipeline.cluster.trunks import task_trunk
from pipeline.data.assemble import Trunk, gather_segment, store_segment
from pipeline.data.blobs import BadBlob
from pipeline.data.features import delete_range, read_features
from pipeline.data.segments import VANISHED
from pipeline.models.manifest import read_manifest
from pipeline.storage import place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import Config
    from pipeline.data import DataConfig
    from pipeline.ledger import SegmentRow
    from pipeline.storage import Place

TASK = 32  # sites in a task


@dataclass(frozen=True)
class Stretch:
    """Lists segments of a site, in stream order, whose features are needed."""

    site: str
    segments: tuple[SegmentRow, ...]
    refused: tuple[frozenset[int], ...]  # per segment, rows that ingest refused
    captures: tuple[Place | None, ...]  # per segment, where it is still there


@dataclass(frozen=True)
class Repaired:
    """Reports the repair of one site."""

    site: str
    restored: tuple[str, ...] = ()  # segments
    lost: tuple[
        str, ...
    ] = ()  # segments with no capture to make them from; what was left of their features is gone
    error: str = ""  # tried again by the next cycle


def run(
    config: Config,
    stretches: Sequence[Stretch],
    *,
    checkpoint: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Repaired]:
    """Repairs all ``stretches`` as Ray tasks, under the trunk in ``checkpoint``; needs a connected Ray."""
    import ray
    from ray.exceptions import RayError

    cpus, gpus = resources(config.cluster)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_repair_sites)
    parts = [stretches[i : i + TASK] for i in range(0, len(stretches), TASK)]
    waiting = [task.remote(list(part), config.data, checkpoint, config.place("features")) for part in parts]
    done: list[Repaired] = []
    for part, ref in zip(parts, waiting, strict=True):
        try:
            done += ray.get(ref)
        except RayError as e:
            done += [Repaired(s.site, error=str(e).strip().splitlines()[-1][:300]) for s in part]
        if on_progress:
            on_progress(len(done), len(stretches))
    return done


def repair_site(stretch: Stretch, limits: DataConfig, checkpoint: str, features: Place) -> Repaired:
    """Makes the features of damaged segments again; a failure is reported, never raised."""
    restored, lost = list[str](), list[str]()
    try:
        trunk = Trunk.of(read_manifest(place(checkpoint)))
        trunks = [task_trunk(checkpoint)]
        for row, refused, path in zip(stretch.segments, stretch.refused, stretch.captures, strict=True):
            if _whole(row, trunk, features):
                continue
            got = None if path is None else gather_segment(row.site, str(path), limits, trunks)
            head = got.head if got else None
            if head and head.error not in ("", VANISHED):
                return Repaired(stretch.site, tuple(restored), tuple(lost), head.error)
            if got is None or head is None or head.error or head.sha256 != row.sha256 or not head.rows:
                end = row.base_offset + row.rows
                delete_range(features, trunk.digest, row.site, start=row.base_offset, end=end)
                lost += [row.name] if row.good else []
                continue
            store_segment(row.site, row.base_offset, got, {}, [trunk], features, without=refused)
            if not _whole(row, trunk, features):
                raise ValueError(f"{row.name}: the same capture no longer gives {row.good} samples")
            restored.append(row.name)
    except Exception as e:  # a site may fail, the fleet may not: the reason is kept and shown
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        return Repaired(stretch.site, tuple(restored), tuple(lost), reason)
    return Repaired(stretch.site, tuple(restored), tuple(lost))


def _repair_sites(
    stretches: Sequence[Stretch], limits: DataConfig, checkpoint: str, features: Place
) -> list[Repaired]:
    return [repair_site(s, limits, checkpoint, features) for s in stretches]


def _whole(row: SegmentRow, trunk: Trunk, features: Place) -> bool:
    """Returns whether every good sample of the segment has its features."""
    start, end = row.base_offset, row.base_offset + row.rows
    try:
        block = read_features(features, trunk.digest, row.site, start=start, end=end, features=trunk.features)
    except BadBlob:
        return False
    return len(block) == row.good
