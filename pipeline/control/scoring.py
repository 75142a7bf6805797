"""Joins sealed labels to stored outcomes: the only reader of a site's labels, and only to score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data import blobs
from pipeline.data.captures import read_labels
from pipeline.data.features import read_features
from pipeline.stats import metrics
from pipeline.stats.metrics import MetricError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import Config
    from pipeline.ledger import SourceRow, VerdictRow
    from pipeline.stats.metrics import PadReport


@dataclass(frozen=True)
class ScoredStream:
    """Holds a site's judged samples in stream order, N rows; label -1 where no sealed label is known."""

    offset: np.ndarray  # [N]
    captured_at: np.ndarray  # [N] datetime64[us]
    present: np.ndarray  # [N] uint8
    label: np.ndarray  # [N] int
    pai: np.ndarray  # [N] str
    before: np.ndarray  # [N] score by what the site served
    online: np.ndarray  # [N] score before learning from the sample
    after: np.ndarray  # [N] score by the candidate
    pseudo_label: np.ndarray  # [N] -1 not used
    omega: np.ndarray  # [N]
    instability: np.ndarray  # [N]

    def pad(self, which: str, threshold: float) -> PadReport | None:
        """Returns ISO/IEC 30107-3 numbers of ``before``, ``online`` or ``after``; None without both
        classes."""
        labelled = self.label >= 0
        try:
            return metrics.report(
                getattr(self, which)[labelled], self.label[labelled], self.pai[labelled], threshold, samples=0
            )
        except MetricError:
            return None


def site_labels(folder: str | None, site: str) -> dict[str, tuple[int, str]]:
    """Returns the labels of a site in ``data.sealed``; empty where there are none."""
    path = Path(folder) / f"{site}-labels.parquet" if folder else None
    return read_labels(path) if path and path.exists() else {}


def join_labels(config: Config, source: SourceRow, verdicts: Sequence[VerdictRow]) -> ScoredStream | None:
    """Returns the outcomes of one site's ``verdicts`` with features' times and sealed labels.

    None if no outcome is left. Raises BadBlob if features of a judged window are gone.
    """
    parts = [v for v in verdicts if v.window.samples]
    if not parts:
        return None
    site = parts[0].site
    features = int(config.model.trunk.features)
    outcomes = [part for v in parts if (part := _outcomes(config, v))]
    if not outcomes:
        return None
    o = {name: np.concatenate([part[name] for part in outcomes]) for name in outcomes[0]}
    block = read_features(
        config.place("features"),
        source.trunk,
        site,
        start=int(o["offset"].min()),
        end=int(o["offset"].max()) + 1,
        features=features,
    )
    if not np.isin(o["offset"], block.offset).all():
        raise blobs.BadBlob(f"{site}: features of a judged window are gone or belong to another source model")
    rows = np.searchsorted(block.offset, o["offset"])
    labels = site_labels(config.data.sealed, site)
    rows_labels = [labels.get(s, (-1, "unknown")) for s in block.sample_id[rows]]
    return ScoredStream(
        o["offset"],
        block.captured_at[rows],
        o["present"],
        np.array([k[0] for k in rows_labels]),
        np.array([k[1] for k in rows_labels]),
        o["before"],
        o["online"],
        o["after"],
        o["pseudo_label"],
        o["omega"],
        o["instability"],
    )


def _outcomes(config: Config, v: VerdictRow) -> dict[str, np.ndarray]:
    """Of one window; its blob holds those of the sites that were adapted together with it."""
    window = v.window
    if window.outcomes_blob is None or window.row_start is None:  # an early version kept no rows
        return {}
    try:
        stored = blobs.get(config.place("outcomes"), window.outcomes_blob)
    except blobs.MissingBlob:  # older than what gc keeps
        return {}
    return {name: t[window.row_start : window.row_end].numpy() for name, t in stored.items()}
