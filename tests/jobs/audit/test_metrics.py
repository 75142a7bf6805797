"""Prometheus' text of rollout, guards and audit, from the ledger alone, read by Prometheus' own parser."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.__main__ import main
from jobs.audit.metrics import collect
from pipeline.ledger import Ledger
from pipeline.rollout import Candidate as Made
from pipeline.rollout import Pointer, RolloutConfig, SiteFacts, approve, plan, start
from tests.support.ledgers import BAD, HELD, T0, begin, segment, shard

SECOND = timedelta(seconds=1)
SITES = [f"s{i:02d}" for i in range(20)]


@pytest.fixture
def fleet(tmp_path):
    """20 sites with verdicts; the first wave of a release is out."""
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    ledger.streams.register({s: {} for s in SITES}, now=T0)
    evidence = {SITES[0]: HELD, SITES[1]: BAD}
    rows = [
        shard(s, slot=i, **({"evidence": evidence[s]} if s in evidence else {})) for i, s in enumerate(SITES)
    ]
    cycle = begin(ledger)
    ledger.verdicts.commit(cycle, rows, now=T0)
    ledger.cycles.finish(cycle, summary={}, now=T0)
    yield ledger
    ledger.close()


def released(ledger):
    verdicts = ledger.verdicts.latest()
    facts = {
        s: SiteFacts(serving=None, candidate=Made(Pointer(v.state, 1), v.id, v.outcome))
        for s, v in verdicts.items()
    }
    draft = plan("release-00001", facts, 1, RolloutConfig(waves=(0.5, 1.0), second_approval_from_share=0.4))
    r = approve(start(draft.plan, T0), hash=start(draft.plan, T0).plan_hash, who="ann", now=T0)
    first, second = draft.wave(0)[:2]
    r = r.model_copy(update={"wave": 0, "status": "staging", "failed": {first: 0}})
    ledger.plans.save(
        "release-00001",
        plan_hash=r.plan_hash,
        status=r.status,
        body=r.model_dump_json(),
        revision=0,
        event={"event": "planned"},
        now=T0,
        draft=draft,
    )
    changes = {s: (verdicts[s].state, 1) for s in draft.wave(0) if s != first}
    ledger.releases.serve(
        changes, rollout="release-00001", wave=1, kind="promote", reason="", now=T0 + SECOND
    )
    ledger.streams.commit(begin(ledger, kind="ingest"), [segment(second)], [], now=T0 + 2 * SECOND)
    return draft


def read(text):
    return {
        (s.name, *sorted(s.labels.values())): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }


def test_figures_of_a_fleet_without_a_rollout(fleet, tmp_path, capsys):
    assert main(["metrics", f"ledger.url=sqlite:///{tmp_path}/ledger.db"]) == 0
    found = read(capsys.readouterr().out)
    assert found["palisade_sites", "active"] == 20 and found["palisade_sites", "retired"] == 0
    assert found["palisade_sites_on_hold",] == 1
    assert [found["palisade_verdicts", o] for o in ("pass", "hold", "fail")] == [18, 1, 1]
    assert found["palisade_guard_findings", "fail", "trust"] == 1
    assert found["palisade_guard_findings", "hold", "no_data"] == 1
    assert found["palisade_verdict_newest_timestamp_seconds",] == T0.timestamp()
    assert found["palisade_audit_head_sequence",] == fleet.audit.head()[0] > 0
    assert not any(name[0].startswith("palisade_rollout") for name in found)


def test_figures_of_a_rollout(fleet):
    draft = released(fleet)
    found = {
        (s.name, *sorted(s.labels.values())): s.value for m in collect(fleet).collect() for s in m.samples
    }
    release = "release-00001"
    assert found["palisade_rollout_status", release, "staging"] == 1
    assert sum(v for k, v in found.items() if k[0] == "palisade_rollout_status") == 1
    assert (found["palisade_rollout_wave", release], found["palisade_rollout_waves", release]) == (1, 2)
    assert found["palisade_rollout_approvals_missing", release] == 1
    n = [len(draft.wave(i)) for i in range(2)]

    def sites(wave, state):
        return found["palisade_rollout_wave_sites", *sorted([release, str(wave), state])]

    assert [sites(w, "planned") for w in (1, 2)] == n
    assert [sites(w, "promoted") for w in (1, 2)] == [n[0] - 1, 0]
    assert [sites(w, "failed") for w in (1, 2)] == [1, 0]
    assert [sites(w, "silent") for w in (1, 2)] == [n[0] - 2, 0]


def test_a_file_for_the_collector_is_whole(fleet, tmp_path, capsys):
    released(fleet)
    out, url = tmp_path / "collected" / "palisade.prom", f"ledger.url=sqlite:///{tmp_path}/ledger.db"
    assert main(["metrics", url, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    text = out.read_text()
    assert len(told["metrics"]) == len(read(text)) > 30
    assert [p.name for p in out.parent.iterdir()] == ["palisade.prom"]


def test_labels_are_escaped(fleet):
    fleet.streams.register({"odd": {}}, now=T0)
    with fleet.store.engine.begin() as c:
        c.exec_driver_sql("update sites set status = 'a\"b\\c\nd' where site = 'odd'")
    from prometheus_client import generate_latest

    found = [
        s for f in text_string_to_metric_families(generate_latest(collect(fleet)).decode()) for s in f.samples
    ]
    assert any(s.labels == {"status": 'a"b\\c\nd'} and s.value == 1 for s in found)
