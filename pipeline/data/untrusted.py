"""Opens a Parquet file that a stranger wrote: nothing in it runs code or allocates more than it was allowed.

Arrow rebuilds extension types from the metadata key ``ARROW:schema`` as soon as a file is opened, and registered types
may run code then. So the key is renamed in memory before Arrow sees it; types come from the physical schema alone.
Sizes in a footer are claims. Decoders believe the page headers, so those are read and summed before any page is.
"""

from __future__ import annotations

import base64
import binascii
import stat
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAGIC = b"PAR1"
ARROW_KEY, HIDDEN_KEY = b"ARROW:schema", b"hidden:arrow"  # of equal length, so that no offset moves
MAX_FOOTER = 8 * 2**20
MAX_ROW_GROUPS = 1024
MAX_PAGES = 100_000
MAX_DEPTH = 8  # of nested structs in a page header; the format has 3
# PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, RLE_DICTIONARY; the delta encodings repeat megabytes with a few bits
ENCODINGS = frozenset((0, 2, 3, 4, 8))
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3

ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError)
Thrift = dict[int, "int | Thrift | None"]


class BadParquet(ValueError):
    """A file that is not opened; the message is the reason, without the file's name."""


class Limits(NamedTuple):
    """What a file may hold: ``columns`` maps each allowed column to (physical type, logical type)."""

    columns: Mapping[str, tuple[str, str]]
    rows: int
    size: int  # bytes, both on disk and unpacked


def check_footer(path: Path, limits: Limits) -> int:
    """Judge ``path`` by its footer and return its number of rows; raises BadParquet."""
    size = _size(path, limits)
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        length = _footer_length(file.read(8), size)
        file.seek(size - 8 - length)
        tail = file.read(length + 8)
        file.seek(0)
        if file.read(4) != MAGIC:
            raise BadParquet("is no Parquet file")
    return _checked(_opened(MAGIC + tail, length, limits), limits, size).num_rows


def read_table(path: Path, limits: Limits) -> pa.Table:
    """Read ``path`` after checking footer and pages; byte columns stay dictionaries, so that repeats are held once."""
    size = _size(path, limits)
    data = path.read_bytes()
    if len(data) != size or not data.startswith(MAGIC):
        raise BadParquet("is no Parquet file")
    length = _footer_length(data[-8:], size)
    file = _opened(data, length, limits)
    metadata = _checked(file, limits, size)
    _check_pages(data, metadata, limits)
    try:
        table = file.read(use_threads=False)
    except ARROW_ERRORS as e:
        raise BadParquet(f"cannot be read: {_line(e)}") from None
    if table.num_rows != metadata.num_rows:
        raise BadParquet(f"holds {table.num_rows} rows, its footer claims {metadata.num_rows}")
    return table


def _size(path: Path, limits: Limits) -> int:
    try:
        info = path.stat()
    except OSError as e:
        raise BadParquet(f"cannot be read: {e.strerror}") from None
    if not stat.S_ISREG(info.st_mode):  # a pipe would block for ever
        raise BadParquet("is no regular file")
    if info.st_size > limits.size:
        raise BadParquet(f"has {info.st_size} bytes, allowed {limits.size}")
    if info.st_size < 12:
        raise BadParquet("is no Parquet file")
    return info.st_size


def _footer_length(end: bytes, size: int) -> int:
    if end[4:] != MAGIC:
        raise BadParquet("is no Parquet file" if end[4:] != b"PARE" else "is encrypted")
    length = int.from_bytes(end[:4], "little")
    if not 0 < length <= min(MAX_FOOTER, size - 12):
        raise BadParquet(f"has a footer of {length} bytes, allowed {min(MAX_FOOTER, size - 12)}")
    return length


