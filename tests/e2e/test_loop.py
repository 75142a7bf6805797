"""The whole loop by the commands a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

pytestmark = pytest.mark.e2e


def kinds(d) -> dict[str, int]:
    """MLflow runs by kind."""
    from pipeline.lineage import Lineage

    lineage = Lineage.open(d.config.lineage, code_revision="test")
    return dict(
        Counter(r.data.tags["palisade.kind"] for r in lineage.client.search_runs([lineage.experiment_id]))
    )


def test_from_captures_to_a_rollout_and_back(deployment, capsys):
    d = deployment
    assert d.run("cycle") == 0
    sites = {s.site: s for s in d.ledger.streams.sites()}
    assert len(sites) == 5
    assert all(s.learned_offset == s.ingested_offset for s in sites.values())
    outcomes = {v.site: v.verdict.outcome for v in d.ledger.verdicts.find()}
    assert outcomes["yard-broken"] == "hold"
    assert "pass" in outcomes.values()
    assert (d.root / "artifacts" / "reports" / "cycle-00001.html").stat().st_size > 10_000

    assert d.run("rollout", "plan") == 0
    row = d.ledger.plans.rollouts()[0]
    assert d.run("rollout", "diff") == 0
    assert d.run("rollout", "apply", "00000000") == 2
    assert d.run("rollout", "apply", row.plan_hash[:8], "--watch") == 0
    assert kinds(d) == {"train": 1, "cycle": 1, "rollout": 1}
    assert d.ledger.plans.rollouts()[0].status == "completed"
    promoted = {s for s, o in outcomes.items() if o == "pass"}
    assert {s for s, r in d.ledger.releases.serving().items() if r.state} == promoted

    capsys.readouterr()
    one = sorted(promoted)[0]
    assert d.run("site", "explain", one, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    for step in ("source", "window", "candidate", "verdict", "wave"):
        assert told[step]
    assert "pass" in told["verdict"]

    code = "import sys; from jobs.__main__ import main; code = main(sys.argv[1:]);"
    code += "print(code, 'mlflow' in sys.modules, 'ray' in sys.modules)"
    words = ["rollout", "rollback", "--reason", "drill", "lineage.uri=http://127.0.0.1:9", "--config", d.yaml]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False", "a rollback waits on nothing"
    assert d.ledger.plans.rollouts()[0].status == "rolled_back"
    assert all(r.state is None and r.counter == 2 for r in d.ledger.releases.serving().values())
    assert d.ledger.audit.first_broken() is None


def test_a_second_cycle_without_captures_holds_everything(deployment):
    assert deployment.run("cycle") == 0
    before = {s.site: s.learner for s in deployment.ledger.streams.sites()}
    assert deployment.run("cycle") == 3
    assert {s.site: s.learner for s in deployment.ledger.streams.sites()} == before


def test_hostile_files_and_rows_are_refused_one_by_one(deployment):
    assert deployment.run("ingest") == 0
    refused = [q for q in deployment.ledger.streams.quarantined() if q.site == "edge-untrusted"]
    assert {q.row for q in refused if q.row < 0} == {-1}
    assert any("12000" in q.reason for q in refused)
    assert all(q.reason for q in refused)
    good = {
        s.site: sum(x.good for x, _ in deployment.ledger.streams.segments(s.site))
        for s in deployment.ledger.streams.sites()
    }
    assert good["lobby-north"] > 20
    assert deployment.run("ingest") == 0
    assert len([q for q in deployment.ledger.streams.quarantined() if q.site == "edge-untrusted"]) == len(
        refused
    )


def test_tune_writes_a_fragment_that_loads(deployment, capsys):
    assert deployment.run("ingest") == 0
    capsys.readouterr()
    assert deployment.run("tune", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"]["lr"] in (0.0001, 0.01)
    from pathlib import Path

    from pipeline.config import load

    assert load(Path(told["fragment"])).site.model_dump()["lr"] == told["best"]["lr"]


def test_evaluate_scores_domains_and_streams(deployment, capsys):
    assert deployment.run("evaluate", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {n: x["role"] for n, x in told["domains"].items()} == {"A": "source", "B": "source"}
    assert all(0 <= x["hter"] <= 1 for x in told["domains"].values())
    assert deployment.run("cycle") == 0
    capsys.readouterr()
    assert deployment.run("evaluate", "--streams", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["mean_hter"]) == {"before", "online", "after"}
