"""Lists, checks and reads capture segments of sites, and reads label files for scoring.

Segments lie at ``<captures>/<site>/segment-*.parquet`` (or ``site=<site>/``).

``<captures>`` is a folder, or a prefix of an object store with the same names. A segment is written once and
never changed. Whole files that break the rules raise BadSegment; single rows are returned with a reason, so
that one bad capture costs one capture.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.parquet.rows import BadRow, Capture, judge_rows, printable, printable_text, python_values
from pipeline.data.parquet.untrusted import BadParquet, Limits, check_footer, read_table
from pipeline.storage import Remote, write_atomic
from pipeline.types import Label, PalisadeError, check_site_id

if TYPE_CHECKING:
    from pipeline.data import DataConfig
    from pipeline.storage import Place

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
TIME = ("INT64", "TIMESTAMP(microseconds, UTC)")
COLUMNS = {
    "sample_id": TEXT,
    "site_id": TEXT,
    "captured_at": TIME,
    "session_id": TEXT,
    "rgb": BYTES,
    "depth": BYTES,
    "ir": BYTES,
}
LABEL_COLUMNS = {"sample_id": TEXT, "label": TEXT, "pai": TEXT}
LABELS = {"bona_fide": Label.BONA_FIDE, "attack": Label.ATTACK}
MAX_LABELS, MAX_LABEL_BYTES = 5_000_000, 512 * 2**20
OBJECT_NAME = re.compile(
    r"(segment|labels)-[A-Za-z0-9._=-]{1,200}\.parquet"
)  # names go into logs and URLs, and a key may hold anything
NOUNS = {"segment": "segment", "labels": "label file"}  # beginning of a file's name → what it is called


class BadSegment(PalisadeError, ValueError):
    """A file that is refused as a whole; the message names it and gives the reason."""


class Listing(NamedTuple):
    """The content of a captures folder or prefix."""

    segments: dict[str, list[Place]]  # by site, in stream order
    rejected: list[str]  # one line for each folder or file that is no site or segment
    sizes: dict[Place, int]  # bytes, of objects: the listing tells them, and a store would be asked for each


class Segment(NamedTuple):
    """A segment whose rows were judged."""

    good: list[Capture]
    bad: list[BadRow]
    sha256: str  # of the very bytes that were judged


def write_segment(path: Path, table: pa.Table) -> None:
    """Writes ``table`` (SCHEMA) to ``path`` so that readers see all of it or nothing.

    Raises BadSegment for another schema, or if ``path`` exists: a segment is never replaced.
    """
    if not table.schema.equals(SCHEMA):
        raise BadSegment(
            f"{path}: table has schema {_schema_text(table.schema)}, allowed {_schema_text(SCHEMA)}"
        )
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


def list_segments(root: Place, *, prefix: str = "segment") -> Listing:
    """Lists the sites below ``root`` and their files ``<prefix>-*.parquet`` in stream order.

    Names that start with ``_`` or ``.`` are skipped (``_sealed``). Raises BadSegment if there is no such
    folder.
    """
    listing = Listing({}, [], {})
    if isinstance(root, Remote):
        _add_objects(listing, root, prefix)
    elif not root.is_dir():
        raise BadSegment(f"{root}: no such folder; data.captures must hold one folder per site")
    else:
        _add_folders(listing, root, prefix)
    for paths in listing.segments.values():
        paths.sort(key=_stream_order)
    return listing


def check_segment(path: Place, *, site: str, limits: DataConfig) -> int:
    """Checks a segment by its footer, without reading a page, and returns its number of rows (0 is allowed).

    Raises BadSegment, and FileNotFoundError where nothing is.
    """
    _check_link(path, site)
    try:
        return check_footer(path, Limits(COLUMNS, limits.max_rows, limits.max_bytes))
    except BadParquet as e:
        raise BadSegment(f"{site}/{_printable_name(path)}: {e}") from None


def read_segment(path: Place, *, site: str, limits: DataConfig) -> Segment:
    """Reads a segment and judges every row; its images are judged later by ``decode``.

    Raises BadSegment, FileNotFoundError where nothing is, and StoreUnavailable.
    """
    _check_link(path, site)
    columns, sha256 = read_columns(path, Limits(COLUMNS, limits.max_rows, limits.max_bytes), site=site)
    segment = Segment([], [], sha256)
    for row in judge_rows(columns, site):
        if isinstance(row, BadRow):
            segment.bad.append(row)
        else:
            segment.good.append(row)
    return segment


def read_columns(path: Place, limits: Limits, *, site: str) -> tuple[list[list[object]], str]:
    """Returns the values of each column of a site's file, and the sha256 of its bytes; raises BadSegment."""
    try:
        table, sha256 = read_table(path, limits)
        return [python_values(table.column(name)) for name in limits.columns], sha256
    except BadParquet as e:
        raise BadSegment(f"{site}/{_printable_name(path)}: {e}") from None


