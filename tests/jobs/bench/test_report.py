"""One report is terminal table, JSON and Markdown, and ``--write`` replaces its own section alone."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.bench import report as reports
from jobs.terminal import Exit, Terminal
from pipeline.config import load
from pipeline.report.bench import Cell, Group, Report, Section, Table, at_least, at_most, estimate, rate
from pipeline.stats.intervals import Estimate

CONTEXT = {
    "command": "palisade bench site",
    "cores": 2,
    "processor": "Example 1",
    "seeds": [0],
    "revision": "0f3e",
}
WIDE = Table(
    "streams",
    "HTER per stream",
    {"stream": "stream", "methods.frozen": "frozen", "methods.danet": "danet"},
    [Group("shifted"), ["a|b", estimate(Estimate(0.2, 0.1, 0.3)), rate(0.1, "▼ −10.0", "more")]],
    shown=("stream", "methods.danet"),
    keyed=True,
)
LONG = Table(
    "poison",
    "rise",
    {"method": "method", "rise": "rise"},
    [Group("drip"), ["danet", rate(0.1)]],
    grouped="stream",
)


def report(*tables: Table, missed: bool = True) -> Report:
    figures = (at_least("below", 0.31, 0.3, "paired"), at_most("rise", None if missed else 0.0, 0.01))
    sections = (Section("s", "S", "", tables),)
    return Report("site", "Site methods", datetime(2026, 11, 22, tzinfo=UTC), figures, sections, {**CONTEXT})


def test_json_has_every_table_under_its_keys() -> None:
    assert reports.rows_of(WIDE) == {
        "a|b": {"group": "shifted", "stream": "a|b", "methods": {"frozen": (0.2, 0.1, 0.3), "danet": 0.1}}
    }
    assert reports.rows_of(LONG) == [{"stream": "drip", "method": "danet", "rise": 0.1}]


@pytest.mark.parametrize("missed, code", [(True, Exit.HOLD), (False, Exit.DONE)])
def test_the_command_ends_by_its_figures_and_publishes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missed: bool, code: Exit
) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps({"ledger": {"artifacts": str(tmp_path / "artifacts")}}))
    config = load(tmp_path / "c.yaml")
    given = report(
        WIDE,
        replace(LONG, medium="page"),
        replace(LONG, key="", title="narrow", medium="text"),
        missed=missed,
    )
    assert reports.conclude(config, Terminal(as_json=True), given) == code
    told = json.loads(capsys.readouterr().out)
    assert told["figures"]["below"] == {"value": 0.31, "target": ">= 0.3", "holds": True}
    assert told["figures"]["rise"] == {
        "value": None if missed else 0.0,
        "target": "<= 0.01",
        "holds": not missed,
    }
    assert set(told["context"]) == {*CONTEXT, "streams", "poison", "page"}
    page = Path(told["context"]["page"])
    assert (
        page == tmp_path / "artifacts" / "reports" / "bench-site.html"
        and "HTER per stream" in page.read_text()
    )
    reports.conclude(config, Terminal(), given)
    shown = capsys.readouterr().out
    assert "narrow" in shown and "HTER per stream" in shown and "frozen" not in shown
    assert ("2 of 2 figures hold" in shown) is not missed and (
        "1 of 2 figures hold; not rise" in shown
    ) is missed


def test_the_markdown_says_when_where_and_how_and_escapes_a_bar() -> None:
    text = reports.markdown(report(WIDE))
    assert text.startswith(
        "Measured on 22 November 2026 by `palisade bench site` on 2 cores (Example 1), seeds [0]"
    )
    assert "| stream | danet |\n| --- | --- |\n| shifted |  |\n| a\\|b | 10.0% [▼ −10.0] |" in text
    assert "| below | 0.31 | ≥ 0.3 | yes | paired |\n| rise | not measured | ≤ 0.01 | no | - |" in text


def test_a_cell_without_a_number_is_a_dash_and_only_its_first_line_stands_beside() -> None:
    rows = [["x", rate(float("nan")), None, Cell(1.0, "1", ("", "hidden")), "word"]]
    assert reports.cells_of(Table("t", "t", {str(i): str(i) for i in range(5)}, rows)) == (
        ["0", "1", "2", "3", "4"],
        [["x", "-", "-", "1", "word"]],
    )


def test_write_replaces_its_own_section_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    marks = {
        name: [f"<!-- {w} of palisade bench {name} -->" for w in ("begin", "end")]
        for name in ("site", "fleet")
    }
    before = (
        "# B\n\n" + "\n\nwords\n\n".join(f"{b}\nold {n}\n{e}" for n, (b, e) in marks.items()) + "\nlast\n"
    )
    path.write_text(before)
    reports.write_section(path, report(WIDE))
    text = path.read_text()
    assert "old site" not in text and "old fleet" in text and text.endswith("\nlast\n")
    assert text.count(marks["site"][0]) == text.count(marks["site"][1]) == 1 and "| a\\|b |" in text
    reports.write_section(path, report(WIDE))
    assert path.read_text() == text, "writing the same report twice changes nothing"
    path.write_text("# no markers\n")
    with pytest.raises(ValueError, match="begin of palisade bench site"):
        reports.write_section(path, report(WIDE))


@pytest.mark.parametrize("name", ["source", "site", "fleet", "rollout"])
def test_the_readme_has_a_section_for_every_benchmark(tmp_path: Path, name: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(reports.README.read_text())
    reports.write_section(path, replace(report(WIDE), name=name))
    assert path.read_text().count("HTER per stream") == 1


def test_the_glossary_describes_the_methods_by_their_own_documentation() -> None:
    words = reports.glossary("site", ["danet", "tent", "tent (published)"])
    assert "TENT" in words["tent"] and "danet" in words and "tent (published)" not in words
    assert {"HTER", "APCER", "oracle EER"} <= set(words)
