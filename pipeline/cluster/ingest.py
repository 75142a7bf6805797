"""Captures → features: one Ray Data execution per cycle for the new segments of the whole fleet.

The driver lists segments, checks footers and assigns offsets; tasks validate, decode, run the trunk and write feature files;
one ledger transaction at the end makes them count. A crash before it repeats the same files with the same offsets.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.data import DataConfig
from pipeline.data.captures import BadSegment, Capture, check_segment, list_segments, read_segment
from pipeline.data.decode import BadImage, decode
from pipeline.data.features import FeatureBlock, forget_range, mask_to_bool, pseudonym, write_features
from pipeline.ledger import QuarantineRow, SegmentRow
from pipeline.models import checkpoint as checkpoint_io
from pipeline.models.trunk import features as features_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import Config
    from pipeline.models.checkpoint import SourceModel

CHUNK = 256  # captures decoded and featurised together, which bounds a task's memory


@dataclass(frozen=True)
class NewSegment:
    """A segment whose footer passed, with the offset of its first row."""

    site: str
    name: str
    path: str
    rows: int
    base_offset: int


@dataclass(frozen=True)
class Found:
    """What the captures folder holds beyond the ledger."""

    sites: tuple[str, ...]
    new: tuple[NewSegment, ...]
    refused: tuple[tuple[SegmentRow, QuarantineRow], ...]  # whole files
    strays: tuple[str, ...]  # folders that are no site, one line each


@dataclass(frozen=True)
class Ingested:
    """The result of a Ray Data execution, ready to be committed."""

    segments: tuple[SegmentRow, ...]
    quarantined: tuple[QuarantineRow, ...]
    failed: tuple[tuple[str, str], ...]  # (site, reason): nothing of these segments counts, the next cycle tries again


def find(limits: DataConfig, known: dict[str, set[str]], next_offset: Callable[[str], int]) -> Found:
    """List the segments that the ledger does not know; ``known`` maps a site to its segment names."""
    listing = list_segments(Path(limits.captures))
    new: list[NewSegment] = []
    refused: list[tuple[SegmentRow, QuarantineRow]] = []
    for site, paths in listing.segments.items():
        base = next_offset(site)
        for path in (p for p in paths if p.name not in known.get(site, set())):
            try:
                rows = check_segment(path, site=site, limits=limits)
            except (BadSegment, OSError) as e:
                row = SegmentRow(site, path.name, _digest(path, limits.max_bytes), 0, base, 0, 0)
                refused.append((row, QuarantineRow(site, path.name, -1, None, str(e))))
                continue
            new.append(NewSegment(site, path.name, str(path.resolve()), rows, base))
            base += rows
    return Found(tuple(listing.segments), tuple(new), tuple(refused), tuple(listing.rejected))


def run(
    config: Config, new: Sequence[NewSegment], *, checkpoint: Path, on_progress: Callable[[int, int], None]
) -> Ingested:
    """Featurise ``new`` with the trunk in ``checkpoint``; needs a connected Ray."""
    if not new:
        return Ingested((), (), ())
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its remarks would drown ours
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"segment": json.dumps(vars(s))} for s in new]
    blocks = min(len(items), 4 * config.cluster.ingest_workers)
    dataset = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        _ingest_batch,  # pyright: ignore[reportArgumentType]: what reaches it is the numpy batch format
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=config.cluster.ingest_workers),
        num_cpus=config.cluster.cpus / config.cluster.ingest_workers / 2 if config.cluster.address == "local" else 1,
        fn_kwargs={
            "limits": config.data.model_dump_json(),
            "checkpoint": str(checkpoint),
            "features": str(config.place("features")),
        },
    )
    done: list[dict[str, object]] = []
    on_progress(0, len(new))
    for row in dataset.iter_rows():
        done.append(json.loads(row["result"]))
        on_progress(len(done), len(new))
    return _collect(new, done)


def _collect(new: Sequence[NewSegment], done: Sequence[dict[str, object]]) -> Ingested:
    """Results in stream order. After a failed segment the site's later ones wait, or their offsets would have a hole."""
    by_key = {(str(d["site"]), str(d["name"])): d for d in done}
    segments: list[SegmentRow] = []
    quarantined: list[QuarantineRow] = []
    failed: dict[str, str] = {}
    for s in new:
        result = by_key[s.site, s.name]
        if result["error"]:
            failed.setdefault(s.site, f"{s.name}: {result['error']}")
        if s.site in failed:
            continue
        bad = [QuarantineRow(s.site, s.name, row, sample, reason) for row, sample, reason in result["bad"]]  # pyright: ignore
        segments.append(
            SegmentRow(s.site, s.name, str(result["sha256"]), s.rows, s.base_offset, s.rows - len(bad), len(bad))
        )
        quarantined += bad
    return Ingested(tuple(segments), tuple(quarantined), tuple(failed.items()))


