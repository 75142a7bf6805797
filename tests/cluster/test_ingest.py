"""From segments to features: one order per site, exact counts, and nothing counts twice or is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.ingest import _delete_counted
from pipeline.cluster import ingest
from pipeline.cluster.ingest import collect
from pipeline.config import load
from pipeline.control.deployment import ingest_sources, now
from pipeline.data.assemble import Backlog, SegmentResult, store_segment
from pipeline.data.captures import read_segment
from pipeline.data.features import write_features
from pipeline.data.segments import CHUNK, Listed, decode_chunks
from tests.support.captures import SIZE, Fleet, hash_of, image, save_model, segment
from tests.support.ledgers import source_manifest


def test_a_site_has_one_order_and_a_late_segment_comes_last(fleet: Fleet) -> None:
    segment(fleet.captures / "gate/segment-10.parquet", "e", "f")
    segment(fleet.captures / "gate/segment-9.parquet", "c", "d")
    fleet.round()
    segment(fleet.captures / "gate/segment-2.parquet", "a", "b")
    fleet.round()
    assert fleet.stored("gate") == {"c": 0, "d": 1, "e": 2, "f": 3, "a": 4, "b": 5}
    assert [s.name for s, _ in fleet.ledger.streams.segments("gate")] == [
        f"segment-{k}.parquet" for k in (9, 10, 2)
    ]
    assert not fleet.find().new


def test_the_same_bytes_under_another_name_count_once(fleet: Fleet) -> None:
    first = segment(fleet.captures / "gate/segment-0.parquet", "a", "b")
    (fleet.captures / "gate/segment-1.parquet").write_bytes(first.read_bytes())  # in one round
    fleet.round()
    segment(fleet.captures / "gate/segment-2.parquet", "c")
    (fleet.captures / "gate/segment-3.parquet").write_bytes(first.read_bytes())  # and in a later one
    segment(fleet.captures / "gate/segment-4.parquet", "d")
    fleet.round()
    reason = "gate/{}: has the very bytes of segment-0.parquet"
    copies = ["segment-1.parquet", "segment-3.parquet"]
    assert fleet.refused("gate") == [(name, -1, reason.format(name)) for name in copies]
    assert fleet.stored("gate").keys() == {"a", "b", "c", "d"}
    assert sum(s.good for s, _ in fleet.ledger.streams.segments("gate")) == 4
    assert not fleet.find().new


def test_an_old_duplicate_leaves_no_features(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the offsets that sample ids are remembered for, only the digest tells."""
    first = segment(fleet.captures / "gate/segment-0.parquet", "a", "b")
    fleet.round()
    monkeypatch.setattr("pipeline.data.assemble.REPEAT_WINDOW", 0)
    (fleet.captures / "gate/segment-1.parquet").write_bytes(first.read_bytes())
    segment(fleet.captures / "gate/segment-2.parquet", "c")
    assert fleet.round().orphans == (("gate", 2, 4),)
    assert fleet.stored("gate") == {"a": 0, "b": 1, "c": 4}


def test_another_site_may_send_the_same_bytes_of_an_empty_segment(fleet: Fleet) -> None:
    for name in ("gate/segment-0.parquet", "gate/segment-1.parquet", "door/segment-0.parquet"):
        segment(fleet.captures / name)
    fleet.round()
    assert fleet.refused("gate") == fleet.refused("door") == []


def test_a_sample_that_is_sent_again_counts_once(fleet: Fleet) -> None:
    segment(fleet.captures / "gate/segment-0.parquet", "a", "b", "c")
    segment(fleet.captures / "gate/segment-1.parquet", "c", "d")  # overlaps in one round
    fleet.round()
    segment(fleet.captures / "gate/segment-2.parquet", "d", "e", "a")  # and in a later one
    result = fleet.round()
    assert fleet.refused("gate") == [
        ("segment-1.parquet", 0, "sample_id: already at offset 2 of the site"),
        ("segment-2.parquet", 0, "sample_id: already at offset 4 of the site"),
        ("segment-2.parquet", 2, "sample_id: already at offset 0 of the site"),
    ]
    assert fleet.stored("gate") == {"a": 0, "b": 1, "c": 2, "d": 4, "e": 6}
    assert [(s.rows, s.good, s.quarantined) for s in result.segments] == [(3, 1, 2)]


