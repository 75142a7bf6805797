"""Imports WMCA (W): 72 people before a RealSense SR300; glasses, masks, fake heads, prints and replays.

Read from the preprocessed pairs
``WMCA_preprocessed_{RGB,CDIT}/…/<client>_<session>_<presenter>_<type>_<pai>.hdf5`` with datasets
``Frame_<i>/array``: (3, H, W) RGB, and (4, H, W) grey, depth, infrared, thermal. Splits are the official
``PROTOCOL-grandtest.csv`` where it is there, else the published split by client id.
"""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING, NamedTuple

import h5py
import numpy as np

from pipeline.data.corpora import (
    BONA_FIDE,
    FRAMES,
    CorpusError,
    Rejected,
    Row,
    data_root,
    evenly_spaced,
    sha256,
    subfolders,
)
from pipeline.data.decode import MAX_SIDE, BadImage, frame_from_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYOUT = "WMCA_preprocessed_RGB/ and WMCA_preprocessed_CDIT/ with …/face-station/<date>/<name>.hdf5"
NAME = re.compile(r"([0-9]{3})_([0-9]{2})_([0-9]{3})_([0-9])_([0-9]{2})")  # client session presenter type pai
FRAME = re.compile(r"Frame_([0-9]+)")
PROTOCOL = "PROTOCOL-grandtest.csv"
GROUPS: dict[str, str] = {"train": "train", "dev": "val", "eval": "test"}
BONA_FIDE_INSTRUMENTS = ("00", "01", "02")  # instruments of bona fide: none, own glasses, others' glasses
DEFECTS = ("100_03_015_2_10", "101_06_067_1_02")  # the modalities' frame indices do not match
CLIENTS: dict[str, str] = {
    "train": "002 004 005 007 014 015 021 028 029 032 034 037 038 040 041 045 046 054 061 062 064 065 068 "
    "069 098 104 106 108 501 503 506 513 515 516 533",
    "val": "003 006 009 010 013 016 018 019 022 023 024 026 033 042 047 048 052 055 056 057 058 059 066 "
    "070 071 105 107 110 502 504 507 512 532 534",
    "test": "001 008 011 012 017 020 025 027 030 031 035 036 039 043 044 049 050 051 053 060 063 067 072 "
    "073 099 100 101 102 103 109 505 514 530 535",
}
SPECIES: dict[str, dict[str, str]] = {  # by type, then pai; grouped as the published attack lists are
    "1": {"01 04 05 06 07 15 16": "glasses", "02 13 14": "rigid_mask"},
    "2": {
        "01 02 03 04 05 06 07": "fake_head",
        "08 09 10 11": "paper_mask",
        "12 13 14 15 16 17": "rigid_mask",
        " ".join(["18", *(str(i) for i in range(75, 100))]): "flexible_mask",
    },
    "3": {"01 02 03 04 06 07 08 09 11 12 13 14": "print", "05 10 15": "replay"},
    "4": {" ".join(f"{i:02d}" for i in range(1, 19)): "replay"},
}
H5_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError)


class _Recording(NamedTuple):
    name: str
    rgb: Path | None
    cdit: Path | None


def rows(root: Path | None, *, size: int) -> Iterator[Row | Rejected]:
    """Yields the samples of every recording below ``root``."""
    base = data_root(root, LAYOUT)
    recordings = _recordings(base)
    protocol = _protocol(base)
    for recording in recordings:
        yield from _recording_rows(recording, protocol, size)
    for name in sorted(set(protocol or {}) - {r.name for r in recordings}):
        yield Rejected(name, f"is in {PROTOCOL}, but no file of it was found")


def total(root: Path | None) -> int:
    """Returns about how many samples ``rows`` yields."""
    return FRAMES * len(_recordings(data_root(root, LAYOUT)))


def species(kind: str, pai: str) -> str:
    """Returns the PAI species of a type and instrument, or its code where the lists do not group it."""
    for codes, name in SPECIES.get(kind, {}).items():
        if pai in codes.split():
            return name
    return f"unlisted_{kind}_{pai}"


def _recordings(root: Path) -> list[_Recording]:
    colour, planes = ({p.stem: p for p in _files(root, which)} for which in ("RGB", "CDIT"))
    if not colour or not planes:
        missing = " and ".join(w for w, files in (("RGB", colour), ("CDIT", planes)) if not files)
        raise CorpusError(f"{root}: holds no WMCA {missing} recordings; expected {LAYOUT}")
    return [
        _Recording(name, colour.get(name), planes.get(name)) for name in sorted(colour.keys() | planes.keys())
    ]


def _files(root: Path, which: str) -> list[Path]:
    folders = subfolders(root, f"WMCA_preprocessed_{which}")
    return sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".hdf5", ".h5"))


