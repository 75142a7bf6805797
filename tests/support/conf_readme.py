"""The text of ``conf/README.md``: every setting with its type, default and meaning, from the configuration's
own classes.
"""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from pipeline.config import DEFAULT_KIND, Config, method_config, methods
from pipeline.types import Section

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

FILES = {
    "bench.yaml": "Names the data sets, streams and search space of `palisade bench` and `palisade tune`.",
    "demo.yaml": "Runs everything embedded on rendered data, in minutes on two cores, below `./demo`.",
    "fleet.yaml": "Is production on KubeRay: a standing cluster, Postgres, one shared volume.",
}
HEAD = """# Configuration

One YAML file is one deployment. Its sections are checked as a whole before a command does anything, and an
unknown key, an old name or a value out of range is an error of one line with the file, the key and what is
allowed. Any key can be overridden on the command line, `palisade --config conf/fleet.yaml cycle
site.lr=1e-4`; what is left out has its default.

| file | what it does |
|---|---|
{files}

To add a deployment, copy the nearest file and keep only what differs from the defaults. To add a setting,
give its field a description with its unit, then run `make docs`: the tables below are written from the
fields, and a test compares them. A key that was renamed is listed in `RENAMED` of `pipeline/config.py`.
"""


def render() -> str:
    """Returns the whole file."""
    files = "\n".join(f"| `{name}` | {does} |" for name, does in FILES.items())
    parts = [HEAD.format(files=files)]
    for name, field in Config.model_fields.items():
        if name in ("source", "site"):
            shared = set.intersection(*(set(method_config(name, k).model_fields) for k in methods(name)))
            base = method_config(name, methods(name)[0])
            parts.append(
                _table(
                    f"## {name}",
                    f"Keys of every method; the default kind is {DEFAULT_KIND[name]}.",
                    _rows(base, shared),
                )
            )
            for kind in methods(name):
                cls = method_config(name, kind)
                rows = _rows(cls, set(cls.model_fields) - shared)
                parts.append(_table(f"### {name}.kind: {kind}", "" if rows else "No other keys.", rows))
        else:
            assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            parts.append(_table(f"## {name}", "", _rows(field.annotation)))
    return "\n".join(parts)


def _table(title: str, text: str, rows: list[str]) -> str:
    head = ["| key | type | default | meaning |", "|---|---|---|---|"] if rows else []
    return "\n".join([title, "", *([text, ""] if text else []), *head, *rows, *([""] if rows else [])])


def _rows(cls: type[Section], names: set[str] | None = None, prefix: str = "") -> list[str]:
    rows: list[str] = []
    for name, field in cls.model_fields.items():
        if names is not None and name not in names:
            continue
        inner = [a for a in _arguments(field.annotation) if isinstance(a, type) and issubclass(a, Section)]
        key = f"{prefix}{name}"
        if inner and field.default is not PydanticUndefined and isinstance(field.default, Section):
            for section in inner:
                rows += _rows(section, prefix=f"{key}.")
        else:
            rows.append(
                f"| `{key}` | {_type(field.annotation)} | {_default(name, field)} | {_meaning(cls, name)} |"
            )
    return rows


def _meaning(cls: type[Section], name: str) -> str:
    """The description of the field, or of the same field of a base class."""
    found = next(
        (
            d
            for c in cls.__mro__
            if issubclass(c, Section) and name in c.model_fields and (d := c.model_fields[name].description)
        ),
        "",
    )
    return " ".join(found.split()).replace("|", "\\|").replace("<", "&lt;")


def _default(name: str, field: FieldInfo) -> str:
    if name == "kind" and isinstance(field.default, str):
        return ""
    if field.default is PydanticUndefined:
        return "needed"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value)}`"


def _arguments(annotation: object) -> Iterator[object]:
    if get_origin(annotation) in (Union, UnionType, Annotated):
        for a in get_args(annotation):
            yield from _arguments(a)
    else:
        yield annotation


def _type(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(a) for a in arguments)
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[0])} → {_type(arguments[1])}"
    names = {NoneType: "null", str: "text", int: "integer", float: "number", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    return (
        "mapping of " + ", ".join(f"`{k}`" for k in annotation.model_fields)
        if hasattr(annotation, "model_fields")
        else "time"
    )
