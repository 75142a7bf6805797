"""Verdicts on record judged by another policy: who would stop, who would pass, and how right that is."""

from __future__ import annotations

import json
from datetime import timedelta

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

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
from pipeline.guards import GuardsConfig
from tests.support.crowds import SITES, new_crowd
from tests.support.deployments import printed
from tests.support.judged import STRICT, day
from tests.support.ledgers import GOOD, T0


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
