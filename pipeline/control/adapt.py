"""Adapts and judges many sites and commits them in one transaction: the work of a shard, without Ray.

The order makes it exactly-once: read cursors and states, learn, judge, write blobs, then one ledger
transaction for all sites of the call. A repeated call finds its cursors moved and does nothing. Killing the
process at any time is safe: what it keeps between calls (``loaders``) is a copy of blobs, found by the
digests that the ledger gives out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.control import rebase, teaching
from pipeline.control.judge import Window, features_of, judge, slot_of, steps_of, stream_scores
from pipeline.control.loaders import (
    anchor_score_cache,
    load_anchor,
    load_config,
    load_model,
    load_state,
    open_ledger_at,
)
from pipeline.data import blobs
from pipeline.data.anchor import open_sealed
from pipeline.data.features import read_features
from pipeline.guards.stream import SiteHistory, add_hours
from pipeline.ledger import Cycle, Ledger, ShardRow, StateRow, WindowRecord
from pipeline.site import bank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pipeline.config import Config
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import State


@dataclass(frozen=True)
class ShardJob:
    """Holds what a shard needs to start; small, so that a restarted actor gets it again."""

    config: str  # resolved configuration, JSON
    checkpoint: str  # place of the source model
    source_version: int
    anchor: str  # digest
    cycle: Cycle
    retained: int = (
        0  # samples of a site that a rebase learns anew from; 0: what the site has not learned from yet
    )


def shard_job(
    config: Config, ledger: Ledger, cycle: Cycle, *, version: int | None = None, retained: int = 0
) -> ShardJob:
    """Returns the job of the shards of ``cycle``: a source model (None: the champion) and its anchor set."""
    source = ledger.sources.get(version)
    anchor = ledger.verdicts.anchor(source.trunk)
    open_sealed(config.place("anchors"), anchor)  # damaged, it is said once and not of every site
    return ShardJob(config.model_dump_json(), source.path, source.version, anchor, cycle, retained)


def adapt_sites(job: ShardJob, sites: Sequence[str]) -> dict[str, str]:
    """Adapts and judges ``sites``, ``bank.slots`` at a time, and commits them together.

    Returns {site: reason} of those that could not be adapted. A repeated call does nothing.
    """
    torch.set_num_threads(1)  # a node holds one shard per core
    config, model = load_config(job.config), load_model(job.checkpoint)
    ledger = open_ledger_at(config.ledger.url)
    if job.retained:
        windows, failed = rebase.rebase_windows(config, model, ledger, sites, samples=job.retained)
    else:
        windows, failed = _windows(config, model, job, ledger, sites)
    windows = _labelled(config, model, ledger, windows, failed)
    rows: list[ShardRow] = []
    for start in range(0, len(windows), config.bank.slots):
        rows += _learn_and_judge(config, model, job, windows[start : start + config.bank.slots])
    if rows:
        ledger.verdicts.commit(job.cycle, rows, now=datetime.now(UTC), rebased=job.retained > 0)
    return failed


def _windows(
    config: Config, model: SourceModel, job: ShardJob, ledger: Ledger, sites: Sequence[str]
) -> tuple[list[Window], dict[str, str]]:
    rows = {row.site: row for row in ledger.streams.named(sites)}
    serving, pending = ledger.releases.serving(sites), ledger.streams.pending(sites)
    wanted = [r.learner for r in rows.values()] + [s.state for s in serving.values()]
    states = {  # those of another source model mean nothing under this one
        i: s for i, s in ledger.verdicts.states(wanted).items() if s.source_version == job.source_version
    }
    now, store, fresh = datetime.now(UTC), config.place("features"), config.site.init(model.tail)
    windows: list[Window] = []
    failed: dict[str, str] = {}
    for site in sites:
        row, served, (count, newest) = rows[site], serving.get(site), pending[site]
        try:
            block = read_features(
                store,
                model.manifest.trunk_digest,
                site,
                start=row.learned_offset,
                end=row.ingested_offset,
                features=model.manifest.config.trunk.features,
            )
            if len(block) != count:
                if ledger.streams.site(site).learned_offset != row.learned_offset:
                    continue  # another process has adapted the site since its row was read
                raise blobs.BadBlob(
                    f"{len(block)} of {count} ingested samples have features of this source model; "
                    "ingest again"
                )
            champion_row = states.get(served.state or "") if served else None
            # under another source model a site goes on from what it serves
            learner_row = states.get(row.learner or "") or champion_row
            champion = load_state(config, model, champion_row, fresh=fresh)
            learner, parent, corrupt = _learner(config, model, learner_row, fresh), learner_row, None
            if learner is None:
                learner, parent, corrupt = champion, champion_row, learner_row
        except (blobs.BadBlob, OSError) as e:
            failed[site] = str(e)
            continue
        age = (now - newest).total_seconds() if newest else float("nan")
        ids = [state.id if state else None for state in (parent, corrupt, champion_row)]
        windows.append(Window(row, block, learner, champion, ids[0], ids[1], age, ids[2]))
    return [_renewed(config, w, fresh) for w in _recalled(ledger, windows, now)], failed


def _labelled(
    config: Config, model: SourceModel, ledger: Ledger, windows: Sequence[Window], failed: dict[str, str]
) -> list[Window]:
    """Returns the windows with their labels, and with the memory of what teaches in the learner's state."""
    labels = ledger.labels.of([w.row.site for w in windows])
    ready: list[Window] = []
    for w in windows:
        if not labels[w.row.site] and not w.learner.get("taught.digest", 0):
            ready.append(w)  # nobody has ever labelled anything here
            continue
        try:
            own = teaching.labelled(config, ledger, model, w.row, labels[w.row.site])
        except (blobs.BadBlob, OSError) as e:
            failed[w.row.site] = f"labelled presentations: {e}"
            continue
        ready.append(teaching.with_labels(config, model, w, own))
    return ready


