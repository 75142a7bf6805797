"""Sets the boundaries of a fitted model and selects the source features that travel with it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.models import tail as tails
from pipeline.source.sampler import stratify
from pipeline.source.stems import features_of
from pipeline.stats import metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pipeline.data.corpus import Corpus
    from pipeline.models.trunk import Trunk

    Params = dict[str, Tensor]

REPLAY = 64  # labelled source features that travel with the model


def transfer_boundaries(
    tail: Params, z: Tensor, present: Tensor, label: np.ndarray, domain: np.ndarray
) -> Params:
    """Returns log_rho [V] and pattern [2^M] at the threshold of ``metrics.transfer_threshold``.

    0.5 then means the same for every head, and for the fused head whatever sensors are left. A head or
    pattern without both classes stays as it is.
    """
    log_rho, pattern = tail["log_rho"].clone(), torch.zeros_like(tail["pattern"])

    def boundary(head: int, shown: Tensor, seen: Tensor) -> float | None:
        rows = seen.numpy()
        if len(set(label[rows].tolist())) < 2:
            return None
        radius = tails.forward(tail, z[seen], shown[seen]).radius[:, head]
        return _boundary(tail, radius.double().numpy(), label[rows], domain[rows])

    for v in range(tails.HEADS):
        seen = torch.ones(len(label), dtype=torch.bool) if v == tails.FUSED else present[:, v]
        log_rho[v] = float(log_rho[v]) if (at := boundary(v, present, seen)) is None else at
    everything = 2**tails.MODALITIES - 1
    for left in range(1, everything):
        subset = torch.tensor([bool(left >> m & 1) for m in range(tails.MODALITIES)])
        at = boundary(tails.FUSED, subset.expand_as(present), (present | ~subset).all(dim=1))
        pattern[left] = 0.0 if at is None else at - float(log_rho[tails.FUSED])
    return {"log_rho": log_rho, "pattern": pattern}


def _boundary(tail: Params, radius: np.ndarray, label: np.ndarray, domain: np.ndarray) -> float:
    """Returns the log radius (linear heads: the coordinate) that is the threshold of these radii [N]."""
    at = -metrics.transfer_threshold(-tails.KAPPA * radius, label, domain) / tails.KAPPA
    return at if "linear" in tail else math.log(max(at, tails.MIN_RADIUS))


def validation_reference(
    tail: Params, z: Tensor, present: Tensor, label: np.ndarray, domain: np.ndarray
) -> Params:
    """Returns the statistics of the pooled validation that label-free site methods compare scores with.

    reference.logit [2^M, 2, QUANTILES]: quantiles of the fused logit of attacks (0) and bona fide (1) for
    every set of present modalities; where a set cannot be shown, those of all modalities. reference.boundary
    [E]: the fused log radius at each domain's own threshold.
    """
    levels = np.linspace(0, 1, tails.QUANTILES)
    everything = 2**tails.MODALITIES - 1
    logit = torch.zeros(2**tails.MODALITIES, 2, tails.QUANTILES)
    boundaries: list[float] = []
    for left in range(everything, -1, -1):
        subset = torch.tensor([bool(left >> m & 1) for m in range(tails.MODALITIES)])
        seen = (present | ~subset).all(dim=1).numpy() if left else np.zeros(len(label), bool)
        if len(set(label[seen].tolist())) < 2:
            logit[left] = logit[everything]
            continue
        read = tails.forward(tail, z[seen], subset.expand_as(present)[seen])
        fused, radius = (t[:, tails.FUSED].double().numpy() for t in (read.logit, read.radius))
        for y in (0, 1):
            logit[left, y] = torch.from_numpy(np.quantile(fused[label[seen] == y], levels)).float()
        if left == everything:
            for e in np.unique(domain[seen]):
                own = seen & (domain == e)
                if len(set(label[own].tolist())) == 2:
                    boundaries.append(_boundary(tail, radius[own[seen]], label[own], domain[own]))
    return {"reference.logit": logit, "reference.boundary": torch.tensor(boundaries)}


def replay_samples(trunk: Trunk, corpora: Sequence[Corpus]) -> Params:
    """Returns a few labelled training features, equal per domain x class.

    Site methods that keep the source in their loss use them.
    """
    cells = stratify(corpora)
    each = max(REPLAY // len(cells), 1)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for cell in cells:
        rows = cell.rows[np.linspace(0, len(cell.rows) - 1, min(each, len(cell.rows))).astype(int)]
        z, present = features_of(trunk, corpora[cell.domain], rows)
        parts.append((z, present, torch.full((len(rows),), float(cell.label))))
    z, present, label = (torch.cat(p) for p in zip(*parts, strict=True))
    return {"replay.z": z, "replay.present": present, "replay.label": label}


def validation_features(
    trunk: Trunk, corpora: Sequence[Corpus]
) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Returns (domain, label, z, present) of the pooled val split."""
    parts = []
    for e, corpus in enumerate(corpora):
        rows = np.flatnonzero((np.asarray(corpus.split) == "val") & (np.asarray(corpus.present) > 0))
        if len(rows) == 0:
            continue
        z, present = features_of(trunk, corpus, rows)
        parts.append((np.full(len(rows), e), np.asarray(corpus.label)[rows].astype(np.int64), z, present))
    domain, label, z, present = zip(*parts, strict=True)
    return np.concatenate(domain), np.concatenate(label), torch.cat(z), torch.cat(present)
