"""A shard: the process that adapts and judges many sites at once. It holds no truth: killing it at any time is safe.

``adapt_chunk`` is the whole work on some sites, without Ray; ``Shard`` is the actor around it. The order that makes it
exactly-once: read cursors and states → learn → judge → blobs to disk → one ledger transaction for all sites of the call. A
repeated call finds its cursors moved and does nothing. What a process keeps between calls is a copy of what lies in blobs,
found by the digests that the ledger gives out: the least recently used goes first, and is read again when it is needed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from cachetools import LRUCache

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
    from collections.abc import MutableMapping, Sequence

    from torch import Tensor

    from pipeline.models.checkpoint import SourceModel
    from pipeline.site import SiteMethod, State
    from pipeline.storage import Place

    Known = MutableMapping[bytes, np.ndarray]  # what was computed for a state, by the digest of what it moved

JUDGED = 1024  # states whose anchor scores are kept


@dataclass(frozen=True)
class ShardJob:
    """What a shard needs to start: small, so that a restarted actor gets it again."""

    config: str  # resolved configuration, JSON
    checkpoint: str  # place of the source model
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
    """Adapt and judge ``sites``, ``bank.sites`` at a time, and commit them together → {site: reason} of those that failed."""
    config, model = _config(job.config), _model(job.checkpoint)
    ledger = _ledger(config.ledger.url)
    windows, failed = _windows(config, model, job, ledger, sites)
    rows: list[ShardRow] = []
    for start in range(0, len(windows), config.bank.sites):
        rows += _learn_and_judge(config, model, job, windows[start : start + config.bank.sites])
    if rows:
        ledger.commit_shard(job.cycle, rows, now=datetime.now(UTC))
    return failed


def _windows(
    config: Config, model: SourceModel, job: ShardJob, ledger: Ledger, sites: Sequence[str]
) -> tuple[list[Window], dict[str, str]]:
    rows = {row.site: row for row in ledger.sites_named(sites)}
    serving, pending = ledger.serving(sites), ledger.pending(sites)
    stored = ledger.states([r.learner for r in rows.values()] + [s.state for s in serving.values()])
    now = datetime.now(UTC)
    windows: list[Window] = []
    failed: dict[str, str] = {}
    for site in sites:
        row, served, (want, newest) = rows[site], serving.get(site), pending[site]
        try:
            block = read_features(
                config.place("features"), model.manifest.trunk_digest, site,
                start=row.learned, end=row.ingested, features=model.manifest.config.trunk.features,
            )  # fmt: skip
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
        age = (now - newest).total_seconds() if newest else float("nan")
        windows.append(Window(row, block, learner, champion, own.id if own else None, age))
    return windows, failed


def _learn_and_judge(config: Config, model: SourceModel, job: ShardJob, windows: Sequence[Window]) -> list[ShardRow]:
    method = cast("SiteMethod", config.site)
    streams = [features_of(w.block) for w in windows]
    start = bank.stack([w.learner for w in windows])
    states, traces = bank.run(method, model.tail, start, streams, batch=config.bank.batch, slots=config.bank.sites)
    blob = blobs.put(config.place("states"), states)
    anchor, known = _anchor(config.place("anchors"), job.anchor), _known(job.anchor, job.checkpoint)
    judged = judge(config, model, anchor, windows, states, traces, known=known)
    scored = [_rescored(model, w, _slot(states, k), streams[k]) for k, w in enumerate(windows)]
    outcomes = blobs.put(config.place("outcomes"), _outcomes(windows, traces, scored))
    ends = np.cumsum([len(w.block) for w in windows]).tolist()
    return [
        ShardRow(
            site=w.row.site, offset_from=w.row.learned, offset_to=w.row.ingested, source_version=job.source_version,
            method=method.kind, blob=blob if len(w.block) else None, slot=k, parent=w.parent,
            counters={"samples": len(w.block), "outcomes": outcomes, "rows": [ends[k] - len(w.block), ends[k]],
                      **_counters(w.block, traces[k])},
            verdict=verdict, evidence=evidence,
        )
        for k, (w, (evidence, verdict)) in enumerate(zip(windows, judged, strict=True))
    ]  # fmt: skip


def judge(
    config: Config,
    model: SourceModel,
    anchor: AnchorSet,
    windows: Sequence[Window],
    states: State,
    traces: Sequence[bank.Trace],
    *,
    known: Known | None = None,
) -> list[tuple[Evidence, Verdict]]:
    """Replay the anchor set against every candidate and champion under every missing-modality pattern, then assess.

    Each state is scored by itself, and once: sites that have not moved share what ``known`` has of the source model.
    """
    patterns, present = anchor.replayed()
    known = {} if known is None else known
    judged: list[tuple[Evidence, Verdict]] = []
    for k, w in enumerate(windows):
        candidate, own = _slot(states, k), anchor_scores(model, anchor, _slot(states, k), known)
        finite = all(bool(torch.isfinite(t).all()) for t in candidate.values() if t.is_floating_point())
        evidence = evidence_of(
            own, anchor_scores(model, anchor, w.stable, known), anchor.label.numpy(), anchor.species, patterns,
            model.manifest.threshold, trust_ratio=bank.distance(model.tail, states, k), stream_n=len(w.block),
            age_seconds=w.age_seconds, stream_finite=finite and bool(torch.isfinite(traces[k].score).all()),
            valid=present.any(-1).numpy(), holds_before=w.row.holds,
        )  # fmt: skip
        judged.append((evidence, assess(config.guards, evidence)))
    return judged


def anchor_scores(model: SourceModel, anchor: AnchorSet, state: State, known: Known) -> np.ndarray:
    """Scores [P, N] of one state under every pattern; looked up in and added to ``known``."""
    key = _moved(state)
    if key not in known:
        present = anchor.replayed()[1]
        params = tail.moved(model.tail, state)
        with torch.no_grad():
            known[key] = torch.stack([tail.score(params, anchor.z, p) for p in present]).numpy()
    return known[key]


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
    hot = _hot(config.bank.hot_mb)
    key = row.blob, row.slot
    if key not in hot:
        hot[key] = {name: t[row.slot].clone() for name, t in _blob(config.place("states"), row.blob).items()}
    state = hot[key]
    if row.method != method.kind or {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in fresh.items()}:
        moved = {name: state[name] for name in tail.MOVABLE if name in state}  # an earlier version had fewer
        return {**fresh, **moved}  # another method: what it learned, not how
    return state


def _rescored(model: SourceModel, window: Window, candidate: State, stream: Features) -> tuple[Tensor, Tensor]:
    """The stream's scores [N] by what the site serves and by the candidate."""
    with torch.no_grad():
        before = tail.score(tail.moved(model.tail, window.stable), stream.z, stream.present)
        if _moved(candidate) == _moved(window.stable):
            return before, before
        return before, tail.score(tail.moved(model.tail, candidate), stream.z, stream.present)


