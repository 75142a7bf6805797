"""Verdicts by the commands a user types: explained, checked again, judged by other policies."""

from __future__ import annotations

import json

import pytest

from tests.support.artifacts import flip
from tests.support.deployments import SITES, printed

pytestmark = pytest.mark.e2e

HELD = "guards.no_data.stream_min=100000"
LOOSE = [f"guards.{g}.advisory=true" for g in ("influence", "labels", "modality", "collapse", "ratchet")]


def test_a_verdict_is_explained_replayed_and_judged_by_other_policies(deployment, tmp_path, capsys):
    d = deployment
    assert d.run("cycle", HELD, *LOOSE) == 3
    capsys.readouterr()
    assert d.run("guard", "explain", "lobby-north", HELD, "--json") == 0
    found = printed(capsys)
    assert found["outcome"] == "hold" and found["findings"][0]["guard"] == "no_data"
    assert "a window of at least 100000" in found["to_pass"][0]
    assert found["evidence"]["anchor set"].startswith(
        d.ledger.verdicts.anchor(d.ledger.sources.champion().trunk)[:12]
    )

    assert d.run("guard", "recheck", "lobby-north", "--recount") == 0, (
        "under the limits of the cycle, not of today"
    )
    assert "byte for byte" in capsys.readouterr().out
    assert d.run("guard", "recheck", "--all", "--recount", "--json") == 0
    found = printed(capsys)
    assert found["verdicts"] == found["same"] == len(SITES) and found["recounted"] >= 3

    out = tmp_path / "policy.json"
    assert (
        d.run(
            "guard",
            "simulate",
            "--with",
            "guards.no_data.stream_min=1000000",
            "--out",
            str(out),
            HELD,
            "--json",
        )
        == 0
    )
    stricter = printed(capsys)
    assert stricter["policy"]["hold"] == len(SITES) and stricter["changed"]["guards.no_data.stream_min"] == [
        100_000,
        1_000_000,
    ]
    assert [x["cycle"] for x in json.loads(out.read_text())["decisions"]] == ["cycle-00001"] * len(SITES)
    advisory = [w for setting in LOOSE for w in ("--with", setting)]
    assert (
        d.run("guard", "simulate", "--with", "guards.no_data.stream_min=40", *advisory, HELD, "--json") == 4
    )
    looser = printed(capsys)
    assert looser["looser"] and looser["policy"]["pass"] > 0 == looser["recorded"]["pass"]
    assert looser["recorded"]["false_holds"]["n"] > 0, "sealed labels say that some were fine"


def test_a_tampered_anchor_set_stops_judging_until_it_is_sealed_again(deployment, capsys):
    d = deployment
    assert d.run("anchor", "verify") == 0
    (file,) = (d.root / "artifacts" / "anchors").rglob("*.safetensors")
    flip(file)
    capsys.readouterr()
    assert d.run("anchor", "verify") == 4
    assert str(file) in capsys.readouterr().out
    assert d.run("ingest") == 0
    capsys.readouterr()
    assert d.run("adapt") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert file.name in line and "palisade anchor seal" in line
    assert d.ledger.verdicts.find() == []
    assert d.run("anchor", "seal") == 0
    assert d.run("anchor", "verify") == 0
    d.run("adapt", *LOOSE)
    assert len(d.ledger.verdicts.find()) == len(SITES)
