"""A ledger on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import sqlalchemy as sa

from pipeline.ledger import Ledger
from tests.support.ledgers import T0, execute
from tests.support.old_ledgers import write_old_ledger

DATABASES = count()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path) -> Iterator[str]:
    """An empty place for a ledger."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/deep/ledger.db"
        return
    server, name = request.getfixturevalue("postgres"), f"ledger_{next(DATABASES)}"
    execute(server, f"create database {name}")
    yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
    execute(server, f"drop database {name} with (force)")


@pytest.fixture
def ledger(url) -> Iterator[Ledger]:
    """With sites s0 to s4."""
    made = Ledger.open(url)
    made.streams.register({f"s{i}": {"rig": "a"} for i in range(5)}, now=T0)
    yield made
    made.close()


@pytest.fixture
def old(url) -> str:
    """URL of a ledger of version 1."""
    return write_old_ledger(url, 1)
