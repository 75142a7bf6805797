"""Ledgers of older schema versions, as those versions wrote them."""

from __future__ import annotations

import gzip
from pathlib import Path

import sqlalchemy as sa

from pipeline.ledger import schema
from tests.support.ledgers import execute

FOLDER = Path(__file__).resolve().parents[1] / "ledger"


def write_old_ledger(url: str, version: int) -> str:
    """Writes a ledger of schema ``version`` into the empty database at ``url`` and returns the URL.

    Versions 1 and 3 are dumps of real ledgers; the others are the one before taken a step further.
    """
    place, sqlite = sa.make_url(url), url.startswith("sqlite")
    if sqlite:
        Path(str(place.database)).parent.mkdir(parents=True, exist_ok=True)
    if (dumped := 1 if version < 3 else 3) == 1:
        dump = (FOLDER / "version-1.sql").read_text()
    else:
        dump = gzip.decompress((FOLDER / "version-3.sql.gz").read_bytes()).decode()
    types = {
        "{serial}": "INTEGER" if sqlite else "SERIAL",
        "{text}": "TEXT" if sqlite else 'TEXT COLLATE "C"',
        "{clustered}": "WITHOUT ROWID" if sqlite else "",
    }
    for name, sql in types.items():
        dump = dump.replace(name, sql)
    execute(url, *(s for s in dump.split(";\n") if s.strip()))
    engine = sa.create_engine(url)
    for step in range(dumped + 1, version + 1):
        with engine.begin() as c:
            schema.step(c, step)
    engine.dispose()
    return url
