"""Who teaches and who is judged at a left-out door, wrong labels, and what each way makes of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jobs.bench.parts import load, save
from jobs.bench.site import labels
from jobs.bench.site.labels import BOTH, CASES, ONE_CLASS, ROWS, WRONG, Case, Errors
from jobs.bench.site.streams import Door, Stream
from pipeline.config import method_config
from tests.support.doors import door as features
from tests.support.doors import source

N = 192  # captures of the door, half of them bona fide
MODEL = SimpleNamespace(tail=source(), manifest=SimpleNamespace(threshold=0.5))


@pytest.fixture(scope="module")
def shifted() -> Door:
    z = torch.cat(features(shift=0.6)).numpy().astype(np.float16)
    label = np.repeat([1, 0], N // 2)
    instrument = np.where(label == 1, "bona_fide", np.array(["print", "mask", "replay"])[np.arange(N) % 3])
    captures = Stream(z, np.full(N, 7, np.uint8), np.arange(N), label, instrument, np.zeros(N, bool))
    return Door(captures, np.array([f"person-{i % 24}" for i in range(N)]))


def errors(door: Door, row: str) -> dict[str, Errors]:
    kind, rule, changes = ROWS[row]
    method = method_config("site", kind).model_validate({"kind": kind, **changes})
    return labels.measure(method, rule, MODEL, door, batch=8)  # type: ignore[arg-type]


def test_half_of_the_people_teach_and_the_others_are_judged(shifted: Door) -> None:
    d = labels.draw(shifted, 0)
    taught = np.concatenate([d.bona_fide, d.attack])
    assert len({*shifted.subject[d.judged]}) == 12
    assert not {*shifted.subject[taught]} & {*shifted.subject[d.judged]}
    assert not d.judged[d.shown].any() and len(d.shown) == labels.SEEN
    assert len({*shifted.subject[d.bona_fide[:12]]}) == 12, "everybody once before anybody twice"
    assert len({*shifted.captures.pai[d.attack[:3]]}) == 3
    assert not np.array_equal(d.judged, labels.draw(shifted, 1).judged)


def test_a_tenth_of_the_labels_is_wrong_and_names_another_instrument(shifted: Door) -> None:
    d = labels.draw(shifted, 0)
    right, wrong = (labels.lesson(shifted, d, CASES[c], 0) for c in (BOTH, WRONG))
    pairs = list(zip(right.rows, wrong.rows, strict=True))
    assert len(pairs) == 32 and sum(r.label for r in right.rows) == 16
    assert sum(a.label != b.label for a, b in pairs) == 3
    assert all((r.instrument == "bona_fide") == (r.label == 1) for r in wrong.rows)
    assert len(labels.lesson(shifted, d, CASES[ONE_CLASS], 0).rows) == 16
    everything = labels.lesson(shifted, d, Case(1000, 1000), 0)
    assert len(everything.rows) == N // 2, "not more than there are"


def test_frozen_is_the_source_model_whatever_the_labels(shifted: Door, tmp_path) -> None:
    frozen = errors(shifted, "frozen")
    assert [*frozen] == [*CASES]
    assert all(np.array_equal(e.hter, frozen[BOTH].hter) for e in frozen.values())
    assert frozen[BOTH].bpcer.min() > 0.3, "the door refuses people"
    np.testing.assert_allclose(frozen[BOTH].hter, (frozen[BOTH].apcer + frozen[BOTH].bpcer) / 2)
    save(tmp_path / "errors.npz", frozen)
    stored = load(tmp_path / "errors.npz", dict[str, Errors])
    assert all(np.array_equal(a, b) for c in CASES for a, b in zip(stored[c], frozen[c], strict=True))


def test_the_boundary_goes_down_and_never_up(shifted: Door) -> None:
    frozen, lowered = (errors(shifted, row) for row in ("frozen", "boundary alone"))
    for case in CASES:
        assert (lowered[case].bpcer <= frozen[case].bpcer).all()
        assert (lowered[case].apcer >= frozen[case].apcer).all()
    assert lowered[ONE_CLASS].bpcer.mean() < frozen[ONE_CLASS].bpcer.mean() - 0.2


@pytest.mark.parametrize("row", [r for r in ROWS if ROWS[r][1] in ("labels", "everything")])
def test_every_way_to_learn_opens_the_shifted_door(shifted: Door, row: str) -> None:
    frozen, learned = errors(shifted, "frozen"), errors(shifted, row)
    for case in CASES:
        assert learned[case].hter.shape == (labels.DRAWS,)
        assert learned[case].hter.mean() < frozen[case].hter.mean()


def test_a_plan_has_every_row_for_each_model_with_a_left_out_domain() -> None:
    own = method_config("site", "danet").model_validate({"kind": "danet", "taught_lr": 0.01})
    whole, left_out = (SimpleNamespace(name=n, target=t) for n, t in (("all", None), ("AB->C", "C")))
    jobs = labels.plan(own, [whole, left_out])  # type: ignore[list-item]
    assert [j.row for j in jobs] == [*ROWS]
    assert {j.source.name for j in jobs} == {"AB->C"}
    settings = {j.row: j.method.model_dump() for j in jobs}
    assert settings["danet"]["taught_lr"] == 0.01, "ours as configured"
    assert settings["danet, source not held"] == {**settings["danet"], "taught_hold": 0.0}
