"""Commissioning by the command: what is missing, what arrived, what it would gain, its candidate."""

from __future__ import annotations

import json

import pytest

from pipeline.control.deployment import now
from pipeline.data.features import read_features
from pipeline.ledger import LabelFileRow, LabelRow
from tests.support.ledgers import fix_split
from tests.support.releases import SITE

SMALL = "data.commissioning={bona_fide: 3, attacks: {print: 2, mask: 2}}"


@pytest.fixture
def samples(crowd) -> list[str]:
    """The samples of the site's stream."""
    fix_split(crowd.ledger)
    source, row = crowd.ledger.sources.champion(), crowd.ledger.streams.site(SITE)
    store = crowd.d.config.place("features")
    block = read_features(store, source.trunk, SITE, start=0, end=row.ingested_offset, features=16)
    return block.sample_id.tolist()


def say(crowd, name: str, said: dict[str, str]) -> None:
    """Labels are recorded: sample id -> instrument."""
    rows = [
        LabelRow(SITE, s, name, int(i == "bona_fide"), i, "commissioning", "ann", now())
        for s, i in said.items()
    ]
    file = LabelFileRow(SITE, name, name, len(rows), len(rows))
    crowd.ledger.labels.commit([file], rows, [], cycle="test", now=now())


def shown(crowd, capsys, *more: str) -> tuple[int, dict]:
    """Exit code and JSON of a dry run."""
    code = crowd.d.run("site", "commission", *more, "--dry-run", "--json", SMALL)
    (site,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["sites"]
    return code, site


def test_it_says_what_is_missing_until_nothing_is(crowd, samples, capsys):
    code, empty = shown(crowd, capsys, SITE)
    assert (code, empty["missing"], empty["gain"]) == (3, {"bona fide": 3, "print": 2, "mask": 2}, None)
    first = dict.fromkeys(samples[:3], "bona_fide") | {samples[3]: "print_flat", samples[4]: "wig"}
    say(crowd, "labels-1.parquet", first | {"not-here-yet": "mask_rigid"})
    code, some = shown(crowd, capsys, SITE)
    assert code == 3
    assert some["missing"] == {"print": 1, "mask": 2}
    assert (some["arrived"]["not in the kit"], some["waiting"]) == (1, 1)
    rest = {samples[5]: "print_bent", samples[6]: "mask_rigid", samples[7]: "mask_silicone"}
    say(crowd, "labels-2.parquet", rest)
    code, done = shown(crowd, capsys, SITE)
    assert (code, done["missing"]) == (0, {})
    gain = done["gain"]
    judges = gain["bona_fide"]["n"] + gain["attack"]["n"]
    assert judges + gain["taught_bona_fide"] + gain["taught_attack"] == 8
    assert 0 < judges < 8


def test_a_list_of_sites_and_its_mistakes(crowd, samples, capsys):
    file = crowd.d.root / "sites.csv"
    file.write_text(f"site,note\n{SITE},x\n{SITE},twice\n")
    assert shown(crowd, capsys, "--from", str(file))[1]["site"] == SITE
    for text, said in (
        ("name\na\n", "a column site"),
        ("site\n\n", "a column site"),
        ("site\nnobody\n", "nobody"),
    ):
        file.write_text(text)
        assert crowd.d.run("site", "commission", "--from", str(file)) == 2
        assert said in capsys.readouterr().err
    assert crowd.d.run("site", "commission") == 2
    assert "--from FILE.csv" in capsys.readouterr().err


@pytest.mark.cluster
def test_it_ends_in_a_candidate_that_was_judged(crowd, samples, capsys):
    say(
        crowd,
        "labels-1.parquet",
        {s: ("bona_fide", "print", "mask")[i % 3] for i, s in enumerate(samples[:12])},
    )
    before = len(crowd.ledger.verdicts.find(site=SITE))
    crowd.d.run("site", "commission", SITE, SMALL)
    verdicts = crowd.ledger.verdicts.find(site=SITE)
    assert len(verdicts) == before + 1
    assert verdicts[-1].evidence.labelled.taught_bona_fide > 0
    assert "Nothing is missing" in capsys.readouterr().err
