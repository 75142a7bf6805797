"""Verdicts on record: explained, judged again bit for bit, recounted, judged by another policy; no Ray."""

from __future__ import annotations

import json
import sqlite3
from datetime import timedelta

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.guard.explain import changes, decisive_first
from jobs.guard.simulate import (
    Decision,
    Rates,
    changed,
    judge_again,
    lag,
    looser,
    share,
    summaries,
    tally,
    true_rates,
)
from pipeline.config import load
from pipeline.control import loaders
from pipeline.control.adapt import adapt_sites, shard_job
from pipeline.control.deployment import lease, now
from pipeline.control.recheck import cycle_limits, find_verdict, stored_fingerprint, verdict_basis
from pipeline.control.recount import count_differences, recount_evidence
from pipeline.guards import Cell, Evidence, GuardsConfig, assess
from tests.support.crowds import CROWD, SITES, Crowd, copy_crowd, new_crowd
from tests.support.deployments import new_deployment, printed
from tests.support.ledgers import GOOD, T0

LOOSE = {
    **CROWD,
    "guards.ratchet": {"advisory": True},
    "guards.no_data": {"stream_min": 10, "anchor_min": 1},  # some sites send 9 a day
}
STRICT = {
    **LOOSE,
    "guards.trust": {"rho": 50.0, "margin": 0.0001},
    "guards.no_data": {"stream_min": 4, "anchor_min": 1},
}
CELLS = tuple(  # with these counts one guard alone decides
    Cell(pattern="full", species=s, n=300, errors=0, worse=0, better=0) for s in ("print", "bona_fide")
)


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> Crowd:
    """Two days; on the second the fleet serves what passed on the first."""
    crowd = new_crowd(tmp_path_factory.mktemp("lived"), LOOSE)
    day(crowd, 0)
    passed = {v.site: (v.state, 1) for v in crowd.ledger.verdicts.find() if v.outcome == "pass"}
    assert passed
    crowd.ledger.releases.serve(passed, rollout="r", wave=1, kind="promote", reason="", now=now())
    day(crowd, 1)
    return crowd


def day(crowd: Crowd, number: int) -> None:
    crowd.arrive(number)
    config = crowd.d.config
    with lease(config, crowd.ledger, "adapt") as cycle:
        assert adapt_sites(shard_job(config, crowd.ledger, cycle), SITES) == {}
        crowd.ledger.cycles.finish(
            cycle, summary={"evidence": crowd.ledger.verdicts.evidence_digest(cycle.id)}, now=now()
        )


@pytest.fixture
def crowd(lived, tmp_path):
    """A copy that a test may spoil."""
    return copy_crowd(lived, tmp_path / "d")


def spoil(crowd: Crowd, sql: str, *values: object) -> None:
    with sqlite3.connect(crowd.d.root / "ledger.db") as c:
        assert c.execute(sql, values).rowcount >= 1


def test_every_verdict_is_the_same_again_and_its_anchor_counts_too(lived, capsys):
    assert lived.d.run("guard", "recheck", "--all", "--recount", "--json") == 0
    found = printed(capsys)
    assert (found["verdicts"], found["same"], found["older"]) == (2 * len(SITES), 2 * len(SITES), 0)
    assert found["recounted"] == 2 * len(SITES) and found["different"] == [] == list(found["not_recounted"])
    one = lived.ledger.verdicts.find()[-1]
    assert lived.d.run("guard", "recheck", "--cycle", one.cycle, "--json") == 0
    assert printed(capsys)["verdicts"] == len(SITES)
    assert lived.d.run("guard", "recheck", one.site, "--recount", "--json") == 0
    found = printed(capsys)
    assert found["verdict"] == one.id and found["same"] and found["recounted"]
    digests = found["digests"]
    assert (
        digests["verdict on record"] == digests["verdict again"]
        and digests["champion"] == one.counters["stable"]
    )


