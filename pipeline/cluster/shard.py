"""A shard: the process that adapts and judges many sites at once. It holds no truth: killing it at any time is safe.

``adapt_chunk`` is the whole work on a chunk of sites, without Ray; ``Shard`` is the actor around it. The order that makes it
exactly-once: read cursors and states → learn → judge → blobs to disk → one ledger transaction for the chunk. A repeated chunk
finds its cursors moved and does nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from pipeline import bank
from pipeline.config import Config, parse
from pipeline.data import blobs
from pipeline.data.anchor import AnchorSet, open_sealed
from pipeline.data.features import FeatureBlock, mask_to_bool, read_features
from pipeline.guards import Evidence, Verdict, assess, evidence_of
from pipeline.ledger import Cycle, Ledger, ShardRow, SiteRow, StateRow
from pipeline.models import checkpoint, tail
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pipeline.models.checkpoint import SourceModel
    from pipeline.site import SiteMethod, State


@dataclass(frozen=True)
class ShardJob:
    """What a shard needs to start: small, so that a restarted actor gets it again."""

    config: str  # resolved configuration, JSON
    checkpoint: str  # folder of the source model
    source_version: int
    anchor: str  # digest
    cycle: Cycle


@dataclass(frozen=True)
class Window:
    """One site with what it has not learned from yet."""

    row: SiteRow
    block: FeatureBlock
    learner: State  # what learning goes on from
    stable: State  # what the site serves
    parent: str | None
    age_seconds: float


def adapt_chunk(job: ShardJob, sites: Sequence[str]) -> dict[str, str]:
    """Adapt, judge and commit at most ``bank.sites`` sites → {site: reason} of those that could not be processed."""
    config, model = _config(job.config), _model(job.checkpoint)
    ledger = _ledger(config.ledger.url)
    windows, failed = _windows(config, model, job, ledger, sites)
    if windows:
        ledger.commit_shard(job.cycle, _learn_and_judge(config, model, job, windows), now=datetime.now(UTC))
    return failed


def _windows(
    config: Config, model: SourceModel, job: ShardJob, ledger: Ledger, sites: Sequence[str]
) -> tuple[list[Window], dict[str, str]]:
    rows = {row.site: row for row in ledger.sites_named(sites)}
    serving, ages = ledger.serving(sites), ledger.ingested_at(sites)
    stored = ledger.states([r.learner for r in rows.values()] + [s.state for s in serving.values()])
    windows: list[Window] = []
    failed: dict[str, str] = {}
    for site in sites:
        row, served = rows[site], serving.get(site)
        try:
            block = read_features(
                config.place("features"), model.manifest.trunk_digest, site,
                start=row.learned, end=row.ingested, features=model.manifest.config.trunk.features,
            )  # fmt: skip
            want = sum(s.good for s, _ in ledger.segments(site) if row.learned <= s.base_offset < row.ingested)
            if len(block) != want:
                raise blobs.BadBlob(
                    f"{len(block)} of {want} ingested samples have features of this source model; ingest again"
                )
            own = stored.get(row.learner) if row.learner else None
            own = own if own and own.source_version == job.source_version else None
            stable = stored.get(served.state) if served and served.state else None
            stable = stable if stable and stable.source_version == job.source_version else None
            learner, champion = load_state(config, model, own), load_state(config, model, stable)
        except (blobs.BadBlob, OSError) as e:
            failed[site] = str(e)
            continue
        age = (datetime.now(UTC) - ages[site]).total_seconds() if site in ages else float("nan")
        windows.append(Window(row, block, learner, champion, own.id if own else None, age))
    return windows, failed


def _learn_and_judge(config: Config, model: SourceModel, job: ShardJob, windows: Sequence[Window]) -> list[ShardRow]:
    method = cast("SiteMethod", config.site)
    streams = [features_of(w.block) for w in windows]
    start = bank.stack([w.learner for w in windows])
    slots = max(config.bank.sites, len(windows))
    states, traces = bank.run(method, model.tail, start, streams, batch=config.bank.batch, slots=slots)
    blob = blobs.put(config.place("states"), states)
    judged = judge(config, model, _anchor(config.place("anchors"), job.anchor), windows, states, traces)
    rows: list[ShardRow] = []
    for k, (w, (evidence, verdict)) in enumerate(zip(windows, judged, strict=True)):
        after = bank.scores(model.tail, {n: t[k : k + 1] for n, t in states.items()}, streams[k].z, streams[k].present)[
            0
        ]
        before = bank.scores(model.tail, bank.stack([w.stable]), streams[k].z, streams[k].present)[0]
        outcomes = blobs.put(config.place("outcomes"), _outcomes(w.block, traces[k], before, after))
        rows.append(
            ShardRow(
                site=w.row.site,
                offset_from=w.row.learned,
                offset_to=w.row.ingested,
                source_version=job.source_version,
                method=method.kind,
                blob=blob if len(w.block) else None,
                slot=k,
                parent=w.parent,
                counters={"samples": len(w.block), "outcomes": outcomes, **_counters(w.block, traces[k])},
                verdict=verdict,
                evidence=evidence,
            )
        )
    return rows


def judge(
    config: Config,
    model: SourceModel,
    anchor: AnchorSet,
    windows: Sequence[Window],
    states: State,
    traces: Sequence[bank.Trace],
) -> list[tuple[Evidence, Verdict]]:
    """Replay the anchor set against every candidate and champion under every missing-modality pattern, then assess."""
    patterns, present = anchor.replayed()
    stable = bank.stack([w.stable for w in windows])
    candidate_scores = torch.stack([bank.scores(model.tail, states, anchor.z, p) for p in present], dim=1).numpy()
    stable_scores = torch.stack([bank.scores(model.tail, stable, anchor.z, p) for p in present], dim=1).numpy()
    judged: list[tuple[Evidence, Verdict]] = []
    for k, w in enumerate(windows):
        finite = all(bool(torch.isfinite(t[k]).all()) for t in states.values() if t.is_floating_point())
        evidence = evidence_of(
            candidate_scores[k], stable_scores[k], anchor.label.numpy(), anchor.species, patterns, model.manifest.threshold,
            trust_ratio=bank.distance(model.tail, states, k), stream_n=len(w.block), age_seconds=w.age_seconds,
            stream_finite=finite and bool(torch.isfinite(traces[k].score).all()), valid=present.any(-1).numpy(),
            holds_before=w.row.holds,
        )  # fmt: skip
        judged.append((evidence, assess(config.guards, evidence)))
    return judged


def features_of(block: FeatureBlock) -> Features:
    """A block of the store as one site's stream."""
    present = torch.from_numpy(mask_to_bool(block.present))
    z, session = torch.from_numpy(block.z.astype(np.float32)), torch.from_numpy(block.session)
    return Features(z, present, torch.ones(len(block), dtype=torch.bool), session)


