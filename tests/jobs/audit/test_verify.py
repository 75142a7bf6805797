"""``palisade audit`` names every record that does not hold; tags and retirements are written by people."""

from __future__ import annotations

import json
import re
import shutil
import stat

import pytest

from jobs.__main__ import main
from tests.support.artifacts import flip
from tests.support.crowds import SITES, Crowd
from tests.support.ledgers import execute
from tests.support.releases import OTHER, SITE, serve


def audit(crowd, capsys, *words):
    capsys.readouterr()
    code = crowd.d.run("audit", *words, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_an_honest_record_holds(crowd: Crowd, capsys):
    serve(crowd, "rollback", {SITE: None})
    code, found = audit(crowd, capsys, "verify")
    assert (code, found["findings"]) == (0, [])
    assert (found["rows"], found["head"]) == crowd.ledger.audit.head()
    crowd.ledger.audit.append("remark", {}, now=crowd.ledger.audit.rows()[-1][1])
    assert audit(crowd, capsys, "verify", "--head", found["head"])[0] == 0, "the chain has grown since"


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "update audit set payload = replace(payload, 'test', 'fine') where kind = 'promote'",
            "the chain does not hold",
        ),
        (
            "delete from audit where seq = (select max(seq) from audit)",
            "the chain does not hold from here on",
        ),
        (f"update served set state = null where site = '{SITE}'", "the rows that it covers were changed"),
        (
            f"update verdicts set outcome = 'fail' where site = '{SITE}'",
            "without a stored verdict that passes it",
        ),
        (f"delete from verdicts where site = '{SITE}'", "without a stored verdict that passes it"),
        (f"update served set counter = 3 where site = '{SITE}'", "counter is at 3"),
        ("update sources set digest = 'x'", "holds another model"),
    ],
)
def test_a_changed_record_is_found(crowd, capsys, statement, said):
    execute(crowd.d.config.ledger.url, statement)
    code, found = audit(crowd, capsys, "verify")
    assert code == 4
    assert any(said in line for line in found["findings"]), found["findings"]
    assert not any("\n" in line for line in found["findings"])


@pytest.mark.parametrize("kind", ["states", "anchors"])
def test_a_damaged_artifact_is_found(crowd, capsys, kind):
    paths = sorted(crowd.d.config.place(kind).rglob("*.safetensors"))
    flip(paths[0])
    paths[-1].unlink() if len(paths) > 1 else None
    code, found = audit(crowd, capsys, "verify")
    assert code == 4 and len(found["findings"]) == min(len(paths), 2)
    assert "changed or torn" in " ".join(found["findings"])


def test_a_damaged_source_model_is_found(crowd, capsys, tmp_path):
    source = crowd.ledger.sources.champion()
    copy = tmp_path / "model"
    shutil.copytree(source.path, copy)
    execute(crowd.d.config.ledger.url, f"update sources set path = '{copy}'")
    flip(copy / "model.safetensors")
    code, found = audit(crowd, capsys, "verify")
    assert code == 4 and found["findings"][0].startswith("source v1:")


def test_a_chain_that_was_cut_with_its_head_is_found_by_the_head_kept_elsewhere(crowd, capsys):
    kept = audit(crowd, capsys, "verify")[1]["head"]
    url = crowd.d.config.ledger.url
    (last,) = execute(url, "select max(seq) from audit")[0]
    before = execute(url, f"select prev_hash, payload from audit where seq = {last}")[0]
    execute(
        url,
        f"delete from served where audit = {last}",
        f"delete from audit where seq = {last}",
        f"update meta set value = '{before[0]}' where key = 'audit_head'",
    )
    assert audit(crowd, capsys, "verify")[0] == 0, "alone, the record cannot know"
    code, found = audit(crowd, capsys, "verify", "--head", kept)
    assert code == 4 and "no row of the chain has it" in found["findings"][0]


def test_findings_are_lines(crowd, capsys):
    execute(crowd.d.config.ledger.url, "update sources set digest = 'x'")
    capsys.readouterr()
    assert crowd.d.run("audit", "verify") == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("source v1:") and "1 findings" in lines[1] and "--head" in lines[2]


