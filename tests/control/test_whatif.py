"""The what-if's parts: two replays of a site compared, and other settings validated."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.config import ConfigError, altered, load
from pipeline.control import whatif
from pipeline.guards import Reason, Verdict
from pipeline.models import TailConfig
from pipeline.models import tail as tails
from pipeline.site import bank
from pipeline.site.bank import Trace


def trace(score, pseudo=None) -> Trace:
    s = torch.as_tensor(np.asarray(score, np.float32))
    used = (
        torch.full((len(s),), -1, dtype=torch.int8)
        if pseudo is None
        else torch.tensor(pseudo, dtype=torch.int8)
    )
    none = torch.zeros(len(s))
    return Trace(s, used, none, none, none, none.bool())


def verdict(outcome: str) -> Verdict:
    reason = Reason(guard="trust", call=outcome, where="state", number=1.0, limit=0.5, text="moved")
    return Verdict(outcome=outcome, reasons=(reason,))  # pyright: ignore


def side(score, *, pseudo=None, ratio=0.0, outcome=None) -> whatif.ReplayedSite:
    return whatif.ReplayedSite(trace(score, pseudo), ratio, verdict(outcome) if outcome else None)


def truth(label, pai=None) -> whatif.Truth:
    return whatif.Truth(np.asarray(label), np.array(pai or ["print"] * len(label)))


SCORES = arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32) | st.just(float("nan")))


@given(score=SCORES, seed=st.integers(0, 2**16), threshold=st.floats(0, 1))
def test_a_stream_beside_itself_has_no_difference(score, seed, threshold):
    label = np.random.default_rng(seed).integers(-1, 2, len(score))
    d = whatif.compare_site(
        "s", side(score, outcome="hold"), side(score, outcome="hold"), truth(label), threshold
    )
    assert (d.newly_accepted, d.newly_refused, d.worse_verdict) == (0.0, 0.0, False)
    assert np.isnan(d.hter_rise) == (not {0, 1} <= set(label.tolist()))
    assert d.hter_rise == 0 or np.isnan(d.hter_rise)
    assert all(pair[0] == pair[1] for pair in d.row().values() if isinstance(pair, list))


@given(a=SCORES, seed=st.integers(0, 2**16))
def test_flips_have_a_direction_and_explain_what_is_accepted(a, seed):
    random = np.random.default_rng(seed)
    b, label = random.random(len(a), np.float32), random.integers(-1, 2, len(a))
    d, back = (whatif.compare_site("s", side(x), side(y), truth(label), 0.5) for x, y in ((a, b), (b, a)))
    assert d.what_if.accepted - d.now.accepted == pytest.approx(d.newly_accepted - d.newly_refused)
    assert (d.newly_accepted, d.newly_refused) == (back.newly_refused, back.newly_accepted)


def test_one_sample_each_way():
    d = whatif.compare_site(
        "s",
        side([0.1, 0.9, 0.9, 0.2], pseudo=[0, 1, -1, -1]),
        side([0.7, 0.1, 0.8, float("nan")], pseudo=[1, 1, 1, -1]),
        truth([0, 1, 1, -1]),
        0.5,
    )
    assert (d.newly_accepted, d.newly_refused, d.labelled) == (0.25, 0.25, 3)
    assert (d.now.hter, d.what_if.hter, d.hter_rise) == (0.0, 0.75, 0.75)
    assert (d.now.bpcer, d.what_if.bpcer, d.what_if.max_apcer) == (0.0, 0.5, 1.0)
    row = d.row()
    assert (row["pseudo_bona_fide"], row["pseudo_attack"], row["flipped"]) == ([1, 3], [1, 0], 0.5)


def test_a_threshold_is_compared_in_double_precision():
    """0.1 rounded to float32 lies above 0.1: it is accepted, as it is everywhere else."""
    d = whatif.compare_site(
        "s", side([0.1]), side([np.nextafter(np.float32(0.1), np.float32(0))]), truth([-1]), 0.1
    )
    assert (d.now.accepted, d.what_if.accepted, d.newly_refused) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("now", ["pass", "hold", "fail", None])
@pytest.mark.parametrize("then", ["pass", "hold", "fail", None])
def test_a_worse_verdict(now, then):
    d = whatif.compare_site("s", side([0.5], outcome=now), side([0.5], outcome=then), truth([1]), 0.5)
    assert d.worse_verdict == ((now, then) in {("pass", "hold"), ("pass", "fail"), ("hold", "fail")})


def labelled(site: str, now, then) -> whatif.Difference:
    return whatif.compare_site(site, side(now), side(then), truth([0, 1]), 0.5)


def test_the_worst_site_comes_first_and_the_fleet_is_counted():
    worse, better, same = (
        labelled("b", [0, 1], [1, 1]),
        labelled("c", [1, 1], [0, 1]),
        labelled("a", [0, 1], [0, 1]),
    )
    unknown = whatif.compare_site("d", side([0] * 10), side([1] * 2 + [0] * 8), truth([-1] * 10), 0.5)
    assert [d.site for d in whatif.worst_first([better, same, unknown, worse])] == ["b", "d", "a", "c"]
    fleet = whatif.fleet_summary([worse, better, same, unknown])
    assert (fleet.sites, fleet.labelled_sites, fleet.samples) == (4, 3, 16)
    assert (fleet.harmed, fleet.improved) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert fleet.means["hter"] == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert whatif.fleet_summary([unknown]).harmed is None
    json.dumps([whatif.fleet_summary([]).to_json(), unknown.row()], allow_nan=False)


def test_the_distance_is_relative_to_the_source():
    generator = torch.Generator().manual_seed(0)
    source = tails.init_tail(TailConfig(width=8, rank=4), 16, generator=generator)
    double = {n: 2 * source[n] for n in tails.MOVABLE}
    stacked = bank.stack([tails.site_state(source), double])
    assert [bank.distance(source, stacked, k) for k in (0, 1)] == [0.0, pytest.approx(1.0)]


def test_what_changed_is_named_key_by_key():
    now = {"site": {"kind": "danet", "lr": 1, "clip": 2}, "bank": {"slots": 2}}
    then = {"site": {"kind": "tent", "lr": 1, "margin": 3}, "bank": {"slots": 4}}
    assert whatif.changed_settings(now, now) == {}
    assert whatif.changed_settings(now, then) == {
        "site.kind": ("danet", "tent"),
        "site.clip": (2, None),
        "site.margin": (None, 3),
        "bank.slots": (2, 4),
    }


def test_other_settings_are_validated_and_touch_nothing_else(tmp_path):
    (tmp_path / "now.yaml").write_text(
        "site: {kind: danet, mode: da, lr: 1.0e-4}\nbank: {slots: 3}\ndata: {frame_px: 40}\n"
    )
    config = load(tmp_path / "now.yaml", ["bank.batch_size=4"])
    made = altered(config, ["site.kind=tent"], sections=("site", "bank"))
    assert (made.site.kind, made.site.lr) == ("tent", 1e-4), "what the file gives and both methods have stays"
    assert (made.bank, made.data, made.guards) == (config.bank, config.data, config.guards)
    (tmp_path / "other.yaml").write_text("site: {kind: danet, lr: 2.0e-4}\ndata: {frame_px: 99}\n")
    made = altered(config, ["bank.slots=5"], sections=("site", "bank"), path=tmp_path / "other.yaml")
    assert (made.site.lr, made.site.mode) == (2e-4, "tta"), "a section is taken whole"  # pyright: ignore
    assert (made.bank.slots, made.bank.batch_size, made.data.frame_px) == (5, 4, 40)


@pytest.mark.parametrize(
    ("override", "file", "expected"),
    [
        ("site.lrr=1", None, "did you mean lr"),
        ("site.lr=-1", None, "greater than 0"),
        ("site.kind=tnet", None, "allowed: "),
        ("data.frame_px=3", None, "allowed are the sections site, bank"),
        ("site.lr", None, "write section.key=value"),
        ("bank.slots=1", "data: {frame_px: 32}", "none of the sections"),
        ("bank.slots=1", "site: {lr: 0}", "greater than 0"),
        ("bank.slots=1", "bank: {slotss: 1}", "did you mean slots"),
        ("bank.slots=1", "[", "not YAML"),
    ],
)
def test_a_mistake_in_other_settings(tmp_path, override, file, expected):
    path = tmp_path / "other.yaml"
    if file:
        path.write_text(file)
    with pytest.raises(ConfigError, match=expected) as e:
        altered(load(None), [override], sections=("site", "bank"), path=path if file else None)
    assert "\n" not in str(e.value)
