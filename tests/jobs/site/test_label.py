"""Labels by the commands: recorded with who says so, counted by the guards of a release, taken back."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from jobs.terminal import Terminal
from pipeline.control.labels import record_labels
from pipeline.control.presentations import ReplayTarget, replay_presentations
from pipeline.control.teaching import JUDGE, role_of
from pipeline.data.features import read_features
from pipeline.data.presentations import write_label_file
from pipeline.models import checkpoint, tail
from pipeline.rollout import Pointer
from tests.support.deployments import printed
from tests.support.ledgers import fix_split
from tests.support.releases import SITE

HEAD = "sample_id,label,instrument\n"


@pytest.fixture
def samples(crowd):
    """(sample id, is it called bona fide by the source model) of the site's captures that would judge."""
    source, row = crowd.ledger.sources.champion(), crowd.ledger.streams.site(SITE)
    model = checkpoint.load(source.path)
    block = read_features(
        crowd.d.config.place("features"), source.trunk, SITE, start=0, end=row.ingested_offset, features=16
    )
    present = torch.from_numpy((block.present[:, None] >> np.arange(3) & 1).astype(bool))
    score = tail.score(model.tail, torch.from_numpy(block.z.astype(np.float32)), present)
    key = fix_split(crowd.ledger)
    judges = [role_of(key, SITE, s) == JUDGE for s in block.session.tolist()]
    called = zip(block.sample_id.tolist(), (score >= model.manifest.threshold).tolist(), strict=True)
    return [pair for pair, judge in zip(called, judges, strict=True) if judge]


def label(crowd, text, *more):
    file = crowd.d.root / "given.csv"
    file.write_text(text)
    return crowd.d.run("site", "label", SITE, "--from", str(file), "--actor", "ann", *more)


def counts(crowd):
    """(attacks, of them called bona fide, bona fide, of them called attack) by the source model."""
    bare = Pointer(None, 1)
    got = replay_presentations(crowd.d.config, crowd.ledger, [ReplayTarget(SITE, bare, bare)]).counts
    return got.attacks.tolist(), got.accepted.tolist(), got.bona_fide.tolist(), got.refused.tolist()


def test_labels_count_until_they_are_taken_back(crowd, samples, capsys):
    (first, called), (second, _) = samples[:2]
    text = f"{HEAD}{first},attack,print\n{second},bona_fide,\nnever-seen,attack,print\n"
    assert label(crowd, text, "--kind", "red-team") == 0
    assert "3 labels recorded, by ann" in capsys.readouterr().out
    assert label(crowd, text, "--kind", "red-team") == 0
    assert [a for a, *_ in [counts(crowd)]] == [[1]], "a sample that never came is no presentation yet"
    assert counts(crowd)[1] == [int(called)]
    assert crowd.d.run("site", "show", SITE, "--json") == 0
    shown = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["labels"]
    attack = {"kind": "red-team", "label": "attack", "instrument": "print", "who": "ann"}
    assert {**attack, "role": "judge", "count": 1} in shown
    assert {**attack, "role": None, "count": 1} in shown
    assert label(crowd, f"{HEAD}{first},bona_fide,\n", "--kind", "correction") == 0
    assert (counts(crowd)[0], counts(crowd)[2]) == ([0], [2])
    assert crowd.d.run("site", "unlabel", SITE, first, "--reason", "it was somebody else") == 0
    assert (counts(crowd)[0], counts(crowd)[2]) == ([0], [1])
    assert crowd.ledger.audit.first_broken() is None


def test_a_file_with_a_bad_row_records_nothing_and_says_which(crowd, samples, capsys):
    first = samples[0][0]
    assert (
        label(crowd, f"{HEAD}{first},attack,print\n{first}x,genuine,\n", "--kind", "red-team", "--json") == 2
    )
    assert printed(capsys)["bad"] == [
        {"row": 2, "sample_id": f"{first}x", "reason": "label 'genuine', allowed bona_fide or attack"}
    ]
    assert crowd.ledger.labels.sites() == []


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        (HEAD + "a,attack,print\n", ("--kind", "rumour"), "allowed are commissioning"),
        ("sample_id,label,colour\na,attack,red\n", (), "column 'colour': allowed are sample_id"),
        ("sample_id,label,labelled_at\na,attack,noon\n", (), "write it as 2026-05-04T12:00:00Z"),
        (HEAD + "a,attack,print\n", ("data.labels=null",), "data.labels: not set"),
    ],
)
def test_mistakes_are_one_line(crowd, capsys, text, more, expected):
    assert label(crowd, text, *more) == 2
    assert expected in capsys.readouterr().err
    assert crowd.ledger.labels.sites() == []


def test_taking_back_what_nobody_said(crowd, capsys):
    assert crowd.d.run("site", "unlabel", SITE, "nothing", "--reason", "x") == 2
    assert "'nothing' has no label" in capsys.readouterr().err


def test_files_that_a_tool_left_are_recorded_once_and_strangers_wait(crowd, samples):
    said = {"label": "attack", "kind": "incident", "who": "cam", "labelled_at": datetime.now(UTC)}
    good = {**said, "sample_id": samples[0][0], "instrument": "mask"}
    for site in (SITE, "nobody"):
        folder = crowd.d.root / "labels" / site
        folder.mkdir(parents=True)
        write_label_file(folder / "labels-0001.parquet", [good, {**said, "sample_id": "b"}])
    torn = crowd.d.root / "labels" / SITE / "labels-0002.parquet"
    torn.write_bytes(b"PAR1 and nothing more")
    done = [record_labels(crowd.d.config, crowd.ledger, Terminal(), cycle="c") for _ in range(2)]
    assert [(d.files, d.labels, d.quarantined) for d in done] == [(2, 1, 2), (0, 0, 0)]
    assert crowd.ledger.labels.sites() == [SITE], "those of an unknown site wait"
    torn.unlink()
    write_label_file(torn, [good])
    assert record_labels(crowd.d.config, crowd.ledger, Terminal(), cycle="c").labels == 1, (
        "a mended file is new"
    )