def _opened(data: bytes, footer: int, limits: Limits) -> pq.ParquetFile:
    """Open bytes that end in a footer of that length, without any Arrow type that the file asks for."""
    tail = data[-8 - footer :].replace(ARROW_KEY, HIDDEN_KEY)
    try:
        return pq.ParquetFile(
            pa.BufferReader(data[: -8 - footer] + tail),
            read_dictionary=[name for name, (physical, _) in limits.columns.items() if physical == "BYTE_ARRAY"],
            arrow_extensions_enabled=False,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    except ARROW_ERRORS as e:
        raise BadParquet(f"has a damaged footer: {_line(e)}") from None


def _checked(file: pq.ParquetFile, limits: Limits, size: int) -> pq.FileMetaData:
    try:
        metadata = file.metadata
        _check_keys(metadata.metadata or {})
        _check_schema(metadata.schema, limits.columns)
        _check_row_groups(metadata, limits, size)
    except BadParquet:
        raise
    except ARROW_ERRORS as e:
        raise BadParquet(f"has a damaged footer: {_line(e)}") from None
    return metadata


def _check_keys(raw: Mapping[bytes, bytes | None]) -> None:
    """An extension type is refused although nothing here would load it: the next reader might."""
    for key, value in raw.items():
        texts = [key, value or b""]
        if key == HIDDEN_KEY:
            try:
                texts.append(base64.b64decode(value or b""))
            except (binascii.Error, ValueError):
                raise BadParquet("has damaged Arrow metadata") from None
        if any(b"ARROW:extension" in t for t in texts):
            raise BadParquet("names an Arrow extension type, allowed are plain columns")


def _check_schema(schema: pq.ParquetSchema, allowed: Mapping[str, tuple[str, str]]) -> None:
    found = [schema.column(i) for i in range(len(schema))] if len(schema) == len(allowed) else []
    names = sorted(c.path for c in found)
    if names != sorted(allowed):
        given = ", ".join(names[:10]) or f"{len(schema)} columns"
        raise BadParquet(f"has columns {given[:200]!r}, allowed exactly {', '.join(allowed)}")
    for column in found:
        logical = column.logical_type
        kind = logical.type if logical.type != "TIMESTAMP" else _timestamp(logical.to_json())
        wanted = allowed[column.path]
        if (column.physical_type, kind) != wanted or column.max_repetition_level or column.max_definition_level > 1:
            raise BadParquet(f"column {column.path} is {column.physical_type}/{kind}, allowed {'/'.join(wanted)}")


def _timestamp(text: str) -> str:
    utc = '"isAdjustedToUTC": true' in text
    unit = next((u for u in ("milliseconds", "microseconds", "nanoseconds") if f'"{u}"' in text), "?")
    return f"TIMESTAMP({unit}, {'UTC' if utc else 'no time zone'})"


def _check_row_groups(metadata: pq.FileMetaData, limits: Limits, size: int) -> None:
    if not 0 <= metadata.num_rows <= limits.rows:
        raise BadParquet(f"claims {metadata.num_rows} rows, allowed {limits.rows}")
    if metadata.num_row_groups > MAX_ROW_GROUPS:
        raise BadParquet(f"has {metadata.num_row_groups} row groups, allowed {MAX_ROW_GROUPS}")
    rows = unpacked = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        rows += group.num_rows
        for c in range(metadata.num_columns):
            chunk = group.column(c)
            unpacked += chunk.total_uncompressed_size
            if group.num_rows < 0 or chunk.num_values != group.num_rows or chunk.total_uncompressed_size < 0:
                raise BadParquet(f"row group {g} claims {chunk.num_values} values in {group.num_rows} rows")
            if chunk.file_path:
                raise BadParquet(f"row group {g} points to another file")
            start, packed = _start(chunk), chunk.total_compressed_size
            if packed < 0 or start < 4 or start + packed > size:
                raise BadParquet(f"row group {g} lies outside the file")
    if rows != metadata.num_rows:
        raise BadParquet(f"claims {metadata.num_rows} rows, its row groups {rows}")
    if unpacked > limits.size:
        raise BadParquet(f"unpacks to {unpacked} bytes, allowed {limits.size}")


def _start(chunk: pq.ColumnChunkMetaData) -> int:
    first = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    return min(chunk.data_page_offset, first) if first else chunk.data_page_offset


def _check_pages(data: bytes, metadata: pq.FileMetaData, limits: Limits) -> None:
    """Walk the page headers of every chunk, as the decoder will."""
    pages = unpacked = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(metadata.num_columns):
            chunk = group.column(c)
            at, left = _start(chunk), group.num_rows
            end = at + chunk.total_compressed_size
            while left > 0:
                try:
                    header, at = _struct(data, at, 0)
                    size, packed, values = _page(header, group.num_rows)
                except (IndexError, TypeError, KeyError):
                    raise BadParquet(f"row group {g} has a damaged page") from None
                at, left = at + packed, left - values
                pages, unpacked = pages + 1, unpacked + size
                if at > end or left < 0 or pages > MAX_PAGES:
                    raise BadParquet(f"row group {g} has pages that do not fit its footer")
                if unpacked > limits.size:
                    raise BadParquet(f"unpacks to more than {limits.size} bytes")


def _page(header: Thrift, rows: int) -> tuple[int, int, int]:
    """(bytes unpacked, bytes packed, rows) of one page header."""
    kind, size, packed = header[1], header[2], header[3]
    own = header.get({DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}.get(kind, -1))  # pyright: ignore
    if not isinstance(own, dict):
        raise BadParquet(f"has a page of kind {kind}, allowed are data and dictionary pages")
    values, encoding = own[1], own[4 if kind == DATA_PAGE_V2 else 2]
    if not (isinstance(size, int) and isinstance(packed, int) and isinstance(values, int)):
        raise BadParquet("has a damaged page")
    if encoding not in ENCODINGS:
        raise BadParquet(f"has a page of encoding {encoding}, allowed are plain and dictionary")
    if size < 0 or packed < 0 or not 0 <= values <= rows:
        raise BadParquet(f"has a page that claims {values} values, allowed {rows}")
    return size, packed, 0 if kind == DICTIONARY_PAGE else values


def _struct(data: bytes, at: int, depth: int) -> tuple[Thrift, int]:
    """One struct in Thrift's compact protocol, of which page headers are made: integers, bytes and structs."""
    if depth > MAX_DEPTH:
        raise BadParquet("has a page header nested too deep")
    fields: Thrift = {}
    number = 0
    while True:
        head = data[at]
        at += 1
        if head == 0:
            return fields, at
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        if number in fields:  # readers differ in which one counts
            raise BadParquet("has a damaged page")
        if kind in (1, 2):  # a boolean is its type
            fields[number] = int(kind == 1)
        elif kind == 3:
            fields[number], at = data[at], at + 1
        elif kind in (4, 5, 6):
            fields[number], at = _integer(data, at)
        elif kind == 8:
            length, at = _varint(data, at)
            fields[number], at = None, at + length
        elif kind == 12:
            fields[number], at = _struct(data, at, depth + 1)
        else:
            raise BadParquet("has a damaged page")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise BadParquet("has a damaged page")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
