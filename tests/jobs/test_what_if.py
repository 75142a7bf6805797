"""The what-if: two replays compared, other settings validated, and the command on a deployment; no Ray."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.cluster import ingest
from pipeline.config import Config, ConfigError, altered, load
from pipeline.control import whatif
from pipeline.control.adapt import ShardJob, adapt_sites
from pipeline.control.scoring import join_labels
from pipeline.data import featurise
from pipeline.data.anchor import AnchorSet, seal
from pipeline.data.captures import check_segment
from pipeline.data.corpus import read_corpus
from pipeline.data.features import _with_digest, mask_to_bool
from pipeline.guards import Reason, Verdict
from pipeline.ledger import SegmentRow
from pipeline.models import TailConfig, checkpoint
from pipeline.models import tail as tails
from pipeline.models.trunk import features
from pipeline.simulate.corpora import synth
from pipeline.simulate.sites import demo_fleet, simulate
from pipeline.site import bank
from pipeline.site.bank import Trace
from pipeline.source import fit as fits
from tests.support import deployments
from tests.support.deployments import Deployment, copy_deployment, new_deployment, printed
from tests.support.ledgers import T0, register_source

SITES = ("lobby-north", "terminal-gate", "vault-ir-dead")
SETTINGS = {
    **deployments.SETTINGS,
    "source": {"kind": "erm", "steps": 40, "batch": 16},
    "site": {"kind": "tent", "lr": 1.0e-3},
    "guards.trust": {"rho": 0.5, "margin": 50.0},
    "guards.no_data": {"stream_min": 20, "anchor_min": 1},
    "guards.influence": {"advisory": True},
}
HOT = ("--with", "site.lr=0.5")  # moves a site far from its source
WARM = ("site.kind=frozen", "--with", "site.kind=tent", "--with", "site.lr=1e-2", "--json")


def feature_files(d: Deployment, site: str) -> list[Path]:
    """The site's feature files."""
    return sorted((d.root / "artifacts" / "features").glob(f"*/site={site}/*.parquet"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Deployment:
    """Two rendered domains, a fitted model, three sites ingested, one cycle by the shard's own code."""
    d = new_deployment(tmp_path_factory.mktemp("recorded"), SETTINGS)
    config, ledger = d.config, d.ledger
    synth.write(Path(config.data.corpora), size=32, domains=("A", "B"), samples=60, workers=1)
    simulate(d.root, [replace(s, rate=2.0) for s in demo_fleet() if s.site in SITES], phase=1, workers=1)
    path = config.place("models", "erm")
    folders = [Path(config.data.corpora) / name for name in "AB"]
    checkpoint.save(
        path, fits.fit(fits.Task(config.source, config.model, 32), [read_corpus(p) for p in folders])
    )  # pyright: ignore
    model = checkpoint.load(path)
    m = model.manifest
    register_source(ledger, path)
    ledger.verdicts.pin_anchor(
        sealed_anchor(config, model, folders), trunk=m.trunk_digest, summary={}, now=T0
    )
    cycle = ledger.cycles.begin(
        "cycle", "f", config.model_dump_json(), holder="t", dead=lambda _: True, now=now()
    )
    found = ingest.find(config.data, {}, lambda site: 0)
    ledger.streams.register({s: {} for s in found.sites}, now=T0)
    rows = [row for backlog in found.new for row in ingested(config, model, backlog)]
    ledger.streams.commit(cycle, rows, [], now=now())
    job = ShardJob(config.model_dump_json(), str(path), 1, ledger.verdicts.anchor(m.trunk_digest), cycle)
    assert [adapt_sites(job, part) for part in (SITES[:2], SITES[2:])] == [{}, {}]
    ledger.cycles.finish(cycle, summary={}, now=now())
    return d


def now() -> datetime:
    return datetime.now(UTC)


def sealed_anchor(config: Config, model: checkpoint.SourceModel, folders: list[Path]) -> str:
    sets = [read_corpus(p, ("test",)) for p in folders]
    present = torch.from_numpy(mask_to_bool(np.concatenate([c.present for c in sets])))
    z = features(model.trunk, torch.from_numpy(np.concatenate([c.frame for c in sets])), present)
    label = torch.from_numpy(np.concatenate([c.label for c in sets]).astype(np.int8))
    return seal(
        config.place("anchors"), AnchorSet(z, present, label, tuple(str(s) for c in sets for s in c.pai))
    )


def ingested(config: Config, model: checkpoint.SourceModel, backlog: ingest.Backlog) -> list[SegmentRow]:
    rows, base = [], backlog.base_offset
    for path in map(Path, backlog.paths):
        n = check_segment(path, site=backlog.site, limits=config.data)
        segment = featurise.NewSegment(backlog.site, path.name, str(path), n, base)
        sha256, bad = featurise.ingest_segment(segment, config.data, model, config.place("features"))
        rows.append(SegmentRow(backlog.site, path.name, sha256, n, base, n - len(bad), len(bad)))
        base += n
    return rows


@pytest.fixture
def deployment(recorded, tmp_path) -> Deployment:
    """A copy of its own for a test that changes something."""
    return copy_deployment(recorded, tmp_path / "d")


# --- two replays compared


def trace(score, pseudo=None) -> Trace:
    s = torch.as_tensor(np.asarray(score, np.float32))
    used = (
        torch.full((len(s),), -1, dtype=torch.int8)
        if pseudo is None
        else torch.tensor(pseudo, dtype=torch.int8)
    )
    none = torch.zeros(len(s))
    return Trace(s, used, none, none, none, none.bool())


def verdict(outcome: str) -> Verdict:
    reason = Reason(guard="trust", call=outcome, where="state", number=1.0, limit=0.5, text="moved")
    return Verdict(outcome=outcome, reasons=(reason,))  # pyright: ignore


def side(score, *, pseudo=None, ratio=0.0, outcome=None) -> whatif.ReplayedSite:
    return whatif.ReplayedSite(trace(score, pseudo), ratio, verdict(outcome) if outcome else None)


def truth(label, pai=None) -> whatif.Truth:
    return whatif.Truth(np.asarray(label), np.array(pai or ["print"] * len(label)))


SCORES = arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32) | st.just(float("nan")))


