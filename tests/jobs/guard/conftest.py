"""A crowd with two days of verdicts, the second judged against what the first served."""

from __future__ import annotations

import pytest

from pipeline.control.deployment import now
from tests.support.crowds import Crowd, copy_crowd, new_crowd
from tests.support.judged import LOOSE, day


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> Crowd:
    """Two days; on the second the fleet serves what passed on the first."""
    crowd = new_crowd(tmp_path_factory.mktemp("lived"), LOOSE)
    day(crowd, 0)
    passed = {v.site: (v.state, 1) for v in crowd.ledger.verdicts.find() if v.outcome == "pass"}
    assert passed
    crowd.ledger.releases.serve(passed, rollout="r", wave=1, kind="promote", reason="", now=now())
    day(crowd, 1)
    return crowd


@pytest.fixture
def crowd(lived, tmp_path):
    """A copy that a test may spoil."""
    return copy_crowd(lived, tmp_path / "d")
