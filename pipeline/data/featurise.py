"""Turns one segment of captures into stored features: decode, trunk, store; it knows no Ray.

``read_segment`` and ``decode_chunks`` are the data plane, ``compute_features`` the models' share: while a
release of another source model goes on, every sample is decoded once and goes through both trunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.data.blobs import BadBlob
from pipeline.data.captures import BadRow, Capture, Segment, read_segment
from pipeline.data.decode import CHANNELS, BadImage, decode
from pipeline.data.features import (
    FeatureBlock,
    delete_range,
    mask_to_bool,
    pseudonym,
    read_features,
    write_features,
)
from pipeline.models.trunk import features as features_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from pipeline.data import DataConfig
    from pipeline.models.checkpoint import SourceModel
    from pipeline.storage import Place

CHUNK = 256  # captures decoded and featurised together, which bounds a task's memory
TRUNK_SLICE = (
    64  # of them in the trunk at once: its activations then stay in a core's cache, 1.3 times as fast
)
REPEAT_REASON = "sample_id: already at offset"  # how the reason of such a row begins
REPEAT_WINDOW = (
    1000  # offsets before a segment among which its sample ids are looked for: what an uploader sends again
)


@dataclass(frozen=True)
class NewSegment:
    """A segment that passed its check, with the offset of its first row."""

    site: str
    name: str
    path: str
    rows: int
    base_offset: int


class DecodedChunk(NamedTuple):
    """N captures that were decoded, and those that could not be."""

    captures: list[Capture]
    pixels: np.ndarray  # [N, 5, H, W] uint8
    present: np.ndarray  # [N] uint8 bit mask
    bad: list[BadRow]


def ingest_segment(
    segment: NewSegment, limits: DataConfig, model: SourceModel, features: Place
) -> tuple[str, list[BadRow]]:
    """Reads, decodes, featurises and stores one segment; returns its sha256 and its bad rows."""
    read = read_segment(Path(segment.path), site=segment.site, limits=limits)
    return read.sha256, store_segment(segment, read, {}, limits.frame_px, [model], features)


def store_segment(
    segment: NewSegment,
    read: Segment,
    earlier: dict[str, int],
    size: int,
    models: Sequence[SourceModel],
    features: Place,
) -> list[BadRow]:
    """Decodes, featurises and stores a segment under the trunk of each of ``models``; returns the bad rows.

    ``earlier``: offsets by sample id of the site's samples before it; those of this segment come to it.
    """
    bad = list(read.bad)
    oldest = segment.base_offset - REPEAT_WINDOW
    fresh: list[Capture] = []
    for c in read.good:
        earlier_offset = earlier.get(c["sample_id"], -1)
        if earlier_offset >= max(0, oldest):
            bad.append(BadRow(c["row"], c["sample_id"], f"{REPEAT_REASON} {earlier_offset} of the site"))
        else:
            fresh.append(c)
    worse, stored = _store(segment, fresh, size, models, features)
    earlier.update(stored)
    return sorted([*bad, *worse], key=lambda b: b.row)


def restore_segment(
    segment: NewSegment,
    read: Segment,
    refused: Collection[int],
    size: int,
    model: SourceModel,
    features: Place,
) -> None:
    """Stores a segment under one trunk, without the rows that ``store_segment`` ``refused``."""
    _store(segment, [c for c in read.good if c["row"] not in refused], size, [model], features)


def recent_offsets(features: Place, model: SourceModel, site: str, *, end: int) -> dict[str, int]:
    """Returns the offset by sample id of the stored samples in the REPEAT_WINDOW offsets before ``end``."""
    trunk, width = model.manifest.trunk_digest, model.manifest.config.trunk.features
    try:
        block = read_features(
            features, trunk, site, start=max(0, end - REPEAT_WINDOW), end=end, features=width
        )
    except BadBlob:
        return {}  # adaptation names the file; what is new need not wait for its repair
    return dict(zip(block.sample_id.tolist(), block.offset.tolist()))


def decode_chunks(captures: Sequence[Capture], size: int) -> Iterator[DecodedChunk]:
    """Yields decoded frames of side ``size`` in chunks of at most CHUNK, with the captures that fail."""
    for start in range(0, len(captures), CHUNK):
        part = captures[start : start + CHUNK]
        pixels = np.empty((len(part), CHANNELS, size, size), np.uint8)
        chunk = DecodedChunk([], pixels, np.zeros(len(part), np.uint8), [])
        for c in part:
            try:
                frame, present = decode(c["rgb"], c["depth"], c["ir"], size=size)
            except BadImage as e:
                chunk.bad.append(BadRow(c["row"], c["sample_id"], str(e)))
                continue
            present &= _informative_modalities(frame)
            if not present:
                reason = "every modality is one constant value: covered or broken camera"
                chunk.bad.append(BadRow(c["row"], c["sample_id"], reason))
                continue
            n = len(chunk.captures)
            chunk.pixels[n], chunk.present[n] = frame, present
            chunk.captures.append(c)
        n = len(chunk.captures)
        yield chunk._replace(pixels=pixels[:n], present=chunk.present[:n])


def compute_features(model: SourceModel, frames: DecodedChunk) -> np.ndarray:
    """Returns the features z float16 [N, M, F]."""
    present = torch.from_numpy(mask_to_bool(frames.present))
    if not len(present):
        return np.zeros((0, present.shape[1], model.manifest.config.trunk.features), np.float16)
    return (
        features_of(model.trunk, torch.from_numpy(frames.pixels), present, batch=TRUNK_SLICE)
        .numpy()
        .astype(np.float16)
    )


def _store(
    segment: NewSegment,
    captures: Sequence[Capture],
    size: int,
    models: Sequence[SourceModel],
    features: Place,
) -> tuple[list[BadRow], dict[str, int]]:
    """Decodes once, then featurises and stores under every trunk.

    Returns the bad rows, and the offsets of the others by sample id.
    """
    bad, blocks = list[BadRow](), list[list[FeatureBlock]]()
    for frames in decode_chunks(captures, size):
        chunk_blocks, worse = _blocks(frames, segment, [compute_features(model, frames) for model in models])
        blocks.append(chunk_blocks)
        bad += [*frames.bad, *worse]
    end = segment.base_offset + segment.rows
    ids: dict[str, int] = {}
    for k, model in enumerate(models):
        trunk, parts = model.manifest.trunk_digest, [chunk_blocks[k] for chunk_blocks in blocks]
        delete_range(features, trunk, segment.site, start=segment.base_offset, end=end)
        if sum(map(len, parts)):
            names = FeatureBlock.__dataclass_fields__
            whole = FeatureBlock(*(np.concatenate([getattr(b, n) for b in parts]) for n in names))
            write_features(features, trunk, segment.site, whole)
            ids = dict(zip(whole.sample_id.tolist(), whole.offset.tolist()))
    return bad, ids


def _blocks(
    frames: DecodedChunk, segment: NewSegment, zs: Sequence[np.ndarray]
) -> tuple[list[FeatureBlock], list[BadRow]]:
    """Returns one block for each of ``zs`` with the samples whose features are finite under every trunk."""
    fine = np.logical_and.reduce([np.isfinite(z).all(axis=(1, 2)) for z in zs])
    captures = frames.captures
    bad = [
        BadRow(c["row"], c["sample_id"], "its features are not finite")
        for c, ok in zip(captures, fine)
        if not ok
    ]
    whole = FeatureBlock(
        offset=segment.base_offset + np.array([c["row"] for c in captures], np.int64),
        sample_id=np.array([c["sample_id"] for c in captures], dtype=object),
        captured_at=np.array([c["captured_at"] for c in captures], dtype="datetime64[us]"),
        session=np.array([pseudonym(segment.site, c["session_id"]) for c in captures], np.int64),
        present=frames.present,
        z=zs[0],
    )
    return [replace(whole, z=z).rows(fine) for z in zs], bad


def _informative_modalities(frame: np.ndarray) -> int:
    """Returns the bit mask of the modalities with more than one value; a constant one counts as absent."""
    planes = (frame[:3], frame[3], frame[4])
    return sum(1 << m for m, plane in enumerate(planes) if plane.min() != plane.max())
