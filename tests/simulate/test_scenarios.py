"""Scenarios are what they say: priors, what is missing, what an attacker sends."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.protocols import FULL
from pipeline.simulate import scenarios
from pipeline.simulate.render import BONA_FIDE
from pipeline.simulate.shifted_rigs import SHIFTED

CLIPS = [c for c in scenarios.clips() if c.split == "train"]
RIG = np.array([c.domain for c in CLIPS])
PAI = np.array([c.what.species for c in CLIPS])
VIDEO = np.array([f"{c.domain}-{c.video}" for c in CLIPS])
LOGIT = np.random.default_rng(0).normal(size=len(CLIPS)).astype(np.float32) + np.where(
    PAI == BONA_FIDE, 3, -3
)
ALL = {s.name: s for s in scenarios.scenarios()}


def drawn(name: str) -> scenarios.Drawn:
    return scenarios.draw(ALL[name], rig=RIG, pai=PAI, video=VIDEO, logit=LOGIT)


@pytest.mark.parametrize("name", list(ALL))
def test_every_stretch_has_its_length_rig_and_prior(name):
    d, at = drawn(name), 0
    for s in ALL[name].stretches:
        part = slice(at, at + s.samples)
        row = d.row[part]
        assert len(row) == s.samples
        assert set(RIG[row]) == {s.rig}
        clean = ~d.poison[part]
        if clean.sum() > 200:
            assert np.mean(PAI[row][clean] == BONA_FIDE) == pytest.approx(s.prior, abs=0.06)
        assert np.mean(d.poison[part]) == pytest.approx(s.poison, abs=0.04)
        assert set(PAI[row][clean]) <= {BONA_FIDE, *s.species}
        at += s.samples
    assert len(d.row) == at


def test_poison_is_an_attack_with_the_least_margin_on_the_bona_fide_side():
    d = drawn("drip-20")
    sent = np.unique(d.row[d.poison])
    assert set(PAI[sent]) <= set(scenarios.POISON)
    inside = np.flatnonzero(np.isin(PAI, scenarios.POISON) & (RIG == "F") & (LOGIT >= 0))
    assert set(sent) <= set(
        scenarios.marginal(np.flatnonzero(np.isin(PAI, scenarios.POISON) & (RIG == "F")), LOGIT)
    )
    assert set(inside[np.argsort(LOGIT[inside])][:10]) <= set(
        scenarios.marginal(np.flatnonzero(np.isin(PAI, scenarios.POISON) & (RIG == "F")), LOGIT)
    )


def test_blinding_leaves_the_attacker_only_colour():
    d = drawn("blinding-5")
    assert set(d.present[d.poison]) == {scenarios.RGB_ONLY}
    assert set(d.present[~d.poison]) == {FULL}


def test_a_dead_sensor_stays_dead():
    d = drawn("ir-dead")
    assert set(d.present[:150]) == {FULL}
    assert set(d.present[150:]) == {scenarios.NO_IR}


def test_frames_of_a_video_are_one_session():
    d = drawn("clean")
    same = VIDEO[d.row][1:] == VIDEO[d.row][:-1]
    assert np.array_equal(same, d.session[1:] == d.session[:-1])
    assert same.any() and not same.all()


def test_nobody_of_a_probe_is_in_a_pool():
    probe = {c.what.subject for c in scenarios.clips() if c.split == "test"}
    assert probe and not probe & {c.what.subject for c in CLIPS}


def test_drawing_again_gives_the_same():
    assert all(np.array_equal(a, b) for a, b in zip(drawn("burst-100"), drawn("burst-100"), strict=True))


def test_events_mark_cameras_and_label_spans():
    marks, spans = scenarios.events(ALL["rig-swapped"])
    assert marks == ((400.0, "another camera"),) and not spans
    assert scenarios.events(ALL["ir-dead"])[1] == ((150.0, 750.0, "IR missing"),)
    assert scenarios.events(ALL["rig-ageing"]) == ((), ())


def test_every_family_that_refuses_people_replaces_a_known_camera_once():
    sensors = [s for s in ALL.values() if s.group == "sensor"]
    assert [s.stretches[-1].rig for s in sensors] == list(SHIFTED)
    assert {s.stretches[0].rig for s in sensors} == {"A2"}
    assert all(scenarios.events(s)[0] == ((300.0, "another camera"),) and s.probe is None for s in sensors)


def test_a_new_family_leaves_the_pools_of_the_others_as_they_were():
    first = {domain: next(c.what.subject for c in CLIPS if c.domain == domain) for domain in scenarios.RIGS}
    assert list(first)[-len(SHIFTED) :] == list(SHIFTED)
    assert [first[name] // 1000 for name in ("E", "H", "A2", "C0", "C5")] == [500, 503, 504, 505, 510]


def test_shorter_scenarios_keep_their_shape():
    short = scenarios.scenarios(0.3)
    assert [s.name for s in short] == list(ALL)
    assert all(
        sum(t.samples for t in s.stretches) < sum(t.samples for t in ALL[s.name].stretches) for s in short
    )
