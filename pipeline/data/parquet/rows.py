"""Judges the rows of a foreign table cell by cell: each becomes a capture or a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

import pyarrow as pa

from pipeline.data.parquet.untrusted import ARROW_ERRORS, BadParquet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_ID = 200  # characters
LATEST = 4_102_444_800_000_000  # 2100-01-01 in microseconds


class Capture(TypedDict):
    """A row that passed; its images are still encoded."""

    row: int  # position in the segment
    sample_id: str
    site_id: str
    captured_at: int  # microseconds since 1970, UTC
    session_id: str  # "" where the site gave none: all of those count as one session
    rgb: bytes | None
    depth: bytes | None
    ir: bytes | None


class BadRow(NamedTuple):
    """A row that goes to quarantine."""

    row: int
    sample_id: str | None
    reason: str


def judge_rows(columns: Sequence[Sequence[object]], site: str) -> Iterator[Capture | BadRow]:
    """Yields the rows of a segment in order, each as a capture of ``site`` or with the reason against it."""
    seen: dict[str, int] = {}
    for row, cells in enumerate(zip(*columns)):
        yield _capture(row, cells, site, seen)


def python_values(column: pa.ChunkedArray) -> list[object]:
    """Returns the Python values of a column; equal bytes are one object, and text is not decoded yet."""
    cells: list[object] = []
    try:
        for chunk in column.chunks:
            if not pa.types.is_dictionary(chunk.type):
                cells += chunk.cast(pa.int64()).to_pylist()
                continue
            words = chunk.dictionary.cast(pa.binary()).to_pylist()
            indices = chunk.indices.to_pylist()
            if any(i is not None and not 0 <= i < len(words) for i in indices):
                raise BadParquet("has a damaged dictionary")
            cells += [None if i is None else words[i] for i in indices]
    except BadParquet:
        raise
    except ARROW_ERRORS:
        raise BadParquet("has a damaged column") from None
    return cells


def printable_text(raw: object) -> str | None:
    """Returns short printable text, else None."""
    if not isinstance(raw, bytes) or not 0 < len(raw) <= 4 * MAX_ID:
        return None
    try:
        word = raw.decode()
    except UnicodeDecodeError:
        return None
    return word if len(word) <= MAX_ID and word.isprintable() else None


def printable(raw: object) -> str:
    """Returns at most 63 characters of a foreign value, safe for a log line."""
    word = raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)
    return ascii(word[:63])


def _capture(row: int, cells: tuple[object, ...], site: str, seen: dict[str, int]) -> Capture | BadRow:
    sample_raw, site_raw, at, session_raw, rgb, depth, ir = cells
    sample, session = printable_text(sample_raw), printable_text(session_raw)
    if sample is None:
        return BadRow(row, None, f"sample_id: {fault(sample_raw)}")
    if sample in seen:
        return BadRow(row, sample, f"sample_id: already in row {seen[sample]}")
    seen[sample] = row
    if printable_text(site_raw) != site:
        return BadRow(row, sample, f"site_id: {printable(site_raw)}, expected {site!r}")
    if not isinstance(at, int):
        return BadRow(row, sample, "captured_at: null")
    if not 0 <= at < LATEST:
        return BadRow(row, sample, "captured_at: not between 1970 and 2100")
    if session is None and session_raw is not None:
        return BadRow(row, sample, f"session_id: {fault(session_raw)}")
    images = [i if isinstance(i, bytes) else None for i in (rgb, depth, ir)]
    if not any(i is not None for i in images):
        return BadRow(row, sample, "no modality present")
    return Capture(
        row=row,
        sample_id=sample,
        site_id=site,
        captured_at=at,
        session_id=session or "",
        rgb=images[0],
        depth=images[1],
        ir=images[2],
    )


def fault(raw: object) -> str:
    """Returns what is wrong with a cell of which ``printable_text`` makes nothing."""
    return "null" if raw is None else f"not 1-{MAX_ID} printable characters"