@given(score=SCORES, seed=st.integers(0, 2**16), threshold=st.floats(0, 1))
def test_a_stream_beside_itself_has_no_difference(score, seed, threshold):
    label = np.random.default_rng(seed).integers(-1, 2, len(score))
    d = whatif.compare_site(
        "s", side(score, outcome="hold"), side(score, outcome="hold"), truth(label), threshold
    )
    assert (d.newly_accepted, d.newly_refused, d.worse_verdict) == (0.0, 0.0, False)
    assert np.isnan(d.hter_rise) == (not {0, 1} <= set(label.tolist()))
    assert d.hter_rise == 0 or np.isnan(d.hter_rise)
    assert all(pair[0] == pair[1] for pair in d.row().values() if isinstance(pair, list))


@given(a=SCORES, seed=st.integers(0, 2**16))
def test_flips_have_a_direction_and_explain_what_is_accepted(a, seed):
    random = np.random.default_rng(seed)
    b, label = random.random(len(a), np.float32), random.integers(-1, 2, len(a))
    d, back = (whatif.compare_site("s", side(x), side(y), truth(label), 0.5) for x, y in ((a, b), (b, a)))
    assert d.what_if.accepted - d.now.accepted == pytest.approx(d.newly_accepted - d.newly_refused)
    assert (d.newly_accepted, d.newly_refused) == (back.newly_refused, back.newly_accepted)


def test_one_sample_each_way():
    d = whatif.compare_site(
        "s",
        side([0.1, 0.9, 0.9, 0.2], pseudo=[0, 1, -1, -1]),
        side([0.7, 0.1, 0.8, float("nan")], pseudo=[1, 1, 1, -1]),
        truth([0, 1, 1, -1]),
        0.5,
    )
    assert (d.newly_accepted, d.newly_refused, d.labelled) == (0.25, 0.25, 3)
    assert (d.now.hter, d.what_if.hter, d.hter_rise) == (0.0, 0.75, 0.75)
    assert (d.now.bpcer, d.what_if.bpcer, d.what_if.max_apcer) == (0.0, 0.5, 1.0)
    row = d.row()
    assert (row["pseudo_bona_fide"], row["pseudo_attack"], row["flipped"]) == ([1, 3], [1, 0], 0.5)


def test_a_threshold_is_compared_in_double_precision():
    """0.1 rounded to float32 lies above 0.1: it is accepted, as it is everywhere else."""
    d = whatif.compare_site(
        "s", side([0.1]), side([np.nextafter(np.float32(0.1), np.float32(0))]), truth([-1]), 0.1
    )
    assert (d.now.accepted, d.what_if.accepted, d.newly_refused) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("now", ["pass", "hold", "fail", None])
