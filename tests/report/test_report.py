"""The page is complete, safe to open, and stays usable for a large fleet."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.report import page as pages
from pipeline.report import plots
from pipeline.report.content import (
    Det,
    DetCurve,
    PadSummary,
    PseudoLabels,
    QuarantineRow,
    RolloutEvent,
    RolloutReport,
    WaveReport,
)
from pipeline.report.page import render, write
from tests.support.cycle_report import START, cycle, fleet, site
from tests.support.pages import HOSTILE

if TYPE_CHECKING:
    from pathlib import Path


VOID = {"meta", "br", "input", "link", "img"}


class Page(HTMLParser):
    """Collects what could load something or run, and checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember the tag; void ones have no end."""
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """SVG shapes close themselves."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Tags end in the order that they began in."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """All text, scripts and styles too."""
        self.text += data


def check_safe(html: str) -> Page:
    """Nothing is fetched and only the page's own script runs."""
    parsed = Page(html)
    names = [t for t, _ in parsed.tags]
    assert names.count("script") == 1
    assert not {"link", "img", "iframe", "object", "embed", "form", "base", "image", "use"} & set(names)
    for _, attrs in parsed.tags:
        assert not [a for a in attrs if a.startswith("on") or a in ("src", "srcset", "action", "xlink:href")]
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"@import|url\(", html)
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for t, a in parsed.tags if t == "a"} <= {f"#{i}" for i in ids}
    return parsed


def test_the_answer_comes_first() -> None:
    html = render(fleet())
    answer = re.search(r"<h1>(.*?)</h1>", html)
    assert answer
    assert re.sub(r"<.*?>", "", answer[1]).strip() == (
        "10 of 14 sites adapted, 9 promoted, 1 left unchanged, 1 held (ceiling), 1 failed (non-inferiority), "
        "1 broken (camera), 1 of 8 measured harmed."
    )


def test_page_has_every_part_and_loads_nothing() -> None:
    report = fleet()
    parsed = check_safe(render(report))
    for s in report.sites:
        assert s.site in parsed.text
        assert all(why in parsed.text for why in s.reasons)
    for text in (
        report.source_digest,
        report.fingerprint,
        report.code_revision,
        "ab" * 32,
        "Baking(2)",
        "wave 2 staged",
        "segment-0007.parquet",
        "header claims 12000x12000",
        "not a Parquet file",
        "silicone mask",
        "99.1%",
    ):
        assert text in parsed.text
    sections = {a.get("id") for t, a in parsed.tags if t == "section"}
    assert sections == {
        "fleet",
        "accuracy",
        "verdicts",
        "rollout",
        "sites",
        "quarantine",
        "provenance",
        "glossary",
    }
    for term in ("APCER", "BPCER", "HTER", "DET", "PAI species"):
        assert f"<dt>{term}</dt>" in render(report)


def test_every_chart_says_what_it_shows() -> None:
    parsed = Page(render(fleet()))
    charts = [a for t, a in parsed.tags if t == "svg" and a.get("role") == "img"]
    assert len(charts) > 14 * 4
    assert all(a.get("aria-label") for a in charts)
    assert any(
        "DET curves. before: at the deployed threshold 13.6% of attacks" in (a["aria-label"] or "")
        for a in charts
    )


def test_script_is_admitted_by_its_hash_only() -> None:
    html = render(fleet())
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    policy = re.search(r"script-src '([^']+)'", html)
    assert script
    assert policy
    assert policy[1] == pages._digest(script[1])
    assert "default-src 'none'" in html


