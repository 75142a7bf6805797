"""Reads one flat YAML file into one validated, frozen ``Config``.

A section's class lives beside what it configures; those of layers above are in ``sections``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, overload

import yaml
from pydantic import SerializeAsAny, ValidationError

from pipeline.data import DataConfig
from pipeline.guards import GuardsConfig
from pipeline.models import ModelConfig
from pipeline.rollout import RolloutConfig
from pipeline.sections import (
    BenchConfig,
    ClusterConfig,
    LedgerConfig,
    LineageConfig,
    NotifyConfig,
    SearchConfig,
)
from pipeline.site import BankConfig
from pipeline.site.contract import SiteMethod
from pipeline.source.contract import SourceMethod
from pipeline.storage import Place, place, without_secrets
from pipeline.types import PalisadeError, Section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails

DEFAULT_KIND = {"source": "rise", "site": "danet"}  # of the sections whose ``kind`` names a module
RESULT_SECTIONS = ("data", "model", "source", "site", "guards")
PLACES = {  # where things are, not what comes out; what lies there has a digest of its own
    # redteam: the name of labels, which stored configurations still have
    "data": {
        "corpora",
        "anchor",
        "captures",
        "sealed",
        "labels",
        "redteam",
        "commissioning",
        "retention",
        "keep_days",
    },
    "source": {"start"},
}

RENAMED = {  # old key → new key; a person's file is refused, a stored configuration is translated
    "data.size": "data.frame_px",
    "data.redteam": "data.labels",
    "site.smallest": "site.shift_min_logits",
    "site.attacks": "site.min_attack_count",
    "site.majority": "site.min_bona_fide_ratio",
    "bank.sites": "bank.slots",
    "bank.batch": "bank.batch_size",
    "bank.hot_mb": "bank.cache_mb",
    "guards.no_data.n_min": "guards.no_data.stream_min",
    "guards.collapse.prior": "guards.collapse.min_gap",
    "guards.budget.hour": "guards.budget.burn_1h",
    "guards.budget.six_hours": "guards.budget.burn_6h",
    "rollout.two_people_from": "rollout.second_approval_from_share",
    "search.space": "search.site_space",
    "search.source": "search.source_space",
    "search.samples": "search.trials",
    "search.concurrent": "search.concurrent_trials",
    "bench.beside": "bench.added_domains",
}
OFF: dict[
    str, Callable[[float], bool]
] = {  # numbers that once switched a setting off, for which null stands now
    "site.trigger": lambda value: value < 0,
    "site.conformal": lambda value: value == 0,
    "site.session_cap": lambda value: value == 0,
    "site.groups": lambda value: value == 1,
}


class ConfigError(PalisadeError, ValueError):
    """A person's mistake in the configuration; the message is one line per mistake."""


