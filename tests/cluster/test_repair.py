"""Damaged and missing features are made again from their captures, or their samples are given up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.ingest import LOST, _not_learned, stretch
from pipeline.cluster.repair import Repaired, repair_site
from pipeline.cluster.trunks import task_trunk
from pipeline.control.deployment import now
from pipeline.data.featurise import compute_features
from pipeline.data.segments import CHUNK
from pipeline.storage import StoreUnavailable
from tests.support.captures import Fleet, save_model, segment


def mended(fleet: Fleet) -> Repaired:
    """What the next ingest does for a site that adaptation could not read."""
    needed = _not_learned(fleet.ledger, fleet.ledger.streams.site("gate"))
    return repair_site(
        stretch(fleet.ledger, "gate", needed, fleet.find()),
        fleet.config.data,
        str(fleet.config.place("models", "m")),
        fleet.config.place("features"),
    )


def test_damaged_and_missing_features_are_made_again_to_the_last_bit(fleet: Fleet) -> None:
    """Also beside rows that were refused, for what they are and for being sent before."""
    segment(fleet.captures / "gate/segment-0.parquet", *(f"a{k}" for k in range(CHUNK)), "b", "b", "c")
    segment(fleet.captures / "gate/segment-1.parquet", "c", "d")
    segment(fleet.captures / "gate/segment-2.parquet", "e", rgb=b"no image")
    segment(fleet.captures / "gate/segment-3.parquet", "f")
    fleet.round()
    paths = sorted(Path(str(fleet.config.place("features"))).rglob("*.parquet"))
    before = {p: p.read_bytes() for p in paths}
    assert [p.name for p in paths] == [
        f"{a:012d}-{b:012d}.parquet" for a, b in ((0, 259), (260, 261), (262, 263))
    ]
    assert mended(fleet) == Repaired("gate")
    spoiled = bytearray(before[paths[0]])
    spoiled[len(spoiled) // 2] ^= 1
    paths[0].write_bytes(spoiled)
    paths[1].unlink()
    paths[2].with_name("000000000000-000000000999.parquet").write_bytes(before[paths[2]])
    ledger = fleet.ledger.streams.segments("gate"), fleet.refused("gate"), fleet.ledger.streams.site("gate")
    assert mended(fleet).restored[:2] == ("segment-0.parquet", "segment-1.parquet")
    assert {p: p.read_bytes() for p in Path(str(fleet.config.place("features"))).rglob("*.parquet")} == before
    assert (
        fleet.ledger.streams.segments("gate"),
        fleet.refused("gate"),
        fleet.ledger.streams.site("gate"),
    ) == ledger
    assert mended(fleet) == Repaired("gate")


def test_features_whose_capture_is_gone_or_another_are_lost_and_the_site_goes_on(fleet: Fleet) -> None:
    gone = segment(fleet.captures / "gate/segment-0.parquet", "a", "a", "b")
    another = segment(fleet.captures / "gate/segment-1.parquet", "c")
    segment(fleet.captures / "gate/segment-2.parquet", "d")
    fleet.round()
    for path in Path(str(fleet.config.place("features"))).rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-1])
    gone.unlink()
    another.unlink()
    segment(another, "never ingested")
    told = mended(fleet)
    assert told == Repaired("gate", ("segment-2.parquet",), ("segment-0.parquet", "segment-1.parquet"))
    assert fleet.ledger.streams.pending(["gate"])["gate"][0] == 4
    cycle = fleet.begin()
    for _ in range(2):  # a second time changes nothing
        fleet.ledger.streams.quarantine_lost(
            cycle, [("gate", name) for name in told.lost], reason=LOST, now=now()
        )
    assert fleet.ledger.streams.pending(["gate"])["gate"][0] == 1
    assert fleet.stored("gate") == {"d": 4}
    assert mended(fleet) == Repaired("gate")
    assert sorted(fleet.refused("gate")) == [
        ("segment-0.parquet", 0, LOST),
        ("segment-0.parquet", 1, "sample_id: already in row 0"),
        ("segment-0.parquet", 2, LOST),
        ("segment-1.parquet", 0, LOST),
    ]
    counts = [(s.rows, s.good, s.quarantined) for s, _ in fleet.ledger.streams.segments("gate")]
    assert counts == [(3, 0, 3), (1, 0, 1), (1, 1, 0)]
    assert [
        (p["segment"], p["samples"], p["offsets"])
        for _, _, kind, p in fleet.ledger.audit.rows()
        if kind == LOST
    ] == [("segment-0.parquet", 2, [0, 3]), ("segment-1.parquet", 1, [3, 4])]
    assert fleet.ledger.audit.first_broken() is None


def test_a_store_that_is_away_loses_nothing(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    segment(fleet.captures / "gate/segment-0.parquet", "a")
    fleet.round()
    (path,) = Path(str(fleet.config.place("features"))).rglob("*.parquet")
    path.unlink()

    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("s3://captures: the store does not answer")

    monkeypatch.setattr("pipeline.data.segments.read_segment", away)
    told = mended(fleet)
    assert (told.restored, told.lost) == ((), ())
    assert told.error == "StoreUnavailable: s3://captures: the store does not answer"
    monkeypatch.undo()
    assert mended(fleet).restored == ("segment-0.parquet",)


def test_a_sample_that_one_trunk_can_make_nothing_of_counts_under_neither(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.models["n"] = save_model(fleet.config, "n", seed=1)
    segment(fleet.captures / "gate/segment-0.parquet", "a", "b")
    segment(fleet.captures / "gate/segment-1.parquet", rgb=b"no image")

    other = str(fleet.config.place("models", "n"))

    def overflown(trunk, frames, present):
        z = compute_features(trunk, frames, present)
        z[1:, 0, 0] = np.inf if trunk is task_trunk(other) else 1
        return z

    monkeypatch.setattr("pipeline.data.featurise.compute_features", overflown)
    fleet.round()
    monkeypatch.undo()
    assert fleet.refused("gate") == [("segment-0.parquet", 1, "its features are not finite")]
    assert fleet.stored("gate") == fleet.stored("gate", "n") == {"a": 0}
    for path in Path(str(fleet.config.place("features"))).rglob("*.parquet"):
        path.unlink()
    assert mended(fleet).restored == ("segment-0.parquet",)
    assert fleet.stored("gate") == {"a": 0}, "what was refused stays refused"
