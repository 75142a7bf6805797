"""A site's stream is the same however its segments were cut and in whatever order their rows arrived."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.assemble import REPEAT_REASON, Backlog, Gathered, Trunk, store_site
from pipeline.data.features import read_features
from pipeline.data.segments import Head

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.data.assemble import SegmentResult
    from pipeline.data.segments import Columns

TRUNK = Trunk("t" * 64, 4)
FIELDS = ("row", "captured_at", "session")


def columns(rows: list[int], ids: list[str], head: Head | None) -> Columns:
    count = len(rows)
    told = [""] * count
    if head:
        told[-1] = json.dumps(asdict(head))
    z = np.array(rows, np.float16)[:, None, None] * np.ones((count, 3, 4), np.float16)
    whole = {name: np.array(rows, np.int64) for name in FIELDS}
    present = np.full(count, 7, np.uint8)
    return whole | {
        "sample_id": np.array(ids, object),
        "head": np.array(told, object),
        "present": present,
        "z0": z,
    }


def gathered(rows: int, ids: list[str], *, bad: int = 0, cuts: tuple[int, ...] = ()) -> Gathered:
    """A segment of ``rows`` rows, the last ``bad`` of them refused; its parts arrive cut and turned round."""
    good = list(range(rows - bad))
    reasons = [(r, None, "broken") for r in range(rows - bad, rows)]
    told = Head(rows, len(good), f"sha{ids[:1]}{rows}", reasons)
    got = Gathered()
    bounds = sorted({0, len(good), *(c for c in cuts if c < len(good))})
    pieces = list(pairwise(bounds))
    for at, (begin, end) in enumerate(reversed(pieces)):
        got.add(columns(good[begin:end], ids[begin:end], told if at == len(pieces) - 1 else None))
    if not good:
        empty = columns([0], [""], told)
        got.add(empty | {"present": np.zeros(1, np.uint8)})
    return got


def stored(root: Path, segments: list[Gathered], base: int = 0) -> tuple[list[SegmentResult], dict[str, int]]:
    backlog = Backlog("gate", base, tuple(f"/c/gate/segment-{k}.parquet" for k in range(len(segments))), 1)
    done = store_site(backlog, segments, [TRUNK], root)
    end = max([d["base_offset"] + d["rows"] for d in done], default=0)
    block = read_features(root, TRUNK.digest, "gate", start=0, end=end, features=TRUNK.features)
    return done, dict(zip(block.sample_id.tolist(), block.offset.tolist()))


sizes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=sizes)
def test_offsets_follow_the_stream_however_rows_arrive(
    tmp_path_factory: pytest.TempPathFactory, sizes
) -> None:
    segments, expected, base = list[Gathered](), dict[str, int](), 0
    for k, (rows, bad, cut) in enumerate(sizes):
        bad = min(bad, rows)
        ids = [f"{k}-{r}" for r in range(rows)]
        segments.append(gathered(rows, ids, bad=bad, cuts=(cut,)))
        expected |= {i: base + r for r, i in enumerate(ids[: rows - bad])}
        base += rows
    done, offsets = stored(tmp_path_factory.mktemp("features"), segments)
    assert offsets == expected
    assert [len(d["bad"]) for d in done] == [min(bad, rows) for rows, bad, _ in sizes]
    assert [d["rows"] for d in done] == [rows for rows, _, _ in sizes]


def test_a_segment_that_has_not_arrived_holds_those_after_it(tmp_path: Path) -> None:
    lost = gathered(3, ["b", "c", "d"], cuts=(1,))
    lost.parts.pop()
    done, offsets = stored(tmp_path, [gathered(1, ["a"]), lost, gathered(1, ["e"])])
    assert [d["name"] for d in done] == ["segment-0.parquet"]
    assert offsets == {"a": 0}


def test_a_refused_segment_takes_no_offsets_and_an_error_ends_the_round(tmp_path: Path) -> None:
    refused, broken = Gathered(), Gathered()
    for got, head in ((refused, Head(sha256="x", refused="rubbish")), (broken, Head(error="disk"))):
        got.add(columns([0], [""], head) | {"present": np.zeros(1, np.uint8)})
    done, offsets = stored(tmp_path, [refused, gathered(2, ["a", "b"]), broken, gathered(1, ["c"])])
    assert [(d["base_offset"], d["rows"], d["refused"], d["error"]) for d in done] == [
        (0, 0, "rubbish", ""),
        (0, 2, "", ""),
        (2, 0, "", "disk"),
    ]
    assert offsets == {"a": 0, "b": 1}


def test_a_repeat_is_refused_by_the_offset_of_the_first_one(tmp_path: Path) -> None:
    done, offsets = stored(tmp_path, [gathered(2, ["a", "b"]), gathered(3, ["c", "a", "d"])])
    assert offsets == {"a": 0, "b": 1, "c": 2, "d": 4}
    assert [tuple(b) for b in done[1]["bad"]] == [(1, "a", f"{REPEAT_REASON} 0 of the site")]
