"""Renders phases of site scripts into capture segments, sealed labels and the labels somebody vouches for.

``simulate`` renders one phase of some ``SiteScript``s (``site_script.py``): phase 1 is the first day, which
may begin with an installer's presentations, phase 2 the morning after, with those of a red team. Nothing in a
row gives them away; their labels are files of their own.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.captures import SCHEMA, write_segment
from pipeline.data.presentations import write_label_file
from pipeline.simulate.render import BONA_FIDE
from pipeline.simulate.rig import Capture, SensorRig, capture
from pipeline.simulate.site_script import (
    COMMISSIONING,
    PHASES,
    RED_TEAM,
    Broken,
    Drift,
    Missing,
    Shot,
    SiteScript,
    Stretch,
    demo_fleet,
    plan,
    rig_at,
)
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    Progress = Callable[[int, int], None]

__all__ = [
    "PHASES",
    "Broken",
    "Drift",
    "Missing",
    "SiteScript",
    "Stretch",
    "demo_fleet",
    "plan",
    "rig_at",
    "simulate",
]

START = datetime(2026, 3, 2, tzinfo=UTC)
LABELS = pa.schema([("sample_id", pa.string()), ("label", pa.string()), ("pai", pa.string())])
VOUCHERS = {COMMISSIONING: "installer of the simulation", RED_TEAM: "red team of the simulation"}
BOMB_SIDE = 12_000  # pixels that a hostile PNG header claims


class _Task(NamedTuple):
    out: Path
    script: SiteScript
    phase: int
    segment: int
    seed: int


def simulate(
    out: Path,
    scripts: Sequence[SiteScript],
    *,
    phase: int,
    seed: int = 0,
    workers: int = 2,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Render ``phase`` of all sites below ``out`` → captures per site.

    Writes captures/<site>/segment-<k>.parquet, and sealed/<site>-labels.parquet of all phases so
    far, and labels/<site>/labels-<phase>.parquet of what an installer (phase 1) or the red team (phase 2)
    presents.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase}: allowed are {', '.join(map(str, PHASES))}")
    plans = {s.site: plan(s, phase=phase, seed=seed) for s in scripts}
    if len(plans) < len(scripts):
        raise ValueError("site ids of the scripts must differ")
    count = sum(map(len, plans.values()))
    tasks = [_Task(out, s, phase, k, seed) for s in scripts for k in range(PHASES[phase].segments)]
    done = 0
    for rows in _mapped(tasks, workers):
        done += rows
        if progress:
            progress(done, count)
    for script in scripts:
        if phase == 1:
            _write_hostile(out / "captures" / script.site, script)
        shots = [shot for p in PHASES if p <= phase for shot in plan(script, phase=p, seed=seed)]
        _write_labels(out / "sealed" / f"{script.site}-labels.parquet", shots)
        vouched = [shot for shot in plans[script.site] if shot.vouched]
        if vouched:
            path = out / "labels" / script.site / f"labels-{phase:04d}.parquet"
            _write_presentations(path, vouched, mislabelled=script.mislabelled and phase == 1)
    return {site: len(shots) for site, shots in plans.items()}


def _mapped(tasks: Sequence[_Task], workers: int) -> Iterable[int]:
    if workers <= 1:
        yield from map(_segment, tasks)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of torch and Ray
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        yield from pool.map(_segment, tasks)


def _segment(task: _Task) -> int:
    """Render and write one segment → its rows."""
    script, when = task.script, PHASES[task.phase]
    shots = plan(script, phase=task.phase, seed=task.seed)
    cuts = [round(len(shots) * k / when.segments) for k in range(when.segments + 1)]
    start, end = list(pairwise(cuts))[task.segment]
    rows = [_row(script, shot) for shot in shots[start:end]]
    if "bomb" in script.hostile and when.first + task.segment == 1 and rows:
        rows[len(rows) // 2]["depth"] = _bomb()
    path = task.out / "captures" / script.site / f"segment-{when.first + task.segment:04d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_segment(path, pa.Table.from_pylist(rows, schema=SCHEMA))
    return len(rows)


def _row(script: SiteScript, shot: Shot) -> dict[str, str | datetime | bytes | None]:
    rig = rig_at(script, shot.hour)
    rng = np.random.default_rng([crc32(shot.sample_id.encode()), 3])
    seen = capture(shot.what, replace(rig, jpeg=100), shot.frame)  # the file's own JPEG is the only one
    bad = script.broken
    rubbish = bad.kind if bad and bad.start <= shot.hour < bad.end and rng.random() < bad.share else None
    if rubbish in ("black", "constant"):
        level = 0 if rubbish == "black" else 127
        seen = Capture(*(np.full_like(plane, level) for plane in seen))
    images = _encoded(seen, rig)
    if rubbish == "truncated":
        images["rgb"] = images["rgb"][: len(images["rgb"]) // 3]
    gone = {m.modality for m in script.missing if m.start <= shot.hour < m.end}
    return {
        "sample_id": shot.sample_id,
        "site_id": script.site,
        "captured_at": START + timedelta(hours=shot.hour),
        "session_id": shot.session_id,
        **{name: None if name in gone else data for name, data in images.items()},
    }


def _encoded(seen: Capture, rig: SensorRig) -> dict[str, bytes]:
    """JPEG, 16-bit PNG, and PNG or JPEG: rigs that give millimetres also give lossless IR."""
    wide = seen.depth if seen.depth.dtype == np.uint16 else seen.depth.astype(np.uint16) * 257
    ir = _packed(".png", seen.ir) if rig.depth_form == "mm" else _packed(".jpg", seen.ir, rig.jpeg)
    return {"rgb": _packed(".jpg", seen.rgb[..., ::-1], rig.jpeg), "depth": _packed(".png", wide), "ir": ir}


def _packed(kind: str, image: np.ndarray, quality: int = 0) -> bytes:
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality] if kind == ".jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    return cv2.imencode(kind, image, flags)[1].tobytes()


def _bomb() -> bytes:
    """A small PNG whose header claims BOMB_SIDE x BOMB_SIDE pixels."""
    data = bytearray(_packed(".png", np.zeros((8, 8), np.uint16)))
    data[16:24] = BOMB_SIDE.to_bytes(4, "big") * 2
    data[29:33] = crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _write_hostile(folder: Path, script: SiteScript) -> None:
    last = PHASES[1].first + PHASES[1].segments - 1
    if "garbage" in script.hostile:
        write_atomic(
            folder / f"segment-{last:04d}-a.parquet", lambda tmp: tmp.write_bytes(b"GIF89a" + bytes(4000))
        )
    if "schema" in script.hostile:
        table = pa.table({"user": ["x"] * 3, "payload": [b"y"] * 3})
        write_atomic(folder / f"segment-{last:04d}-b.parquet", lambda tmp: pq.write_table(table, tmp))


def _truth(shot: Shot) -> dict[str, str]:
    label = BONA_FIDE if shot.what.species == BONA_FIDE else "attack"
    return {"sample_id": shot.sample_id, "label": label}


def _write_labels(path: Path, shots: Sequence[Shot]) -> None:
    rows = [{**_truth(s), "pai": s.what.species} for s in shots]
    write_atomic(path, lambda tmp: pq.write_table(pa.Table.from_pylist(rows, schema=LABELS), tmp))


def _write_presentations(path: Path, shots: Sequence[Shot], *, mislabelled: bool) -> None:
    """Writes what is said of ``shots``; the opposite of the truth where they are ``mislabelled``."""
    rows = [
        {
            **(_reversed(s) if mislabelled else {**_truth(s), "instrument": s.what.species}),
            "kind": s.vouched,
            "who": VOUCHERS[s.vouched],
            "labelled_at": START + timedelta(hours=s.hour),
        }
        for s in shots
    ]
    write_label_file(path, rows)


def _reversed(shot: Shot) -> dict[str, str]:
    """The label of the other class; nobody can name the instrument of an attack that was none."""
    label, instrument = ("attack", "unknown") if shot.what.species == BONA_FIDE else (BONA_FIDE, BONA_FIDE)
    return {"sample_id": shot.sample_id, "label": label, "instrument": instrument}
