"""The work of a shard, without Ray: what it keeps between calls, and what it does when a blob is damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from pipeline.control import adapt as shard
from pipeline.control import judge, loaders
from pipeline.control.deployment import now
from pipeline.data import blobs
from pipeline.models import tail
from tests.support.artifacts import flip
from tests.support.crowds import CROWD, SITES, Crowd, new_crowd
from tests.support.deployments import new_deployment

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def crowd(tmp_path) -> Crowd:
    """Two days: the first is adapted, the second has arrived."""
    crowd = made(tmp_path / "d")
    for day in range(2):
        crowd.arrive(day)
        if day == 0:
            adapted(crowd)
    return crowd


def made(root: Path) -> Crowd:
    root.mkdir()
    return new_crowd(root)


def adapted(crowd: Crowd) -> None:
    cycle = crowd.begin()
    assert shard.adapt_sites(crowd.job(cycle), SITES) == {}
    crowd.ledger.cycles.finish(cycle, summary={}, now=now())


def forget() -> None:
    """Leaves the caches as a fresh process has them."""
    loaders.clear()


def test_a_hot_state_is_the_one_in_the_blob(crowd):
    adapted(crowd)  # the first day's states were never read: this process made them
    hot = loaders.state_cache(crowd.d.config.bank.cache_mb)
    rows = crowd.ledger.verdicts.states(
        [
            v.parent
            for v in crowd.ledger.verdicts.states([s.learner for s in crowd.ledger.streams.sites()]).values()
        ]
    )
    assert len(rows) == len(SITES)
    for row in rows.values():
        stored = blobs.get(crowd.d.config.place("states"), row.blob)
        assert all(torch.equal(t, stored[n][row.slot]) for n, t in hot[row.blob, row.slot].items())


def test_a_site_whose_own_state_is_damaged_goes_on_from_what_it_serves(crowd):
    forget()
    (blob,) = {
        s.blob
        for s in crowd.ledger.verdicts.states([s.learner for s in crowd.ledger.streams.sites()[:1]]).values()
    }
    path = crowd.d.config.place("states") / blob[:2] / f"{blob}.safetensors"
    flip(path)
    hit = {
        s.site
        for s in crowd.ledger.verdicts.states([r.learner for r in crowd.ledger.streams.sites()]).values()
        if s.blob == blob
    }
    adapted(crowd)
    newest = {v.site: v for v in crowd.ledger.verdicts.find() if v.offset_from > 0}
    assert {site for site, v in newest.items() if v.window.lost_state} == hit
    rows = crowd.ledger.verdicts.states([v.state for v in newest.values()])
    assert {r.site for r in rows.values() if r.parent is None} == hit, "the source model is what they serve"


def test_states_that_move_alike_share_their_anchor_scores(crowd):
    config, model = crowd.d.config, loaders.load_model(crowd.ledger.sources.champion().path)
    anchor = loaders.load_anchor(
        config.place("anchors"), crowd.ledger.verdicts.anchor(crowd.ledger.sources.champion().trunk)
    )
    fresh = config.site.init(model.tail)
    other = {**fresh, "log_rho": fresh["log_rho"] + 0.1}
    later = {**fresh, "seen": fresh["seen"] + 5}  # moves nothing that scores
    known: dict = {}
    scores = [judge.anchor_scores(model, anchor, s, known) for s in (fresh, later, other)]
    assert scores[0] is scores[1] and len(known) == 2
    patterns, present = anchor.replayed()
    for p in range(len(patterns)):
        wanted = tail.score(tail.with_site_state(model.tail, other), anchor.z, present[p])
        torch.testing.assert_close(torch.from_numpy(scores[2][p]), wanted)


def test_the_slots_of_a_bank_and_the_size_of_a_call_change_no_bit(tmp_path):
    whole, alone = made(tmp_path / "whole"), made(tmp_path / "alone")
    for crowd, calls in ((whole, [SITES]), (alone, [[s] for s in reversed(SITES)])):
        forget()
        crowd.arrive(0)
        cycle = crowd.begin()
        for call in calls:
            assert shard.adapt_sites(crowd.job(cycle), call) == {}
        crowd.finish(cycle)
    mine, theirs = whole.states(), alone.states()
    assert mine.keys() == theirs.keys() and len(mine) == len(SITES)
    assert all(torch.equal(t, theirs[key][n]) for key, state in mine.items() for n, t in state.items())
    cells = [
        {v.site: (v.evidence.cells, v.evidence.margin_drop) for v in crowd.ledger.verdicts.find()}
        for crowd in (whole, alone)
    ]
    assert cells[0] == cells[1]


def streams(crowd: Crowd) -> dict:
    """What the newest verdict of each site measured without labels."""
    return {v.site: v.evidence.stream for v in crowd.ledger.verdicts.latest().values()}


def test_a_window_knows_what_the_windows_before_it_measured(crowd):
    first = streams(crowd)
    assert all(s.baseline == () and s.sessions_before == 0 and s.age_days == 0 for s in first.values())
    adapted(crowd)
    for site, s in streams(crowd).items():
        assert s.baseline == first[site].hours
        assert sum(n for n, _ in s.hours) == s.sessions > 0
        assert (s.sessions_before, s.born) == (first[site].sessions, first[site].born)
        assert s.age_days > 0


def test_a_failed_window_is_no_baseline_and_its_state_not_gone_on_from(tmp_path):
    crowd = made(tmp_path / "d")
    strict = {**CROWD, "guards.trust": {"rho": 1.0e-9, "margin": 50.0}}
    for day in range(3):
        crowd.arrive(day)
        new_deployment(crowd.d.root, strict if day == 1 else CROWD)
        adapted(crowd)
    by_day = [crowd.ledger.verdicts.find(site=s) for s in SITES[:3]]
    for first, second, third in by_day:
        assert [v.outcome for v in (first, second, third)] == [first.outcome, "fail", third.outcome]
        assert (
            third.evidence.stream.baseline == second.evidence.stream.baseline == first.evidence.stream.hours
        )
        assert third.evidence.stream.sessions_before == 0, "it began anew from the source model"
        assert third.evidence.stream.born > first.evidence.stream.born


def test_the_anchor_set_is_shown_as_the_rig_sees_it(crowd):
    config, model = crowd.d.config, loaders.load_model(crowd.ledger.sources.champion().path)
    anchor = loaders.load_anchor(
        config.place("anchors"), crowd.ledger.verdicts.anchor(crowd.ledger.sources.champion().trunk)
    )
    known: dict = {}
    fresh = config.site.init(model.tail)
    whole, rig = (judge.anchor_scores(model, anchor, fresh, known, rig=r) for r in ((), ("rgb", "ir")))
    names = list(anchor.replayed()[0])
    at = {n: k for k, n in enumerate(names)}
    assert (rig[at["full"]] == whole[at["no-depth"]]).all()
    assert (rig[at["no-ir"]] == whole[at["no-depth-ir"]]).all()
    assert judge.rig_of({"rig": "ir+RGB"}) == ("rgb", "ir")
    assert judge.rig_of({"rig": "kiosk-2"}) == judge.rig_of({}) == ()
    assert judge._unseen(("rgb",)) == ["no-rgb"]
    assert judge._unseen(()) == []


def test_a_site_with_one_camera_is_judged_on_what_it_can_show(tmp_path):
    crowd = made(tmp_path / "d")
    crowd.ledger.streams.set_tags({SITES[0]: {"rig": "rgb"}}, now=now())
    crowd.arrive(0)
    adapted(crowd)
    found = crowd.ledger.verdicts.latest()[SITES[0]].evidence
    assert found.rig == ("rgb",)
    assert found.unseen == ("no-rgb",)
    assert "no-rgb" not in {c.pattern for c in found.cells}
    assert crowd.ledger.verdicts.latest([SITES[1]])[SITES[1]].evidence.unseen == ()