def test_the_log_of_a_site(crowd, capsys):
    assert crowd.d.run("site", "tag", SITE, "region=north") == 0
    assert crowd.d.run("site", "retire", OTHER, "--reason", "closed") == 0
    _, found = audit(crowd, capsys, "log", "--site", SITE)
    assert [r["kind"] for r in found["audit"]] == ["tags", "promote"]
    _, found = audit(crowd, capsys, "log", "--limit", "1")
    assert [r["payload"]["site"] for r in found["audit"]] == [OTHER]
    assert crowd.d.run("audit", "log", "--site", "nowhere") == 2


def test_a_key_is_private_and_never_overwritten(tmp_path, capsys):
    out = tmp_path / "keys" / "release.pem"
    assert main(["audit", "keygen", "--out", str(out)]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    secret = out.read_bytes()
    assert b"PRIVATE" in secret and b"PUBLIC" in (tmp_path / "keys" / "release.pem.pub").read_bytes()
    assert main(["audit", "keygen", "--out", str(out)]) == 2
    (tmp_path / "keys" / "release.pem.pub").unlink()
    assert main(["audit", "keygen", "--out", str(out)]) == 2
    assert out.read_bytes() == secret
    assert "never overwritten" in capsys.readouterr().err


def test_tags_of_one_site_and_of_a_file(crowd, tmp_path, capsys):
    assert crowd.d.run("site", "tag", SITE, "region=north", "tz=Europe/Berlin", "rig=rgb+ir") == 0
    assert crowd.ledger.streams.site(SITE).tags == {"region": "north", "tz": "Europe/Berlin", "rig": "rgb+ir"}
    file = tmp_path / "tags.csv"
    file.write_text(f"site,region,tenant\n{SITE},,bank\n{OTHER},south,\n")
    assert crowd.d.run("site", "tag", "--from", str(file)) == 0
    assert crowd.ledger.streams.site(SITE).tags == {
        "region": "north",
        "tz": "Europe/Berlin",
        "rig": "rgb+ir",
        "tenant": "bank",
    }
    assert crowd.ledger.streams.site(OTHER).tags == {"region": "south"}
    assert crowd.d.run("site", "tag", SITE, "region=") == 0
    assert "region" not in crowd.ledger.streams.site(SITE).tags
    assert crowd.ledger.audit.first_broken() is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([SITE], "write either SITE"),
        ([SITE, "region"], "write key=value"),
        ([SITE, "Region=x"], "write key=value"),
        ([SITE, "a=1", "a=2"], "write key=value"),
        ([SITE, "tz=Mars/Olympus"], "not an IANA time zone"),
        ([SITE, "rig=rgb+lidar"], "write what it has of rgb, depth, ir"),
        ([SITE, "rig=rgb+rgb"], "write what it has of"),
        ([SITE, "region=a\nb"], "all printable"),
        (["nowhere", "region=x"], "not registered"),
    ],
)
def test_a_tag_that_cannot_be_is_refused(crowd, words, said, capsys):
    assert crowd.d.run("site", "tag", *words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert crowd.ledger.streams.site(SITE).tags == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the first line must name"),
        ("region,site\nx,y\n", "the first line must name"),
        (f"site,region\n{SITE},north\n{SITE},south\n", "line 3: site .* is there twice"),
        (f"site,region\n{SITE},north,x\n", "line 2: 3 cells"),
        (f"site,tz\n{SITE},Nowhere\n", "line 2: tz=Nowhere"),
        (f"site,region\n{SITE},north\ngone,south\n", "'gone': not registered"),
    ],
)
def test_a_file_of_tags_changes_everything_or_nothing(crowd, tmp_path, text, said, capsys):
    file = tmp_path / "tags.csv"
    file.write_text(text)
    assert crowd.d.run("site", "tag", "--from", str(file)) == 2
    assert re.search(said, capsys.readouterr().err)
    assert crowd.ledger.streams.site(SITE).tags == {}


def test_a_site_is_retired_and_restored(crowd, capsys):
    site = SITES[4]
    assert crowd.d.run("site", "retire", site, "--reason", "torn down") == 0
    row = crowd.ledger.streams.site(site)
    assert row.status == "retired" and row.reason.endswith(": torn down")
    assert crowd.d.run("site", "restore", site, "--reason", " ") == 2
    assert crowd.d.run("site", "restore", site, "--reason", "rebuilt") == 0
    assert crowd.ledger.streams.site(site).status == "active"
