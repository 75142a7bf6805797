"""What sets each baseline apart, with published settings and with ours, and what all of them promise."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from pipeline.models import TailConfig
from pipeline.models import tail as tails
from pipeline.models.tail import LEARNED
from pipeline.site import bank
from pipeline.site.methods import cotta, drm, eata, read, recalibrate, sar
from pipeline.site.trust import entropy, sane
from pipeline.types import Features

F, B = 16, 8
AFFINE = {"site.gamma", "site.beta"}
MOVES = {  # what a method may move, and does
    "eata": AFFINE,
    "sar": AFFINE,
    "cotta": set(LEARNED),
    "shot": AFFINE | {"site.down", "site.up"},
    "read": {"gate", "site.gamma"},
    "drm": {"log_rho"},
    "recalibrate": {"pattern"},
}
EVERY = [(kind, published) for kind in MOVES for published in (False, True)]
everywhere = pytest.mark.parametrize("kind,published", EVERY)


@functools.cache
def source(head: str = "radial", features: int = F, width: int = 8, rank: int = 4) -> dict[str, torch.Tensor]:
    """A tail with what a trained one carries; its source features are labelled by its own calls."""
    g = torch.Generator().manual_seed(0)
    tail = tails.init_tail(TailConfig(head=head, width=width, rank=rank), features, generator=g)
    z = torch.randn(64, 3, features, generator=g) * torch.linspace(0.1, 1.5, 64)[:, None, None]
    present = torch.ones(64, 3, dtype=torch.bool)
    label = (tails.score(tail, z, present) >= 0.5).float()
    pattern = torch.tensor([0.0, 0.2, -0.1, 0.1, 0.3, -0.2, 0.05, 0.0])
    return {
        **tail,
        "pattern": pattern,
        "replay.z": z,
        "replay.present": present,
        "replay.label": label,
        "reference.boundary": torch.tensor([-0.4, 0.0, 0.3]),
        "reference.logit": torch.zeros(8, 2, 33),
    }


def method(kind: str, published: bool = False, **over: object):
    module = importlib.import_module(f"pipeline.site.methods.{kind}")
    return module.Config(**{**(module.PUBLISHED if published else {}), **over})


def eager(kind: str, published: bool):
    return method(kind, published, **({"minimum": 4} if kind == "recalibrate" else {}))


def batch(seed: int) -> Features:
    """Random rows with one to three sensors, from near the centre of bona fide to far out."""
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(B, 3, generator=g) > 0.2
    present[:, 0] |= ~present.any(-1)
    z = torch.randn(B, 3, F, generator=g) * (0.1 + 1.4 * torch.rand(B, 1, 1, generator=g))
    return Features(z, present, torch.ones(B, dtype=torch.bool), torch.arange(B) + B * seed)


@functools.cache
def pool(head: str) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(6000, 3, F, generator=g) * torch.rand(6000, 1, 1, generator=g) * 1.5
    present = torch.ones(6000, 3, dtype=torch.bool)
    return z, tails.score(source(head), z, present)


def rows(low: float, high: float, *, start: int = 0, count: int = B, head: str = "radial") -> Features:
    """Rows with all sensors that the source gives a score within (low, high)."""
    z, score = pool(head)
    z = z[(score > low) & (score < high)][start : start + count]
    assert len(z) == count
    there = torch.ones(count, 3, dtype=torch.bool)
    return Features(z, there, there[:, 0], torch.arange(count))


def moved(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> set[str]:
    return {k for k in tails.MOVABLE if not torch.equal(new[k], old[k])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def after(m, tail: dict[str, torch.Tensor], steps: int, state: dict[str, torch.Tensor] | None = None):
    state = m.init(tail) if state is None else state
    for seed in range(steps):
        state, _ = m.step(tail, state, batch(seed))
    return state


@pytest.mark.parametrize("head", ["radial", "linear"])
@pytest.mark.parametrize("kind", MOVES)
def test_exactly_its_own_part_moves(kind, head):
    tail = source(head)
    m = eager(kind, False)
    state = after(m, tail, 4)
    assert moved(state, tail) == MOVES[kind]
    _, outcome = m.step(tail, state, batch(9))
    clean = sane(batch(9))
    assert torch.equal(outcome.score, tails.score(tails.with_site_state(tail, state), clean.z, clean.present))
    assert outcome.pseudo_label.dtype == torch.int8


@everywhere
@settings(max_examples=5)
@given(
    valid=st.lists(st.booleans(), min_size=B, max_size=B),
    junk=st.sampled_from([3.0, math.nan, math.inf, 1e30]),
)
def test_padding_and_broken_rows_change_nothing(kind, published, valid, junk):
    tail, m = source(), eager(kind, published)
    one = two = three = after(m, tail, 1)
    keep = torch.tensor(valid)
    for seed in (5, 6):
        b = batch(seed)._replace(valid=keep)
        noisy = b._replace(z=torch.where(keep[:, None, None], b.z, junk), present=b.present | ~keep[:, None])
        broken = b._replace(valid=torch.ones_like(keep), z=torch.where(keep[:, None, None], b.z, math.nan))
        one, _ = m.step(tail, one, b)
        two, _ = m.step(tail, two, noisy)
        three, outcome = m.step(tail, three, broken)
    assert same(one, two) and same(one, three)
    assert all(t.isfinite().all() for t in one.values() if t.is_floating_point())
    assert (outcome.pseudo_label[~keep] == -1).all()


@everywhere
def test_a_batch_without_valid_rows_leaves_every_bit(kind, published):
    tail, m = source(), eager(kind, published)
    for state in (m.init(tail), after(m, tail, 3)):
        new, outcome = m.step(tail, state, batch(7)._replace(valid=torch.zeros(B, dtype=torch.bool)))
        assert same(new, state)
        assert not outcome.restored


@everywhere
def test_stacked_sites_are_single_sites(kind, published):
    tail, m = source(), eager(kind, published)
    alone = [after(m, tail, 1), after(m, tail, 2)]
    stacked = bank.stack(alone)
    parts = [batch(10), batch(11)]
    stacked, _ = bank.step(m, tail, stacked, Features(*(torch.stack(t) for t in zip(*parts))))
    for k, state in enumerate(alone):
        new, _ = m.step(tail, state, parts[k])
        for name in new:
            torch.testing.assert_close(stacked[name][k], new[name], atol=1e-5, rtol=1e-4)


@everywhere
def test_a_stored_state_goes_on_bit_for_bit(kind, published):
    tail, m = source(), eager(kind, published)
    state = after(m, tail, 3)
    back = load(save({k: v.contiguous() for k, v in state.items()}))
    assert same(back, state)
    assert same(after(m, tail, 3, back), after(m, tail, 3, state))


@pytest.mark.parametrize("kind", MOVES)
def test_published_settings_differ_and_the_state_stays_small(kind):
    assert method(kind, True).kind == kind
    assert method(kind, True) != method(kind) or kind == "cotta"
    state = method(kind, True).init(source(features=64, width=32, rank=8))
    assert set(tails.MOVABLE) <= set(state)
    assert sum(t.numel() * t.element_size() for t in state.values()) <= 160 * 1024


@pytest.mark.parametrize("kind", ["eata", "sar"])
def test_doubtful_rows_teach_nothing(kind):
    tail, m = source(), method(kind)
    state, _ = m.step(tail, m.init(tail), rows(0.95, 0.99))
    new, outcome = m.step(tail, state, rows(0.3, 0.7))
    assert same(new, state)
    assert (outcome.pseudo_label == -1).all()


def test_eata_as_published_learns_from_contradictions_only():
    for published in (False, True):
        m = method("eata", published)
        state, first = m.step(source(), m.init(source()), rows(0.985, 1))
        assert (first.pseudo_label == 1).all()
        new, again = m.step(source(), state, rows(0.985, 1, start=B))
        _, other = m.step(source(), state, rows(0, 0.005))
        assert (other.pseudo_label == 0).all()
        assert (again.pseudo_label == (-1 if published else 1)).all()
        assert bool(moved(new, state)) is not published


@given(p=st.floats(0, 1), q=st.floats(0, 1))
def test_the_cosine_of_two_class_predictions(p, q):
    pair = torch.tensor([[p, 1 - p], [q, 1 - q]])
    wanted = torch.nn.functional.cosine_similarity(pair[:1], pair[1:]).item()
    assert eata._cosine(torch.tensor([p]), torch.tensor(q)).item() == pytest.approx(wanted, abs=1e-5)
    assert eata._cosine(torch.tensor([p]), torch.tensor(0.5)).item() >= 0.707, (
        "no published margin passes at one half"
    )


def test_eata_is_held_to_the_source_where_its_features_are_known():
    def distance(tail: dict[str, torch.Tensor], **over: float) -> float:
        m = method("eata", **over)
        state = m.init(tail)
        for k in range(20):
            state, _ = m.step(tail, state, rows(0.93, 1, start=B * k))
        return float((state["site.gamma"] - tail["site.gamma"]).norm())

    bare = {k: v for k, v in source().items() if not k.startswith("replay.")}
    assert not any(method("eata").init(bare)[f"fisher.{k}"].any() for k in eata.LEARNED)
    assert all((method("eata").init(source())[f"fisher.{k}"] >= 0).all() for k in eata.LEARNED)
    assert distance(source()) < 0.9 * distance(bare)
    assert distance(source(), anchor=0.0) == pytest.approx(distance(bare))


def test_sar_as_published_never_leaves_the_source():
    stream = [rows(0.93, 0.98, start=B * k) for k in range(6)]
    for published in (False, True):
        m = method("sar", published)
        state = m.init(source())
        back = []
        for b in stream:
            state, outcome = m.step(source(), state, b)
            back.append(bool(outcome.restored))
        assert all(back) if published else not any(back)
        assert bool(moved(state, source())) is not published
        assert bool(state["adam.t"]) is not published
        assert published is not any(state[f"adam1.{k}"].any() for k in sar.LEARNED)


def test_sar_recovers_from_collapse_with_our_settings_too():
    m = method("sar")
    state, _ = m.step(source(), m.init(source()), rows(0.93, 0.98))
    for k in range(40):
        state, outcome = m.step(source(), state, rows(0, 1e-3, start=B * k))
        if outcome.restored:
            break
    assert outcome.restored
    assert not moved(state, source()) and not state["counted"]


def test_sar_learns_from_the_gradient_uphill():
    def gradient(rho: float) -> torch.Tensor:
        m = method("sar", rho=rho)
        return m.step(source(), m.init(source()), rows(0.93, 0.98))[0]["adam1.site.beta"]

    assert not torch.allclose(gradient(0.0), gradient(0.05), rtol=1e-3)


def test_cotta_serves_the_slow_mean_of_a_student_that_forgets():
    m = method("cotta", restore=0.0)
    state = after(m, source(), 3)
    new, _ = m.step(source(), state, batch(8))
    for k in LEARNED:
        wanted = state[k] + (1 - m.teacher) * (new[f"student.{k}"] - state[k])
        assert torch.equal(new[k], wanted)
    forgetful = method("cotta", restore=0.5)
    partly, _ = forgetful.step(source(), state, batch(8))
    assert all(torch.equal(partly[k], new[k]) for k in tails.MOVABLE), (
        "the teacher moves before the student forgets"
    )
    home = partly["student.site.up"] == source()["site.up"]
    assert 0.3 < home.float().mean() < 0.7
    assert torch.equal(partly["student.site.up"][~home], new["student.site.up"][~home])
    gamma, beta = (partly[f"student.{k}"] == source()[k] for k in ("site.gamma", "site.beta"))
    assert not torch.equal(gamma, beta), "every entry has a coin of its own"


@given(step=st.integers(0, 10**6), share=st.sampled_from([0.01, 0.3]))
def test_coins_are_fair_and_new_every_step(step, share):
    shape = torch.Size((100, 100))
    now, then = (cotta._coins(torch.tensor(s), 0, shape, share=share).float() for s in (step, step + 1))
    assert now.mean().item() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 10**4))
    assert (now * then).mean().item() == pytest.approx(share**2, abs=5 * share / 100)


def test_cotta_averages_over_missing_sensors_only_where_in_doubt():
    m, tail = method("cotta"), source()

    def changed(b: Features) -> torch.Tensor:
        score = tails.score(tail, b.z, b.present)
        return m._target(tail, tail, score, b) != score

    doubtful = rows(0.3, 0.7)
    assert changed(doubtful).all()
    assert not changed(rows(0.93, 1)).any()
    assert not changed(doubtful._replace(present=doubtful.present & torch.tensor([True, False, False]))).any()
    sets = torch.tensor([[True, False, True], [True, False, False], [False, False, True]])
    both, *single = (tails.score(tail, doubtful.z, s.expand(B, 3)) for s in sets)
    target = method("cotta", sure=1.0)._target(
        tail, tail, both, doubtful._replace(present=sets[0].expand(B, 3))
    )
    torch.testing.assert_close(target, (both + single[0] + single[1]) / 3)


def test_shot_as_published_turns_a_one_class_stream_towards_the_other_class():
    check = rows(0.6, 0.9, start=200, count=64)
    mean = {}
    for published in (False, True):
        m = method("shot", published, pseudo=0.0)
        state = m.init(source())
        for k in range(30):
            state, _ = m.step(source(), state, rows(0.8, 0.97, start=B * k))
        mean[published] = float(
            tails.score(tails.with_site_state(source(), state), check.z, check.present).mean()
        )
    start = float(tails.score(source(), check.z, check.present).mean())
    assert mean[True] < start - 0.02, mean
    assert mean[False] > start - 0.02, mean


@given(mean=st.floats(0.01, 0.99), prior=st.floats(0.01, 0.99))
def test_shot_holds_the_mean_to_the_prior_and_as_published_to_one_half(mean, prior):
    m, q = torch.tensor(mean), torch.tensor(prior)
    assert method("shot")._diversity(m, q) >= -1e-6
    assert method("shot")._diversity(q, q).item() == pytest.approx(0, abs=1e-6)
    plain = math.log(2) - entropy(m).item()
    assert method("shot", True)._diversity(m, q).item() == pytest.approx(plain, abs=1e-5)


def test_shot_seeds_centroids_and_one_class_leaves_the_other_where_it_was():
    m, tail = method("shot"), source()
    state = m.init(tail)
    assert state["centroid.weight"].tolist() == [64 - tail["replay.label"].sum(), tail["replay.label"].sum()]
    assert method("shot", True).init(tail)["centroid.sum"].shape == (2, len(tail["fuse.out"]) + 1)
    far, near = rows(0, 0.01), rows(0.99, 1)
    _, outcome = m.step(tail, state, Features(*(torch.cat([a[:4], b[:4]]) for a, b in zip(far, near))))
    assert outcome.pseudo_label.tolist() == [0] * 4 + [1] * 4
    new, _ = m.step(tail, state, near)
    assert torch.equal(new["centroid.sum"][0], state["centroid.sum"][0])
    assert not torch.equal(new["centroid.sum"][1], state["centroid.sum"][1])
    bare = {k: v for k, v in tail.items() if not k.startswith("replay.")}
    _, own = m.step(bare, m.init(bare), near)
    assert (own.pseudo_label == 1).all(), "without centroids the model's own call is the label"


@given(p=st.floats(0.5, 0.999).filter(lambda p: abs(p - 0.75) > 1e-3))
def test_the_robust_loss_bends_at_gamma_and_as_published_never(p):
    def slope(published: bool) -> torch.Tensor:
        gamma = method("read", published).confidence
        return torch.func.grad(lambda x: read._robust(x, gamma))(torch.tensor(p))

    assert bool(slope(False) > 0) is (p < 0.75)
    assert slope(True) < 0


def test_read_makes_doubtful_rows_less_sure_and_one_factor_per_sensor():
    doubtful = rows(0.55, 0.72, count=8)
    change = {}
    for published in (False, True):
        m = method("read", published, balance=0.0, lr=1e-3)
        state = m.init(source())
        for _ in range(20):
            state, outcome = m.step(source(), state, doubtful)
        change[published] = float(
            (
                tails.score(tails.with_site_state(source(), state), doubtful.z, doubtful.present)
                - tails.score(source(), doubtful.z, doubtful.present)
            ).mean()
        )
        assert state["site.gamma"].std(dim=-1).max() < 1e-6
        assert (outcome.pseudo_label == (1 if published else -1)).all()
    assert change[False] < 0 < change[True]


@given(
    boundary=st.lists(st.floats(-1, 1), min_size=1, max_size=5), head=st.sampled_from(["radial", "linear"])
)
@settings(max_examples=15)
def test_drm_stays_between_the_boundaries_and_goes_to_the_surest(boundary, head):
    tail = {**source(head), "reference.boundary": torch.tensor(boundary)}
    m = method("drm")
    state = m.init(tail)
    assert not moved(state, tail), "before anything was seen the source's own boundary serves"
    for seed in range(3):
        state, _ = m.step(tail, state, batch(seed))
    assert min(boundary) - 1e-5 <= state["log_rho"][tails.FUSED] <= max(boundary) + 1e-5
    assert torch.equal(state["log_rho"][: tails.FUSED], tail["log_rho"][: tails.FUSED])
    cold, _ = method("drm", temperature=1e-6).step(tail, state, batch(3))
    at = tail["reference.boundary"][
        (tail["reference.boundary"] - cold["log_rho"][tails.FUSED]).abs().argmin()
    ]
    lowest = cold["entropy"].min()
    assert cold["entropy"][tail["reference.boundary"] == at].min() <= lowest + 1e-5


def test_drm_counts_every_sample_once_and_needs_boundaries():
    tail, m = source(), method("drm", momentum=0.9999)
    state = after(m, tail, 3)
    every = [sane(batch(k)) for k in range(3)]
    each = torch.cat(
        [
            drm._entropies(tail, tails.forward(tail, b.z, b.present).radius[:, tails.FUSED], b.present)
            for b in every
        ]
    )
    torch.testing.assert_close(state["entropy"], each.mean(dim=0))
    z, present = every[0].z, every[0].present
    alone = {**tail, "reference.boundary": tail["log_rho"][tails.FUSED :]}
    own = drm._entropies(alone, tails.forward(tail, z, present).radius[:, tails.FUSED], present)
    torch.testing.assert_close(own[:, 0], entropy(tails.score(tail, z, present)))
    bare = {k: v for k, v in tail.items() if not k.startswith("reference.")}
    for lacking in (bare, {**bare, "reference.boundary": torch.zeros(0)}):
        with pytest.raises(ValueError, match=r"^site\.kind: 'drm'[^\n]*$"):
            m.init(lacking)


def door(share: float, count: int, head: str) -> Features:
    """A stream with about ``share`` of rows far inside the bona fide side, in turns."""
    good, bad = (rows(*r, count=count, head=head) for r in ((0.6, 1), (0, 0.4)))
    bona_fide = torch.floor(torch.arange(1, count + 1) * share) > torch.floor(torch.arange(count) * share)
    return good._replace(z=torch.where(bona_fide[:, None, None], good.z, bad.z))


@pytest.mark.parametrize("head", ["radial", "linear"])
@pytest.mark.parametrize("share,sign", [(0.95, 1), (0.05, -1)])
def test_recalibrate_follows_the_share_within_its_limit_and_not_before_the_count(share, sign, head):
    tail, m = source(head), method("recalibrate", rate=0.05)
    state, stream, seen = m.init(tail), door(share, 400, head), 0
    for start in range(0, 400, B):
        state, _ = m.step(tail, state, Features(*(t[start : start + B] for t in stream)))
        seen += B
        assert bool(moved(state, tail)) is (seen >= m.minimum)
    assert 0.9 * m.limit < sign * float(state["shift"]) <= m.limit
    b = batch(1)
    gain = [
        tails.forward(tails.with_site_state(tail, s), b.z, b.present).logit[:, tails.FUSED]
        for s in (state, tail)
    ]
    torch.testing.assert_close(gain[0] - gain[1], state["shift"].expand(B), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["radial", "linear"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_recalibrate_as_published_makes_half_of_any_stream_attacks(share, head):
    tail, m = source(head), method("recalibrate", True)
    state, stream = m.init(tail), door(share, m.window, head)
    for start in range(0, m.window, B):
        state, _ = m.step(tail, state, Features(*(t[start : start + B] for t in stream)))
    calls = tails.score(tails.with_site_state(tail, state), stream.z, stream.present) >= 0.5
    assert calls.float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_recalibrate_forgets_what_left_its_window():
    tail, m = source(), method("recalibrate", window=64, rate=0.2)
    state, signs = m.init(tail), []
    for share in (0.95, 0.05):
        stream = door(share, 160, "radial")
        for start in range(0, 160, B):
            state, _ = m.step(tail, state, Features(*(t[start : start + B] for t in stream)))
        signs.append(float(state["shift"]) > 0)
    assert signs == [True, False]


@given(share=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_the_share_is_recovered_from_calibrated_logits(share, seed):
    g = torch.Generator().manual_seed(seed)
    side = torch.where(torch.arange(2000) < 2000 * share, 1.0, -1.0)
    logit = 2 * 2.0 * (2.0 * side + torch.randn(2000, generator=g))  # log ratio of N(2, 1) and N(-2, 1)
    odds = recalibrate._log_odds(logit, torch.ones(2000, dtype=torch.bool))
    assert torch.sigmoid(odds).item() == pytest.approx(share, abs=0.03)


@given(shift=st.floats(-200, 200))
def test_a_recalibrated_radius_stays_positive(shift):
    pattern = recalibrate._pattern(source(), torch.tensor(shift))
    assert pattern.isfinite().all()
    assert torch.equal(recalibrate._pattern(source(), torch.tensor(0.0)), source()["pattern"])
