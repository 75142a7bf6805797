"""Garbage goes, and nothing that anybody may still need: after gc every pointer verifies."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import gc
from jobs.__main__ import main
from pipeline.control.scoring import join_labels
from pipeline.data import blobs
from pipeline.ledger import Needed
from pipeline.storage import TEMPORARY, StoredFile, files
from tests.support.garbage import SITES, begun, verify
from tests.support.ledgers import BAD, GOOD, T0


@pytest.fixture
def fleet(tmp_path):
    return begun(tmp_path)


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
    served = fleet.ledger.releases.history("east")
    fleet.ledger.releases.serve(
        {"east": (served[1].state, 1)}, rollout="r", wave=1, kind="rollback", reason="", now=fleet.now
    )
    fleet.day += 50
    fleet.collect(keep=0)
    kept = fleet.ledger.verdicts.states([r.state for r in served[1:]])
    assert len(kept) == 2
    for state in kept.values():
        blobs.get(fleet.config.place("states"), state.blob)


def test_scoring_goes_without_what_was_collected(fleet):
    fleet.day += 10
    fleet.window(SITES, GOOD)
    fleet.day += 10
    fleet.collect(keep=5)
    (row,) = fleet.ledger.sources.all()
    assert join_labels(fleet.config, row, fleet.ledger.verdicts.find(site="east")) is None


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
    file = StoredFile(Path(*inside), inside, 1, T0)
    pointed = Needed(frozenset(), frozenset(), {"east": 8})
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
    before = {f.parts for f in files(fleet.config.place())}
    assert run(fleet, "gc", "--dry-run", "--json") == 0
    counted = json.loads(capsys.readouterr().out)
    assert {f.parts for f in files(fleet.config.place())} == before
    assert [c.kind for c in fleet.ledger.cycles.history()] == ["cycle"] * 2, "a dry run takes no lease"
    assert run(fleet, "gc", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == counted["files"] > 0
    assert told["states"]["files"] == 1
    assert len(before) - len(list(files(fleet.config.place()))) == told["files"]
    assert told["bytes"] == sum(told[k]["bytes"] for k in gc.KINDS) > 0
    assert run(fleet, "gc") == 0
    assert "0 files, 0.0 MiB deleted" in capsys.readouterr().out
    assert {c.kind: c.status for c in fleet.ledger.cycles.history()} == {
        "gc": "finished",
        "cycle": "finished",
    }


def test_gc_waits_for_a_cycle_that_has_not_ended(fleet, capsys):
    """A cycle whose lease has expired is resumed later, so gc keeps what it needs."""
    cycle = fleet.ledger.cycles.begin("cycle", "f", "{}", holder="gone", dead=lambda _: False, now=T0)
    assert run(fleet, "gc") == 5
    said = capsys.readouterr().err
    assert f"{cycle.id} has not ended; wait for it, or end it with `palisade cycle`" in said
    assert said.count("\n") == 1
    assert fleet.ledger.cycles.history()[0].status == "running"
