"""``conf/README.md`` says what the fields of the configuration say, and names every file of the folder."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config import Config, method_config, methods
from pipeline.types import Section
from tests.support import conf_readme

CONF = Path(__file__).parents[1] / "conf"


def test_the_tables_are_those_of_the_fields() -> None:
    text = conf_readme.render()
    if os.environ.get("PALISADE_WRITE_DOCS"):
        (CONF / "README.md").write_text(text)
    assert (CONF / "README.md").read_text() == text, "stale; run `make docs`"
    assert {p.name for p in CONF.glob("*.yaml")} == set(conf_readme.FILES)


def test_every_field_is_described() -> None:
    text = conf_readme.render()
    rows = [line for line in text.splitlines() if line.startswith("| `") and ".yaml" not in line]
    assert len(rows) > 150
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_setting_has_a_row() -> None:
    text = conf_readme.render()
    for name, field in Config.model_fields.items():
        classes = (
            [method_config(name, k) for k in methods(name)]
            if name in ("source", "site")
            else [field.annotation]
        )
        for cls in classes:
            assert isinstance(cls, type) and issubclass(cls, Section)
            assert all(f"`{key}" in text for key in cls.model_fields), name
