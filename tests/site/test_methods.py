"""Every site method in the folder keeps the contract; what danet promises beyond it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import method_config, methods
from pipeline.models import TailConfig, tail
from pipeline.models.tail import LEARNED
from pipeline.site import trust
from pipeline.site.contract import LabelsAlone
from pipeline.site.methods import danet
from pipeline.site.methods.danet import algorithm
from pipeline.site.trust import sane
from pipeline.types import Features

F, B = 16, 8
EAGER = {
    "confidence_bona_fide": 0.5,
    "confidence_attack": 0.5,
    "disagreement": 1.0,
    "unanimous_bona_fide": False,
    "trigger": None,
    "sessions": 0,
    "session_cap": None,
    "lr": 1e-3,
}
SOON = {
    "danet": EAGER,
    "recalibrate": {"minimum": 4},
}  # settings with which one batch is enough to learn from
LABELS = [k for k in methods("site") if isinstance(method_config("site", k)(), LabelsAlone)]


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    return fresh()


def fresh() -> dict[str, torch.Tensor]:
    """A tail with what a trained one knows of its source domains and scores."""
    params = tail.init_tail(TailConfig(width=8, rank=4), F, generator=torch.Generator().manual_seed(0))
    q = torch.linspace(0, 1, tail.QUANTILES)
    logit = torch.stack([-12 + 12 * q, -2 + 6 * q]).expand(2**tail.MODALITIES, -1, -1).clone()
    return {**params, "reference.logit": logit, "reference.boundary": torch.tensor([-0.3, 0.2])}


def batch(seed: int, *, valid: int = B, scale: float = 1.0) -> Features:
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(B, 3, generator=g) > 0.2
    present[:, 0] |= ~present.any(-1)
    session = torch.arange(B) + B * seed
    return Features(scale * torch.randn(B, 3, F, generator=g), present, torch.arange(B) < valid, session)


def every_method() -> list[str]:
    return methods("site")


@pytest.mark.parametrize("kind", every_method())
def test_kind_is_the_module_name(kind):
    assert method_config("site", kind)().kind == kind


@pytest.mark.parametrize("kind", every_method())
def test_scores_are_taken_before_learning(kind, source):
    method = method_config("site", kind)()
    state, b = method.init(source), batch(1)
    _, outcome = method.step(source, state, b)
    torch.testing.assert_close(outcome.score, tail.score(tail.with_site_state(source, state), b.z, b.present))


@pytest.mark.parametrize("kind", every_method())
def test_state_keeps_names_shapes_and_stays_small(kind, source):
    method = method_config("site", kind)()
    state = method.init(source)
    new, _ = method.step(source, state, batch(2))
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }
    assert set(tail.MOVABLE) <= set(new)
    assert sum(t.numel() * t.element_size() for t in new.values()) <= 160 * 1024


@pytest.mark.parametrize("kind", every_method())
def test_only_the_movable_part_moves(kind, source):
    config = method_config("site", kind)
    method = config(**{**SOON.get(kind, {}), **({"lr": 0.05} if "lr" in config.model_fields else {})})
    before = {k: v.clone() for k, v in source.items()}
    state = method.init(source)
    for seed in range(5):
        state, _ = method.step(source, state, batch(seed))
    assert all(torch.equal(source[k], before[k]) for k in source)


@pytest.mark.parametrize("kind", LABELS)
def test_a_method_of_labels_alone_learns_nothing_from_a_stream(kind, source):
    method = method_config("site", kind)()
    new, outcome = method.step(source, method.init(source), batch(3))
    assert all(torch.equal(new[k], source[k]) for k in tail.MOVABLE)
    assert (outcome.pseudo_label == -1).all()


@pytest.mark.parametrize("kind", [k for k in every_method() if k not in ("frozen", *LABELS)])
def test_a_learning_method_learns(kind, source):
    method = method_config("site", kind)(**SOON.get(kind, {}))
    state = method.init(source)
    new, _ = method.step(source, state, batch(3))
    assert any(not torch.equal(new[k], state[k]) for k in tail.MOVABLE)


@pytest.mark.parametrize("kind", every_method())
@given(poison=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]), row=st.integers(0, B - 1))
def test_a_broken_row_is_padding(kind, poison, row):
    source = fresh()
    method = method_config("site", kind)(**SOON.get(kind, {}))
    b = batch(4)
    z = b.z.clone()
    z[row, 0] = poison
    state = method.init(source)
    for _ in range(3):
        state, outcome = method.step(source, state, b._replace(z=z))
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())
    assert torch.isfinite(outcome.score).all()


def test_values_of_absent_modalities_do_not_matter():
    b = batch(5)
    noisy = b._replace(z=torch.where(b.present[..., None], b.z, float("nan")))
    assert torch.equal(sane(noisy).z, sane(b).z)
    assert torch.equal(sane(noisy).valid, b.valid)


def test_padding_changes_nothing(source):
    method = danet.Config(**EAGER)
    state = method.init(source)
    part, full = batch(6, valid=5), batch(6, valid=5)
    garbage = full._replace(z=torch.where(full.valid[:, None, None], full.z, 99.0))
    one, _ = method.step(source, state, part)
    two, _ = method.step(source, state, garbage)
    assert all(torch.equal(one[k], two[k]) for k in one)


def judged(method: danet.Config, p: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """[B] 1 where the heads' P(bona fide) ``p`` [B, V] give a pseudo label that teaches."""
    none = torch.zeros(0)
    read = tail.TailOutput(torch.logit(p), none, none, none, none, none)
    n = len(p)
    b = Features(torch.zeros(n, 3, F), present, torch.ones(n, dtype=torch.bool), torch.arange(n))
    return algorithm._reliable(method, {}, read, read, *trust.vote(p, present), b)[1]