def _slot(stacked: State, k: int) -> State:
    return {name: t[k] for name, t in stacked.items()}


def _moved(state: State) -> bytes:
    """Digest of what decides a state's scores."""
    digest = hashlib.blake2b(digest_size=16)
    for name in tail.MOVABLE:
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.digest()


def _outcomes(
    windows: Sequence[Window], traces: Sequence[bank.Trace], scored: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """What reports and scoring need per sample, site after site: the score served before, online (before learning), after."""
    return {
        "offset": torch.from_numpy(np.concatenate([w.block.offset for w in windows])),
        "present": torch.from_numpy(np.concatenate([w.block.present for w in windows])),
        "before": torch.cat([before for before, _ in scored]),
        "after": torch.cat([after for _, after in scored]),
        "online": torch.cat([t.score for t in traces]),
        **{n: torch.cat([getattr(t, n) for t in traces])
           for n in ("pseudo_label", "disagreement", "omega", "instability")},
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
    return checkpoint.load(path)


@lru_cache(maxsize=2)
def _ledger(url: str) -> Ledger:
    return Ledger.open(url)


@lru_cache(maxsize=2)
def _anchor(root: Place, digest: str) -> AnchorSet:
    return open_sealed(root, digest)


@lru_cache(maxsize=4)  # what its sites need goes to the hot states
def _blob(root: Place, digest: str) -> State:
    return blobs.get(root, digest)


@lru_cache(maxsize=2)
def _hot(megabytes: int) -> LRUCache[tuple[str, int], State]:
    return LRUCache(megabytes * 2**20, getsizeof=lambda state: sum(t.nbytes for t in state.values()))


@lru_cache(maxsize=2)
def _known(anchor: str, model: str) -> LRUCache[bytes, np.ndarray]:
    return LRUCache(JUDGED)


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
