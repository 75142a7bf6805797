"""Site captures at rest, ``<captures>/<site>/segment-*.parquet`` (or ``site=<site>/``), and label files for scoring.

A segment is written once and never changed. Whole files that break the rules raise BadSegment; single rows are returned
with a reason, so that one bad capture costs one capture.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.untrusted import ARROW_ERRORS, BadParquet, Limits, check_footer, read_table
from pipeline.storage import write_atomic
from pipeline.types import Label, check_site_id

if TYPE_CHECKING:
    from pipeline.data import DataConfig

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("site_id", pa.string()),
        pa.field("captured_at", pa.timestamp("us", tz="UTC")),
        pa.field("session_id", pa.string()),
        pa.field("rgb", pa.binary()),
        pa.field("depth", pa.binary()),
        pa.field("ir", pa.binary()),
    ]
)
TEXT, BYTES = ("BYTE_ARRAY", "STRING"), ("BYTE_ARRAY", "NONE")
COLUMNS = {
    "sample_id": TEXT,
    "site_id": TEXT,
    "captured_at": ("INT64", "TIMESTAMP(microseconds, UTC)"),
    "session_id": TEXT,
    "rgb": BYTES,
    "depth": BYTES,
    "ir": BYTES,
}
LABEL_COLUMNS = {"sample_id": TEXT, "label": TEXT, "pai": TEXT}
LABELS = {"bona_fide": Label.BONA_FIDE, "attack": Label.ATTACK}
MAX_LABELS, MAX_LABEL_BYTES = 5_000_000, 512 * 2**20
MAX_ID = 200  # characters
LATEST = 4_102_444_800_000_000  # 2100-01-01 in microseconds


class BadSegment(ValueError):
    """A whole file that is refused; the message names it and gives the reason."""


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


class Listing(NamedTuple):
    """What a captures folder holds."""

    segments: dict[str, list[Path]]  # by site, in stream order
    rejected: list[str]  # one line for each folder or file that is no site or segment


class Segment(NamedTuple):
    """A segment after its rows were judged."""

    good: list[Capture]
    bad: list[BadRow]
    sha256: str  # of the very bytes that were judged


def write_segment(path: Path, table: pa.Table) -> None:
    """Write ``table`` (SCHEMA) to ``path`` so that a reader sees all of it or nothing; refuses to replace a segment."""
    if not table.schema.equals(SCHEMA):
        raise BadSegment(f"{path}: table has schema {_flat(table.schema)}, allowed {_flat(SCHEMA)}")
    if path.exists():
        raise BadSegment(f"{path}: exists; segments are never changed, choose the next number")
    write_atomic(
        path,
        lambda tmp: pq.write_table(
            table,
            tmp,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_statistics=False,  # statistics of images would put image bytes into the footer
            write_page_checksum=True,
        ),
    )


def list_segments(root: Path) -> Listing:
    """Sites and their segments below ``root``. Names starting with ``_`` or ``.`` are not looked at (``_sealed``)."""
    if not root.is_dir():
        raise BadSegment(f"{root}: no such folder; data.captures must hold one folder per site")
    listing = Listing({}, [])
    for folder in _entries(root):
        if folder.name.startswith(("_", ".")):
            continue
        shown = ascii(folder.name)[1:-1]
        if not folder.is_dir():
            listing.rejected.append(f"{shown}: is no folder of a site")
            continue
        try:
            site = check_site_id(folder.name.removeprefix("site="))
        except ValueError as e:
            listing.rejected.append(" ".join(str(e).split())[:300])
            continue
        if folder.is_symlink() and not _inside(Path(folder), root):
            listing.rejected.append(f"{shown}: is a link out of the captures folder")
            continue
        _add_segments(listing, site, folder, root)
    for paths in listing.segments.values():
        paths.sort(key=_stream_order)
    return listing


def check_segment(path: Path, *, site: str, limits: DataConfig) -> int:
    """Judge a segment by its footer, without reading a page; returns its number of rows (0 is allowed)."""
    _check_link(path, site)
    try:
        return check_footer(path, Limits(COLUMNS, limits.max_rows, limits.max_bytes))
    except BadParquet as e:
        raise BadSegment(f"{site}/{_name(path)}: {e}") from None


def read_segment(path: Path, *, site: str, limits: DataConfig) -> Segment:
    """Read a segment and judge every row; images are judged by ``decode``, whose BadImage is a row's reason too."""
    _check_link(path, site)
    try:
        table, sha256 = read_table(path, Limits(COLUMNS, limits.max_rows, limits.max_bytes))
        columns = {name: _values(table.column(name)) for name in COLUMNS}
    except BadParquet as e:
        raise BadSegment(f"{site}/{_name(path)}: {e}") from None
    segment, seen = Segment([], [], sha256), {}
    for row, cells in enumerate(zip(*columns.values())):
        capture = _capture(row, cells, site, seen)
        if isinstance(capture, BadRow):
            segment.bad.append(capture)
        else:
            segment.good.append(capture)
    return segment


