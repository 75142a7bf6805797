"""The site benchmark's page shows every number, is safe to open, and says why something is not there."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.report import site, timelines
from pipeline.report.content import Figure, Line, Timeline
from pipeline.report.site import (
    GROUPS,
    LIMIT,
    SECTIONS,
    AblationCell,
    AdditionRow,
    MethodRow,
    MissingRow,
    OneClassRow,
    PoisonRow,
    SiteBench,
    StreamCell,
    StreamRow,
    render,
    write,
)
from pipeline.stats.intervals import Estimate
from tests.support.pages import HOSTILE, NAN, UNKNOWN, Page, head, section

if TYPE_CHECKING:
    from pathlib import Path

HTER = {
    "frozen": 0.142,
    "danet": 0.0981,
    "recalibrate": 0.113,
    "eata": 0.127,
    "eata (published)": 0.1515,
    "tent": 0.193,
    "sar": 0.131,
    "sar (published)": 0.1423,
    "cotta": 0.1395,
    "shot": 0.2312,
    "read": 0.1371,
    "drm": 0.1338,
}
STREAMS = {
    "shifted": (
        "gate-ageing",
        "branch-swap",
        "kiosk-fade",
        "dock-warm",
        "lobby-cold",
        "phone-a",
        "phone-b",
        "yard-night",
    ),
    "one-class": ("gate-oneclass-100", "gate-oneclass-99", "gate-oneclass-90", "vault-oneclass"),
    "clean": ("lobby-a", "lobby-b", "desk-a", "desk-b"),
    "unseen": ("kiosk-burst", "museum-masks", "club-makeup"),
    "missing": ("dock-missing-ir", "dock-missing-depth", "yard-missing-both", "phone-rgb-only"),
    "poisoning": ("kiosk-drip-01", "kiosk-drip-05", "kiosk-drip-20", "gate-burst", "gate-blind-ir"),
}
EMPTY: dict[str, object] = {**dict.fromkeys(SECTIONS, ()), "context": {}}


def method(name: str, rng: np.random.Generator) -> MethodRow:
    mean, bad = HTER[name], max(0.0, HTER[name] - 0.1)
    return MethodRow(
        method=name,
        hter=Estimate(mean, mean - rng.uniform(0.008, 0.014), mean + rng.uniform(0.008, 0.014)),
        below_frozen=1 - mean / HTER["frozen"],
        worst_site=str(rng.choice(["yard-night", "phone-b", "dock-warm"])) if name != "frozen" else "",
        worst_rise=0.0 if name == "frozen" else bad * rng.uniform(0.8, 2) + 0.0031,
        harmed=float(np.round(bad * 4, 2)),
        bpcer=mean * rng.uniform(0.6, 1.1),
        max_apcer=min(1.0, 2.3 * mean + rng.normal(0, 0.03)),
        precision_bona_fide=NAN if name in ("frozen", "recalibrate") else 1 - 0.3 * mean,
        precision_attack=NAN if name in ("frozen", "recalibrate") else 1 - 0.5 * mean,
        recovery={"frozen": float("inf"), "tent": float("inf")}.get(name, float(np.round(3000 * mean))),
        forgetting=0.0 if name == "frozen" else bad * 0.4 - 0.002,
        cost=1.0 if name == "frozen" else rng.uniform(1.2, 6.5),
    )


def stream(name: str, group: str, rng: np.random.Generator) -> StreamRow:
    hard = {"shifted": 0.9, "clean": 0.25, "unseen": 1.7, "missing": 1.2, "poisoning": 0.4, "one-class": 0.3}[
        group
    ]
    what = {
        "shifted": "illuminator fades from 100 % to 35 % over the stream",
        "one-class": "bona fide only, then 100 masks",
        "clean": "held-out captures of a source rig",
        "unseen": "silicone masks that no source shows",
        "missing": "IR dead from 400 to 900",
        "poisoning": "replays just inside the boundary, 5 % of the stream",
    }[group]
    cells: dict[str, StreamCell] = {}
    for m, mean in HTER.items():
        hter = float(np.clip(mean * hard + rng.normal(0, 0.012), 0.001, 1))
        one = group == "one-class" and name != "vault-oneclass"
        species = "" if one else str(rng.choice(["silicone mask", "print", "replay", "paper glasses"]))
        cells[m] = StreamCell(
            NAN if one else hter, hter * rng.uniform(0.6, 1.2), NAN if one else 2.1 * hter, species
        )
    return StreamRow(name, group, what, int(rng.integers(600, 12000)), 0.08 * hard, cells)


def timeline(name: str, methods: list[str], rng: np.random.Generator, *, swap: bool = True) -> Timeline:
    at = np.linspace(50, 1950, 60)
    lines: dict[str, Line] = {}
    for m in methods:
        jump = np.where(at > 800, HTER[m] * 1.5 * np.exp(-(at - 800) / (300 if m != "frozen" else 1e5)), 0.0)
        bpcer = np.clip(HTER[m] * 0.4 + (jump if swap else at / 8e3) + rng.normal(0, 0.01, 60), 0, 1)
        apcer = np.clip(2.2 * HTER[m] + jump / 2 + rng.normal(0, 0.03, 60), 0, 1)
        apcer[20:24] = NAN
        lines[m] = Line(at, bpcer, apcer)
    events = (
        ((800.0, "camera swapped"), (840.0, "firmware 2.1"), (1500.0, "100 silicone masks in a row"))
        if swap
        else ()
    )
    spans = () if swap else ((400.0, 900.0, "IR missing"), (1700.0, 2000.0, "depth and IR missing"))
    move = (at, 0.8 * (1 - np.exp(-np.clip(at - 300, 0, None) / 400))) if "danet" in methods else None
    return Timeline(
        name,
        "The rig's camera is swapped for one with another gain." if swap else "Sensors fail.",
        events,
        spans,
        lines,
        move,
    )


def one_class(rng: np.random.Generator) -> tuple[OneClassRow, ...]:
    return tuple(
        OneClassRow(
            s,
            prior,
            m,
            *(
                (0.0, 0.0, 0.3125)
                if m == "frozen"
                else (
                    float(rng.normal(3 * (h - 0.11), 0.01)),
                    float(rng.normal(2 * (h - 0.12), 0.02)),
                    0.31 + 2 * (h - 0.14),
                )
            ),
            0.3125,
        )
        for s, prior in (("gate-oneclass", 1.0), ("gate-oneclass", 0.99), ("vault-oneclass", 0.9))
        for m, h in HTER.items()
    )


def poison(rng: np.random.Generator) -> tuple[PoisonRow, ...]:
    whats = {
        "kiosk-drip": "replays just inside the boundary, evenly spread",
        "gate-burst": "100 attacks in a row",
    }
    return tuple(
        PoisonRow(
            s,
            whats[s],
            share,
            m,
            0.0 if m == "frozen" else float(rng.normal(share * (h - 0.09) * 20, 0.003)),
            2 * h * share,
            0.0 if m == "frozen" else 37.0 if m == "danet" else None,
        )
        for s, share in (("kiosk-drip", 0.05), ("kiosk-drip", 0.2), ("gate-burst", 0.1))
        for m, h in HTER.items()
    )


def bench(**changed: object) -> SiteBench:
    """Everything measured, twelve methods on 28 streams, with numbers as they may come out."""
    rng = np.random.default_rng(7)
    few = ["frozen", "danet", "recalibrate", "eata", "tent"]
    report = SiteBench(
        created=datetime(2026, 11, 22, 7, 0, tzinfo=UTC),
        context={"config": "conf/bench.yaml", "revision": "0f3e9a7", "seeds": "0, 1, 2", "took": "41,234 s"},
        figures=(
            Figure(
                "HTER below frozen",
                0.309,
                "%",
                "at least 15% on shifted streams",
                True,
                "paired over streams, [24.1, 35.2]",
            ),
            Figure(
                "worst site",
                0.013,
                "%",
                "at most +0.5%",
                False,
                "largest mean rise of HTER of a site over frozen",
            ),
            Figure("poison", -0.0021, "%", "at most +0.5%", True, "worst species' APCER on the probe"),
            Figure(
                "cost of a step", 3.42, "× forward", "at most 4", True, "median over 200 steps of 32 captures"
            ),
            Figure(
                "recovery", None, "samples", "at most 400", None, "no stream with a sudden change in this run"
            ),
        ),
        methods=tuple(method(m, rng) for m in HTER),
        streams=tuple(stream(n, g, rng) for g, names in STREAMS.items() for n in names),
        timelines=(
            timeline("branch-swap", few, rng),
            timeline("dock-missing", few, rng, swap=False),
            timeline("kiosk-all", list(HTER), rng),
            timeline("gate-ageing", ["frozen", "eata"], rng, swap=False),
        ),
        one_class=one_class(rng),
        poison=poison(rng),
        missing=tuple(
            MissingRow(f, 0.21 - 0.021 * i, 0.251 - 0.03 * i, 0.61 - 0.07 * i)
            for i, f in enumerate(
                ("zero-fill", "zero-fill, own thresholds", "mean-fill", "substitute", "substitute + enhance")
            )
        ),
        ablation=tuple(
            AblationCell(f, u, w, 0.153 - 0.011 * i - 0.0071 * j - 0.0047 * k, 0.031 - 0.004 * (i + j + k))
            for i, f in enumerate(("zero-fill", "substitute", "substitute + enhance"))
            for j, u in enumerate(("every sample", "confident", "confident and agreed"))
            for k, w in enumerate(("constant weight", "weight by stability"))
        ),
        additions=(
            AdditionRow("default", "as it serves", 0.0981, 0.309, 0.0031, 0.0012, 0.0021),
            AdditionRow(
                "without the trigger",
                "learns from the first sample on",
                0.1012,
                0.287,
                0.0174,
                0.0083,
                0.0345,
            ),
            AdditionRow(
                "without the boundary",
                "the boundary stays the source's",
                0.1263,
                0.111,
                0.0021,
                0.0004,
                -0.0012,
            ),
        ),
        omitted={},
    )
    return replace(report, **changed)  # pyright: ignore[reportArgumentType]


def check_safe(html: str) -> Page:
    """Nothing is fetched, nothing runs, every link stays on the page, rows are as wide as their head."""
    found = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image", "use"} & {
        t for t, _ in found.tags
    }
    for _, attrs in found.tags:
        assert not [a for a in attrs if a.startswith("on") or a in ("src", "srcset", "action", "xlink:href")]
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"@import|url\(", html)
    assert "default-src 'none'" in html
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for t, a in found.tags if t == "a"} <= {f"#{i}" for i in ids}
    for table in re.findall(r"<table.*?</table>", html, re.DOTALL):
        rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        assert (
            len(
                {
                    len(re.findall(r"<t[hd]\b", r))
                    + sum(int(n) - 1 for n in re.findall(r'colspan="(\d+)"', r))
                    for r in rows
                }
            )
            == 1
        )
    return found


def pc(value: float) -> str:
    return f"{100 * value:.1f}%".replace("-", "−")


def rise(value: float) -> str:
    """A difference as it reads in a table."""
    said = timelines.points(value)
    return said if said == "0.0" else f"{'▲' if value > 0 else '▼'} {said}"


def test_figures_say_whether_they_hold() -> None:
    text = section(render(bench()), "figures")
    assert (
        "HTER below frozen paired over streams, [24.1, 35.2] 30.9% at least 15% on shifted streams ✓ holds"
        in text
    )
    assert "1.3% at most +0.5% ✕ does not hold" in text
    assert "−0.2% at most +0.5% ✓ holds" in text
    assert "3.42 × forward at most 4 ✓ holds" in text
    assert "recovery no stream with a sudden change in this run – at most 400 not measured" in text


def test_every_number_of_the_methods_is_on_the_page() -> None:
    report = bench()
    text = section(render(report), "methods")
    for m in report.methods:
        said = [f"{m.method} {pc(m.hter.value)} {timelines.span(m.hter.low, m.hter.high)}"]
        said += [
            ("▲ " if m.below_frozen < -5e-4 else "") + pc(m.below_frozen),
            f"{rise(m.worst_rise)} {m.worst_site}".strip(),
        ]
        said += [pc(v) for v in (m.harmed, m.bpcer, m.max_apcer)]
        said += [
            "– not measured" if np.isnan(v) else pc(v) for v in (m.precision_bona_fide, m.precision_attack)
        ]
        said += [
            "not back" if np.isinf(m.recovery) else f"{m.recovery:,.0f}",
            rise(m.forgetting),
            f"{m.cost:.3g}×",
        ]
        assert " ".join(said) in text


def test_every_number_of_the_streams_is_on_the_page() -> None:
    report = bench()
    text = section(render(report), "streams")
    order = site._columns(sorted(report.methods, key=lambda m: m.hter.value), list(HTER))
    assert " ".join(["Stream oracle EER", *order]) in text
    for s in report.streams:
        one = bool(np.isnan(s.cells["frozen"].hter))
        values = {m: c.bpcer if one else c.hter for m, c in s.cells.items()}
        said = [s.stream, s.what, f"{s.samples:,} samples", pc(s.oracle_eer)]
        for m in order:
            said += [pc(values[m])] + ["BPCER"] * one + [rise(values[m] - values["frozen"])] * (m != "frozen")
        assert " ".join(said) in text
        both = [s.stream, "BPCER max APCER worst species"]
        for m in order:
            c = s.cells[m]
            both += [
                pc(c.bpcer),
                "– not measured" if np.isnan(c.max_apcer) else pc(c.max_apcer),
                c.worst_species or "–",
            ]
        assert " ".join(both) in text


def test_every_number_of_the_attacks_is_on_the_page() -> None:
    report = bench()
    html = render(report)
    order = site._columns(sorted(report.methods, key=lambda m: m.hter.value), list(HTER))
    for stream_, prior in dict.fromkeys((r.stream, r.prior) for r in report.one_class):
        by = {r.method: r for r in report.one_class if (r.stream, r.prior) == (stream_, prior)}
        burst = [
            f"{rise(by[m].burst_apcer - 0.3125).split(' ')[0]} {pc(by[m].burst_apcer)} 31.2%".removeprefix(
                "0.0 "
            )
            for m in order
        ]
        said = [
            f"{stream_} {pc(prior)} bona fide before the burst",
            "BPCER rise",
            *(rise(by[m].bpcer_rise) for m in order),
        ]
        said += [
            "APCER rise",
            *(rise(by[m].apcer_rise) for m in order),
            "APCER at the burst and frozen's",
            *burst,
        ]
        assert " ".join(said) in section(html, "one_class")
    for r in report.poison:
        over = f"▲ over the limit {timelines.points(r.rise)}" if r.rise > LIMIT else timelines.points(r.rise)
        stopped = "did not" if r.stopped_after is None else f"{r.stopped_after:,.0f}"
        assert f" {r.method} {over} {pc(r.online_apcer)} {stopped}" in section(html, "poison")
        assert f"{r.stream}, {pc(r.share)} poisoned {r.what}" in section(html, "poison")


def test_every_number_of_the_parts_is_on_the_page() -> None:
    report = bench()
    html = render(report)
    for m in report.missing:
        assert f"{m.fill} {pc(m.hter)} {pc(m.bpcer)} {pc(m.max_apcer)}" in section(html, "missing")
    for c in report.ablation:
        assert f"{pc(c.hter)} worst site {rise(c.worst_rise)}" in section(html, "ablation")
    assert "substitute confident 13.5% worst site ▲ +2.3 13.0% worst site ▲ +1.9" in section(html, "ablation")
    additions = section(html, "additions")
    assert "default as it serves 9.8% 30.9% +0.3 +0.1 +0.2" in additions
    assert "10.1% ▲ +0.3 28.7% +1.7 ▲ +1.4 +0.8 ▲ +0.7 +3.5 ▲ +3.2" in additions
    assert "12.6% ▲ +2.8 11.1% +0.2 ▼ −0.1 0.0 ▼ −0.1 −0.1 ▼ −0.3" in additions
    assert all(f"{k} {v}" in section(html, "context") for k, v in report.context.items())
    assert html.count("reconstructions") == 1 and "MFAS-DANet and RiSe" in head_note(html)


def head_note(html: str) -> str:
    found = re.search(r'</h1>\s*<p class="small muted">(.*?)</p>', html)
    assert found
    return found[1]


def test_the_whole_page_is_safe_and_says_what_every_chart_shows() -> None:
    html = render(bench())
    check_safe(html)
    charts = [a["aria-label"] or "" for t, a in Page(html).tags if t == "svg" and a.get("role") == "img"]
    assert len(charts) == 12 + 2 * 4 + 3 + 3 * 12
    assert any(re.match(r"danet: 9.8%, 95 % interval 8.\d% to 1\d.\d%$", c) for c in charts)
    assert any(
        re.match(r"max APCER over branch-swap: frozen mean .*; danet mean [\d.]+%, highest [\d.]+%; ", c)
        for c in charts
    )
    assert any(c == "Boundary over branch-swap: last +0.79, +0 to +0.79 logits" for c in charts)
    assert "camera swapped at 800; firmware 2.1 at 840; 100 silicone masks in a row at 1,500" in section(
        html, "timelines"
    )
    assert "IR missing from 400 to 900; depth and IR missing from 1,700 to 2,000" in section(
        html, "timelines"
    )


def rows_of(danet: Estimate, eata: float = 0.13, harmed: float = 0.0) -> tuple[MethodRow, ...]:
    found = {m.method: m for m in bench().methods}
    frozen = replace(found["frozen"], hter=Estimate(0.14, 0.12, 0.16))
    own = replace(found["danet"], hter=danet, below_frozen=1 - danet.value / 0.14, harmed=harmed)
    return frozen, own, replace(found["eata"], hter=Estimate(eata, eata, eata))


@pytest.mark.parametrize(
    "changed, words",
    [
        (
            {"methods": rows_of(Estimate(0.1, 0.09, 0.11))},
            "danet errs least on shifted streams: mean online HTER 10.0%, 28.6% less than frozen, "
            "none of the sites harmed by danet, "
            "3 of 4 targets hold.",
        ),
        (
            {"methods": rows_of(Estimate(0.132, 0.11, 0.15), eata=0.12, harmed=0.125), "figures": ()},
            "eata errs least on shifted streams: mean online HTER 12.0%, danet has 13.2%, "
            "5.7% less than frozen (intervals overlap), "
            "12.5% of the sites harmed by danet.",
        ),
        (
            {"methods": rows_of(Estimate(0.21, 0.19, 0.23)), "figures": ()},
            "eata errs least on shifted streams: mean online HTER 13.0%, danet has 21.0%, "
            "50.0% more than frozen, "
            "none of the sites harmed by danet.",
        ),
        (
            {"methods": rows_of(UNKNOWN, harmed=NAN), "figures": ()},
            "eata errs least on shifted streams: mean online HTER 13.0%.",
        ),
        (EMPTY, "No method was measured."),
    ],
)
def test_the_answer_comes_first_and_is_fair(changed: dict[str, object], words: str) -> None:
    assert head(render(bench(**changed))) == words


def test_methods_come_best_first_and_unmeasured_last() -> None:
    rows = bench().methods
    html = render(bench(methods=(rows[0], replace(rows[1], hter=UNKNOWN), *rows[2:])))
    drawn = re.findall(r'<span class="site" title="(.*?)">', html)
    assert drawn[:2] == ["recalibrate", "eata"] and drawn[-1] == "danet"


def test_streams_come_by_group() -> None:
    report = bench(
        streams=(*reversed(bench().streams), replace(bench().streams[0], stream="odd", group="other"))
    )
    shown = re.findall(
        r'<th scope="rowgroup" colspan="14"><span>(.*?)<small>', section_html(render(report), "streams")
    )
    assert shown == [*GROUPS, "other"]


def section_html(html: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    assert found
    return found[0]


def test_worse_is_marked_by_more_than_colour() -> None:
    cells = {"frozen": 0.1, "danet": 0.08, "eata": 0.105, "tent": 0.15, "sar": 0.1004}
    row = StreamRow(
        "s", "shifted", "w", 100, 0.05, {m: StreamCell(h, h, h, "print") for m, h in cells.items()}
    )
    table = section_html(render(bench(streams=(row,))), "streams")
    (line,) = re.findall(r'<th scope="row">s<small>.*?</tr>', table, re.DOTALL)
    kinds = re.findall(r'<td class="n([^"]*)"(?: style="--h:([\d.]+)")?>(.*?)</td>', line)[1:]
    text = [re.sub(r"<.*?>", "", t) for *_, t in kinds]
    assert text == ["10.0%", "8.0%▼ −2.0", "10.5%▲ +0.5", "10.0%0.0", "15.0%▲ +5.0"]
    assert [(k.split(), h) for k, h, _ in kinds] == [
        ([], ""),
        (["better"], "0.20"),
        (["worse"], "0.05"),
        (["same"], "0"),
        (["worse", "harmed"], "0.50"),
    ]


def test_without_the_baseline_nothing_is_compared() -> None:
    row = StreamRow("s", "shifted", "w", 100, 0.05, {"danet": StreamCell(0.1, 0.1, 0.1, "print")})
    table = section_html(render(bench(streams=(row,), methods=bench().methods[1:])), "streams")
    assert '<td class="n">10.0%</td>' in table
    assert not re.search(r'<td class="n (worse|better|same)', table)


def test_missing_sections_say_why() -> None:
    html = render(
        bench(**EMPTY, omitted={"poison": "needs recorded streams with poison", "context": "not kept"})
    )
    check_safe(html)
    for name in SECTIONS:
        why = {"poison": "needs recorded streams with poison", "context": "not kept"}.get(
            name, "Not measured."
        )
        assert section(html, name).endswith(why)
        assert "<table" not in section_html(html, name) and "<svg" not in section_html(html, name)


def test_what_is_partly_missing_is_said_beside_what_is_there() -> None:
    text = section(render(bench(omitted={"streams": "clean streams only of two sets"})), "streams")
    assert text.endswith("clean streams only of two sets") and "gate-ageing" in text


def test_a_reason_for_a_section_that_is_not_there_is_our_error() -> None:
    with pytest.raises(AssertionError):
        render(bench(omitted={"poisoning": "typo"}))


def test_what_was_not_measured_is_a_dash() -> None:
    none, nans = np.zeros(0), np.full(3, NAN)
    html = render(
        bench(
            figures=(Figure("f", NAN, "%", "t", None, "e"),),
            methods=(
                MethodRow("danet", UNKNOWN, NAN, "", NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN),
                replace(bench().methods[0], hter=Estimate(0.1, NAN, NAN)),
            ),
            streams=(
                StreamRow(
                    "s",
                    "",
                    "",
                    0,
                    NAN,
                    {"frozen": StreamCell(NAN, NAN, NAN, ""), "danet": StreamCell(NAN, 0.2, NAN, "")},
                ),
                StreamRow("none", "clean", "", 0, NAN, {}),
            ),
            timelines=(
                Timeline(
                    "a",
                    "",
                    ((NAN, "e"),),
                    ((NAN, 3.0, "s"),),
                    {"danet": Line(np.arange(3.0), nans, nans)},
                    (none, none),
                ),
                Timeline("b", "", (), (), {}, None),
                Timeline("c", "", (), (), {"eata": Line(none, none, none)}, (np.arange(3.0), nans)),
            ),
            one_class=(OneClassRow("d", NAN, "danet", NAN, NAN, NAN, NAN),),
            poison=(
                PoisonRow("p", "", NAN, "danet", NAN, NAN, NAN),
                PoisonRow("p", "", NAN, "eata", NAN, 0.1, float("inf")),
            ),
            missing=(MissingRow("m", NAN, NAN, NAN),),
            ablation=(AblationCell("a", "b", "c", NAN, NAN), AblationCell("a2", "b", "d", 0.1, NAN)),
            additions=(
                AdditionRow("x", "", NAN, NAN, NAN, NAN, NAN),
                AdditionRow("y", "", 0.1, NAN, 0.1, NAN, NAN),
            ),
        )
    )
    found = check_safe(html)
    assert not re.search(r"\b(nan|inf|None)\b", found.text)
    assert not re.search(r"[\"'=: ,](nan|inf|None)\b", html)
    assert "danet – not measured – not measured – not measured" in section(html, "poison")
    assert section(html, "poison").count("did not") == 2  # the cell and its explanation


def test_hostile_strings_are_inert() -> None:
    h, e = HOSTILE, Estimate(0.1, 0.09, 0.11)
    at = np.arange(3.0)
    line = Line(at, at / 9, at / 9)
    html = render(
        SiteBench(
            created=datetime(2026, 3, 14, tzinfo=UTC),
            context={h: h},
            figures=(Figure(h, 0.1, h, h, True, h),),
            methods=(MethodRow(h, e, 0.1, h, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 9, 0.1, 1.5),),
            streams=(StreamRow(h, h, h, 9, 0.1, {h: StreamCell(0.1, 0.1, 0.1, h)}),),
            timelines=(Timeline(h, h, ((1.0, h),), ((0.0, 2.0, h + "2"),), {h: line}, (at, at)),),
            one_class=(OneClassRow(h, 1.0, h, 0.1, 0.1, 0.1, 0.1),),
            poison=(PoisonRow(h, h, 0.1, h, 0.1, 0.1, None),),
            missing=(MissingRow(h, 0.1, 0.1, 0.1),),
            ablation=(AblationCell(h, h, h, 0.1, 0.1),),
            additions=(AdditionRow(h, h, 0.1, 0.1, 0.1, 0.1, 0.1),),
            omitted=dict.fromkeys(SECTIONS, h),
        )
    )
    check_safe(html)
    html.encode()
    assert "<script" not in html
    assert "\u202e" not in html and "\x00" not in html
    assert "{{7*7}}" in html
    check_safe(render(bench(**EMPTY, omitted=dict.fromkeys(SECTIONS, h))))


def test_lines_differ_in_colour_and_dashes() -> None:
    names = ["frozen", *(f"m{i}" for i in range(110)), "danet"]
    look = timelines.looks(names, "danet", "frozen")
    assert (look["danet"], look["frozen"]) == ("own", "frozen")
    assert len(set(look.values())) == len(names)
    ten = [look[f"m{i}"].split() for i in range(10)]
    assert len({c for c, _ in ten}) == len({d for _, d in ten}) == 10
    html = render(bench())
    for i in range(timelines.COLOURS):
        assert html.count(f"--c{i}: ") == 3  # light, dark, print
    assert len(set(re.findall(r"\.d\d+ \{ stroke-dasharray: (.*?); \}", html))) == timelines.DASHES


def test_ours_is_drawn_over_the_baseline_over_the_others() -> None:
    look = timelines.looks(["danet", "frozen", "eata"], "danet", "frozen")
    lines = {m: Line(np.arange(3.0), np.ones(3), np.ones(3)) for m in ("danet", "frozen", "eata")}
    drawn = timelines.rates(Timeline("s", "", (), (), lines, None), "bpcer", look).drawn
    assert re.findall(r'<path class="(own|frozen|c0 d0)"', drawn) == ["c0 d0", "frozen", "own"]


def test_a_line_has_gaps_and_no_lost_points() -> None:
    values = np.array([0.1, 0.2, NAN, 0.3, NAN, 0.4, 0.4])
    path = timelines._path(np.arange(7.0), values, 6.0, 0.0, 0.4)
    assert path == "M0.0 75.0L16.7 50.0M50.0 25.0m-.5 0h1M83.3 0.0L100.0 0.0"
    long = timelines._path(np.arange(5000.0), np.where(np.arange(5000) < 2500, 0.1, NAN), 5000.0, 0.0, 0.2)
    assert long.count("L") == timelines.POINTS / 2 - 1 and set(re.findall(r" ([\d.]+)", long)) == {"50.0"}


def test_panels_mark_events_and_spans_where_they_are() -> None:
    t = Timeline(
        "s",
        "",
        ((25.0, "e"),),
        ((50.0, 75.0, "gone"),),
        {"eata": Line(np.array([0.0, 100.0]), np.ones(2), np.ones(2))},
        (np.array([0.0, 100.0]), np.array([-0.3, 0.6])),
    )
    panels = [timelines.rates(t, "bpcer", {"eata": "c0 d0"}), timelines.moved(t)]
    for p in panels:
        assert '<rect class="shaded" x="50.00" width="25.00"' in p.drawn
        assert '<path class="event" d="M25.00 0V100"/>' in p.drawn
    assert [p.ticks for p in panels] == [("100%", "50%", "0%"), ("+0.6", "0", "−0.6")]
    assert 'd="M0.0 75.0L100.0 0.0"' in panels[1].drawn


@pytest.mark.parametrize("seed", range(30))
def test_labels_do_not_touch_on_a_phone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    events = tuple(
        (float(rng.uniform(0, 1000)), "x" * int(rng.integers(3, 60)) + str(i))
        for i in range(rng.integers(1, 9))
    )
    t = Timeline("s", "", (*events, (events[0][0] + 1, events[0][1])), ((100.0, 200.0, "IR gone"),), {}, None)
    placed = timelines.labels(t)
    assert sorted(w.text for w in placed) == sorted(
        [*(text for _, text in events), "IR gone"]
    )  # equal words once
    ends = []
    for w in placed:
        wide = min(
            100 * (timelines.LETTER * len(w.text) + 12) / timelines.NARROW,
            w.at if w.leftwards else 100 - w.at,
        )
        ends.append((w.at - wide, w.at) if w.leftwards else (w.at, w.at + wide))
        assert ends[-1][0] >= -1e-9 and ends[-1][1] <= 100 + 1e-9
    for i, a in enumerate(placed):
        for j in range(i):
            if placed[j].lane == a.lane:
                assert ends[i][1] <= ends[j][0] + 1e-9 or ends[j][1] <= ends[i][0] + 1e-9


def test_a_label_hangs_where_its_event_is() -> None:
    t = Timeline(
        "s",
        "",
        ((100.0, "early"), (900.0, "late"), (120.0, "soon after")),
        ((950.0, 1000.0, "gone"),),
        {},
        None,
    )
    found = {w.text: (w.at, w.leftwards) for w in timelines.labels(t)}
    assert found == {
        "early": (10.0, False),
        "soon after": (12.0, False),
        "late": (90.0, True),
        "gone": (95.0, True),
    }
    lanes = {w.text: w.lane for w in timelines.labels(t)}
    assert lanes["early"] > lanes["soon after"] and lanes["gone"] > lanes["late"]  # no line crosses a word


def test_the_line_of_a_label_runs_through_no_other() -> None:
    t = Timeline("s", "", ((310.0, "up"), (380.0, "x" * 8), (400.0, "y" * 8), (1000.0, "z")), (), {}, None)
    lanes = {w.text: w.lane for w in timelines.labels(t)}
    assert lanes == {"y" * 8: 0, "x" * 8: 1, "up": 2, "z": 0}  # beside y is room for "up", but the line of x


def test_bars_of_rises_start_at_zero_and_mark_the_limit() -> None:
    low, high = timelines.axis([0.16, -0.01, NAN], 4 * LIMIT)
    assert (low, high) == pytest.approx((-0.0168, 0.1668))
    over, under = (timelines.change(v, LIMIT, name="m", low=low, high=high) for v in (0.16, -0.01))
    zero, limit = (float(re.findall(rf'class="{k}" x1="([\d.]+)%', over)[0]) for k in ("zero", "limit"))
    start, width = (float(v) for v in re.findall(r'class="over" x="([\d.]+)%" width="([\d.]+)%', over)[0])
    assert start == zero < limit < start + width
    assert (width / (limit - zero)) ** 2 == pytest.approx(0.16 / LIMIT, rel=0.01)
    start, width = (float(v) for v in re.findall(r'class="under" x="([\d.]+)%" width="([\d.]+)%', under)[0])
    assert start + width == pytest.approx(zero, abs=0.02) and "m: −1.0 points" in under
    assert "<rect" not in timelines.change(NAN, LIMIT, name="m", low=low, high=high)


@pytest.mark.parametrize(
    "value, words", [(0.0123, "+1.2"), (-0.05, "−5.0"), (0.0004, "0.0"), (-0.0004, "0.0"), (NAN, "–")]
)
def test_differences_read_well(value: float, words: str) -> None:
    assert timelines.points(value) == words


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
    assert timelines.shade(value, among) == shade


def test_page_is_the_same_twice_and_stays_small(tmp_path: Path) -> None:
    write(bench(), tmp_path / "reports" / "site.html")
    html = (tmp_path / "reports" / "site.html").read_text()
    assert html == render(bench())
    assert len(html.encode()) < 400_000
