"""The anchor set: its digest, its flaws, its commands, and two source models on the same samples."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.control.anchor import compare_sources
from pipeline.control.deployment import now
from pipeline.data import blobs
from pipeline.data.anchor import AnchorSet, flaws, frame_keys, open_sealed, seal
from pipeline.data.protocols import PATTERNS
from pipeline.ledger import Ledger, LedgerError
from pipeline.models import checkpoint, tail
from pipeline.simulate.corpora import synth
from tests.support.artifacts import flip, source
from tests.support.deployments import Deployment, copy_deployment, new_deployment, printed
from tests.support.ledgers import T0, register_source


def anchor(n: int = 40, *, seed: int = 0, species: int = 4) -> AnchorSet:
    """A quarter of the samples is bona fide; every other one lacks depth."""
    random = torch.Generator().manual_seed(seed)
    label = (torch.arange(n) % 4 == 0).to(torch.int8)
    names = tuple("bona_fide" if y else f"s{i % species}" for i, y in enumerate(label.tolist()))
    present = torch.ones(n, 3, dtype=torch.bool)
    present[1::2, 1] = False
    frames = np.arange(n * 5 * 4, dtype=np.uint8).reshape(n, 5, 2, 2)
    key = torch.from_numpy(np.frombuffer(b"".join(frame_keys(frames)), np.uint8).reshape(n, 32).copy())
    z = torch.randn(n, 3, 8, generator=random).half().float()
    return AnchorSet(z, present, label, names, key, "t" * 64, {"A": "d" * 64})


def test_a_sealed_set_is_read_as_it_was_and_the_same_content_has_the_same_digest(tmp_path):
    made = anchor()
    digest = seal(tmp_path, made)
    assert seal(tmp_path, anchor()) == digest
    assert seal(tmp_path, anchor(seed=1)) != digest
    assert seal(tmp_path, replace(made, trunk="u" * 64)) != digest
    found = open_sealed(tmp_path, digest)
    assert (found.species, found.trunk, found.corpora) == (made.species, made.trunk, made.corpora)
    assert found.keys() == made.keys() and len(set(made.keys())) == 40
    assert all(torch.equal(getattr(found, n), getattr(made, n)) for n in ("z", "present", "label", "key"))


def test_a_set_of_an_earlier_version_opens_without_keys(tmp_path):
    digest = seal(tmp_path, replace(anchor(), key=None))
    assert set(blobs.get(tmp_path, digest)) == {"z", "present", "label", "species", "names"}, (
        "its bytes stay as they were"
    )
    found = open_sealed(tmp_path, digest)
    assert (found.key, found.keys(), found.trunk, found.corpora) == (None, [], "", {})
    assert any("without item keys" in w for w in flaws(found, set()).warnings)


@pytest.mark.parametrize("hurt", ["changed", "missing"])
def test_a_damaged_set_is_named_with_the_next_step_and_sealing_it_again_mends_it(tmp_path, hurt):
    digest = seal(tmp_path, anchor())
    path = tmp_path / digest[:2] / f"{digest}.safetensors"
    if hurt == "missing":
        path.unlink()
    else:
        flip(path, at=1)
    with pytest.raises(blobs.BadBlob, match=r"anchor set .*palisade anchor seal") as told:
        open_sealed(tmp_path, digest)
    assert digest in str(told.value)
    assert isinstance(told.value, blobs.MissingBlob) == (hurt == "missing")
    assert seal(tmp_path, anchor()) == digest
    open_sealed(tmp_path, digest)


def test_another_blob_is_no_anchor_set(tmp_path):
    with pytest.raises(blobs.BadBlob, match="not an anchor set"):
        open_sealed(tmp_path, blobs.put(tmp_path, {"z": torch.zeros(1)}))


def big(**changes: object) -> AnchorSet:
    label = torch.tensor([1] * 500 + [0] * 600, dtype=torch.int8)
    names = tuple(["bona_fide"] * 500 + [f"s{k % 4}" for k in range(600)])
    key = torch.arange(1100 * 32).reshape(1100, 32).float().mul(7.3).remainder(251).to(torch.uint8)
    key[:, 0], key[:, 1] = torch.arange(1100) % 256, torch.arange(1100) // 256
    made = AnchorSet(
        torch.zeros(1100, 3, 2), torch.ones(1100, 3, dtype=torch.bool), label, names, key, "t", {}
    )
    return replace(made, **changes)


def test_a_set_of_the_specified_size_has_no_flaw():
    assert flaws(big(), set()) == ((), ())


def test_every_count_below_the_specified_one_is_a_warning():
    sound = big()
    few = replace(sound, species=tuple("s0" if s in ("s1", "s2") else s for s in sound.species))
    assert [w for w in flaws(few, set()).warnings if "2 PAI species, at least 4" in w]
    depthless = sound.present.clone()
    depthless[:, 1:] = False  # colour alone: the pattern without colour shows nothing
    warned = flaws(replace(sound, present=depthless), set()).warnings
    assert len(warned) == 5 and all("0 samples under no-rgb" in w for w in warned)
    label = torch.cat([torch.zeros(1, dtype=torch.int8), sound.label[1:]])
    one_less = replace(sound, species=("s3", *sound.species[1:]), label=label)
    assert flaws(one_less, set()).warnings == ("bona_fide: 499 samples under full, at least 500 are needed",)


def test_what_makes_a_set_useless_is_an_error():
    sound = big()
    trained = set(sound.keys()[5:8])
    assert flaws(sound, trained).errors == ("3 of 1100 samples are in the training split of data.domains",)
    broken = sound.z.clone()
    broken[3, 1, 0] = torch.nan
    assert "not finite" in flaws(replace(sound, z=broken), set()).errors[0]
    only = replace(sound, label=torch.ones(1100, dtype=torch.int8), species=("bona_fide",) * 1100)
    assert any("no attack" in e for e in flaws(only, set()).errors)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 9))
def test_counts_are_what_every_pattern_shows(n, species, seed):
    made = anchor(n, seed=seed, species=species)
    patterns, present = made.replayed()
    counts = made.counts()
    assert set(counts) == set(made.species)
    for k, p in enumerate(patterns):
        assert sum(c[p] for c in counts.values()) == int(present[k].any(-1).sum())
    assert sum(c["full"] for c in counts.values()) == n


def test_the_newest_sealed_set_counts_also_when_it_was_sealed_before(tmp_path):
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    days = [T0 + timedelta(days=k) for k in range(6)]
    for digest, at in (("x", days[0]), ("y", days[1]), ("x", days[2]), ("x", days[3])):
        ledger.verdicts.pin_anchor(digest, trunk="t", summary={}, now=at)
    assert ledger.verdicts.anchor("t") == "x"
    said = [(p["digest"], at) for _, at, kind, p in ledger.audit.rows() if kind == "anchor"]
    assert said == [("x", days[0]), ("y", days[1]), ("x", days[2])], "what counts already is not sealed again"
    assert [ledger.verdicts.anchor("t", at=d) for d in days[:3]] == ["x", "y", "x"]
    ledger.verdicts.pin_anchor("y", trunk="t", summary={}, now=T0 - timedelta(days=9))
    assert ledger.verdicts.anchor("t") == "y", "though the clock was set back"
    assert list(ledger.verdicts.anchors().items()) == [("x", "t"), ("y", "t")]
    with pytest.raises(LedgerError, match="no anchor set"):
        ledger.verdicts.anchor("t", at=T0 - timedelta(days=99))


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Deployment:
    """Two rendered domains and two source models that nobody trained, as far as the anchor set goes."""
    d = new_deployment(tmp_path_factory.mktemp("anchor"))
    synth.write(Path(d.config.data.corpora), size=32, domains=("A", "B"), samples=24)
    for seed in (1, 2):
        add_source(d, seed)
    return d


@pytest.fixture
def mine(ground, tmp_path) -> Deployment:
    """A copy of its own for each test."""
    return copy_deployment(ground, tmp_path / "d")


def add_source(d: Deployment, seed: int) -> None:
    model = source(d.config.model, size=32, seed=seed, threshold=0.4 + 0.1 * seed, domains=("A", "B"))
    path = d.config.place("models", f"m{seed}")
    checkpoint.save(path, model)
    register_source(d.ledger, path, now=now())


def test_build_makes_a_draft_and_seal_pins_it(mine, capsys):
    assert mine.run("anchor", "verify") == 2
    assert "palisade train" in capsys.readouterr().err
    assert mine.run("anchor", "build", "--json") == 0
    draft = printed(capsys)
    assert set(draft["counts"]) > {"bona_fide"} and set(draft["counts"]["bona_fide"]) == set(PATTERNS)
    assert any("at least 500" in w for w in draft["warnings"]) and draft["errors"] == []
    assert mine.run("anchor", "verify") == 2, "a draft is not sealed"
    capsys.readouterr()
    assert mine.run("anchor", "seal", draft["digest"][:8], "--json") == 0
    assert printed(capsys)["digest"] == draft["digest"]
    assert mine.ledger.verdicts.anchor(mine.ledger.sources.get(1).trunk) == draft["digest"]
    assert mine.run("anchor", "seal", "--json") == 0
    assert printed(capsys)["digest"] == draft["digest"], "the same content is the same set"
    assert mine.run("anchor", "seal", "--version", "2", "--json") == 0
    assert (other := printed(capsys))["digest"] != draft["digest"] and other["version"] == 2
    assert mine.run("anchor", "verify", "--json") == 0
    assert printed(capsys)["digest"] == draft["digest"]
    assert mine.run("anchor", "verify", "--version", "2", "--json") == 0
    assert printed(capsys)["digest"] == other["digest"]


def test_an_earlier_set_counts_again(mine, capsys):
    trunk = mine.ledger.sources.get(1).trunk
    for words in ([], ["data.domains=[A]"], []):
        assert mine.run("anchor", "seal", *words, "--json") == 0
    first, second, third = [json.loads(line)["digest"] for line in capsys.readouterr().out.splitlines()]
    assert first == third != second
    assert mine.ledger.verdicts.anchor(trunk) == first
    assert mine.run("anchor", "seal", second[:10]) == 0
    assert mine.ledger.verdicts.anchor(trunk) == second
    assert mine.ledger.audit.first_broken() is None


@pytest.mark.parametrize("words", [["1234"], ["00000000"], ["nonsense"]])
def test_a_digest_that_is_none_is_one_line(mine, capsys, words):
    assert mine.run("anchor", "seal", *words) == 2
    assert "palisade anchor build" in capsys.readouterr().err


def test_a_tampered_set_fails_and_says_what_to_do(mine, capsys):
    assert mine.run("anchor", "seal") == 0
    (file,) = (mine.root / "artifacts" / "anchors").rglob("*.safetensors")
    flip(file)
    capsys.readouterr()
    assert mine.run("anchor", "verify") == 4
    said = capsys.readouterr().out
    assert str(file) in said and "palisade anchor seal --version 1" in said
    assert mine.run("anchor", "seal", "--version", "1") == 0
    assert mine.run("anchor", "verify") == 0


def test_a_set_that_was_trained_on_is_refused(mine, capsys):
    words = [f"data.anchor={mine.root}/corpora/A"]  # all its splits
    assert mine.run("anchor", "build", *words, "--json") == 4
    draft = printed(capsys)
    assert "in the training split of data.domains" in draft["errors"][0]
    assert mine.run("anchor", "seal", draft["digest"]) == 4
    with pytest.raises(LedgerError):
        mine.ledger.verdicts.anchor(mine.ledger.sources.get(1).trunk)


def test_two_source_models_are_paired_on_the_same_samples(mine):
    config, ledger = mine.config, mine.ledger
    old, new = ledger.sources.get(1), ledger.sources.get(2)
    evidence = compare_sources(config, ledger, old, new)
    sets = [open_sealed(config.place("anchors"), ledger.verdicts.anchor(s.trunk)) for s in (old, new)]
    assert sets[0].keys() == sets[1].keys(), "sealed from the same corpus"
    models = [checkpoint.load(s.path) for s in (old, new)]
    with torch.no_grad():
        wrong = [
            (tail.score(m.tail, s.z, s.present) >= m.manifest.threshold) != (s.label == 1)
            for m, s in zip(models, sets, strict=True)
        ]
    real = sets[0].label == 1
    cell = next(c for c in evidence.cells if (c.pattern, c.species) == ("full", "bona_fide"))
    assert (cell.n, cell.errors) == (int(real.sum()), int(wrong[1][real].sum()))
    assert cell.worse == int((wrong[1] & ~wrong[0])[real].sum()) and cell.better == int(
        (wrong[0] & ~wrong[1])[real].sum()
    )
    same = compare_sources(config, ledger, old, old)
    assert all(c.worse == c.better == 0 for c in same.cells) and same.margin_drop == 0


def test_only_samples_of_both_sets_are_paired(mine, capsys):
    assert mine.run("anchor", "seal", "--version", "1", "data.domains=[A]") == 0
    config, ledger = mine.config, mine.ledger
    evidence = compare_sources(config, ledger, ledger.sources.get(1), ledger.sources.get(2))
    sets = [
        open_sealed(config.place("anchors"), ledger.verdicts.anchor(ledger.sources.get(v).trunk))
        for v in (1, 2)
    ]
    assert 0 < len(sets[0].label) < len(sets[1].label)
    assert sum(c.n for c in evidence.cells if c.pattern == "full") == len(set(sets[0].keys()))
    assert mine.run("anchor", "seal", "--version", "2", "data.domains=[B]") == 0
    with pytest.raises(LedgerError, match=r"share no sample; .*--version 1"):
        compare_sources(config, ledger, ledger.sources.get(1), ledger.sources.get(2))
