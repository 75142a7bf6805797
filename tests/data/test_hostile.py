"""The hostile-file corpus: one fresh process opens every file through the real entry points.

Each is refused with its exact reason within a second of work and 512 MiB, and none of the code in them
runs. Work is the process's own CPU time: what the kernel needs to hand out pages depends on the machine's
memory (0.1 to 0.8 s for the same file), and is bounded by the memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import decode as module
from pipeline.data.captures import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS, MEBIBYTES = 1.0, 512
Told = tuple[dict[str, tuple[str | list[str], float, float]], dict[str, str], Path]
JPEG = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))[
    1
].tobytes()
PNG = cv2.imencode(".png", np.random.default_rng(1).integers(0, 60_000, (64, 64)).astype(np.uint16))[
    1
].tobytes()
HTML = b"<html><script>alert(document.domain)</script></html>"

RUNNER = """
import json, resource, sys
from pathlib import Path
import pyarrow as pa
import torch
from pipeline.data.segments import decode_chunks
from pipeline.data import DataConfig, blobs
from pipeline.data.captures import list_segments, read_segment, check_segment
from pipeline.models import checkpoint

root, canary = Path(sys.argv[1]), Path(sys.argv[2])

class Waking(pa.ExtensionType):
    def __init__(self):
        super().__init__(pa.binary(), "test.waking")
    def __arrow_ext_serialize__(self):
        return b""
    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        canary.touch()
        return cls()

pa.register_extension_type(Waking())

def segment(path):
    read = read_segment(path, site=path.parent.name, limits=DataConfig())
    bad = [b.reason for b in read.bad]
    for frames in decode_chunks(read.good, 48):
        bad += [b.reason for b in frames.bad]
    return "; ".join(bad)

def footer(path):
    check_segment(path, site=path.parent.name, limits=DataConfig())
    return ""

def blob(path):
    blobs.get(path.parent.parent, path.stem)
    return ""

def model(path):
    checkpoint.load(path)
    return ""

def work():
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

list_segments(root / "captures")
for name, entry, place in json.loads((root / "corpus.json").read_text()):
    before, started = peak(), work()
    try:
        reason = globals()[entry](root / place)
    except ValueError as e:
        reason = str(e)
    except Exception as e:
        reason = f"{type(e).__name__}: {e}"
    print(json.dumps([name, reason, work() - started, peak() - before]), flush=True)
