"""A fleet in a ledger, as ``palisade bench rollout`` needs it: sites with passing candidates, and nothing that adaptation costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import rollout as machine
from pipeline.guards import Cell, Evidence, GuardsConfig, assess
from pipeline.ledger import Ledger, SegmentRow, ShardRow, state_id
from pipeline.rollout import Candidate, Pointer, Rollout, SiteFacts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from pipeline.ledger import Cycle, RolloutRow
    from pipeline.rollout import Draft, RolloutConfig

SOURCE = Pointer(None, 1)
SAMPLES = 60  # captures in a segment: more than rollout.health_samples
CHUNK = 5000  # sites in one commit
CELLS = tuple(Cell(pattern="all", species=s, n=600, errors=0, worse=0, better=0) for s in ("print", "bona_fide"))
GOOD = Evidence(cells=CELLS, trust_ratio=0.01, margin_drop=0.0, stream_n=500, age_seconds=1.0, finite=True)
PEOPLE = ("ann", "ben")


def found(path: Path, tags: Mapping[str, Mapping[str, str]], at: datetime) -> Ledger:
    """A new ledger with a source model and these sites."""
    ledger = Ledger.open(f"sqlite:///{path}")
    ledger.add_source("d" * 64, trunk="t" * 64, path="source", manifest={}, lineage="", now=at)
    ledger.register_sites(tags, now=at)
    return ledger


def begin(ledger: Ledger, at: datetime) -> Cycle:
    """The next cycle; nobody else is there."""
    return ledger.begin_cycle("cycle", "bench", "{}", holder="bench", dead=lambda _: True, now=at)


def learn(ledger: Ledger, ends: Mapping[str, int], at: datetime) -> dict[str, Candidate]:
    """A cycle in which every site, ``ends`` being its place in its stream, gets a candidate that passes."""
    cycle, verdict = begin(ledger, at), assess(GuardsConfig(), GOOD)
    for part in _parts(list(ends)):
        rows = [
            ShardRow(site=s, offset_from=ends[s], offset_to=ends[s] + 1, source_version=1, method="danet", blob="b" * 64,
                     slot=i, parent=None, counters={}, verdict=verdict, evidence=GOOD)
            for i, s in enumerate(part)
        ]  # fmt: skip
        ledger.commit_shard(cycle, rows, now=at)
    ledger.finish_cycle(cycle, summary={}, now=at)
    ids = {s: state_id(cycle.id, s) for s in ends}
    return {s: Candidate(Pointer(i, 1), i, verdict.outcome) for s, i in ids.items()}


def report(ledger: Ledger, ends: Mapping[str, int], name: str, at: datetime) -> int:
    """Sites, ``ends`` being how far their streams are stored, bring a segment each → how many of them had before."""
    cycle, again = begin(ledger, at), 0
    for part in _parts(list(ends)):
        rows = [SegmentRow(s, name, "d" * 64, SAMPLES, ends[s], SAMPLES, 0) for s in part]
        again += len(ledger.commit_ingest(cycle, rows, [], now=at))
    ledger.finish_cycle(cycle, summary={}, now=at)
    return again


def planned(ledger: Ledger, release: str, facts: Mapping[str, SiteFacts], config: RolloutConfig, at: datetime) -> Draft:
    """Plan a release and store it."""
    draft = machine.plan(release, facts, SOURCE.source_version, config)
    r = machine.start(draft.plan, at)
    ledger.save_rollout(
        release, plan_hash=r.plan_hash, status=r.status, body=r.model_dump_json(), revision=0,
        event={"event": "planned", "sites": len(draft.targets)}, now=at, draft=draft,
    )  # fmt: skip
    return draft


def approved(r: Rollout, row: RolloutRow, at: datetime, people: Sequence[str] = PEOPLE) -> Rollout:
    """With the approval of ``people``."""
    for who in people:
        r = machine.approve(r, hash=row.plan_hash, who=who, now=at)
    return r


def _parts(names: list[str]) -> list[list[str]]:
    return [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
