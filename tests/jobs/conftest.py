"""A crowd with a release, for what reads and signs releases."""

from __future__ import annotations

import pytest

from tests.support.crowds import Life, reborn
from tests.support.releases import released


@pytest.fixture(scope="session")
def released_once(tmp_path_factory) -> Life:
    """Built once; no test may change it."""
    return released(tmp_path_factory.mktemp("released"))


@pytest.fixture
def life(released_once, tmp_path) -> Life:
    """A copy that a test may spoil."""
    return reborn(released_once, tmp_path / "d")