print(json.dumps(["listing", sorted(list_segments(root / "captures").rejected), 0, 0]))
"""


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return module.PNG_MAGIC + header + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def many_scans() -> bytes:
    """A true progressive JPEG of 4096² whose last scan is repeated."""
    image = cv2.imencode(".jpg", np.zeros((4096, 4096), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[
        1
    ].tobytes()
    return image[:-2] + image[image.rindex(b"\xff\xda") : -2] * 500 + b"\xff\xd9"


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("run.sh", "echo owned")
    return out.getvalue()


BOMB = png(4096, 4096, bytes(4097 * 4096))

# capture → (column, bytes, reason)
IMAGES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "png of 12000x12000": (
        "depth",
        lambda: png(12_000, 12_000, bytes(12_001 * 12_000)),
        "depth: header claims 12000x12000, allowed 4096",
    ),
    "png that expands": ("ir", lambda: BOMB, f"ir: expands {2**24 // len(BOMB)}x, allowed 200x"),
    "jpeg of 60000x60000": (
        "rgb",
        lambda: jpeg_claiming(60_000, 60_000),
        "rgb: header claims 60000x60000, allowed 4096",
    ),
    "jpeg that expands": (
        "rgb",
        lambda: jpeg_claiming(4096, 4096),
        f"rgb: expands {3 * 2**24 // len(JPEG)}x, allowed 200x",
    ),
    "jpeg of 500 scans": ("ir", lambda: many_scans(), "ir: JPEG has more than 64 scans"),
    "pgm of gigabytes": (
        "depth",
        lambda: b"P5 60000 60000 65535\n" + bytes(64),
        "depth: header claims 60000x60000, allowed 4096",
    ),
    "pgm of what is not there": (
        "depth",
        lambda: b"P5 4096 4096 65535\n" + bytes(64),
        "depth: PGM holds 64 bytes of pixels, its header claims 33554432",
    ),
    "pgm of comments": (
        "depth",
        lambda: b"P5\n" + b"# \n" * 10**6 + b"8 8\n255\n" + bytes(64),
        "depth: PGM header is damaged",
    ),
    "pgm as rgb": ("rgb", lambda: b"P5 8 8 255\n" + bytes(64), "rgb: neither JPEG nor PNG"),
    "png cut off": ("depth", lambda: PNG[: len(PNG) // 2], "depth: PNG is cut off"),
    "jpeg cut off": ("rgb", lambda: JPEG[: len(JPEG) // 2], "rgb: JPEG is cut off"),
    "png and zip": (
        "depth",
        lambda: PNG + zipped(),
        f"depth: {len(zipped())} bytes after the end of the PNG",
    ),
    "jpeg and html": ("rgb", lambda: JPEG + HTML, f"rgb: {len(HTML)} bytes after the end of the JPEG"),
    "html and jpeg": ("rgb", lambda: HTML + JPEG, "rgb: neither JPEG nor PNG"),
    "too many bytes": (
        "ir",
        lambda: PNG + bytes(9 * 2**20),
        f"ir: {len(PNG) + 9 * 2**20} bytes, allowed 8388608",
    ),
}


def row(**change: object) -> dict[str, object]:
    whole = {
        "sample_id": "s",
        "site_id": "gate",
        "captured_at": datetime(2026, 5, 4, tzinfo=UTC),
        "session_id": "v",
    }
    return {**whole, "rgb": JPEG, "depth": None, "ir": None, **change}


def written(path: Path, *rows: dict[str, object], **options: object) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), path, **options)  # pyright: ignore


class Payload:
    """Unpickling it leaves the canary behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def extension(path: Path) -> None:
    """As a writer with a type of its own leaves it: in ARROW:schema; the reader has that name registered."""

    class Theirs(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.binary(), "test.waking")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Theirs:
            return cls()

    plain = pa.Table.from_pylist([row()], schema=SCHEMA)
    array = pa.ExtensionArray.from_storage(Theirs(), pa.array([JPEG], pa.binary()))
    pq.write_table(plain.set_column(4, pa.field("rgb", array.type), array), path)


def claiming(path: Path, rows: int) -> None:
    """num_rows of the footer (field 3, after the schema) forged in place."""
    written(path, row())
    data = path.read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    at = footer.index(b"\x00\x16\x02", footer.index(b"ir")) + 2
    value, forged = 2 * rows, b""
    while value > 127:
        forged, value = forged + bytes([value & 127 | 128]), value >> 7
    footer = footer[:at] + forged + bytes([value]) + footer[at + 1 :]
    path.write_bytes(
        data[: data.rindex(b"\x15\x04\x19", 0, -9)] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    )


