"""Configuration: what is accepted, what a mistake says, what the fingerprint covers."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest

from pipeline.config import RENAMED, ConfigError, load, methods, parse, translate_stored

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
            "site.kind: 'magic'; allowed: cotta, danet, drm, eata, frozen, lirr, mclrd, ota, read, "
            "recalibrate, sar, shot, tent",
        ),
        ("sites.lr=1", "sites: no such section; did you mean site?"),
        ("model.trunk.widht=3", "model.trunk"),
        ("site.lr", "write section.key=value"),
        ("data.frame_px=huge", "data.frame_px: 'huge'"),
        ("notify.webhook=ftp://x", "notify.webhook: 'ftp://x'"),
        ("notify.min_severity=loud", "input should be 'info', 'warning' or 'critical'"),
    ],
)
def test_a_mistake_names_the_place_what_was_given_and_what_is_allowed(override, expected):
    with pytest.raises(ConfigError) as e:
        load(None, [override])
    assert expected in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_is_refused_with_its_new_name(old, tmp_path):
    path, line = tmp_path / "old.yaml", ""
    for depth, part in enumerate(old.split(".")):
        line += f"\n{'  ' * depth}{part}:"
    path.write_text(line + " 1\n")
    for where, given in ((str(path), (path, [])), (f"override {old}=1", (None, [f"{old}=1"]))):
        with pytest.raises(ConfigError) as e:
            load(*given)
        assert str(e.value) == f"{where}: {old}: renamed; write {RENAMED[old]}"
    with pytest.raises(ConfigError, match="no such key"):
        load(None, ["site.kind=tent", "site.smallest=1"])  # a method that never had it


@pytest.mark.parametrize(
    ("name", "value"), [("trigger", -1), ("session_cap", 0), ("groups", 1), ("conformal", 0)]
)
def test_a_number_that_once_meant_off_is_refused_and_null_is_off(name, value):
    with pytest.raises(ConfigError, match=f"site.{name}: {value}: .*; null switches it off"):
        load(None, [f"site.{name}={value}"])
    assert load(None, [f"site.{name}=null"]).site.model_dump()[name] is None


def test_a_configuration_stored_under_old_keys_is_read_under_the_new_ones():
    old = {
        "data": {"size": 32},
        "site": {
            "trigger": -1.0,
            "session_cap": 0,
            "groups": 1,
            "conformal": 0.0,
            "smallest": 0.1,
            "majority": 2.0,
        },
        "bank": {"sites": 3, "batch": 4, "hot_mb": 16},
        "guards": {"no_data": {"n_min": 7}, "budget": {"hour": 0.5, "six_hours": 0.6}},
        "rollout": {"two_people_from": None},
        "search": {"space": {"lr": {"choice": [1]}}, "source": {"lr": {"choice": [2]}}},
    }
    before = deepcopy(old)
    new = translate_stored(old)
    assert old == before
    assert new["site"] == {
        **dict.fromkeys(("trigger", "session_cap", "groups", "conformal")),
        "shift_min_logits": 0.1,
        "min_bona_fide_ratio": 2.0,
    }
    assert new["bank"] == {"slots": 3, "batch_size": 4, "cache_mb": 16}
    assert new["guards"] == {"no_data": {"stream_min": 7}, "budget": {"burn_1h": 0.5, "burn_6h": 0.6}}
    assert new["search"] == {"site_space": {"lr": {"choice": [1]}}, "source_space": {"lr": {"choice": [2]}}}
    config = parse(json.dumps(old), "stored")
    assert (config.data.frame_px, config.rollout.second_approval_from_share) == (32, None)
    assert translate_stored(config.model_dump(mode="json")) == config.model_dump(mode="json"), (
        "nothing left to do"
    )
    assert translate_stored({"guards": old["guards"]}) == {"guards": new["guards"]}, "some sections alone"


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
    assert load(None, ["data.frame_px=64"]).fingerprint() != base


def test_a_stored_config_comes_back_equal():
    config = load(None, ["site.kind=tent", "site.lr=0.01"])
    assert parse(config.model_dump_json(), "stored") == config


def test_the_folder_is_the_registry():
    assert {"erm", "rise"} <= set(methods("source"))
    assert {"frozen", "tent", "danet"} <= set(methods("site"))


def test_a_config_error_needs_no_torch():
    code = "import jobs.__main__ as m, sys; c = m.main(['train', 'site.lr=fast']); "
    code += "print(c, [m for m in ('torch', 'ray', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
    assert "site.lr" in done.stderr