@pytest.mark.parametrize("then", ["pass", "hold", "fail", None])
def test_a_worse_verdict(now, then):
    d = whatif.compare_site("s", side([0.5], outcome=now), side([0.5], outcome=then), truth([1]), 0.5)
    assert d.worse_verdict == ((now, then) in {("pass", "hold"), ("pass", "fail"), ("hold", "fail")})


def labelled(site: str, now, then) -> whatif.Difference:
    return whatif.compare_site(site, side(now), side(then), truth([0, 1]), 0.5)


def test_the_worst_site_comes_first_and_the_fleet_is_counted():
    worse, better, same = (
        labelled("b", [0, 1], [1, 1]),
        labelled("c", [1, 1], [0, 1]),
        labelled("a", [0, 1], [0, 1]),
    )
    unknown = whatif.compare_site("d", side([0] * 10), side([1] * 2 + [0] * 8), truth([-1] * 10), 0.5)
    assert [d.site for d in whatif.worst_first([better, same, unknown, worse])] == ["b", "d", "a", "c"]
    fleet = whatif.fleet_summary([worse, better, same, unknown])
    assert (fleet.sites, fleet.labelled_sites, fleet.samples) == (4, 3, 16)
    assert (fleet.harmed, fleet.improved) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert fleet.means["hter"] == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert whatif.fleet_summary([unknown]).harmed is None
    json.dumps([whatif.fleet_summary([]).to_json(), unknown.row()], allow_nan=False)


def test_the_distance_is_relative_to_the_source():
    generator = torch.Generator().manual_seed(0)
    source = tails.init_tail(TailConfig(width=8, rank=4), 16, generator=generator)
    double = {n: 2 * source[n] for n in tails.MOVABLE}
    stacked = bank.stack([tails.site_state(source), double])
    assert [bank.distance(source, stacked, k) for k in (0, 1)] == [0.0, pytest.approx(1.0)]


def test_what_changed_is_named_key_by_key():
    now = {"site": {"kind": "danet", "lr": 1, "clip": 2}, "bank": {"slots": 2}}
    then = {"site": {"kind": "tent", "lr": 1, "margin": 3}, "bank": {"slots": 4}}
    assert whatif.changed_settings(now, now) == {}
    assert whatif.changed_settings(now, then) == {
        "site.kind": ("danet", "tent"),
        "site.clip": (2, None),
        "site.margin": (None, 3),
        "bank.slots": (2, 4),
    }


# --- other settings


def test_other_settings_are_validated_and_touch_nothing_else(tmp_path):
    (tmp_path / "now.yaml").write_text(
        "site: {kind: danet, mode: da, lr: 1.0e-4}\nbank: {slots: 3}\ndata: {frame_px: 40}\n"
    )
    config = load(tmp_path / "now.yaml", ["bank.batch_size=4"])
    made = altered(config, ["site.kind=tent"], sections=("site", "bank"))
    assert (made.site.kind, made.site.lr) == ("tent", 1e-4), "what the file gives and both methods have stays"
    assert (made.bank, made.data, made.guards) == (config.bank, config.data, config.guards)
    (tmp_path / "other.yaml").write_text("site: {kind: danet, lr: 2.0e-4}\ndata: {frame_px: 99}\n")
    made = altered(config, ["bank.slots=5"], sections=("site", "bank"), path=tmp_path / "other.yaml")
    assert (made.site.lr, made.site.mode) == (2e-4, "tta"), "a section is taken whole"  # pyright: ignore
    assert (made.bank.slots, made.bank.batch_size, made.data.frame_px) == (5, 4, 40)


@pytest.mark.parametrize(
    ("override", "file", "expected"),
    [
        ("site.lrr=1", None, "did you mean lr"),
        ("site.lr=-1", None, "greater than 0"),
        ("site.kind=tnet", None, "allowed: "),
        ("data.frame_px=3", None, "allowed are the sections site, bank"),
        ("site.lr", None, "write section.key=value"),
        ("bank.slots=1", "data: {frame_px: 32}", "none of the sections"),
        ("bank.slots=1", "site: {lr: 0}", "greater than 0"),
        ("bank.slots=1", "bank: {slotss: 1}", "did you mean slots"),
        ("bank.slots=1", "[", "not YAML"),
    ],
)
def test_a_mistake_in_other_settings(tmp_path, override, file, expected):
    path = tmp_path / "other.yaml"
    if file:
        path.write_text(file)
    with pytest.raises(ConfigError, match=expected) as e:
        altered(load(None), [override], sections=("site", "bank"), path=path if file else None)
    assert "\n" not in str(e.value)


