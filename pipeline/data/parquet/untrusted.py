"""Opens a Parquet file of unknown origin after checking its size, its footer and its page headers.

Nothing in the file runs code, ends the process or allocates more than allowed.

Arrow does all three from a footer alone: it rebuilds extension types from ``ARROW:schema`` (registered types
may run code then), aborts on size statistics that do not fit (pyarrow 25), and allocates what is claimed. So
the footer is read here, and Arrow gets one written here, with plain columns and nothing optional. Sizes in a
footer are claims: decoders believe the page headers, so those are read and summed before any page is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.parquet import thrift
from pipeline.storage import StoreUnavailable
from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipeline.storage import Place

MAGIC = b"PAR1"
MAX_FOOTER = 2**20
MAX_ROW_GROUPS = 64
MAX_PAGES = 100_000
PHYSICAL = {
    1: "INT32",
    2: "INT64",
    3: "INT96",
    4: "FLOAT",
    5: "DOUBLE",
    6: "BYTE_ARRAY",
    7: "FIXED_LEN_BYTE_ARRAY",
}
CONVERTED = {0: "STRING", 9: "TIMESTAMP(milliseconds, UTC)", 10: "TIMESTAMP(microseconds, UTC)"}
UNITS = {1: "milliseconds", 2: "microseconds", 3: "nanoseconds"}
LOGICAL_STRING, LOGICAL_TIMESTAMP = 1, 8
REQUIRED, OPTIONAL = 0, 1
# PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, RLE_DICTIONARY; the delta encodings repeat megabytes with a few
# bits
ENCODINGS = frozenset((0, 2, 3, 4, 8))
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError)


class BadParquet(PalisadeError, ValueError):
    """A file that is not opened; the message is the reason, without the file's name."""


class Limits(NamedTuple):
    """The bounds of a file; ``columns`` maps each allowed column to (physical type, logical type)."""

    columns: Mapping[str, tuple[str, str]]
    max_rows: int
    max_bytes: int  # on disk, and again unpacked


class _Chunk(NamedTuple):
    """The pages of one column in one row group."""

    start: int
    data_offset: int
    dictionary_offset: int | None
    packed: int
    unpacked: int
    codec: int


class _Footer(NamedTuple):
    columns: tuple[str, ...]  # in the order of the file
    groups: tuple[tuple[int, tuple[_Chunk, ...]], ...]  # (rows, chunks)


def check_footer(path: Place, limits: Limits) -> int:
    """Checks ``path`` by its footer and returns its number of rows; raises as ``read_table`` does."""
    with _open_regular(path, limits) as (file, size):
        head = file.read(4)
        file.seek(size - 8)
        length = _footer_length(head, file.read(8), size)
        file.seek(size - 8 - length)
        footer = _parse_footer(file.read(length), limits, size)
    return sum(rows for rows, _ in footer.groups)


def read_table(path: Place, limits: Limits) -> tuple[pa.Table, str]:
    """Returns the table in ``path`` and the sha256 of the file, after checking size, footer and pages.

    Byte columns stay dictionaries, so that repeats are held once. Raises BadParquet for what the file is,
    FileNotFoundError and StoreUnavailable for what may be otherwise next time. No bit of a file of
    checksummed version 1 pages (``write_segment``) changes what is read unseen: the pages' bytes by their
    checksums, and of the rest nothing is taken that has a second legal reading one bit away, wherefore a
    column must be nullable (of a required one the same page gives other values) and no two chunks may overlap
    (a page may be another column's).
    """
    with _open_regular(path, limits) as (file, size):
        data = file.read(size + 1)
    if len(data) != size:
        raise BadParquet("changed while it was read")
    digest = hashlib.sha256(data).hexdigest()
    body = size - 8 - _footer_length(data[:4], data[-8:], size)
    footer = _parse_footer(data[body:-8], limits, size)
    _check_pages(data, footer, limits)
    clean = _plain_footer(footer, limits)
    data = b"".join((memoryview(data)[:body], clean, len(clean).to_bytes(4, "little"), MAGIC))
    texts = [name for name, (physical, _) in limits.columns.items() if physical == "BYTE_ARRAY"]
    try:
        table = pq.ParquetFile(
            pa.BufferReader(data), read_dictionary=texts, pre_buffer=False, page_checksum_verification=True
        ).read(use_threads=False)
    except ARROW_ERRORS as e:
        raise BadParquet(f"cannot be read: {' '.join(str(e).split())[:200] or type(e).__name__}") from None
    if table.num_rows != sum(rows for rows, _ in footer.groups):
        raise BadParquet(f"holds {table.num_rows} rows, not those that its footer claims")
    return table, digest


