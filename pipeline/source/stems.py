"""Keeps what a trunk's frozen stem makes of a corpus, so that no fit computes it again.

The maps lie beside the corpora, in a folder named by everything that they depend on: the corpus' rows, the
stem's pinned weights, the frame side and the augmentation. A part is a file: the plain maps of a validation
or test split, or one augmented view of the train split. Files appear whole, so what was interrupted goes on
with the part that is missing. All methods, seeds and folds read the same files.

Maps are float16. Augmented views are computed in bfloat16 where the processor multiplies it; plain maps in
float32, because thresholds come from them.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.data import augment
from pipeline.data.corpus import read_corpus, read_manifest
from pipeline.data.features import mask_to_bool
from pipeline.models import MobileConfig
from pipeline.models.trunk import build_trunk, features, prepare
from pipeline.models.trunks.contract import MODALITIES
from pipeline.models.trunks.mobile import STEM_CHANNELS, STRIDE, MobileTrunk
from pipeline.models.trunks.pretrained import SHA256
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pipeline.data.corpus import Corpus, CorpusManifest
    from pipeline.models import TrunkConfig
    from pipeline.models.trunk import Trunk
    from pipeline.source.contract import SourceMethod

FOLDER = ".stems"  # beside the corpora
VIEWS = 16  # augmented views of a sample, at most
SPARE = 2  # times the views that a fit draws of a sample on average: a rare class is drawn more often
CHUNK = 64  # samples augmented together
VERSION = 1  # of how maps are made


class Part(NamedTuple):
    """One file of maps: a view of a split."""

    corpus: Path
    file: Path
    split: str
    view: int  # 0 plain, otherwise augmented
    rows: int


def parts(
    corpora: Sequence[Path], config: TrunkConfig, splits: Sequence[str], *, draws: int, most: float
) -> list[Part]:
    """Returns the files for fits on a trunk of ``config`` that draw ``draws`` samples from each corpus.

    There are none for a trunk without a stem, nor where they would be larger than ``most`` bytes together:
    every step then computes its own maps.
    """
    if not isinstance(config, MobileConfig):
        return []
    manifests = [read_manifest(path) for path in corpora]
    wanted = [
        part for path, m in zip(corpora, manifests, strict=True) for part in _parts(path, m, splits, draws)
    ]
    sides = {m.size // STRIDE for m in manifests}
    each = 2 * MODALITIES * STEM_CHANNELS * max(sides) ** 2
    return wanted if sum(p.rows for p in wanted) * each <= most else []


def draws(method: SourceMethod, corpora: int) -> int:
    """Returns the samples that a fit draws from each of its ``corpora``."""
    return method.steps * method.batch // corpora


def missing(wanted: Sequence[Part]) -> list[Part]:
    """Returns those of ``wanted`` that have no file yet, the large ones first."""
    return sorted((p for p in wanted if not p.file.exists()), key=lambda p: -p.rows)


def make(part: Part, config: MobileConfig) -> None:
    """Computes one file of maps on one thread."""
    torch.set_num_threads(1)
    trunk, corpus = _stem(config), read_corpus(part.corpus, (part.split,))
    generator = torch.Generator().manual_seed(part.view)
    fast = part.view > 0 and torch.cpu.get_capabilities().get("avx512_bf16", False)
    maps: list[np.ndarray] = []
    for chunk in torch.from_numpy(corpus.frame).split(CHUNK):
        frames = augment.augment_bytes(chunk, generator) if part.view else chunk
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(fast)):
            pieces = [trunk.stem(prepare(f)) for f in frames.split(trunk.slice)]
        maps.append(torch.cat(pieces).half().numpy())

    def write(tmp: Path) -> None:
        with tmp.open("wb") as f:
            np.save(f, np.concatenate(maps), allow_pickle=False)

    part.file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(part.file, write)


def read(
    corpora: Sequence[Path], splits: Sequence[str], config: TrunkConfig, *, draws: int = 0
) -> list[Corpus]:
    """Returns the corpora with the maps for ``draws`` from each, if all are stored, otherwise without any."""
    plain = [read_corpus(path, splits) for path in corpora]
    wanted = parts(corpora, config, splits, draws=draws, most=np.inf)
    if missing(wanted):
        return plain
    maps: dict[Path, dict[str, tuple[np.ndarray, ...]]] = {path: {} for path in corpora}
    for part in wanted:
        view = np.load(part.file, mmap_mode="r", allow_pickle=False)
        maps[part.corpus][part.split] = (*maps[part.corpus].get(part.split, ()), view)
    return [replace(c, maps=maps[path]) for c, path in zip(plain, corpora, strict=True)]


def prune(root: Path, wanted: Sequence[Part], *, most: float) -> None:
    """Deletes the maps of other corpora, stems and sides, longest unused first, down to ``most`` bytes."""
    keep = {p.file.parent for p in wanted}
    folders = [f for f in (root / FOLDER).glob("*") if f.is_dir()]
    size = {f: sum(file.stat().st_size for file in f.glob("*")) for f in folders}
    total = sum(size.values())
    for folder in sorted(set(folders) - keep, key=lambda f: f.stat().st_mtime):
        if total <= most:
            return
        total -= size[folder]
        shutil.rmtree(folder, ignore_errors=True)


def features_of(trunk: Trunk, corpus: Corpus, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns (z [N, M, F], present [N, M]) of ``rows`` of a corpus, from its maps if it has them.

    ``rows`` are of one split.
    """
    present = torch.from_numpy(mask_to_bool(np.asarray(corpus.present)[rows]))
    split = str(corpus.split[rows[0]]) if len(rows) else ""
    if split == "train" or split not in corpus.maps:
        return features(trunk, torch.from_numpy(corpus.frame[rows]), present), present
    maps = corpus.maps[split][0][within(corpus, split, rows)]
    return features(trunk, torch.from_numpy(maps), present), present


def within(corpus: Corpus, split: str, rows: np.ndarray) -> np.ndarray:
    """Returns the places of ``rows`` in their split; a corpus holds its splits one after the other."""
    return rows - int(np.argmax(np.asarray(corpus.split) == split))


def _parts(path: Path, m: CorpusManifest, splits: Sequence[str], draws: int) -> list[Part]:
    code = hashlib.sha256(Path(augment.__file__).read_bytes()).hexdigest()
    key = hashlib.sha256(f"{VERSION} {m.digest} {m.size} {SHA256} {code}".encode()).hexdigest()[:20]
    folder, wanted = path.resolve().parent / FOLDER / f"{m.domain}-{key}", list[Part]()
    for split in (s for s in splits if m.rows.get(s)):
        views = range(1, _views(m.rows[split], draws) + 1) if split == "train" else range(1)
        wanted += [Part(path, folder / f"{split}-{v:02d}.npy", split, v, m.rows[split]) for v in views]
    return wanted


def _views(rows: int, draws: int) -> int:
    return max(1, min(VIEWS, -(-SPARE * draws // rows)))


def _stem(config: MobileConfig) -> MobileTrunk:
    trunk = build_trunk(config, 0)
    assert isinstance(trunk, MobileTrunk)
    return trunk.eval()
