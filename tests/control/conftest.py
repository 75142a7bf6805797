"""A ledger with candidates of all generations, once per process, for rollouts on copies of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.support.rollouts import SHARED_MEMORY, stored


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """(database file, folder for copies of it); in memory where there is such a folder."""
    memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="drive", dir=memory or tmp_path_factory.getbasetemp()))
    stored(folder / "template.db")
    yield folder / "template.db"
    shutil.rmtree(folder)
