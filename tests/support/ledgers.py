"""Builders of ledger rows: cycles, segments, candidates with a verdict that passes, holds or fails."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa

from pipeline.guards import Cell, Evidence, GuardsConfig
from pipeline.guards.verdict import assess
from pipeline.ledger import SegmentRow, ShardRow, WindowRecord
from pipeline.ledger.tables import facts
from pipeline.models import ModelConfig, checkpoint
from pipeline.models.manifest import Manifest

T0 = datetime(2026, 1, 1, tzinfo=UTC)
CELLS = tuple(
    Cell(pattern="all", species=s, n=600, errors=0, worse=0, better=0) for s in ("print", "bona_fide")
)
GOOD = Evidence(cells=CELLS, trust_ratio=0.01, margin_drop=0.0, stream_n=500, age_seconds=1.0, finite=True)
HELD = GOOD.model_copy(update={"stream_n": 1})
BAD = GOOD.model_copy(update={"trust_ratio": 0.5})


def execute(url: str, *statements: str) -> list[tuple[object, ...]]:
    """Past the ledger, each statement by itself → the rows of the last one."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect().execution_options(no_parameters=True) as c:  # a % is a %
            done = [c.exec_driver_sql(s) for s in statements][-1]
            return [tuple(r) for r in done] if done.returns_rows else []
    finally:
        engine.dispose()


def fix_split(ledger) -> bytes:
    """Gives a ledger without labels the same key in every run; returns it."""
    with ledger.labels.store.write() as c:
        c.execute(facts.insert(), {"key": "split_key", "value": "00" * 16})
    return bytes(16)


def begin(ledger, *, holder="a", now=T0, dead=lambda holder: False, fingerprint="f", kind="cycle"):
    return ledger.cycles.begin(kind, fingerprint, "{}", holder=holder, dead=dead, now=now)


def shard(
    site="s0",
    start=0,
    end=10,
    *,
    evidence=GOOD,
    blob="b" * 64,
    slot=0,
    outcomes="c" * 64,
    parent=None,
    first_row=0,
):
    """A state learned on the offsets from ``start`` to ``end``, judged under the default guards."""
    return ShardRow(
        site=site,
        offset_from=start,
        offset_to=end,
        source_version=1,
        method="danet",
        blob=blob,
        slot=slot,
        parent=parent,
        window=WindowRecord(
            samples=end - start, outcomes_blob=outcomes, row_start=first_row, row_end=first_row + end - start
        ),
        verdict=assess(GuardsConfig(), evidence),
        evidence=evidence,
    )


def segment(site="s0", name="segment-1.parquet", base=0, rows=10, *, good=None):
    """All rows but ``good`` of them were refused; one, unless said otherwise."""
    good = rows - 1 if good is None else good
    return SegmentRow(site, name, "d" * 64, rows, base, good, rows - good)


def register_source(ledger, path, *, now=T0) -> int:
    """Registers the checkpoint at ``path`` as the next source model and returns its version."""
    manifest = checkpoint.read_manifest(path)
    return ledger.sources.add(manifest, path=str(path), lineage="-", now=now)


def source_manifest(digest: str, *, trunk: str = "t" * 64, size: int = 112) -> Manifest:
    """The manifest of a source model that has no checkpoint."""
    return Manifest(
        config=ModelConfig(), size=size, threshold=0.5, method="erm", digest=digest, trunk_digest=trunk
    )
