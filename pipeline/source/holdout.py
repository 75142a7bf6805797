"""Fit on some domains, score the others: what every comparison of source methods is made of.

Thresholds are not chosen here. A result holds the scores of the sources' pooled validation beside those of
the held-out test splits, under every pattern of missing modalities, with the complement and with zeros in its
place.
"""

from __future__ import annotations

import struct
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch

from pipeline.data.features import mask_to_bool
from pipeline.data.protocols import FULL, PATTERNS, any_present, keep_only
from pipeline.models import tail as tails
from pipeline.models.trunk import features
from pipeline.source import fit as fits
from pipeline.source.contract import Batch
from pipeline.source.sampler import FitError
from pipeline.stats import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.corpus import Corpus
    from pipeline.models.checkpoint import SourceModel
    from pipeline.source.fit import Task
    from pipeline.source.sampler import Draw

FILLS = ("complement", "zero-fill")  # what stands in for an absent modality
FORMAT = 1
T = TypeVar("T")
DAMAGED = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)  # what zipfile and numpy raise for archives with flipped bits


class Split(NamedTuple):
    """Samples and what one model makes of them; N samples, P patterns in the order of PATTERNS, V heads."""

    domain: NDArray[np.str_]  # [N]
    label: NDArray[np.int8]  # [N]
    pai: NDArray[np.str_]  # [N]
    subject: NDArray[np.str_]  # [N] unique over domains; a subject's videos are not independent
    logit: NDArray[np.float32]  # [N, P, 2] of the fused head; NaN where no modality is left
    heads: NDArray[np.float32]  # [N, V] logits with everything that is there
    hidden: NDArray[np.float32]  # [N, D] fused feature: its length decides, its direction does not


@dataclass(frozen=True)
class Result:
    """One fit: validation of the sources (for thresholds), held-out tests, and the training species."""

    dev: Split
    test: Split
    known: tuple[str, ...]  # PAI species in the sources' train splits
    radius: float  # of the fused head
    seconds: float  # wall time of the fit

    def threshold(self, pattern: str = "full", fill: str = "complement") -> float:
        """Logit at the equal error rate of the pooled source validation under the same pattern and fill."""
        return metrics.eer_threshold(*self.scores("dev", pattern, fill))

    def scores(
        self, split: str, pattern: str = "full", fill: str = "complement"
    ) -> tuple[np.ndarray, np.ndarray]:
        """(logit, label) of ``dev`` or ``test`` where any modality is left."""
        s = self.dev if split == "dev" else self.test
        logit = s.logit[:, list(PATTERNS).index(pattern), FILLS.index(fill)]
        kept = np.isfinite(logit)
        return logit[kept], s.label[kept]


def fit_and_score(
    task: Task,
    sources: Sequence[Corpus],
    targets: Sequence[Corpus],
    *,
    draws: Callable[[int], Draw] | None = None,
) -> Result:
    """Learn ``task`` on ``sources`` and score their val splits and the targets' test splits."""
    began = time.perf_counter()
    model = fits.fit(task, sources, draws=draws)
    seconds = time.perf_counter() - began
    known = {str(s) for c in sources for s, p in zip(c.pai, c.split, strict=True) if p == "train"}
    dev = merged([score(model, c, "val") for c in sources])
    test = merged([score(model, c, "test") for c in targets])
    radius = float(torch.exp(model.tail["log_rho"][tails.FUSED]))
    return Result(dev, test, tuple(sorted(known)), radius, seconds)


