"""Lineage on a real MLflow with SQLite: runs that resume, versions, aliases, MLflow out of reach."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.lineage import Lineage, LineageError, flat
from pipeline.revision import code_revision
from pipeline.sections import LineageConfig

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LineageConfig:
    root = tmp_path_factory.mktemp("lineage")
    return LineageConfig(uri=f"sqlite:///{root}/deep/mlflow.db", artifacts=str(root / "artifacts"))


@pytest.fixture(scope="module")
def lineage(config: LineageConfig) -> Lineage:
    return Lineage.open(config, code_revision="abc123")


def checkpoint(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_pickle_is_refused_in_the_process() -> None:
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


def test_artifacts_do_not_depend_on_the_working_directory(lineage: Lineage, config: LineageConfig) -> None:
    location = lineage.client.get_experiment(lineage.experiment_id).artifact_location
    assert location == Path(config.artifacts).as_uri()
    assert Lineage.open(config, code_revision="x").experiment_id == lineage.experiment_id


def test_run_holds_params_curves_tags_and_tables(lineage: Lineage, tmp_path: Path) -> None:
    params = {f"p{i}": i for i in range(150)} | flat({"site": {"lr": 1e-4, "waves": (0.1, 1.0)}})
    with lineage.run("cycle", "c1", params=params, tags={"sites": 3, "none": None}) as run:
        run.history({"loss": [(i, 1 / (i + 1)) for i in range(1500)]})
        run.metrics({"apcer/print (A4)": 0.25}, step=7)
        run.table("sites", pa.table({"site": ["a", "b"], "score": [0.1, 0.9]}))
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "index.html").write_text("<p>")
        run.artifact(tmp_path / "report", folder="report")
    stored = lineage.client.get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert len(stored.data.params) == 152
    assert stored.data.params["site.waves"] == "[0.1, 1.0]"
    assert stored.data.tags["palisade.kind"] == "cycle"
    assert stored.data.tags["palisade.code_revision"] == "abc123"
    assert len(lineage.client.get_metric_history(run.id, "loss")) == 1500
    assert stored.data.metrics["apcer/print _A4_"] == 0.25
    got = lineage.client.download_artifacts(run.id, "sites.parquet", str(tmp_path))
    assert pq.read_table(got).num_rows == 2
    assert {a.path for a in lineage.client.list_artifacts(run.id)} == {"sites.parquet", "report"}


def test_a_failed_job_goes_on_in_the_same_run(lineage: Lineage) -> None:
    with (
        pytest.raises(RuntimeError, match="out of disk"),
        lineage.run("train", "t", params={"workers": 1}, tags={}, key="fp-1") as first,
    ):
        raise RuntimeError("out of disk")
    failed = lineage.client.get_run(first.id)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["palisade.error"] == "RuntimeError: out of disk"
    with lineage.run("train", "t", params={"workers": 2, "added": True}, tags={}, key="fp-1") as second:
        assert lineage.client.get_run(second.id).info.status == "RUNNING"
    assert (first.resumed, second.resumed, second.id) == (False, True, first.id)
    assert lineage.client.get_run(first.id).data.params == {"workers": "1", "added": "True"}
    with lineage.run("cycle", "t", params={}, tags={}, key="fp-1", parent=first.id) as other:
        pass
    assert other.id != first.id
    assert lineage.client.get_run(other.id).data.tags["mlflow.parentRunId"] == first.id


def test_an_interrupted_run_is_killed(lineage: Lineage) -> None:
    with pytest.raises(KeyboardInterrupt), lineage.run("tune", "t", params={}, tags={}) as run:
        raise KeyboardInterrupt
    assert lineage.client.get_run(run.id).info.status == "KILLED"


def test_source_versions_carry_their_origin(lineage: Lineage, tmp_path: Path) -> None:
    with lineage.run("train", "source", params={}, tags={}) as run:
        one = lineage.register_source(
            run,
            checkpoint(tmp_path / "1", b"one"),
            fingerprint="f" * 64,
            data={"wmca": "d1"},
            parent=None,
            tags={"hter": 0.1},
        )
        again = lineage.register_source(
            run, tmp_path / "1", fingerprint="f" * 64, data={"wmca": "d1"}, parent=None, tags={}
        )
        two = lineage.register_source(
            run,
            checkpoint(tmp_path / "2", b"two"),
            fingerprint="e" * 64,
            data={},
            parent=one.version,
            tags={},
        )
    assert again == one
    assert (one.version, one.parent, two.version, two.parent) == (1, None, 2, 1)
    assert one.sha256 == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert (one.fingerprint, one.data, one.code_revision, one.run_id) == (
        "f" * 64,
        {"wmca": "d1"},
        "abc123",
        run.id,
    )
    assert [v.version for v in lineage.versions()] == [1, 2]


def test_aliases_move_and_are_seen_on_versions(lineage: Lineage) -> None:
    lineage.set_alias("champion", 1)
    lineage.set_alias("challenger", 2)
    assert [v.aliases for v in lineage.versions()] == [("champion",), ("challenger",)]
    lineage.set_alias("champion", 2)
    assert lineage.version("champion").version == 2
    assert lineage.version(2).aliases == ("challenger", "champion")
    with pytest.raises(LineageError, match=r"palisade.source has no version 9; versions: 1, 2"):
        lineage.set_alias("champion", 9)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:9", "MLflow at http://127.0.0.1:9: nothing answers"),
        (
            "postgresql://ml:secret@127.0.0.1:9/db",
            r"MLflow at postgresql://ml:\*\*\*@127.0.0.1:9/db: nothing answers",
        ),
        ("run/mlflow", "lineage.uri: 'run/mlflow': allowed are sqlite"),
        ("sqlite:////proc/nowhere/mlflow.db", "MLflow at sqlite:////proc/nowhere/mlflow.db: "),
    ],
)
def test_out_of_reach_is_one_line_with_the_address(uri: str, says: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises((LineageError, ValueError), match=says) as caught:
        Lineage.open(LineageConfig(uri=uri, artifacts=str(tmp_path)), code_revision="x")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 8


@pytest.mark.slow
def test_processes_that_open_a_new_database_together_all_succeed(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.sections import LineageConfig; from pipeline.lineage import Lineage\n"
        "c = LineageConfig(uri=f'sqlite:///{sys.argv[1]}/m.db', artifacts=f'{sys.argv[1]}/a')\n"
        "print(Lineage.open(c, code_revision='x').experiment_id)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    ids = {p.communicate(timeout=100)[0].strip() for p in started}
    assert [p.returncode for p in started] == [0, 0, 0]
    assert len(ids) == 1


def test_code_revision_names_commit_or_version() -> None:
    assert re.fullmatch(r"palisade-[\d.]+|.*[0-9a-f]{7,}.*", code_revision())
