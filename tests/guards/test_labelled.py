"""Guard presentations: the judged half may not get worse, and labels that all contradict the source fail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.guards import Cell, Evidence, GuardsConfig
from pipeline.guards.labelled import labelled, sign_test
from pipeline.guards.records import Judged, Labelled
from pipeline.guards.verdict import assess

LIMITS = GuardsConfig()


def evidence(of_site: Labelled | None, *, stream_n: int = 500) -> Evidence:
    """Evidence that every other guard passes."""
    cells = tuple(
        Cell(pattern="all", species=s, n=600, errors=0, worse=0, better=0) for s in ("print", "bona_fide")
    )
    return Evidence(
        cells=cells,
        trust_ratio=0.01,
        margin_drop=0.1,
        stream_n=stream_n,
        age_seconds=10.0,
        finite=True,
        labelled=of_site,
    )


def failed(of_site: Labelled) -> list[str]:
    return [r.text for r in labelled(LIMITS, evidence(of_site)) if r.call == "fail"]


def test_labels_that_the_source_ranks_the_other_way_look_reversed():
    (text,) = failed(Labelled(taught_bona_fide=16, taught_attack=16, ranked=0.05))
    assert text.startswith("labels look reversed: the source model ranks 95% of the pairs of 16 bona fide")
    wrong = Labelled(taught_bona_fide=16, taught_attack=16, ranked=0.4)
    assert assess(LIMITS, evidence(wrong)).decisive.startswith("presentations: labels look reversed")


@pytest.mark.parametrize(
    "of_site",
    [
        Labelled(taught_bona_fide=16, taught_attack=16, contradicted_bona_fide=15, ranked=0.98),  # a shift
        Labelled(taught_bona_fide=16, taught_attack=16, contradicted_attack=16, ranked=0.7),  # unknown kit
        Labelled(taught_bona_fide=7, taught_attack=16, ranked=0.0),  # too few to say
        Labelled(taught_bona_fide=16, contradicted_bona_fide=16),  # one class has no pairs
        Labelled(),
    ],
)
def test_a_shift_an_unknown_kit_or_few_labels_are_no_reversal(of_site):
    assert failed(of_site) == []


def test_a_candidate_that_errs_more_on_what_judges_fails():
    (text,) = failed(Labelled(bona_fide=Judged(n=20, errors=7, worse=6, better=1)))
    assert text == "errors on 20 labelled bona fide that judge: 2 before, 7 now (6 worse, 1 better)"
    worse = Labelled(attack=Judged(n=20, errors=5, worse=4, better=0))
    (text,) = failed(worse)
    assert text == "errors on 20 labelled attacks that judge: 1 before, 5 now (4 worse, 0 better)"
    assert assess(LIMITS, evidence(worse)).outcome == "fail"
    lenient = GuardsConfig.model_validate({"presentations": {"advisory": True}})
    assert assess(lenient, evidence(worse)).outcome == "pass"


def test_one_presentation_more_is_chance():
    assert failed(Labelled(attack=Judged(n=20, errors=1, worse=1, better=0))) == []


def test_judged_labels_stand_for_the_stream_of_a_new_site():
    """A site that was commissioned today has few captures; what it has is labelled."""
    good = Labelled(bona_fide=Judged(n=12, errors=0, better=4))
    assert assess(LIMITS, evidence(good, stream_n=40)).outcome == "pass"
    assert assess(LIMITS, evidence(Labelled(), stream_n=40)).outcome == "hold"
    assert assess(LIMITS, evidence(None, stream_n=40)).outcome == "hold"


@given(worse=st.integers(0, 12), better=st.integers(0, 12))
def test_the_sign_test_is_a_probability_that_falls_with_each_one_that_got_worse(worse, better):
    assert 0 <= sign_test(worse + 1, better) <= sign_test(worse, better) <= 1
    assert sign_test(worse, better) + sign_test(better + 1, worse - 1) == pytest.approx(1) or worse == 0
