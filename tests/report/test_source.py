"""The source benchmark's page shows every number, is safe to open, and says why something is not there."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from datetime import UTC, datetime
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.report import plots, source, timelines
from pipeline.report.content import DetCurve, Figure, RadiusPanel
from pipeline.report.source import (
    SECTIONS,
    AblationCell,
    MethodRow,
    SourceBench,
    SpeedRow,
    UnseenRow,
    render,
    write,
)
from pipeline.stats.intervals import Estimate, Paired
from pipeline.stats.metrics import rate
from tests.support.pages import HOSTILE, NAN, UNKNOWN, Page, check_safe, head, section

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = ("wmca", "cefa", "padisi", "surf")
MEANS = {
    "erm": 0.261,
    "irm": 0.258,
    "vrex": 0.249,
    "pgirm": 0.232,
    "mmdg": 0.241,
    "dadm": 0.236,
    "ctnet": 0.244,
    "rise": 0.204,
}
HARD = {"wmca": 0.9, "cefa": 1.5, "padisi": 1.25, "surf": 0.35}


def around(value: float, rng: np.random.Generator, half: float = 0.03) -> Estimate:
    return Estimate(value, value - half * rng.uniform(0.6, 1), value + half * rng.uniform(0.6, 1))


def method(name: str, mean: float, rng: np.random.Generator) -> MethodRow:
    gain = MEANS["rise"] - mean
    return MethodRow(
        method=name,
        hter_by_target={t: around(mean * h + rng.normal(0, 0.01), rng) for t, h in HARD.items()},
        hter=around(mean, rng, 0.022),
        oracle_eer=0.4 * mean + 0.075,
        max_apcer=min(1.0, 2.6 * mean + rng.normal(0, 0.05)),
        worst_species=str(rng.choice(["silicone mask", "flexible mask", "paper glasses"])),
        bpcer=mean * rng.uniform(0.6, 1.1),
        bpcer20=mean * rng.uniform(1.2, 1.8),
        auc=1 - 0.5 * mean,
        seeds=3,
        paired=None if name == "rise" else Paired(around(gain, rng, 0.018), around(-gain / mean, rng, 0.06)),
    )


def det(gap: float) -> DetCurve:
    cuts, normal = np.linspace(-5, gap + 5, 900), NormalDist()
    apcer, bpcer = (np.array([normal.cdf(c) for c in side]) for side in (-cuts, cuts - gap))
    return DetCurve(apcer, bpcer, (normal.cdf(-0.4 * gap), normal.cdf(0.4 * gap - gap)))


def panel(domain: str, rng: np.random.Generator, shift: float = 0.0) -> RadiusPanel:
    real = np.abs(rng.normal(0.72 + shift, 0.13, 300))
    attack = np.abs(rng.normal(1.5 + shift / 2, 0.35, 700))
    turn = rng.uniform(0, 2 * np.pi)
    return RadiusPanel(domain, real, attack, 1.04, rng.normal(turn, 0.4, 300), rng.normal(turn + 2, 0.9, 700))


def bench(**changed: object) -> SourceBench:
    """Everything measured, with numbers as they may come out."""
    rng = np.random.default_rng(11)
    boundaries = ("linear CE", "linear + PG-IRM", "sphere ERM", "sphere + PG-IRM", "without angle")
    report = SourceBench(
        title="source benchmark",
        created=datetime(2026, 3, 14, 5, 0, tzinfo=UTC),
        notes=(
            "rise is a reconstruction from the paper's abstract.",
            "Rendered data: no licence-gated image was used.",
        ),
        figures=(
            Figure(
                "rise against erm",
                0.218,
                "%",
                "at least 15% less HTER",
                True,
                "1 - rise / erm, paired [14.1, 29.2]",
            ),
            Figure("mean HTER of rise", 0.204, "%", "below 20%", False, "mean over 4 targets and 3 seeds"),
            Figure(
                "step time",
                1.87,
                "× DataLoader",
                "above 1.5",
                True,
                "samples per second, median of 200 steps",
            ),
            Figure("gap to the oracle", None, "%", "below 5%", None, "needs the radii"),
        ),
        methods=tuple(method(m, v, rng) for m, v in MEANS.items()),
        det={
            t: [(m, det(2 * NormalDist().inv_cdf(1 - v * HARD[t] * 0.8))) for m, v in MEANS.items()]
            for t in TARGETS
        },
        radii={
            t: [*(panel(o, rng) for o in TARGETS if o != t), panel("target", rng, HARD[t] * 0.25)]
            for t in TARGETS
        },
        ablation={
            b: {
                c: AblationCell(around(0.26 - 0.01 * (i + j), rng), 0.17 - 0.004 * (i + j), 12)
                for j, c in enumerate(("no MMSD", "mixing only", "full"))
            }
            for i, b in enumerate(boundaries)
        },
        missing={
            p: {
                c: around(0.22 + 0.03 * i + 0.05 * j, rng)
                for j, c in enumerate(("complement", "zero-fill", "mean-fill"))
            }
            for i, p in enumerate(("nothing missing", "no depth", "no IR", "no depth, no IR", "no RGB"))
        },
        limited={
            p: {m: around(v * k, rng) for m, v in MEANS.items()} for p, k in (("CW→PS", 1.3), ("PS→CW", 1.45))
        },
        unseen=tuple(
            UnseenRow(t, s, {"rise": rate(int(n * a), n), "erm": rate(int(n * b), n)})
            for t, s, n, a, b in (
                ("wmca", "flexible mask", 411, 0.31, 0.52),
                ("wmca", "paper mask", 71, 0.04, 0.11),
                ("cefa", "silicone", 180, 0.62, 0.71),
                ("padisi", "transparent mask", 76, 0.13, 0.09),
                ("surf", "bent", 32, 0, 0),
            )
        ),
        speed=(
            SpeedRow("palisade", 0.0021, 0.0412, 0.0627, 0.0049, 431.7),
            SpeedRow("plain DataLoader loop", 0.0877, 0.0431, 0.0655, 0.0052, 238.2),
        ),
        context={
            "config": "conf/bench.yaml",
            "seconds": "41,234",
            "revision": "0f3e9a7",
            "cores": "2",
            "seeds": "0, 1, 2",
        },
        left_out={},
    )
    return replace(report, **changed)  # pyright: ignore[reportArgumentType]


def test_every_number_is_on_the_page() -> None:
    report = bench()
    html = render(report)
    check_safe(html)
    methods = section(html, "methods")
    for m in report.methods:
        for e in (*m.hter_by_target.values(), m.hter):
            assert f"{100 * e.value:.1f}%" in methods
            assert f"{100 * e.low:.1f}–{100 * e.high:.1f}" in methods
        for value in (m.oracle_eer, m.max_apcer, m.bpcer, m.bpcer20, m.auc):
            assert f"{100 * value:.1f}%" in methods
        assert f"{100 * (m.hter.value - m.oracle_eer):+.1f}" in methods
        assert m.method in methods and m.worst_species in methods
        if m.paired:
            d, r = m.paired
            assert f"−{-100 * d.value:.1f} {source._points(d.low)} to {source._points(d.high)}" in methods
            assert f"{100 * r.value:.1f}% {timelines.span(r.low, r.high)}" in methods
    for rows, name in ((report.missing, "missing"), (report.limited, "limited")):
        for row, cells in rows.items():
            text = [f"{100 * e.value:.1f}% {100 * e.low:.1f}–{100 * e.high:.1f}" for e in cells.values()]
            assert " ".join([row, *text]) in section(html, name)
    for boundary, cells in report.ablation.items():
        said = " ".join(
            f"{100 * c.hter.value:.1f}% {100 * c.hter.low:.1f}–{100 * c.hter.high:.1f} "
            f"oracle EER {100 * c.oracle_eer:.1f}%, {c.n} runs"
            for c in cells.values()
        )
        assert f"{boundary} {said}" in section(html, "ablation")
    for r in report.unseen:
        said = " ".join(f"{100 * a.rate:.1f}% ≤ {100 * a.upper95:.1f}%, n {a.n}" for a in r.apcer.values())
        assert f"{r.target} {r.species} {said}" in section(html, "unseen")
    assert "palisade 2.1 41.2 62.7 4.9 432" in section(html, "speed")
    assert "plain DataLoader loop 87.7 43.1 65.5 5.2 238" in section(html, "speed")
    assert all(f"{k} {v}" in section(html, "context") for k, v in report.context.items())
    for target, panels in report.radii.items():
        assert f"Target {target}" in section(html, "radii")
        for p in panels:
            out, inside = 100 * np.mean(p.bona_fide > p.rho), 100 * np.mean(p.attack <= p.rho)
            said = f"{p.domain} , boundary 1.04 outside: {out:.1f}% of 300 bona fide "
            said += f"inside: {inside:.1f}% of 700 attacks"
            assert said in section(html, "radii")


def test_figures_say_whether_they_hold() -> None:
    tiles = re.findall(r"<div><dt>.*?</div>", render(bench()), re.DOTALL)
    text = [" ".join(re.sub(r"<[^>]*>", " ", t).split()) for t in tiles]
    assert (
        text[0]
        == "rise against erm 21.8% ✓ holds target: at least 15% less HTER 1 - rise / erm, paired [14.1, 29.2]"
    )
    assert "20.4% ✕ does not hold target: below 20%" in text[1]
    assert "1.87 × DataLoader ✓ holds" in text[2]
    assert text[3] == "gap to the oracle – not measured target: below 5% needs the radii"


def changed_erm(difference: Estimate, relative: Estimate, rise: float = 0.204) -> SourceBench:
    rows = {m.method: m for m in bench().methods}
    erm = replace(rows["erm"], paired=Paired(difference, relative))
    return bench(methods=(erm, rows["pgirm"], replace(rows["rise"], hter=Estimate(rise, rise, rise))))


@pytest.mark.parametrize(
    "report, words",
    [
        (
            changed_erm(Estimate(-0.057, -0.071, -0.042), Estimate(0.218, 0.16, 0.27)),
            "rise errs least: mean HTER 20.4% over 4 unseen domains, 21.8% less than erm (16.0–27.0%).",
        ),
        (
            changed_erm(Estimate(-0.02, -0.045, 0.004), Estimate(0.08, -0.01, 0.17), rise=0.24),
            "pgirm errs least: mean HTER 23.2% over 4 unseen domains, rise has 24.0%, "
            "rise and erm are not told apart (−4.5 to +0.4 points).",
        ),
        (
            changed_erm(Estimate(0.03, 0.01, 0.05), Estimate(-0.11, -0.2, -0.04), rise=0.29),
            "pgirm errs least: mean HTER 23.2% over 4 unseen domains, rise has 29.0%, "
            "+3.0 points more than erm (+1.0 to +5.0).",
        ),
        (changed_erm(UNKNOWN, UNKNOWN), "rise errs least: mean HTER 20.4% over 4 unseen domains."),
        (bench(methods=()), "No method was measured."),
    ],
)
def test_the_answer_comes_first_and_is_fair(report: SourceBench, words: str) -> None:
    assert head(render(report)) == words


def test_methods_come_best_first_and_unmeasured_last() -> None:
    rows = bench().methods
    html = render(bench(methods=(replace(rows[0], hter=UNKNOWN), *rows[1:])))
    order = re.findall(r'<tr(?: class=own)?><th scope="row">(.*?)</th>', html)[: len(rows)]
    assert order == ["rise", "pgirm", "dadm", "mmdg", "ctnet", "vrex", "irm", "erm"]


def test_a_difference_is_coloured_only_where_it_is_sure() -> None:
    def cells(*difference: float) -> str:
        return render(changed_erm(Estimate(*difference), UNKNOWN))

    assert '<span class="good"><span aria-hidden="true">▼ </span><b>−5.0</b>' in cells(-0.05, -0.07, -0.01)
    assert '<span class="bad"><span aria-hidden="true">▲ </span><b>+5.0</b>' in cells(0.05, 0.01, 0.07)
    assert "▼ </span>" not in cells(-0.05, -0.11, 0.01).split("pgirm")[0]
    assert '<td class="n">−5.0<small>−11.0 to +1.0</small>' in cells(-0.05, -0.11, 0.01)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_without_data_says_why(name: str) -> None:
    full = bench()
    empty = {name: type(getattr(full, name))()}
    html = render(replace(full, **empty, left_out={name: "Skipped: <needs> a day."}))
    check_safe(html)
    assert section(html, name).endswith("Skipped: &lt;needs&gt; a day.")
    assert section(render(replace(full, **empty)), name).endswith("Not part of this run.")
    assert "Skipped" not in section(html, "methods" if name != "methods" else "det")


def test_nothing_measured_is_a_page_too() -> None:
    none = {
        f.name: type(getattr(bench(), f.name))()
        for f in fields(SourceBench)
        if f.name not in ("title", "created")
    }
    html = render(bench(**none))
    check_safe(html)
    assert all(section(html, s).endswith("Not part of this run.") for s in SECTIONS)


def test_not_measured_is_a_dash() -> None:
    rng = np.random.default_rng(0)
    nan = replace(
        method("mmdg", 0.2, rng),
        hter_by_target={"wmca": UNKNOWN},
        hter=UNKNOWN,
        oracle_eer=NAN,
        max_apcer=NAN,
        worst_species="",
        bpcer=NAN,
        bpcer20=NAN,
        auc=NAN,
        paired=Paired(UNKNOWN, UNKNOWN),
    )
    none = np.zeros(0)
    html = render(
        bench(
            figures=(Figure("f", NAN, "%", "t", None, "e"),),
            methods=(nan,),
            det={
                "wmca": [
                    ("mmdg", DetCurve(np.array([NAN]), np.array([0.1]), (NAN, NAN))),
                    ("rise", DetCurve(none, none, None)),
                ]
            },
            radii={
                "wmca": [RadiusPanel("target", none, np.array([NAN, 1.0]), NAN, none, np.array([0.0, NAN]))],
                "surf": [],
            },
            ablation={
                "sphere": {"full": AblationCell(UNKNOWN, NAN, 0)},
                "linear": {"none": AblationCell(UNKNOWN, NAN, 0)},
            },
            missing={"no IR": {"complement": UNKNOWN}},
            limited={"a": {"rise": UNKNOWN}, "b": {"erm": Estimate(0.2, NAN, NAN)}},
            unseen=(UnseenRow("wmca", "mask", {"rise": rate(0, 0)}),),
            speed=(SpeedRow("loop", NAN, NAN, NAN, NAN, NAN),),
        )
    )
    found = check_safe(html)
    assert not re.search(r"\b(nan|inf|None)\b", found.text)
    assert not re.search(r"[\"'=: ](nan|inf|None)\b", html)
    assert head(html) == "No method was measured."
    assert section(html, "missing").count("–") == 1
    assert "a – not measured – not measured b – not measured 20.0%" in section(html, "limited")


def test_hostile_strings_are_inert() -> None:
    rng = np.random.default_rng(0)
    e, h = around(0.2, rng), HOSTILE
    html = render(
        SourceBench(
            title=h,
            created=datetime(2026, 3, 14, tzinfo=UTC),
            notes=(h,),
            figures=(Figure(h, 0.1, h, h, True, h),),
            methods=(
                replace(method(h, 0.2, rng), hter_by_target={h: e}, worst_species=h),
                method("rise", 0.3, rng),
            ),
            det={h: [(h, det(2.0))]},
            radii={h: [panel(h, rng)]},
            ablation={h: {h: AblationCell(e, 0.1, 3)}},
            missing={h: {h: e}},
            limited={h: {h: e}},
            unseen=(UnseenRow(h, h, {h: rate(1, 9)}),),
            speed=(SpeedRow(h, 0.1, 0.1, 0.1, 0.1, 9.0),),
            context={h: h},
            left_out=dict.fromkeys(SECTIONS, h),
        )
    )
    check_safe(html)
    html.encode()
    assert "<script" not in html
    assert "\u202e" not in html and "\x00" not in html
    assert "{{7*7}}" in html
    check_safe(render(bench(methods=(), det={}, left_out={"methods": h, "det": h})))


def test_every_chart_says_what_it_shows() -> None:
    html = render(bench())
    charts = [a["aria-label"] or "" for t, a in Page(html).tags if t == "svg" and a.get("role") == "img"]
    assert len(charts) == 8 + 4 + 2 * 16 + 2
    assert any(c.startswith("rise: 20.4%, 95 % interval ") and "oracle EER 15.7%" in c for c in charts)
    assert any(c.startswith("DET curves on cefa.") and all(f"{m} " in c for m in MEANS) for c in charts)
    assert any("of bona fide are outside the boundary 1.04" in c for c in charts)
    assert any("attack radius median 1.5, half of them between" in c for c in charts)
    assert "load 2.1 ms, forward 41.2 ms, backward 62.7 ms, optimizer 4.9 ms" in charts


def test_rise_and_erm_are_drawn_over_the_others() -> None:
    (panel_of, *_) = re.findall(r"<figure><h3>wmca</h3>(.*?)</figure>", render(bench()), re.DOTALL)
    drawn = re.findall(r"<title>(.*?)</title><path class=\"(.*?)\"", panel_of)
    assert drawn[-2:] == [("erm", "before"), ("rise", "after")]
    assert {kind for _, kind in drawn[:-2]} == {"other"}
    assert len(re.findall("<circle", panel_of)) == 2  # operating points of the two


def test_classes_of_a_scatter_differ_in_shape_and_stay_on_the_disc() -> None:
    p = RadiusPanel(
        "target", np.array([0.5, 9.0]), np.array([1.0]), 0.8, np.array([0.0, np.pi / 2]), np.array([np.pi])
    )
    drawn = plots.sphere(p, top=2.0)
    assert 'class="bona-fide" d="M25.0 0.0h.01M0.0 -100.0h.01"' in drawn.replace("-0.0h", "0.0h").replace(
        "M-0.0", "M0.0"
    )
    assert 'class="attack" d="M-50.0 -0.0m-2-2l4 4m0-4l-4 4"' in drawn
    assert 'class="edge" r="40.0"' in drawn
    assert (p.outside, p.inside) == (0.5, 0.0)
    many = panel("wmca", np.random.default_rng(0))
    assert plots.sphere(many, top=2.0).count("m-2-2") == plots.POINTS


def test_radius_bars_hold_every_sample() -> None:
    p = panel("target", np.random.default_rng(0), 1.5)
    drawn = plots.radii(p, top=2.0)
    for kind, sign in (("bona-fide", -1), ("attack", 1)):
        path = re.search(rf'class="area {kind}" d="M0 50(.*?)V50Z"', drawn)
        assert path
        heights = [sign * (float(y) - 50) for y in re.findall(r"V([\d.]+)H", path[1])]
        assert len(heights) == plots.RADIUS_BINS
        assert min(heights) >= 0
        radius = np.clip(p.bona_fide if sign < 0 else p.attack, 0, 2.0)
        assert np.argmax(heights) == np.argmax(np.histogram(radius, plots.RADIUS_BINS, (0, 2.0))[0])


@pytest.mark.parametrize(
    "value, among, shade",
    [
        (0.1, [0.1, 0.3], "0.00"),
        (0.3, [0.1, 0.3, NAN], "1.00"),
        (0.21, [0.2, 0.21], "0.20"),
        (NAN, [0.1], "0"),
        (0.1, [], "0"),
    ],
)
def test_shades_do_not_blow_up_small_gaps(value: float, among: list[float], shade: str) -> None:
    assert source._shade(value, among) == shade


def test_intervals_read_well() -> None:
    assert timelines.span(0.151, 0.192) == "15.1–19.2"
    assert timelines.span(-0.012, 0.1) == "−1.2 to 10.0"
    assert timelines.span(NAN, 0.1) == ""


def test_page_stays_small() -> None:
    assert len(render(bench()).encode()) < 800_000


def test_write_puts_the_page(tmp_path: Path) -> None:
    write(bench(), tmp_path / "reports" / "source.html")
    assert (tmp_path / "reports" / "source.html").read_text() == render(bench())