@contextmanager
def _open_regular(path: Place, limits: Limits) -> Iterator[tuple[IO[bytes] | pa.NativeFile, int]]:
    """Opens the file and returns it with its size, which is allowed; nothing of it is read yet."""
    try:
        if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):  # a pipe would block for ever
            raise BadParquet("is no regular file")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size > limits.max_bytes:
                raise BadParquet(f"has {size} bytes, allowed {limits.max_bytes}")
            if size < 12:
                raise BadParquet("is no Parquet file")
            file.seek(0)
            yield file, size
    except (FileNotFoundError, StoreUnavailable):
        raise
    except OSError as e:
        raise BadParquet(f"cannot be read: {e.strerror}") from None


def _footer_length(head: bytes, end: bytes, size: int) -> int:
    if head != MAGIC or end[4:] != MAGIC:
        raise BadParquet("is encrypted" if end[4:] == b"PARE" else "is no Parquet file")
    length = int.from_bytes(end[:4], "little")
    if not 0 < length <= min(MAX_FOOTER, size - 12):
        raise BadParquet(f"has a footer of {length} bytes, allowed {min(MAX_FOOTER, size - 12)}")
    return length


def _parse_footer(data: bytes, limits: Limits, size: int) -> _Footer:
    try:
        raw, _ = thrift.read_struct(data, 0)
        _check_keys(thrift.children(raw, 5))
        columns = _columns(thrift.children(raw, 2), limits.columns)
        rows = thrift.integer(raw, 3)
        if not 0 <= rows <= limits.max_rows:
            raise BadParquet(f"claims {rows} rows, allowed {limits.max_rows}")
        groups = thrift.children(raw, 4)
        if len(groups) > MAX_ROW_GROUPS:
            raise BadParquet(f"has {len(groups)} row groups, allowed {MAX_ROW_GROUPS}")
        footer = _Footer(columns, tuple(_group(g, columns, size) for g in groups))
    except thrift.BadThrift as e:
        raise BadParquet(f"has a damaged footer: {e}") from None
    if sum(n for n, _ in footer.groups) != rows:
        raise BadParquet(f"claims {rows} rows, its row groups do not")
    spans = sorted((c.start, c.start + c.packed) for n, chunks in footer.groups if n for c in chunks)
    if any(start < end for (_, end), (start, _) in pairwise(spans)):
        raise BadParquet("has columns that share bytes")
    unpacked = sum(c.unpacked for _, chunks in footer.groups for c in chunks)
    if unpacked > limits.max_bytes:
        raise BadParquet(f"unpacks to {unpacked} bytes, allowed {limits.max_bytes}")
    return footer


def _check_keys(entries: Sequence[thrift.Struct]) -> None:
    """Refuses an Arrow extension type; it would not be loaded here, but perhaps by the next reader."""
    for entry in entries:
        texts = [thrift.binary(entry, 1), thrift.binary(entry, 2)]
        if texts[0] == b"ARROW:schema":
            try:
                texts.append(base64.b64decode(texts[1], validate=True))
            except binascii.Error:
                raise BadParquet("has damaged Arrow metadata") from None
        if any(b"ARROW:extension" in t for t in texts):
            raise BadParquet("names an Arrow extension type, allowed are plain columns")


