"""Writes and reads a labelled corpus: a folder of three splits, a quarantine and a manifest.

Demographic columns never enter it; subjects are the data set's own pseudonyms. Frames are a fixed-size binary
column: no list decoding, no extension type.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.decode import CHANNELS
from pipeline.storage import write_atomic
from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

SPLITS = ("train", "val", "test")
FORMAT = 1
BONA_FIDE = "bona_fide"
DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
BATCH_BYTES = 32 * 2**20  # frames held per split before they are written
TEXTS = ("sample_id", "pai", "subject", "video")


class CorpusError(PalisadeError, ValueError):
    """A data set or a stored corpus that cannot be used; the message is one line that names the folder."""


class Row(NamedTuple):
    """One labelled sample on its way into a corpus."""

    sample_id: str
    split: str  # train, val or test
    label: int  # 1 bona fide, 0 attack
    pai: str  # PAI species; BONA_FIDE for label 1
    subject: str
    video: str  # clip or session: its frames are not independent
    frame: np.ndarray  # uint8 [5, H, W]
    present: int  # bit mask, bit m = modality m
    source_sha256: str  # of the bytes that the frame was made from


class Rejected(NamedTuple):
    """An item of a data set that does not become a row."""

    item: str
    reason: str


@dataclass(frozen=True)
class CorpusManifest:
    """The content of a corpus folder in numbers and digests."""

    format: int
    kind: str
    domain: str
    size: int
    rows: dict[str, int]  # by split
    bona_fide: dict[str, int]  # by split
    species: dict[str, dict[str, int]]  # attack samples by split and species
    rejected: int
    digests: dict[str, str]  # sha256 over the rows of a split, in order
    digest: str  # sha256 over the digests


@dataclass(frozen=True)
class Corpus:
    """N labelled samples of one domain."""

    domain: str
    sample_id: np.ndarray  # [N] str
    split: np.ndarray  # [N] str
    label: np.ndarray  # [N] int8
    pai: np.ndarray  # [N] str
    subject: np.ndarray  # [N] str
    video: np.ndarray  # [N] str
    present: np.ndarray  # [N] uint8
    frame: np.ndarray  # [N, 5, H, W] uint8
    # split -> views of what a trunk's stem made of it, float16 [rows of the split, M, C, h, w]
    maps: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict[str, tuple[np.ndarray, ...]])

    def __len__(self) -> int:
        return len(self.label)


def write_corpus(
    rows: Iterable[Row | Rejected],
    out: Path,
    *,
    domain: str,
    kind: str,
    size: int,
    progress: Callable[[int], None] | None = None,
) -> CorpusManifest:
    """Stores ``rows`` as the folder ``out``, which appears complete or not at all; raises CorpusError.

    A repeated sample id, and bytes that another split already has, go to quarantine: the split read first
    keeps them.
    """
    if not DOMAIN.fullmatch(domain):
        raise CorpusError(
            f"domain {domain!r}: allowed are 1-63 of A-Z a-z 0-9 _ -, starting with a letter or digit"
        )
    if out.exists():
        raise CorpusError(f"{out}: exists; delete the folder to import {domain} again")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        manifest = _write_rows(work, rows, domain=domain, kind=kind, size=size, progress=progress)
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def read_manifest(path: Path) -> CorpusManifest:
    """Returns the manifest of the corpus folder ``path``; raises CorpusError."""
    try:
        manifest = CorpusManifest(**json.loads((path / "manifest.json").read_text()))
    except FileNotFoundError:
        raise CorpusError(f"{path}: no corpus here; import one first") from None
    except (OSError, ValueError, TypeError) as e:
        raise CorpusError(f"{path}/manifest.json: damaged: {' '.join(str(e).split())[:200]}") from None
    if manifest.format != FORMAT:
        raise CorpusError(
            f"{path}: corpus of format {manifest.format}, this version reads {FORMAT}; import it again"
        )
    return manifest


def read_corpus(path: Path, splits: Sequence[str] = SPLITS) -> Corpus:
    """Returns the rows of ``splits`` after checking every byte against the digests; raises CorpusError."""
    manifest = read_manifest(path)
    if not splits or not set(splits) <= set(SPLITS):
        raise CorpusError(f"{path}: splits {', '.join(splits) or 'none'}; allowed: {', '.join(SPLITS)}")
    tables = [_read_split(path, manifest, split) for split in splits]
    whole = pa.concat_tables(tables)
    text = {n: np.array(whole.column(n).to_pylist(), dtype=str) for n in TEXTS}
    return Corpus(
        domain=manifest.domain,
        sample_id=text["sample_id"],
        split=np.repeat(np.array(splits, dtype=str), [len(t) for t in tables]),
        label=whole.column("label").to_numpy(),
        pai=text["pai"],
        subject=text["subject"],
        video=text["video"],
        present=whole.column("present").to_numpy(),
        frame=np.concatenate([_frames(t, manifest.size) for t in tables]),
    )


@dataclass
class _SplitWriter:
    """A split that is being written; its frames leave memory in batches."""

    file: pq.ParquetWriter
    digest: hashlib._Hash
    rows: list[Row]
    bona_fide: int
    species: Counter[str]


def _write_rows(
    work: Path,
    rows: Iterable[Row | Rejected],
    *,
    domain: str,
    kind: str,
    size: int,
    progress: Callable[[int], None] | None,
) -> CorpusManifest:
    schema = _schema(size)
    batch = max(1, BATCH_BYTES // (CHANNELS * size * size))
    splits: dict[str, _SplitWriter] = {
        s: _SplitWriter(_writer(work / f"{s}.parquet", schema), hashlib.sha256(), [], 0, Counter())
        for s in SPLITS
    }
    rejected: list[Rejected] = []
    seen: dict[str, str] = {}
    sources: dict[str, str] = {}
    for done, row in enumerate(rows, 1):
        if isinstance(row, Row):
            row = _check_row(row, size, seen, sources)
        if isinstance(row, Rejected):
            rejected.append(row)
        else:
            _add(splits[row.split], row, schema, batch)
        if progress:
            progress(done)
    for split in splits.values():
        _flush(split, schema)
        split.file.close()
    if not seen:
        first = (
            f"; the first of {len(rejected)}: {rejected[0].item}: {rejected[0].reason}" if rejected else ""
        )
        raise CorpusError(f"{domain}: no sample could be imported{first}")
    columns = [pa.array([r[i] for r in rejected], pa.string()) for i in range(2)]
    pq.write_table(pa.table(columns, names=["item", "reason"]), work / "quarantine.parquet")
    manifest = _manifest(splits, domain=domain, kind=kind, size=size, rejected=len(rejected))
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"
    write_atomic(work / "manifest.json", lambda tmp: tmp.write_text(text))
    return manifest


def _check_row(row: Row, size: int, seen: dict[str, str], sources: dict[str, str]) -> Row | Rejected:
    assert row.frame.shape == (CHANNELS, size, size), row.sample_id
    assert row.frame.dtype == np.uint8, row.sample_id
    assert row.split in SPLITS, row.sample_id
    assert (row.label == 1) == (row.pai == BONA_FIDE), row.sample_id
    if row.sample_id in seen:
        return Rejected(row.sample_id, f"sample id is already in {seen[row.sample_id]}")
    if sources.get(row.source_sha256, row.split) != row.split:
        return Rejected(row.sample_id, f"the same bytes are already in {sources[row.source_sha256]}")
    seen[row.sample_id] = sources[row.source_sha256] = row.split
    return row


def _schema(size: int) -> pa.Schema:
    fields = [
        ("sample_id", pa.string()),
        ("label", pa.int8()),
        ("pai", pa.string()),
        ("subject", pa.string()),
    ]
    fields += [("video", pa.string()), ("present", pa.uint8()), ("frame", pa.binary(CHANNELS * size * size))]
    return pa.schema(fields)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=False, write_statistics=False
    )


def _add(split: _SplitWriter, row: Row, schema: pa.Schema, batch: int) -> None:
    split.rows.append(row)
    split.bona_fide += row.label
    if not row.label:
        split.species[row.pai] += 1
    if len(split.rows) >= batch:
        _flush(split, schema)


def _flush(split: _SplitWriter, schema: pa.Schema) -> None:
    columns = [[getattr(r, name) for r in split.rows] for name in schema.names[:-1]]
    columns.append([r.frame.tobytes() for r in split.rows])
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema)], schema=schema)
    _update(split.digest, table)
    split.file.write_table(table)
    split.rows.clear()


def _update(digest: hashlib._Hash, table: pa.Table) -> None:
    """Updates the digest row by row, so that it does not depend on how rows were batched."""
    *columns, frames = (c.to_pylist() for c in table.columns)
    for cells in zip(*columns, frames):
        digest.update(json.dumps(cells[:-1]).encode())
        digest.update(cells[-1])


def _manifest(
    splits: dict[str, _SplitWriter], *, domain: str, kind: str, size: int, rejected: int
) -> CorpusManifest:
    digests: dict[str, str] = {s: o.digest.hexdigest() for s, o in splits.items()}
    return CorpusManifest(
        format=FORMAT,
        kind=kind,
        domain=domain,
        size=size,
        rows={s: o.bona_fide + o.species.total() for s, o in splits.items()},
        bona_fide={s: o.bona_fide for s, o in splits.items()},
        species={s: dict(sorted(o.species.items())) for s, o in splits.items()},
        rejected=rejected,
        digests=digests,
        digest=hashlib.sha256(json.dumps([size, digests], sort_keys=True).encode()).hexdigest(),
    )


def _read_split(path: Path, manifest: CorpusManifest, split: str) -> pa.Table:
    file = path / f"{split}.parquet"
    digest = hashlib.sha256()
    try:
        table = pq.read_table(file, use_threads=False)
        if not table.schema.equals(_schema(manifest.size)):
            raise CorpusError(f"{file}: damaged: columns are {', '.join(table.schema.names)}")
        for batch in table.to_batches():
            _update(digest, pa.Table.from_batches([batch]))
    except (pa.ArrowException, OSError) as e:
        raise CorpusError(f"{file}: damaged: {' '.join(str(e).split())[:200]}") from None
    if digest.hexdigest() != manifest.digests.get(split):
        raise CorpusError(f"{file}: damaged: its rows differ from the manifest's digest; import it again")
    return table


def _frames(table: pa.Table, size: int) -> np.ndarray:
    """Returns the frames [N, 5, H, W], as views of Arrow's memory where possible."""
    width = CHANNELS * size * size
    parts = [np.zeros((0, CHANNELS, size, size), np.uint8)]
    for chunk in table.column("frame").chunks:
        data = np.frombuffer(chunk.buffers()[1], np.uint8)[
            chunk.offset * width : (chunk.offset + len(chunk)) * width
        ]
        parts.append(data.reshape(-1, CHANNELS, size, size))
    return np.concatenate(parts)