def test_a_sample_whose_first_copy_was_refused_may_come_again(fleet: Fleet) -> None:
    segment(fleet.captures / "gate/segment-0.parquet", "a", rgb=b"no image")
    segment(fleet.captures / "gate/segment-1.parquet", "a")
    fleet.round()
    assert fleet.refused("gate") == [("segment-0.parquet", 0, "rgb: neither JPEG nor PNG")]
    assert fleet.stored("gate") == {"a": 1}


def test_a_refused_file_that_was_mended_counts(fleet: Fleet) -> None:
    torn = fleet.captures / "gate/segment-1.parquet"
    whole = segment(torn, "b").read_bytes()
    torn.write_bytes(whole[:-9])
    segment(fleet.captures / "gate/segment-2.parquet", "c")
    fleet.round()
    assert fleet.stored("gate") == {"c": 0}
    assert not fleet.find().new, "the same bytes are not judged again"
    torn.write_bytes(b"still no Parquet file")
    fleet.round()
    assert not fleet.find().new
    torn.write_bytes(whole)
    fleet.round()
    assert fleet.stored("gate") == {"c": 0, "b": 1}
    assert (
        fleet.refused("gate") == [("segment-1.parquet", -1, "gate/segment-1.parquet: is no Parquet file")] * 2
    )
    assert not fleet.find().new


def test_a_file_that_only_its_pages_betray_is_refused_and_the_site_goes_on(fleet: Fleet) -> None:
    path = segment(fleet.captures / "gate/segment-0.parquet", "a")
    data = bytearray(path.read_bytes())
    at = data.index(image(hash_of("a"))[1:8])
    data[at] ^= 1
    path.write_bytes(data)
    segment(fleet.captures / "gate/segment-1.parquet", "b")
    result = fleet.round()
    assert not result.failed
    ((name, row, reason),) = fleet.refused("gate")
    assert (name, row) == ("segment-0.parquet", -1)
    assert "CRC" in reason
    assert fleet.stored("gate") == {"b": 0}


