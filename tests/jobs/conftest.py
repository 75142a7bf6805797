"""A crowd with a release, for what reads and signs releases."""

from __future__ import annotations

import pytest

from tests.support.crowds import Crowd, copy_crowd
from tests.support.releases import released


@pytest.fixture(scope="session")
def released_once(tmp_path_factory) -> Crowd:
    """Built once; no test may change it."""
    return released(tmp_path_factory.mktemp("released"))


@pytest.fixture
def crowd(released_once, tmp_path) -> Crowd:
    """A copy that a test may spoil."""
    return copy_crowd(released_once, tmp_path / "d")
