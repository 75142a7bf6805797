"""Images are judged by their headers, and whatever the bytes are, only BadImage comes out."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import decode as module
from pipeline.data.decode import BadImage, decode, frame_from_arrays, read_pixels

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 24


def noise(*shape: int, dtype: type = np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(1, high, shape).astype(dtype)


def encoded(array: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, array)[1].tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return module.PNG_MAGIC + header + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


JPEG = encoded(noise(40, 30, 3), ".jpg")
PNG16 = encoded(noise(40, 30, dtype=np.uint16, high=60_000), ".png")
GREY = encoded(noise(40, 30), ".jpg")


def jpeg_claiming(width: int, height: int) -> bytes:
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def test_a_capture_becomes_one_aligned_frame() -> None:
    frame, present = decode(JPEG, PNG16, GREY, size=SIZE)
    assert frame.shape == (5, SIZE, SIZE)
    assert frame.dtype == np.uint8
    assert present == 0b111
    assert frame.reshape(5, -1).max(axis=1).min() > 100


@pytest.mark.parametrize("mask", range(1, 8))
def test_absent_modalities_are_zero_and_marked(mask: int) -> None:
    images = [image if mask >> m & 1 else None for m, image in enumerate((JPEG, PNG16, GREY))]
    frame, present = decode(*images, size=SIZE)
    assert present == mask
    lit = [frame[:3].any(), frame[3].any(), frame[4].any()]
    assert lit == [bool(mask >> m & 1) for m in range(3)]


def test_no_modality_at_all_is_refused() -> None:
    with pytest.raises(BadImage, match="no modality present"):
        decode(None, None, None, size=SIZE)


def test_rgb_comes_out_as_rgb() -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 2] = 250  # OpenCV writes BGR
    frame, _ = decode(encoded(red, ".png"), None, None, size=16)
    assert frame[:3].mean(axis=(1, 2)).tolist() == [250, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"GIF89a" + bytes(50), "neither JPEG"),
        (JPEG[:-2], "JPEG is cut off"),
        (JPEG[: len(JPEG) // 2], "JPEG is cut off"),
        (JPEG[:15], "cut off"),
        (JPEG + PNG16, "bytes after the end of the JPEG"),
        (JPEG + JPEG, "bytes after the end of the JPEG"),
        (PNG16 + JPEG, "bytes after the end of the PNG"),
        (PNG16[:-5], "cut off"),
        (PNG16[:-40], "PNG is cut off"),
        (PNG16[:60] + b"\xff" + PNG16[61:], "PNG checksum differs"),
        (jpeg_claiming(12_000, 12_000), "header claims 12000x12000, allowed 4096"),
        (jpeg_claiming(4097, 8), "header claims 4097x8, allowed 4096"),
        (jpeg_claiming(0, 30), "header claims 0x30, allowed 4096"),
        (jpeg_claiming(4096, 4096), "expands"),
        (png(12_000, 12_000, b""), "header claims 12000x12000, allowed 4096"),
        (png(4096, 4096, bytes(4097 * 4096)), "expands"),
        (png(8, 8, bytes(40)), "pixels cannot be decoded"),
        (png(8, 8, bytes(72), bits=7), "PNG header is damaged"),
        (png(8, 8, bytes(72), extra=chunk(b"acTL", bytes(8))), "PNG is animated"),
        (png(8, 8, bytes(72), extra=chunk(b"IHDR", bytes(13))), "no single IHDR"),
        (b"\xff\xd8\xff\xe0" + b"\x00\x02" * 9 + b"\xff\xd9", "JPEG is damaged"),
        (b"\xff\xd8\xff\xda\x00\x02\xff\xd9", "no frame header"),
        (JPEG.replace(b"\xff\xc0", b"\xff\xc3"), "JPEG coding 3"),
    ],
)
def test_hostile_images_are_refused_with_the_modality(data: bytes, reason: str) -> None:
    for images, name in (
        ((data, None, None), "rgb"),
        ((None, data, None), "depth"),
        ((None, None, data), "ir"),
    ):
        with pytest.raises(BadImage) as raised:
            decode(*images, size=SIZE)
        assert str(raised.value).startswith(f"{name}: ")
        assert reason in str(raised.value)
        assert "\n" not in str(raised.value)


def test_bombs_are_refused_before_opencv_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded a bomb"))
    for bomb in (png(12_000, 12_000, b""), png(4096, 4096, bytes(2**16)), jpeg_claiming(60_000, 60_000)):
        with pytest.raises(BadImage):
            read_pixels(bomb, "depth")


def test_plain_variants_are_accepted() -> None:
    assert read_pixels(JPEG + bytes(16), "rgb").shape == (40, 30, 3)  # zero padding
    progressive = cv2.imencode(".jpg", noise(40, 30, 3), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert read_pixels(progressive, "rgb").shape == (40, 30, 3)
    assert read_pixels(GREY, "rgb").shape == (40, 30, 3)
    assert read_pixels(JPEG, "ir").shape == (40, 30)
    assert read_pixels(PNG16, "depth").dtype == np.uint16
    text = chunk(b"tEXt", b"Comment\0by a camera")
    assert read_pixels(png(8, 8, bytes(72), extra=text), "ir").shape == (8, 8)
    dark = encoded(np.zeros((720, 1280), np.uint16), ".png")
    assert read_pixels(dark, "depth").shape == (720, 1280)  # a covered sensor is no bomb


def test_exif_orientation_does_not_turn_one_modality_against_the_others() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    turned = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + JPEG[2:]
    assert np.array_equal(read_pixels(turned, "rgb"), read_pixels(JPEG, "rgb"))


@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=200).map(lambda b: b"\xff\xd8\xff" + b),
        st.binary(max_size=200).map(lambda b: module.PNG_MAGIC + b),
        st.binary(max_size=200).map(lambda b: b"P5" + b),
        st.tuples(
            st.sampled_from([JPEG, PNG16, GREY]),
            st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
        ).map(lambda t: mutated(*t)),
        st.tuples(st.sampled_from([JPEG, PNG16]), st.integers(0, 5000)).map(lambda t: t[0][: t[1]]),
    )
)
def test_any_bytes_give_a_frame_or_badimage(data: bytes) -> None:
    for name in ("rgb", "depth"):
        with suppress(BadImage):
            pixels = read_pixels(data, name)
            assert max(pixels.shape) <= module.MAX_SIDE
            assert pixels.nbytes <= max(3 * module.HARMLESS_BYTES, 3 * module.MAX_EXPANSION * len(data))


def pgm(plane: np.ndarray, *, highest: int | None = None, apart: bytes = b"\n") -> bytes:
    """As cv2 and PIL write it: big-endian."""
    highest = highest or (255 if plane.dtype == np.uint8 else 65535)
    head = b"P5\n%d %d%b%d\n" % (plane.shape[1], plane.shape[0], apart, highest)
    return head + plane.astype(plane.dtype.newbyteorder(">")).tobytes()


@given(
    st.sampled_from([np.uint8, np.uint16]),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(1, 65535),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_a_pgm_is_the_frame_of_the_png(
    kind: type, shape: tuple[int, int], high: int, lit: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    plane = (
        (rng.integers(0, high + 1, shape) * (rng.random(shape) < lit))
        .clip(0, np.iinfo(kind).max)
        .astype(kind)
    )
    raw, packed = pgm(plane), encoded(plane, ".png")
    for name in ("depth", "ir"):
        pixels = read_pixels(raw, name)
        assert pixels.dtype == kind
        assert pixels.flags.c_contiguous and pixels.dtype.isnative
        assert np.array_equal(pixels, plane)
    assert np.array_equal(decode(None, raw, raw, size=SIZE)[0], decode(None, packed, packed, size=SIZE)[0])


def test_pgm_of_other_writers_is_read(tmp_path: Path) -> None:
    plane = noise(12, 8, dtype=np.uint16, high=4000)
    assert cv2.imwrite(str(tmp_path / "p.pgm"), plane)
    assert np.array_equal(read_pixels((tmp_path / "p.pgm").read_bytes(), "depth"), plane)
    assert np.array_equal(read_pixels(pgm(plane, highest=4095, apart=b" "), "depth"), plane)


PLANE = noise(8, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"P5", "PGM header is damaged"),
        (b"P5\n8 8\n255", "PGM header is damaged"),
        (b"P5\n# made by me\n8 8\n255\n" + bytes(64), "PGM header is damaged"),
        (b"P5\n8  8\n255\n" + bytes(64), "PGM header is damaged"),
        (b"P5\n-8 8\n255\n" + bytes(64), "PGM header is damaged"),
        (b"P5\n0 8\n255\n", "PGM header is damaged"),
        (b"P5\n8 8\n0\n" + bytes(64), "PGM header is damaged"),
        (b"P5\n888888 8\n255\n" + bytes(64), "PGM header is damaged"),
        (b"P5\n8 8\n70000\n" + bytes(128), "PGM of values up to 70000, allowed 65535"),
        (pgm(PLANE)[:-1], "PGM holds 63 bytes of pixels, its header claims 64"),
        (pgm(PLANE) + b"\0", "PGM holds 65 bytes of pixels, its header claims 64"),
        (pgm(PLANE, highest=256), "PGM holds 64 bytes of pixels, its header claims 128"),
        (b"P5\n4097 1\n255\n" + bytes(4097), "header claims 4097x1, allowed 4096"),
        (b"P2\n8 8\n255\n" + b"1 " * 64, "neither JPEG, PNG nor PGM"),
        (b"P6\n8 8\n255\n" + bytes(192), "neither JPEG, PNG nor PGM"),
    ],
)
def test_a_pgm_holds_exactly_what_it_claims(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as raised:
        read_pixels(data, "depth")
    assert str(raised.value) == f"depth: {reason}"


def mutated(data: bytes, edits: list[tuple[int, int]]) -> bytes:
    out = bytearray(data)
    for at, value in edits:
        out[at % len(out)] = value
    return bytes(out)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_claimed_dimensions_are_bounded_whatever_they_are(width: int, height: int) -> None:
    with pytest.raises(BadImage):
        read_pixels(png(width, height, bytes(8)), "depth")


def face(low: float, high: float) -> np.ndarray:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    relief = np.sqrt(np.clip(1 - x**2 - y**2, 0, None))
    return np.where(relief > 0, low + (high - low) * relief, 0)


def stretched(depth: np.ndarray) -> np.ndarray:
    return frame_from_arrays(None, depth, None, size=32)[0][3]


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(400, 460, np.uint16), (9000, 61_000, np.uint16), (60, 240, np.uint8), (0.2, 0.6, np.float32)],
)
def test_depth_of_any_encoding_looks_the_same(low: float, high: float, dtype: type) -> None:
    found = stretched(face(low, high).astype(dtype))
    wanted = stretched(face(20_000, 50_000).astype(np.uint16))
    assert (found == 0).sum() == (wanted == 0).sum()
    assert found.max() == 255
    assert np.abs(found.astype(int) - wanted).mean() < 3


def test_no_return_stays_zero_and_does_not_bleed() -> None:
    depth = np.full((96, 96), 500, np.uint16)
    depth[:, 48:] = np.arange(48, dtype=np.uint16) + 520
    depth[20:76, 20:40] = 0
    out = stretched(depth)
    assert (out[10:22, 9:12] == 0).all()
    assert set(np.unique(out[:, :7])) <= {1}  # the near plane keeps the bottom of the range up to the hole


def test_a_far_wall_does_not_flatten_the_face() -> None:
    depth = face(520, 460).astype(np.uint16)
    walled = np.where(np.random.default_rng(1).random(depth.shape) < 0.08, 2500, depth)
    inner = np.s_[12:20, 12:20]
    assert (
        np.ptp(stretched(walled.astype(np.uint16))[inner].astype(int))
        > np.ptp(stretched(depth)[inner].astype(int)) / 2
    )


def test_constant_and_empty_depth_are_frames_not_faults() -> None:
    assert set(np.unique(stretched(np.full((40, 40), 700, np.uint16)))) == {128}
    assert set(np.unique(stretched(np.zeros((40, 40), np.uint16)))) == {0}


def test_jpeg_ringing_around_no_return_is_no_return() -> None:
    depth = np.zeros((64, 64), np.uint8)
    depth[:, :8] = 5
    depth[16:48, 16:48] = 90
    assert (stretched(depth)[:, :4] == 0).all()


def test_ir_of_16_bits_is_scaled_unless_it_holds_8() -> None:
    deep = np.full((16, 16), 40_000, np.uint16)
    shallow = np.full((16, 16), 200, np.uint16)
    assert frame_from_arrays(None, None, deep, size=16)[0][4].max() == 40_000 // 256
    assert frame_from_arrays(None, None, shallow, size=16)[0][4].max() == 200


@pytest.mark.parametrize(
    "arrays",
    [
        (np.zeros((4, 4), np.uint8), None, None),
        (np.zeros((4, 4, 3), np.float32), None, None),
        (np.zeros((0, 4, 3), np.uint8), None, None),
        (None, np.full((4, 4), np.nan), None),
        (None, np.zeros((4, 4), np.int64), None),
        (None, None, np.full((4, 4), np.inf, np.float32)),
        (None, None, np.zeros((4, 4, 1), np.uint8)),
    ],
)
def test_arrays_of_a_wrong_kind_are_refused(arrays: tuple[np.ndarray | None, ...]) -> None:
    with pytest.raises(BadImage):
        frame_from_arrays(*arrays, size=8)


def test_every_capture_of_the_reference_streams_decodes(padbench: Path) -> None:
    for path in sorted((padbench / "streams").glob("[a-z]*/segment-0003.parquet")):
        for row in pq.read_table(path).slice(0, 20).to_pylist():
            frame, present = decode(row["rgb"], row["depth"], row["ir"], size=48)
            assert present == sum(1 << m for m, n in enumerate(("rgb", "depth", "ir")) if row[n] is not None)
            assert frame.any()
