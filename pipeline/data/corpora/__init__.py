"""What importers of labelled data sets share; one file of this folder reads one set's own layout.

A kind is a module with ``rows(root, *, size) -> Iterator[Row | Rejected]`` and ``total(root) -> int``, about
how many.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

from pipeline.data.corpus import (
    BONA_FIDE,
    SPLITS,
    Corpus,
    CorpusError,
    CorpusManifest,
    Rejected,
    Row,
    read_corpus,
    read_manifest,
    write_corpus,
)
from pipeline.data.decode import MAX_BYTES, BadImage, ModalityName, frame_from_arrays, read_pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import numpy as np

__all__ = [
    "BONA_FIDE",
    "FRAMES",
    "SPLITS",
    "Corpus",
    "CorpusError",
    "CorpusManifest",
    "Images",
    "Rejected",
    "Row",
    "clip_frames",
    "data_root",
    "evenly_spaced",
    "image_frame",
    "read_corpus",
    "read_manifest",
    "sha256",
    "subfolders",
    "write_corpus",
]

FRAMES = (
    3  # per video: the published lists use frames 12, 24 and 36 of 50; more would only repeat a presentation
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
NAMES: tuple[ModalityName, ModalityName, ModalityName] = ("rgb", "depth", "ir")

Item = TypeVar("Item")
Images = tuple["Path", "Path", "Path"]  # RGB, depth, IR of one frame


def data_root(root: Path | None, layout: str) -> Path:
    """Returns ``root`` if it is a folder, else raises a CorpusError with the expected ``layout``."""
    if root is None or not root.is_dir():
        raise CorpusError(f"{root or 'no folder'}: no such folder; expected {layout}")
    return root


def subfolders(root: Path, name: str) -> list[Path]:
    """Returns the folders called ``name``: ``root`` itself, or up to three levels below it."""
    if root.name == name:
        return [root]
    folders = (p for depth in ("", "*/", "*/*/") for p in sorted(root.glob(depth + name)))
    return [p for p in folders if p.is_dir()]


def evenly_spaced(items: Sequence[Item]) -> list[Item]:
    """Returns all of up to FRAMES items, else FRAMES of them in equal steps (12, 24, 36 of 0-49)."""
    if len(items) <= FRAMES:
        return list(items)
    return [items[(len(items) - 1) * k // (FRAMES + 1)] for k in range(1, FRAMES + 1)]


def clip_frames(clip: Path, folders: tuple[str, str, str]) -> tuple[list[Images], int]:
    """Returns the frames that all three folders of a clip have, by number, and how many lack one.

    A frame is ``clip/<folder>/<number>.jpg`` in each of ``folders`` (RGB, depth, infrared).
    """
    planes = [_numbered(clip / folder) for folder in folders]
    everywhere = sorted(set(planes[0]) & set(planes[1]) & set(planes[2]))
    anywhere = set(planes[0]) | set(planes[1]) | set(planes[2])
    return [(planes[0][n], planes[1][n], planes[2][n]) for n in everywhere], len(anywhere) - len(everywhere)


def image_frame(
    images: Images, *, size: int, crop: Callable[[list[np.ndarray]], list[np.ndarray]] | None = None
) -> tuple[np.ndarray, int, str]:
    """Returns (frame, present, sha256 of the files) of one RGB, depth and IR file; raises BadImage.

    Folder names of a data set may hold personal data, so no reason repeats them.
    """
    data = [_bytes(path, name) for path, name in zip(images, NAMES)]
    pixels = [read_pixels(d, name) for d, name in zip(data, NAMES)]
    rgb, depth, ir = crop(pixels) if crop else pixels
    return *frame_from_arrays(rgb, depth, ir, size=size), sha256(data)


def sha256(parts: Iterable[bytes]) -> str:
    """Returns the sha256 of the parts and their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _numbered(folder: Path) -> dict[int, Path]:
    """Returns the images whose name is a number, by that number."""
    if not folder.is_dir():
        return {}
    files = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.stem.isdecimal())
    return {int(p.stem): p for p in sorted(files)}


def _bytes(path: Path, name: ModalityName) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadImage(f"{name}: {size} bytes, allowed {MAX_BYTES}")
        return path.read_bytes()
    except OSError as e:
        raise BadImage(f"{name}: file cannot be read: {e.strerror}") from None