def test_what_a_verdict_was_counted_on_is_kept_with_it_and_else_found_by_time(lived):
    ledger = lived.ledger
    served = {s: r.state for s, r in ledger.releases.serving().items()}
    assert served
    for v in ledger.verdicts.find():
        kept = verdict_basis(ledger, v)
        second = v.offset_from > 0
        assert kept.recorded and kept.champion_state == (served.get(v.site) if second else None)
        old = {k: x for k, x in v.counters.items() if k not in ("anchor", "stable")}
        by_time = verdict_basis(ledger, v.__class__(**{**vars(v), "counters": old}))
        assert by_time[:3] == kept[:3] and not by_time.recorded


def test_a_changed_count_is_found(crowd, capsys):
    one = next(v for v in crowd.ledger.verdicts.find() if v.outcome == "pass" and v.evidence.cells[0].errors)
    first = one.evidence.cells[0]
    forged = one.evidence.model_copy(
        update={"cells": (first.model_copy(update={"errors": 0}), *one.evidence.cells[1:])}
    )
    verdict = assess(cycle_limits(crowd.ledger, one.cycle).guards, forged)
    spoil(
        crowd,
        "update verdicts set evidence = ?, verdict = ? where id = ?",
        forged.model_dump_json(),
        verdict.model_dump_json(),
        one.id,
    )
    assert crowd.d.run("guard", "recheck", one.id) == 0, (
        "a forger who judges the forged evidence is not seen by that alone"
    )
    capsys.readouterr()
    assert crowd.d.run("guard", "recheck", one.id, "--recount") == 4
    assert f"0 errors of {first.n}" in capsys.readouterr().out
    assert crowd.d.run("guard", "recheck", "--all", "--json") == 4, (
        "but the audit chain has the digest of the cycle"
    )
    (found,) = printed(capsys)["different"]
    assert found["cycle"] == one.cycle and "audit chain" in found["differs"][0]


def test_a_changed_verdict_or_outcome_or_configuration_is_found(crowd, capsys):
    one, two, three = crowd.ledger.verdicts.find()[-3:]
    spoil(
        crowd,
        "update verdicts set verdict = replace(verdict, ?, ?) where id = ?",
        '"limit":',
        '"limit": ',
        one.id,
    )
    assert crowd.d.run("guard", "recheck", one.id) == 0, "blanks are the same verdict"
    spoil(
        crowd,
        "update verdicts set verdict = replace(verdict, ?, ?) where id = ?",
        '"guard":"trust"',
        '"guard":"trusted"',
        one.id,
    )
    assert crowd.d.run("guard", "recheck", one.id) == 4
    spoil(
        crowd,
        "update verdicts set outcome = ? where id = ?",
        "fail" if two.outcome == "pass" else "pass",
        two.id,
    )
    capsys.readouterr()
    assert crowd.d.run("guard", "recheck", two.id) == 4
    assert "the ledger lists it as" in capsys.readouterr().out
    spoil(crowd, "update verdicts set evidence = ? where id = ?", "{}", three.id)
    assert crowd.d.run("guard", "recheck", "--cycle", three.cycle, "--json") == 4
    assert {d["verdict"] for d in printed(capsys)["different"]} == {None, one.id, two.id, three.id}
    spoil(
        crowd,
        "update cycles set config = replace(config, ?, ?) where kind = 'adapt'",
        '"margin":50.0',
        '"margin":51.0',
    )
    first = crowd.ledger.verdicts.find()[0]
    assert crowd.d.run("guard", "recheck", first.id) == 4
    assert "not the one that it began with" in capsys.readouterr().out


def test_a_damaged_state_differs_and_a_deleted_one_is_left_out(crowd, capsys):
    rows = crowd.ledger.verdicts.find()
    blobs = {s.id: s.blob for s in crowd.ledger.verdicts.states([v.state for v in rows]).values()}
    own = next(v for v in rows if v.offset_from > 0)
    path = crowd.d.config.place("states") / blobs[own.state][:2] / f"{blobs[own.state]}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    loaders.clear()
    assert crowd.d.run("guard", "recheck", own.id, "--recount") == 4
    assert "changed or torn" in capsys.readouterr().out
    path.unlink()
    assert crowd.d.run("guard", "recheck", own.id, "--recount") == 3
    assert "missing" in capsys.readouterr().out
    assert crowd.d.run("guard", "recheck", own.id) == 0, "the verdict needs its evidence alone"


