"""A benchmark's page: every number is on it, it is safe to open, and it says why something is not there."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from markupsafe import Markup

from pipeline.report import bench
from pipeline.report.bench import (
    Cell,
    Group,
    Report,
    Section,
    Table,
    at_least,
    at_most,
    estimate,
    rate,
    render,
)
from pipeline.stats.intervals import Estimate
from tests.support.pages import HOSTILE, NAN, UNKNOWN, check_safe, head, section

TABLE = Table(
    "methods",
    "all methods",
    {"method": "method", "hter": "HTER", "rise": "worst site", "what": "in words"},
    [
        Group("shifted", "what the sensors see is new"),
        ["frozen", estimate(Estimate(0.142, 0.131, 0.155)), bench.rise(0.0), "as it is"],
        ["danet", estimate(Estimate(0.0981, 0.09, 0.108)), bench.rise(0.0123, "door-1"), "learns"],
        ["sar", estimate(UNKNOWN), None, "recovers"],
    ],
    "column",
)


def report(*sections: Section, **changed: object) -> Report:
    whole = Report(
        name="site",
        title="Site methods",
        created=datetime(2026, 11, 22, 7, 0, tzinfo=UTC),
        figures=(
            at_least("danet_hter_below_frozen", 0.309, 0.3, "paired over streams"),
            at_most("worst_site_rise", 0.013, 0.01, "over frozen"),
            at_most("recovery", None, 400, "no stream with a sudden change"),
        ),
        sections=sections or (Section("methods", "Methods", "Best first.", [TABLE], "Bold is the lowest."),),
        context={"revision": "0f3e9a7", "seeds": [0, 1, 2], "took": "41,234 s"},
        answer=("danet errs least", "2 of 3 targets hold"),
        notes=("A reconstruction, not a reproduction.",),
        own=("danet",),
        glossary={"HTER": "mean of both error rates"},
    )
    return replace(whole, **changed)


def rows_of(html: str, name: str = "methods") -> dict[str, list[tuple[str, str]]]:
    """First cell → (attributes, text) of the others, of every row of a section."""
    (found,) = re.findall(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    rows = {}
    for line in re.findall(r"<tr[^>]*><th scope=\"row\">.*?</tr>", found, re.DOTALL):
        (first,) = re.findall(r'<th scope="row">(.*?)</th>', line)
        cells = re.findall(r"<td ([^>]*)>(.*?)</td>", line)
        rows[re.sub("<.*?>", " ", first).strip()] = [
            (a, " ".join(re.sub("<.*?>", " ", t).split())) for a, t in cells
        ]
    return rows


def test_every_part_is_on_the_page_and_the_answer_comes_first() -> None:
    html = render(report())
    check_safe(html)
    assert head(html) == "danet errs least, 2 of 3 targets hold."
    assert "A reconstruction, not a reproduction." in html
    text = section(html, "methods")
    assert "Best first. method HTER worst site in words shifted what the sensors see is new" in text
    assert "frozen 14.2% 13.1–15.5 0.0 as it is" in text
    assert "danet 9.8% 9.0–10.8 ▲ +1.2 door-1 learns" in text
    assert "sar – not measured – not measured recovers Bold is the lowest." in text
    assert "revision 0f3e9a7 seeds 0, 1, 2 took 41,234 s" in section(html, "context")
    assert "HTER mean of both error rates" in section(html, "glossary")


def test_figures_say_whether_they_hold() -> None:
    text = section(render(report()), "figures")
    assert "danet_hter_below_frozen 0.309 ≥ 0.3 ✓ yes paired over streams" in text
    assert "worst_site_rise 0.013 ≤ 0.01 ✕ no over frozen" in text
    assert "recovery not measured ≤ 400 ✕ no no stream with a sudden change" in text


def test_worse_is_marked_by_more_than_colour() -> None:
    values = (-0.02, 0.005, 0.0004, 0.05, NAN)
    cells = [rate(0.1 + v, bench.marked(v), rise=v) for v in values]
    table = Table("s", "streams", {str(i): str(i) for i in range(6)}, [["s", *cells]])
    cells_of = rows_of(render(report(Section("s", "S", "", [table]))), "s")["s"]
    assert [t for _, t in cells_of] == [
        "8.0% ▼ −2.0",
        "10.5% ▲ +0.5",
        "10.0% 0.0",
        "15.0% ▲ +5.0",
        "– not measured",
    ]
    assert [re.findall(r'class="([^"]*)"(?: style="--h:([\d.]+)")?', a)[0] for a, _ in cells_of] == [
        ("n better", "0.20"),
        ("n worse", "0.05"),
        ("n same", "0"),
        ("n worse harmed", "0.50"),
        ("n", ""),
    ]


def test_only_ranked_cells_are_shaded_and_the_lowest_is_bold() -> None:
    def shades(among: bench.Among) -> tuple[list[str], list[str]]:
        rows = [
            ["a", rate(0.1, ranked=True), rate(0.3, ranked=True)],
            ["b", rate(0.2, ranked=True), rate(0.05)],
        ]
        table = Table("t", "t", {"n": "n", "x": "x", "y": "y"}, rows, among)
        html = render(report(Section("t", "T", "", [table])))
        bold = re.findall(r"<b>(.*?)</b>", html.split('<section id="t">')[1])
        return re.findall(r"--h:([\d.]+)", html.split('<section id="t">')[1]), bold

    assert shades("row") == (["0.00", "1.00", "0.00"], ["10.0%"]), "a row of one has no lowest"
    assert shades("column") == (["0.00", "0.00", "1.00"], ["10.0%"])
    assert shades("table") == (["0.00", "1.00", "0.50"], ["10.0%"])
    assert shades("") == ([], [])


def test_our_own_rows_and_columns_are_in_colour() -> None:
    html = render(
        report(Section("t", "T", "", [Table("t", "t", {"m": "m", "d": "danet"}, [["danet", rate(0.1)]])]))
    )
    assert "<tr class=own>" in html and '<th scope="col" class="n own">danet</th>' in html


@pytest.mark.parametrize("parts", [(), (Table("m", "t", {"a": "a"}, []),), (replace(TABLE, medium="text"),)])
def test_a_section_without_data_says_why(parts: tuple[Table, ...]) -> None:
    html = render(report(Section("m", "M", "An intro.", parts, why="Skipped: <needs> a day.")))
    check_safe(html)
    assert section(html, "m") == "M Skipped: &lt;needs&gt; a day."
    assert section(render(report(Section("m", "M", "", parts))), "m") == "M Not part of this run."


def test_what_is_partly_missing_is_said_beside_what_is_there() -> None:
    text = section(render(report(Section("m", "M", "", [TABLE], why="clean streams only"))), "m")
    assert text.endswith("clean streams only") and "danet" in text


def test_what_was_not_measured_is_a_dash() -> None:
    cells = [
        rate(NAN),
        estimate(UNKNOWN),
        bench.points(NAN),
        bench.rise(NAN),
        bench.count(None),
        bench.number(NAN),
    ]
    rows = [["a", *cells, None, Cell(None, "", ("of 3",))], ["b", *[None] * 8]]
    table = Table("t", "t", {str(i): str(i) for i in range(9)}, rows, "table")
    html = render(
        report(Section("t", "T", "", [table, bench.bells([("m", UNKNOWN, Markup("<svg></svg>"))], 1.0)]))
    )
    page = check_safe(html)
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    assert not re.search(r"[\"'=: ,](nan|inf|None)\b", html)
    assert [t for _, t in rows_of(html, "t")["a"]] == ["– not measured"] * 7 + ["– not measured of 3"]


def test_nothing_measured_is_a_page_too() -> None:
    empty = replace(report(), figures=(), sections=(), context={}, answer=(), notes=(), own=(), glossary={})
    check_safe(render(empty))


def test_hostile_strings_are_inert() -> None:
    h, e = HOSTILE, Estimate(0.1, 0.09, 0.11)
    rows = [Group(h, h), [h, estimate(e, h), bench.rise(0.1, h), Cell(h, h, (h,)), h]]
    table = Table(h, h, {str(i): h for i in range(5)}, rows, "row")
    chart = bench.bells([(h, e, Markup("<svg></svg>"))], 1.0)
    html = render(
        Report(
            name=h,
            title=h,
            created=datetime(2026, 3, 14, tzinfo=UTC),
            figures=(at_most(h, 0.1, 0.2, h),),
            sections=(
                Section("a", h, h, [bench.legend({"oracle": h}), chart, table], h, h),
                Section("b", h, h, [], h, h),
            ),
            context={h: h},
            answer=(h,),
            notes=(h,),
            own=(h,),
            glossary={h: h},
        )
    )
    check_safe(html)
    html.encode()
    assert "<script" not in html
    assert "\u202e" not in html and "\x00" not in html
    assert "{{7*7}}" in html


def test_every_whisker_is_named_and_said_in_words() -> None:
    html = bench.bells([("danet", Estimate(0.098, 0.09, 0.108), Markup("<svg></svg>"))], 0.2)
    assert (
        '<span class="site" title="danet">danet</span><svg></svg><span class="v">9.8% <small>9.0–10.8</small>'
        in html
    )
    assert [f"{q}%" in html for q in (0, 5, 10, 15, 20)] == [True] * 5


@pytest.mark.parametrize(
    "value, words", [(0.0123, "+1.2"), (-0.05, "−5.0"), (0.0004, "0.0"), (-0.0004, "0.0"), (NAN, "–")]
)
def test_differences_read_well(value: float, words: str) -> None:
    assert bench.signed(value) == words


@pytest.mark.parametrize(
    "value, among, shade",
    [
        (0.1, [0.1, 0.3], "0.00"),
        (0.3, [0.1, 0.3, NAN], "1.00"),
        (0.21, [0.2, 0.21], "0.50"),
        (NAN, [0.1], "0"),
        (0.1, [], "0"),
    ],
)
def test_shades_do_not_blow_up_small_gaps(value: float, among: list[float], shade: str) -> None:
    assert bench.shade(value, among) == shade


def test_intervals_and_counts_read_well() -> None:
    assert bench.span(0.151, 0.192) == "15.1–19.2"
    assert bench.span(-0.012, 0.1) == "−1.2 to 10.0"
    assert bench.span(NAN, 0.1) == ""
    assert [bench.count(n).text for n in (1500, float("inf"), NAN, None)] == ["1,500", "∞", "", ""]


def test_a_grid_has_a_column_per_name_and_a_gap_where_a_row_lacks_it() -> None:
    table = bench.grid("g", "t", "row", {"a": {"x": rate(0.1)}, "b": {"y": rate(0.2)}})
    assert list(table.columns) == ["row", "x", "y"]
    assert [[c.text if isinstance(c, Cell) else c for c in row] for row in table.rows] == [
        ["a", "10.0%", None],
        ["b", None, "20.0%"],
    ]


def test_lines_have_a_colour_and_dashes_each_in_light_and_dark() -> None:
    html = render(report())
    for i in range(10):
        assert html.count(f"--c{i}: ") == 2  # light and print, dark
    assert len(set(re.findall(r"\.d\d+ \{ stroke-dasharray: (.*?); \}", html))) == 11


def test_a_page_is_the_same_twice_and_a_long_table_scrolls() -> None:
    rows = [[f"s{i}", *(rate(float(v)) for v in np.linspace(0, 1, 16))] for i in range(28)]
    table = Table("t", "t", {str(i): str(i) for i in range(17)}, rows)
    html = render(report(Section("t", "T", "", [table])))
    assert html == render(report(Section("t", "T", "", [table])))
    assert html.count('class="scroll tall"') == 1 and len(html.encode()) < 100_000
