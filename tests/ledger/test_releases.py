"""Champion pointers and rollouts; on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest

from pipeline import rollout as ro
from pipeline.guards import GuardsConfig
from pipeline.ledger import LedgerError, StaleGeneration
from pipeline.rollout import Candidate, Pointer, RolloutConfig, SiteFacts
from tests.support.ledgers import BAD, HELD, T0, begin, segment, shard, source_manifest

HOUR = timedelta(hours=1)
SOURCE = Pointer(None, 1)


@pytest.fixture
def planned(ledger):
    """Sites s0 to s4 with a passing state each; s3 and s4 are in Tokyo; a plan of one wave and another."""
    for digest in "ab":
        ledger.sources.add(source_manifest(digest * 64), path="", lineage="", now=T0)
    cycle = begin(ledger)
    ledger.verdicts.commit(cycle, [shard(f"s{i}", slot=i) for i in range(5)], now=T0)
    store(ledger, "r1", facts(ledger))
    return ledger


def facts(ledger, names=("s0", "s1", "s2", "s3", "s4"), **changes):
    verdicts, tags = ledger.verdicts.latest(), ({"tz": "UTC"}, {"tz": "Asia/Tokyo"})
    made = {s: Candidate(Pointer(verdicts[s].state, 1), verdicts[s].id, "pass") for s in names} | changes
    return {s: SiteFacts(serving=SOURCE, candidate=c, tags=tags[s > "s2"]) for s, c in made.items()}


def store(ledger, name, sites, **named):
    draft = ro.plan(name, sites, 1, RolloutConfig(waves=(0.4, 1.0), night="22:00-05:00"), **named)
    r = ro.start(draft.plan, T0)
    ledger.plans.save(
        name,
        plan_hash=r.plan_hash,
        status=r.status,
        body=r.model_dump_json(),
        revision=0,
        event={},
        now=T0,
        draft=draft,
    )
    return draft


def promote(ledger, wave, *, zones=None, without=(), rollout="r1", revision=1, now=T0):
    action = ro.Promote(wave=wave, zones=zones)
    return ledger.releases.carry_out(
        rollout, [action], without=without, reason="x", revision=revision, now=now
    )


def back(ledger, only=None, *, rollout="r1", revision=1):
    action = ro.Rollback(sites=None if only is None else tuple(only))
    return ledger.releases.carry_out(rollout, [action], without=(), reason="x", revision=revision, now=T0)


def wave_of(ledger, wave):
    return sorted(s for s, t in ledger.plans.targets("r1").items() if t.wave == wave)


def test_a_plan_is_read_as_it_was_stored(planned):
    sites = facts(planned, s1=Candidate(Pointer("x", 1), "v", "fail", "apcer"))
    draft = store(planned, "r2", sites)
    assert planned.plans.targets("r2") == draft.targets
    assert planned.plans.targets("r2", ["s0", "s1", "nobody"]) == {"s0": draft.targets["s0"]}
    assert planned.plans.excluded("r2") == draft.excluded == {"s1": ro.Excluded("verdict fail: apcer", "v")}
    assert planned.plans.sites("r2") == set(sites)
    assert ro.roster(planned.plans.targets("r2"), planned.plans.excluded("r2")) == draft.plan.roster


def test_a_wave_moves_once_and_goes_back_once(planned):
    first, second = wave_of(planned, 0), wave_of(planned, 1)
    assert (len(first), len(second)) == (2, 3)
    assert [promote(planned, 0), promote(planned, 0)] == [2, 0]
    assert set(planned.releases.serving()) == set(first)
    assert {s: (r.state, r.counter, r.wave, r.kind) for s, r in planned.releases.serving().items()} == {
        s: (planned.plans.targets("r1")[s].to.state_id, 1, 1, "promote") for s in first
    }
    assert promote(planned, 1, without=[second[0]]) == 2
    assert planned.plans.returnable("r1") == 4
    assert planned.plans.returnable("r1", [first[0], second[0]]) == 1
    assert back(planned, [first[0], second[0]]) == 1
    assert [back(planned), back(planned)] == [3, 0]
    assert {(r.state, r.source_version, r.kind) for r in planned.releases.serving().values()} == {
        (None, 1, "rollback")
    }
    assert (planned.plans.returnable("r1"), planned.releases.verify(), planned.audit.first_broken()) == (
        0,
        [],
        None,
    )
    assert len(planned.audit.rows()) == len({seq for seq, *_ in planned.audit.rows()})


def test_a_wave_moves_zone_by_zone(planned):
    in_tokyo = {s for s, t in planned.plans.targets("r1").items() if t.zone == "Asia/Tokyo"}
    assert in_tokyo == {"s3", "s4"}
    done = sum(promote(planned, w, zones=("Asia/Tokyo",)) for w in (0, 1))
    assert (done, set(planned.releases.serving())) == (2, in_tokyo)
    assert promote(planned, 0, zones=()) == 0
    late = {
        z: n for w in (0, 1) for z, n in planned.plans.observe_wave("r1", w, without=()).not_serving.items()
    }
    assert set(late) == {"UTC"}


def test_a_wave_is_seen_without_failed_and_retired_sites(planned):
    last = wave_of(planned, 1)
    seen = planned.plans.observe_wave("r1", 1, without=())
    assert (seen.sites, sum(seen.not_serving.values()), seen.first_not_serving) == (3, 3, last[0])
    planned.streams.set_retired(last[0], retired=True, reason="sold", now=T0)
    assert planned.plans.observe_wave("r1", 1, without=[last[1]]).sites == 1
    assert promote(planned, 1) == 2
    assert last[0] not in planned.releases.serving()
    assert planned.plans.observe_wave("r1", 1, without=()) == ro.WaveObservation(sites=2)
    planned.streams.set_retired(last[1], retired=True, reason="sold", now=T0)
    assert [p.site for p in planned.plans.promoted("r1", upto=1, names=last)] == last[2:]
    assert back(planned) == 2, "a retired site goes back with the others"


def test_what_is_promoted_and_what_is_silent(planned):
    promote(planned, 0)
    promote(planned, 1)
    (a, b), names = wave_of(planned, 0), [f"s{i}" for i in range(5)]
    got = planned.plans.promoted("r1", upto=0, names=[*names, *(f"x{i}" for i in range(3000))])
    assert [(p.site, p.wave, p.back) for p in got] == [(a, 0, SOURCE), (b, 0, SOURCE)]
    assert planned.plans.promoted("r1", upto=1, names=[a]) == got[:1]
    assert planned.plans.silent("r1", upto=0, samples=5, without=()) == {0: (2, a)}
    assert planned.plans.silent("r1", upto=1, samples=0, without=()) == {}
    cycle = begin(planned, dead=lambda _: True)
    planned.streams.commit(cycle, [segment(a, "old", 0)], [], now=T0)  # not after the promotion
    planned.streams.commit(cycle, [segment(b, "new", 0)], [], now=T0 + HOUR)
    assert planned.plans.silent("r1", upto=0, samples=9, without=()) == {0: (1, a)}
    assert planned.plans.silent("r1", upto=0, samples=10, without=()) == {0: (2, a)}
    assert planned.plans.silent("r1", upto=1, samples=9, without=[a])[1][0] == 3
    assert 0 not in planned.plans.silent("r1", upto=1, samples=9, without=[a])


def test_somebody_who_was_moved_later_is_not_overruled(planned):
    promote(planned, 0)
    a, b = wave_of(planned, 0)
    planned.releases.serve({a: (None, 1)}, rollout="hand", wave=0, kind="rollback", reason="", now=T0)
    assert back(planned) == 1
    assert planned.releases.serving()[a].rollout == "hand"


def test_nothing_moves_without_every_verdict(planned):
    for statement in (
        "update verdicts set outcome = 'hold' where site = 's0'",
        "update verdicts set outcome = 'pass', state = 'other' where site = 's0'",
        "delete from verdicts where site = 's0'",
    ):
        with planned.store.engine.begin() as c:
            c.exec_driver_sql(statement)
        wave = planned.plans.targets("r1")["s0"].wave
        with pytest.raises(LedgerError, match="site s0: no stored verdict passes"):
            promote(planned, wave)
    assert planned.releases.serving() == {}
    assert promote(planned, wave, without=["s0"]) == len(wave_of(planned, wave)) - 1


@pytest.mark.parametrize("evidence, version, moves", [(None, 2, 5), (BAD, 2, 0), (None, 1, 0)])
def test_a_bare_source_model_needs_the_fleets_verdict_on_that_version(planned, evidence, version, moves):
    row = shard("s0", evidence=evidence) if evidence else shard("s0")
    judged = planned.sources.add_verdict(version, row.verdict, row.evidence, limits=GuardsConfig(), now=T0)
    sites = facts(planned, **{f"s{i}": Candidate(Pointer(None, 2), judged, "pass") for i in range(5)})
    made = ro.plan("r2", sites, 2, RolloutConfig(waves=(1.0,)), source_before=1)
    planned.plans.save(
        "r2", plan_hash="h", status="staging", body="{}", revision=0, event={}, now=T0, draft=made
    )
    if not moves:
        with pytest.raises(LedgerError, match="site s0: no stored verdict passes"):
            promote(planned, 0, rollout="r2")
        return
    assert promote(planned, 0, rollout="r2") == moves
    assert {(r.state, r.source_version) for r in planned.releases.serving().values()} == {(None, 2)}
    planned.sources.set_champion(2, now=T0)  # what has no row of its own serves it now
    assert back(planned, rollout="r2") == moves
    assert {(r.state, r.source_version) for r in planned.releases.serving().values()} == {(None, 1)}


def test_a_driver_that_was_overtaken_moves_nothing(planned):
    promote(planned, 0)
    row = planned.plans.rollout("r1")
    planned.plans.save("r1", plan_hash="h", status="aborting", body=row.body, revision=1, event={}, now=T0)
    before = planned.audit.rows()
    for work in (lambda: promote(planned, 1), lambda: back(planned)):
        with pytest.raises(StaleGeneration, match="r1: somebody else moved it on"):
            work()
    with pytest.raises(StaleGeneration):
        planned.plans.save(
            "r1",
            plan_hash="h",
            status="completed",
            body="{}",
            revision=1,
            event={},
            now=T0,
            roles={"champion": 2},
        )
    assert (planned.audit.rows(), planned.sources.champion().version) == (before, 1)
    assert back(planned, revision=2) == 2


def test_the_end_of_a_source_release_and_its_champion_are_one_step(planned):
    planned.sources.set_challenger(2, now=T0)
    planned.plans.save(
        "r1",
        plan_hash="h",
        status="completed",
        body="{}",
        revision=1,
        event={},
        now=T0,
        roles={"champion": 2, "challenger": None},
    )
    assert (
        planned.sources.champion().version,
        planned.sources.challenger(),
        planned.audit.first_broken(),
    ) == (2, None, None)


def test_joined_sites_are_rows_of_the_last_wave(planned):
    planned.streams.register({"t0": {}, "s4": {}}, now=T0)
    cycle = begin(planned, fingerprint="later", dead=lambda _: True)
    planned.verdicts.commit(cycle, [shard("t0", blob="e" * 64)], now=T0)
    made = facts(planned, ["t0"])
    joined = {s: t._replace(wave=1) for s, t in ro.plan("r1", made, 1, RolloutConfig()).targets.items()}
    row = planned.plans.rollout("r1")
    planned.plans.save(
        "r1",
        plan_hash=row.plan_hash,
        status=row.status,
        body=row.body,
        revision=1,
        event={},
        now=T0,
        joined=joined,
    )
    assert planned.plans.targets("r1")["t0"] == joined["t0"]
    assert len(planned.plans.sites("r1")) == 6
    assert promote(planned, 1, revision=2) == 4
    assert planned.releases.serving()["t0"].state == joined["t0"].to.state_id


@pytest.mark.parametrize(
    "harm",
    [
        "update served set state = null where site = 's0' and counter = 1",
        "update served set source_version = 2 where site = 's0' and counter = 2",
        "update served set since = '2027' where site = 's0' and counter = 1",
        "update served set kind = 'promote' where counter = 2",
        "update served set rollout = 'r9' where site = 's0' and counter = 1",
        "update served set counter = 7 where site = 's0' and counter = 2",
        "update served set audit = audit + 1 where site = 's0' and counter = 1",
        "delete from served where site = 's0' and counter = 2",
        "delete from served where site = 's0' and counter = 1",
        "delete from served",
        "insert into served "
        "select site, 3, state, source_version, rollout, wave, kind, since, audit from served "
        "where site = 's0' and counter = 1",
        "insert into served values ('s0', 3, null, 1, 'r1', 0, 'rollback', '2026', 0)",
        "insert into served values ('s0', 3, null, 1, 'r1', 0, 'rollback', '2026', 999)",
    ],
)
def test_a_record_that_was_changed_is_found(planned, harm):
    for w in (0, 1):
        promote(planned, w)
    back(planned)
    assert planned.releases.verify() == []
    with planned.store.engine.begin() as c:
        c.exec_driver_sql(harm)
    assert planned.releases.verify() != []


def test_only_a_passing_state_of_that_site_is_promoted(ledger):
    ledger.verdicts.commit(
        begin(ledger), [shard(), shard("s1", evidence=HELD, slot=1), shard("s2", slot=2)], now=T0
    )
    ids = {s.site: s.learner for s in ledger.streams.sites()}
    for site, state in (("s1", ids["s1"]), ("s0", ids["s2"]), ("s0", "made-up"), ("s0", None)):
        with pytest.raises(LedgerError, match=f"site {site}: no stored verdict passes"):
            ledger.releases.serve(
                {"s2": (ids["s2"], 1), site: (state, 1)},
                rollout="r1",
                wave=1,
                kind="promote",
                reason="",
                now=T0,
            )
    assert ledger.releases.serving() == {}


def test_the_release_counter_only_grows(ledger):
    ledger.verdicts.commit(begin(ledger), [shard()], now=T0)
    state = ledger.streams.site("s0").learner
    for kind, to in (("promote", state), ("rollback", None), ("promote", state)):
        ledger.releases.serve({"s0": (to, 1)}, rollout="r1", wave=1, kind=kind, reason="x", now=T0)
    assert [(s.counter, s.kind, s.state) for s in ledger.releases.history("s0")] == [
        (1, "promote", state),
        (2, "rollback", None),
        (3, "promote", state),
    ]
    assert ledger.releases.serving(["s0", "s1"]) == {"s0": ledger.releases.history("s0")[-1]}
    assert ledger.releases.serving(["s1"] * 3000) == {}


def test_the_newest_promotion_under_some_rollouts(ledger):
    ledger.verdicts.commit(begin(ledger), [shard(), shard("s1", slot=1), shard("s2", slot=2)], now=T0)
    learner = {s.site: s.learner for s in ledger.streams.sites()}
    for rollout, kind, names in (
        ("r1", "promote", ["s0", "s1"]),
        ("r2", "promote", ["s0"]),
        ("r2", "rollback", ["s0"]),
        ("r3", "promote", ["s0", "s2"]),
    ):
        changes = {s: (learner[s] if kind == "promote" else None, 1) for s in names}
        ledger.releases.serve(changes, rollout=rollout, wave=1, kind=kind, reason="", now=T0)
    assert {s: (r.rollout, r.counter) for s, r in ledger.releases.promoted_by({"r1", "r2"}).items()} == {
        "s0": ("r2", 2),
        "s1": ("r1", 1),
    }
    assert ledger.releases.promoted_by(["r1"])["s0"] == ledger.releases.history("s0")[0]
    assert ledger.releases.promoted_by([]) == {}


def test_a_rollout_is_saved_by_one_writer_and_the_newest_is_the_one_made_last(ledger):
    def save(revision, name="r1", now=T0):
        return ledger.plans.save(
            name, plan_hash="h", status="planned", body="{}", revision=revision, event={}, now=now
        )

    assert save(save(0)) == 2
    with pytest.raises(StaleGeneration, match="somebody else moved it on"):
        save(1)
    assert [(r.id, r.revision, r.created_at) for r in ledger.plans.rollouts()] == [("r1", 2, T0)]
    save(0, "a-later-one", now=T0 - timedelta(days=9))  # the clock was set back
    assert [r.id for r in ledger.plans.rollouts()] == ["a-later-one", "r1"]