# --- the command


def test_now_is_what_the_first_cycle_recorded(recorded, capsys):
    """The left side is no estimate: scores, labels used and errors are those of the shard, bit for bit."""
    d = recorded
    assert d.run("what-if", "--with", "site.kind=frozen", "--json") == 0
    found = printed(capsys)
    source = d.ledger.sources.champion()
    assert {r["site"] for r in found["sites"]} == set(SITES)
    for row in found["sites"]:
        judged = d.ledger.verdicts.find(site=row["site"])
        joined = join_labels(d.config, source, judged)
        assert joined is not None
        known, counted = joined.pad("online", float(str(source.manifest["threshold"]))), judged[0].counters
        assert known is not None
        assert [row["hter"][0], row["bpcer"][0], row["max_apcer"][0]] == [
            known.hter,
            known.bpcer,
            known.max_apcer,
        ]
        assert [row["pseudo_bona_fide"][0], row["pseudo_attack"][0]] == [
            counted["accepted_bona_fide"],
            counted["accepted_attack"],
        ]
        assert row["trust_ratio"] == [judged[0].evidence.trust_ratio, 0.0], "frozen stays where it is"
        assert row["verdict"][0] == judged[0].verdict.outcome
        assert row["pseudo_bona_fide"][1] == row["pseudo_attack"][1] == 0
        assert row["labelled"] == row["samples"] == counted["samples"]


def test_other_settings_change_calls_and_fail_where_now_passes(recorded, capsys):
    assert recorded.run("what-if", *HOT, "--json") == 4
    found = printed(capsys)
    assert found["changed"] == {"site.lr": [1e-3, 0.5]}
    rises = [r["hter_rise"] for r in found["sites"]]
    assert rises == sorted(rises, reverse=True)
    bad = [r for r in found["sites"] if r["worse_verdict"]]
    assert bad
    assert {r["site"] for r in bad} == set(found["fleet"]["worse_verdicts"])
    assert all(r["verdict"] == ["pass", "fail"] and r["reason"][1].startswith("trust:") for r in bad)
    assert max(r["flipped"] for r in found["sites"]) > 0.05
    assert recorded.run("what-if", *HOT) == 4
    shown = capsys.readouterr().out
    assert "site.lr 0.001 → 0.5" in shown
    assert "pass → fail" in shown
    assert f"{len(bad)} verdicts would be worse" in shown


def test_another_method(recorded, capsys):
    assert recorded.run(
        "what-if", "--with", "site.kind=danet", "--with", "site.trigger=null", "--site", SITES[1], "--json"
    ) in (0, 4)
    found = printed(capsys)
    assert (found["changed"]["site.kind"], found["changed"]["site.omega"]) == (["tent", "danet"], [None, 0.5])
    assert found["changed"].get("site.lr") is None, "what the file says of both stays"
    (row,) = found["sites"]
    assert row["trust_ratio"][0] != row["trust_ratio"][1] > 0


def test_the_present_settings_again_differ_in_nothing(recorded, capsys):
    assert recorded.run("what-if", "--against", recorded.yaml, "--json") == 0
    found = printed(capsys)
    assert found["changed"] == {}
    assert len(found["sites"]) == len(SITES)
    for row in found["sites"]:
        assert (row["flipped"], row["hter_rise"]) == (0.0, 0.0)
        assert all(pair[0] == pair[1] for pair in row.values() if isinstance(pair, list))
    assert recorded.run("what-if", "--against", recorded.yaml, "--site", SITES[0]) == 0
    assert "nothing is different" in capsys.readouterr().out


def test_only_the_named_sites_and_other_shapes(recorded, capsys):
    words = ("--site", SITES[2], "--site", SITES[0], "--site", SITES[2])
    assert (
        recorded.run("what-if", "--with", "bank.slots=1", "--with", "bank.batch_size=16", *words, "--json")
        == 0
    )
    found = printed(capsys)
    assert found["changed"] == {"bank.slots": [2, 1], "bank.batch_size": [8, 16]}
    assert sorted(r["site"] for r in found["sites"]) == sorted({SITES[0], SITES[2]})
    assert recorded.run("what-if", "site.kind=frozen", "--with", "bank.slots=16", "--json") == 0
    found = printed(capsys)
    assert [r["flipped"] for r in found["sites"]] == [0.0] * len(SITES), "nothing learns, nothing differs"


