"""Rates, timelines, recovery and degenerate batches of a method on a stream, against hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from jobs.bench.site import online
from jobs.bench.site.online import Stream
from pipeline.config import method_config
from pipeline.models import TailConfig, tail

F, B = 16, 8
SOURCE = tail.init_tail(TailConfig(width=8, rank=4), F, generator=torch.Generator().manual_seed(0))
REPLAY = {
    "replay.z": torch.randn(16, 3, F, generator=torch.Generator().manual_seed(4)),
    "replay.present": torch.ones(16, 3, dtype=torch.bool),
    "replay.label": (torch.arange(16) % 2).float(),
}


def stream(n: int, *, seed: int = 0, poison: int = 0, probe: str | None = None) -> Stream:
    z = torch.randn(n, 3, F, generator=torch.Generator().manual_seed(seed)).numpy()
    label = np.arange(n) % 3 % 2
    marked = np.zeros(n, bool)
    marked[n // 2 : n // 2 + poison] = True
    species = np.where(label == 1, "bona_fide", "print")
    return Stream(z, np.full(n, 7, np.uint8), np.arange(n), label, species, marked, probe=probe)


def run(kind: str, **settings: object) -> dict[str, online.Course]:
    probe = stream(40, seed=9)
    streams = {"long": stream(64, poison=10, probe="p"), "short": stream(21, seed=1)}
    method = method_config("site", kind)(**settings)
    return online.run(method, SOURCE, streams, {"p": probe}, batch=B, threshold=0.5, source=probe)


def test_frozen_scores_are_the_source_models_and_nothing_moves():
    found = run("frozen")
    s = stream(64)
    want = tail.score(SOURCE, s.features.z, s.features.present).numpy()
    np.testing.assert_allclose(found["long"].score, want, atol=1e-6)
    assert len(found["short"].score) == 21
    assert found["long"].stopped_after == 0.0
    assert math.isnan(found["short"].stopped_after)
    assert not found["long"].shift.any()
    assert found["long"].probe_after is not None and found["short"].probe_after is None


def test_a_learning_method_is_seen_to_move_and_not_to_stop():
    found = run("tent", lr=0.05)
    frozen = run("frozen")
    assert math.isinf(found["long"].stopped_after)
    assert found["long"].score[:B].tolist() == pytest.approx(
        frozen["long"].score[:B].tolist()
    )  # scored before learning
    assert not np.allclose(found["long"].score, frozen["long"].score)
    assert found["long"].source_after != frozen["long"].source_after


def test_rates_count_small_species_together():
    label, pai = np.array([1, 1, 0, 0]), np.array(["bona_fide", "bona_fide", "a", "b"])
    r = online.rates(np.array([0.9, 0.1, 0.8, 0.2]), label, pai, 0.5)
    assert r == (0.5, 0.5, 0.5, "other")


def test_recovery_is_counted_from_the_change():
    label = np.tile([1, 0], 500)
    right = np.where(label == 1, 0.9, 0.1)
    broken = right.copy()
    broken[400:600] = 1 - broken[400:600]
    found = online.recovery(broken, label, 0.5, 400)
    assert 290 <= found <= 310
    assert online.recovery(right, label, 0.5, 400) == online.WINDOW
    assert math.isinf(online.recovery(np.r_[right[:400], 1 - right[400:]], label, 0.5, 400))
    assert math.isnan(online.recovery(right, np.ones(1000, int), 0.5, 400))


def test_timeline_windows_cover_the_stream():
    s = stream(300)
    at, bpcer, apcer = online.timeline(np.where(s.label == 1, 0.9, 0.1), s.label, s.pai, 0.5)
    assert at[0] == online.WINDOW / 2 and at[-1] == 300 - online.WINDOW / 2
    assert not bpcer.any() and not apcer.any()


def test_precision_counts_used_labels():
    used, label = np.array([1, 1, 0, -1], np.int8), np.array([1, 0, 0, 1])
    assert online.precision(used, label, 1) == (1, 2)
    assert online.precision(used, label, 0) == (1, 1)


@pytest.mark.parametrize("kind", ["danet", "tent", "recalibrate"])
def test_degenerate_batches_have_no_effect(kind):
    found = online.degenerate(method_config("site", kind)(), {**SOURCE, **REPLAY}, batch=B)
    assert set(found.values()) == {"bit-equal and finite"}
    assert len(found) == 5
