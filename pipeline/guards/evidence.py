"""Counts the evidence of a verdict: with labels on the sealed anchor set, without them on the stream."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pipeline.guards.records import REAL, Cell, Evidence, Stream
from pipeline.stats.metrics import BONA_FIDE, MIN_SPECIES, merge_small

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

CLIP = 1e-6  # scores are clipped to [CLIP, 1 - CLIP] before their logit is taken


def evidence_of(
    candidate: ArrayLike,
    champion: ArrayLike,
    label: ArrayLike,
    species: Sequence[str],
    patterns: Sequence[str],
    threshold: float,
    *,
    trust_ratio: float,
    stream_n: int,
    age_seconds: float,
    champion_threshold: float | None = None,
    stream_finite: bool = True,
    valid: ArrayLike | None = None,
    holds_before: int = 0,
    merge_below: int = MIN_SPECIES,
    rig: Sequence[str] = (),
    unseen: Sequence[str] = (),
    stream: Stream | None = None,
) -> Evidence:
    """Returns the evidence from anchor scores [P, N] of candidate and champion under P patterns.

    ``label`` and ``species`` [N] are per anchor item; ``valid`` [P, N] is false where it is not shown.
    Bona fide is called from ``threshold`` on (the champion: ``champion_threshold``). Species with fewer than
    ``merge_below`` items are merged. A score that is not finite is an error and clears ``finite``.
    """
    c, s = np.asarray(candidate, np.float64), np.asarray(champion, np.float64)
    y = np.ascontiguousarray(label, np.int8)
    _check_shapes(c, s, len(patterns), len(y), len(species))
    ok = np.ones(c.shape, np.bool_) if valid is None else np.asarray(valid, np.bool_)
    names, member, merged = _groups(y.tobytes(), tuple(species), merge_below)
    good_c, good_s = np.isfinite(c), np.isfinite(s)
    threshold_s = threshold if champion_threshold is None else champion_threshold
    wrong_c = ((c >= threshold) != (y == BONA_FIDE)) | ~good_c
    wrong_s = ((s >= threshold_s) != (y == BONA_FIDE)) | ~good_s
    flags = np.stack([ok, wrong_c & ok, wrong_c & ~wrong_s & ok, wrong_s & ~wrong_c & ok])
    finite = bool(stream_finite and (good_c & good_s | ~ok).all())
    return Evidence(
        cells=_cells(patterns, names, flags, member),
        trust_ratio=float(trust_ratio),
        margin_drop=_margin_drop(c, s, ok, member[:, 1:]) if finite else None,
        stream_n=int(stream_n),
        age_seconds=float(age_seconds),
        finite=finite,
        holds_before=holds_before,
        merged=merged,
        rig=tuple(rig),
        unseen=tuple(unseen),
        stream=stream or Stream(),
    )


def _check_shapes(c: Floats, s: Floats, patterns: int, items: int, species: int) -> None:
    if not c.shape == s.shape == (patterns, items) or species != items:
        needed = f"[{patterns} patterns, {items} items] and one species per item"
        raise ValueError(f"anchor scores {c.shape} and {s.shape}, {species} species: {needed} are needed")


def _cells(
    patterns: Sequence[str], names: Sequence[str], flags: NDArray[np.bool_], member: Floats
) -> tuple[Cell, ...]:
    """Returns the sums of ``flags`` [4, P, N] (shown, wrong, worse, better) by pattern and species."""
    counts = np.rint(flags.astype(np.float64) @ member).astype(int)  # [4, P, species]
    n, errors, worse, better = counts.tolist()
    return tuple(
        Cell(pattern=p, species=j, n=n[i][k], errors=errors[i][k], worse=worse[i][k], better=better[i][k])
        for i, p in enumerate(patterns)
        for k, j in enumerate(names)
        if n[i][k]
    )


@lru_cache(maxsize=8)  # the anchor set is the same for all candidates of a shard
def _groups(
    label: bytes, species: tuple[str, ...], merge_below: int
) -> tuple[list[str], Floats, tuple[str, ...]]:
    """Returns REAL and the species, their items as 0/1 [N, species], and the species that were merged."""
    y = np.frombuffer(label, np.int8)
    merged_names, merged = merge_small(species, y, merge_below)
    attacks = [str(a) for a in np.unique(merged_names[y != BONA_FIDE])]
    columns = [y == BONA_FIDE] + [(merged_names == a) & (y != BONA_FIDE) for a in attacks]
    return [REAL, *attacks], np.stack(columns, axis=1).astype(np.float64), merged


def _margin_drop(c: Floats, s: Floats, ok: NDArray[np.bool_], member: Floats) -> float | None:
    """Returns the largest rise of the mean attack logit over species and patterns, at any threshold."""
    c, s = np.clip(c, CLIP, 1 - CLIP), np.clip(s, CLIP, 1 - CLIP)
    rise = np.where(ok, np.log(c * (1 - s) / ((1 - c) * s)), 0.0)
    n = ok.astype(np.float64) @ member
    return float(((rise @ member)[n > 0] / n[n > 0]).max()) if (n > 0).any() else None
