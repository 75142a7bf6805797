"""Segments of strangers: files are refused or rows quarantined, and nothing in a file runs or explodes."""

from __future__ import annotations

import base64
import os
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import DataConfig
from pipeline.data.captures import (
    SCHEMA,
    BadSegment,
    check_segment,
    list_segments,
    read_labels,
    read_segment,
    write_segment,
)
from pipeline.data.parquet import untrusted

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = DataConfig(max_rows=50, max_bytes=2**20)
NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
JPEG = cv2.imencode(".jpg", np.full((16, 16, 3), 90, np.uint8))[1].tobytes()


def row(k: int, **change: object) -> dict[str, object]:
    plain = {
        "sample_id": f"s{k}",
        "site_id": "gate",
        "captured_at": NOON + timedelta(seconds=k),
        "session_id": f"v{k}",
    }
    return {**plain, "rgb": JPEG, "depth": None, "ir": JPEG, **change}


def table(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "captures" / "gate").mkdir(parents=True)
    return tmp_path / "captures" / "gate" / "segment-0000.parquet"


def check(path: Path) -> int:
    return check_segment(path, site="gate", limits=LIMITS)


def read(path: Path) -> tuple[list, list]:
    return read_segment(path, site="gate", limits=LIMITS)[:2]


def test_a_segment_round_trips(path: Path) -> None:
    write_segment(path, table(row(0), row(1, session_id=None, depth=b"png")))
    assert check(path) == 2
    good, bad = read(path)
    assert bad == []
    assert [g["sample_id"] for g in good] == ["s0", "s1"]
    assert [g["row"] for g in good] == [0, 1]
    assert good[0]["captured_at"] == int(NOON.timestamp()) * 10**6
    assert (good[0]["rgb"], good[0]["depth"], good[1]["depth"]) == (JPEG, None, b"png")
    assert good[1]["session_id"] == ""


def test_writing_leaves_no_half_and_replaces_nothing(path: Path) -> None:
    write_segment(path, table(row(0)))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(BadSegment, match="exists"):
        write_segment(path, table(row(1)))
    with pytest.raises(BadSegment, match="schema"):
        write_segment(path.with_name("segment-0001.parquet"), table(row(0)).drop_columns(["ir"]))


def test_no_image_bytes_in_the_footer(path: Path) -> None:
    write_segment(path, table(row(0)))
    data = path.read_bytes()
    assert JPEG[2:40] not in data[-int.from_bytes(data[-8:-4], "little") - 8 :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"site_id": "other"}, "site_id: 'other', expected 'gate'"),
        ({"site_id": None}, "site_id"),
        ({"sample_id": None}, "sample_id: null"),
        ({"sample_id": ""}, "sample_id: not 1-200 printable"),
        ({"sample_id": "a\nb"}, "sample_id: not 1-200 printable"),
        ({"sample_id": "x" * 201}, "sample_id: not 1-200 printable"),
        ({"sample_id": "s0"}, "sample_id: already in row 0"),
        ({"captured_at": None}, "captured_at: null"),
        ({"captured_at": datetime(1969, 1, 1, tzinfo=UTC)}, "captured_at: not between"),
        ({"session_id": "\x1b[2J"}, "session_id"),
        ({"rgb": None, "ir": None}, "no modality present"),
    ],
)
def test_a_bad_row_costs_one_row(path: Path, change: dict[str, object], reason: str) -> None:
    write_segment(path, table(row(0), row(1, **change), row(2)))
    good, bad = read(path)
    assert [g["row"] for g in good] == [0, 2]
    assert [b.row for b in bad] == [1]
    assert reason in bad[0].reason
    assert bad[0].reason.isprintable()


def test_text_that_is_not_utf8_costs_one_row(path: Path) -> None:
    broken = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    write_segment(path, table(row(0), row(1)).set_column(0, SCHEMA.field(0), broken))
    good, bad = read(path)
    assert [g["sample_id"] for g in good] == ["ok"]
    assert bad[0].reason.startswith("sample_id")


def test_an_empty_segment_is_no_fault(path: Path) -> None:
    write_segment(path, table())
    assert check(path) == 0
    assert read(path) == ([], [])


