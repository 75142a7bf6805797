"""Sites go over to another trunk: which samples are retained, and nothing else of them moves; no Ray."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.control import adapt as shard
from pipeline.control import loaders
from pipeline.control.deployment import now
from pipeline.control.rebase import retained_segments, unbroken_suffix
from pipeline.data.anchor import open_sealed, seal
from pipeline.data.features import delete_range, read_features, write_features
from pipeline.ledger import Cycle, SegmentRow
from pipeline.models import checkpoint
from pipeline.models.trunk import build_trunk, fold
from tests.support.crowds import CROWD, FEATURES, LENGTH, SITES, Crowd, new_crowd
from tests.support.ledgers import begin, register_source, segment

if TYPE_CHECKING:
    from collections.abc import Sequence

EACH = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda r: (r[0], min(r)))  # rows, of which good
DAYS = 3
ADVISORY = ("noninferiority", "trust", "ratchet", "influence", "labels", "modality", "collapse")
# which states pass is not the subject here
SETTINGS = {**CROWD, **{f"guards.{guard}": {"advisory": True} for guard in ADVISORY}}


def stream(counts: Sequence[tuple[int, int]]) -> list[SegmentRow]:
    base, made = 0, list[SegmentRow]()
    for k, (rows, good) in enumerate(counts):
        made.append(segment("gate", f"segment-{k}.parquet", base, rows, good=good))
        base += rows
    return made


@given(st.lists(EACH, max_size=8), st.integers(1, 12), st.integers(0, 8))
def test_the_newest_whole_segments_are_retained_that_hold_so_many_samples(counts, samples, ahead):
    rows = stream(counts)
    behind = rows[: max(0, len(rows) - ahead)]
    learned = sum(r.rows for r in behind)
    kept = retained_segments(rows, learned=learned, samples=samples)
    assert list(kept) == [r for r in behind if r.rows][len([r for r in behind if r.rows]) - len(kept) :]
    good = sum(r.good for r in kept)
    assert good >= samples or len(kept) == len([r for r in behind if r.rows])
    assert not kept or good - kept[0].good < samples, "not one segment more"


@given(st.lists(st.tuples(EACH, st.booleans()), max_size=8))
def test_what_lies_before_a_hole_is_not_retained(counts):
    rows = stream([c for c, _ in counts])
    whole = {r.name for r, (_, there) in zip(rows, counts, strict=True) if there}
    kept = unbroken_suffix(rows, lambda r: r.name in whole)
    assert list(kept) == rows[len(rows) - len(kept) :]
    assert {r.name for r in kept} <= whole
    assert len(kept) == len(rows) or rows[-len(kept) - 1].name not in whole


@pytest.fixture
def crowd(tmp_path) -> Crowd:
    """Two days are learned, a third has arrived; version 2 has its own trunk, features and anchor set."""
    root = tmp_path / "d"
    root.mkdir()
    crowd = new_crowd(root, SETTINGS, days=DAYS)
    for day in range(DAYS):
        crowd.arrive(day)
        if day < DAYS - 1:
            adapted(crowd)
    challenge(crowd)
    return crowd


def challenge(crowd: Crowd) -> None:
    config, ledger, store = crowd.d.config, crowd.ledger, crowd.d.config.place("features")
    one = ledger.sources.champion()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trunk = fold(build_trunk(config.model.trunk, config.data.frame_px))
    model = checkpoint.load(one.path)
    path = config.place("models", "other")
    manifest = model.manifest.model_copy(update={"method": "rise"})
    checkpoint.save(
        path, checkpoint.SourceModel(trunk, {n: t * 1.01 for n, t in model.tail.items()}, manifest)
    )
    m = checkpoint.read_manifest(path)
    register_source(ledger, path, now=now())
    anchor = open_sealed(config.place("anchors"), ledger.verdicts.anchor(one.trunk))
    ledger.verdicts.pin_anchor(
        seal(config.place("anchors"), replace(anchor, z=anchor.z * 2)),
        trunk=m.trunk_digest,
        summary={},
        now=now(),
    )
    for site, n in LENGTH.items():
        for day in range(DAYS):
            block = read_features(store, one.trunk, site, start=day * n, end=(day + 1) * n, features=FEATURES)
            write_features(store, m.trunk_digest, site, replace(block, z=block.z * 2))


def adapted(crowd: Crowd) -> None:
    cycle = crowd.begin()
    assert shard.adapt_sites(shard.shard_job(crowd.d.config, crowd.ledger, cycle), SITES) == {}
    crowd.ledger.cycles.finish(cycle, summary={}, now=now())


def begun(crowd: Crowd) -> Cycle:
    return begin(crowd.ledger, kind="rebase", fingerprint="f v2", dead=lambda _: True, now=now())


def rebased(crowd: Crowd, cycle: Cycle, samples: int = 1000) -> dict[str, str]:
    return shard.adapt_sites(
        shard.shard_job(crowd.d.config, crowd.ledger, cycle, version=2, retained=samples), SITES
    )


def state(crowd: Crowd, of: str) -> dict[str, torch.Tensor]:
    return loaders.load_state(
        crowd.d.config, loaders.load_model(crowd.ledger.sources.get(2).path), crowd.ledger.verdicts.state(of)
    )


def test_a_rebase_makes_candidates_and_moves_nothing(crowd):
    before = (
        crowd.ledger.streams.sites(),
        crowd.ledger.releases.serving(),
        crowd.ledger.verdicts.find(),
        crowd.ledger.verdicts.latest(),
    )
    cycle = begun(crowd)
    assert rebased(crowd, cycle) == {}
    made = crowd.ledger.verdicts.rebased(2)
    assert made.keys() == set(SITES)
    for site, v in made.items():
        assert (v.offset_from, v.offset_to) == (0, 2 * LENGTH[site]), (
            "what is not learned yet is left to be learned once"
        )
        row = crowd.ledger.verdicts.state(v.state)
        assert (row.source_version, row.parent) == (2, None)
    assert rebased(crowd, cycle) == {}, "a shard that comes again"
    assert crowd.ledger.verdicts.rebased(2) == made
    assert (
        crowd.ledger.streams.sites(),
        crowd.ledger.releases.serving(),
        crowd.ledger.verdicts.find(),
        crowd.ledger.verdicts.latest(),
    ) == before
    assert crowd.ledger.verdicts.rebased(1) == crowd.ledger.verdicts.rebased(2, fingerprint="another") == {}
    assert crowd.ledger.verdicts.rebased(2, fingerprint="f v2") == made
    assert {v.id for v in crowd.ledger.verdicts.find(cycle=cycle.id)} == {v.id for v in made.values()}


def test_a_rebase_learns_what_a_site_under_that_model_would_have_learned(crowd, tmp_path):
    assert rebased(crowd, begun(crowd)) == {}
    crowd.ledger.sources.set_champion(2, now=now())
    (tmp_path / "same").mkdir()
    same = new_crowd(tmp_path / "same", SETTINGS, days=DAYS)
    challenge(same)
    same.ledger.sources.set_champion(2, now=now())
    for day in range(DAYS - 1):
        same.arrive(day)
    adapted(same)  # both days in one window
    for site, v in crowd.ledger.verdicts.rebased(2).items():
        mine, theirs = state(crowd, v.state), state(same, same.ledger.streams.site(site).learner)
        assert all(torch.equal(t, theirs[n]) for n, t in mine.items()), site


def test_a_hole_in_the_features_ends_what_is_retained(crowd):
    store, trunk = crowd.d.config.place("features"), crowd.ledger.sources.get(2).trunk
    first, last = SITES[0], SITES[1]
    delete_range(store, trunk, first, start=0, end=1)
    delete_range(store, trunk, last, start=LENGTH[last], end=LENGTH[last] + 1)
    told = rebased(crowd, begun(crowd))
    assert told == {last: "nothing that it learned from has features of this source model"}
    made = crowd.ledger.verdicts.rebased(2)
    assert made.keys() == set(SITES) - {last}
    assert (made[first].offset_from, made[first].offset_to) == (LENGTH[first], 2 * LENGTH[first])
    assert made[SITES[2]].offset_from == 0


def test_after_the_release_a_site_goes_on_from_what_it_serves_and_after_a_rollback_from_what_it_had(crowd):
    rebased(crowd, begun(crowd))
    made, ledger = crowd.ledger.verdicts.rebased(2), crowd.ledger
    gone = {s: made[s] for s in SITES[:-2]}
    learners = {r.site: r.learner for r in ledger.streams.sites()}
    ledger.releases.serve(
        {s: (v.state, 2) for s, v in gone.items()}, rollout="r", wave=1, kind="promote", reason="", now=now()
    )
    ledger.sources.set_champion(2, now=now())
    adapted(crowd)
    rows = ledger.verdicts.states([r.learner for r in ledger.streams.sites()])
    for r in rows.values():
        assert r.source_version == 2
        assert r.parent == (gone[r.site].state if r.site in gone else None), r.site
        assert r.offset_from == 2 * LENGTH[r.site]
    ledger.releases.serve(
        {s: (learners[s], 1) for s in gone}, rollout="r", wave=1, kind="rollback", reason="", now=now()
    )
    ledger.sources.set_champion(1, now=now())
    for site, n in LENGTH.items():
        store, trunk = crowd.d.config.place("features"), ledger.sources.champion().trunk
        block = read_features(store, trunk, site, start=0, end=n, features=FEATURES)
        write_features(store, trunk, site, replace(block, offset=block.offset + DAYS * n))
    crowd.arrive(DAYS)
    adapted(crowd)
    for r in ledger.verdicts.states([r.learner for r in ledger.streams.sites()]).values():
        assert (r.source_version, r.parent) == (1, learners[r.site] if r.site in gone else None), r.site