def test_a_segment_that_fails_lets_the_later_ones_of_its_site_wait(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site in ("door", "gate"):
        for k in range(3):
            segment(fleet.captures / f"{site}/segment-{k}.parquet", f"{site}{k}")

    def full(site, base, *rest):
        if (site, base) == ("gate", 1):
            raise OSError(28, "No space left on device")
        return store_segment(site, base, *rest)

    monkeypatch.setattr("pipeline.data.assemble.store_segment", full)
    result = fleet.round()
    assert result.failed == (("gate", "segment-1.parquet: OSError: [Errno 28] No space left on device"),)
    assert fleet.stored("gate") == {"gate0": 0}
    monkeypatch.undo()
    fleet.round()
    assert fleet.stored("gate") == {"gate0": 0, "gate1": 1, "gate2": 2}
    assert fleet.stored("door") == {"door0": 0, "door1": 1, "door2": 2}


def test_a_dead_worker_costs_its_sites_one_round() -> None:
    new = [
        Backlog("door", 0, ("/c/door/segment-0.parquet",), 9),
        Backlog("gate", 0, ("/c/gate/segment-0.parquet",), 9),
    ]
    done = SegmentResult(
        site="door", name="segment-0.parquet", base_offset=0, rows=1, sha256="d", bad=[], refused="", error=""
    )
    result = collect(new, [done], {})
    assert [s.site for s in result.segments] == ["door"]
    assert result.failed == (("gate", "segment-0.parquet: its worker died or was killed"),)


def test_a_bounded_round_serves_every_site_first(fleet: Fleet) -> None:
    for site, n in (("big", 4), ("small", 1)):
        for k in range(n):
            segment(fleet.captures / f"{site}/segment-{k}.parquet", f"{k}")
    taken = fleet.find(most=3).new
    assert {b.site: len(b.paths) for b in taken} == {"big": 2, "small": 1}
    assert [b.site for b in fleet.find(without={"big"}).new] == ["small"]
    while fleet.find().new:
        fleet.round(most=2)
    assert fleet.stored("big") == {str(k): k for k in range(4)}


def test_what_a_crash_left_of_frames_is_forgotten_later(fleet: Fleet) -> None:
    clean = segment(fleet.captures / "gate/segment-0.parquet", "a")
    doubtful = segment(fleet.captures / "gate/segment-1.parquet", "b", "b")
    changed = segment(fleet.captures / "gate/segment-2.parquet", "c")
    fleet.round()  # and the process ends before it removes what it ingested
    changed.unlink()
    segment(changed, "never ingested")
    new = segment(fleet.captures / "gate/segment-3.parquet", "d")
    _delete_counted(fleet.config, fleet.ledger, fleet.find())
    assert [p.exists() for p in (clean, doubtful, changed, new)] == [False, True, True, True]


def test_chunks_are_aligned_with_their_captures(fleet: Fleet) -> None:
    ids = [f"s{k}" for k in range(CHUNK + 3)]
    path = segment(fleet.captures / "gate/segment-0.parquet", *ids)
    good = read_segment(path, site="gate", limits=fleet.config.data).good
    good[1]["rgb"] = b"broken"
    parts = list(decode_chunks(good, SIZE))
    assert [len(p.pixels) for p in parts] == [CHUNK - 1, 3]
    assert [c["sample_id"] for p in parts for c in p.captures] == ["s0", *ids[2:]]
    again = next(decode_chunks([good[-1]], SIZE)).pixels[0]
    assert np.array_equal(parts[1].pixels[-1], again)
    assert [b.row for p in parts for b in p.bad] == [1]


def test_every_sample_goes_through_both_trunks_and_counts_when_both_have_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.models["n"] = save_model(fleet.config, "n", seed=1)
    segment(fleet.captures / "gate/segment-0.parquet", "a", "b", "b")
    segment(fleet.captures / "gate/segment-1.parquet", "c")
    torn = fleet.models["n"].manifest.trunk_digest

    def full(root, trunk, site, block):
        if trunk == torn and block.offset[0] == 3:
            raise OSError(28, "No space left on device")
        return write_features(root, trunk, site, block)

    monkeypatch.setattr("pipeline.data.assemble.write_features", full)
    assert fleet.round().failed == (
        ("gate", "segment-1.parquet: OSError: [Errno 28] No space left on device"),
    )
    assert fleet.stored("gate") == fleet.stored("gate", "n") == {"a": 0, "b": 1}
    monkeypatch.undo()
    fleet.round()
    assert fleet.stored("gate") == fleet.stored("gate", "n") == {"a": 0, "b": 1, "c": 3}
    each = [
        sorted(p.read_bytes() for p in (Path(str(fleet.config.place("features"))) / trunk).rglob("*.parquet"))
        for trunk in (m.manifest.trunk_digest[:16] for m in fleet.models.values())
    ]
    assert [len(e) for e in each] == [2, 2] and each[0] != each[1]


def test_who_featurises_is_the_champion_and_the_challenger(fleet: Fleet) -> None:
    config, ledger, path = fleet.config, fleet.ledger, str(fleet.config.place("models", "m"))
    for digest, trunk, size in (
        ("a", "t1", SIZE),
        ("b", "t2", SIZE),
        ("c", "t1", SIZE),
        ("d", "t3", 2 * SIZE),
    ):
        ledger.sources.add(source_manifest(digest, trunk=trunk, size=size), path=path, lineage="", now=now())
    named = {}
    for challenger in (None, 1, 2, 3):
        ledger.sources.set_challenger(challenger, now=now())
        named[challenger] = [s.version for s in ingest_sources(config, ledger)]
    assert named == {None: [1], 1: [1], 2: [1, 2], 3: [1]}, "a trunk that they share is asked once"
    ledger.sources.set_challenger(4, now=now())
    with pytest.raises(ValueError, match=f"^data.frame_px: {SIZE}, but source v4 was trained at {2 * SIZE}$"):
        ingest_sources(config, ledger)


def test_a_task_asks_for_its_share_of_a_gpu() -> None:
    """And only where one is configured; the trunk follows the share that Ray gives."""
    plain = load(None, ["cluster.cpus=4", "cluster.ingest_workers=2"]).cluster
    assert ingest.resources(plain) == (1, 0)
    shared = load(None, ["cluster.address=auto", "cluster.ingest_gpus=0.25"]).cluster
    assert ingest.resources(shared) == (1, 0.25)


@pytest.mark.parametrize("size", [1e4, 1e6, 3 * ingest.BLOCK_BYTES])
def test_hands_get_smaller_and_none_is_large(size: float) -> None:
    """The last ones let the workers end together; a segment is not divided."""
    listed = [Listed(n, "gate", f"/c/gate/{n}.parquet") for n in range(200)]
    hands = [json.loads(h["segments"]) for h in ingest._dealt(listed, [size] * len(listed), 2)]
    assert [n for hand in hands for n, _, _ in hand] == list(range(200))
    counts = [len(hand) for hand in hands]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1
    assert (counts[0] - 1) * size < ingest.BLOCK_BYTES
    assert counts[0] <= len(listed) / (ingest.HANDS * 2)


def test_rows_that_arrive_after_their_segment_failed_change_nothing(fleet: Fleet) -> None:
    for site, n in (("door", 1), ("gate", 2)):
        for k in range(n):
            segment(fleet.captures / f"{site}/segment-{k}.parquet", f"{k}-a", f"{k}-b")
    found = fleet.find()
    fleet.ledger.streams.register({s: {} for s in found.sites}, now=now())
    checkpoints = [str(fleet.config.place("models", "m"))]
    first, *others = ingest.featurised_here(fleet.config, found.new, checkpoints)
    broken = {name: column[:1].copy() for name, column in first.items()}
    broken["head"][0], broken["present"][0] = json.dumps({"error": "disk"}), 0
    done = ingest.assemble(fleet.config, found.new, [broken, first, *others, first], checkpoints)
    assert [(d["site"], d["name"], d["error"]) for d in done] == [
        ("door", "segment-0.parquet", "disk"),
        ("gate", "segment-0.parquet", ""),
        ("gate", "segment-1.parquet", ""),
    ]
    assert collect(found.new, done, {}).failed == (("door", "segment-0.parquet: disk"),)


@pytest.mark.cluster
def test_under_ray_the_fleet_is_the_same(fleet: Fleet, ray_local: None) -> None:
    for s in range(6):
        for k in range(2):
            segment(fleet.captures / f"site-{s}/segment-{k}.parquet", *(f"{k}-{n}" for n in range(5)))
    (fleet.captures / "site-3/segment-1.parquet").write_bytes(b"rubbish")
    found, steps = fleet.find(), []
    fleet.ledger.streams.register({s: {} for s in found.sites}, now=now())
    result = ingest.run(
        fleet.config,
        found.new,
        checkpoints=[str(fleet.config.place("models", "m"))],
        history=lambda _: {},
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert steps[0] == (0, 12)
    assert steps[-1] == (12, 12)
    assert not result.failed
    assert [(q.site, q.row) for q in result.quarantined] == [("site-3", -1)]
    fleet.ledger.streams.commit(fleet.begin(), result.segments, result.quarantined, now=now())
    assert {s.site: s.ingested_offset for s in fleet.ledger.streams.sites()} == {
        f"site-{s}": 5 if s == 3 else 10 for s in range(6)
    }
    alone = fleet.stored("site-5")
    assert alone == {f"{k}-{n}": 5 * k + n for k in range(2) for n in range(5)}