def test_it_leaves_no_trace_but_the_file_it_was_asked_for(recorded, tmp_path, capsys):
    def everything() -> dict[str, object]:
        files = {str(p): p.stat().st_mtime_ns for p in recorded.root.rglob("*") if "ledger.db" not in p.name}
        with sqlite3.connect(f"file:{recorded.root}/ledger.db?mode=ro", uri=True) as c:
            tables = [name for (name,) in c.execute("select name from sqlite_master where type = 'table'")]
            return {**files, **{t: c.execute(f"select * from {t} order by 1").fetchall() for t in tables}}

    before = everything()
    assert len(before) > 20
    table, whole = tmp_path / "deep" / "t.parquet", tmp_path / "t.json"
    assert recorded.run("what-if", *HOT, "--out", str(table), "--json") == 4
    found = printed(capsys)
    assert recorded.run("what-if", *HOT, "--out", str(whole)) == 4
    assert everything() == before
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["t.json", "t.parquet"]
    assert json.loads(whole.read_text()) == found
    rows = pq.read_table(table).to_pylist()
    for row, wide in zip(found["sites"], rows, strict=True):
        pairs = {
            f"{k}_{s}": x
            for k, v in row.items()
            if isinstance(v, list)
            for s, x in zip(("now", "what_if"), v)
        }
        assert wide == {**{k: v for k, v in row.items() if not isinstance(v, list)}, **pairs}


@pytest.fixture(scope="module")
def whole(recorded, tmp_path_factory) -> dict[str, dict]:
    """Rows of WARM by site where nothing is broken."""
    out = tmp_path_factory.mktemp("whole") / "w.json"
    assert recorded.run("what-if", *WARM, "--out", str(out)) == 0
    return {r["site"]: r for r in json.loads(out.read_text())["sites"]}


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def rewritten(**columns: pa.Array | None):
    def rewrite(path: Path) -> None:
        t = pq.ParquetFile(path).read()
        for name, values in columns.items():
            i = t.schema.get_field_index(name)
            t = (
                t.remove_column(i)
                if values is None
                else t.set_column(i, name, pa.concat_arrays([values] * len(t)))
            )
        sink = pa.BufferOutputStream()
        pq.write_table(t, sink)
        path.write_bytes(_with_digest(sink.getvalue().to_pybytes()))  # what is wrong must be what is in it

    return rewrite


SPOILED = {
    "torn": torn,
    "gone": Path.unlink,
    "no features": rewritten(z=None),
    "no sessions": rewritten(session=None),
    "another width": rewritten(z=pa.array([b"x" * 6], pa.binary(6))),
    "masks of text": rewritten(present=pa.array(["7"])),
    "half sessions": rewritten(session=pa.array([0.5])),
    "null sessions": rewritten(session=pa.array([None], pa.int64())),
    "times of text": rewritten(captured_at=pa.array(["yesterday"])),
    "offsets of text": rewritten(offset=pa.array(["1"])),
    "an odd name": lambda path: path.rename(path.with_name("0-x.parquet")),
    "twice": lambda path: path.with_name("000000000000-000000000999.parquet").write_bytes(path.read_bytes()),
}


@pytest.mark.parametrize(("one", "other"), list(zip(list(SPOILED)[::2], list(SPOILED)[1::2], strict=True)))
def test_a_broken_feature_file_of_a_site_stops_nobody(deployment, whole, capsys, one, other):
    """Two sites have a broken file each; the third is as it was where nothing is broken."""
    for site, how in zip(SITES[1:], (one, other), strict=True):
        SPOILED[how](feature_files(deployment, site)[1])
    assert deployment.run("what-if", *WARM) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert set(found["failed"]) == set(SITES[1:])
    assert {r["site"]: r for r in found["sites"]} == {SITES[0]: whole[SITES[0]]}, "to the last bit"
    lines = [line for line in captured.err.splitlines() if line.startswith("warning:")]
    assert [line.partition(": not replayed: ")[0] for line in lines] == [f"warning: {s}" for s in SITES[1:]]
    assert all(len(line.partition(": not replayed: ")[2]) > 10 for line in lines)