def _columns(elements: Sequence[thrift.Struct], allowed: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    names = [ascii(thrift.binary(e, 4).decode(errors="replace"))[1:-1] for e in elements[1:]]
    if sorted(names) != sorted(allowed) or thrift.integer(elements[0], 5, 0) != len(names):
        raise BadParquet(
            f"has columns {', '.join(names)[:200] or 'none'}; allowed exactly {', '.join(allowed)}"
        )
    for name, element in zip(names, elements[1:]):
        types = PHYSICAL.get(thrift.integer(element, 1, -1), "a group"), _logical(element)
        repetition = thrift.integer(element, 3, -1)
        if types != allowed[name] or thrift.integer(element, 5, 0) or repetition not in (REQUIRED, OPTIONAL):
            shape = "/".join(types) if types != allowed[name] else "nested"
            raise BadParquet(f"column {name} is {shape}, allowed {'/'.join(allowed[name])}")
        if repetition == REQUIRED:
            raise BadParquet(f"column {name} is required, allowed are nullable columns")
    return tuple(names)


def _logical(element: thrift.Struct) -> str:
    logical = thrift.child(element, 10)
    if LOGICAL_TIMESTAMP in logical:
        stamp = thrift.child(logical, LOGICAL_TIMESTAMP)
        unit = next((u for field, u in UNITS.items() if field in thrift.child(stamp, 2)), "?")
        return f"TIMESTAMP({unit}, {'UTC' if stamp.get(1) == 1 else 'no time zone'})"
    if logical:
        return "STRING" if LOGICAL_STRING in logical else f"logical type {min(logical)}"
    converted = thrift.integer(element, 6, -1)
    return CONVERTED.get(converted, f"converted type {converted}") if converted >= 0 else "NONE"


def _group(raw: thrift.Struct, columns: Sequence[str], size: int) -> tuple[int, tuple[_Chunk, ...]]:
    rows, chunks = thrift.integer(raw, 3), thrift.children(raw, 1)
    if rows < 0 or len(chunks) != len(columns):
        raise BadParquet(f"has a row group of {rows} rows and {len(chunks)} columns")
    return rows, tuple(_chunk(chunk, name, rows, size) for chunk, name in zip(chunks, columns))


def _chunk(raw: thrift.Struct, name: str, rows: int, size: int) -> _Chunk:
    if 1 in raw:
        raise BadParquet("points to another file")
    if 8 in raw or 9 in raw:
        raise BadParquet("is encrypted")
    meta = thrift.child(raw, 3)
    if meta.get(3) != [name.encode()] or thrift.integer(meta, 5) != rows:
        raise BadParquet(f"column {name} does not fit its row group")
    data, dictionary = thrift.integer(meta, 9), thrift.integer(meta, 11, 0) or None
    start = min(data, dictionary or data)
    packed, unpacked = thrift.integer(meta, 7), thrift.integer(meta, 6)
    if (
        packed < 0
        or unpacked < 0
        or (rows and (start < 4 or start + packed > size or data >= start + packed))
    ):
        raise BadParquet(f"column {name} lies outside the file")
    return _Chunk(start, data, dictionary, packed, unpacked, thrift.integer(meta, 4))


def _check_pages(data: bytes, footer: _Footer, limits: Limits) -> None:
    """Walks the page headers of every chunk, as the decoder will."""
    pages = unpacked = 0
    for rows, chunks in footer.groups:
        for chunk in chunks:
            at, left = chunk.start, rows
            while left > 0:
                try:
                    header, at = thrift.read_struct(data, at)
                    size, packed, values = _page(header, rows)
                except thrift.BadThrift as e:
                    raise BadParquet(f"has a damaged page: {e}") from None
                at, left = at + packed, left - values
                pages, unpacked = pages + 1, unpacked + size
                if at > chunk.start + chunk.packed or left < 0 or pages > MAX_PAGES:
                    raise BadParquet("has pages that do not fit its footer")
                if unpacked > limits.max_bytes:
                    raise BadParquet(f"unpacks to more than {limits.max_bytes} bytes")


def _page(header: thrift.Struct, rows: int) -> tuple[int, int, int]:
    """Returns (bytes unpacked, bytes packed, rows) of one page header."""
    kind, size, packed = (thrift.integer(header, field) for field in (1, 2, 3))
    details_field = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}.get(kind)
    if details_field is None:
        raise BadParquet(f"has a page of kind {kind}, allowed are data and dictionary pages")
    details = thrift.child(header, details_field)
    values, encoding = thrift.integer(details, 1), thrift.integer(details, 4 if kind == DATA_PAGE_V2 else 2)
    if encoding not in ENCODINGS:
        raise BadParquet(f"has a page of encoding {encoding}, allowed are plain and dictionary")
    if size < 0 or packed < 0 or not 0 <= values <= rows:
        raise BadParquet(f"has a page that claims {values} values, allowed {rows}")
    return size, packed, 0 if kind == DICTIONARY_PAGE else values


def _plain_footer(footer: _Footer, limits: Limits) -> bytes:
    """Returns a footer with the columns and pages of ``footer`` and nothing else."""
    t, codes = thrift, {v: k for k, v in PHYSICAL.items()}
    converted = {v: k for k, v in CONVERTED.items()}
    schema: list[object] = [{4: (t.BINARY, b"schema"), 5: (t.I32, len(footer.columns))}]
    for name in footer.columns:
        physical, logical = limits.columns[name]
        element = {1: (t.I32, codes[physical]), 3: (t.I32, OPTIONAL), 4: (t.BINARY, name.encode())}
        schema.append(element if logical == "NONE" else {**element, 6: (t.I32, converted[logical])})
    groups: list[object] = []
    for rows, chunks in footer.groups:
        columns: list[object] = []
        for name, chunk in zip(footer.columns, chunks):
            meta = {1: (t.I32, codes[limits.columns[name][0]]), 2: (t.LIST, (t.I32, [0, 3, 8]))}
            meta |= {3: (t.LIST, (t.BINARY, [name.encode()])), 4: (t.I32, chunk.codec), 5: (t.I64, rows)}
            meta |= {6: (t.I64, chunk.unpacked), 7: (t.I64, chunk.packed), 9: (t.I64, chunk.data_offset)}
            if chunk.dictionary_offset:
                meta[11] = (t.I64, chunk.dictionary_offset)
            columns.append({2: (t.I64, 0), 3: (t.STRUCT, meta)})
        size = sum(c.unpacked for c in chunks)
        groups.append({1: (t.LIST, (t.STRUCT, columns)), 2: (t.I64, size), 3: (t.I64, rows)})
    count = sum(rows for rows, _ in footer.groups)
    fields = {
        1: (t.I32, 2),
        2: (t.LIST, (t.STRUCT, schema)),
        3: (t.I64, count),
        4: (t.LIST, (t.STRUCT, groups)),
    }
    return t.write_struct(fields)
