"""Garbage goes, and nothing that anybody may still need: after gc every pointer verifies."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import gc
from jobs.__main__ import main
from pipeline.config import Config, load
from pipeline.control.scoring import join_labels
from pipeline.data import blobs
from pipeline.data.features import FeatureBlock, read_features, write_features
from pipeline.guards import Cell, Evidence, GuardsConfig, assess
from pipeline.ledger import Ledger, Pointed, SegmentRow, ShardRow
from pipeline.rollout import Draft, Pointer, RolloutConfig, Target, plan
from pipeline.storage import TEMPORARY, Stored, files

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TRUNK, F = "a" * 64, 4
SITES = ("east", "west")
CELLS = tuple(
    Cell(pattern="all", species=s, n=600, errors=0, worse=0, better=0) for s in ("print", "bona_fide")
)
GOOD = Evidence(cells=CELLS, trust_ratio=0.01, margin_drop=0.0, stream_n=500, age_seconds=1.0, finite=True)
BAD = GOOD.model_copy(update={"trust_ratio": 0.5})
WINDOW = 4  # samples


@dataclass
class Fleet:
    """A deployment of two sites, moved on day by day; every blob and feature file is real and as old as its day."""

    config: Config
    ledger: Ledger
    day: int = 0

    @property
    def now(self) -> datetime:
        return T0 + timedelta(days=self.day)

    def window(self, sites: tuple[str, ...], evidence: Evidence, *, commit: bool = True) -> None:
        """Ingest and adapt ``sites`` on this day; without ``commit`` the shard dies after its blobs were written."""
        cycle = self.ledger.begin_cycle(
            "cycle", f"day {self.day}", "{}", holder="x", dead=lambda _: True, now=self.now
        )
        rows = []
        for site in sites:
            base = self.ledger.site(site).ingested
            n = np.arange(base, base + WINDOW)
            self.aged(write_features(self.config.place("features"), TRUNK, site, block(n)))
            segment = SegmentRow(site, f"segment-{base}.parquet", "d" * 64, WINDOW, base, WINDOW, 0)
            self.ledger.commit_ingest(cycle, [segment], [], now=self.now)
        state = self.blob("states", {"w": torch.full((len(sites),), float(self.day))})
        for k, site in enumerate(sites):
            row = self.ledger.site(site)
            outcomes = self.blob("outcomes", {"score": torch.full((2,), self.day + 0.1 * k)})
            rows.append(
                ShardRow(
                    site=site,
                    offset_from=row.learned,
                    offset_to=row.ingested,
                    source_version=1,
                    method="danet",
                    blob=state,
                    slot=k,
                    parent=row.learner,
                    counters={"samples": WINDOW, "outcomes": outcomes, "rows": [0, WINDOW]},
                    verdict=assess(GuardsConfig(), evidence),
                    evidence=evidence,
                )
            )
        if commit:
            assert self.ledger.commit_shard(cycle, rows, now=self.now) == []
        self.ledger.finish_cycle(cycle, summary={}, now=self.now)

    def promote(self, site: str) -> None:
        """The newest passing state of ``site`` by a completed rollout of one site."""
        passed = [v for v in self.ledger.verdicts(site=site) if v.verdict.outcome == "pass"]
        if passed:
            name = f"release-{self.day}-{site}"
            target = Target(0, Pointer(passed[-1].state, 1), Pointer(None, 1), passed[-1].id)
            draft = Draft(plan(name, {}, 1, RolloutConfig()).plan, {site: target}, {}, ())
            self.ledger.save_rollout(
                name,
                plan_hash="h",
                status="completed",
                body="{}",
                revision=0,
                event={},
                now=self.now,
                draft=draft,
            )
            self.ledger.serve(
                {site: (passed[-1].state, 1)}, rollout=name, wave=1, kind="promote", reason="", now=self.now
            )

    def blob(self, folder: str, tensors: dict[str, torch.Tensor]) -> str:
        digest = blobs.put(self.config.place(folder), tensors)
        self.aged(self.config.place(folder) / digest[:2] / f"{digest}.safetensors")
        return digest

    def aged(self, path) -> None:
        os.utime(path, (self.now.timestamp(),) * 2)

    def collect(self, *, keep: int = 5, grace: float = 24.0) -> gc.Garbage:
        found = gc.garbage(
            self.config, self.ledger, at=self.now, keep=timedelta(days=keep), grace=timedelta(hours=grace)
        )
        for kind in gc.KINDS:
            for file in found[kind]:
                file.place.unlink()
        return found


def block(offset: np.ndarray) -> FeatureBlock:
    n = len(offset)
    return FeatureBlock(
        offset=offset,
        sample_id=np.array([f"s{i}" for i in offset], dtype=object),
        captured_at=np.datetime64("2026-01-01T00:00:00", "us") + offset,
        session=offset,
        present=np.full(n, 7, np.uint8),
        z=np.zeros((n, 3, F), np.float16),
    )


def begun(root: Path) -> Fleet:
    config = load(None, [f"ledger.url=sqlite:///{root}/ledger.db", f"ledger.artifacts={root}/artifacts"])
    ledger = Ledger.open(config.ledger.url)
    ledger.register_sites({s: {} for s in SITES}, now=T0)
    ledger.add_source("s" * 64, trunk=TRUNK, path=str(root / "m"), manifest={}, lineage="", now=T0)
    return Fleet(config, ledger)


@pytest.fixture
def fleet(tmp_path):
    return begun(tmp_path)


def verify(f: Fleet, *, keep: int) -> None:
    """Everything that a shard, a rollback, a report of the last ``keep`` days or a rollout reads."""
    ledger, since = f.ledger, f.now - timedelta(days=keep)
    needed = {s.learner for s in ledger.sites()} | {s.state for s in ledger.serving().values()}
    for site in SITES:
        promoted = [r.state for r in ledger.served(site) if r.kind == "promote"]
        needed |= set(promoted[-1:])
        row = ledger.site(site)
        recent = [v for v in ledger.verdicts(site=site) if v.at >= since]
        for v in recent:
            blobs.get(f.config.place("outcomes"), str(v.counters["outcomes"]))
            needed.add(v.state)
        start = min([row.learned, *(v.offset_from for v in recent)])
        kept = read_features(
            f.config.place("features"), TRUNK, site, start=start, end=row.ingested, features=F
        )
        assert kept.offset.tolist() == list(range(start, row.ingested))
    for state in ledger.states(sorted(needed - {None})).values():
        assert blobs.get(f.config.place("states"), state.blob)["w"].shape[0] > state.slot


steps = st.lists(
    st.tuples(
        st.sampled_from(["good", "bad", "crash", "promote", "quiet", "gc"]),
        st.sampled_from([("east",), ("west",), SITES]),
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=12)
@given(steps=steps, keep=st.integers(0, 6))
def test_after_gc_every_pointer_verifies(tmp_path_factory, steps, keep):
    f = begun(tmp_path_factory.mktemp("fleet"))
    for what, sites in steps:
        f.day += 2
        if what in ("good", "bad", "crash"):
            f.window(sites, BAD if what == "bad" else GOOD, commit=what != "crash")
        elif what == "promote":
            f.promote(sites[0])
        elif what == "gc":
            f.collect(keep=keep)
        verify(f, keep=keep)
    f.day += 2
    f.collect(keep=keep)
    verify(f, keep=keep)
    assert all(not v for v in f.collect(keep=keep).values()), "a second run finds nothing"


def test_what_nothing_points_to_goes(fleet):
    for _ in range(4):
        fleet.day += 10
        fleet.window(SITES, GOOD)
    fleet.window(("east",), GOOD, commit=False)
    lost = fleet.config.place("models") / "m" / f"{TEMPORARY}ff"
    lost.parent.mkdir(parents=True)
    lost.write_bytes(b"half")
    fleet.aged(lost)
    other = fleet.config.place("states") / "README"
    other.write_bytes(b"somebody's")
    fleet.aged(other)
    fleet.day += 2
    found = fleet.collect(keep=5)
    assert {k: len(v) for k, v in found.items()} == {
        "states": 4,
        "outcomes": 6,
        "features": 6,
        "temporary": 1,
    }
    assert other.exists(), "what has no name of ours is left alone"
    assert not lost.exists()
    verify(fleet, keep=5)


def test_the_young_stay_though_nothing_points_to_them_yet(fleet):
    fleet.day += 10
    fleet.window(("east",), GOOD, commit=False)
    assert not any(fleet.collect(keep=0).values())
    fleet.day += 1
    assert not any(fleet.collect(keep=0, grace=24).values())
    assert [len(v) for v in fleet.collect(keep=0, grace=23).values()] == [1, 1, 0, 0]


def test_what_was_promoted_before_stays_for_a_rollback(fleet):
    for _ in range(3):
        fleet.day += 50
        fleet.window(("east",), GOOD)
        fleet.promote("east")
    served = fleet.ledger.served("east")
    fleet.ledger.serve(
        {"east": (served[1].state, 1)}, rollout="r", wave=1, kind="rollback", reason="", now=fleet.now
    )
    fleet.day += 50
    fleet.collect(keep=0)
    kept = fleet.ledger.states([r.state for r in served[1:]])
    assert len(kept) == 2
    for state in kept.values():
        blobs.get(fleet.config.place("states"), state.blob)


def test_scoring_goes_without_what_was_collected(fleet):
    fleet.day += 10
    fleet.window(SITES, GOOD)
    fleet.day += 10
    fleet.collect(keep=5)
    (row,) = fleet.ledger.sources()
    assert join_labels(fleet.config, row, fleet.ledger.verdicts(site="east")) is None


@pytest.mark.parametrize(
    ("inside", "needed"),
    [
        (("features", "a" * 16, "site=east", "000000000000-000000000007.parquet"), False),
        (("features", "a" * 16, "site=east", "000000000000-000000000009.parquet"), True),
        (("features", "a" * 16, "site=gone", "000000000000-000000000009.parquet"), False),
        (("features", "b" * 16, "site=east", "000000000000-000000000009.parquet"), False),
        (("features", "a" * 16, "site=east", "notes.txt"), True),
        (("features", "notes.parquet"), True),
        (("anchors", "ab", "ab.safetensors"), True),
        (("models", "m", "model.safetensors"), True),
        (("reports", "cycle-00001.html"), True),
    ],
)
def test_by_its_name(inside, needed):
    file = Stored(Path(*inside), inside, 1, T0)
    pointed = Pointed(frozenset(), frozenset(), {"east": 8})
    found = gc.condemned([file], pointed, {"a" * 16}, before=T0 + timedelta(seconds=1))
    assert [f for v in found.values() for f in v] == ([] if needed else [file])
    assert not any(gc.condemned([file], pointed, {"a" * 16}, before=T0).values()), "not older than the grace"


def run(fleet, *words):
    root = Path(fleet.config.ledger.artifacts).parent
    return main([*words, f"ledger.url=sqlite:///{root}/ledger.db", f"ledger.artifacts={root}/artifacts"])


def test_the_command_counts_then_deletes_then_finds_nothing(fleet, capsys):
    for _ in range(2):
        fleet.day += 10
        fleet.window(SITES, GOOD)
    before = {f.inside for f in files(fleet.config.place())}
    assert run(fleet, "gc", "--dry-run", "--json") == 0
    counted = json.loads(capsys.readouterr().out)
    assert {f.inside for f in files(fleet.config.place())} == before
    assert [c.kind for c in fleet.ledger.cycles()] == ["cycle"] * 2, "a dry run takes no lease"
    assert run(fleet, "gc", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == counted["files"] > 0
    assert told["states"]["files"] == 1
    assert len(before) - len(list(files(fleet.config.place()))) == told["files"]
    assert told["bytes"] == sum(told[k]["bytes"] for k in gc.KINDS) > 0
    assert run(fleet, "gc") == 0
    assert "0 files, 0.0 MiB deleted" in capsys.readouterr().out
    assert {c.kind: c.status for c in fleet.ledger.cycles()} == {"gc": "finished", "cycle": "finished"}


def test_gc_waits_for_a_cycle_that_has_not_ended(fleet, capsys):
    """Its lease may have run out: it would be resumed, and gc must not take that from it."""
    cycle = fleet.ledger.begin_cycle("cycle", "f", "{}", holder="gone", dead=lambda _: False, now=T0)
    assert run(fleet, "gc") == 5
    said = capsys.readouterr().err
    assert f"{cycle.id} has not ended; wait for it, or end it with `palisade cycle`" in said
    assert said.count("\n") == 1
    assert fleet.ledger.cycles()[0].status == "running"