def test_bona_fide_needs_more_than_attack():
    p = torch.tensor([[0.85] * 4, [0.15] * 4])  # equally sure, on both sides
    assert judged(danet.Config(), p, torch.ones(2, 3, dtype=torch.bool)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("labels", "used"), [("all", [1, 1, 1]), ("confidence", [0, 1, 1]), ("vote", [0, 0, 1])]
)
def test_which_pseudo_labels_teach(labels, used):
    doubtful, one_against, agreed = [0.6] * 4, [0.99, 0.2, 0.99, 0.99], [0.99] * 4
    p = torch.tensor([doubtful, one_against, agreed])
    assert judged(danet.Config(labels=labels), p, torch.ones(3, 3, dtype=torch.bool)).tolist() == used


def test_one_doubting_head_vetoes_bona_fide_only_when_present():
    method = danet.Config(disagreement=1.0, confidence_bona_fide=0.5)
    p = torch.tensor([[0.99, 0.4, 0.99, 0.99]])
    for depth_present, expected in ((True, 0.0), (False, 1.0)):
        assert judged(method, p, torch.tensor([[True, depth_present, True]])).item() == expected


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.booleans())
def test_vote_is_bounded(p, substituted):
    present = torch.tensor([[True, not substituted, True]])
    vote, disagreement = trust.vote(torch.tensor([p]), present)
    assert min(p) - 1e-5 <= vote.item() <= max(p) + 1e-5
    assert 0 <= disagreement.item() <= math.log(2) + 1e-6


def test_a_substituted_head_counts_less():
    p = torch.tensor([[0.9, 0.1, 0.9, 0.9]])
    full, _ = trust.vote(p, torch.tensor([[True, True, True]]))
    without, _ = trust.vote(p, torch.tensor([[True, False, True]]))
    assert without > full


def test_unstable_learning_falls_to_the_floor_and_comes_back(source):
    method = danet.Config(**EAGER, patience=3)
    state = method.init(source)
    for seed in range(25):
        state, _ = method.step(source, state, batch(seed))
    good = {k: state[f"good.{k}"].clone() for k in LEARNED}
    restored = torch.tensor(False)
    for _ in range(60):
        shaken = {**state, **{f"good.{k}": good[k] for k in good}}
        state, restored = algorithm._weigh(method, shaken, torch.tensor(5.0), measured=torch.tensor(True))
        if restored:
            break
    assert restored
    assert all(torch.equal(state[k], good[k]) for k in good)
    assert all(not state[f"adam1.{k}"].any() for k in LEARNED)
    assert state["omega"] == method.omega


def test_steady_learning_raises_omega(source):
    method = danet.Config()
    state = {**method.init(source), "step": torch.tensor(20), "warm_up": torch.full((20,), 1.0)}
    new, restored = algorithm._weigh(method, state, torch.tensor(0.1), measured=torch.tensor(True))
    assert new["omega"] > state["omega"]
    assert not restored


def test_a_batch_that_teaches_nothing_gives_the_same_bits_without_gradients(source):
    method = danet.Config(trigger=None, sessions=0)
    state = method.init(source)
    there = torch.ones(B, 3, dtype=torch.bool)
    for i in range(6):
        z = torch.randn(B, 3, F, generator=torch.Generator().manual_seed(i))
        seen, lesson = method.observe(source, state, Features(z, there, there[:, 0], torch.arange(B) + B * i))
        lesson = lesson._replace(used=torch.zeros(B))
        (state, skipped), (other, full) = (
            method.conclude(source, seen, lesson, learn=x) for x in (False, True)
        )
        assert all(torch.equal(t, other[n]) for n, t in state.items())
        assert torch.equal(skipped.score, full.score) and torch.equal(skipped.omega, full.omega)


def test_source_mode_without_source_features_says_so(source):
    with pytest.raises(ValueError, match=r"site\.mode"):
        danet.Config(mode="da").init(source)


def test_source_mode_holds_on_to_the_source(source):
    g = torch.Generator().manual_seed(1)
    replay = {
        "replay.z": torch.randn(32, 3, F, generator=g),
        "replay.present": torch.ones(32, 3, dtype=torch.bool),
        "replay.label": (torch.arange(32) % 2).float(),
    }
    full = {**source, **replay}

    def loss(state: dict[str, torch.Tensor]) -> float:
        logit = tail.forward(
            tail.with_site_state(full, state), replay["replay.z"], replay["replay.present"]
        ).logit[:, tail.FUSED]
        return float(algorithm._cross_entropy(logit, replay["replay.label"]).mean())

    method = danet.Config(**{**EAGER, "mode": "da", "source": 5.0, "lr": 0.01})
    state = method.init(full)
    start = loss(state)
    for seed in range(30):
        state, _ = method.step(full, state, batch(seed))
    assert loss(state) < start