def _ingest_batch(batch: dict[str, np.ndarray], *, limits: str, checkpoint: str, features: str) -> dict[str, list[str]]:
    """Ray Data UDF over segments: a segment that breaks is reported, never raised, so that it stops nobody else."""
    results: list[str] = []
    for text in batch["segment"]:
        segment = NewSegment(**json.loads(text))
        try:
            result = ingest_segment(segment, DataConfig.model_validate_json(limits), _model(checkpoint), Path(features))
        except Exception as e:  # a site may fail, the fleet may not: the reason is kept and shown
            result = {"bad": [], "sha256": "", "error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
        results.append(json.dumps({"site": segment.site, "name": segment.name, **result}))
    return {"result": results}


def ingest_segment(segment: NewSegment, limits: DataConfig, model: SourceModel, features: Path) -> dict[str, object]:
    """Validate, decode, featurise and store one segment → its digest and bad rows (row, sample id, reason)."""
    path = Path(segment.path)
    read = read_segment(path, site=segment.site, limits=limits)
    bad = [tuple(b) for b in read.bad]
    blocks: list[FeatureBlock] = []
    for start in range(0, len(read.good), CHUNK):
        block, worse = _featurise(read.good[start : start + CHUNK], segment, limits.size, model)
        blocks.append(block)
        bad += worse
    end = segment.base_offset + segment.rows
    forget_range(features, model.manifest.trunk_digest, segment.site, start=segment.base_offset, end=end)
    if sum(map(len, blocks)):
        whole = FeatureBlock(
            *(np.concatenate([getattr(b, n) for b in blocks]) for n in FeatureBlock.__dataclass_fields__)
        )
        write_features(features, model.manifest.trunk_digest, segment.site, whole)
    return {"bad": sorted(bad), "sha256": _digest(path, limits.max_bytes), "error": ""}


def _featurise(
    captures: Sequence[Capture], segment: NewSegment, size: int, model: SourceModel
) -> tuple[FeatureBlock, list[tuple[int, str | None, str]]]:
    """Decode and run the trunk on one chunk; rows that cannot be decoded come back with their reason."""
    kept: list[Capture] = []
    frames: list[np.ndarray] = []
    masks: list[int] = []
    bad: list[tuple[int, str | None, str]] = []
    for c in captures:
        try:
            frame, mask = decode(c["rgb"], c["depth"], c["ir"], size=size)
        except BadImage as e:
            bad.append((c["row"], c["sample_id"], str(e)))
            continue
        mask &= _informative(frame)
        if not mask:
            bad.append((c["row"], c["sample_id"], "every modality is one constant value: covered or broken camera"))
            continue
        kept.append(c)
        frames.append(frame)
        masks.append(mask)
    present = np.array(masks, np.uint8)
    pixels = torch.from_numpy(np.stack(frames) if frames else np.zeros((0, 5, size, size), np.uint8))
    z = features_of(model.trunk, pixels, torch.from_numpy(mask_to_bool(present))).numpy().astype(np.float16)
    fine = np.asarray(np.isfinite(z).all(axis=(1, 2)))
    bad += [
        (c["row"], c["sample_id"], "its features are not finite") for c, ok in zip(kept, fine, strict=True) if not ok
    ]
    block = FeatureBlock(
        offset=segment.base_offset + np.array([c["row"] for c in kept], np.int64),
        sample_id=np.array([c["sample_id"] for c in kept], dtype=object),
        captured_at=np.array([c["captured_at"] for c in kept], dtype="datetime64[us]"),
        session=np.array([pseudonym(segment.site, c["session_id"]) for c in kept], np.int64),
        present=present,
        z=z,
    )
    return block.rows(fine), bad


def _informative(frame: np.ndarray) -> int:
    """Bit mask of the modalities that are more than one constant value; a constant one is as good as absent."""
    planes = (frame[:3], frame[3], frame[4])
    return sum(1 << m for m, plane in enumerate(planes) if plane.min() != plane.max())


def _digest(path: Path, limit: int) -> str:
    """sha256 of a segment; empty when it is no file, too large to be read at all, or cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > limit:
            return ""
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError:
        return ""


@lru_cache(maxsize=2)
def _model(path: str) -> SourceModel:
    torch.set_num_threads(1)
    return checkpoint_io.load(Path(path))
