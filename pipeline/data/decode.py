"""Decodes an encoded capture into an aligned frame, after its header was checked.

The header is judged before any pixel is decoded, because OpenCV would open a decompression bomb.

One frame is uint8 [5, H, W]: channels 0-2 RGB, 3 depth, 4 IR, zero where a modality is absent. Depth of any
encoding is stretched per frame to 1..255 with 0 = no return; its polarity is not known. EXIF orientation is
ignored: the modalities are aligned as stored.

Accepted are JPEG, PNG and, for depth and IR, binary Netpbm (PGM, 8 or 16 bits): raw planes that Parquet's own
compression packs. OpenCV brings libjpeg-turbo; processes that decode side by side call
``cv2.setNumThreads(1)``, or its threads fight.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING, Literal, NamedTuple

import cv2
import numpy as np

from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHANNELS = 5
MAX_SIDE = 4096
MAX_PIXELS = 16_800_000
MAX_BYTES = 8 * 2**20
MAX_EXPANSION = 200
HARMLESS_BYTES = (
    4 * 2**20
)  # decoded size below which expansion is harmless: a covered 720p sensor packs 1000 times
MAX_SCANS = 64  # cameras write about 10; each scan of a progressive JPEG costs a pass over all pixels
NO_RETURN_8BIT = 8  # 8-bit depth is mostly JPEG, whose ringing puts 1..8 around pixels without a return
CLIP_QUANTILES = (0.02, 0.98)  # share of returns below and above which depth is clipped
# Depth is clipped at this many median absolute deviations from the median, or a far wall would flatten the
# face.
CLIP_DEVIATIONS = 4.0

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_ANIMATION = frozenset((b"acTL", b"fcTL", b"fdAT"))
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
PGM_HEADER = re.compile(
    rb"P5[ \n]([1-9][0-9]{0,4})[ \n]([1-9][0-9]{0,4})[ \n]([1-9][0-9]{0,4})[ \n]"
)  # no comments
SOF_ALLOWED = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
SOF_ALL = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
AS_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
AS_GREY = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION

ModalityName = Literal["rgb", "depth", "ir"]


class BadImage(PalisadeError, ValueError):
    """A capture that is not decoded; the message is its quarantine reason and starts with the modality."""


class _Header(NamedTuple):
    width: int
    height: int
    bytes_per_pixel: int


def decode(
    rgb: bytes | None, depth: bytes | None, ir: bytes | None, *, size: int
) -> tuple[NDArray[np.uint8], int]:
    """Decodes one capture into (frame uint8 [5, size, size], present bit mask); raises BadImage.

    None stands for an absent modality.
    """
    return frame_from_arrays(
        None if rgb is None else read_pixels(rgb, "rgb"),
        None if depth is None else read_pixels(depth, "depth"),
        None if ir is None else read_pixels(ir, "ir"),
        size=size,
    )


def read_pixels(data: bytes, name: ModalityName) -> np.ndarray:
    """Returns the pixels of one JPEG, PNG or PGM: uint8 [H, W, 3] RGB, or uint8 / uint16 [H, W]."""
    header = _check_header(data, name)
    if data.startswith(b"P5"):
        kind = np.uint8 if header.bytes_per_pixel == 1 else np.dtype(">u2")
        plane = np.frombuffer(
            data, kind, offset=len(data) - header.width * header.height * header.bytes_per_pixel
        )
        return plane.reshape(header.height, header.width).astype(kind if kind is np.uint8 else np.uint16)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), AS_RGB if name == "rgb" else AS_GREY)
    except cv2.error:
        pixels = None
    if pixels is None or pixels.shape[:2] != (header.height, header.width):
        raise BadImage(f"{name}: pixels cannot be decoded")
    return pixels


def frame_from_arrays(
    rgb: NDArray[np.uint8] | None, depth: np.ndarray | None, ir: np.ndarray | None, *, size: int
) -> tuple[NDArray[np.uint8], int]:
    """Returns (frame, present bit mask) from decoded planes; raises BadImage.

    ``rgb`` is uint8 [H, W, 3]; ``depth`` (any unit) and ``ir`` ([0, 1] if float) are uint8, uint16 or float
    [H, W].
    """
    frame = np.zeros((CHANNELS, size, size), np.uint8)
    present = 0
    if rgb is not None:
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
            raise BadImage(f"rgb: array is {rgb.dtype}{list(rgb.shape)}, allowed uint8 [H, W, 3]")
        frame[0:3] = _resize(rgb, size).transpose(2, 0, 1)
        present |= 1
    if depth is not None:
        _check_plane(depth, "depth")
        frame[3] = _stretch_depth(depth, size)
        present |= 2
    if ir is not None:
        _check_plane(ir, "ir")
        frame[4] = _resize(_ir8(ir), size)
        present |= 4
    if not present:
        raise BadImage("no modality present")
    return frame, present


def _check_header(data: bytes, name: ModalityName) -> _Header:
    if not data:
        raise BadImage(f"{name}: no bytes")
    if len(data) > MAX_BYTES:
        raise BadImage(f"{name}: {len(data)} bytes, allowed {MAX_BYTES}")
    try:
        if data.startswith(PNG_MAGIC):
            header = _png(data)
        elif data.startswith(b"\xff\xd8\xff"):
            header = _jpeg(data)
        elif data.startswith(b"P5") and name != "rgb":
            header = _pgm(data)
        else:
            raise BadImage("neither JPEG nor PNG" if name == "rgb" else "neither JPEG, PNG nor PGM")
        _check_size(header, len(data))
    except BadImage as e:
        raise BadImage(f"{name}: {e}") from None
    except (struct.error, IndexError):
        raise BadImage(f"{name}: header is cut off") from None
    return header


def _check_size(header: _Header, packed: int) -> None:
    width, height, bytes_per_pixel = header
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise BadImage(f"header claims {width}x{height}, allowed {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise BadImage(f"header claims {width * height} pixels, allowed {MAX_PIXELS}")
    unpacked = width * height * bytes_per_pixel
    if unpacked > HARMLESS_BYTES and unpacked > MAX_EXPANSION * packed:
        raise BadImage(f"expands {unpacked // packed}x, allowed {MAX_EXPANSION}x")


def _png(data: bytes) -> _Header:
    """Walks every chunk: the file must be one still PNG from its first byte to its last."""
    at, header = len(PNG_MAGIC), None
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise BadImage("PNG is cut off")
        if (kind == b"IHDR") != (header is None):
            raise BadImage("PNG has no single IHDR at its start")
        if header is None:
            header = _png_header(data, at + 8, length)
        elif kind in PNG_ANIMATION:
            raise BadImage("PNG is animated, allowed are still images")
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise BadImage("PNG checksum differs")
        at = end
        if kind == b"IEND":
            break
    if data[at:].strip(b"\0"):
        raise BadImage(f"{len(data) - at} bytes after the end of the PNG")
    return header


def _png_header(data: bytes, at: int, length: int) -> _Header:
    width, height, bits, colour = struct.unpack_from(">IIBB", data, at)
    if length != 13 or colour not in PNG_CHANNELS or bits not in (1, 2, 4, 8, 16):
        raise BadImage("PNG header is damaged")
    return _Header(width, height, PNG_CHANNELS[colour] * (2 if bits == 16 else 1))


def _jpeg(data: bytes) -> _Header:
    """Walks the segments up to the first scan; the file must end with the next end-of-image marker."""
    at, header = 2, None
    while True:
        if data[at] != 0xFF:
            raise BadImage("JPEG is damaged")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if length < 2 or marker in (0x00, 0x01, *range(0xD0, 0xDA)):
            raise BadImage("JPEG is damaged")
        if marker in SOF_ALL:
            if header is not None:
                raise BadImage("JPEG has two frame headers")
            header = _jpeg_header(data, at, marker)
        at += 2 + length
        if marker == 0xDA:
            break
    if header is None:
        raise BadImage("JPEG has no frame header before its pixels")
    end = data.find(b"\xff\xd9", at)
    if end < 0:
        raise BadImage("JPEG is cut off")
    if data[end + 2 :].strip(b"\0"):  # some encoders pad with zeros
        raise BadImage(f"{len(data) - end - 2} bytes after the end of the JPEG")
    if data.count(b"\xff\xda", at) >= MAX_SCANS:
        raise BadImage(f"JPEG has more than {MAX_SCANS} scans")
    return header


def _jpeg_header(data: bytes, at: int, marker: int) -> _Header:
    precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
    if marker not in SOF_ALLOWED:
        raise BadImage(f"JPEG coding {marker - 0xC0}, allowed are baseline, extended and progressive")
    if precision != 8 or components not in (1, 3):
        raise BadImage(f"JPEG of {components} channels with {precision} bits, allowed 1 or 3 with 8")
    return _Header(width, height, components)


def _pgm(data: bytes) -> _Header:
    """Reads the header of a file that must be one short header and exactly one plane."""
    match = PGM_HEADER.match(data)
    if match is None:
        raise BadImage("PGM header is damaged")
    width, height, highest = (int(number) for number in match.groups())
    if highest > 65535:
        raise BadImage(f"PGM of values up to {highest}, allowed 65535")
    header = _Header(width, height, 1 if highest < 256 else 2)
    held, needed = len(data) - match.end(), width * height * header.bytes_per_pixel
    if held != needed and max(width, height) <= MAX_SIDE:  # else the size is what is wrong with it
        raise BadImage(f"PGM holds {held} bytes of pixels, its header claims {needed}")
    return header


def _check_plane(plane: np.ndarray, name: ModalityName) -> None:
    if (
        plane.ndim != 2
        or not plane.size
        or not (plane.dtype in (np.uint8, np.uint16) or plane.dtype.kind == "f")
    ):
        raise BadImage(
            f"{name}: array is {plane.dtype}{list(plane.shape)}, allowed uint8, uint16 or float [H, W]"
        )
    if plane.dtype.kind == "f" and not np.isfinite(plane).all():
        raise BadImage(f"{name}: values are not finite")


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    smaller = height >= size and width >= size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def _ir8(ir: np.ndarray) -> NDArray[np.uint8]:
    if ir.dtype == np.uint8:
        return ir
    if ir.dtype == np.uint16:
        return (ir if ir.max() < 256 else ir >> 8).astype(np.uint8)
    return np.ceil(255 * ir.clip(0, 1).astype(np.float32)).astype(np.uint8)


def _stretch_depth(depth: np.ndarray, size: int) -> NDArray[np.uint8]:
    """Returns depth as uint8 [size, size]: the robust range of the returns on 1..255, 0 = no return.

    Returns and missing returns do not bleed into each other when the plane is resized.
    """
    values = depth.astype(np.float32)
    floor = NO_RETURN_8BIT if depth.dtype == np.uint8 else 0
    valid = cv2.threshold(values, floor, 1, cv2.THRESH_BINARY)[1]
    weight = _resize(valid, size)
    total = _resize(values if depth.dtype == np.uint16 else values * valid, size)
    mask = weight > 0.5
    out = np.zeros((size, size), np.uint8)
    if not mask.any():
        return out
    returns = total[mask] / weight[mask]
    low, high = _range(returns)
    if high > low:
        returns = 1 + 254 * ((returns - low) / (high - low)).clip(0, 1)
    else:
        returns = np.full_like(returns, 128)
    out[mask] = np.rint(returns).astype(np.uint8)
    return out


def _range(values: np.ndarray) -> tuple[float, float]:
    n = len(values) - 1
    middle, ranked = n // 2, np.sort(values)  # sorts 6 times as fast as np.partition finds three ranks
    low, median, high = (
        float(ranked[k]) for k in (round(CLIP_QUANTILES[0] * n), middle, round(CLIP_QUANTILES[1] * n))
    )
    spread = CLIP_DEVIATIONS * float(np.sort(np.abs(values - median))[middle])
    if spread > 0:  # more than half of a quantised plane may be one value
        low, high = max(low, median - spread), min(high, median + spread)
    return low, high
