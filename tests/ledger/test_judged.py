"""Verdicts of a fleet by pages, the digest over a cycle's evidence, and which anchor set counts when."""

from __future__ import annotations

from datetime import timedelta

from tests.support.ledgers import BAD, HELD, T0, begin, execute, shard


def test_pages_hold_every_verdict_of_the_cycle_once(ledger):
    first = begin(ledger)
    ledger.verdicts.commit(first, [shard(f"s{k}", slot=k) for k in range(5)], now=T0)
    second = begin(ledger, now=T0 + timedelta(days=1), fingerprint="g")
    ledger.verdicts.commit(second, [shard(start=10, end=20, evidence=BAD)], now=T0 + timedelta(days=1))
    after, found = "", []
    while page := ledger.verdicts.page(first.id, after=after, limit=2):
        assert len(page) <= 2
        found += page
        after = page[-1].site
    assert [v.site for v in found] == [f"s{k}" for k in range(5)]
    assert [v.id for v in found] == [v.id for v in ledger.verdicts.find(cycle=first.id)]
    assert ledger.verdicts.page("no such cycle") == []


def test_the_digest_of_a_cycle_changes_with_any_verdict_or_evidence(ledger, url):
    cycle = begin(ledger)
    empty = ledger.verdicts.evidence_digest(cycle.id)
    ledger.verdicts.commit(cycle, [shard(), shard("s1", evidence=HELD, slot=1)], now=T0)
    whole = ledger.verdicts.evidence_digest(cycle.id)
    assert whole == ledger.verdicts.evidence_digest(cycle.id) != empty
    seen = {empty, whole}
    for column, was, then in (
        ("evidence", '"stream_n":1,', '"stream_n":2,'),
        ("verdict", '"hold"', '"pass"'),
    ):
        execute(url, f"update verdicts set {column} = replace({column}, '{was}', '{then}') where site = 's1'")
        seen.add(ledger.verdicts.evidence_digest(cycle.id))
    assert len(seen) == 4


def test_an_anchor_set_that_is_sealed_again_counts_again(ledger):
    days = [T0 + timedelta(days=k) for k in range(4)]
    for digest, trunk, at in (
        ("x", "t", days[0]),
        ("y", "t", days[1]),
        ("z", "u", days[2]),
        ("x", "t", days[3]),
    ):
        ledger.verdicts.pin_anchor(digest, trunk=trunk, summary={"items": 1}, now=at)
    assert (ledger.verdicts.anchor("t"), ledger.verdicts.anchor("u")) == ("x", "z")
    assert [ledger.verdicts.anchor("t", at=d) for d in days] == ["x", "y", "y", "x"]
    assert ledger.verdicts.anchors() == {"y": "t", "z": "u", "x": "t"}
    assert ledger.audit.first_broken() is None
