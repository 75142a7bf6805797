"""Segments of captures, and a captures folder with the ledger that ingest fills from it, without Ray."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from pipeline.cluster import ingest
from pipeline.cluster.ingest import collect, find
from pipeline.config import Config
from pipeline.control.deployment import now
from pipeline.data.captures import SCHEMA, write_segment
from pipeline.data.features import read_features
from pipeline.ledger import Cycle, Ledger
from pipeline.models import checkpoint
from pipeline.storage import place
from tests.support.artifacts import source
from tests.support.ledgers import begin

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)

SIZE = 16


def image(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    return cv2.imencode(".png", noise)[1].tobytes()


def segment(path: Path, *ids: str, **change: object) -> Path:
    """Samples whose pixels depend on their id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "sample_id": i,
            "site_id": path.parent.name,
            "captured_at": NOON + timedelta(seconds=k),
            "session_id": "v",
            "rgb": image(hash_of(i)),
            "depth": None,
            "ir": None,
            **change,
        }
        for k, i in enumerate(ids)
    ]
    write_segment(path, pa.Table.from_pylist(rows, schema=SCHEMA))
    return path


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % 2**32


def save_model(config: Config, name: str, *, seed: int = 0) -> checkpoint.SourceModel:
    """Saves a source model that nobody trained under ``name``; every ``seed`` gives another trunk."""
    model = source(size=SIZE, seed=seed)
    checkpoint.save(config.place("models", name), model)
    return model


class Fleet:
    """A captures folder with a ledger and what ingest does to them, without Ray."""

    def __init__(self, config: Config, model: checkpoint.SourceModel) -> None:
        self.config, self.model, self.models = config, model, {"m": model}
        self.ledger = Ledger.open(config.ledger.url)
        self.captures = place(config.data.captures)

    def find(self, **bounds: object) -> ingest.IngestListing:
        offsets = {row.site: row.ingested_offset for row in self.ledger.streams.sites()}
        return find(
            self.config.data, self.ledger.streams.segment_names(), lambda s: offsets.get(s, 0), **bounds
        )  # pyright: ignore

    def round(self, **bounds: object) -> ingest.Ingested:
        found = self.find(**bounds)
        self.ledger.streams.register({s: {} for s in found.sites}, now=now())
        checkpoints = [str(self.config.place("models", m)) for m in self.models]
        batches = ingest.featurised_here(self.config, found.new, checkpoints)
        done = ingest.assemble(self.config, found.new, batches, checkpoints)
        history = {
            b.site: {s.sha256: s.name for s, _ in self.ledger.streams.segments(b.site) if s.rows}
            for b in found.new
        }
        result = collect(found.new, done, history)
        ingest.forget_orphans(self.config, [m.manifest.trunk_digest for m in self.models.values()], result)
        self.ledger.streams.commit(self.begin(), result.segments, result.quarantined, now=now())
        return result

    def begin(self) -> Cycle:
        return begin(self.ledger, kind="ingest", dead=lambda _: True, now=now())

    def stored(self, site: str, model: str = "m") -> dict[str, int]:
        """Offset by sample id of the features that can be read."""
        end, trunk = self.ledger.streams.site(site).ingested_offset, self.models[model].manifest.trunk_digest
        block = read_features(self.config.place("features"), trunk, site, start=0, end=end, features=8)
        return dict(zip(block.sample_id.tolist(), block.offset.tolist()))

    def refused(self, site: str) -> list[tuple[str, int, str]]:
        return [(q.segment, q.row, q.reason) for q in self.ledger.streams.quarantined(site)]
