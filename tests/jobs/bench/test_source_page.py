"""The source benchmark's page shows every number and every chart, and its answer is fair."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from statistics import NormalDist

import numpy as np
import pytest

from jobs.bench.source import page
from jobs.bench.source.compare import MethodRow, UnseenRow
from jobs.bench.speed import Cost, Speed
from pipeline.report import bench
from pipeline.report.bench import Report, Section, render
from pipeline.report.content import DetCurve, RadiusPanel
from pipeline.stats.intervals import Estimate, Paired
from pipeline.stats.metrics import rate
from tests.support.pages import NAN, UNKNOWN, Page, check_safe, section

TARGETS = ("wmca", "cefa", "padisi", "surf")
MEANS = {"erm": 0.261, "irm": 0.258, "pgirm": 0.232, "mmdg": 0.241, "ctnet": 0.244, "rise": 0.204}
HARD = dict(zip(TARGETS, (0.9, 1.5, 1.25, 0.35), strict=True))


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


def rows(**changed: MethodRow) -> list[MethodRow]:
    rng = np.random.default_rng(11)
    every = {m: method(m, v, rng) for m, v in MEANS.items()} | changed
    return sorted(every.values(), key=lambda r: (np.isnan(r.hter.value), r.hter.value))


def drawn(*sections: Section) -> str:
    created = datetime(2026, 3, 14, 5, 0, tzinfo=UTC)
    html = render(Report("source", "Source methods", created, (), sections, {}, own=("rise",)))
    check_safe(html)
    return html


def test_every_number_of_the_methods_is_on_the_page() -> None:
    text = section(drawn(page.methods_section(rows())), "methods")
    for m in rows():
        for e in (m.hter, *m.hter_by_target.values()):
            assert f"{100 * e.value:.1f}% {100 * e.low:.1f}–{100 * e.high:.1f}" in text
        rates = [f"{100 * v:.1f}%" for v in (m.oracle_eer, m.max_apcer, m.bpcer, m.bpcer20, m.auc)]
        shift = bench.signed(m.hter.value - m.oracle_eer)
        assert " ".join([rates[0], shift, rates[1], m.worst_species, *rates[2:]]) in text
        if m.paired:
            d, r = m.paired
            assert f"{bench.signed(d.value)} {bench.signed(d.low)} to {bench.signed(d.high)}" in text
            assert f"{100 * r.value:.1f}% {bench.span(r.low, r.high)} 3" in text


@pytest.mark.parametrize(
    "difference, relative, rise, words",
    [
        (
            Estimate(-0.057, -0.071, -0.042),
            Estimate(0.218, 0.16, 0.27),
            0.204,
            "rise errs least: mean HTER 20.4% over 4 unseen domains, 21.8% less than erm (16.0–27.0%)",
        ),
        (
            Estimate(-0.02, -0.045, 0.004),
            Estimate(0.08, -0.01, 0.17),
            0.24,
            "pgirm errs least: mean HTER 23.2% over 4 unseen domains, rise has 24.0%, "
            "rise and erm are not told apart (−4.5 to +0.4 points)",
        ),
        (
            Estimate(0.03, 0.01, 0.05),
            Estimate(-0.11, -0.2, -0.04),
            0.29,
            "pgirm errs least: mean HTER 23.2% over 4 unseen domains, rise has 29.0%, "
            "+3.0 points more than erm (+1.0 to +5.0)",
        ),
        (UNKNOWN, UNKNOWN, 0.204, "rise errs least: mean HTER 20.4% over 4 unseen domains"),
    ],
)
def test_the_answer_is_fair(difference: Estimate, relative: Estimate, rise: float, words: str) -> None:
    every = {m.method: m for m in rows()}
    erm = every["erm"]._replace(paired=Paired(difference, relative))
    ours = every["rise"]._replace(hter=Estimate(rise, rise, rise))
    three = sorted([erm, every["pgirm"], ours], key=lambda r: r.hter.value)
    assert ", ".join(page.answer(three)) == words


def test_a_method_with_fewer_seeds_is_not_said_to_err_least() -> None:
    every = {m.method: m._replace(paired=None) for m in rows()}
    lucky = every["pgirm"]._replace(hter=Estimate(0.1, 0.1, 0.1), seeds=1)
    said = page.answer([lucky, every["rise"], every["erm"]])[0]
    assert said.startswith("rise errs least of the 2 methods with 3 seeds: mean HTER")


def test_nothing_measured_has_an_answer_too() -> None:
    assert page.answer(()) == page.answer([rows()[0]._replace(hter=UNKNOWN)]) == ["No method was measured"]


def test_a_difference_is_marked_only_where_it_is_sure() -> None:
    def cell(*difference: float) -> str:
        erm = rows()[-1]._replace(paired=Paired(Estimate(*difference), UNKNOWN))
        return drawn(page.methods_section([erm]))

    assert '<span class="rise better"><span aria-hidden="true">▼</span> −5.0</span>' in cell(
        -0.05, -0.07, -0.01
    )
    assert '<span class="rise worse"><span aria-hidden="true">▲</span> +5.0</span>' in cell(0.05, 0.01, 0.07)
    assert '<td class="n">−5.0<small>−11.0 to +1.0</small>' in cell(-0.05, -0.11, 0.01)


def test_grids_unseen_attacks_and_speed_show_every_number() -> None:
    rng = np.random.default_rng(3)
    cells = {p: {c: around(0.2, rng) for c in ("complement", "zero-fill")} for p in ("no IR", "no RGB")}
    missing = Section("missing", "M", "", [page._grid("missing", "t", "sensors", cells)])
    unseen = (
        UnseenRow("wmca", "mask", {"rise": rate(41, 411), "erm": rate(80, 411)}),
        UnseenRow("surf", "bent", {"rise": rate(0, 32)}),
    )
    cost = Cost(151_000_000, 4.4, 6.61)
    speed = page.speed_section(Speed(0.0021, 0.0412, 0.0627, 0.0049, 431.7, 238.2), cost)
    html = drawn(missing, page.unseen_section(unseen), speed)
    for p, per in cells.items():
        said = " ".join(f"{100 * e.value:.1f}% {100 * e.low:.1f}–{100 * e.high:.1f}" for e in per.values())
        assert f"{p} {said}" in section(html, "missing")
    for u in unseen:
        said = " ".join(f"{100 * a.rate:.1f}% ≤ {100 * a.upper95:.1f}%, n {a.n}" for a in u.apcer.values())
        assert f"{u.target}: {u.species} {said}" in section(html, "unseen")
    assert "palisade 2.1 41.2 62.7 4.9 432" in section(html, "speed")
    assert "bare loop with a DataLoader" + " – not measured" * 4 + " 238" in section(html, "speed")
    assert section(html, "speed").endswith("trunk 151 4.4 6.61")
    assert "load 2.1 ms, forward 41.2 ms, backward 62.7 ms, optimizer 4.9 ms" in html


def test_det_curves_of_rise_and_erm_are_drawn_over_the_others() -> None:
    def det(gap: float) -> DetCurve:
        cuts, normal = np.linspace(-5, gap + 5, 300), NormalDist()
        apcer, bpcer = (np.array([normal.cdf(c) for c in side]) for side in (-cuts, cuts - gap))
        return DetCurve(apcer, bpcer, (normal.cdf(-0.4 * gap), normal.cdf(0.4 * gap - gap)))

    html = drawn(page.det_section({t: [(m, det(2.0)) for m in MEANS] for t in TARGETS}))
    charts = [a["aria-label"] or "" for t, a in Page(html).tags if t == "svg" and a.get("role") == "img"]
    assert len(charts) == 4
    assert any(c.startswith("DET curves on cefa.") and all(f"{m} " in c for m in MEANS) for c in charts)
    (panel, *_) = re.findall(r"<figure><h3>wmca</h3>(.*?)</figure>", html, re.DOTALL)
    order = re.findall(r"<title>(.*?)</title><path class=\"(.*?)\"", panel)
    assert order[-2:] == [("erm", "before"), ("rise", "after")]
    assert {kind for _, kind in order[:-2]} == {"other"}
    assert len(re.findall("<circle", panel)) == 2  # operating points of the two


def test_radii_and_directions_say_what_is_outside_and_inside() -> None:
    rng = np.random.default_rng(5)

    def panel(domain: str) -> RadiusPanel:
        real, attack = np.abs(rng.normal(0.72, 0.13, 300)), np.abs(rng.normal(1.5, 0.35, 700))
        return RadiusPanel(domain, real, attack, 1.04, rng.normal(0, 0.4, 300), rng.normal(2, 0.9, 700))

    panels = {t: [panel("wmca"), panel("target")] for t in ("cefa", "surf")}
    html = drawn(page.radii_section(panels))
    for target, of in panels.items():
        assert f"Target {target}" in section(html, "radii")
        for p in of:
            out, inside = 100 * np.mean(p.bona_fide > p.rho), 100 * np.mean(p.attack <= p.rho)
            shares = f"outside: {out:.1f}% of 300 bona fide inside: {inside:.1f}% of 700 attacks"
            assert f"{p.domain} , boundary 1.04 {shares}" in section(html, "radii")
    charts = [a["aria-label"] or "" for t, a in Page(html).tags if t == "svg" and a.get("role") == "img"]
    assert len(charts) == 2 * 2 * 2
    assert any("of bona fide are outside the boundary 1.04" in c for c in charts)
    assert any("attack radius median 1.5, half of them between" in c for c in charts)


def test_what_was_not_measured_is_a_dash() -> None:
    none, nan = (
        np.zeros(0),
        rows()[0]._replace(hter=UNKNOWN, hter_by_target={"wmca": UNKNOWN}, oracle_eer=NAN),
    )
    nan = nan._replace(max_apcer=NAN, worst_species="", bpcer=NAN, bpcer20=NAN, auc=NAN)
    nan = nan._replace(paired=Paired(UNKNOWN, UNKNOWN))
    det = [
        ("mmdg", DetCurve(np.array([NAN]), np.array([0.1]), (NAN, NAN))),
        ("rise", DetCurve(none, none, None)),
    ]
    radii = [RadiusPanel("target", none, np.array([NAN, 1.0]), NAN, none, np.array([0.0, NAN]))]
    html = drawn(
        page.methods_section([nan]),
        page.det_section({"wmca": det}),
        page.radii_section({"wmca": radii, "surf": []}),
        page.unseen_section((UnseenRow("wmca", "mask", {"rise": rate(0, 0)}),)),
        page.speed_section(Speed(NAN, NAN, NAN, NAN, NAN, NAN), Cost(0, NAN, NAN)),
        page.species_section((), "not here"),
        page.contributions_section(()),
    )
    assert not re.search(r"\b(nan|inf|None)\b", check_safe(html).text)
    assert not re.search(r"[\"'=: ](nan|inf|None)\b", html)


def test_a_method_that_lacks_a_target_does_not_decide() -> None:
    some = rows()
    lacks = [r._replace(hter_by_target={"wmca": r.hter}) if r.method == "irm" else r for r in some]
    ends = {"x": "finite", "y": "silent NaN"}
    measured = page.Measured({}, {}, {}, {}, Speed(1, 1, 1, 1, 9, 10), Cost(1, 1.0, 1.0), ends, 4)
    figures = {f.name: f for f in page.figures(measured, lacks, seconds=400, quick=False)}
    assert figures["rise_better_than_irm"].measured is None and not figures["rise_better_than_irm"].holds
    erm = next(r for r in some if r.method == "erm")
    assert erm.paired and figures["rise_relative_to_erm"].value == erm.paired.relative.value
    assert figures["rise_better_than_erm"].value == -erm.paired.difference.value
    assert figures["degenerate_corpora_sound"].value == 1 and not figures["degenerate_corpora_sound"].holds
    assert figures["throughput_relative_to_dataloader"].value == 0.9
    assert figures["seconds"].holds
    quick = {f.name: f.holds for f in page.figures(measured, lacks, seconds=500, quick=True)}
    assert not quick["seconds"] and "rise_better_than_erm" in quick and "rise_better_than_irm" not in quick
