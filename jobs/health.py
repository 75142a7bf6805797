"""Is a promoted site well? Its recorded red-team presentations, replayed through what it serves now and what it served before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.deployment import source_model
from jobs.scoring import labels_of
from pipeline.cluster.judge import features_of
from pipeline.cluster.shard import load_state
from pipeline.data.blobs import BadBlob
from pipeline.data.captures import BadSegment
from pipeline.data.features import FeatureBlock, read_features
from pipeline.metrics import clopper_pearson
from pipeline.models import checkpoint, tail
from pipeline.rollout import HealthReport, Pointer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.config import Config
    from pipeline.ledger import Ledger
    from pipeline.models.checkpoint import SourceModel


def replay_red_team(
    config: Config, ledger: Ledger, sites: Mapping[str, tuple[Pointer, Pointer]]
) -> dict[str, HealthReport]:
    """A report for every site with data; ``sites`` maps to (what it serves, what a rollback would give it)."""
    source = source_model(ledger)
    version, model = source.version, checkpoint.load(source.path)
    ingested = {r.site: r for r in ledger.sites_named(list(sites))}
    serving = ledger.serving(list(sites))
    reports: dict[str, HealthReport] = {}
    for site, (current, back) in sites.items():
        fresh = sum(s.good for s, at in ledger.segments(site) if site in serving and at > serving[site].since)
        if fresh < config.rollout.health_samples or current.source_version != version:
            continue  # silence holds
        try:
            reports[site] = _replay(config, model, ledger, site, ingested[site].ingested, current, back)
        except (BadBlob, BadSegment, OSError):
            continue  # what cannot be read is no data
    return reports


def _replay(
    config: Config, model: SourceModel, ledger: Ledger, site: str, end: int, current: Pointer, back: Pointer
) -> HealthReport:
    """One site's recorded red-team presentations."""
    block = read_features(
        config.place("features"), model.manifest.trunk_digest, site,
        start=0, end=end, features=model.manifest.config.trunk.features,
    )  # fmt: skip
    labels = labels_of(config.data.redteam, site)
    known = np.array([s in labels for s in block.sample_id], bool)
    block = block.rows(known)
    truth = np.array([labels[s][0] for s in block.sample_id], np.int64)
    return _judge(config, model, ledger, block, truth, current, back)


def _judge(
    config: Config,
    model: SourceModel,
    ledger: Ledger,
    block: FeatureBlock,
    truth: np.ndarray,
    current: Pointer,
    back: Pointer,
) -> HealthReport:
    """Breach: the lower 95 % bound of the red team's APCER is over the ceiling and going back would let fewer through."""
    if not len(block):
        return HealthReport(health="ok", reasons=("no red-team presentations recorded",))
    served, before = (_calls(config, model, ledger, block, p) for p in (current, back))
    ceiling = config.guards.ceiling
    reasons: list[str] = []
    breach = failing = False
    for label, limit, name in ((0, ceiling.apcer, "APCER"), (1, ceiling.bpcer, "BPCER")):
        mine = truth == label
        wrong, was_wrong = int((served[mine] != label).sum()), int((before[mine] != label).sum())
        low = float(clopper_pearson(np.array([wrong]), np.array([max(int(mine.sum()), 1)]))[0][0])
        if low > limit and wrong > was_wrong:
            reasons.append(
                f"red team {name} {wrong} of {int(mine.sum())} (before: {was_wrong}), lower95 {low:.1%}, limit {limit:.1%}"
            )
            breach, failing = breach or label == 0, True
    return HealthReport(health="failing" if failing else "ok", breach=breach, reasons=tuple(reasons))


def _calls(config: Config, model: SourceModel, ledger: Ledger, block: FeatureBlock, pointer: Pointer) -> np.ndarray:
    """[N] 1 where the sample is called bona fide by the state behind ``pointer``."""
    state = load_state(config, model, ledger.state(pointer.state_id))
    stream = features_of(block)
    with torch.no_grad():
        score = tail.score(tail.moved(model.tail, state), stream.z, stream.present)
    return (score >= model.manifest.threshold).numpy().astype(np.int64)