def test_hostile_strings_are_inert() -> None:
    rng = np.random.default_rng(0)
    bad = PadSummary(0.1, 0.2, HOSTILE, 0.1, 5, 5)
    one = site(
        1,
        rng,
        site=HOSTILE,
        tags=(HOSTILE,),
        rig=HOSTILE,
        reasons=(HOSTILE, HOSTILE),
        verdict="fail",
        status="failed",
        serving=HOSTILE,
        before=bad,
        after=bad,
    )
    report = cycle(
        (one,),
        cycle_id=HOSTILE,
        source_version=HOSTILE,
        source_digest=HOSTILE,
        fingerprint=HOSTILE,
        code_revision=HOSTILE,
        config_name=HOSTILE,
        method=HOSTILE,
        exit_summary=HOSTILE,
        digests=((HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
        quarantine=(QuarantineRow(HOSTILE, HOSTILE, 1, HOSTILE, 1),),
        rollout=RolloutReport(
            HOSTILE,
            HOSTILE,
            (WaveReport(1, 1.0, 1, 0, 1, HOSTILE, None),),
            (RolloutEvent(START, HOSTILE, HOSTILE),),
        ),
    )
    html = render(report)
    check_safe(html)
    html.encode()
    assert "<script>alert" not in html
    assert "\u202e" not in html
    assert "\x00" not in html
    assert "{{7*7}}" in html


def test_overlong_string_is_cut_and_says_so() -> None:
    assert plots.clean("a" * 1500).endswith("… (500 more characters)")


UNMEASURED = PadSummary(np.nan, np.nan, "", np.nan, 0, 0)
NO_CURVE = DetCurve(np.array([np.nan]), np.array([0.1]), (np.nan, np.nan))
MISSING: dict[str, tuple[dict[str, object], list[str]]] = {
    "empty": (
        {"sites": (), "det": None, "quarantine": (), "rollout": None, "notes": (), "digests": ()},
        [
            "No site had anything to adapt",
            "No rollout was in progress",
            "Nothing was put aside",
            "No candidate was judged",
        ],
    ),
    "no labels": (
        {"sites": tuple(replace(s, before=None, after=None) for s in fleet().sites), "det": None},
        ["harm unknown without sealed labels", "harmed – of 0 promoted", "No site has sealed labels"],
    ),
    "nan": (
        {
            "sites": (
                replace(
                    fleet().sites[0],
                    before=UNMEASURED,
                    after=UNMEASURED,
                    omega=np.array([np.nan, 0.5, np.nan]),
                    instability=np.array([np.inf]),
                    availability=np.full((4, 3), np.nan),
                    pseudo_labels=PseudoLabels(np.nan, np.nan, np.nan, np.nan),
                ),
            ),
            "threshold": np.nan,
            "det": Det(NO_CURVE, NO_CURVE, 0, 0, 0),
        },
        ["1 of 1 site adapted,", "harm unknown without sealed labels."],
    ),
}


@pytest.mark.parametrize(("changed", "words"), MISSING.values(), ids=MISSING)
def test_missing_is_said_and_never_drawn(changed: dict[str, object], words: list[str]) -> None:
    html = render(replace(fleet(), **changed))  # pyright: ignore[reportArgumentType]
    check_safe(html)
    text = " ".join(re.sub(r"<.*?>", " ", html).split())
    assert all(w in text for w in words)
    assert not re.search(r"\b(nan|inf|None)\b", html.split("</style>")[1].split("<script>")[0])


def test_large_fleet_stays_small_and_says_what_is_left_out() -> None:
    rng = np.random.default_rng(3)
    few = [site(i, rng) for i in range(40)]
    fails = {
        "status": "failed",
        "verdict": "fail",
        "promoted": False,
        "reasons": ("ceiling: replay 9 % > 7 %",),
    }
    report = cycle(
        tuple(
            replace(few[i % 40], site=f"site-{i:05d}", **(fails if i % 8 == 0 else {})) for i in range(2000)
        )
    )
    began = time.process_time()  # the machine may be busy with other tests
    html = render(report)
    assert time.process_time() - began < 3
    assert len(html.encode()) < 8e6
    assert html.count('<details class="site">') == 50
    assert "The worst 50 of 2,000 sites have details here." in html
    assert "The worst 50 of 2,000 measured sites are drawn." in html
    assert "The worst 200 of 250 are listed." in html
    larger = render(
        replace(report, sites=report.sites + tuple(replace(few[0], site=f"x-{i}") for i in range(500)))
    )
    assert "The worst 2,000 of 2,500 sites are listed" in larger


def test_harm_is_counted_only_where_it_is_served() -> None:
    worse = site(
        1,
        np.random.default_rng(0),
        before=PadSummary(0.05, 0.05, "a", 0.05, 9, 9),
        after=PadSummary(0.05, 0.07, "b", 0.05, 9, 9),
    )
    assert "1 harmed." in render(cycle((worse,)))
    assert "harmed." not in render(cycle((replace(worse, promoted=False),)))


def test_worst_sites_come_first() -> None:
    order = re.findall(r'<details class="site"><summary><b>(.*?)</b>', render(fleet()))
    assert order[:4] == ["gate-08", "gate-11", "gate-10", "gate-09"]


def test_write_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "reports" / "cycle.html"
    write(fleet(), target)
    assert target.read_text() == render(fleet())
    monkeypatch.setattr(pages, "render", lambda _: "half\ud800")
    with pytest.raises(UnicodeEncodeError):
        write(fleet(), target)
    assert target.read_text() == render(fleet())
    assert [p.name for p in target.parent.iterdir()] == ["cycle.html"]


def test_line_breaks_where_values_are_missing() -> None:
    assert plots._path(np.array([0.0, 1.0, np.nan, 0.5, 0.5]), 1.0) == (
        '<path d="M0.0 100.0h.01L25.0 0.0M75.0 50.0h.01L100.0 50.0"/>'
    )


def test_bins_keep_means_and_peaks() -> None:
    values = np.array([0.0, 1.0, np.nan, np.nan, 4.0, np.nan])
    np.testing.assert_array_equal(plots._bins(values, 3), [0.5, np.nan, 4.0])
    np.testing.assert_array_equal(plots._bins(values, 3, peaks=True), [1.0, np.nan, 4.0])


@pytest.mark.parametrize(
    ("most", "top"), [(0.071, 0.08), (0.31, 0.32), (0.9, 1.0), (0.02, 0.02), (np.nan, 0.02)]
)
def test_scale_holds_every_value(most: float, top: float) -> None:
    assert plots.scale([0.001, most], 0.02) == pytest.approx(top)


def test_det_axis_is_normal_deviate() -> None:
    assert plots._deviate(0.001) == pytest.approx(0)
    assert plots._deviate(0.6) == pytest.approx(plots.DET_SIDE)
    assert plots._deviate(0.05) - plots._deviate(0.01) == pytest.approx(
        plots._deviate(0.01) - plots._deviate(0.00135), abs=6
    )