def test_a_pickle_in_an_image_column_is_only_bytes(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(path.parent / "owned"),)

    write_segment(path, table(row(0, rgb=pickle.dumps(Evil()))))
    good, _ = read(path)
    assert good[0]["rgb"] == pickle.dumps(Evil())
    assert not (path.parent / "owned").exists()


def replaced(name: str, array: pa.Array, field: pa.Field | None = None) -> pa.Table:
    base = table(row(0))
    return base.set_column(base.schema.get_field_index(name), field or pa.field(name, array.type), array)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda: table(row(0)).drop_columns(["ir"]), "has columns"),
        (lambda: table(row(0)).append_column("gender", pa.array(["f"])), "has columns"),
        (lambda: table(row(0)).append_column("rgb", pa.array([b"f"])), "has columns"),
        (
            lambda: replaced("rgb", pa.array(["text"])),
            "column rgb is BYTE_ARRAY/STRING, allowed BYTE_ARRAY/NONE",
        ),
        (lambda: replaced("sample_id", pa.array([7])), "column sample_id is INT64"),
        (lambda: replaced("captured_at", pa.array([NOON], pa.timestamp("ms", tz="UTC"))), "milliseconds"),
        (lambda: replaced("captured_at", pa.array([NOON], pa.timestamp("us"))), "no time zone"),
        (lambda: replaced("rgb", pa.array([[b"x"]])), "has columns"),
        (lambda: table(*(row(k) for k in range(51))), "claims 51 rows, allowed 50"),
        (lambda: table(*(row(k, rgb=os.urandom(60_000)) for k in range(20))), "bytes, allowed 1048576"),
    ],
)
def test_a_file_that_is_no_segment_is_refused(path: Path, given: Callable[[], pa.Table], reason: str) -> None:
    pq.write_table(given(), path)
    for judge in (check, read):
        with pytest.raises(BadSegment) as raised:
            judge(path)
        assert reason in str(raised.value)
        assert str(raised.value).startswith("gate/")
        assert "\n" not in str(raised.value)


def test_large_text_columns_are_the_same_on_disk(path: Path) -> None:
    pq.write_table(replaced("sample_id", pa.array(["s"], pa.large_string())), path)
    assert check(path) == 1
    assert len(read(path)[0]) == 1


class Spy(pa.ExtensionType):
    """Stands for any registered type whose deserialisation runs code, as tensor types in Ray did."""

    woken: list[bytes] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(pa.binary(), "test.spy")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"code"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Spy:
        cls.woken.append(serialized)
        return cls()


def test_an_extension_type_is_refused_without_waking_it(path: Path) -> None:
    pa.register_extension_type(Spy())
    try:
        array = pa.ExtensionArray.from_storage(Spy(), pa.array([JPEG]))
        pq.write_table(replaced("rgb", array), path)
        pq.read_schema(path)
        assert Spy.woken, "reading the schema with pyarrow does wake it"
        Spy.woken.clear()
        for judge in (check, read):
            with pytest.raises(BadSegment, match="extension type"):
                judge(path)
        assert not Spy.woken
    finally:
        pa.unregister_extension_type("test.spy")