# segment → (writer, reason)
SEGMENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "extension": (extension, "names an Arrow extension type, allowed are plain columns"),
    "rows": (lambda p: claiming(p, 2**31), "claims 2147483648 rows, allowed 20000"),
    "pages": (
        lambda p: written(
            p,
            *(row(sample_id=f"{k}", rgb=bytes(2**24) + bytes([k])) for k in range(9)),
            compression="zstd",
            use_dictionary=False,
        ),
        "unpacks to 150995491 bytes, allowed 100663296",
    ),
    "empty": (lambda p: p.write_bytes(b""), "is no Parquet file"),
    "zip": (lambda p: p.write_bytes(zipped()), "is no Parquet file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Payload(p))), "is no Parquet file"),
    "pipe": (os.mkfifo, "is no regular file"),
    "folder": (Path.mkdir, "is no regular file"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the process said of each file, what was expected, and the canary's place."""
    root = tmp_path_factory.mktemp("hostile")
    canary, gate = root / "canary", root / "captures" / "gate"
    gate.mkdir(parents=True)
    corpus: list[tuple[str, str, str]] = []
    expected: dict[str, str] = {}
    for k, (name, (column, data, reason)) in enumerate(IMAGES.items()):
        written(gate / f"segment-{k}.parquet", row(**{"rgb": None, column: data()}))
        corpus.append((name, "segment", f"captures/gate/segment-{k}.parquet"))
        expected[name] = reason
    for name, (write, reason) in SEGMENTS.items():
        file = f"segment-{name}.parquet"
        write(gate / file)
        for entry in ("footer", "segment"):
            corpus.append((f"{name} {entry}", entry, f"captures/gate/{file}"))
            expected[f"{name} {entry}"] = f"gate/{file}: {reason}"
    large = gate / "segment-large.parquet"  # just within what is allowed
    written(
        large,
        *(row(sample_id=f"{k}", rgb=bytes(2**22 - 1100) + bytes([k])) for k in range(24)),
        compression="zstd",
        use_dictionary=False,
    )
    corpus.append(("large", "segment", "captures/gate/segment-large.parquet"))
    expected["large"] = "; ".join(["rgb: neither JPEG nor PNG"] * 24)
    _strays(root, corpus, expected)
    _artifacts(root, canary, corpus, expected)
    (root / "corpus.json").write_text(json.dumps(corpus))
    words = [sys.executable, "-c", RUNNER, str(root), str(canary)]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=100, check=True, cwd=Path(__file__).parents[2]
    )
    lines = map(json.loads, done.stdout.splitlines())
    return {name: (reason, seconds, grown) for name, reason, seconds, grown in lines}, expected, canary


def _strays(root: Path, corpus: list[tuple[str, str, str]], expected: dict[str, str]) -> None:
    """Links that lead out, and folders whose names do."""
    outside = root / "outside" / "gate"
    outside.mkdir(parents=True)
    written(outside / "segment-0.parquet", row())
    captures = root / "captures"
    (captures / "linked").symlink_to(outside)
    (captures / "gate" / "segment-link.parquet").symlink_to("../../outside/gate/segment-0.parquet")
    (captures / "gate" / "..%2f..%2fsegment-0.parquet").touch()
    (captures / "site=..").mkdir()
    (captures / "a\nb").mkdir()
    os.mkfifo(captures / "site=pipe")
    corpus.append(("link", "segment", "captures/gate/segment-link.parquet"))
    expected["link"] = "gate/segment-link.parquet: is a link out of the captures folder"


def _artifacts(
    root: Path, canary: Path, corpus: list[tuple[str, str, str]], expected: dict[str, str]
) -> None:
    """Pickles where tensors should be, under the very digests that records promise."""
    data = pickle.dumps(Payload(canary))
    digest = hashlib.sha256(data).hexdigest()
    blob = Path("blobs") / digest[:2] / f"{digest}.safetensors"
    (root / blob).parent.mkdir(parents=True)
    (root / blob).write_bytes(data)
    corpus.append(("pickled blob", "blob", str(blob)))
    model = root / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(data)
    (model / "manifest.json").write_bytes(data)
    corpus.append(("pickled model", "model", "model"))
    expected |= {"pickled blob": "SafetensorError", "pickled model": "manifest"}


def test_every_file_is_refused_with_its_reason(told) -> None:
    said, expected, _ = told
    vague = {"pickled blob", "pickled model"}  # these lines are the libraries' own
    assert {n: said[n][0] for n in expected if n not in vague} == {
        n: r for n, r in expected.items() if n not in vague
    }
    assert all(expected[name] in said[name][0] for name in vague)


def test_each_within_a_second_and_half_a_gibibyte(told) -> None:
    said, expected, _ = told
    assert {name: seconds for name, (_, seconds, _) in said.items() if seconds > SECONDS} == {}
    assert {name: grown for name, (_, _, grown) in said.items() if grown > MEBIBYTES} == {}
    assert sum(grown for _, _, grown in said.values()) < MEBIBYTES, "all together, too: the peak only grows"
    assert said.keys() == expected.keys() | {"listing"}


def test_no_code_ran(told) -> None:
    _, _, canary = told
    assert not canary.exists()


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """The canary can sing: without the checks the same bytes leave it behind."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_what_leads_out_of_the_captures_is_listed_as_stray(told) -> None:
    said, _, _ = told
    assert said["listing"][0] == [
        "gate/segment-link.parquet: is a link out of the captures folder",
        "linked: is a link out of the captures folder",
        "site id '..': allowed are 1-63 of a-z 0-9 _ -, starting with a letter or digit",
        "site id 'a\\nb': allowed are 1-63 of a-z 0-9 _ -, starting with a letter or digit",
        "site=pipe: is no folder of a site",
    ]
