"""Ingests captures and seals an anchor set in this process, for a recorded cycle without Ray."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from pipeline.cluster import ingest
from pipeline.config import Config
from pipeline.data.anchor import AnchorSet, seal
from pipeline.data.assemble import Trunk, gather_segment, store_segment
from pipeline.data.captures import check_segment
from pipeline.data.corpus import read_corpus
from pipeline.data.features import mask_to_bool
from pipeline.data.featurise import torch_trunk
from pipeline.ledger import SegmentRow
from pipeline.models import checkpoint
from pipeline.models.trunk import features


def now() -> datetime:
    return datetime.now(UTC)


def sealed_anchor(config: Config, model: checkpoint.SourceModel, folders: list[Path]) -> str:
    sets = [read_corpus(p, ("test",)) for p in folders]
    present = torch.from_numpy(mask_to_bool(np.concatenate([c.present for c in sets])))
    z = features(model.trunk, torch.from_numpy(np.concatenate([c.frame for c in sets])), present)
    label = torch.from_numpy(np.concatenate([c.label for c in sets]).astype(np.int8))
    return seal(
        config.place("anchors"), AnchorSet(z, present, label, tuple(str(s) for c in sets for s in c.pai))
    )


def ingested(config: Config, model: checkpoint.SourceModel, backlog: ingest.Backlog) -> list[SegmentRow]:
    rows, base = [], backlog.base_offset
    for path in map(Path, backlog.paths):
        n = check_segment(path, site=backlog.site, limits=config.data)
        got = gather_segment(backlog.site, str(path), config.data, [torch_trunk(model.trunk)])
        trunks = [Trunk.of(model.manifest)]
        bad = store_segment(backlog.site, base, got, {}, trunks, config.place("features"))
        sha256 = got.head.sha256 if got.head else ""
        rows.append(SegmentRow(backlog.site, path.name, sha256, n, base, n - len(bad), len(bad)))
        base += n
    return rows
