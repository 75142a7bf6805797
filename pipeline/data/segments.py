"""Reads, checks and decodes segments of captures: CPU work, and all that a hostile file can break.

The first of three stages of ingest, which know no Ray; ``featurise`` puts the frames through the trunks, and
``assemble`` gives a site's samples their offsets, in stream order, and stores them. This imports no torch,
so that a worker that only decodes starts at once.

Between the stages rows travel as columns: ``segment`` (its number in the list), ``row``, ``sample_id``,
``captured_at``, ``session``, ``present``, ``head`` (JSON of a ``Head`` on the last row of a segment, else
empty) and ``frame``, which becomes ``z0`` and, while a release of another source model goes on, ``z1``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from pipeline.data import DataConfig
from pipeline.data.captures import BadRow, BadSegment, Capture, read_segment
from pipeline.data.decode import CHANNELS, BadImage, decode
from pipeline.data.features import pseudonym
from pipeline.storage import place, version

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from pipeline.storage import Place

    Columns = dict[str, np.ndarray]

VANISHED = "it vanished after it was listed"
CHUNK = 256  # captures decoded together, which bounds a task's memory


class Listed(NamedTuple):
    """A segment that is to be decoded."""

    number: int  # in the list of all segments of this ingest
    site: str
    path: str  # or URL


@dataclass(frozen=True)
class Head:
    """What is known of a segment once it was decoded: ``refused`` is final, ``error`` is tried again."""

    rows: int = 0
    decoded: int = 0  # rows that have a frame
    sha256: str = ""
    bad: list[tuple[int, str | None, str]] = field(default_factory=list[tuple[int, str | None, str]])
    refused: str = ""
    error: str = ""


class DecodedChunk(NamedTuple):
    """N captures that were decoded, and those that could not be."""

    captures: list[Capture]
    pixels: np.ndarray  # [N, 5, H, W] uint8
    present: np.ndarray  # [N] uint8 bit mask
    bad: list[BadRow]


def decode_batch(batch: dict[str, np.ndarray], *, limits: str) -> Iterator[Columns]:
    """Decodes hands of segments, given as JSON under ``segments``: the function that Ray Data maps."""
    data = DataConfig.model_validate_json(limits)
    for text in batch["segments"]:
        yield from decode_segments((Listed(*fields) for fields in json.loads(text)), data)


def decode_segments(segments: Iterable[Listed], limits: DataConfig) -> Iterator[Columns]:
    """Yields the decoded rows of ``segments``; one that fails says so in its head and stops no other."""
    cv2.setNumThreads(1)  # processes fill the cores; threads of their own make it 1.6 times as slow
    for listed in segments:
        waiting: Columns | None = None  # the last rows wait for the head
        head = Head()
        path = segment_at(listed.path)
        try:
            read = read_segment(path, site=listed.site, limits=limits)
            bad, decoded = list(read.bad), 0
            for chunk in decode_chunks(read.good, limits.frame_px):
                bad += chunk.bad
                if not chunk.captures:
                    continue
                if waiting is not None:
                    yield waiting
                waiting, decoded = _columns(listed, chunk), decoded + len(chunk.captures)
            reasons = sorted((b.row, b.sample_id, b.reason) for b in bad)
            head = Head(len(read.good) + len(read.bad), decoded, read.sha256, reasons)
        except BadSegment as e:
            head = Head(sha256=digest(path, limits.max_bytes), refused=str(e))
        except FileNotFoundError:
            head = Head(error=VANISHED)
        except Exception as e:  # a segment may fail, the fleet may not: the reason is kept and shown
            head = Head(error=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
        last = waiting if waiting is not None else _no_rows(listed, limits.frame_px)
        last["head"][-1] = json.dumps(asdict(head))
        yield last


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


def segment_at(text: str) -> Place:
    """Returns the place of a listed segment; a link keeps its own name."""
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


def _columns(listed: Listed, chunk: DecodedChunk) -> Columns:
    captures = chunk.captures
    count = len(captures)
    return {
        "segment": np.full(count, listed.number, np.int32),
        "row": np.array([c["row"] for c in captures], np.int32),
        "sample_id": np.array([c["sample_id"] for c in captures], dtype=object),
        "captured_at": np.array([c["captured_at"] for c in captures], "datetime64[us]").astype(np.int64),
        "session": np.array([pseudonym(listed.site, c["session_id"]) for c in captures], np.int64),
        "present": chunk.present,
        "head": np.array([""] * count, dtype=object),
        "frame": chunk.pixels,
    }


def _no_rows(listed: Listed, size: int) -> Columns:
    """Returns one row that stands for a segment without any: nothing of it is present."""
    nothing = DecodedChunk([], np.zeros((0, CHANNELS, size, size), np.uint8), np.zeros(0, np.uint8), [])
    empty = _columns(listed, nothing)
    row = {name: np.zeros((1, *column.shape[1:]), column.dtype) for name, column in empty.items()}
    row["segment"][:] = listed.number
    row["sample_id"][0] = row["head"][0] = ""
    return row


def _informative_modalities(frame: np.ndarray) -> int:
    """Returns the bit mask of the modalities with more than one value; a constant one counts as absent."""
    planes = (frame[:3], frame[3], frame[4])
    return sum(1 << m for m, plane in enumerate(planes) if plane.min() != plane.max())


@lru_cache(maxsize=4096)
def _hashed(path: Place, size: int, written: int) -> str:
    """``written`` (and ``size``) tell that the file is no longer the one that was read."""
    digest_of = hashlib.sha256()
    with path.open("rb") as f:
        while data := f.read(2**20):
            digest_of.update(data)
    return digest_of.hexdigest()


def not_refused(paths: list[Place], names: Collection[str], limit: int) -> list[Place]:
    """Returns ``paths`` without refused content; a file is read for it only if its name was refused."""
    marks = {n for n in names if "@" in n} if paths else set()
    if not marks:
        return paths
    suspects = {n.partition("@")[0] for n in marks}
    return [p for p in paths if p.name not in suspects or marked(p.name, digest(p, limit)) not in marks]


def marked(name: str, sha256: str) -> str:
    """Returns the name of a file that was refused as a whole: a mended one of the same name counts as new."""
    return f"{name}@{sha256[:12]}"
