"""Imports CASIA-SURF (S): RealSense RGB, depth and IR of 1,000 subjects.

The six attacks are printed faces with parts cut out.

Read from the cropped full release,
``CASIA-SURF-CROP/{real,fake}_part/{real,fake}_{train,val,test}_part/<subject>/
<video>/{color,depth,ir}/<n>.jpg``, or the challenge's ``Training/{real,fake}_part/<subject>/<video>/…`` (all
train) with ``Val`` and ``Testing`` where their lists are beside them. Readers disagree on the order of the
lists' columns, so a file's modality is its folder or suffix, never its column.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from pipeline.data.corpora import (
    BONA_FIDE,
    FRAMES,
    CorpusError,
    Images,
    Rejected,
    Row,
    clip_frames,
    data_root,
    evenly_spaced,
    image_frame,
    subfolders,
)
from pipeline.data.decode import BadImage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYOUT = "CASIA-SURF-CROP/{real,fake}_part/{real,fake}_{train,val,test}_part/… or Training/{real,fake}_part/…"
FOLDERS = ("color", "depth", "ir")
PARTS: tuple[tuple[str, int], ...] = (("real", 1), ("fake", 0))
SPLITS: tuple[str, ...] = ("train", "val", "test")
ATTACK = re.compile(r"0[1-6]_(?:e|en|enm)_[sb]")  # eyes, nose, mouth cut out; straight or bent
LISTS: tuple[tuple[str, str], ...] = (("val_private_list.txt", "val"), ("test_private_list.txt", "test"))
LISTED = re.compile(r"(?:Val|Testing)/[0-9]+/([0-9]+)-(color|depth|ir)\.jpg")
LISTED_ATTACK = "paper"  # the challenge's lists do not say which of the six


class _Clip(NamedTuple):
    path: Path
    split: str
    label: int


def rows(root: Path | None, *, size: int) -> Iterator[Row | Rejected]:
    """Yields the samples of every clip below ``root``, and of the challenge's lists if they are there."""
    base = data_root(root, LAYOUT)
    clips = _clips(base)
    for clip in clips:
        yield from _clip_rows(clip, size)
    for name, split in LISTS:
        for path in sorted(base.rglob(name)):
            yield from _listed_rows(path, split, size)


def total(root: Path | None) -> int:
    """Returns about how many samples ``rows`` yields."""
    base = data_root(root, LAYOUT)
    clips = _clips(base)
    listed = sum(len(p.read_bytes().splitlines()) for name, _ in LISTS for p in base.rglob(name))
    return listed + len(clips) * min(FRAMES, max(1, len(clip_frames(clips[0].path, FOLDERS)[0])))


def _clips(root: Path) -> list[_Clip]:
    clips: list[_Clip] = []
    for split in SPLITS:
        for part, label in PARTS:
            for folder in subfolders(root, f"{part}_part"):
                places = [folder / f"{part}_{split}_part"]
                if split == "train" and folder.parent.name == "Training":
                    places.append(folder)
                clips += [
                    _Clip(p, split, label)
                    for place in places
                    for p in sorted(place.glob("*/*"))
                    if p.is_dir()
                ]
    if not clips:
        raise CorpusError(f"{root}: holds no CASIA-SURF clips; expected {LAYOUT}")
    return clips


def _clip_rows(clip: _Clip, size: int) -> Iterator[Row | Rejected]:
    subject, video = clip.path.parent.name, clip.path.name.removesuffix(".rssdk")
    item = f"{subject}/{video}"
    if (clip.label == 1) != (video == "real") or (clip.label == 0 and not ATTACK.fullmatch(video)):
        allowed = "real" if clip.label else "01_e_s to 06_enm_b"
        yield Rejected(item, f"video name {video!r}, expected {allowed}")
        return
    frames, incomplete = clip_frames(clip.path, FOLDERS)
    if incomplete or not frames:
        yield Rejected(item, f"{incomplete} frames lack one of color, depth, ir; {len(frames)} are complete")
    for images in evenly_spaced(frames):
        name = f"{item}/{int(images[0].stem)}"
        pai = BONA_FIDE if clip.label else video
        yield _row(
            images, name, clip.split, label=clip.label, pai=pai, subject=subject, video=item, size=size
        )


def _listed_rows(path: Path, split: str, size: int) -> Iterator[Row | Rejected]:
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        cells = line.split()
        planes = {m[2]: m for m in (LISTED.fullmatch(c) for c in cells) if m}
        if not cells:
            continue
        if (
            set(planes) != set(FOLDERS)
            or len({m[1] for m in planes.values()}) != 1
            or cells[-1] not in ("0", "1")
        ):
            yield Rejected(
                f"{path.name}:{number}", "expected color, depth and ir of one sample, and a label 0 or 1"
            )
            continue
        images = (
            path.parent / planes["color"][0],
            path.parent / planes["depth"][0],
            path.parent / planes["ir"][0],
        )
        sample = f"{split}/{planes['color'][1]}"
        label = int(cells[-1])
        pai = BONA_FIDE if label else LISTED_ATTACK
        # the lists name no subject, so each sample stands for itself
        yield _row(images, sample, split, label=label, pai=pai, subject=sample, video=sample, size=size)


def _row(
    images: Images, sample: str, split: str, *, label: int, pai: str, subject: str, video: str, size: int
) -> Row | Rejected:
    try:
        frame, present, digest = image_frame(images, size=size)
    except BadImage as e:
        return Rejected(sample, str(e))
    return Row(sample, split, label, pai, subject, video, frame, present, digest)
