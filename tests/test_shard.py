"""The work of a shard, without Ray: what it keeps between calls, and what it does when a blob is damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from jobs.deployment import now
from pipeline.cluster import judge, shard
from pipeline.data import blobs
from pipeline.models import tail
from tests.e2e.crowds import SITES, Life, ground

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def life(tmp_path) -> Life:
    """Two days: the first is adapted, the second has arrived."""
    life = made(tmp_path / "d")
    for day in range(2):
        life.arrive(day)
        if day == 0:
            adapted(life)
    return life


def made(root: Path) -> Life:
    root.mkdir()
    return ground(root)


def adapted(life: Life) -> None:
    cycle = life.begin()
    assert shard.adapt_chunk(life.job(cycle), SITES) == {}
    life.ledger.finish_cycle(cycle, summary={}, now=now())


def forget() -> None:
    """What a fresh process remembers."""
    for kept in (shard._hot, shard._known, shard._blob):
        kept.cache_clear()


def test_a_hot_state_is_the_one_in_the_blob(life):
    adapted(life)  # the first day's states were never read: this process made them
    hot = shard._hot(life.d.config.bank.hot_mb)
    rows = life.ledger.states([v.parent for v in life.ledger.states([s.learner for s in life.ledger.sites()]).values()])
    assert len(rows) == len(SITES)
    for row in rows.values():
        stored = blobs.get(life.d.config.place("states"), row.blob)
        assert all(torch.equal(t, stored[n][row.slot]) for n, t in hot[row.blob, row.slot].items())


def test_a_site_whose_own_state_is_damaged_goes_on_from_what_it_serves(life):
    forget()
    (blob,) = {s.blob for s in life.ledger.states([s.learner for s in life.ledger.sites()[:1]]).values()}
    path = life.d.config.place("states") / blob[:2] / f"{blob}.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    hit = {s.site for s in life.ledger.states([r.learner for r in life.ledger.sites()]).values() if s.blob == blob}
    adapted(life)
    newest = {v.site: v for v in life.ledger.verdicts() if v.offset_from > 0}
    assert {site for site, v in newest.items() if v.counters["lost"]} == hit
    rows = life.ledger.states([v.state for v in newest.values()])
    assert {r.site for r in rows.values() if r.parent is None} == hit, "the source model is what they serve"


def test_states_that_move_alike_share_their_anchor_scores(life):
    config, model = life.d.config, shard._model(life.ledger.source().path)
    anchor = shard._anchor(config.place("anchors"), life.ledger.anchor(life.ledger.source().trunk))
    fresh = config.site.init(model.tail)
    other = {**fresh, "log_rho": fresh["log_rho"] + 0.1}
    later = {**fresh, "seen": fresh["seen"] + 5}  # moves nothing that scores
    known: dict = {}
    scores = [judge.anchor_scores(model, anchor, s, known) for s in (fresh, later, other)]
    assert scores[0] is scores[1] and len(known) == 2
    patterns, present = anchor.replayed()
    for p in range(len(patterns)):
        wanted = tail.score(tail.moved(model.tail, other), anchor.z, present[p])
        torch.testing.assert_close(torch.from_numpy(scores[2][p]), wanted)


def test_the_slots_of_a_bank_and_the_size_of_a_call_change_no_bit(tmp_path):
    whole, alone = made(tmp_path / "whole"), made(tmp_path / "alone")
    for life, calls in ((whole, [SITES]), (alone, [[s] for s in reversed(SITES)])):
        forget()
        life.arrive(0)
        cycle = life.begin()
        for call in calls:
            assert shard.adapt_chunk(life.job(cycle), call) == {}
        life.finish(cycle)
    mine, theirs = whole.states(), alone.states()
    assert mine.keys() == theirs.keys() and len(mine) == len(SITES)
    assert all(torch.equal(t, theirs[key][n]) for key, state in mine.items() for n, t in state.items())
    cells = [
        {v.site: (v.evidence.cells, v.evidence.margin_drop) for v in life.ledger.verdicts()} for life in (whole, alone)
    ]
    assert cells[0] == cells[1]
