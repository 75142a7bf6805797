"""The site benchmark's page shows every number of every stream and method, and its answer is fair."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from jobs.bench.site import labels, page
from jobs.bench.site.courses import MethodJob
from jobs.bench.site.online import SOUND, Course, Rates, Stream
from jobs.bench.site.page import GROUPS, MethodRow
from jobs.bench.site.results import Results, figures
from jobs.bench.site.streams import Prepared, SourceJob
from pipeline.config import method_config
from pipeline.models import ModelConfig
from pipeline.report import bench, plots
from pipeline.report.bench import Figure, Report, Section, render
from pipeline.simulate.scenarios import Scenario, Stretch
from pipeline.stats.intervals import Estimate
from tests.support.pages import NAN, UNKNOWN, Page, check_safe, section

SCENARIOS = (
    Scenario("rig-e", "shifted", "another rig", (Stretch(200, "E", 0.8),)),
    Scenario(
        "door-1", "one-class", "bona fide, then attacks", (Stretch(100, "E", 1.0), Stretch(100, "E", 0.0))
    ),
    Scenario("drip-5", "poisoning", "5 % chosen attacks", (Stretch(200, "E", 0.8, poison=0.05),)),
    Scenario("drip-20", "poisoning", "20 % chosen attacks", (Stretch(200, "E", 0.8, poison=0.2),)),
    Scenario("sensor-pane", "sensor", "a window", (Stretch(200, "pane", 0.8),)),
)
RECORDED = {"lobby-a": "clean", "gate-ageing": "shifted", "dock": "missing", "kiosk": "unseen"}
METHODS = {
    "frozen": 0.0,
    "danet": -0.05,
    "tent": 0.06,
    "tent (published)": 0.03,
}  # with what each adds to the HTER
TAUGHT = {"frozen": 0.2, "danet": 0.08, "lirr": 0.1}  # HTER after labels, less 0.03 with both classes
STOPPED = {"frozen": 0.0, "danet": 10.0}


def stream(name: str, seed: int) -> Stream:
    rng = np.random.default_rng([seed, len(name)])
    label = (
        (np.arange(200) < 100).astype(np.int64)
        if name == "door-1"
        else (np.arange(200) % 5 != 0).astype(np.int64)
    )
    z, one = np.zeros((200, 3, 2), np.float16), np.full(200, 7, np.uint8)
    species = np.where(label == 1, "bona_fide", "print")
    changes = (100,) if name == "gate-ageing" else ()
    return Stream(z, one, rng.integers(0, 40, 200), label, species, np.zeros(200, bool), changes, None)


def course(name: str, s: Stream, more: float, stopped: float, seed: int) -> Course:
    """Scores that err by chance, and rates that say how much the method adds."""
    rng = np.random.default_rng([seed, len(name), 7])
    score = np.clip(np.where(s.label == 1, 0.7, 0.3) + rng.normal(0, 0.2 + more, 200), 0, 1).astype(
        np.float32
    )
    online = Rates(0.2 + more, 0.1 + more, 0.4 + 2 * more, "print" if more else "mask")
    probe = Rates(0.2, 0.1, 0.3 + more, "print") if name.startswith("drip") else None
    after = Rates(0.15 + max(more, 0), 0.1, 0.2, "print")
    labels = np.where(rng.random(200) < 0.5, s.label, -1).astype(np.int8)
    shift = np.linspace(0, more, 25).astype(np.float32)
    return Course(score, labels if more else np.full(200, -1, np.int8), online, after, probe, shift, stopped)


@pytest.fixture(scope="module")
def results() -> Results:
    names = [*(s.name for s in SCENARIOS), *RECORDED]
    courses, prepared = {}, {}
    for seed in (0, 1):
        source = method_config("source", "erm").model_validate({"kind": "erm", "seed": seed})
        job = SourceJob("all", source, ModelConfig(), ("A", "B"), None)
        streams = {n: stream(n, seed) for n in names}
        prepared[job] = Prepared(streams, {}, streams["lobby-a"], np.zeros(0, int), 0.5)

        def add(
            table: str, row: str, more: float, of: list[str], job=job, streams=streams, seed=seed
        ) -> None:
            of_method = MethodJob(
                row, job, method_config("site", "frozen").model_validate({"kind": "frozen"})
            )
            stopped = STOPPED.get(row, float("inf"))
            courses[table, row, of_method] = {n: course(n, streams[n], more, stopped, seed) for n in of}

        for row, more in METHODS.items():
            add("main", row, more, names)
        for i, fill in enumerate(("zero-fill", "zero-fill, own thresholds", "substitute + enhance")):
            add("fills", fill, 0.1 - 0.02 * i, ["dock"])
        for row in ("zero-fill | all | one", "substitute | vote | omega"):
            add("ablation", row, 0.02 if "vote" in row else 0.04, ["dock", "rig-e"])
        for row, more in (("default", -0.05), ("without trigger", 0.01)):
            add("additions", row, more, ["rig-e", "lobby-a", "door-1", "drip-5"])
    given = {"costs": {"danet": 3.12}, "degenerate": {"NaN": SOUND, "all black": "not finite"}}
    scenarios = {s.name: s for s in SCENARIOS}
    return Results(RECORDED, scenarios, prepared, courses, state_kib=81.0, batch=8, labels=told(), **given)


@pytest.fixture(scope="module")
def rows(results: Results) -> list[MethodRow]:
    return page.method_rows(results)


def told() -> dict[labels.LabelJob, dict[str, labels.Errors]]:
    """Errors at two doors of one seed; a tenth of wrong labels costs two points."""
    source = method_config("source", "erm").model_validate({"kind": "erm", "seed": 0})
    own = method_config("site", "frozen").model_validate({"kind": "frozen"})
    of: dict[labels.LabelJob, dict[str, labels.Errors]] = {}
    for door, more in (("AB->C", 0.0), ("AC->B", 0.1)):
        job = SourceJob(door, source, ModelConfig(), ("A",), door[-1])
        for row, hter in TAUGHT.items():
            less = dict(zip(labels.CASES, (0.0, 0.03, 0.01), strict=True))
            draws = {
                c: np.array([-0.01, 0.01]) + hter + more - n * (row != "frozen") for c, n in less.items()
            }
            of[labels.LabelJob(row, job, own, "labels")] = {
                c: labels.Errors(d, d + 0.01, d - 0.01) for c, d in draws.items()
            }
    return of


def drawn(*sections: Section) -> str:
    created = datetime(2026, 3, 14, 5, 0, tzinfo=UTC)
    html = render(Report("site", "Site methods", created, (), sections, {}, own=("danet", "default")))
    check_safe(html)
    return html


@pytest.fixture(scope="module")
def html(results: Results, rows: list[MethodRow]) -> str:
    changes = {"default": "as it serves", "without trigger": "learns at once"}
    return drawn(*page.sections(results, rows, changes, quick=False))


def pc(value: float) -> str:
    return f"{100 * value:.1f}%".replace("-", "−")


def test_methods_come_best_first_with_every_number(rows: list[MethodRow], html: str) -> None:
    assert [r.hter.value for r in rows] == sorted(r.hter.value for r in rows)
    text = section(html, "methods")
    for m in rows:
        said = [m.method, pc(m.hter.value), bench.span(m.hter.low, m.hter.high), pc(m.below_frozen)]
        said += [bench.marked(m.worst_rise), m.worst_site, pc(m.harmed), pc(m.bpcer), pc(m.max_apcer)]
        right = (m.precision_bona_fide, m.precision_attack)
        said += ["– not measured" if np.isnan(v) else pc(v) for v in right]
        said += ["∞" if np.isinf(m.recovery) else f"{m.recovery:,.0f}", bench.marked(m.forgetting)]
        said += ["– not measured" if np.isnan(m.cost) else "3.12×"]
        assert " ".join(said) in text
    by = {m.method: m for m in rows}
    assert by["frozen"].below_frozen == by["frozen"].worst_rise == by["frozen"].forgetting == 0
    assert by["danet"].worst_rise == pytest.approx(-0.05) and by["danet"].harmed == 0
    assert by["tent"].worst_rise == pytest.approx(0.06) and by["tent"].harmed == 1
    assert by["danet"].bpcer == pytest.approx(0.05) and by["tent"].max_apcer == pytest.approx(0.52)


def test_streams_come_by_group_with_every_number(results: Results, html: str) -> None:
    text = section(html, "streams")
    (whole,) = re.findall(r'<section id="streams">.*?</section>', html, re.DOTALL)
    assert re.findall(r"<span>([a-z-]+)<small>", whole) == list(GROUPS)
    assert "stream oracle EER frozen danet" in text
    for name in results.main["frozen"]:
        said = [name, "200 samples", results.what(name)]
        assert " ".join(said) in text
    for method, more in METHODS.items():
        value = [pc(0.2 + more)] + [bench.marked(more)] * (method != "frozen")
        both = f"BPCER {pc(0.1 + more)} max APCER {pc(0.4 + 2 * more)} {'print' if more else 'mask'}"
        assert " ".join([*value, both]) in text


def test_a_stream_with_one_class_shows_that_class_by_its_name() -> None:
    cell = page._stream_cell(Rates(NAN, 0.08, NAN, ""), "bpcer", 0.1)
    assert (cell.text, cell.small[:2], cell.rise) == ("8.0%", ("▼ −2.0", "BPCER"), pytest.approx(-0.02))
    alone = page._stream_cell(Rates(0.1, 0.1, 0.1, "print"), "hter", None)
    assert alone.rise is None and alone.small[0] == "", "without a baseline nothing is compared"


def test_doors_and_attacks_show_every_number(results: Results, html: str) -> None:
    door = section(html, "one_class")
    assert "door-1 100.0% bona fide before the burst" in door
    for method, more in METHODS.items():
        burst, frozen = results.burst(method, "door-1"), results.burst("frozen", "door-1")
        said = [method, bench.marked(more), bench.marked(2 * more), pc(burst), f"frozen {pc(frozen)}"]
        assert " ".join(said) in door
    poison = section(html, "poison")
    for name, share in (("drip-5", "5.0%"), ("drip-20", "20.0%")):
        assert f"{name} {share} poisoned: {results.what(name)}" in poison
    for method, more in METHODS.items():
        if method == "frozen":
            continue
        over = bench.marked(more) if more > page.LIMIT else bench.signed(more)
        stopped = "10" if method == "danet" else "did not"
        assert f"{method} {over} {pc(0.4 + 2 * more)} {stopped}" in poison
    charts = [a["aria-label"] for t, a in Page(html).tags if t == "svg" and a.get("class") == "change"]
    assert len(charts) == 2 * 3 and "danet: −5.0 points" in charts


def test_the_parts_of_the_method_show_every_number(html: str) -> None:
    missing = section(html, "missing")
    for i, fill in enumerate(("zero-fill", "zero-fill, own thresholds", "substitute + enhance")):
        more = 0.1 - 0.02 * i
        assert f"{fill} {pc(0.2 + more)} {pc(0.1 + more)} {pc(0.4 + 2 * more)}" in missing
    ablation = section(html, "ablation")
    assert f"zero-fill, all {pc(0.24)} worst site +4.0" in ablation
    assert f"substitute, vote – not measured {pc(0.22)} worst site +2.0" in ablation
    additions = section(html, "additions")
    assert f"default as it serves {pc(0.15)} {pc(0.25)} −5.0 −5.0 −5.0" in additions
    assert (
        f"without trigger learns at once {pc(0.21)} ▲ +6.0 {pc(-0.05)} +1.0 ▲ +6.0 +1.0 ▲ +6.0 +1.0 ▲ +6.0"
        in additions
    )


def test_labels_show_every_door_and_both_errors(results: Results, html: str) -> None:
    text = section(html, "labels")
    assert f"16 bona fide 16 labels, 0 of them wrong frozen {pc(0.25)}" in text
    assert "32 labels, 3 of them wrong" in text
    said = [pc(0.13), pc(1 - 0.13 / 0.25), pc(0.08), pc(0.18), pc(0.14), pc(0.12)]
    assert f"danet {' '.join(said)}" in text
    by = {f.name: f for f in figures(results, dict.fromkeys(METHODS, 0.1), seeds=2)}
    assert by["bona_fide_labels_relative_to_frozen"].value == pytest.approx(0.13 / 0.25)
    assert by["both_labels_relative_to_frozen"].value == pytest.approx(0.10 / 0.25)
    assert by["labels_worst_harm"].value == pytest.approx(-0.12)
    assert by["wrong_labels_gain_lost"].value == pytest.approx(0.02)
    assert not by["wrong_labels_gain_lost"].holds


def test_without_left_out_doors_nothing_is_claimed_of_labels(results: Results) -> None:
    bare = replace(results, labels={})
    by = {f.name: f for f in figures(bare, dict.fromkeys(METHODS, 0.1), seeds=2)}
    assert by["both_labels_relative_to_frozen"].measured is None
    assert not by["labels_worst_harm"].holds


def test_timelines_are_drawn_for_the_shown_methods(html: str) -> None:
    assert re.findall(r"<figure><h3>(.*?)</h3>", html) == ["gate-ageing", "door-1", "drip-20"]
    charts = [a["aria-label"] or "" for t, a in Page(html).tags if t == "svg" and a.get("role") == "img"]
    assert any(
        c.startswith("max APCER over gate-ageing: frozen mean") and "; danet mean" in c for c in charts
    )
    assert any(c.startswith("Boundary over drip-20: last −0.05") for c in charts)


def test_a_quick_run_says_what_it_leaves_out(results: Results, rows: list[MethodRow]) -> None:
    main = {k: v for k, v in results.courses.items() if k[0] in ("main", "fills")}
    quick = drawn(*page.sections(replace(results, courses=main), rows, {}, quick=True))
    assert section(quick, "ablation") == "Ablation Left out with --quick."
    assert section(quick, "additions") == "Our additions Left out with --quick."


def decided(held: int, missed: int) -> list[Figure]:
    return [bench.at_most(str(i), float(i >= held), 0.5) for i in range(held + missed)] + [
        bench.at_most("x", None, 1)
    ]


@pytest.mark.parametrize(
    "danet, eata, harmed, figures, words",
    [
        (
            Estimate(0.1, 0.09, 0.11),
            0.13,
            0.0,
            decided(3, 1),
            "danet errs least on shifted streams: mean online HTER 10.0%, 28.6% less than frozen, "
            "none of the sites harmed by danet, 3 of 4 targets hold",
        ),
        (
            Estimate(0.132, 0.11, 0.15),
            0.12,
            0.125,
            [],
            "eata errs least on shifted streams: mean online HTER 12.0%, danet has 13.2%, "
            "5.7% less than frozen (intervals overlap), 12.5% of the sites harmed by danet",
        ),
        (
            Estimate(0.21, 0.19, 0.23),
            0.13,
            0.0,
            [],
            "eata errs least on shifted streams: mean online HTER 13.0%, danet has 21.0%, 50.0% more than "
            "frozen, none of the sites harmed by danet",
        ),
        (UNKNOWN, 0.13, NAN, [], "eata errs least on shifted streams: mean online HTER 13.0%"),
    ],
)
def test_the_answer_is_fair(
    danet: Estimate, eata: float, harmed: float, figures: list[Figure], words: str
) -> None:
    def row(name: str, hter: Estimate, below: float, harmed: float = 0.0) -> MethodRow:
        return MethodRow(name, hter, below, "", 0, harmed, 0, 0, 0, 0, 0, 0, 1)

    three = [
        row("frozen", Estimate(0.14, 0.12, 0.16), 0.0),
        row("danet", danet, 1 - danet.value / 0.14, harmed),
        row("eata", Estimate(eata, eata, eata), 0.1),
    ]
    three.sort(key=lambda m: (np.isnan(m.hter.value), m.hter.value))
    assert ", ".join(page.answer(three, figures)) == words
    assert page.answer((), ()) == ["No method was measured"]


def test_a_replaced_camera_is_shown_and_counts_in_no_mean_and_no_target(results: Results) -> None:
    def worse(name: str) -> Results:
        """Returns the results with danet's errors on one stream doubled."""
        courses = {
            key: {**of, name: course(name, stream(name, 0), 0.4, 10.0, 0)}
            if key[:2] == ("main", "danet")
            else of
            for key, of in results.courses.items()
        }
        return replace(results, courses=courses)

    def decided(r: Results) -> dict[str, float | None]:
        rows = page.method_rows(r)
        own = next(m for m in rows if m.method == "danet")
        hters = {m.method: m.hter.value for m in rows}
        return {f.name: f.value for f in figures(r, hters, seeds=2)} | {
            "harmed": own.harmed,
            "hter": own.hter.value,
        }

    assert decided(worse("sensor-pane")) == pytest.approx(decided(results), nan_ok=True)
    assert decided(worse("kiosk"))["worst_site_rise"] == pytest.approx(0.4)
    assert results.streams("sensor") == ["sensor-pane"]


def test_figures_are_those_of_the_rates(results: Results, rows: list[MethodRow]) -> None:
    by = {f.name: f for f in figures(results, {m.method: m.hter.value for m in rows}, seeds=2)}
    assert by["worst_site_rise"].value == pytest.approx(-0.05) and by["worst_site_rise"].holds
    assert by["one_class_and_clean_max_apcer_rise"].value == pytest.approx(-0.1)
    assert by["poisoning_up_to_5_percent"].value == pytest.approx(-0.05)
    assert by["poisoning_20_percent_or_burst"].value == pytest.approx(-0.05), "less than zero stays"
    saved = {
        n: by[n].value for n in ("complement_below_zero_fill", "complement_below_zero_fill_recalibrated")
    }
    assert [*saved.values()] == pytest.approx([1 - 0.26 / 0.3, 1 - 0.26 / 0.28])
    assert by["ablation_cells"].value == 2 and not by["ablation_cells"].holds
    assert by["degenerate_batches_without_effect"].value == 1
    assert by["seeds"].value == 2 and not by["seeds"].holds
    assert "danet_better_than_tent" in by and "danet_better_than_tent (published)" not in by
    assert plots.percent(rows[0].hter.value) in by["danet_hter_below_frozen"].note