def test_how_often_progress_is_shown_changes_no_bit(recorded, whole, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.control.replay.STRIDE", 1)
    assert recorded.run("what-if", *WARM) == 0
    assert {r["site"]: r for r in printed(capsys)["sites"]} == whole


def test_features_that_are_no_numbers_teach_nobody(deployment, whole, capsys):
    poison = np.full(3 * 32, np.nan, np.float16).tobytes()
    for path in feature_files(deployment, SITES[1]):
        rewritten(z=pa.array([poison], pa.binary(len(poison))))(path)
    assert deployment.run("what-if", *WARM) == 0
    found = {r["site"]: r for r in printed(capsys)["sites"]}
    assert found[SITES[1]]["pseudo_bona_fide"] == [0, 0]
    assert {s: r for s, r in found.items() if s != SITES[1]} == {
        s: r for s, r in whole.items() if s != SITES[1]
    }


def test_nothing_to_compare_holds(deployment, capsys):
    for site in SITES:
        for path in feature_files(deployment, site):
            path.unlink()
    assert deployment.run("what-if", "--with", "site.kind=frozen", "--json") == 3
    found = printed(capsys)
    assert (found["sites"], set(found["failed"])) == ([], set(SITES))
    assert "palisade ingest" in found["failed"][SITES[0]]


def test_without_labels_or_an_anchor_set_there_are_still_calls(deployment, capsys):
    with sqlite3.connect(deployment.root / "ledger.db") as c:
        c.execute("delete from anchors")
    assert deployment.run("what-if", *HOT, "data.sealed=null", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert all(
        r["hter"] == [None, None] and r["verdict"] == [None, None] and not r["labelled"]
        for r in found["sites"]
    )
    shares = [r["newly_accepted"] for r in found["sites"]]
    assert shares == sorted(shares, reverse=True)
    assert (found["fleet"]["harmed"], found["fleet"]["labelled_sites"]) == (None, 0)
    assert "no anchor set is sealed" in captured.err


def test_an_old_recording_is_judged_as_at_its_end(deployment, capsys):
    """What is asked is whether the settings are better, not whether the evidence is of today."""
    with sqlite3.connect(deployment.root / "ledger.db") as c:
        c.execute("update segments set ingested_at = ?", ((now() - timedelta(days=400)).isoformat(),))
    assert deployment.run("what-if", "--with", "site.kind=frozen", "--json") == 0
    assert {r["verdict"][0] for r in printed(capsys)["sites"]} >= {"pass"}


def test_only_what_the_current_source_model_saw_counts(deployment, capsys):
    """A trunk that came later has no features of earlier segments, and that is no hole."""
    feature_files(deployment, SITES[0])[0].unlink()
    assert deployment.run("what-if", "--with", "site.kind=frozen", "--site", SITES[0], "--json") == 0
    (row,) = printed(capsys)["sites"]
    late = [s.good for s, _ in deployment.ledger.streams.segments(SITES[0])][1:]
    assert row["samples"] == sum(late)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give --with section.key=value, --against FILE, or both"),
        (["site.lr=1"], "give --with section.key=value, --against FILE, or both"),
        (["--with"], "--with"),
        (["--with", "site.lrr=1"], "did you mean lr"),
        (["--with", "guards.trust.rho=1"], "allowed are the sections site, bank"),
        (["--with", "site.kind=frozen", "--site", "lobby-nort"], "did you mean lobby-north"),
        (["--against", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--with", "site.kind=frozen", "--out", "x.csv"], ".parquet or .json"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(recorded, capsys, words, expected):
    assert recorded.run("what-if", *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error:")
    assert expected in line


def test_no_site_and_no_ledger(deployment, tmp_path, capsys):
    with sqlite3.connect(deployment.root / "ledger.db") as c:
        c.execute("delete from sites")
    assert deployment.run("what-if", "--with", "site.kind=frozen") == 2
    assert "palisade ingest" in capsys.readouterr().err
    assert new_deployment(tmp_path / "empty").run("what-if", "--with", "site.kind=frozen") == 5
    assert not (tmp_path / "empty" / "ledger.db").exists()


LOADED = """
import sys
from jobs.__main__ import main
heavy = ("torch", "pyarrow", "sqlalchemy", "ray", "mlflow")
print(main(sys.argv[1:]), [m for m in heavy if m in sys.modules])
"""


def in_a_process(*words: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_help_is_told_at_once():
    *lines, last = in_a_process("what-if", "--help")
    assert last == "0 []"
    assert "Exit codes: 0 compared, 3 nothing could be compared" in " ".join(" ".join(lines).split())


@pytest.mark.slow
def test_neither_ray_nor_mlflow_is_needed(recorded):
    words = ["what-if", "--with", "site.kind=frozen", "--site", SITES[0], "--config", recorded.yaml]
    assert in_a_process(*words)[-1] == "0 ['torch', 'pyarrow', 'sqlalchemy']"