def read_labels(path: Path) -> dict[str, tuple[int, str]]:
    """Returns labels by sample id (1 bona fide / 0 attack, PAI species), for scoring only."""
    try:
        table, _ = read_table(path, Limits(LABEL_COLUMNS, MAX_LABELS, MAX_LABEL_BYTES))
        columns = [python_values(table.column(name)) for name in LABEL_COLUMNS]
    except FileNotFoundError:
        raise BadSegment(f"{path}: cannot be read: no such file") from None
    except BadParquet as e:
        raise BadSegment(f"{path}: {e}") from None
    labels: dict[str, tuple[int, str]] = {}
    for row, cells in enumerate(zip(*columns)):
        sample, label, pai = (printable_text(c) for c in cells)
        if not sample or sample in labels:
            raise BadSegment(f"{path}: row {row}: sample_id {'repeated' if sample else 'missing'}")
        if label not in LABELS:
            raise BadSegment(f"{path}: row {row}: label {printable(label)}, allowed bona_fide or attack")
        labels[sample] = int(LABELS[label]), pai or ("bona_fide" if label == "bona_fide" else "unknown")
    return labels


def _add_objects(listing: Listing, root: Remote, prefix: str) -> None:
    """Adds the segments below ``root`` from one listing; in a key, ``..`` and ``//`` are only odd names."""
    rejected = dict[str, None]()  # one line for each folder that is none, however much is in it
    names = set[tuple[str, str]]()
    for entry in sorted(root.files()):
        folder, *below = entry.parts
        if folder.startswith(("_", ".")) and folder != "..":
            continue
        name = entry.place.name
        if not below:
            rejected[f"{_printable_name(entry.place)[:200]}: is no folder of a site"] = None
            continue
        try:
            site = check_site_id(folder.removeprefix("site="))
        except ValueError as e:
            rejected[" ".join(str(e).split())[:300]] = None
            continue
        if len(below) != 1:
            odd = f"{folder}/{ascii(below[0])[1:-1][:200]}"
            rejected[f"{odd}: lies deeper than <site>/{prefix}-*.parquet"] = None
        elif not (name.startswith(f"{prefix}-") and name.endswith(".parquet")):
            continue
        elif not OBJECT_NAME.fullmatch(name):
            odd = f"{folder}/{_printable_name(entry.place)[:200]}"
            rejected[f"{odd}: a {NOUNS[prefix]}'s name has letters, digits and . _ = - only"] = None
        elif (site, name) in names:
            odd = f"{folder}/{_printable_name(entry.place)}"
            rejected[f"{odd}: {site} has two {NOUNS[prefix]}s of this name, one counts"] = None
        else:
            names.add((site, name))
            listing.segments.setdefault(site, []).append(entry.place)
            listing.sizes[entry.place] = entry.size
    listing.rejected.extend(rejected)


def _add_folders(listing: Listing, root: Path, prefix: str) -> None:
    for folder in _entries(root):
        if folder.name.startswith(("_", ".")):
            continue
        shown_name = ascii(folder.name)[1:-1]
        if not folder.is_dir():
            listing.rejected.append(f"{shown_name}: is no folder of a site")
            continue
        try:
            site = check_site_id(folder.name.removeprefix("site="))
        except ValueError as e:
            listing.rejected.append(" ".join(str(e).split())[:300])
            continue
        if folder.is_symlink() and not _inside(Path(folder), root):
            listing.rejected.append(f"{shown_name}: is a link out of the captures folder")
            continue
        _add_segments(listing, site, folder, root, prefix)


def _add_segments(listing: Listing, site: str, folder: os.DirEntry[str], root: Path, prefix: str) -> None:
    segments = listing.segments.setdefault(site, [])
    names = {path.name for path in segments}
    for entry in _entries(folder):
        if not (entry.name.startswith(f"{prefix}-") and entry.name.endswith(".parquet")):
            continue
        path = Path(entry)
        if entry.is_symlink() and not _inside(path, root):
            listing.rejected.append(
                f"{folder.name}/{_printable_name(path)}: is a link out of the captures folder"
            )
        elif entry.name in names:
            odd = f"{folder.name}/{_printable_name(path)}"
            listing.rejected.append(f"{odd}: {site} has two {NOUNS[prefix]}s of this name, one counts")
        else:
            segments.append(path)


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """Returns a folder's entries by name; each entry knows its kind.

    At 10,000 sites, asking the disk for every path again would take seconds.
    """
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _printable_name(path: Place) -> str:
    return ascii(path.name)[1:-1]


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _check_link(path: Place, site: str) -> None:
    if isinstance(path, Path) and not _inside(path, path.parent.parent):
        raise BadSegment(f"{site}/{_printable_name(path)}: is a link out of the captures folder")


def _stream_order(path: Place) -> tuple[list[tuple[int, str]], str]:
    """Orders names with their numbers by value, so that segment-10000 comes after segment-9999."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"([0-9]+)", path.name)], str(path)


def _schema_text(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} {f.type}" for f in schema)
