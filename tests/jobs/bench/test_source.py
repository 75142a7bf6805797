"""The source benchmark's engine under Ray: stored fit by fit, resumed, and one failure stops no other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from jobs.bench.parts import load as load_part
from jobs.bench.source.fits import Job, Result, run
from pipeline.cluster.tasks import Failed
from pipeline.config import load, method_config
from pipeline.data.corpus import Row, write_corpus
from pipeline.models import ModelConfig, TailConfig, TinyConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 16
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.timeout(600),
]


def rows(seed: int) -> Iterator[Row]:
    random = np.random.default_rng(seed)
    for i in range(48):
        frame = random.integers(60, 120, (5, SIZE, SIZE)).astype(np.uint8)
        frame[3:, 4:12, 4:12] += 90 * (i % 2)
        split = ("train", "train", "val", "test")[i // 2 % 4]
        pai = "bona_fide" if i % 2 else "print"
        yield Row(f"s{seed}-{i}", split, i % 2, pai, f"p{i}", f"v{i}", frame, 7, f"{seed:032x}{i:032x}")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    for seed, domain in enumerate("abc"):
        write_corpus(rows(seed), root / domain, domain=domain, kind="synth", size=SIZE)
    return {d: root / d for d in "abc"}


def job(kind: str, target: str, **settings: object) -> Job:
    method = method_config("source", kind).model_validate({"kind": kind, "steps": 4, "batch": 12, **settings})
    model = ModelConfig(trunk=TinyConfig(width=4, features=8), tail=TailConfig(width=8, rank=2))
    sources = tuple(d for d in "abc" if d != target)
    return Job(method, model, sources, (target,))


def test_fits_are_stored_resumed_and_independent(corpora: dict[str, Path], tmp_path: Path) -> None:
    jobs = [job("erm", "a"), job("rise", "a"), job("erm", "b"), job("erm", "c", lr=1e30)]
    seen: list[tuple[int, int]] = []
    found = run(jobs, corpora, folder=tmp_path, workers=2, on_progress=lambda *at: seen.append(at))
    broken = found[jobs[3]]
    assert isinstance(broken, Failed) and "the loss is not finite" in broken.why, "a fit that breaks says why"
    good = {j: found[j] for j in jobs[:3]}
    assert all(np.isfinite(load_part(p, Result).test.logit).all() for p in good.values())
    assert seen[-1] == (3, 4)
    times = {p: p.stat().st_mtime_ns for p in good.values()}
    again = run(jobs[:3], corpora, folder=tmp_path, workers=2, on_progress=lambda *at: None)
    assert again == good
    assert {p: p.stat().st_mtime_ns for p in times} == times, "what is stored is not fitted again"


def test_a_trial_is_judged_by_its_worst_held_out_domain(corpora: dict[str, Path], tmp_path: Path) -> None:
    from pipeline.cluster.search import search_source

    small = {
        "source": {"kind": "erm", "steps": 6, "batch": 12},
        "data": {"frame_px": SIZE},
        "model": {"trunk": {"kind": "tiny", "width": 4, "features": 8}, "tail": {"width": 8}},
        "search": {
            "source_space": {"lr": {"choice": [0.01]}},
            "trials": 1,
            "rungs": 2,
            "concurrent_trials": 1,
        },
    }
    (tmp_path / "c.yaml").write_text(json.dumps(small))
    config = load(tmp_path / "c.yaml", [])
    trials = search_source(
        config, list(corpora.values()), storage=tmp_path / "runs", on_progress=lambda *at: None
    )
    assert [(t.settings, t.rungs) for t in trials] == [({"lr": 0.01}, 2)]
    assert 0 <= trials[0].hter <= 1
    with pytest.raises(ValueError, match="at least 3"):
        search_source(config, list(corpora.values())[:2], storage=tmp_path, on_progress=lambda *at: None)