def load_state(config: Config, model: SourceModel, row: StateRow | None) -> State:
    """The state a ledger row points to; the source model's own where there is none or it belongs to another model or method."""
    method = cast("SiteMethod", config.site)
    fresh = method.init(model.tail)
    if row is None:
        return fresh
    stacked = _blob(config.place("states"), row.blob)
    state = {name: t[row.slot].clone() for name, t in stacked.items()}
    if row.method != method.kind or {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in fresh.items()}:
        moved = {name: state[name] for name in tail.MOVABLE if name in state}  # an earlier version had fewer
        return {**fresh, **moved}  # another method: what it learned, not how
    return state


def _outcomes(block: FeatureBlock, trace: bank.Trace, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """What reports and scoring need per sample [N]: the score served before, online (before learning), and by the candidate."""
    return {
        "offset": torch.from_numpy(block.offset), "before": before, "online": trace.score, "after": after,
        "pseudo_label": trace.pseudo_label, "disagreement": trace.disagreement, "omega": trace.omega,
        "instability": trace.instability, "present": torch.from_numpy(block.present.copy()),
    }  # fmt: skip


def _counters(block: FeatureBlock, trace: bank.Trace) -> dict[str, object]:
    n = max(len(block), 1)
    labels = trace.pseudo_label
    return {
        "accepted_bona_fide": int((labels == 1).sum()), "accepted_attack": int((labels == 0).sum()),
        "called_bona_fide_share": float((trace.score >= 0.5).sum()) / n, "restores": int(trace.restored.sum()),
        "omega": float(trace.omega[-1]) if len(block) else None,
        "sessions": len(np.unique(block.session)),
    }  # fmt: skip


@lru_cache(maxsize=2)
def _config(text: str) -> Config:
    return parse(text, "shard job")


@lru_cache(maxsize=2)
def _model(path: str) -> SourceModel:
    torch.set_num_threads(1)
    return checkpoint.load(Path(path))


@lru_cache(maxsize=2)
def _ledger(url: str) -> Ledger:
    return Ledger.open(url)


@lru_cache(maxsize=2)
def _anchor(root: Path, digest: str) -> AnchorSet:
    return open_sealed(root, digest)


@lru_cache(maxsize=64)
def _blob(root: Path, digest: str) -> State:
    return blobs.get(root, digest)


class Shard:
    """The actor around ``adapt_chunk``; ``fleet`` makes it remote."""

    def __init__(self, job: ShardJob) -> None:
        torch.set_num_threads(1)
        self.job = job

    def pid(self) -> int:
        """Process id, for operators and chaos tests."""
        return os.getpid()

    def adapt(self, sites: Sequence[str]) -> dict[str, str]:
        """See ``adapt_chunk``."""
        return adapt_chunk(self.job, sites)
