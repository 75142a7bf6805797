"""A person's mistake is one clear line and the right exit code; nothing is lost."""

from __future__ import annotations

import sqlite3

import pytest

from jobs.__main__ import main
from pipeline.control.deployment import now
from tests.support.artifacts import flip
from tests.support.deployments import new_deployment

pytestmark = pytest.mark.e2e


def said(capsys) -> str:
    err = capsys.readouterr().err.strip()
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["site", "show", "lobby-nort"], 2, "did you mean lobby-north"),
        (["adapt", "--site", "nowhere"], 2, "not registered"),
        (["evaluate", "--version", "9"], 2, "versions: 1"),
        (["rollout", "status"], 2, "palisade rollout plan"),
        (["rollout", "plan"], 2, "nothing to release"),
        (["cycle", "site.lrr=1"], 2, "did you mean lr"),
        (["report", "--cycle", "x"], 2, "no finished cycle"),
        (["tune", "search.sites=[]"], 2, "search.sites"),
        (["import", "wmcaa", "x"], 2, "allowed: cefa, padisi, rendered, surf, synth, wmca"),
        (["import", "wmca", "nowhere"], 2, "nowhere"),
        (["train", "data.domains=[A,Z]"], 2, "'Z' is not imported"),
        (["train", "data.frame_px=64"], 2, "imported at 32"),
        (["ingest", "data.captures=nowhere"], 2, "nowhere"),
        (["frobnicate"], 2, "No such command"),
        (
            ["site", "list", "lineage.uri=sqlite:///x", "ledger.url=sqlite:////nowhere/at/all.db"],
            5,
            "no ledger",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistake(deployment, capsys, words, code, expected):
    if "lobby-nort" in words:
        deployment.ledger.streams.register({"lobby-north": {}}, now=now())
    assert deployment.run(*words) == code
    assert expected in said(capsys)


def test_an_empty_captures_folder(deployment, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert deployment.run("ingest", f"data.captures={tmp_path / 'empty'}") == 2
    assert "no site folder" in said(capsys)


def test_no_source_model(tmp_path, capsys):
    d = new_deployment(tmp_path)
    (tmp_path / "captures").mkdir()
    assert d.run("ingest") == 2
    assert "palisade train" in said(capsys)


def test_a_ledger_of_a_newer_version(deployment, capsys):
    with sqlite3.connect(deployment.root / "ledger.db") as c:
        c.execute("update meta set value = '99' where key = 'schema'")
    assert deployment.run("site", "list") == 5
    assert "schema 99 is newer" in said(capsys)


def test_a_damaged_model(deployment, capsys):
    (weights,) = (deployment.root / "artifacts" / "models").rglob("model.safetensors")
    flip(weights, at=1)
    assert deployment.run("evaluate") == 2
    assert "digest" in said(capsys)


def test_a_missing_config_file(capsys):
    assert main(["site", "list", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in said(capsys)
