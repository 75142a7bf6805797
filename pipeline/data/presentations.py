"""Reads and writes label files of sites: presentations whose truth somebody knows and vouches for.

Label files lie at ``<labels>/<site>/labels-*.parquet``. They come from commissioning, a red team, confirmed
incidents and operators' corrections, each row with who says so and when. Like captures they are written by
strangers: a file that breaks the rules raises BadSegment, a single row is returned with its reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.captures import LABELS, TEXT, TIME, read_columns
from pipeline.data.parquet.rows import LATEST, BadRow, fault, printable, printable_text
from pipeline.data.parquet.untrusted import Limits
from pipeline.storage import write_atomic
from pipeline.types import Label

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pipeline.storage import Place

PREFIX = "labels"  # of a file's name
KINDS = ("commissioning", "red-team", "incident", "correction")
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("label", pa.string()),
        pa.field("instrument", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("who", pa.string()),
        pa.field("labelled_at", pa.timestamp("us", tz="UTC")),
    ]
)
COLUMNS = {**dict.fromkeys(SCHEMA.names[:-1], TEXT), "labelled_at": TIME}
LIMITS = Limits(COLUMNS, 100_000, 64 * 2**20)


class Presentation(NamedTuple):
    """One row of a label file."""

    row: int  # position in the file
    sample_id: str
    label: Label
    instrument: str  # PAI species; "bona_fide" for bona fide
    kind: str  # one of KINDS
    who: str
    labelled_at: int  # microseconds since 1970, UTC


class LabelFile(NamedTuple):
    """A label file whose rows were judged."""

    good: list[Presentation]
    bad: list[BadRow]
    rows: int
    sha256: str


def read_label_file(path: Place, *, site: str) -> LabelFile:
    """Reads a label file and judges every row.

    Raises BadSegment, FileNotFoundError where nothing is, and StoreUnavailable.
    """
    columns, sha256 = read_columns(path, LIMITS, site=site)
    found = LabelFile([], [], len(columns[0]), sha256)
    for row in _judged(columns):
        if isinstance(row, BadRow):
            found.bad.append(row)
        else:
            found.good.append(row)
    return found


def write_label_file(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes ``rows``, as SCHEMA names them, so that readers see all of the file or nothing."""
    table = pa.Table.from_pylist(list(rows), SCHEMA)
    write_atomic(path, lambda tmp: pq.write_table(table, tmp, compression="zstd", write_page_checksum=True))


def _judged(columns: list[list[object]]) -> Iterator[Presentation | BadRow]:
    seen: dict[str, int] = {}
    for row, (sample_raw, label, instrument_raw, kind_raw, who_raw, at) in enumerate(zip(*columns)):
        sample, instrument = printable_text(sample_raw), printable_text(instrument_raw)
        if sample is None:
            yield BadRow(row, None, f"sample_id: {fault(sample_raw)}")
        elif sample in seen:
            yield BadRow(row, sample, f"sample_id: already in row {seen[sample]}")
        elif (word := printable_text(label)) not in LABELS:
            yield BadRow(row, sample, f"label {printable(label)}, allowed bona_fide or attack")
        elif (kind := printable_text(kind_raw)) not in KINDS:
            yield BadRow(row, sample, f"kind {printable(kind_raw)}, allowed {', '.join(KINDS)}")
        elif (who := printable_text(who_raw)) is None:
            yield BadRow(row, sample, "who: nobody vouches for this label")
        elif not isinstance(at, int) or not 0 <= at < LATEST:
            yield BadRow(row, sample, "labelled_at: no time between 1970 and 2100")
        elif LABELS[word] == Label.BONA_FIDE and instrument not in (None, "bona_fide"):
            yield BadRow(row, sample, f"instrument {printable(instrument_raw)} of a bona fide presentation")
        elif LABELS[word] == Label.ATTACK and instrument in (None, "bona_fide"):
            yield BadRow(row, sample, "instrument: missing; an attack names its instrument, or unknown")
        else:
            seen[sample] = row
            yield Presentation(row, sample, LABELS[word], instrument or "bona_fide", kind, who, at)
