"""Verdicts on record: explained, judged again bit for bit, recounted, judged by another policy; no Ray."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace

import pytest

from jobs.guard.explain import changes, decisive_first
from pipeline.config import load
from pipeline.control import loaders
from pipeline.control.adapt import shard_job
from pipeline.control.deployment import lease
from pipeline.control.recheck import cycle_limits, find_verdict, stored_fingerprint, verdict_basis
from pipeline.control.recount import count_differences, recount_evidence
from pipeline.guards import Evidence, GuardsConfig
from pipeline.guards.verdict import assess
from tests.support.crowds import SITES, Crowd, new_crowd
from tests.support.deployments import new_deployment, printed
from tests.support.judged import CELLS
from tests.support.ledgers import GOOD


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
        and digests["champion"] == one.window.champion_state
    )


def test_what_a_verdict_was_counted_on_is_kept_with_it_and_else_found_by_time(lived):
    ledger = lived.ledger
    served = {s: r.state for s, r in ledger.releases.serving().items()}
    assert served
    for v in ledger.verdicts.find():
        kept = verdict_basis(ledger, v)
        second = v.offset_from > 0
        assert kept.recorded and kept.champion_state == (served.get(v.site) if second else None)
        old = replace(v, window=replace(v.window, anchor_digest=None, champion_state=None))
        by_time = verdict_basis(ledger, old)
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
        (["recheck"], "--all"),
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
        assert v.window.anchor_digest[:12] in found["evidence"]["anchor set"]
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
    assert stored_fingerprint(json.loads(row.config_json)) == config.fingerprint()
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