def test_extension_metadata_of_a_plain_field_is_refused(path: Path) -> None:
    field = pa.field("rgb", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_tensor"})
    pq.write_table(replaced("rgb", pa.array([JPEG]), field), path)
    with pytest.raises(BadSegment, match="extension type"):
        check(path)
    schema = SCHEMA.with_metadata({"note": "ARROW:extension:name"})
    pq.write_table(table(row(0)).cast(schema), path)
    with pytest.raises(BadSegment, match="extension type"):
        check(path)


def test_arrow_metadata_that_is_no_base64_is_refused(path: Path) -> None:
    write_segment(path, table(row(0)))
    data = path.read_bytes()
    path.write_bytes(data.replace(base64.b64encode(b"\xff\xff\xff\xff")[:4], b"!!!!", 1))
    with pytest.raises(BadSegment):
        check(path)


def test_a_repeated_image_is_held_once(path: Path) -> None:
    """A dictionary lets 50 rows of half a megabyte fit into one; reading must not unfold it."""
    big = JPEG + bytes(500_000)
    pq.write_table(
        table(*(row(k, rgb=big) for k in range(50))), path, use_dictionary=["rgb"], compression="none"
    )
    before = pa.total_allocated_bytes()
    good, bad = read(path)
    assert not bad
    assert len({id(g["rgb"]) for g in good}) == 1
    assert pa.total_allocated_bytes() - before < 2**21


def test_packed_pages_that_unfold_beyond_the_limit_are_refused(path: Path) -> None:
    pq.write_table(
        table(*(row(k, rgb=bytes(100_000) + bytes([k])) for k in range(40))), path, compression="zstd"
    )
    assert path.stat().st_size < 2**17
    for judge in (check, read):
        with pytest.raises(BadSegment, match="unpacks to"):
            judge(path)


def test_pages_are_believed_over_the_footer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(
        table(*(row(k, rgb=bytes(100_000) + bytes([k])) for k in range(40))), path, compression="zstd"
    )
    judge = untrusted._parse_footer  # as if the footer had lied
    monkeypatch.setattr(
        untrusted,
        "_parse_footer",
        lambda data, limits, size: judge(data, limits._replace(max_bytes=2**40), size),
    )
    with pytest.raises(BadSegment, match="unpacks to more than 1048576 bytes"):
        read(path)


def test_delta_encodings_are_refused(path: Path) -> None:
    pq.write_table(
        table(row(0), row(1)), path, use_dictionary=False, column_encoding={"rgb": "DELTA_BYTE_ARRAY"}
    )
    with pytest.raises(BadSegment, match="encoding 7"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PAR1",
        b"PAR1PAR1PAR1",
        b"x" * 100,
        b"PAR1" + bytes(50) + b"\xff\xff\xff\x7fPAR1",
        b"PAR1" + bytes(50) + b"\x10\0\0\0PARE",
    ],
)
def test_files_that_are_no_parquet_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for judge in (check, read):
        with pytest.raises(BadSegment):
            judge(path)


def test_a_missing_file_is_no_bad_file(path: Path) -> None:
    """It may be there next time."""
    for judge in (check, read):
        with pytest.raises(FileNotFoundError):
            judge(path)
    with pytest.raises(BadSegment, match="cannot be read"):
        read_labels(path)


