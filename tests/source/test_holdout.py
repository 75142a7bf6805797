"""Scores of held-out samples: boundaries, draws, and instruments with several names."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.protocols import PATTERNS, instrument
from pipeline.models import tail as tails
from pipeline.source import fit as fits
from pipeline.source import sampler
from pipeline.source.calibrate import transfer_boundaries, validation_features
from pipeline.stats import metrics
from tests.support.held_out import SOURCES, task


@pytest.mark.parametrize("head", ["radial", "linear"])
def test_every_pattern_of_sensors_errs_little_on_the_validation(head: str) -> None:
    model = fits.fit(task(head=head, steps=30), SOURCES)
    domain, label, z, present = validation_features(model.trunk, SOURCES)
    made = transfer_boundaries(model.tail, z, present, label, domain)
    assert torch.allclose(made["pattern"], model.tail["pattern"], atol=1e-5), (
        "calibrating again changes nothing"
    )
    for mask in PATTERNS.values():
        there = torch.tensor([bool(mask >> m & 1) for m in range(3)]).expand_as(present)
        score = tails.score(model.tail, z, there).numpy()
        assert metrics.hter(score, label, 0.5) <= metrics.eer(score, label) + 0.1


def test_samples_drawn_ahead_are_those_of_their_step_and_an_error_arrives() -> None:
    assert list(sampler.prefetch(lambda at: at * at, range(2, 6))) == [(2, 4), (3, 9), (4, 16), (5, 25)]

    def breaks(at: int) -> int:
        if at == 1:
            raise ValueError("no row")
        return at

    drawn = sampler.prefetch(breaks, range(3))  # pyright: ignore
    assert next(drawn) == (0, 0)
    with pytest.raises(ValueError, match="no row"):
        next(drawn)


def test_draws_of_an_earlier_method_give_the_same_fit() -> None:
    method = task().method
    cells = sampler.stratify(SOURCES)
    kept = [sampler.draw(method, SOURCES, cells, step=at, rank=0, world=1) for at in range(12)]
    mine, again = fits.fit(task(), SOURCES), fits.fit(task(), SOURCES, draws=kept.__getitem__)
    assert mine.manifest.weights_digest == again.manifest.weights_digest


def test_instruments_of_all_sets_meet() -> None:
    assert {instrument(s) for s in ("print", "cloth_indoor", "m50201", "print_bent")} == {"print"}
    assert {instrument(s) for s in ("silicone_glasses", "flexible_mask", "m50701", "mask_silicone")} == {
        "silicone mask"
    }
    assert instrument("05_enm_s") == instrument("print_cutout") == "cut-out print"
    assert instrument("something new") == "something new"
