"""Timelines: lines with gaps, words that do not touch on a phone, bars that start at zero."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.report import timelines
from pipeline.report.content import Line, Timeline
from tests.support.pages import NAN

LIMIT = 0.005


def test_lines_differ_in_colour_and_dashes() -> None:
    names = ["frozen", *(f"m{i}" for i in range(110)), "danet"]
    look = timelines.looks(names, "danet", "frozen")
    assert (look["danet"], look["frozen"]) == ("own", "frozen")
    assert len(set(look.values())) == len(names)
    ten = [look[f"m{i}"].split() for i in range(10)]
    assert len({c for c, _ in ten}) == len({d for _, d in ten}) == 10


def test_the_baseline_is_drawn_over_ours_over_the_others() -> None:
    look = timelines.looks(["danet", "frozen", "eata"], "danet", "frozen")
    lines = {m: Line(np.arange(3.0), np.ones(3), np.ones(3)) for m in ("danet", "frozen", "eata")}
    drawn = timelines.rates(Timeline("s", "", (), (), lines, None), "bpcer", look).drawn
    assert re.findall(r'<path class="(own|frozen|c0 d0)"', drawn) == ["c0 d0", "own", "frozen"]


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
    panels = [timelines.rates(t, "bpcer", {"eata": "c0 d0"}), timelines.shift(t)]
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


def test_the_caption_tells_every_event_and_span_and_the_key_every_method() -> None:
    at = np.linspace(0, 2000, 9)
    t = Timeline(
        "branch-swap",
        "The camera is swapped.",
        ((800.0, "camera swapped"), (NAN, "never"), (1500.0, "100 silicone masks in a row")),
        ((400.0, 900.0, "IR missing"),),
        {m: Line(at, np.full(9, 0.1), np.full(9, v)) for m, v in (("frozen", 0.2), ("danet", 0.3))},
        (at, np.full(9, 0.79)),
    )
    drawn = timelines.figure(t, timelines.looks(["frozen", "danet"], "danet", "frozen"), "danet")
    text = " ".join(re.sub(r"<[^>]*>", " ", drawn).split())
    assert "camera swapped at 800; 100 silicone masks in a row at 1,500; IR missing from 400 to 900" in text
    assert text.endswith("frozen danet")
    assert (
        'aria-label="max APCER over branch-swap: frozen mean 20.0%, highest 20.0%; danet mean 30.0%' in drawn
    )
    assert 'aria-label="Boundary over branch-swap: last +0.79, +0.79 to +0.79 logits"' in drawn
