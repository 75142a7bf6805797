"""``palisade bench site --quick`` on three rendered domains and one site: figures, page, a second call."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import jobs.bench.site.run
from jobs.__main__ import main
from jobs.bench.site import labels
from pipeline.simulate import scenarios
from pipeline.simulate.corpora import synth
from pipeline.simulate.sites import demo_fleet, simulate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]

YAML = """
data: {{corpora: {root}/corpora, frame_px: 32}}
model: {{trunk: {{kind: tiny, width: 4, features: 16}}, tail: {{width: 8, rank: 2}}}}
source: {{kind: rise, batch: 16}}
ledger: {{artifacts: {root}/artifacts}}
bench: {{pretrain: false, quick_steps: 4, streams: {root}/captures, groups: {{lobby-north: clean}}}}
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench-site")
    synth.write(root / "corpora", size=32, domains=("A", "B", "D"), samples=60)
    simulate(root, [replace(s, rate=3.0) for s in demo_fleet() if s.site == "lobby-north"], phase=1)
    shutil.move(root / "sealed", root / "captures" / "_sealed")
    (root / "bench.yaml").write_text(YAML.format(root=root))
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few captures per rig, and streams of a few batches."""
    for name, value in (
        ("VISITORS", 4),
        ("VISITS", 1),
        ("ATTACKS", 2),
        ("PROBE", {"bona_fide": 5, "attack": 2}),
    ):
        monkeypatch.setattr(scenarios, name, value)
    monkeypatch.setattr(jobs.bench.site.run, "QUICK_SCALE", 0.04)


def run(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["bench", "site", "--quick", "--json", "--config", str(root / "bench.yaml"), *words])
    return code, json.loads(capsys.readouterr().out)


def test_figures_page_and_a_second_call(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run(bench, capsys)
    assert code == 3, "one seed and no ablation are no evidence"
    figures, context = told["figures"], told["context"]
    assert all(set(f) == {"value", "target", "holds"} for f in figures.values())
    assert {
        "danet_hter_below_frozen",
        "danet_better_than_tent",
        "worst_site_rise",
        "burst_apcer_rise",
    } <= set(figures)
    assert figures["degenerate_batches_without_effect"]["value"] == 5
    assert figures["ablation_cells"] == {"value": 0, "target": ">= 36", "holds": False}
    assert figures["seeds"] == {"value": 1, "target": ">= 3", "holds": False}
    assert {"versions", "cores", "seeds", "seconds", "revision"} <= set(context)
    assert set(context["methods"]) == set(jobs.bench.site.run.QUICK)
    assert {"lobby-north", "AB->D", "rig-e", "door-1", "drip-20"} <= set(context["streams"])
    assert {"bona_fide_labels_relative_to_frozen", "labels_worst_harm"} <= set(figures)
    assert {row["way"] for row in context["labels"]} == set(labels.ROWS)
    assert set(context["labels"][0]["doors"]) == {"AB->D", "AD->B", "BD->A"}
    frozen = context["methods"]["frozen"]
    assert frozen["below_frozen"] == 0 and frozen["forgetting"] == 0
    assert all(p["rise"] is None or -1 <= p["rise"] <= 1 for p in context["poison"])
    assert "Left out with --quick" in (bench / "artifacts" / "reports" / "bench-site-quick.html").read_text()
    folder = bench / "artifacts" / "bench" / "site"
    stored = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    _, again = run(bench, capsys)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == stored, (
        "nothing is made again"
    )
    assert again["context"]["streams"] == context["streams"]


def test_mistakes_are_one_line(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(bench / "bench.yaml")]
    for words, expected in (
        (["bench.streams=nowhere"], "bench.streams: nowhere is not there"),
        (["bench.groups={a: lost}"], "bench.groups.a"),
        (["data.corpora=nowhere"], "needs at least 3 domains"),
    ):
        capsys.readouterr()
        assert main(["bench", "site", "--quick", *words, *config]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert expected in errors[0]