def read_labels(path: Path) -> dict[str, tuple[int, str]]:
    """Labels by sample id: (1 bona fide / 0 attack, PAI species). For scoring only."""
    try:
        table, _ = read_table(path, Limits(LABEL_COLUMNS, MAX_LABELS, MAX_LABEL_BYTES))
        columns = [_values(table.column(name)) for name in LABEL_COLUMNS]
    except BadParquet as e:
        raise BadSegment(f"{path}: {e}") from None
    labels: dict[str, tuple[int, str]] = {}
    for row, cells in enumerate(zip(*columns)):
        sample, label, pai = (_text(c) for c in cells)
        if not sample or sample in labels:
            raise BadSegment(f"{path}: row {row}: sample_id {'repeated' if sample else 'missing'}")
        if label not in LABELS:
            raise BadSegment(f"{path}: row {row}: label {_shown(label)}, allowed bona_fide or attack")
        labels[sample] = int(LABELS[label]), pai or ("bona_fide" if label == "bona_fide" else "unknown")
    return labels


def _add_segments(listing: Listing, site: str, folder: os.DirEntry[str], root: Path) -> None:
    kept = listing.segments.setdefault(site, [])
    names = {path.name for path in kept}
    for entry in _entries(folder):
        if not (entry.name.startswith("segment-") and entry.name.endswith(".parquet")):
            continue
        path = Path(entry)
        if entry.is_symlink() and not _inside(path, root):
            listing.rejected.append(f"{folder.name}/{_name(path)}: is a link out of the captures folder")
        elif entry.name in names:
            listing.rejected.append(f"{folder.name}/{_name(path)}: {site} has two segments of this name, one counts")
        else:
            kept.append(path)


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """By name. What an entry is comes with it: at 10,000 sites every further question to the disk takes seconds."""
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


def _capture(row: int, cells: tuple[object, ...], site: str, seen: dict[str, int]) -> Capture | BadRow:
    sample_raw, site_raw, at, session_raw, rgb, depth, ir = cells
    sample, session = _text(sample_raw), _text(session_raw)
    if sample is None:
        return BadRow(row, None, f"sample_id: {_fault(sample_raw)}")
    if sample in seen:
        return BadRow(row, sample, f"sample_id: already in row {seen[sample]}")
    seen[sample] = row
    if _text(site_raw) != site:
        return BadRow(row, sample, f"site_id: {_shown(site_raw)}, expected {site!r}")
    if not isinstance(at, int):
        return BadRow(row, sample, "captured_at: null")
    if not 0 <= at < LATEST:
        return BadRow(row, sample, "captured_at: not between 1970 and 2100")
    if session is None and session_raw is not None:
        return BadRow(row, sample, f"session_id: {_fault(session_raw)}")
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


def _values(column: pa.ChunkedArray) -> list[object]:
    """Python values of a column; equal bytes are one object, and nothing is decoded as text yet."""
    values: list[object] = []
    try:
        for chunk in column.chunks:
            if not pa.types.is_dictionary(chunk.type):
                values += chunk.cast(pa.int64()).to_pylist()
                continue
            words = chunk.dictionary.cast(pa.binary()).to_pylist()
            indices = chunk.indices.to_pylist()
            if any(i is not None and not 0 <= i < len(words) for i in indices):
                raise BadParquet("has a damaged dictionary")
            values += [None if i is None else words[i] for i in indices]
    except BadParquet:
        raise
    except ARROW_ERRORS:
        raise BadParquet("has a damaged column") from None
    return values


def _text(raw: object) -> str | None:
    """Short printable text, else None."""
    if not isinstance(raw, bytes) or not 0 < len(raw) <= 4 * MAX_ID:
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    return text if len(text) <= MAX_ID and text.isprintable() else None


def _fault(raw: object) -> str:
    return "null" if raw is None else f"not 1-{MAX_ID} printable characters"


def _shown(raw: object) -> str:
    """At most 63 characters of something foreign, safe for a log line."""
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)
    return ascii(text[:63])


def _name(path: Path) -> str:
    return ascii(path.name)[1:-1]


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _check_link(path: Path, site: str) -> None:
    if not _inside(path, path.parent.parent):
        raise BadSegment(f"{site}/{_name(path)}: is a link out of the captures folder")


def _stream_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Numbers by value, so that segment-10000 comes after segment-9999."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"([0-9]+)", path.name)], str(path)


def _flat(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} {f.type}" for f in schema)
