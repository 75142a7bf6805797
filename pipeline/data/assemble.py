"""Gives the decoded and featurised samples of a site their offsets, in stream order, and stores them.

The last stage of ingest (``pipeline.data.featurise`` has the others). Segments are decoded in any order, by
any worker; a site is assembled when all of its segments are there, or as far as they are. An offset counts
every row of a segment that was not refused as a whole, so quarantined rows leave gaps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from pipeline.data.blobs import BadBlob
from pipeline.data.captures import BadRow
from pipeline.data.features import FeatureBlock, delete_range, read_features, write_features
from pipeline.data.featurise import add_features
from pipeline.data.segments import Head, Listed, decode_segments, segment_at

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pipeline.data import DataConfig
    from pipeline.data.featurise import Featurise
    from pipeline.data.segments import Columns
    from pipeline.models.manifest import Manifest
    from pipeline.storage import Place

REPEAT_REASON = "sample_id: already at offset"  # how the reason of such a row begins
REPEAT_WINDOW = (
    1000  # offsets before a segment among which its sample ids are looked for: what an uploader sends again
)


@dataclass(frozen=True)
class Backlog:
    """Lists new segments of one site in stream order."""

    site: str
    base_offset: int  # of the first row
    paths: tuple[str, ...]  # or URLs
    size: int  # bytes


class SegmentResult(TypedDict):
    """Reports one segment: ``refused`` is final, ``error`` is tried again."""

    site: str
    name: str
    base_offset: int
    rows: int
    sha256: str
    bad: list[BadRow]
    refused: str
    error: str


class Trunk(NamedTuple):
    """The address of a trunk's features."""

    digest: str
    features: int  # F

    @classmethod
    def of(cls, manifest: Manifest) -> Trunk:
        """Returns the address from a source model's manifest."""
        return cls(manifest.trunk_digest, manifest.config.trunk.features)


@dataclass
class Gathered:
    """What has arrived of one segment."""

    parts: list[Columns] = field(default_factory=list["Columns"])
    head: Head | None = None

    def add(self, columns: Columns) -> None:
        """Takes rows of this segment."""
        told = [text for text in columns["head"].tolist() if text]
        if told:
            self.head = Head(**json.loads(told[0]))
        shown = columns["present"] > 0
        self.parts.append({name: column[shown] for name, column in columns.items() if name != "head"})

    @property
    def complete(self) -> bool:
        """Whether the head and every decoded row are there."""
        if self.head is None:
            return False
        return bool(self.head.error) or sum(len(p["row"]) for p in self.parts) == self.head.decoded


def store_site(
    backlog: Backlog, gathered: Sequence[Gathered], trunks: Sequence[Trunk], features: Place
) -> list[SegmentResult]:
    """Stores a site's segments in order, up to the first that failed or has not arrived.

    A failure is reported in the result, so it stops no other site.
    """
    done: list[SegmentResult] = []
    site, base, earlier = backlog.site, backlog.base_offset, None
    for path, got in zip(map(segment_at, backlog.paths), gathered, strict=True):
        if not got.complete or got.head is None:
            break
        head = got.head
        result = SegmentResult(
            site=site,
            name=path.name,
            base_offset=base,
            rows=0,
            sha256=head.sha256,
            bad=[],
            refused=head.refused,
            error=head.error,
        )
        done.append(result)
        if head.error:
            break
        if head.refused:
            continue
        try:
            if earlier is None:
                earlier = recent_offsets(features, trunks[0], site, end=base) if base else {}
            bad = store_segment(site, base, got, earlier, trunks, features)
        except Exception as e:  # a site may fail, the fleet may not: the reason is kept and shown
            result["error"] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            break
        result.update(rows=head.rows, bad=bad)
        base += head.rows
    return done


def store_segment(
    site: str,
    base: int,
    got: Gathered,
    earlier: dict[str, int],
    trunks: Sequence[Trunk],
    features: Place,
    *,
    without: Collection[int] = (),
) -> list[BadRow]:
    """Stores a segment's features from offset ``base`` on, under every trunk, and returns its bad rows.

    ``earlier``: offsets by sample id of the site's samples before it; those of this segment come to it. Rows
    in ``without`` are left out.
    """
    assert got.head is not None
    oldest = max(0, base - REPEAT_WINDOW)
    repeats = {s: at for s, at in earlier.items() if at >= oldest}
    bad = [BadRow(*b) for b in got.head.bad]
    order = np.argsort(np.concatenate([p["row"] for p in got.parts]))  # a head came with a part
    columns = {n: np.concatenate([p[n] for p in got.parts])[order] for n in got.parts[0]}
    kept, worse = _kept(columns, repeats, without, len(trunks))
    bad += worse
    columns = {name: column[kept] for name, column in columns.items()}
    for k, trunk in enumerate(trunks):
        delete_range(features, trunk.digest, site, start=base, end=base + got.head.rows)
        if len(columns["row"]):
            write_features(features, trunk.digest, site, _block(columns, base, columns[f"z{k}"]))
    earlier.update(zip(columns["sample_id"].tolist(), (base + columns["row"].astype(np.int64)).tolist()))
    return sorted(bad, key=lambda b: b.row)


def gather_segment(site: str, path: str, limits: DataConfig, trunks: Sequence[Featurise]) -> Gathered:
    """Decodes and featurises one segment in this process."""
    gathered = Gathered()
    for columns in decode_segments([Listed(0, site, path)], limits):
        gathered.add(add_features(columns, trunks))
    return gathered


def recent_offsets(features: Place, trunk: Trunk, site: str, *, end: int) -> dict[str, int]:
    """Returns the offset by sample id of the stored samples in the REPEAT_WINDOW offsets before ``end``."""
    start = max(0, end - REPEAT_WINDOW)
    try:
        block = read_features(features, trunk.digest, site, start=start, end=end, features=trunk.features)
    except BadBlob:
        return {}  # adaptation names the file; what is new need not wait for its repair
    return dict(zip(block.sample_id.tolist(), block.offset.tolist()))


def _kept(
    columns: Columns, repeats: Mapping[str, int], without: Collection[int], trunks: int
) -> tuple[np.ndarray, list[BadRow]]:
    """Returns which rows are stored [N], and why the others are not."""
    fine = np.logical_and.reduce([np.isfinite(columns[f"z{k}"]).all(axis=(1, 2)) for k in range(trunks)])
    kept, bad = fine & ~np.isin(columns["row"], list(without)), list[BadRow]()
    for i, (row, sample) in enumerate(
        zip(columns["row"].tolist(), columns["sample_id"].tolist(), strict=True)
    ):
        if sample in repeats and row not in without:
            kept[i] = False
            bad.append(BadRow(row, sample, f"{REPEAT_REASON} {repeats[sample]} of the site"))
        elif not fine[i]:
            bad.append(BadRow(row, sample, "its features are not finite"))
    return kept, bad


def _block(columns: Columns, base: int, z: np.ndarray) -> FeatureBlock:
    return FeatureBlock(
        offset=base + columns["row"].astype(np.int64),
        sample_id=columns["sample_id"].astype(object),
        captured_at=columns["captured_at"].astype("datetime64[us]"),
        session=columns["session"].astype(np.int64),
        present=columns["present"].astype(np.uint8),
        z=z,
    )