def shifted_stream(
    source: dict[str, torch.Tensor], *, by: float, steps: int, seed: int = 0
) -> list[Features]:
    """Batches whose source logits are those of validation, moved by ``by``."""
    g = torch.Generator().manual_seed(seed)
    made: list[Features] = []
    there = torch.ones(B, 3, dtype=torch.bool)
    while len(made) < steps:
        z = torch.randn(64 * B, 3, F, generator=g) * torch.rand(64 * B, 1, 1, generator=g) * 3
        present = torch.ones(len(z), 3, dtype=torch.bool)
        logit = tail.forward(source, z, present).logit[:, tail.FUSED]
        q = source["reference.logit"][-1]
        want = (
            torch.where(
                torch.rand(B, generator=g) < 0.7,
                q[1, torch.randint(33, (B,), generator=g)],
                q[0, torch.randint(33, (B,), generator=g)],
            )
            + by
        )
        rows = (logit[None] - want[:, None]).abs().argmin(1)
        made.append(Features(z[rows], there, there[:, 0], torch.arange(B) + B * len(made)))
    return made


def matched(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``source`` with a boundary and reference that random features reach on both sides."""
    params = {**source, "log_rho": torch.full((4,), math.log(2.0))}
    q = torch.linspace(0, 1, tail.QUANTILES)
    logit = torch.stack([-9 + 8 * q, 1 + 4 * q]).expand(2**tail.MODALITIES, -1, -1).clone()
    return {**params, "reference.logit": logit}


def test_without_a_shift_nothing_moves(source):
    params, method = (
        matched(source),
        danet.Config(confidence_bona_fide=0.5, confidence_attack=0.5, trigger=3.0),
    )
    state = method.init(params)
    for b in shifted_stream(params, by=0.0, steps=40):
        state, outcome = method.step(params, state, b)
        assert (outcome.pseudo_label == -1).all()
    assert all(torch.equal(state[k], params[k]) for k in tail.MOVABLE)


def test_the_boundary_follows_a_shift_when_attacks_were_seen(source):
    params, method = matched(source), danet.Config(learn=False)
    low = method.init(params)
    for b in shifted_stream(params, by=-1.5, steps=60):
        low, _ = method.step(params, low, b)
    assert low["pattern"][-1] > params["pattern"][-1]  # a larger sphere: more is bona fide


def test_one_class_never_loosens_the_boundary(source):
    params, method = matched(source), danet.Config(learn=False, trigger=None)
    genuine = {
        **params,
        "reference.logit": params["reference.logit"][:, [1, 1]],
    }  # the stream draws bona fide only
    state = method.init(params)
    for b in shifted_stream(genuine, by=-1.5, steps=60):
        state, _ = method.step(params, state, b)
    assert (state["pattern"] <= params["pattern"] + 1e-6).all()


def test_a_flood_of_one_session_counts_as_two_captures(source):
    method = danet.Config(**{**EAGER, "session_cap": 2})
    state, flood = method.init(source), batch(9)
    flood = flood._replace(session=torch.zeros(B, dtype=torch.int64))
    for _ in range(5):
        state, outcome = method.step(source, state, flood)
    assert (outcome.pseudo_label == -1).all()
    assert float(state["shift.count"].sum()) <= 2.0


def test_conformal_and_prototype_labels_only_ever_refuse_more(source):
    g = torch.Generator().manual_seed(2)
    full = {
        **source,
        "replay.z": torch.randn(16, 3, F, generator=g),
        "replay.present": torch.ones(16, 3, dtype=torch.bool),
        "replay.label": (torch.arange(16) % 2).float(),
    }
    plain = danet.Config(**EAGER)
    for more in ({"prototypes": True}, {"conformal": 0.1}):
        strict = danet.Config(**EAGER, **more)
        fewer = 0
        for seed in range(10):
            b = batch(seed)
            a, c = plain.step(full, plain.init(full), b)[1], strict.step(full, strict.init(full), b)[1]
            assert ((c.pseudo_label == -1) | (c.pseudo_label == a.pseudo_label)).all()
            fewer += int((c.pseudo_label == -1).sum() - (a.pseudo_label == -1).sum())
        assert fewer > 0


def test_a_state_comes_back_from_a_file_bit_for_bit(source, tmp_path):
    from safetensors.torch import load_file, save_file

    method = danet.Config(**EAGER)
    state = method.init(source)
    for seed in range(6):
        state, _ = method.step(source, state, batch(seed))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "state.safetensors")
    again = load_file(tmp_path / "state.safetensors")
    for seed in range(6, 12):
        state, _ = method.step(source, state, batch(seed))
        again, _ = method.step(source, again, batch(seed))
    assert all(torch.equal(state[k], again[k]) for k in state)
