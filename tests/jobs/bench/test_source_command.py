"""``palisade bench source --quick`` on three rendered domains: exit code, JSON, page, a second call."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from jobs.__main__ import main
from jobs.terminal import Terminal
from pipeline.report.bench import Figure, at_least, at_most
from pipeline.simulate.corpora import synth

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]

YAML = """
data: {{corpora: {root}/corpora, frame_px: 32}}
model: {{trunk: {{kind: tiny, width: 4, features: 16}}, tail: {{width: 8, rank: 2}}}}
source: {{kind: rise, batch: 16}}
ledger: {{artifacts: {root}/artifacts}}
bench: {{pretrain: false, quick_steps: 4}}
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    synth.write(root / "corpora", size=32, domains=("A", "B", "D"), samples=60)
    (root / "bench.yaml").write_text(YAML.format(root=root))
    return root


def run(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["bench", "source", "--quick", "--json", "--config", str(root / "bench.yaml"), *words])
    return code, json.loads(capsys.readouterr().out)


def test_figures_context_and_page(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run(bench, capsys)
    assert set(told) == {"figures", "context"}
    assert all(set(f) == {"value", "target", "holds"} for f in told["figures"].values())
    assert code == (0 if all(f["holds"] for f in told["figures"].values()) else 3)
    assert code == 3, "a quick run has no ablation"
    figures = told["figures"]
    assert 0 <= figures["rise_mean_hter"]["value"] <= 1
    assert [n for n in figures if n.startswith("rise_better_than")] == ["rise_better_than_erm"], (
        "the one it fits"
    )
    assert figures["ablation_rows"]["value"] == 0
    assert figures["all_sets_hter"]["value"] is None
    assert figures["degenerate_corpora_sound"]["holds"]
    assert set(told["context"]["methods"]["erm"]["targets"]) == {"A", "B", "D"}
    assert {"versions", "cores", "seeds", "seconds", "revision"} <= set(told["context"])
    page = (bench / "artifacts" / "reports" / "bench-source-quick.html").read_text()
    assert "Left out with --quick" in page
    stored = {p: p.stat().st_mtime_ns for p in (bench / "artifacts" / "bench" / "source").iterdir()}
    assert len(stored) == 6
    _, again = run(bench, capsys)
    assert {p: p.stat().st_mtime_ns for p in stored} == stored, "a second call fits nothing again"
    assert again["context"]["methods"] == told["context"]["methods"]


def test_mistakes_are_one_line(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(bench / "bench.yaml")]
    for words, expected in (
        (["bench.sets={W: wmca}", "bench.root=nowhere"], "bench.root: nowhere is not there"),
        (["data.frame_px=64"], "imported at 32"),
        (["data.corpora=nowhere"], "needs at least 3 domains"),
        (["source.kind=rise", "bench.quick_steps=0"], "bench.quick_steps"),
    ):
        capsys.readouterr()
        assert main(["bench", "source", "--quick", *words, *config]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert expected in errors[0]


@pytest.mark.parametrize(
    ("figure", "holds"),
    [
        (at_most("f", 0.15, 0.15), True),
        (at_most("f", 0.16, 0.15), False),
        (at_least("f", 0.25, 0.25), True),
        (at_least("f", 0.0, 0.0, strict=True), False),
        (at_least("f", None, 0.0), False),
        (at_most("f", float("nan"), 0.0), False),
    ],
)
def test_a_figure_holds_only_when_measured_and_on_its_side(figure: Figure, holds: bool) -> None:
    assert figure.holds is holds


def test_json_has_null_where_there_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(as_json=True).result({"a": float("nan"), "b": [1.0, (float("inf"), "x")]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.0, [None, "x"]]}
