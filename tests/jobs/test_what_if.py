"""The what-if: two replays compared, other settings validated, and the command on a deployment; no Ray."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster import ingest
from pipeline.control.adapt import ShardJob, adapt_sites
from pipeline.control.scoring import join_labels
from pipeline.data.corpus import read_corpus
from pipeline.data.features import _with_digest
from pipeline.models import checkpoint
from pipeline.simulate.corpora import synth
from pipeline.simulate.sites import demo_fleet, simulate
from pipeline.source import fit as fits
from tests.support import deployments
from tests.support.deployments import Deployment, copy_deployment, new_deployment, printed
from tests.support.ledgers import T0, register_source
from tests.support.recorded import ingested, now, sealed_anchor

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


@pytest.fixture
def deployment(recorded, tmp_path) -> Deployment:
    """A copy of its own for a test that changes something."""
    return copy_deployment(recorded, tmp_path / "d")


# --- two replays compared


# --- other settings


# --- the command


def test_now_is_what_the_first_cycle_recorded(recorded, capsys):
    """The replay under the present settings equals the shard bit for bit: scores, labels used, errors."""
    d = recorded
    assert d.run("what-if", "--with", "site.kind=frozen", "--json") == 0
    found = printed(capsys)
    source = d.ledger.sources.champion()
    assert {r["site"] for r in found["sites"]} == set(SITES)
    for row in found["sites"]:
        judged = d.ledger.verdicts.find(site=row["site"])
        joined = join_labels(d.config, source, judged)
        assert joined is not None
        known, counted = joined.pad("online", source.manifest.threshold), judged[0].window
        assert known is not None
        assert [row["hter"][0], row["bpcer"][0], row["max_apcer"][0]] == [
            known.hter,
            known.bpcer,
            known.max_apcer,
        ]
        assert [row["pseudo_bona_fide"][0], row["pseudo_attack"][0]] == [
            counted.accepted_bona_fide,
            counted.accepted_attack,
        ]
        assert row["trust_ratio"] == [judged[0].evidence.trust_ratio, 0.0], "frozen stays where it is"
        assert row["verdict"][0] == judged[0].verdict.outcome
        assert row["pseudo_bona_fide"][1] == row["pseudo_attack"][1] == 0
        assert row["labelled"] == row["samples"] == counted.samples


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
    """Old evidence does not hold a what-if: it compares settings."""
    with sqlite3.connect(deployment.root / "ledger.db") as c:
        c.execute("update segments set ingested_at = ?", ((now() - timedelta(days=400)).isoformat(),))
    assert deployment.run("what-if", "--with", "site.kind=frozen", "--json") == 0
    assert {r["verdict"][0] for r in printed(capsys)["sites"]} >= {"pass"}


def test_only_what_the_current_source_model_saw_counts(deployment, capsys):
    """Segments from before the current trunk have no features, which is no error."""
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
