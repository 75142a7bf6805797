"""One real fit per scenario on the session's cluster: a worker group costs seconds of imports."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.config import Config, load
from pipeline.data.corpus import Row, write_corpus
from pipeline.models import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 16
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.timeout(600),
]


def config(tmp: Path, *overrides: str) -> Config:
    small = {
        "source": {"kind": "rise", "steps": 24, "batch": 16},
        "data": {"frame_px": SIZE},
        "model": {"trunk": {"kind": "tiny", "width": 4, "features": 8}, "tail": {"width": 8}},
        "cluster": {"train_workers": 2, "cpus": 4},
        "ledger": {"artifacts": str(tmp / "artifacts")},
    }
    (tmp / "c.yaml").write_text(json.dumps(small))
    return load(tmp / "c.yaml", overrides)


def rows(seed: int, *, live_only: bool = False) -> Iterator[Row]:
    random = np.random.default_rng(seed)
    for i in range(48):
        label = 1 if live_only else i % 2
        frame = random.integers(60, 120, (5, SIZE, SIZE)).astype(np.uint8)
        frame[3:, 4:12, 4:12] += 90 * label
        split = ("train", "train", "val", "test")[i // 2 % 4]
        pai = "bona_fide" if label else "print"
        yield Row(f"s{seed}-{i}", split, label, pai, f"p{i}", f"v{i}", frame, 7, f"{seed:032x}{i:032x}")


def corpora(tmp: Path, **over: bool) -> list[Path]:
    for seed, domain in enumerate(("a", "b")):
        write_corpus(rows(seed, **over), tmp / "corpora" / domain, domain=domain, kind="synth", size=SIZE)
    return [tmp / "corpora" / domain for domain in ("a", "b")]


def test_a_killed_worker_is_replaced_and_the_fit_goes_on(tmp_path: Path) -> None:
    from pipeline.cluster.train import PROGRESS, train

    storage = tmp_path / "train"
    killed: list[int] = []
    seen: list[tuple[int, int]] = []

    def kill_once(step: int, steps: int) -> None:
        seen.append((step, steps))
        if not killed:
            line = json.loads((storage / "run" / PROGRESS).read_text().splitlines()[0])
            killed.append(line["pid"])
            os.kill(line["pid"], signal.SIGKILL)

    given = config(tmp_path)
    result = train(
        given,
        corpora(tmp_path),
        storage=storage,
        run_name="run",
        out=tmp_path / "m",
        on_progress=kill_once,
        every=4,
    )
    pids = {json.loads(line)["pid"] for line in (storage / "run" / PROGRESS).read_text().splitlines()}
    assert killed
    assert len(pids) > 1, "a new process finished the fit"
    assert seen[-1] == (24, 24)
    model = checkpoint.load(result.path)
    assert result.path == tmp_path / "m"
    assert model.manifest.domains == ("a", "b")
    assert set(model.manifest.data) == {"a", "b"}
    assert model.manifest.fingerprint == given.fingerprint()
    assert [step for step, _ in result.history["loss.risk"]] == [4, 8, 12, 16, 20, 24]


def test_nothing_to_learn_is_one_line_and_not_retried(tmp_path: Path) -> None:
    from pipeline.cluster.train import train
    from pipeline.source.sampler import FitError

    given = config(tmp_path, "cluster.train_workers=1")
    with pytest.raises(FitError, match="every training row is bona fide"):
        train(
            given,
            corpora(tmp_path, live_only=True),
            storage=tmp_path / "train",
            run_name="run",
            out=tmp_path / "m",
        )
    assert not (tmp_path / "m").exists()


def test_more_workers_than_the_embedded_cluster_has_room_for(tmp_path: Path) -> None:
    from pipeline.cluster.train import train
    from pipeline.source.sampler import FitError

    given = config(tmp_path, "cluster.train_workers=9")
    with pytest.raises(FitError, match=r"cluster\.train_workers: 9; allowed with 4 cpus: 8"):
        train(given, [], storage=tmp_path / "train", run_name="run", out=tmp_path / "m")