def score(model: SourceModel, corpus: Corpus, split: str) -> Split:
    """Every sample of one split under every pattern."""
    rows = np.flatnonzero((np.asarray(corpus.split) == split) & any_present(np.asarray(corpus.present)))
    bits = np.asarray(corpus.present)[rows]
    present = torch.from_numpy(mask_to_bool(bits))
    z = features(model.trunk, torch.from_numpy(corpus.frame[rows]), present)
    logit = np.full((len(rows), len(PATTERNS), len(FILLS)), np.nan, np.float32)
    with torch.no_grad():
        whole = tails.forward(model.tail, z, present)
        for p, mask in enumerate(PATTERNS.values()):
            left = keep_only(bits, mask)
            kept = torch.from_numpy(np.flatnonzero(any_present(left)))
            there = torch.from_numpy(mask_to_bool(left))
            for f, fill in enumerate(FILLS):
                if mask == FULL and f:
                    logit[:, p, f] = logit[:, p, 0]
                    continue
                read = tails.forward(model.tail, z[kept], there[kept], substitute=fill == "complement")
                logit[kept.numpy(), p, f] = read.logit[:, tails.FUSED].numpy()
    subject = np.char.add(f"{corpus.domain}/", np.asarray(corpus.subject, np.str_)[rows])
    return Split(
        np.full(len(rows), corpus.domain),
        np.asarray(corpus.label)[rows].astype(np.int8),
        np.asarray(corpus.pai, np.str_)[rows],
        subject,
        logit,
        whole.logit.numpy(),
        whole.hidden.numpy(),
    )


def merged(splits: Sequence[Split]) -> Split:
    """One Split after the other."""
    return Split(*(np.concatenate(parts) for parts in zip(*splits, strict=True)))


def to_arrays(result: Result) -> dict[str, np.ndarray]:
    """``result`` as plain arrays, for an .npz file without pickle."""
    facts = np.array([FORMAT, result.radius, result.seconds])
    splits = {"dev": result.dev, "test": result.test}
    named = {f"{name}.{field}": array for name, s in splits.items() for field, array in s._asdict().items()}
    return {"facts": facts, "known": np.array(result.known, np.str_), **named}


def from_file(path: Path) -> Result:
    """What ``to_arrays`` stored; ValueError for anything else."""
    return read_stored(path, _from_arrays)


def read_stored(path: Path, made: Callable[[dict[str, np.ndarray]], T]) -> T:
    """Returns ``made`` of the arrays in an .npz file; raises ValueError where the file is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return made({name: stored[name] for name in stored.files})
    except DAMAGED as e:
        raise ValueError(
            f"{path}: not a stored result of this version ({' '.join(str(e).split())[:120]}); "
            "delete it and run again"
        ) from None


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> Result:
    form, radius, seconds = arrays["facts"].tolist()
    if form != FORMAT:
        raise ValueError(f"format {form:g}, allowed {FORMAT}")
    dev, test = (Split(*(arrays[f"{name}.{field}"] for field in Split._fields)) for name in ("dev", "test"))
    return Result(dev, test, tuple(str(s) for s in arrays["known"]), radius, seconds)


def degenerate(task: Task, corpora: Sequence[Corpus]) -> dict[str, str]:
    """Corpora that no fit should be given → "finite", the error's one line, or "silent NaN"."""
    task = replace(task, method=task.method.model_copy(update={"steps": 4}))

    def kept(c: Corpus, rows: np.ndarray) -> Corpus:
        return replace(c, **{k: np.asarray(v)[rows] for k, v in vars(c).items() if k != "domain"})

    first = corpora[0]
    train = np.asarray(first.split) == "train"
    three = np.flatnonzero(train)[np.linspace(0, train.sum() - 1, 3).astype(int)]
    cases = {
        "one class missing": [kept(c, np.asarray(c.label) == 1) for c in corpora],
        "one class missing in one domain": [kept(first, np.asarray(first.label) == 1), *corpora[1:]],
        "three samples in a domain": [kept(first, np.union1d(three, np.flatnonzero(~train))), *corpora[1:]],
        "a single domain": corpora[:1],
    }
    found: dict[str, str] = {}
    for name, given in cases.items():
        try:
            result = fit_and_score(task, given, [replace(c, split=np.full(len(c), "test")) for c in given])
            found[name] = "finite" if np.isfinite(result.test.logit).all() else "silent NaN"
        except ValueError as e:
            found[name] = str(e)
    state = fits.begin(task, domains=1)
    frames = torch.full((4, 5, task.size, task.size), torch.nan)
    sick = Batch(
        frames,
        torch.ones(4, 3, dtype=torch.bool),
        torch.tensor([0, 1, 0, 1]),
        torch.zeros(4, dtype=torch.long),
        0.0,
    )
    try:
        fits.step(state, sick, torch.Generator())
        found["NaN features"] = "silent NaN"
    except FitError as e:
        found["NaN features"] = str(e)
    return found
