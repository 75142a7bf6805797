"""Imports CASIA-SURF CeFA (C): RealSense RGB, depth and IR of people of three ethnicities.

Attacks are cloth prints, screens, 3D masks and silicone masks.

Read from ``CeFA-Race/{AF,CA,EA}/<race>-<id>[-<id card>]/<P1_P2_P3_P4_P5>/{profile,depth,ir}/<n>.jpg`` (P1
race, P2 subject, P3 device, P4 session, P5 instrument) and
``CeFA-Mask/{3D-Mask,Silicone-Mask}/<id>/<fields>/…``. Subjects 000-199 are train, 200-299 val, 300-499 test,
masks test, as in the published lists. A clip is bona fide only in a race folder with P5 = 1; the authors' own
code labels it 0. An id card in a folder name is personal data: nothing repeats it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.data.corpora import (
    BONA_FIDE,
    FRAMES,
    CorpusError,
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

LAYOUT = "CeFA-Race/{AF,CA,EA}/<race>-<id>/<P1_P2_P3_P4_P5>/{profile,depth,ir}/ and CeFA-Mask/…"
FOLDERS = ("profile", "depth", "ir")
RACES = {"AF": "1", "CA": "2", "EA": "3"}
SUBJECT = re.compile(r"(AF|CA|EA)-([0-9]{3})(?:[-_ ].*)?")
CLIP = re.compile(r"([1-3])_([0-9]{3})_([1-4])_([1-3])_([1-4])")
INSTRUMENTS = {"1": BONA_FIDE, "2": "cloth", "3": "picture", "4": "screen"}
SESSIONS = {"1": "indoor", "2": "outdoor", "3": "random"}
MASK = re.compile(
    r"([12])_([0-9]{3})_([01])_([01])_([12])_([12])_([1-4])"
)  # kind id dress glasses device session light
MASK_KINDS = {"3D-Mask": "1", "Silicone-Mask": "2"}
BLACK = 4  # mean of a row or column; JPEG leaves some noise in a black border


class _Clip(NamedTuple):
    path: Path
    subject: str
    split: str
    pai: str


def rows(root: Path | None, *, size: int) -> Iterator[Row | Rejected]:
    """Yields the samples of every clip below ``root``."""
    for clip in _clips(data_root(root, LAYOUT)):
        if isinstance(clip, Rejected):
            yield clip
        else:
            yield from _clip_rows(clip, size)


def total(root: Path | None) -> int:
    """Returns about how many samples ``rows`` yields."""
    clips = _clips(data_root(root, LAYOUT))
    first = next((c for c in clips if isinstance(c, _Clip)), None)
    return len(clips) * (min(FRAMES, max(1, len(clip_frames(first.path, FOLDERS)[0]))) if first else 1)


def _clips(root: Path) -> list[_Clip | Rejected]:
    people = [p for race in RACES for folder in subfolders(root, race) for p in _folders(folder)]
    masks = [p for kind in MASK_KINDS for folder in subfolders(root, kind) for p in _folders(folder)]
    clips = [c for number, p in enumerate(people) for c in _race_clips(p, number)]
    clips += [_mask_clip(p) for person in masks for p in _folders(person)]
    if not clips:
        raise CorpusError(f"{root}: holds no CeFA clips; expected {LAYOUT}")
    return clips


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir())


def _race_clips(person: Path, number: int) -> Iterator[_Clip | Rejected]:
    race = person.parent.name
    name = SUBJECT.fullmatch(person.name)
    if not name or name[1] != race:
        yield Rejected(f"{race}/folder {number}", f"folder name is not {race}-<three digits>")
        return
    subject = f"{race}-{name[2]}"
    for path in _folders(person):
        code = CLIP.fullmatch(path.name)
        if not code:
            yield Rejected(f"{subject}/{_without_id_card(path.name)}", "clip name is not P1_P2_P3_P4_P5")
        elif code[1] != RACES[race] or code[2] != name[2]:
            yield Rejected(f"{subject}/{path.name}", "clip name contradicts its subject's folder")
        else:
            split = _split(int(code[2]))
            pai = INSTRUMENTS[code[5]]
            pai = f"{pai}_{SESSIONS[code[4]]}" if code[5] in "23" else pai
            yield (
                _Clip(path, subject, split, pai)
                if split
                else Rejected(f"{subject}/{path.name}", "subject above 499")
            )


def _split(subject: int) -> str | None:
    return "train" if subject < 200 else "val" if subject < 300 else "test" if subject < 500 else None


def _mask_clip(path: Path) -> _Clip | Rejected:
    kind, person = path.parent.parent.name, path.parent.name
    code = MASK.fullmatch(path.name)
    if not code or code[1] != MASK_KINDS[kind] or code[2] != person:
        return Rejected(
            f"{kind}/{_without_id_card(person)}/{_without_id_card(path.name)}",
            "clip name is not a mask's or contradicts its folder",
        )
    if kind == "Silicone-Mask":
        pai = "silicone_glasses" if code[4] == "1" else "silicone"
    else:
        pai = "mask_3d" + ("_wig" if code[3] == "1" else "") + ("_glasses" if code[4] == "1" else "")
    return _Clip(path, f"{kind}-{person}", "test", pai)


def _without_id_card(name: str) -> str:
    """Returns a folder name without digits that may be an id card."""
    return re.sub(r"[0-9]{5,}[0-9Xx]*", "…", name)[:60]


def _clip_rows(clip: _Clip, size: int) -> Iterator[Row | Rejected]:
    video = f"{clip.subject}/{clip.path.name}"
    frames, incomplete = clip_frames(clip.path, FOLDERS)
    if incomplete or not frames:
        yield Rejected(
            video, f"{incomplete} frames lack one of profile, depth, ir; {len(frames)} are complete"
        )
    for images in evenly_spaced(frames):
        sample = f"{video}/{int(images[0].stem):04d}"
        try:
            frame, present, digest = image_frame(images, size=size, crop=_without_border)
        except BadImage as e:
            yield Rejected(sample, str(e))
            continue
        label = int(clip.pai == BONA_FIDE)
        yield Row(sample, clip.split, label, clip.pai, clip.subject, video, frame, present, digest)


def _without_border(planes: list[np.ndarray]) -> list[np.ndarray]:
    """Cuts off the border rows and columns that are black in every modality, if the shapes agree."""
    flat = [p.max(axis=2) if p.ndim == 3 else p for p in planes]
    if len({p.shape for p in flat}) != 1:
        return planes
    lit = np.maximum.reduce(flat)
    down, across = np.flatnonzero(lit.mean(axis=1) > BLACK), np.flatnonzero(lit.mean(axis=0) > BLACK)
    if not len(down) or not len(across):
        return planes
    return [p[down[0] : down[-1] + 1, across[0] : across[-1] + 1] for p in planes]