def _recalled(ledger: Ledger, windows: Sequence[Window], now: datetime) -> list[Window]:
    """Returns the windows with the history that earlier verdicts measured of the site and of its state."""
    latest = ledger.verdicts.latest([w.row.site for w in windows])
    wanted = [w.parent for w in windows if w.parent and latest[w.row.site].state != w.parent]
    older = {v.state: v for v in ledger.verdicts.find(ids=wanted)} if wanted else {}
    recalled: list[Window] = []
    for w in windows:
        last, origin = latest.get(w.row.site), None
        before = last.evidence.stream if last else None
        baseline = before.baseline if before else ()
        if last and before and last.outcome != "fail":
            baseline = add_hours(baseline, before.hours)
        if w.parent and last:
            origin = (
                (last, before)
                if last.state == w.parent
                else (older[w.parent], older[w.parent].evidence.stream)
            )
        born, sessions = now.isoformat(), 0
        if origin and origin[1]:
            born, sessions = (
                origin[1].born or origin[0].at.isoformat(),
                origin[1].sessions_before + (origin[1].sessions or 0),
            )
        age = (now - datetime.fromisoformat(born)).total_seconds() / 86_400
        recalled.append(replace(w, history=SiteHistory(baseline, born, age, sessions)))
    return recalled


def _renewed(config: Config, w: Window, fresh: State) -> Window:
    """Resets a site to the source model when its state exceeds the ``expiry`` limits."""
    rule, age, steps = config.guards.expiry, w.history.age_days or 0.0, steps_of(w.learner) or 0
    if rule.advisory or w.parent is None or (age <= rule.state_days and steps <= rule.state_steps):
        return w
    return replace(
        w, learner=fresh, parent=None, history=SiteHistory(baseline=w.history.baseline, age_days=0.0)
    )


def _learner(config: Config, model: SourceModel, row: StateRow | None, fresh: State) -> State | None:
    """Returns the state that learning continues from; None if its blob is corrupt."""
    try:
        return load_state(config, model, row, fresh=fresh)
    except blobs.BadBlob:
        return None


def _learn_and_judge(
    config: Config, model: SourceModel, job: ShardJob, windows: Sequence[Window]
) -> list[ShardRow]:
    method = config.site
    streams = [features_of(w.block) for w in windows]
    start = teaching.start(config, model, windows)
    states, traces = bank.run(
        method, model.tail, start, streams, batch=config.bank.batch_size, slots=config.bank.slots
    )
    blob = blobs.put(config.place("states"), states)
    anchor = load_anchor(config.place("anchors"), job.anchor)
    cache = anchor_score_cache(job.anchor, job.checkpoint)
    scored = [stream_scores(model, w, slot_of(states, k), streams[k]) for k, w in enumerate(windows)]
    judged = judge(config, model, anchor, windows, states, traces, scored=scored, cache=cache)
    outcomes = blobs.put(config.place("outcomes"), _outcomes(windows, traces, scored))
    ends = np.cumsum([len(w.block) for w in windows]).tolist()
    return [
        ShardRow(
            site=w.row.site,
            offset_from=w.row.learned_offset,
            offset_to=w.row.ingested_offset,
            source_version=job.source_version,
            method=method.kind,
            blob=blob if len(w.block) or w.learns_anew else None,
            slot=k,
            parent=w.parent,
            window=_window_record(job, w, traces[k], outcomes_blob=outcomes, row_end=ends[k]),
            verdict=verdict,
            evidence=evidence,
        )
        for k, (w, (evidence, verdict)) in enumerate(zip(windows, judged, strict=True))
    ]


def _outcomes(
    windows: Sequence[Window], traces: Sequence[bank.Trace], scored: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Returns what reports and scoring need per sample, site after site.

    ``before`` is the score by the champion, ``online`` the score before learning, ``after`` that by the
    candidate.
    """
    return {
        "offset": torch.from_numpy(np.concatenate([w.block.offset for w in windows])),
        "present": torch.from_numpy(np.concatenate([w.block.present for w in windows])),
        "before": torch.cat([before for before, _ in scored]),
        "after": torch.cat([after for _, after in scored]),
        "online": torch.cat([t.score for t in traces]),
        **{
            n: torch.cat([getattr(t, n) for t in traces])
            for n in ("pseudo_label", "disagreement", "omega", "instability")
        },
    }


def _window_record(
    job: ShardJob, w: Window, trace: bank.Trace, *, outcomes_blob: str, row_end: int
) -> WindowRecord:
    """Returns the record of a window that ends at row ``row_end`` of the outcomes blob of its call."""
    samples, labels = len(w.block), trace.pseudo_label
    return WindowRecord(
        samples=samples,
        outcomes_blob=outcomes_blob,
        row_start=row_end - samples,
        row_end=row_end,
        anchor_digest=job.anchor,
        champion_state=w.champion_state,
        lost_state=w.corrupt_parent,
        accepted_bona_fide=int((labels == 1).sum()),
        accepted_attack=int((labels == 0).sum()),
        called_bona_fide_share=float((trace.score >= 0.5).sum()) / max(samples, 1),
        restores=int(trace.restored.sum()),
        omega=float(trace.omega[-1]) if samples else None,
        sessions=len(np.unique(w.block.session)),
    )