class Config(Section):
    """The deployment. ``source`` and ``site`` hold the Config of the method that their ``kind`` names."""

    data: DataConfig
    model: ModelConfig
    source: SerializeAsAny[SourceMethod]
    site: SerializeAsAny[SiteMethod]
    bank: BankConfig
    guards: GuardsConfig
    rollout: RolloutConfig
    search: SearchConfig
    cluster: ClusterConfig
    ledger: LedgerConfig
    lineage: LineageConfig
    notify: NotifyConfig
    bench: BenchConfig

    def place(self, *parts: str) -> Place:
        """Returns a place below ``ledger.artifacts``: an absolute path, or one in an object store."""
        return place(self.ledger.artifacts).joinpath(*parts)

    def folder(self, *parts: str) -> Path:
        """Returns the same place on this machine; below ``run/artifacts`` if the artifacts are a URL."""
        return (
            there
            if isinstance(there := self.place(*parts), Path)
            else Path("run/artifacts", *parts).resolve()
        )

    def fingerprint(self) -> str:
        """Returns the sha256 of what changes results, never of paths, URIs or cluster sizes."""
        full = self.model_dump(mode="json")
        kept = {s: {k: v for k, v in full[s].items() if k not in PLACES.get(s, ())} for s in RESULT_SECTIONS}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads ``path`` (None = defaults), applies ``section.key=value`` overrides, validates the whole.

    Raises ConfigError naming file, field, what was given and what is allowed.
    """
    where = str(path) if path else "defaults"
    raw = _read(path) if path else {}
    given_in: dict[str, str] = {}
    for item in overrides:
        _override(raw, item, given_in)
    return _compose(raw, where, given_in)


def parse(text: str, where: str) -> Config:
    """Reads a configuration stored as YAML or JSON; old keys are translated to their present names."""
    return _compose(translate_stored(_mapping(text, where)), where, {})


def translate_stored(raw: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Returns a stored configuration, or some of its sections, under the present names.

    Keys are translated by ``RENAMED``, numbers that meant "off" by ``OFF``. What is computed stays the same.
    ``raw`` is not changed; a key that is not known is left for validation to refuse.
    """
    now = cast("dict[str, dict[str, object]]", deepcopy(dict(raw)))
    for old, new in RENAMED.items():
        node, key = _parent(now, old), old.rpartition(".")[2]
        if node is not None and key in node:
            node.setdefault(new.rpartition(".")[2], node.pop(key))
    for name, off in OFF.items():
        node, key = _parent(now, name), name.rpartition(".")[2]
        value = node.get(key) if node else None
        if node and isinstance(value, int | float) and off(value):
            node[key] = None
    return now


def altered(
    config: Config, overrides: Sequence[str], *, sections: Sequence[str], path: Path | None = None
) -> Config:
    """Returns ``config`` with the ``sections`` of the file ``path`` and then ``overrides`` in them.

    Validated as by ``load``, and the file as a whole. Raises ConfigError.
    """
    raw = {s: getattr(config, s).model_dump(mode="json", exclude_unset=True) for s in sections}
    where = str(path) if path else "what-if"
    given_in: dict[str, str] = {}
    if path:
        load(path)
        given = _read(path)
        if not any(s in given for s in sections):
            raise ConfigError(f"{path}: has none of the sections {', '.join(sections)}")
        raw |= {s: given[s] for s in sections if s in given}
    for item in overrides:
        if item.partition(".")[0] not in sections:
            raise ConfigError(f"override {item!r}: allowed are the sections {', '.join(sections)}")
        _override(raw, item, given_in)
    made = _compose(raw, where, given_in)
    return config.model_copy(update={s: getattr(made, s) for s in sections})


def methods(section: str) -> list[str]:
    """Names of the methods in ``pipeline/<section>/methods``: the folder is the registry."""
    package = importlib.import_module(f"pipeline.{section}.methods")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


@overload
def method_config(section: Literal["site"], kind: str) -> type[SiteMethod]: ...
@overload
def method_config(section: Literal["source"], kind: str) -> type[SourceMethod]: ...
@overload
def method_config(section: str, kind: str) -> type[SiteMethod | SourceMethod]: ...
def method_config(section: str, kind: str) -> type[SiteMethod | SourceMethod]:
    """Returns the ``Config`` of the method's module."""
    return importlib.import_module(f"pipeline.{section}.methods.{kind}").Config


