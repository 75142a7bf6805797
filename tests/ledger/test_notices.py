"""What is said to people, the audit log, and the figures; on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from pipeline.ledger import Ledger, UnknownSite
from pipeline.ledger.notices import CLAIM
from tests.support.ledgers import BAD, HELD, T0, begin, execute, segment, shard

SECOND = timedelta(seconds=1)


def said(ledger, text="wave 1 holds", *, key="release-1", severity="warning", after=0.0, repeat=600.0):
    return ledger.notices.record(key, severity, text, now=T0 + after * SECOND, repeat_seconds=repeat)


def test_what_is_new_is_sent_and_what_was_sent_waits_for_its_window(ledger):
    assert said(ledger)
    ledger.notices.mark_sent("release-1", text="wave 1 holds", now=T0)
    assert not said(ledger, after=599)
    assert said(ledger, key="release-2", after=599)
    assert said(ledger, after=600)
    rows = {r.key: r for r in ledger.notices.latest()}
    assert (rows["release-1"].count, rows["release-1"].first_at, rows["release-1"].sent_at) == (3, T0, None)
    assert rows["release-1"].last_at == T0 + 600 * SECOND


def test_another_text_or_severity_is_sent_at_once(ledger):
    for k, (text, severity) in enumerate([("a", "info"), ("b", "info"), ("b", "critical")]):
        assert said(ledger, text, severity=severity, after=k)
        ledger.notices.mark_sent("release-1", text=text, now=T0 + k * SECOND)
        assert not said(ledger, text, severity=severity, after=k + 0.5)


def test_what_nobody_sent_is_sent_by_the_next_who_asks_after_a_while(ledger):
    assert said(ledger)
    assert not said(ledger, after=1), "the first may still be at it"
    assert ledger.notices.unsent(now=T0 + SECOND) == []
    late = CLAIM.total_seconds()
    assert said(ledger, after=late)
    assert [r.key for r in ledger.notices.unsent(now=T0 + 2 * CLAIM)] == ["release-1"]
    assert ledger.notices.unsent(now=T0 + 2 * CLAIM) == [], "another driver has it now"
    ledger.notices.mark_sent("release-1", text="wave 1 holds", now=T0 + 2 * CLAIM)
    assert ledger.notices.unsent(now=T0 + 9 * CLAIM) == []


def test_asking_again_and_again_does_not_put_a_retry_off(ledger):
    assert said(ledger)
    found = [said(ledger, after=t) for t in range(1, int(CLAIM.total_seconds()) + 1)]
    assert found == [False] * (len(found) - 1) + [True]


def test_that_an_older_text_was_sent_says_nothing_of_the_newer(ledger):
    assert said(ledger, "a")
    assert said(ledger, "b", after=1)
    ledger.notices.mark_sent("release-1", text="a", now=T0 + 2 * SECOND)
    assert ledger.notices.latest()[0].sent_at is None
    ledger.notices.mark_sent("release-1", text="b", now=T0 + 3 * SECOND)
    assert ledger.notices.latest()[0].sent_at == T0 + 3 * SECOND


def test_a_clock_that_went_back_silences_nothing(ledger):
    assert said(ledger, after=86_400)
    ledger.notices.mark_sent("release-1", text="wave 1 holds", now=T0 + 86_400 * SECOND)
    assert said(ledger)


def test_of_many_drivers_one_sends(url):
    Ledger.open(url).close()

    def drive(_):
        own = Ledger.open(url)
        try:
            return sum(said(own, f"state {k}", key=f"release-{k}") for k in range(8))
        finally:
            own.close()

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(drive, range(6))) == 8
    ledger = Ledger.open(url)
    assert [r.count for r in ledger.notices.latest()] == [6] * 8
    ledger.close()


def test_the_audit_log_of_a_site_names_what_moved_it(ledger):
    ledger.verdicts.commit(begin(ledger), [shard(), shard("s1", slot=1)], now=T0)
    learner = {s.site: s.learner for s in ledger.streams.sites()}
    for site in ("s0", "s1"):
        ledger.releases.serve(
            {site: (learner[site], 1)}, rollout="r1", wave=1, kind="promote", reason="", now=T0
        )
    ledger.streams.set_tags({"s0": {"region": "north"}, "s2": {"region": "south"}}, now=T0)
    ledger.audit.append("remark", {"site": "s_0"}, now=T0)
    kinds = [(r.kind, r.seq) for r in ledger.audit.latest(limit=10, site="s0")]
    assert [k for k, _ in kinds] == ["tags", "promote"]
    assert [r.kind for r in ledger.audit.latest(limit=2)] == ["remark", "tags"]
    seq, head = ledger.audit.head()
    newest = ledger.audit.latest(limit=1)[0]
    assert (seq, head) == (newest.seq, newest.hash)
    assert ledger.audit.has(ledger.audit.latest(limit=9)[-1].hash) and not ledger.audit.has("f" * 64)


def test_who_was_promoted_without_a_verdict_or_taken_back_without_a_record_is_found(ledger, url):
    cycle = begin(ledger)
    ledger.verdicts.commit(cycle, [shard(), shard("s1", slot=1)], now=T0)
    ledger.cycles.finish(cycle, summary={}, now=T0)
    early = {s.site: s.learner for s in ledger.streams.sites()}
    ledger.verdicts.commit(begin(ledger), [shard(start=10, end=20), shard("s1", 10, 20, slot=1)], now=T0)
    late = {s.site: s.learner for s in ledger.streams.sites()}

    def serve(site, state, kind="promote"):
        ledger.releases.serve({site: (state, 1)}, rollout="r1", wave=1, kind=kind, reason="", now=T0)

    for site in ("s0", "s1"):
        serve(site, early[site])
        serve(site, late[site])
        serve(site, None, "rollback")
        serve(site, early[site])
    assert ledger.releases.served_without_verdict() == []
    execute(url, "update served set kind = 'promote' where site = 's1' and counter = 3")
    execute(url, f"update verdicts set outcome = 'hold' where id = '{late['s0']}'")
    assert ledger.releases.served_without_verdict() == [
        "site s1: release 3 by r1 went back without a rollback record",
        f"site s0: release 2 by r1 promoted state {late['s0']} without a stored verdict that passes it",
        "site s1: release 3 by r1 promoted source v1 without a stored verdict that passes it",
    ]
    execute(url, f"update verdicts set outcome = 'pass', site = 's4' where id = '{late['s0']}'")
    assert "site s0: release 2" in ledger.releases.served_without_verdict()[1]
    execute(url, f"delete from states where id = '{late['s1']}'")
    assert ledger.releases.served_without_verdict()[-2:] == [
        f"site s1: learns from state {late['s1']}, which is not stored",
        f"site s1: served state {late['s1']}, which is not stored",
    ]


def test_figures_are_of_the_newest_verdicts(ledger):
    cycle = begin(ledger)
    ledger.verdicts.commit(cycle, [shard(evidence=HELD), shard("s1", evidence=BAD)], now=T0)
    ledger.cycles.finish(cycle, summary={}, now=T0)
    outcomes, calls, last = ledger.verdicts.findings()
    assert outcomes == {"hold": 1, "fail": 1} and last == T0
    assert calls["no_data", "hold"] == 1 and calls["trust", "fail"] == 1
    later = T0 + SECOND
    ledger.verdicts.commit(begin(ledger), [shard(start=10, end=20)], now=later)
    outcomes, calls, last = ledger.verdicts.findings()
    assert outcomes == {"pass": 1, "fail": 1} and last == later
    assert ("no_data", "hold") not in calls


def test_a_fleet_without_verdicts_has_figures_too(ledger):
    assert ledger.verdicts.findings() == ({}, {}, None)
    assert ledger.streams.count_by_status() == ({"active": 5}, 0)
    assert ledger.plans.wave_counts("release-1") == []
    assert ledger.plans.plan_hash("release-1") is None


def test_waves_count_who_serves_the_target_and_who_is_silent_since(ledger, url):
    ledger.verdicts.commit(begin(ledger), [shard(f"s{i}", slot=i) for i in range(4)], now=T0)
    learner = {s.site: s.learner for s in ledger.streams.sites()}
    for i in range(4):
        execute(
            url,
            "insert into targets "
            "(rollout, site, wave, zone, state, source_version, back_version, verdict, reason) values "
            f"('r1', 's{i}', {i // 2}, 'UTC', '{learner[f's{i}']}', 1, 1, '{learner[f's{i}']}', '')",
        )
    changes = {s: (learner[s], 1) for s in ("s0", "s1", "s2")}
    ledger.releases.serve(changes, rollout="r1", wave=1, kind="promote", reason="", now=T0 + SECOND)
    ledger.streams.commit(
        begin(ledger, kind="ingest", now=T0, dead=lambda _: True),
        [segment("s0", base=10)],
        [],
        now=T0 + 2 * SECOND,
    )
    assert [tuple(w) for w in ledger.plans.wave_counts("r1")] == [(0, 2, 2, 1), (1, 2, 1, 1)]
    ledger.streams.set_retired("s1", retired=True, reason="closed", now=T0)
    assert tuple(ledger.plans.wave_counts("r1")[0]) == (0, 1, 1, 0)


def test_tags_are_added_and_taken_away_in_one_audited_change(ledger):
    changes = {"s0": {"region": "north", "rig": ""}, "s1": {"rig": "a"}}
    assert ledger.streams.set_tags(changes, now=T0) == ["s0"]
    assert [s.tags for s in ledger.streams.named(["s0", "s1"])] == [{"region": "north"}, {"rig": "a"}]
    kind, payload = ledger.audit.rows()[-1][2:]
    assert (kind, payload) == ("tags", {"sites": {"s0": {"region": "north", "rig": ""}}})
    with pytest.raises(UnknownSite, match="'gone': not registered"):
        ledger.streams.set_tags({"s0": {"region": "south"}, "gone": {"region": "x"}}, now=T0)
    assert ledger.streams.site("s0").tags == {"region": "north"}
    assert ledger.audit.first_broken() is None


def test_a_retired_site_stays_so_until_it_is_restored(ledger):
    assert ledger.streams.set_retired("s0", retired=True, reason="closed", now=T0)
    assert not ledger.streams.set_retired("s0", retired=True, reason="again", now=T0)
    ledger.streams.set_status({"s0": "", "s1": "torn"})
    assert [(s.status, s.reason) for s in ledger.streams.named(["s0", "s1"])] == [
        ("retired", "closed"),
        ("failed", "torn"),
    ]
    assert ledger.streams.set_retired("s0", retired=False, reason="open again", now=T0)
    assert not ledger.streams.set_retired("s1", retired=False, reason="", now=T0)
    assert [(s.status, s.reason) for s in ledger.streams.named(["s0", "s1"])] == [
        ("active", ""),
        ("failed", "torn"),
    ]
    assert [kind for _, _, kind, _ in ledger.audit.rows()[-2:]] == ["retire", "restore"]
    with pytest.raises(UnknownSite):
        ledger.streams.set_retired("nowhere", retired=True, reason="x", now=T0)
