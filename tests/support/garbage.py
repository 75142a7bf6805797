"""Two sites over many days, with real blobs and feature files, for tests of garbage collection."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch

from jobs import gc
from pipeline.config import Config, load
from pipeline.data import blobs
from pipeline.data.features import read_features, write_features
from pipeline.guards import Evidence
from pipeline.ledger import Ledger
from pipeline.rollout import Draft, Pointer, RolloutConfig, Target, plan
from tests.support.artifacts import TRUNK, F, block
from tests.support.ledgers import T0, begin, segment, shard, source_manifest

SITES = ("east", "west")

WINDOW = 4  # samples


@dataclass
class Fleet:
    """A deployment of two sites that moves on by days; every blob and feature file is as old as its day."""

    config: Config
    ledger: Ledger
    day: int = 0

    @property
    def now(self) -> datetime:
        return T0 + timedelta(days=self.day)

    def window(self, sites: tuple[str, ...], evidence: Evidence, *, commit: bool = True) -> None:
        """Ingests and adapts ``sites`` on this day; without ``commit`` the shard dies after its blobs."""
        cycle = begin(self.ledger, fingerprint=f"day {self.day}", dead=lambda _: True, now=self.now)
        rows = []
        for site in sites:
            base = self.ledger.streams.site(site).ingested_offset
            features = block(WINDOW, start=base)
            self.aged(write_features(self.config.place("features"), TRUNK, site, features))
            arrived = segment(site, f"segment-{base}.parquet", base, WINDOW, good=WINDOW)
            self.ledger.streams.commit(cycle, [arrived], [], now=self.now)
        state = self.blob("states", {"w": torch.full((len(sites),), float(self.day))})
        for k, site in enumerate(sites):
            row = self.ledger.streams.site(site)
            outcomes = self.blob("outcomes", {"score": torch.full((2,), self.day + 0.1 * k)})
            learned = {
                "evidence": evidence,
                "blob": state,
                "slot": k,
                "outcomes": outcomes,
                "parent": row.learner,
            }
            rows.append(shard(site, row.learned_offset, row.ingested_offset, **learned))
        if commit:
            assert self.ledger.verdicts.commit(cycle, rows, now=self.now) == []
        self.ledger.cycles.finish(cycle, summary={}, now=self.now)

    def promote(self, site: str) -> None:
        """The newest passing state of ``site`` by a completed rollout of one site."""
        passed = [v for v in self.ledger.verdicts.find(site=site) if v.verdict.outcome == "pass"]
        if passed:
            name = f"release-{self.day}-{site}"
            target = Target(0, Pointer(passed[-1].state, 1), Pointer(None, 1), passed[-1].id)
            draft = Draft(plan(name, {}, 1, RolloutConfig()).plan, {site: target}, {}, ())
            self.ledger.plans.save(
                name,
                plan_hash="h",
                status="completed",
                body="{}",
                revision=0,
                event={},
                now=self.now,
                draft=draft,
            )
            self.ledger.releases.serve(
                {site: (passed[-1].state, 1)}, rollout=name, wave=1, kind="promote", reason="", now=self.now
            )

    def blob(self, folder: str, tensors: dict[str, torch.Tensor]) -> str:
        digest = blobs.put(self.config.place(folder), tensors)
        self.aged(self.config.place(folder) / digest[:2] / f"{digest}.safetensors")
        return digest

    def aged(self, path) -> None:
        os.utime(path, (self.now.timestamp(),) * 2)

    def collect(self, *, keep: int = 5, grace: float = 24.0) -> gc.Garbage:
        found = gc.list_garbage(
            self.config, self.ledger, at=self.now, keep=timedelta(days=keep), grace=timedelta(hours=grace)
        )
        for kind in gc.KINDS:
            for file in found[kind]:
                file.place.unlink()
        return found


def begun(root: Path) -> Fleet:
    config = load(None, [f"ledger.url=sqlite:///{root}/ledger.db", f"ledger.artifacts={root}/artifacts"])
    ledger = Ledger.open(config.ledger.url)
    ledger.streams.register({s: {} for s in SITES}, now=T0)
    ledger.sources.add(source_manifest("s" * 64, trunk=TRUNK), path=str(root / "m"), lineage="", now=T0)
    return Fleet(config, ledger)


def verify(f: Fleet, *, keep: int) -> None:
    """Everything that a shard, a rollback, a report of the last ``keep`` days or a rollout reads."""
    ledger, since = f.ledger, f.now - timedelta(days=keep)
    needed = {s.learner for s in ledger.streams.sites()} | {
        s.state for s in ledger.releases.serving().values()
    }
    for site in SITES:
        promoted = [r.state for r in ledger.releases.history(site) if r.kind == "promote"]
        needed |= set(promoted[-1:])
        row = ledger.streams.site(site)
        recent = [v for v in ledger.verdicts.find(site=site) if v.at >= since]
        for v in recent:
            blobs.get(f.config.place("outcomes"), v.window.outcomes_blob)
            needed.add(v.state)
        start = min([row.learned_offset, *(v.offset_from for v in recent)])
        kept = read_features(
            f.config.place("features"), TRUNK, site, start=start, end=row.ingested_offset, features=F
        )
        assert kept.offset.tolist() == list(range(start, row.ingested_offset))
    for state in ledger.verdicts.states(sorted(needed - {None})).values():
        assert blobs.get(f.config.place("states"), state.blob)["w"].shape[0] > state.slot
