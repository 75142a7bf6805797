"""A ledger that the last version before typed verdicts wrote, brought to the newest schema: nothing it says
is lost.
"""

from __future__ import annotations

import json

import pytest

from pipeline.control.recheck import cycle_limits, limits_of, stored_fingerprint
from pipeline.guards.verdict import assess
from pipeline.ledger import Ledger, schema
from tests.support.ledgers import execute
from tests.support.old_ledgers import write_old_ledger

OLD = "select id, site, cycle, state, outcome, verdict, evidence, offset_from, offset_to, at from verdicts"
STATISTICS = (
    *("samples", "accepted_bona_fide", "accepted_attack", "called_bona_fide_share"),
    *("restores", "omega", "sessions"),
)


@pytest.fixture
def old(url) -> str:
    """URL of a ledger of version 3."""
    return write_old_ledger(url, 3)


@pytest.fixture
def upgraded(old):
    ledger = Ledger.open(old, create=False)
    yield ledger
    ledger.close()


def test_every_verdict_and_its_window_is_kept(old):
    before = execute(old, f"{OLD} where site <> '*' order by id")
    counters = dict(execute(old, "select id, counters from verdicts"))
    ledger = Ledger.open(old, create=False)
    assert execute(old, f"{OLD} order by id") == before
    verdicts = ledger.verdicts.find()
    assert len(verdicts) == len(before) == 35 and {v.outcome for v in verdicts} == {"pass", "fail", "hold"}
    for v in verdicts:
        counted, window = json.loads(counters[v.id]), v.window
        assert {name: getattr(window, name) for name in STATISTICS} == {n: counted[n] for n in STATISTICS}
        assert [window.row_start, window.row_end] == counted["rows"]
        assert (window.outcomes_blob, window.anchor_digest) == (counted["outcomes"], counted["anchor"])
        assert (window.champion_state, window.lost_state) == (counted["stable"], counted["lost"])
    assert any(v.window.champion_state for v in verdicts) and any(v.window.omega for v in verdicts)
    ledger.close()


def test_every_verdict_replays_byte_for_byte_under_the_limits_of_its_cycle(upgraded):
    for v in upgraded.verdicts.find():
        limits = cycle_limits(upgraded, v.cycle)
        assert limits.sound and assess(limits.guards, v.evidence).model_dump_json() == v.verdict_json


def test_the_audit_chain_still_covers_what_it_covered(upgraded):
    assert upgraded.audit.first_broken() is None
    assert upgraded.releases.verify() == [] == upgraded.releases.served_without_verdict()
    sealed = {
        p["cycle"]: p["evidence"]
        for _, _, kind, p in upgraded.audit.rows()
        if kind == "cycle" and "evidence" in p
    }
    assert len(sealed) == 4
    assert {cycle: upgraded.verdicts.evidence_digest(cycle) for cycle in sealed} == sealed


def test_a_verdict_on_a_source_model_has_its_own_table_and_replays(old):
    ((verdict_id, text),) = execute(old, "select id, verdict from verdicts where site = '*'")
    ledger = Ledger.open(old, create=False)
    row = ledger.sources.verdict(verdict_id)
    assert row is not None and (row.version, row.verdict_json) == (1, text)
    assert assess(limits_of(ledger, row).guards, row.evidence).model_dump_json() == text
    assert ledger.verdicts.find(ids=[verdict_id]) == []
    ledger.close()


def test_the_stored_configurations_keep_their_fingerprints(upgraded):
    for row in upgraded.cycles.history():
        assert stored_fingerprint(json.loads(row.config_json)) == row.fingerprint, row.id


def test_garbage_collection_needs_the_same_as_before(old):
    named = {
        json.loads(c)["outcomes"] for (c,) in execute(old, "select counters from verdicts where site <> '*'")
    }
    learned = dict(execute(old, "select site, learned from sites"))
    ledger = Ledger.open(old, create=False)
    oldest = min(v.at for v in ledger.verdicts.find())
    assert ledger.garbage.needed(since=oldest).outcomes == named
    newest = max(c.started for c in ledger.cycles.history())
    later = ledger.garbage.needed(since=newest.replace(year=newest.year + 1))
    assert (later.outcomes, later.features) == (frozenset(), learned)
    ledger.close()


def test_a_step_that_dies_in_its_conversions_leaves_version_3_whole(old, monkeypatch):
    before = execute(old, "select * from verdicts order by id")
    steps = schema.STEPS[4]
    monkeypatch.setitem(schema.STEPS, 4, (*steps, "update no_such_table set x = 1"))
    with pytest.raises(RuntimeError, match="no_such_table"):
        Ledger.open(old)
    assert execute(old, "select * from verdicts order by id") == before
    assert execute(old, "select value from meta where key = 'schema'") == [("3",)]
    monkeypatch.undo()
    Ledger.open(old).close()
