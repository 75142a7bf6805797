"""Replays recorded streams under two configurations and compares them, site by site. Nothing is recorded.

Every site starts from the source model, learns from the labels that it has today, and gets its whole stored
stream in one go: predict, then learn. Its verdict is that of the state at the end, with the source model as
champion and fresh evidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline.control import teaching
from pipeline.control.judge import Window, features_of, judge, slot_of, stream_scores
from pipeline.control.loaders import load_anchor, load_model
from pipeline.control.scoring import site_labels
from pipeline.control.whatif import ReplayedSite, Truth, compare_site, worst_first
from pipeline.data.blobs import BadBlob
from pipeline.data.features import read_features
from pipeline.ledger import LedgerError
from pipeline.site import bank
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import Config
    from pipeline.control.deployment import Reporter
    from pipeline.control.teaching import LabelledBlock
    from pipeline.control.whatif import Difference
    from pipeline.data.anchor import AnchorSet
    from pipeline.data.features import FeatureBlock
    from pipeline.guards import Verdict
    from pipeline.ledger import Ledger, SiteRow, SourceRow
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import State

STRIDE = 32  # batches between two reports of progress
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    pa.ArrowException,
)  # BadBlob, and columns of another kind


class Recording(NamedTuple):
    """Holds the stored stream of one site."""

    row: SiteRow
    block: FeatureBlock
    labelled: LabelledBlock
    truth: Truth


def replay_sites(
    config: Config,
    what_if: Config,
    ledger: Ledger,
    source: SourceRow,
    rows: Sequence[SiteRow],
    reporter: Reporter,
) -> tuple[list[Difference], dict[str, str]]:
    """Returns the differences of ``rows``, worst first, and the reasons of sites that cannot be replayed."""
    torch.set_num_threads(1)  # as the shards compute
    model = load_model(source.path)
    anchor = _find_anchor(config, ledger, source, reporter)
    for c in (config, what_if):
        c.site.init(model.tail)  # a method that cannot start says so before anything else
    total, done = 2 * sum(s.good for r in rows for s, _ in ledger.streams.segments(r.site)), 0
    size = max(config.bank.slots, what_if.bank.slots)
    differences: list[Difference] = []
    failed: dict[str, str] = {}

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        advance(done, max(done, total))

    with reporter.progress("replay", "samples") as advance:
        for start in range(0, len(rows), size):
            recordings: list[Recording] = []
            for row in rows[start : start + size]:
                try:
                    recordings.append(_read_recording(config, ledger, model, row))
                except UNREADABLE as e:
                    failed[row.site] = " ".join(str(e).split())[:300]
            sides = [
                _replay(c, model, anchor, recordings, slots=len(rows), on_samples=count)
                for c in (config, what_if)
            ]
            differences += [
                compare_site(r.row.site, now, then, r.truth, model.manifest.threshold)
                for r, now, then in zip(recordings, *sides, strict=True)
            ]
    for site, reason in failed.items():
        reporter.say(f"warning: {site}: not replayed: {reason}")
    return worst_first(differences), failed


def _find_anchor(config: Config, ledger: Ledger, source: SourceRow, reporter: Reporter) -> AnchorSet | None:
    try:
        digest = ledger.verdicts.anchor(source.trunk)
    except LedgerError as e:
        reporter.say(f"warning: no verdicts: {e}")
        return None
    return load_anchor(config.place("anchors"), digest)


def _read_recording(config: Config, ledger: Ledger, model: SourceModel, row: SiteRow) -> Recording:
    """Returns all samples with features of this source model and their sealed labels. Raises BadBlob."""
    manifest = model.manifest
    block = read_features(
        config.place("features"),
        manifest.trunk_digest,
        row.site,
        start=0,
        end=row.ingested_offset,
        features=manifest.config.trunk.features,
    )
    if not len(block):
        raise BadBlob("no stored features of this source model; run `palisade ingest` first")
    first = int(block.offset[0])
    good = sum(s.good for s, _ in ledger.streams.segments(row.site) if s.base_offset + s.rows > first)
    if len(block) != good:
        raise BadBlob(f"{len(block)} of the {good} samples since offset {first} have features; ingest again")
    labels = site_labels(config.data.sealed, row.site)
    rows = [labels.get(str(s), (-1, "unknown")) for s in block.sample_id]
    own = teaching.labelled(config, ledger, model, row, ledger.labels.of([row.site])[row.site])
    return Recording(
        row, block, own, Truth(np.array([y for y, _ in rows]), np.array([p for _, p in rows], np.str_))
    )


def _replay(
    config: Config,
    model: SourceModel,
    anchor: AnchorSet | None,
    recordings: Sequence[Recording],
    *,
    slots: int,
    on_samples: Callable[[int], None],
) -> list[ReplayedSite]:
    """Runs every recording from the source model's own state, ``bank.slots`` at a time, at most ``slots``."""
    fresh = config.site.init(model.tail)
    replayed: list[ReplayedSite] = []
    for start in range(0, len(recordings), config.bank.slots):
        part = recordings[start : start + config.bank.slots]
        bare = [Window(r.row, r.block, fresh, fresh, None, None, 0.0) for r in part]
        windows = [
            teaching.with_labels(config, model, w, r.labelled) for w, r in zip(bare, part, strict=True)
        ]
        states, traces = _run(config, model, windows, min(config.bank.slots, slots), on_samples)
        verdicts: list[Verdict] | list[None] = [None] * len(part)
        if anchor:
            scored = [
                stream_scores(model, w, slot_of(states, k), features_of(w.block))
                for k, w in enumerate(windows)
            ]
            judged = judge(config, model, anchor, windows, states, traces, scored=scored)
            verdicts = [verdict for _, verdict in judged]
        replayed += [
            ReplayedSite(trace, bank.distance(model.tail, states, k), verdict)
            for k, (trace, verdict) in enumerate(zip(traces, verdicts, strict=True))
        ]
    return replayed


def _run(
    config: Config,
    model: SourceModel,
    windows: Sequence[Window],
    slots: int,
    on_samples: Callable[[int], None],
) -> tuple[State, list[bank.Trace]]:
    """Runs ``bank.run`` in strides of whole batches, which changes no bit and lets progress be shown."""
    method, size = config.site, config.bank.batch_size
    streams = [features_of(w.block) for w in windows]
    states = teaching.start(config, model, windows)
    parts: list[list[bank.Trace]] = [[] for _ in windows]
    for start in range(0, max(len(s.z) for s in streams), size * STRIDE):
        stride = [Features(*(t[start : start + size * STRIDE] for t in s)) for s in streams]
        states, traces = bank.run(method, model.tail, states, stride, batch=size, slots=slots)
        for part, trace in zip(parts, traces, strict=True):
            part.append(trace)
        on_samples(sum(len(s.z) for s in stride))
    return states, [bank.Trace(*map(torch.cat, zip(*p, strict=True))) for p in parts]
