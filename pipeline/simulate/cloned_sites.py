"""Gives many sites the captures of a few, for benchmarks of throughput.

A cycle has as much to do as with a real fleet of that size.

The images are rendered once and sent by every site, from another place in the pool and under ids of its own.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.captures import SCHEMA
from pipeline.data.features import FeatureBlock, pseudonym, write_features
from pipeline.simulate.site_script import demo_fleet
from pipeline.simulate.sites import simulate

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.storage import Place

IMAGES = ("rgb", "depth", "ir")
START = datetime(2026, 3, 2, tzinfo=UTC)
SESSION = 2  # captures of one person
SITES = (
    "lobby-north",
    "phone-onboarding",
)  # whose captures are in the pool: three modalities, and not always all


def pool(folder: Path) -> pa.Table:
    """Returns the images of two simulated sites' first day; renders them below ``folder`` the first time."""
    scripts = [replace(s, rate=6.0) for s in demo_fleet() if s.site in SITES]
    paths = [folder / "captures" / site for site in SITES]
    if not all(p.exists() for p in paths):
        simulate(folder, scripts, phase=1)
    parts = [
        pq.read_table(segment, columns=list(IMAGES))
        for p in paths
        for segment in sorted(p.glob("segment-*.parquet"))
    ]
    return pa.concat_tables(parts).combine_chunks()


def names(sites: int) -> list[str]:
    """Returns the ids of the cloned sites."""
    return [f"site-{k:06d}" for k in range(sites)]


def write_captures(root: Path, images: pa.Table, *, sites: int, captures: int) -> None:
    """Writes a segment of ``captures`` for each of ``sites``; not fsynced, since it holds no real data."""
    for k, site in enumerate(names(sites)):
        rows = (k * 7 + np.arange(captures)) % len(images)
        table = pa.table(
            {
                "sample_id": [f"{site}-{i:05d}" for i in range(captures)],
                "site_id": [site] * captures,
                "captured_at": [START + timedelta(seconds=i) for i in range(captures)],
                "session_id": [f"s{i // SESSION}" for i in range(captures)],
                **{name: images[name].take(pa.array(rows)) for name in IMAGES},
            },
            schema=SCHEMA,
        )
        path = root / site / "segment-0001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table, path, compression="zstd", compression_level=1, use_dictionary=False, write_statistics=False
        )


def store_features(root: Place, trunk: str, seen: FeatureBlock, *, sites: int, samples: int) -> None:
    """Stores for each of ``sites`` what ingest would have stored, from the features in ``seen``."""
    for k, site in enumerate(names(sites)):
        block = seen.rows((k * 7 + np.arange(samples)) % len(seen))
        ids = np.array([f"{site}-{i:05d}" for i in range(samples)], dtype=object)
        session = np.array([pseudonym(site, f"s{i // SESSION}") for i in range(samples)], np.int64)
        write_features(
            root, trunk, site, replace(block, offset=np.arange(samples), sample_id=ids, session=session)
        )
