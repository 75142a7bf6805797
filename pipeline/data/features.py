"""Stores features: one Parquet file per site and offset range, addressed by the trunk's digest.

``<root>/<trunk digest, 16>/site=<site>/<first offset>-<end>.parquet``. Features are float16 in a fixed-size
binary column: no list decoding, no extension types. An offset is the position of a sample in its site's
stream; quarantined rows leave gaps. The sha256 of all other bytes lies between the last page and the footer,
where no Parquet reader looks: a Parquet file like any other, of which no bit can change unseen.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.blobs import BadBlob
from pipeline.storage import StoreUnavailable, write_atomic
from pipeline.types import Modality, check_site_id

if TYPE_CHECKING:
    from pipeline.storage import Place

M = len(Modality)
DIGEST = 32  # bytes of a sha256
FILE_NAME = re.compile(r"([0-9]+)-([0-9]+)\.parquet")
COLUMNS: dict[str, pa.DataType | None] = {
    "offset": pa.int64(),
    "sample_id": pa.string(),
    "captured_at": pa.timestamp("us", tz="UTC"),
    "session": pa.int64(),
    "present": pa.uint8(),
    "z": None,
}  # the width of z is the trunk's


@dataclass(frozen=True)
class FeatureBlock:
    """Consecutive samples of one site, N rows in ascending offset."""

    offset: np.ndarray  # [N] int64
    sample_id: np.ndarray  # [N] str
    captured_at: np.ndarray  # [N] datetime64[us], UTC
    session: np.ndarray  # [N] int64, pseudonymous
    present: np.ndarray  # [N] uint8 bit mask, bit m = modality m
    z: np.ndarray  # [N, M, F] float16

    def __len__(self) -> int:
        return len(self.offset)

    def rows(self, index: np.ndarray | slice) -> FeatureBlock:
        """Returns the block of the rows that ``index`` selects."""
        return FeatureBlock(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def pseudonym(site: str, session_id: str) -> int:
    """Returns a session id as 63 bits, which reveal nothing without the site's own list of sessions."""
    digest = hashlib.blake2b(session_id.encode(), key=site.encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def mask_to_bool(present: np.ndarray) -> np.ndarray:
    """Converts bit masks [N] to bool [N, M]."""
    return (present[:, None] >> np.arange(M) & 1).astype(bool)


def write_features(root: Place, trunk: str, site: str, block: FeatureBlock) -> Place:
    """Stores a block; writing the same range again replaces it, so a repeated ingest changes nothing."""
    n, m, f = block.z.shape
    flat = np.ascontiguousarray(block.z, dtype=np.float16)
    z = pa.FixedSizeBinaryArray.from_buffers(pa.binary(m * f * 2), n, [None, pa.py_buffer(flat)])
    table = pa.table(
        {
            "offset": pa.array(block.offset, COLUMNS["offset"]),
            "sample_id": pa.array(block.sample_id.tolist(), COLUMNS["sample_id"]),
            "captured_at": pa.array(block.captured_at, COLUMNS["captured_at"]),
            "session": pa.array(block.session, COLUMNS["session"]),
            "present": pa.array(block.present, COLUMNS["present"]),
            "z": z,
        }
    )
    first, end = int(block.offset[0]), int(block.offset[-1]) + 1
    path = _folder(root, trunk, site) / f"{first:012d}-{end:012d}.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=1)
    write_atomic(path, _with_digest(sink.getvalue().to_pybytes()))
    return path


def delete_range(root: Place, trunk: str, site: str, *, start: int, end: int) -> None:
    """Deletes the files of an uncommitted ingest in a range of offsets that is being assigned again."""
    for path, (first, last) in _files_with_ranges(_folder(root, trunk, site)):
        if last > start and first < end:
            path.unlink(missing_ok=True)


def read_features(root: Place, trunk: str, site: str, *, start: int, end: int, features: int) -> FeatureBlock:
    """Returns the samples with ``start <= offset < end``, ascending; F = ``features``; raises BadBlob."""
    blocks = [_empty(features)]
    for path, (first, last) in sorted(_files_with_ranges(_folder(root, trunk, site))):
        if last > start and first < end:
            blocks.append(_read_block(path, features))
    block = FeatureBlock(
        *(np.concatenate([getattr(b, n) for b in blocks]) for n in FeatureBlock.__dataclass_fields__)
    )
    order = np.argsort(block.offset, kind="stable")
    return block.rows(order[(block.offset[order] >= start) & (block.offset[order] < end)])


def offset_range(path: Place) -> tuple[int, int] | None:
    """Returns (first, end) of the offsets in a feature file, from its name; None for another file."""
    match = FILE_NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else None


def _files_with_ranges(folder: Place) -> list[tuple[Place, tuple[int, int]]]:
    return [(path, span) for path in folder.glob("[0-9]*-*.parquet") if (span := offset_range(path))]


def _with_digest(parquet: bytes) -> bytes:
    at = _footer_start(parquet)
    return parquet[:at] + hashlib.sha256(parquet).digest() + parquet[at:]


def _without_digest(data: bytes) -> bytes:
    """Returns the Parquet file without its digest; raises ValueError if any byte has changed."""
    at = _footer_start(data)
    parquet = data[: at - DIGEST] + data[at:]
    if at < DIGEST or hashlib.sha256(parquet).digest() != data[at - DIGEST : at]:
        raise ValueError("its digest does not match: changed, torn, or of a version that wrote none")
    return parquet


def _footer_start(parquet: bytes) -> int:
    """Returns the position of the footer, which stands before its own length and the magic at the end."""
    return max(len(parquet) - 8 - int.from_bytes(parquet[-8:-4], "little"), 0)


def _read_block(path: Place, features: int) -> FeatureBlock:
    width = M * features * 2
    try:
        table = pq.ParquetFile(pa.BufferReader(_without_digest(path.read_bytes()))).read()
        columns = {name: table[name].combine_chunks() for name in COLUMNS}
    except StoreUnavailable:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError) as e:
        raise BadBlob(
            f"{path}: not a readable feature file ({' '.join(str(e).split())[:120]}); "
            "ingest the segment again"
        ) from None
    for name, wanted in {**COLUMNS, "z": pa.binary(width)}.items():
        if columns[name].type != wanted or columns[name].null_count:
            raise BadBlob(
                f"{path}: {name} is {columns[name].type} with {columns[name].null_count} nulls, "
                f"this trunk's features need {wanted}; ingest again"
            )
    column = columns["z"]
    z = np.frombuffer(
        column.buffers()[1], np.float16, count=len(column) * M * features, offset=column.offset * width
    )
    return FeatureBlock(
        offset=columns["offset"].to_numpy(),
        sample_id=np.asarray(columns["sample_id"].to_pylist(), dtype=object),
        captured_at=columns["captured_at"].cast(pa.timestamp("us")).to_numpy(),
        session=columns["session"].to_numpy(),
        present=columns["present"].to_numpy(),
        z=z.reshape(-1, M, features),
    )


def _empty(features: int) -> FeatureBlock:
    return FeatureBlock(
        offset=np.zeros(0, np.int64),
        sample_id=np.zeros(0, object),
        captured_at=np.zeros(0, "datetime64[us]"),
        session=np.zeros(0, np.int64),
        present=np.zeros(0, np.uint8),
        z=np.zeros((0, M, features), np.float16),
    )


def _folder(root: Place, trunk: str, site: str) -> Place:
    return root / trunk[:16] / f"site={check_site_id(site)}"