def test_verdicts_of_an_earlier_version_lack_fields_and_are_the_same(crowd, capsys):
    one = crowd.ledger.verdicts.find()[-1]
    spoil(
        crowd,
        "update verdicts set verdict = replace(verdict, ?, '') where id = ?",
        ',"labels":"anchor"',
        one.id,
    )
    assert crowd.d.run("guard", "recheck", "--cycle", one.cycle, "--json") == 4, "the chain knows"
    found = printed(capsys)
    assert (found["older"], found["same"]) == (1, len(SITES))
    assert crowd.d.run("guard", "recheck", one.id) == 0
    assert "earlier version" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["replay"], "--all"),
        (["recheck", "x", "--all"], "--all"),
        (["recheck", "nowhere"], "nor is it the id of a verdict"),
        (["recheck", "--cycle", "cycle-9"], "there are"),
        (["explain", "crowd-1"], "not registered"),
        (["simulate"], "name a policy"),
        (["simulate", "--with", "site.lr=1"], "allowed are the sections guards"),
        (["simulate", "--with", "guards.trust.rhoo=1"], "did you mean rho"),
        (["simulate", "--with", "guards.trust.rho=1", "--site", "nowhere"], "not registered"),
        (["simulate", "--with", "guards.trust.rho=1", "--out", "x.csv"], ".parquet or .json"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistake(lived, capsys, words, expected):
    assert lived.d.run("guard", *words) == 2
    assert expected in capsys.readouterr().err


def test_nothing_on_record(tmp_path, capsys):
    crowd = new_crowd(tmp_path, days=0)
    assert crowd.d.run("guard", "recheck", "--all") == 3
    assert crowd.d.run("guard", "simulate", "--with", "guards.trust.rho=1") == 3
    assert new_deployment(tmp_path).run("guard", "explain", "a") == 2


def test_explain_says_what_decided_and_what_it_rests_on(lived, capsys):
    for v in lived.ledger.verdicts.latest().values():
        assert lived.d.run("guard", "explain", v.site, "--json") == 0
        found = printed(capsys)
        assert (found["verdict"], found["outcome"]) == (v.id, v.outcome)
        assert len(found["findings"]) == len(v.verdict.reasons)
        if v.outcome != "pass":
            assert found["findings"][0]["call"] == v.outcome and not found["findings"][0]["advisory"]
            assert all(line.startswith("to pass: ") for line in found["to_pass"])
        assert v.counters["anchor"][:12] in found["evidence"]["anchor set"]
        assert lived.d.run("guard", "explain", v.id) == 0
        assert f"palisade guard recheck {v.id}" in capsys.readouterr().out


def evidence(**cell: int) -> Evidence:
    return GOOD.model_copy(update={"cells": (CELLS[0].model_copy(update=cell), CELLS[1])})


@pytest.mark.parametrize("errors", [30, 60, 300])
def test_the_count_that_explain_asks_for_is_the_highest_that_passes(errors):
    limits = GuardsConfig.model_validate({"noninferiority": {"advisory": True}})
    (said,) = changes(assess(limits, evidence(errors=errors)), limits, evidence(errors=errors))
    most = int(said.split("at most ")[1].split()[0])
    assert assess(limits, evidence(errors=most)).outcome == "pass"
    assert assess(limits, evidence(errors=most + 1)).outcome == "fail"


def test_the_paired_count_that_explain_asks_for_is_the_highest_that_passes():
    limits = GuardsConfig.model_validate({"noninferiority": {"attacks": 1.0}})
    found = evidence(worse=40, better=3)
    (said,) = changes(assess(limits, found), limits, found)
    most = int(said.split("at most ")[1].split()[0])
    assert assess(limits, evidence(worse=most, better=3)).outcome == "pass"
    assert assess(limits, evidence(worse=most + 1, better=3)).outcome == "fail"


def test_what_decided_stands_first_and_advice_last():
    limits = GuardsConfig.model_validate({"ceiling": {"advisory": True}})
    verdict = assess(limits, evidence(errors=200).model_copy(update={"trust_ratio": 9.0, "stream_n": 1}))
    ordered = decisive_first(verdict)
    assert ordered[0].guard == "trust" and ordered[1].call == "hold" and ordered[-1].advisory
    assert sorted(map(repr, ordered)) == sorted(map(repr, verdict.reasons))


def test_limits_are_those_of_the_cycle_and_their_fingerprint_is_checked(lived):
    config = lived.d.config
    row = lived.ledger.cycles.history(kinds=["adapt"])[0]
    found = cycle_limits(lived.ledger, row.id)
    assert found.sound and found.guards == config.guards
    assert stored_fingerprint(json.loads(row.config)) == config.fingerprint()
    other = load(None, ["guards.trust.rho=0.2"])
    assert (
        stored_fingerprint(json.loads(other.model_dump_json())) == other.fingerprint() != config.fingerprint()
    )


def test_recount_names_every_cell_that_differs(lived):
    v = find_verdict(lived.ledger, SITES[0])
    counted = recount_evidence(lived.d.config, lived.ledger, v, v.evidence)
    assert count_differences(v.evidence, counted) == []
    cells = tuple(c.model_copy(update={"worse": c.worse + 1}) for c in counted.cells)
    other = counted.model_copy(update={"cells": cells, "trust_ratio": counted.trust_ratio + 0.01})
    assert len(count_differences(v.evidence, other)) == len(cells) + 1


def decision(number: int = 0, recorded="pass", policy="pass", over=None, site="s", samples=10) -> Decision:
    return Decision(
        site,
        f"cycle-{number:05d}",
        f"{site}{number}",
        samples,
        T0 + timedelta(hours=number),
        recorded,
        policy,
        "",
        over,
    )


def test_lag_is_from_the_first_cycle_over_to_the_first_one_kept_back():
    own = [
        decision(0, "fail", "fail", over=False),
        decision(1, "pass", "hold", over=True, samples=7),
        decision(2, "pass", "pass", over=True, samples=20),
        decision(5, "fail", "pass", over=True, samples=30),
    ]
    assert lag(own, "recorded") == (2, 50, 4.0)
    assert lag(own, "policy") == (0, 0, 0.0)
    assert lag(own[:3], "recorded") == (None, 20, 1.0), "never stopped, and so much passed since"
    assert lag(own[:1], "recorded") is None


def test_tally_counts_right_and_wrong_with_intervals():
    own = [
        decision(0, "fail", "pass", over=False),
        decision(1, "hold", "pass", over=False),
        decision(2, over=False),
        decision(3, "pass", "fail", over=True),
        decision(4, "pass", "fail"),
    ]
    recorded, policy = tally(own, "recorded"), tally(own, "policy")
    assert [recorded[k] for k in ("pass", "hold", "fail")] == [3, 1, 1]
    assert (recorded["false_stops"]["k"], recorded["false_stops"]["n"], recorded["false_holds"]["k"]) == (
        1,
        3,
        1,
    )
    assert (recorded["passed_over"]["k"], policy["passed_over"]["k"], policy["passed_over"]["n"]) == (1, 0, 1)
    assert (recorded["sites_never_stopped"], policy["sites_never_stopped"]) == (1, 0)
    assert [looser(d) for d in own] == [True, True, False, False, False]
    (line,) = summaries(own)
    assert (line["differ"], line["looser"]) == (4, 2)


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_share_lies_in_its_interval(k, n):
    found = share(min(k, n), n)
    assert 0 <= found.low <= found.k / max(n, 1) <= found.high <= 1 or n == 0


@given(st.lists(st.sampled_from(["hold", "pass"]), max_size=12), st.integers(0, 3))
def test_holds_in_a_row_are_the_policys_own(calls, most):
    policy = GuardsConfig.model_validate({"no_data": {"max_holds": most}})
    holds, run = 0, 0
    for call in calls:
        found = judge_again(
            policy,
            GOOD.model_copy(update={"stream_n": 1 if call == "hold" else 500, "holds_before": 99}),
            holds,
        )
        run = run + 1 if call == "hold" else 0
        assert (found.outcome, found.abort) == (call, run > most)
        holds = holds + 1 if found.outcome == "hold" else 0


def test_true_rates_need_enough_labels_and_one_over_is_over():
    import numpy as np

    score = np.array([0.9] * 18 + [0.1] * 2 + [0.1] * 15 + [0.9] * 5 + [0.9] * 3)
    label = np.array([1] * 20 + [0] * 23)
    pai = np.array(["bona_fide"] * 20 + ["print"] * 20 + ["mask"] * 3)
    found = true_rates(score, label, pai, 0.5)
    assert found == Rates(apcer=0.25, bpcer=0.1), "three masks say nothing of masks"
    ceiling = GuardsConfig().ceiling
    assert Rates(0.25, None).over(ceiling) is True
    assert Rates(None, 0.01).over(ceiling) is None
    assert Rates(0.01, 0.01).over(ceiling) is False
    assert true_rates(score[:5], label[:5], pai[:5], 0.5) == (None, None)


def test_changed_names_nested_limits():
    now_, then = (
        GuardsConfig(),
        GuardsConfig.model_validate({"ceiling": {"apcer": 0.05}, "trust": {"advisory": True}}),
    )
    assert changed(now_.model_dump(mode="json"), then.model_dump(mode="json")) == {
        "guards.ceiling.apcer": [0.07, 0.05],
        "guards.trust.advisory": [False, True],
    }


def test_the_policy_of_the_record_decides_as_recorded(lived, tmp_path, capsys):
    out = tmp_path / "d.parquet"
    assert lived.d.run("guard", "simulate", "--against", lived.d.yaml, "--out", str(out), "--json") == 0
    found = printed(capsys)
    assert (found["changed"], found["looser"], found["verdicts"]) == ({}, [], 2 * len(SITES))
    assert found["recorded"] == found["policy"]
    rows = pq.read_table(out).to_pylist()
    assert [r["recorded"] for r in rows] == [r["policy"] for r in rows] and len(rows) == 2 * len(SITES)


def test_a_stricter_policy_stops_and_a_looser_one_says_so(lived, tmp_path, capsys):
    recorded = {v.id: v.outcome for v in lived.ledger.verdicts.find()}
    assert {"pass", "hold"} <= set(recorded.values())
    out = tmp_path / "d.json"
    assert (
        lived.d.run(
            "guard", "simulate", "--with", "guards.no_data.stream_min=1000", "--out", str(out), "--json"
        )
        == 0
    )
    found = printed(capsys)
    assert found["policy"]["pass"] == 0 and found["policy"]["hold"] > 0
    assert {d["verdict"]: d["recorded"] for d in json.loads(out.read_text())["decisions"]} == recorded
    strict = lived.d.run("guard", "simulate", "--with", "guards.trust.rho=0.000001", "--site", SITES[1])
    assert strict == 0 and " ··  " in capsys.readouterr().out
    assert lived.d.run("guard", "simulate", "--with", "guards.no_data.stream_min=1", "--json") == 4
    assert {recorded[v] for v in printed(capsys)["looser"]} == {"hold"}


def test_a_looser_policy_exits_4(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    crowd = new_crowd(tmp_path / "d", STRICT)
    day(crowd, 0)
    failed = [v for v in crowd.ledger.verdicts.find() if v.outcome == "fail"]
    assert failed
    assert crowd.d.run("guard", "simulate", "--with", "guards.trust.margin=50.0", "--json") == 4
    assert {v.id for v in failed} <= set(printed(capsys)["looser"])
    assert crowd.d.run("guard", "simulate", "--with", "guards.trust.margin=50.0") == 4
    assert "F " in capsys.readouterr().out


def test_a_tampered_anchor_set_is_said_once_before_any_site_is_adapted(crowd, capsys):
    from pipeline.data.blobs import BadBlob

    (file,) = (crowd.d.root / "artifacts" / "anchors").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    crowd.arrive(2)
    with (
        lease(crowd.d.config, crowd.ledger, "adapt") as cycle,
        pytest.raises(BadBlob, match="palisade anchor seal"),
    ):
        shard_job(crowd.d.config, crowd.ledger, cycle)
    assert crowd.d.run("anchor", "verify") == 4
    assert str(file) in capsys.readouterr().out
