"""Scores labelled samples that no fit has learned from, under every pattern of missing modalities.

Comparisons of source methods and the search over their settings are made of these scores. Thresholds are not
chosen here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.features import mask_to_bool
from pipeline.data.protocols import FULL, PATTERNS, any_present, keep_only
from pipeline.models import tail as tails
from pipeline.source.stems import features_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.data.corpus import Corpus
    from pipeline.models.checkpoint import SourceModel

FILLS = ("complement", "zero-fill")  # what stands in for an absent modality


class Split(NamedTuple):
    """Samples and what one model makes of them; N samples, P patterns in the order of PATTERNS, V heads."""

    domain: NDArray[np.str_]  # [N]
    label: NDArray[np.int8]  # [N]
    pai: NDArray[np.str_]  # [N]
    subject: NDArray[np.str_]  # [N] unique over domains; a subject's videos are not independent
    logit: NDArray[np.float32]  # [N, P, 2] of the fused head; NaN where no modality is left
    heads: NDArray[np.float32]  # [N, V] logits with everything that is there
    hidden: NDArray[np.float32]  # [N, D] fused feature: its length decides, its direction does not


def score(model: SourceModel, corpus: Corpus, split: str) -> Split:
    """Returns every sample of one split, scored under every pattern."""
    rows = np.flatnonzero((np.asarray(corpus.split) == split) & any_present(np.asarray(corpus.present)))
    bits = np.asarray(corpus.present)[rows]
    z, present = features_of(model.trunk, corpus, rows)
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
    """Returns the splits as one, in order."""
    return Split(*(np.concatenate(parts) for parts in zip(*splits, strict=True)))
