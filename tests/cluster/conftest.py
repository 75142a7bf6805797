"""A captures folder with its ledger and a source model, for ingest and repair."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config, load
from pipeline.models import checkpoint
from tests.support.captures import SIZE, Fleet, save_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "captures").mkdir()
    return load(
        None,
        [
            f"data.captures={tmp_path}/captures",
            f"data.frame_px={SIZE}",
            f"ledger.artifacts={tmp_path}/artifacts",
            f"ledger.url=sqlite:///{tmp_path}/ledger.db",
            "cluster.ingest_workers=2",
        ],
    )


@pytest.fixture
def model(config: Config) -> checkpoint.SourceModel:
    return save_model(config, "m")


@pytest.fixture
def fleet(config: Config, model: checkpoint.SourceModel) -> Fleet:
    return Fleet(config, model)
