"""Configuration: what is accepted, what a mistake says, what the fingerprint covers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load, methods, parse

CONF = Path(__file__).parent.parent / "conf"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_file_loads(path):
    load(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("site.lrr=1", "site.lrr: no such key; did you mean lr?"),
        ("site.lr=-1", "site.lr: -1: input should be greater than 0"),
        (
            "site.kind=magic",
            "site.kind: 'magic'; allowed: cotta, danet, drm, eata, frozen, read, recalibrate, sar, shot, tent",
        ),
        ("sites.lr=1", "sites: no such section; did you mean site?"),
        ("model.trunk.widht=3", "model.trunk"),
        ("site.lr", "write section.key=value"),
        ("data.size=huge", "data.size: 'huge'"),
        ("notify.webhook=ftp://x", "notify.webhook: 'ftp://x'"),
        ("notify.min_severity=loud", "input should be 'info', 'warning' or 'critical'"),
    ],
)
def test_a_mistake_names_the_place_what_was_given_and_what_is_allowed(override, expected):
    with pytest.raises(ConfigError) as e:
        load(None, [override])
    assert expected in str(e.value)
    assert "\n" not in str(e.value)


def test_file_mistakes_name_the_file(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text("site: {lr: fast}\nguards: {nonsense: 1}\n")
    with pytest.raises(ConfigError) as e:
        load(path)
    lines = str(e.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(str(path)) for line in lines)


@pytest.mark.parametrize("text", ["- a list", "site: [1", "just text", "site: 3"])
def test_what_is_no_mapping_of_sections_is_refused(text):
    with pytest.raises(ConfigError):
        parse(text, "here")


def test_a_missing_file_says_what_to_do():
    with pytest.raises(ConfigError, match="--config"):
        load(Path("nowhere.yaml"))


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("site: {kind: danet, lr: 0.5}\n")
    assert load(path, ["site.lr=1e-4"]).model_dump()["site"]["lr"] == 1e-4


def test_another_kind_drops_the_settings_it_does_not_know_and_keeps_the_others(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("site: {kind: danet, mode: da, lr: 0.5}\n")
    assert load(path, ["site.kind=tent"]).model_dump()["site"]["lr"] == 0.5
    with pytest.raises(ConfigError, match="site.mode"):
        load(path, ["site.mode=tta", "site.kind=tent"])


def test_fingerprint_covers_results_and_no_paths():
    base = load(None).fingerprint()
    assert load(None, ["data.captures=elsewhere", "cluster.shards=7", "lineage.uri=x"]).fingerprint() == base
    assert (
        load(
            None, ["notify.webhook=https://x/y", "ledger.signing_key=k", "ledger.manifest_hours=1"]
        ).fingerprint()
        == base
    )
    assert load(None, ["site.lr=0.123"]).fingerprint() != base
    assert load(None, ["data.size=64"]).fingerprint() != base


def test_a_stored_config_comes_back_equal():
    config = load(None, ["site.kind=tent", "site.lr=0.01"])
    assert parse(config.model_dump_json(), "stored") == config


def test_the_folder_is_the_registry():
    assert {"erm", "rise"} <= set(methods("source"))
    assert {"frozen", "tent", "danet"} <= set(methods("site"))


def test_a_config_error_needs_no_torch():
    code = (
        "import jobs.__main__ as m, sys; c = m.main(['train', 'site.lr=fast']); t = sys.modules.get('torch');"
    )
    code += "print(c, 'ray' in sys.modules, type(t).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "Later"]
    assert "site.lr" in done.stderr