def _read(path: Path) -> dict[str, dict[str, object]]:
    try:
        return _mapping(path.read_text(), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass --config with one of conf/*.yaml") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from None


def _mapping(text: str, where: str) -> dict[str, dict[str, object]]:
    try:
        raw: object = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(e).split())}") from None
    sections = cast("dict[str, object]", raw) if isinstance(raw, dict) else {"": raw}
    if not all(isinstance(v, dict) for v in sections.values()):
        raise ConfigError(f"{where}: must be sections of keys, e.g. 'site: {{lr: 1e-3}}'")
    return cast("dict[str, dict[str, object]]", sections)


def _parent(raw: dict[str, dict[str, object]], dotted: str) -> dict[str, object] | None:
    """Returns the mapping that holds the last part of ``dotted``, None where there is none."""
    node: object = raw
    for part in dotted.split(".")[:-1]:
        node = cast("dict[str, object]", node).get(part) if isinstance(node, dict) else None
    return cast("dict[str, object]", node) if isinstance(node, dict) else None


def _override(raw: dict[str, dict[str, object]], item: str, given_in: dict[str, str]) -> None:
    name, eq, text = item.partition("=")
    parts = name.split(".")
    if not eq or len(parts) < 2:
        raise ConfigError(f"override {item!r}: write section.key=value, e.g. site.lr=1e-4")
    node: dict[str, object] = raw  # pyright: ignore[reportAssignmentType]
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}: {part} is a value, not a section")
        node = child  # pyright: ignore[reportUnknownVariableType]
    try:
        node[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {item!r}: {text!r} is not a YAML value") from None
    given_in[name] = f"override {item}"
    if name in (f"{section}.kind" for section in DEFAULT_KIND) and node["kind"] in methods(parts[0]):
        allowed = method_config(parts[0], str(node["kind"])).model_fields
        for key in [k for k in node if k not in allowed and f"{parts[0]}.{k}" not in given_in]:
            del node[key]  # the file's settings of another method do not apply to this one


def _compose(raw: Mapping[str, Mapping[str, object]], where: str, given_in: Mapping[str, str]) -> Config:
    mistakes = [
        f"{where}: {name}: no such section{_hint(name, list(Config.model_fields))}"
        for name in raw
        if name not in Config.model_fields
    ]
    sections: dict[str, Section] = {}
    for name, field in Config.model_fields.items():
        values = dict(raw.get(name) or {})
        try:
            cls = _section_class(name, values, field.annotation)
        except ConfigError as e:
            mistakes.append(f"{given_in.get(f'{name}.kind', where)}: {e}")
            continue
        try:
            sections[name] = cls.model_validate(values)
        except ValidationError as e:
            mistakes += [_line(name, error, where, given_in, cls) for error in e.errors()]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return Config.model_validate(sections)


def _section_class(name: str, values: dict[str, object], annotation: object) -> type[Section]:
    if name not in DEFAULT_KIND:
        assert isinstance(annotation, type) and issubclass(annotation, Section)
        return annotation
    kind = values.setdefault("kind", DEFAULT_KIND[name])
    if kind not in methods(name):
        raise ConfigError(f"{name}.kind: {kind!r}; allowed: {', '.join(methods(name))}")
    return method_config(name, str(kind))


def _line(
    section: str, error: ErrorDetails, where: str, given_in: Mapping[str, str], cls: type[Section]
) -> str:
    loc = [str(p) for p in error["loc"]]
    dotted = ".".join([section, *loc])
    where = given_in.get(dotted, where)
    if error["type"] == "extra_forbidden":
        allowed, new = _fields(cls, loc[:-1]), RENAMED.get(dotted, "")
        if new.rpartition(".")[2] in allowed:
            return f"{where}: {dotted}: renamed; write {new}"
        return f"{where}: {dotted}: no such key{_hint(loc[-1], allowed)}"
    given, problem = error["input"], error["msg"]
    off = dotted in OFF and isinstance(given, int | float) and OFF[dotted](given)
    null = "; null switches it off" if off else ""
    return without_secrets(f"{where}: {dotted}: {given!r}: {problem[0].lower()}{problem[1:]}{null}")


def _fields(cls: type[Section], path: Sequence[str]) -> list[str]:
    for part in path:
        field = cls.model_fields.get(part)
        if field and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            cls = field.annotation
    return list(cls.model_fields)


def _hint(given: str, allowed: Sequence[str]) -> str:
    close = get_close_matches(given, allowed, 1)
    return f"; did you mean {close[0]}?" if close else f"; allowed: {', '.join(allowed)}"
