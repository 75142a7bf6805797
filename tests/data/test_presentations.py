"""Label files of strangers: every row counts or is refused with its reason, and a bad file says why."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.captures import BadSegment, list_segments
from pipeline.data.presentations import KINDS, PREFIX, SCHEMA, read_label_file, write_label_file

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


def row(k: int, **change: object) -> dict[str, object]:
    plain = {"sample_id": f"s{k}", "label": "attack", "instrument": "print", "kind": "red-team", "who": "ann"}
    return {**plain, "labelled_at": NOON, **change}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "gate").mkdir()
    return tmp_path / "gate" / "labels-0001.parquet"


def test_what_is_written_is_read(path: Path) -> None:
    write_label_file(path, [row(1), row(2, label="bona_fide", instrument=None, kind="commissioning")])
    read = read_label_file(path, site="gate")
    assert [(p.sample_id, int(p.label), p.instrument, p.kind, p.who) for p in read.good] == [
        ("s1", 0, "print", "red-team", "ann"),
        ("s2", 1, "bona_fide", "commissioning", "ann"),
    ]
    assert (read.rows, read.bad) == (2, [])
    assert read.good[0].labelled_at == NOON.timestamp() * 1e6
    assert list_segments(path.parent.parent, prefix=PREFIX).segments == {"gate": [path]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sample_id": None}, "sample_id"),
        ({"sample_id": "s0"}, "already in row 0"),
        ({"label": "genuine"}, "allowed bona_fide or attack"),
        ({"label": None}, "allowed bona_fide or attack"),
        ({"kind": "rumour"}, "allowed commissioning, red-team, incident, correction"),
        ({"who": ""}, "nobody vouches"),
        ({"who": "an\nn"}, "nobody vouches"),
        ({"labelled_at": None}, "labelled_at"),
        ({"label": "bona_fide"}, "of a bona fide presentation"),
        ({"instrument": None}, "an attack names its instrument"),
        ({"instrument": "bona_fide"}, "an attack names its instrument"),
    ],
)
def test_a_bad_row_costs_itself_alone(path: Path, change: dict[str, object], reason: str) -> None:
    write_label_file(path, [row(0), row(1, **change), row(2)])
    read = read_label_file(path, site="gate")
    assert [p.sample_id for p in read.good] == ["s0", "s2"]
    ((at, _, why),) = read.bad
    assert at == 1 and reason in why


words = st.one_of(st.none(), st.sampled_from(["a", "attack", "bona_fide", *KINDS]), st.text(max_size=5))


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(SCHEMA.names[:-1], words)), max_size=8))
def test_every_row_counts_or_has_a_reason(tmp_path_factory, rows: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("labels") / "labels-1.parquet"
    rows = [
        {n: v.encode("utf-8", "ignore").decode() if isinstance(v, str) else v for n, v in r.items()}
        for r in rows
    ]
    write_label_file(path, [{**r, "labelled_at": NOON} for r in rows])
    read = read_label_file(path, site="gate")
    assert sorted([p.row for p in read.good] + [b.row for b in read.bad]) == list(range(len(rows)))
    assert len({p.sample_id for p in read.good}) == len(read.good)
    assert all(b.reason.isprintable() for b in read.bad)


def test_a_file_of_another_shape_is_refused_with_its_name(path: Path) -> None:
    pq.write_table(pa.table({"sample_id": ["a"], "label": ["attack"]}), path)
    with pytest.raises(BadSegment, match=r"gate/labels-0001\.parquet: has columns sample_id, label; allowed"):
        read_label_file(path, site="gate")
    path.write_bytes(b"PAR1")
    with pytest.raises(BadSegment, match="is no Parquet file"):
        read_label_file(path, site="gate")