LAYOUTS: dict[str, tuple[dict[str, object], int]] = {  # how it is written, every how many-th bit is flipped
    "as write_segment does": ({"compression": "zstd", "use_dictionary": False, "write_statistics": False}, 7),
    "row groups": ({"compression": "zstd", "use_dictionary": False, "row_group_size": 3}, 61),
    "dictionaries": ({"compression": "snappy"}, 61),
    "as it is": ({"compression": "none", "use_dictionary": False}, 61),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_flipped_bit_changes_rows_unseen(path: Path, layout: str) -> None:
    """Columns of equal size, so that pages could stand for each other."""
    options, stride = LAYOUTS[layout]
    rows = [
        row(k, rgb=bytes([k]) * 40, depth=bytes([k + 9]) * 40, ir=None if k % 3 else b"z" * 5)
        for k in range(8)
    ]
    pq.write_table(table(*rows), path, write_page_checksum=True, **options)  # pyright: ignore
    before, data = read(path), path.read_bytes()
    lines = list[str]()
    for bit in range(0, 8 * len(data), stride):
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        try:
            assert read(path) == before, f"bit {bit}"
        except BadSegment as e:
            lines.append(str(e))
    assert lines
    assert not any("\n" in line for line in lines)


def test_a_required_column_is_refused_since_one_bit_makes_a_nullable_one_of_it(path: Path) -> None:
    field = SCHEMA.field("sample_id").with_nullable(False)
    pq.write_table(table(row(0)).cast(SCHEMA.set(0, field)), path)
    for judge in (check, read):
        with pytest.raises(BadSegment, match="column sample_id is required, allowed are nullable columns"):
            judge(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "segment-0.parquet"
    pq.write_table(table(*(row(k) for k in range(4))), path, row_group_size=2)
    return path.read_bytes()


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_any_damage_gives_rows_or_badsegment(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int, tail: bool
) -> None:
    data = bytearray(whole)
    for at, value in edits:
        footer = int.from_bytes(whole[-8:-4], "little") + 8
        data[-1 - at % footer if tail else at % len(data)] = value
    if not edits:
        data = data[: cut % len(data)]
    path = tmp_path_factory.getbasetemp() / "gate" / "segment-0.parquet"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    for judge in (check, read):
        try:
            judge(path)
        except BadSegment:
            continue


def test_sites_are_listed_in_stream_order_and_strays_reported(tmp_path: Path) -> None:
    for name in (
        "gate/segment-9.parquet",
        "gate/segment-10.parquet",
        "gate/.tmp-x",
        "site=kiosk/segment-0.parquet",
        "_sealed/gate-labels.parquet",
        "Bad Name/segment-0.parquet",
        "..x/segment-0.parquet",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "note.txt").write_text("")
    segments, rejected, _ = list_segments(tmp_path)
    assert {s: [p.name for p in paths] for s, paths in segments.items()} == {
        "gate": ["segment-9.parquet", "segment-10.parquet"],
        "kiosk": ["segment-0.parquet"],
    }
    assert len(rejected) == 2
    assert any("Bad Name" in line for line in rejected)
    assert any("note.txt" in line for line in rejected)


def test_two_folders_of_one_site_are_one_stream(tmp_path: Path) -> None:
    for name in ("gate/segment-0.parquet", "site=gate/segment-1.parquet", "site=gate/segment-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    segments, rejected, _ = list_segments(tmp_path)
    assert [p.name for p in segments["gate"]] == ["segment-0.parquet", "segment-1.parquet"]
    assert len(rejected) == 1


def test_links_out_of_the_captures_folder_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    write_segment(outside / "segment-0000.parquet", table(row(0)))
    captures = tmp_path / "captures"
    (captures / "gate").mkdir(parents=True)
    (captures / "linked").symlink_to(outside)
    link = captures / "gate" / "segment-0000.parquet"
    link.symlink_to(outside / "segment-0000.parquet")
    segments, rejected, _ = list_segments(captures)
    assert segments == {"gate": []}
    assert len(rejected) == 2
    for judge in (check, read):
        with pytest.raises(BadSegment, match="link out of"):
            judge(link)


def test_a_missing_captures_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadSegment, match="no such folder"):
        list_segments(tmp_path / "nowhere")


def labels(path: Path, *rows: tuple[str | None, str | None, str | None]) -> Path:
    columns = zip(*rows)
    pq.write_table(
        pa.table([pa.array(c, pa.string()) for c in columns], names=["sample_id", "label", "pai"]), path
    )
    return path


def test_labels_are_read_by_sample(tmp_path: Path) -> None:
    path = labels(
        tmp_path / "x-labels.parquet",
        ("a", "bona_fide", None),
        ("b", "attack", "print"),
        ("c", "attack", None),
    )
    assert read_labels(path) == {"a": (1, "bona_fide"), "b": (0, "print"), "c": (0, "unknown")}


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (("b", "spoof", "x"), "'spoof', allowed"),
        (("a", "attack", "x"), "repeated"),
        ((None, "attack", "x"), "missing"),
    ],
)
def test_doubtful_labels_are_refused(
    tmp_path: Path, second: tuple[str | None, str, str], reason: str
) -> None:
    path = labels(tmp_path / "x-labels.parquet", ("a", "attack", "print"), second)
    with pytest.raises(BadSegment, match=f"row 1: .*{reason}"):
        read_labels(path)


def test_the_reference_streams_pass(padbench: Path) -> None:
    segments, rejected, _ = list_segments(padbench / "streams")
    assert len(segments) == 7
    assert not rejected
    for site, paths in segments.items():
        known = read_labels(padbench / "streams" / "_sealed" / f"{site}-labels.parquet")
        total = 0
        for path in paths:
            total += check_segment(path, site=site, limits=DataConfig())
        good, bad, _ = read_segment(paths[0], site=site, limits=DataConfig())
        assert not bad
        assert {g["sample_id"] for g in good} <= known.keys()
        assert total == len(known)
