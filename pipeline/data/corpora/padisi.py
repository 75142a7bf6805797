"""Imports PADISI-Face (P): 360 participants before a multi-spectral rig, with nine kinds of attack.

Attacks are eyes, paper, masks, make-up, glasses and tattoos.

Read from ``ID_<transaction>_<trial>_<name>.npz`` or ``<trial>.npz``, key ``data``: floats (1, 22, H, W) in
[0, 1], with channels 0-2 BGR, 3 NIR, 4 depth. Labels come from the official ground truth, splits from
partition 0 of three folds. Gender, ethnicity, race and age stand beside the labels in that file and are not
kept.
"""

from __future__ import annotations

import csv
import re
import zipfile
import zlib
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.data.corpora import BONA_FIDE, CorpusError, Rejected, Row, data_root, sha256
from pipeline.data.decode import MAX_SIDE, BadImage, frame_from_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYOUT = (
    "…/ID_<transaction>_<trial>_<name>.npz (or <trial>.npz), *_ground_truth.csv and "
    "*_partition_3folds_part0.csv"
)
TRIAL = re.compile(r"(?:ID_[0-9a-z]+_)?([0-9a-z]{8})(?:_.*)?")
TRUTH, PARTITION = "*ground_truth.csv", "*partition_3folds_part0.csv"
GROUPS: dict[str, str] = {"train": "train", "valid": "val", "test": "test"}
LIVE = "m00000"
ATTACK = re.compile(r"m5[0-9]{4}")  # two digits of instrument, two of species
CHANNELS = 22
MAX_ARRAY = 64 * 2**20  # bytes; the set's own are 7 MiB of float32
NPZ_ERRORS = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


class _Trial(NamedTuple):
    code: str
    participant: str
    split: str | None


def rows(root: Path | None, *, size: int) -> Iterator[Row | Rejected]:
    """Yields one sample per file below ``root``."""
    base = data_root(root, LAYOUT)
    files = _files(base)
    trials = _trials(base)
    imported: set[str] = set()
    for path in files:
        name = TRIAL.fullmatch(path.stem)
        trial = trials.get(name[1]) if name else None
        if not name:
            yield Rejected(path.stem[:100], "file name holds no trial id")
        elif trial is None:
            yield Rejected(name[1], "trial is not in the ground truth")
        else:
            imported.add(name[1])
            yield _row(path, name[1], trial, size)
    for trial in sorted(trials.keys() - imported):
        yield Rejected(trial, "is in the ground truth, but no file of it was found")


def total(root: Path | None) -> int:
    """Returns how many samples ``rows`` yields."""
    return len(_files(data_root(root, LAYOUT)))


def _files(root: Path) -> list[Path]:
    files = sorted(root.rglob("*.npz"))
    if not files:
        raise CorpusError(f"{root}: holds no PADISI .npz files; expected {LAYOUT}")
    return files


def _trials(root: Path) -> dict[str, _Trial]:
    splits = {
        r["trial_id"]: GROUPS.get(r["partition_name"])
        for r in _table(root, PARTITION, ("trial_id", "partition_name"))
    }
    truth = _table(root, TRUTH, ("trial_id", "ground_truth", "participant_id"))
    return {
        r["trial_id"]: _Trial(r["ground_truth"], r["participant_id"], splits.get(r["trial_id"]))
        for r in truth
    }


def _table(root: Path, pattern: str, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yields the named columns of the first CSV that fits; no other column is read on."""
    path = next(iter(sorted(root.rglob(pattern))), None)
    if path is None:
        raise CorpusError(f"{root}: holds no {pattern}; expected {LAYOUT}")
    with path.open(newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise CorpusError(f"{path}: has no column {', '.join(sorted(missing))}")
        try:
            for record in reader:
                yield {c: (record[c] or "").strip() for c in columns}
        except csv.Error as e:
            raise CorpusError(f"{path}: line {reader.line_num}: {e}") from None


def _row(path: Path, name: str, trial: _Trial, size: int) -> Row | Rejected:
    if trial.split is None:
        return Rejected(name, "has no split in partition 0")
    if trial.code != LIVE and not ATTACK.fullmatch(trial.code):
        return Rejected(name, f"code {trial.code[:20]!r}, expected {LIVE} or m5 and four digits")
    try:
        array = _array(path)
        frame, present = _frame(array, size)
    except BadImage as e:
        return Rejected(name, str(e))
    except NPZ_ERRORS as e:
        return Rejected(name, f"file cannot be read: {type(e).__name__}")
    label = int(trial.code == LIVE)
    pai = BONA_FIDE if label else trial.code
    subject = trial.participant or name
    return Row(name, trial.split, label, pai, subject, name, frame, present, sha256((array.tobytes(),)))


def _frame(array: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    used = array[0, :5].astype(np.float32)
    if not np.isfinite(used).all() or used.min() < 0 or used.max() > 1:
        raise BadImage("values are not all in [0, 1]")
    rgb = np.ceil(255 * used[2::-1]).astype(np.uint8).transpose(1, 2, 0)  # stored as BGR
    return frame_from_arrays(np.ascontiguousarray(rgb), used[4], used[3], size=size)


def _array(path: Path) -> np.ndarray:
    """Reads the array ``data`` after its claimed type and shape were checked; nothing is unpickled."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("data.npy")
        if info.file_size > MAX_ARRAY:
            raise BadImage(f"array claims {info.file_size} bytes, allowed {MAX_ARRAY}")
        with archive.open(info) as member:
            _check_header(member)
        with archive.open(info) as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def _check_header(member: IO[bytes]) -> None:
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f"array format {version[0]}.{version[1]}, allowed 1.0 and 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    if (
        dtype.kind != "f"
        or len(shape) != 4
        or shape[:2] != (1, CHANNELS)
        or not 0 < min(shape[2:]) <= max(shape) <= MAX_SIDE
    ):
        raise BadImage(f"array is {dtype}{list(shape)}, allowed float [1, {CHANNELS}, H, W]")
    if dtype.itemsize * CHANNELS * shape[2] * shape[3] > MAX_ARRAY:
        raise BadImage(f"array claims more than {MAX_ARRAY} bytes")