def _protocol(root: Path) -> dict[str, str | None] | None:
    """Returns the split by recording (None where the file contradicts itself), or None without a protocol."""
    path = next(iter(sorted(root.rglob(PROTOCOL))), None)
    if path is None:
        return None
    splits: dict[str, str | None] = {}
    with path.open(newline="", errors="replace") as file:
        for cells in csv.reader(file):
            name = cells[0].strip().rpartition("/")[2].partition(".")[0] if cells else ""
            group = cells[-1].strip() if cells else ""
            if not NAME.fullmatch(name):  # a heading
                continue
            if group not in GROUPS:
                raise CorpusError(f"{path}: {name}: group {group[:40]!r}, allowed: {', '.join(GROUPS)}")
            split = GROUPS[group]
            splits[name] = split if splits.get(name, split) == split else None
    if not splits:
        raise CorpusError(f"{path}: names no recording; expected lines of path,train|dev|eval")
    return splits


def _recording_rows(
    recording: _Recording, protocol: dict[str, str | None] | None, size: int
) -> Iterator[Row | Rejected]:
    name = recording.name
    code = NAME.fullmatch(name)
    if not code:
        yield Rejected(name[:60], "file name is not client_session_presenter_type_pai")
    elif name in DEFECTS:
        yield Rejected(name, "known defect: frame indices of the modalities do not match")
    elif recording.rgb is None or recording.cdit is None:
        yield Rejected(name, f"{'colour' if recording.rgb is None else 'depth and infrared'} file is missing")
    elif code[4] == "0" and code[5] not in BONA_FIDE_INSTRUMENTS:
        yield Rejected(name, f"bona fide with instrument {code[5]}, allowed 00 to 02")
    elif (split := _split(name, code[1], protocol)) is None:
        yield Rejected(
            name,
            f"client {code[1]} has no split" if protocol is None else f"has no single split in {PROTOCOL}",
        )
    else:
        pai = BONA_FIDE if code[4] == "0" else species(code[4], code[5])
        for index, item in _frames(recording.rgb, recording.cdit, size):
            sample = name if index is None else f"{name}/{index:04d}"
            if isinstance(item, str):
                yield Rejected(sample, item)
            else:
                yield Row(sample, split, int(code[4] == "0"), pai, code[1], name, *item)


def _split(name: str, client: str, protocol: dict[str, str | None] | None) -> str | None:
    if protocol is not None:
        return protocol.get(name)
    return next((split for split, clients in CLIENTS.items() if client in clients.split()), None)


def _frames(
    rgb: Path, cdit: Path, size: int
) -> Iterator[tuple[int | None, tuple[np.ndarray, int, str] | str]]:
    """Yields (frame index, row content or reason); index None for a reason about the whole recording."""
    try:
        with h5py.File(rgb, "r") as colour, h5py.File(cdit, "r") as planes:
            indices, others = _indices(colour), _indices(planes)
            if set(indices) != set(others) or not indices:
                yield (
                    None,
                    f"frame indices differ: {len(indices)} of colour, {len(others)} of depth and infrared",
                )
                return
            for i in evenly_spaced(sorted(indices)):
                try:
                    yield i, _frame(colour[f"{indices[i]}/array"], planes[f"{others[i]}/array"], size)
                except BadImage as e:
                    yield i, str(e)
                except H5_ERRORS as e:
                    yield i, f"frame cannot be read: {type(e).__name__}"
    except H5_ERRORS as e:
        yield None, f"file cannot be read: {type(e).__name__}"


def _indices(file: h5py.File) -> dict[int, str]:
    matches = (FRAME.fullmatch(str(key)) for key in file)
    return {int(m[1]): m[0] for m in matches if m}


def _frame(colour: object, planes: object, size: int) -> tuple[np.ndarray, int, str]:
    rgb, cdit = _array(colour, 3, "rgb"), _array(planes, 4, "depth")
    frame, present = frame_from_arrays(
        np.ascontiguousarray(rgb.transpose(1, 2, 0)), cdit[1], cdit[2], size=size
    )
    return frame, present, sha256((rgb.tobytes(), cdit.tobytes()))


def _array(array: object, planes: int, name: str) -> np.ndarray:
    """Returns the frame's array after its claimed shape was checked."""
    if (
        not isinstance(array, h5py.Dataset)
        or array.ndim != 3
        or array.shape[0] != planes
        or array.dtype != np.uint8
    ):
        raise BadImage(f"{name}: array is not uint8 [{planes}, H, W]")
    if max(array.shape) > MAX_SIDE:
        raise BadImage(f"{name}: array claims {array.shape[2]}x{array.shape[1]}, allowed {MAX_SIDE}")
    return array[()]
