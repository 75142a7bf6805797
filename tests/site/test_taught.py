"""What labels teach: both classes, one class alone, nothing, and never a trace of a label taken back."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import method_config, methods
from pipeline.models import tail
from pipeline.site import bank, taught
from pipeline.site.contract import Taught
from pipeline.site.methods import danet
from pipeline.types import Features
from tests.support.doors import F, door, source

HARD = taught.Teaching(steps=40, lr=3e-3, hold=0.3)
LEARNERS = [k for k in methods("site") if isinstance(method_config("site", k)(), Taught)]


def state_with(z: torch.Tensor, label: list[int], *, size: int = 32) -> dict[str, torch.Tensor]:
    """The fresh state of a site whose memory holds ``z`` [N, M, F]."""
    state, n = taught.init(size, source()), len(label)
    state["taught.z"][:n] = z.half()
    state["taught.present"][:n] = True
    state["taught.label"][:n] = torch.tensor(label, dtype=torch.int8)
    state["taught.weight"][:n] = 1
    return state


def accepted(params: dict[str, torch.Tensor], z: torch.Tensor) -> float:
    """Share that is called bona fide."""
    return float((tail.score(params, z, torch.ones(len(z), 3, dtype=torch.bool)) >= 0.5).float().mean())


def test_sixteen_of_each_class_open_a_shifted_door_and_keep_attacks_out():
    bona_fide, attack = door(shift=0.6)
    assert accepted(source(), bona_fide[32:]) < 0.6, (
        "the door must have shifted for the test to mean anything"
    )
    memory = torch.cat([bona_fide[:16], attack[:16]])
    learned = {**source(), **taught.learn(source(), state_with(memory, [1] * 16 + [0] * 16), HARD)}
    assert accepted(learned, bona_fide[32:]) > 0.85
    assert accepted(learned, attack[32:]) <= accepted(source(), attack[32:]) + 0.02


def test_bona_fide_alone_open_a_shifted_door():
    bona_fide, attack = door(shift=0.6)
    learned = {**source(), **taught.learn(source(), state_with(bona_fide[:16], [1] * 16), HARD)}
    assert accepted(learned, bona_fide[32:]) > accepted(source(), bona_fide[32:]) + 0.2
    assert accepted(learned, attack[32:]) < 0.1


def test_bona_fide_alone_teach_nothing_where_none_is_refused():
    bona_fide, _ = door(shift=0.0)
    assert accepted(source(), bona_fide[:16]) == 1.0
    learned = taught.learn(source(), state_with(bona_fide[:16], [1] * 16), HARD)
    assert all(torch.equal(learned[n], source()[n]) for n in tail.MOVABLE)


def test_an_empty_memory_is_the_source_model():
    learned = taught.learn(source(), taught.init(16, source()), HARD)
    assert all(torch.equal(learned[n], source()[n]) for n in tail.MOVABLE)


def test_a_slot_without_weight_teaches_nothing():
    bona_fide, attack = door(shift=0.6)
    state = state_with(torch.cat([bona_fide[:12], attack[:4]]), [1] * 12 + [0] * 4)
    other = state_with(torch.cat([bona_fide[:12], attack[:4], 50 * attack[:1]]), [1] * 12 + [0] * 4 + [1])
    other["taught.weight"][16] = 0
    a, b = (taught.learn(source(), s, HARD) for s in (state, other))
    assert all(torch.equal(a[n], b[n]) for n in tail.MOVABLE)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_label_taken_back_leaves_no_trace(kind):
    """A site that learned two more labels and lost them again is the site that never had them."""
    method = method_config("site", kind)()
    bona_fide, attack = door(shift=0.6)
    fresh = method.init(source())
    few, more = (
        {
            **fresh,
            **{n: t for n, t in state_with(z, y, size=len(fresh["taught.label"])).items() if n[0] == "t"},
        }
        for z, y in (
            (torch.cat([bona_fide[:8], attack[:8]]), [1] * 8 + [0] * 8),
            (torch.cat([bona_fide[:8], attack[:10]]), [1] * 8 + [0] * 8 + [1] * 2),
        )
    )
    once = method.teach(source(), few)
    wrong = method.teach(source(), more)
    assert any(not torch.equal(once[n], wrong[n]) for n in tail.MOVABLE)
    back = method.teach(source(), {**wrong, **{n: t for n, t in few.items() if n.startswith("taught.")}})
    assert all(torch.equal(once[n], back[n]) for n in tail.MOVABLE)


@pytest.mark.parametrize("kind", LEARNERS)
def test_neighbours_change_no_bit_of_what_a_site_is_taught(kind):
    method = method_config("site", kind)()
    bona_fide, attack = door(shift=0.6)
    fresh = method.init(source())
    size = len(fresh["taught.label"])
    mine = {**fresh, **state_with(torch.cat([bona_fide[:8], attack[:8]]), [1] * 8 + [0] * 8, size=size)}
    wild = {**fresh, **state_with(1e4 * bona_fide[:9], [0] * 9, size=size)}
    alone = bank.teach(method, source(), bank.stack([mine]), slots=3)
    beside = bank.teach(method, source(), bank.stack([mine, wild, fresh]), slots=3)
    assert all(torch.equal(alone[n][0], beside[n][0]) for n in alone)
    assert all(torch.isfinite(t).all() for t in beside.values() if t.is_floating_point())
    assert fresh["site.gamma"].shape[1] == F


def test_labels_of_both_classes_end_what_the_stream_may_loosen():
    """The same stream loosens a site without labels, and one whose labels are of one class."""
    method = danet.Config(sessions=0, min_attack_count=1, loosen_apcer=0.2)
    bona_fide, attack = door(shift=0.5)
    fresh = method.init(source())
    size = len(fresh["taught.label"])
    memories = {
        "none": taught.init(size, source()),
        "one class": state_with(bona_fide[:8], [1] * 8, size=size),
        "both": state_with(torch.cat([bona_fide[:8], attack[:8]]), [1] * 8 + [0] * 8, size=size),
    }
    z = torch.cat([bona_fide[8:72], attack[8:24]])[
        torch.randperm(80, generator=torch.Generator().manual_seed(0))
    ]
    stream = Features(
        z, torch.ones(80, 3, dtype=torch.bool), torch.ones(80, dtype=torch.bool), torch.arange(80)
    )
    loosened = {}
    for name, memory in memories.items():
        start = {**fresh, **{n: t for n, t in memory.items() if n.startswith("taught.")}}
        new, _ = method.step(source(), start, stream)
        loosened[name] = bool((new["pattern"] != start["pattern"]).any())
    assert loosened == {"none": True, "one class": True, "both": False}
