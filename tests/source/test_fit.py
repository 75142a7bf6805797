from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.corpus import Corpus
from pipeline.models import ModelConfig, TailConfig, TinyConfig, fit_state
from pipeline.models import checkpoint as cp
from pipeline.models import tail as tails
from pipeline.models.trunk import features
from pipeline.source import fit as fits
from pipeline.source.contract import Batch
from pipeline.source.methods import erm, rise
from pipeline.source.sampler import FitError, draw, make_batch, stratify
from pipeline.stats import metrics

SIZE = 16
MODEL = ModelConfig(trunk=TinyConfig(width=4, features=8), tail=TailConfig(width=8, rank=2))


def corpus(name: str = "a", count: int = 60, *, seed: int = 0, live: float = 0.4) -> Corpus:
    """Bona fide frames have a bright disc in depth and infrared, attacks are flat; RGB says nothing."""
    random = np.random.default_rng(seed)
    label = (np.arange(count) % 10 < 10 * live).astype(np.int8)
    frame = random.integers(60, 120, (count, 5, SIZE, SIZE)).astype(np.uint8)
    frame[label == 1, 3:, 4:12, 4:12] += 90
    split = np.array(["train", "train", "train", "val"])[np.arange(count) // 10 % 4]
    names = np.array([f"{name}{i}" for i in range(count)])
    pai, present = np.where(label == 1, "bona_fide", "print"), np.full(count, 7, np.uint8)
    return Corpus(name, names, split, label, pai, names, names, present, frame)


def corpora() -> list[Corpus]:
    return [corpus("a", 80), corpus("b", 80, seed=1, live=0.2), corpus("c", 40, seed=2, live=0.6)]


def task(kind: str = "rise", **over: object) -> fits.Task:
    values = {"steps": 30, "batch": 18, "lr": 1e-2, **over}
    method = {"rise": rise.Config, "erm": erm.Config}[kind](**values)
    return fits.Task(method, MODEL, SIZE, data={"a": "ff"}, fingerprint="f", revision="r")


@pytest.mark.parametrize("kind", ["erm", "rise"])
def test_a_short_fit_learns_and_its_checkpoint_scores_the_same(kind: str, tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    model = fits.fit(task(kind), corpora(), report=lambda s, losses: seen.append((s.step, losses)), every=12)
    assert [step for step, _ in seen] == [12, 24, 30]
    assert seen[-1][1]["risk"] < seen[0][1]["risk"]
    test = corpus("new", 60, seed=9)
    present = torch.ones(60, 3, dtype=torch.bool)
    score = fits.scores(model, features(model.trunk, torch.from_numpy(test.frame), present), present)
    assert metrics.hter(score.numpy(), test.label, model.manifest.threshold) < 0.1
    cp.save(tmp_path / "m", model)
    again = cp.load(tmp_path / "m")
    assert torch.equal(
        score, fits.scores(again, features(again.trunk, torch.from_numpy(test.frame), present), present)
    )
    assert again.manifest.metrics["val_hter"] < 0.1
    assert (again.manifest.method, again.manifest.domains) == (kind, ("a", "b", "c"))


def test_radii_do_not_collapse_and_the_spheres_agree() -> None:
    model = fits.fit(task(), corpora())
    test = corpus("new", 60, seed=9)
    present = torch.ones(60, 3, dtype=torch.bool)
    read = tails.forward(model.tail, features(model.trunk, torch.from_numpy(test.frame), present), present)
    live, attack = read.radius[test.label == 1, tails.FUSED], read.radius[test.label == 0, tails.FUSED]
    assert float(attack.median()) > 1.2 * float(live.median())
    assert float(attack.median()) > 0.3
    assert model.manifest.threshold == pytest.approx(0.5, abs=0.1), (
        "calibrated radii put the threshold near one half"
    )


def test_the_site_adapter_of_a_source_model_is_the_identity() -> None:
    model = fits.fit(task(steps=10), corpora())
    assert bool((model.tail["site.up"] == 0).all())
    assert bool((model.tail["site.gamma"] == 1).all())
    assert bool((model.tail["site.beta"] == 0).all())


@pytest.mark.parametrize("kind", ["erm", "rise"])
def test_a_resumed_fit_ends_where_an_unbroken_one_does(kind: str, tmp_path: Path) -> None:
    whole = fits.begin(task(kind, steps=12), domains=3)
    cells = stratify(corpora())

    def go(state: fits.Fit, until: int) -> None:
        while state.step < until:
            method, at = state.task.method, state.step
            drawn = draw(method, corpora(), cells, step=at, rank=0, world=1)
            fits.step(state, *make_batch(method, drawn, step=at, rank=0))

    go(whole, 5)
    fits.save(whole, tmp_path)
    go(whole, 12)
    resumed = fits.begin(task(kind, steps=12), domains=3)
    fits.restore(resumed, tmp_path)
    assert resumed.step == 5
    go(resumed, 12)
    for name, t in whole.objective.state_dict().items():
        assert torch.equal(t, resumed.objective.state_dict()[name]), name


def test_state_of_another_configuration_is_refused(tmp_path: Path) -> None:
    fits.save(fits.begin(task("erm"), domains=3), tmp_path)
    with pytest.raises(FitError, match="saved fit has kind 'erm', this one 'rise'"):
        fits.restore(fits.begin(task("rise"), domains=3), tmp_path)


@pytest.mark.parametrize("name", ["fit.json", "fit.safetensors"])
def test_no_flipped_bit_of_a_saved_fit_is_restored(tmp_path: Path, name: str) -> None:
    fits.save(fits.begin(task("erm"), domains=3), tmp_path)
    whole = (tmp_path / name).read_bytes()
    for bit in np.linspace(0, 8 * len(whole) - 1, 60).astype(int):
        spoiled = bytearray(whole)
        spoiled[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"not a readable fit \(.*\); delete it$"):
            fit_state.read(tmp_path)
    with pytest.raises(FitError, match=r"source\.start: .*not a readable fit"):
        fits.begin(task(start=str(tmp_path)), domains=3)
    (tmp_path / name).write_bytes(whole)
    fits.restore(fits.begin(task("erm"), domains=3), tmp_path)


def test_saved_state_holds_no_pickle(tmp_path: Path) -> None:
    fits.save(fits.begin(task(), domains=3), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.json", "fit.safetensors"]


def test_batches_are_stratified_repeatable_and_different_per_rank() -> None:
    data = corpora()
    cells = stratify(data)
    method = task().method
    first = draw(method, data, cells, step=3, rank=0, world=1)
    again = draw(method, data, cells, step=3, rank=0, world=1)
    assert torch.equal(first.frames, again.frames)
    counts = torch.bincount(2 * first.domain + first.label, minlength=6)
    assert counts.tolist() == [3] * 6
    ranks = [draw(method, data, cells, step=3, rank=r, world=2) for r in range(2)]
    assert [len(b.label) for b in ranks] == [9, 9]
    assert not torch.equal(ranks[0].frames, ranks[1].frames)


def test_odd_counts_rotate_over_the_cells() -> None:
    data = corpora()
    cells = stratify(data)
    method = task(batch=8).method
    total = torch.zeros(6, dtype=torch.long)
    for step in range(6):
        b = draw(method, data, cells, step=step, rank=0, world=1)
        assert len(b.label) == 8
        total += torch.bincount(2 * b.domain + b.label, minlength=6)
    assert total.tolist() == [8] * 6


def test_a_domain_of_one_class_and_a_tiny_one_are_fine() -> None:
    data = [corpus("a"), corpus("attacks", 40, live=0.0), corpus("tiny", 4)]
    model = fits.fit(task(steps=4), data)
    assert "val_hter_attacks" not in model.manifest.metrics


def test_nothing_to_learn_from_is_said_before_the_fit() -> None:
    one_class = corpus(live=1.0)
    no_train, no_val = (replace(corpus(), split=np.array([only] * 60)) for only in ("test", "train"))
    for data, match in (
        ([one_class], "domains a: every training row is bona fide"),
        ([no_train], "domains a: no training rows"),
        ([no_val], "val split must hold bona fide and attack"),
        ([], "domains none: no training rows"),
    ):
        with pytest.raises(FitError, match=match):
            fits.fit(task(), data)


def test_a_loss_that_is_not_finite_stops_the_fit_and_names_the_term() -> None:
    state = fits.begin(task(), domains=1)
    b = Batch(
        torch.full((4, 5, SIZE, SIZE), float("nan")),
        torch.ones(4, 3, dtype=torch.bool),
        torch.tensor([0, 1, 0, 1]),
        torch.zeros(4, dtype=torch.long),
        0.0,
    )
    before = {n: t.clone() for n, t in state.objective.named_parameters()}
    with pytest.raises(FitError, match=r"step 0: the loss is not finite \(risk=nan.*source\.lr"):
        fits.step(state, b, torch.Generator())
    assert all(torch.equal(t, before[n]) for n, t in state.objective.named_parameters())


def test_what_is_spared_decay() -> None:
    state = fits.begin(task(), domains=2)
    spared = {id(p) for p in state.optimizer.param_groups[1]["params"]}
    named = {n: p for n, p in state.objective.named_parameters() if p.requires_grad}
    assert {n for n, p in named.items() if id(p) in spared} >= {
        "_tail.fuse/out",
        "_tail.gate",
        "_extra.log_rho",
    }
    assert "_tail.fuse/in" not in {n for n, p in named.items() if id(p) in spared}
    assert not any("norm" in n and id(p) not in spared for n, p in named.items())


def test_pgirm_radii_stand_in_for_the_tails_own() -> None:
    objective = fits.begin(task(), domains=2).objective
    with torch.no_grad():
        objective.extra["log_rho"].copy_(torch.tensor([[0.2] * 4, [0.4] * 4]))
    assert not objective.tail["log_rho"].requires_grad
    assert torch.allclose(objective.final_tail()["log_rho"], torch.full((4,), 0.3))


def test_the_rate_rises_then_falls() -> None:
    rates = [fits.schedule(s, 100) for s in range(100)]
    assert rates[0] < rates[4] == 1.0
    assert rates[-1] < 0.02
    assert fits.schedule(0, 1) > 0


def test_a_fit_begins_where_another_ended(tmp_path: Path) -> None:
    first = fits.begin(task("erm"), domains=3)
    fits.advance(first, corpora(), until=5)
    fits.save(first, tmp_path)
    second = fits.begin(task("rise", start=str(tmp_path)), domains=3)
    assert second.step == 0
    for name, t in first.objective.trunk.state_dict().items():
        assert torch.equal(t, second.objective.trunk.state_dict()[name]), name
    for name, t in first.objective.tail.items():
        assert torch.equal(t, second.objective.tail[name]), name
    assert torch.equal(second.objective.extra["log_rho"][1], first.objective.tail["log_rho"]), (
        "every domain's sphere begins there"
    )


def test_a_start_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"source\.start: .*nowhere is no fit of this model\.trunk"):
        fits.begin(task(start=str(tmp_path / "nowhere")), domains=3)
    fits.save(fits.begin(task(), domains=3), tmp_path)
    wide = replace(
        task(start=str(tmp_path)), model=ModelConfig(trunk=TinyConfig(width=8, features=8), tail=MODEL.tail)
    )
    with pytest.raises(FitError, match=r"source\.start"):
        fits.begin(wide, domains=3)


def test_a_linear_head_keeps_its_own_plane_over_a_radial_start(tmp_path: Path) -> None:
    fits.save(fits.begin(task(), domains=3), tmp_path)
    linear = ModelConfig(trunk=MODEL.trunk, tail=MODEL.tail.model_copy(update={"head": "linear"}))
    made = fits.begin(replace(task(start=str(tmp_path)), model=linear), domains=3)
    assert bool((made.objective.extra["linear"] != 0).any())
