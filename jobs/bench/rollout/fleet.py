"""A fleet in a ledger for ``palisade bench rollout``: sites with candidates, and nothing that adaptation
costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pipeline import rollout as machine
from pipeline.guards import Cell, Evidence, GuardsConfig, assess
from pipeline.ledger import Ledger, SegmentRow, ShardRow, Store, WindowRecord, state_id
from pipeline.models import ModelConfig
from pipeline.models.manifest import Manifest
from pipeline.rollout import Candidate, Pointer, Rollout, SiteFacts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from pipeline.ledger import Cycle, RolloutRow
    from pipeline.rollout import Draft, RolloutConfig

T = TypeVar("T")
SOURCE = Pointer(None, 1)
SAMPLES = 60  # captures in a segment: more than rollout.health_samples
CHUNK = 5000  # sites in one commit
CELLS = tuple(
    Cell(pattern="all", species=s, n=600, errors=0, worse=0, better=0) for s in ("print", "bona_fide")
)
GOOD = Evidence(cells=CELLS, trust_ratio=0.01, margin_drop=0.0, stream_n=500, age_seconds=1.0, finite=True)
BAD = GOOD.model_copy(update={"trust_ratio": 0.5})
PEOPLE = ("ann", "ben")


class Crash(Exception):
    """The driver died."""


class MortalStore(Store):
    """Dies now and then within a transaction, so that nothing of that one is stored but all before it."""

    left = -1  # audited writes until it dies; negative: it does not

    def append(self, c, kind, payload, now) -> None:  # pyright: ignore
        super().append(c, kind, payload, now)
        if self.left == 0:
            self.left = -1
            raise Crash
        self.left -= self.left > 0


def found(path: Path, tags: Mapping[str, Mapping[str, str]], at: datetime) -> Ledger:
    """A new ledger with a source model and these sites."""
    ledger = Ledger.open(f"sqlite:///{path}")
    manifest = Manifest(
        config=ModelConfig(), size=112, threshold=0.5, method="rise", digest="d" * 64, trunk_digest="t" * 64
    )
    ledger.sources.add(manifest, path="source", lineage="", now=at)
    ledger.streams.register(tags, now=at)
    return ledger


def begin(ledger: Ledger, at: datetime) -> Cycle:
    """The next cycle; nobody else is there."""
    return ledger.cycles.begin("cycle", "bench", "{}", holder="bench", dead=lambda _: True, now=at)


def learn(
    ledger: Ledger, ends: Mapping[str, int], at: datetime, *, failing: Collection[str] = ()
) -> dict[str, Candidate]:
    """A cycle in which every site, ``ends`` being its place in its stream, gets a candidate; all but
    ``failing`` pass.
    """
    cycle = begin(ledger, at)
    judged = {e: assess(GuardsConfig(), e) for e in (GOOD, BAD)}
    made: dict[str, Candidate] = {}
    for part in _parts(list(ends)):
        rows: list[ShardRow] = []
        for i, s in enumerate(part):
            evidence = BAD if s in failing else GOOD
            rows.append(
                ShardRow(
                    site=s,
                    offset_from=ends[s],
                    offset_to=ends[s] + 1,
                    source_version=1,
                    method="danet",
                    blob="b" * 64,
                    slot=i,
                    parent=None,
                    window=WindowRecord(samples=1),
                    verdict=judged[evidence],
                    evidence=evidence,
                )
            )
            own = state_id(cycle.id, s)
            made[s] = Candidate(Pointer(own, 1), own, judged[evidence].outcome, judged[evidence].decisive)
        ledger.verdicts.commit(cycle, rows, now=at)
    ledger.cycles.finish(cycle, summary={}, now=at)
    return made


def report(ledger: Ledger, segments: Sequence[tuple[str, str, int]], at: datetime) -> int:
    """(site, name, offset) of segments that arrived → how many of them had before."""
    cycle, again = begin(ledger, at), 0
    for part in _parts(segments):
        rows = [SegmentRow(site, name, "d" * 64, SAMPLES, base, SAMPLES, 0) for site, name, base in part]
        again += len(ledger.streams.commit(cycle, rows, [], now=at))
    ledger.cycles.finish(cycle, summary={}, now=at)
    return again


def planned(
    ledger: Ledger, release: str, facts: Mapping[str, SiteFacts], config: RolloutConfig, at: datetime
) -> Draft:
    """Plan a release and store it."""
    draft = machine.plan(release, facts, SOURCE.source_version, config)
    r = machine.start(draft.plan, at)
    ledger.plans.save(
        release,
        plan_hash=r.plan_hash,
        status=r.status,
        body=r.model_dump_json(),
        revision=0,
        event={"event": "planned", "sites": len(draft.targets)},
        now=at,
        draft=draft,
    )
    return draft


def approved(r: Rollout, row: RolloutRow, at: datetime, people: Sequence[str] = PEOPLE) -> Rollout:
    """With the approval of ``people``."""
    for who in people:
        r = machine.approve(r, hash=row.plan_hash, who=who, now=at)
    return r


def _parts(values: Sequence[T]) -> list[Sequence[T]]:
    return [values[i : i + CHUNK] for i in range(0, len(values), CHUNK)]
