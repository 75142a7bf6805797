"""Artifacts in an S3 store over HTTP: round trips, no torn upload is seen, mistakes are one line."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from jobs.__main__ import main
from jobs.ingest import _delete_counted, _delete_ingested
from pipeline import storage
from pipeline.config import Config, load
from pipeline.data import blobs
from pipeline.data.anchor import open_sealed, seal
from pipeline.data.captures import BadSegment, check_segment, list_segments, read_segment
from pipeline.data.features import delete_range, read_features, write_features
from pipeline.ledger import Ledger
from pipeline.models import checkpoint
from pipeline.storage import Remote, StoreUnavailable, files, place, write_atomic
from tests.support.artifacts import TENSORS, TRUNK, F, anchor, block, source
from tests.support.captures import SIZE, Fleet, save_model, segment
from tests.support.object_stores import url

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(endpoint, request):
    """An empty prefix for each test."""
    return place(url(endpoint, f"artifacts/{request.node.name.replace('[', '-').strip(']')}"))


def names(root) -> list[str]:
    return sorted(f.place.name for f in files(root))


def test_blobs(root):
    digest = blobs.put(root, TENSORS)
    assert blobs.put(root, TENSORS) == digest
    assert torch.equal(blobs.get(root, digest)["a"], TENSORS["a"])
    assert names(root) == [f"{digest}.safetensors"]
    (stored,) = files(root)
    stored.place.put(stored.place.read_bytes()[:-1] + b"x")
    with pytest.raises(blobs.BadBlob, match="changed or torn"):
        blobs.get(root, digest)
    blobs.put(root, TENSORS)
    assert torch.equal(blobs.get(root, digest)["a"], TENSORS["a"])
    stored.place.unlink()
    with pytest.raises(blobs.BadBlob, match="missing"):
        blobs.get(root, digest)


def test_features(root):
    assert len(read_features(root, TRUNK, "gate", start=0, end=9, features=F)) == 0
    path = write_features(root, TRUNK, "gate", block(6))
    got = read_features(root, TRUNK, "gate", start=2, end=5, features=F)
    assert got.offset.tolist() == [2, 3, 4]
    path.put(path.read_bytes()[:-9])
    with pytest.raises(blobs.BadBlob, match="ingest"):
        read_features(root, TRUNK, "gate", start=0, end=9, features=F)
    delete_range(root, TRUNK, "gate", start=0, end=6)
    assert names(root) == []


def test_anchor_and_checkpoint(root):
    digest = seal(root / "anchors", anchor())
    assert open_sealed(root / "anchors", digest).species == anchor().species
    before = source()
    assert not checkpoint.exists(root / "m")
    checkpoint.save(root / "m", before)
    after = checkpoint.load(str(root / "m"))
    assert after.manifest == before.manifest
    assert all(torch.equal(t, after.tail[n]) for n, t in before.tail.items())
    with pytest.raises(checkpoint.BadCheckpoint, match="exists already"):
        checkpoint.save(root / "m", before)
    with checkpoint.local_folder(root / "m") as folder:
        assert checkpoint.load(folder).manifest == before.manifest
    (root / "m" / checkpoint.MANIFEST).unlink()
    with pytest.raises(checkpoint.BadCheckpoint, match=r"manifest\.json.*cannot be read"):
        checkpoint.load(root / "m")


def test_names_of_a_prefix(root):
    for name in ("a/1-2.parquet", "a/b/3-4.parquet", "ab/5-6.parquet"):
        write_atomic(root / name, lambda tmp: tmp.write_bytes(b"x" * 7))
    assert [p.name for p in (root / "a").glob("*.parquet")] == ["1-2.parquet"]
    assert {(f.place.name, f.size) for f in files(root / "a")} == {("1-2.parquet", 7), ("3-4.parquet", 7)}
    assert (root / "a").exists() and not (root / "c").exists()
    assert storage.size(root / "ab" / "5-6.parquet") == 7
    assert pickle.loads(pickle.dumps(root)) == root
    (root / "none").unlink(missing_ok=True)
    for act in ((root / "none").unlink, (root / "none").read_bytes, (root / "none").size):
        with pytest.raises(FileNotFoundError):
            act()


def test_an_upload_that_was_killed_is_never_seen(root):
    """The first of several parts is in the store when the writer dies; the old object stays."""
    write_atomic(root / "x", b"old")
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(REPO)!r})\nfrom pipeline.storage import place\n"
        f"r = place({str(root / 'x')!r}); s = r._store().open_output_stream(r.key)\n"
        "for _ in range(3): s.write(bytes(6_000_000)); s.flush()\n"
        "print('sent', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "sent\n"), done.stderr
    assert (root / "x").read_bytes() == b"old"
    assert names(root) == ["x"]


@pytest.mark.slow  # the client tries again for seconds
@pytest.mark.parametrize("size", [200_000, 12_000_000])
def test_an_upload_that_was_cut_off_is_one_line_and_never_seen(endpoint, root, size):
    """A line that breaks in the middle of the body, in one PUT or in a part, every time it is tried."""
    write_atomic(root / "x", b"old")
    with cut_off(endpoint, after=150_000) as broken:
        torn = place(str(root / "x").replace(endpoint, broken))
        with pytest.raises(StoreUnavailable, match="does not answer.*check endpoint and network") as e:
            write_atomic(torn, bytes(size))
    assert "\n" not in str(e.value)
    assert (root / "x").read_bytes() == b"old"
    assert names(root) == ["x"]


class cut_off:
    """A proxy that hands ``after`` bytes of a connection on and then breaks it."""

    def __init__(self, endpoint: str, *, after: int) -> None:
        self.to, self.after = endpoint.split(":"), after
        self.listening = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> str:
        threading.Thread(target=self._serve, daemon=True).start()
        return f"127.0.0.1:{self.listening.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.listening.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self.listening.accept()
            except OSError:
                return
            far = socket.create_connection((self.to[0], int(self.to[1])))
            threading.Thread(target=self._pump, args=(near, far, self.after), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, 2**40), daemon=True).start()

    def _pump(self, near: socket.socket, far: socket.socket, left: int) -> None:
        try:
            while left > 0 and (data := near.recv(min(65536, left))):
                far.sendall(data)
                left -= len(data)
        except OSError:
            pass
        for s in (near, far):
            s.close()


def one_line(act, match: str) -> None:
    with pytest.raises(StoreUnavailable, match=match) as e:
        act()
    assert "\n" not in str(e.value)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(e.value)


def test_a_missing_bucket_is_one_line_and_never_an_empty_store(endpoint):
    gone = place(url(endpoint, "nobucket/pre"))
    for act in (
        lambda: blobs.put(gone, TENSORS),
        lambda: blobs.get(gone, "0" * 64),
        lambda: list(files(gone)),
        gone.exists,
        lambda: checkpoint.load(gone),
        lambda: read_features(gone, TRUNK, "gate", start=0, end=9, features=F),
    ):
        one_line(act, "s3://nobucket: there is no such bucket; create it")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_one_line(endpoint, root, monkeypatch, name):
    monkeypatch.setenv(name, "AKIAWRONGWRONGWRONG0")
    storage._connection.cache_clear()
    for act in (
        lambda: blobs.put(root, TENSORS),
        lambda: blobs.get(root, "0" * 64),
        lambda: list(files(root)),
    ):
        one_line(act, "refuses these credentials; set AWS_ACCESS_KEY_ID")
    storage._connection.cache_clear()


@pytest.mark.slow  # the client tries again for seconds
@pytest.mark.usefixtures("endpoint")
def test_a_store_that_cannot_be_reached_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    one_line(
        lambda: place(url(f"127.0.0.1:{port}", "artifacts/x")).exists(),
        "does not answer.*check endpoint and network",
    )


def test_doctor_looks_at_the_store(endpoint, capsys):
    def told(key: str) -> dict[str, str]:
        main(["doctor", "--json", f"ledger.artifacts={url(endpoint, key)}"])
        return next(c for c in json.loads(capsys.readouterr().out)["checks"] if c["name"] == "store")

    assert told("artifacts/new")["state"] == "ok"
    assert names(place(url(endpoint, "artifacts/new"))) == []
    assert (told("nobucket/x")["state"], told("nobucket/x")["advice"]) == (
        "fail",
        "create it, or correct ledger.artifacts",
    )


def test_gc_on_a_store(endpoint, root, tmp_path, capsys):
    Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    digest = blobs.put(root / "states", TENSORS)
    write_atomic(root / "anchors" / "ab" / "kept", b"1")
    words = ["gc", "--json", f"ledger.url=sqlite:///{tmp_path}/ledger.db", f"ledger.artifacts={root}"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 0, "younger than the grace"
    assert main([*words, "--grace-hours", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["names"]["states"] == [f"states/{digest[:2]}/{digest}.safetensors"]
    assert names(root) == ["kept"]


def test_an_unknown_option_is_one_line():
    one_line(place("s3://artifacts/x?nonsense=1").exists, "not a URL of a store: .*nonsense")


@pytest.fixture
def config(root, tmp_path) -> Config:
    return load(
        None,
        [
            f"data.captures={root / 'captures'}",
            f"data.frame_px={SIZE}",
            f"ledger.artifacts={root / 'artifacts'}",
            f"ledger.url=sqlite:///{tmp_path}/ledger.db",
        ],
    )


@pytest.fixture
def fleet(config) -> Fleet:
    return Fleet(config, save_model(config, "m"))


def sent(fleet: Fleet, folder: Path, name: str, *ids: str) -> Remote:
    """A segment as a site uploads it."""
    path = segment(folder / name, *ids)
    there = fleet.captures.joinpath(*name.split("/"))
    there.put(path.read_bytes())
    return there


def test_captures_in_a_store_are_ingested_in_order(fleet, tmp_path):
    sent(fleet, tmp_path, "gate/segment-10.parquet", "e", "f")
    sent(fleet, tmp_path, "gate/segment-9.parquet", "c", "d")
    sent(fleet, tmp_path, "door/segment-0.parquet", "x")
    torn = fleet.captures / "door" / "segment-1.parquet"
    torn.put(b"no Parquet file")
    fleet.round()
    assert fleet.stored("gate") == {"c": 0, "d": 1, "e": 2, "f": 3}
    assert fleet.stored("door") == {"x": 0}
    assert fleet.refused("door") == [("segment-1.parquet", -1, "door/segment-1.parquet: is no Parquet file")]
    assert not fleet.find().new, "refused bytes are not judged again"
    sent(fleet, tmp_path, "door/segment-2.parquet", "y")
    torn.put(segment(tmp_path / "mended" / "door" / "segment-1.parquet", "z").read_bytes())
    assert {b.site: len(b.paths) for b in fleet.find().new} == {"door": 2}
    fleet.round()
    assert fleet.stored("door") == {"x": 0, "z": 1, "y": 2}


def test_keys_that_are_no_segments_are_strays_with_a_line_each(fleet, tmp_path):
    from moto.s3.models import s3_backends

    good = sent(fleet, tmp_path, "gate/segment-0.parquet", "a")
    (account,) = s3_backends.values()
    bucket, _, prefix = fleet.captures.key.partition("/")
    strays = [
        "../segment-0.parquet",
        "../../etc/segment-0.parquet",
        "gate/2026/segment-0.parquet",
        "gate/2026/segment-1.parquet",
        "gate/segment-a?b.parquet",
        "gate/segment-\n.parquet",
        "gate/segment-é.parquet",
        "gate/notes.txt",
        "gate//segment-0.parquet",
        "/segment-0.parquet",
        "segment-9.parquet",
        "site=gate/segment-0.parquet",
        "A b/segment-0.parquet",
        "_sealed/segment-0.parquet",
        "gate/.tmp-segment-1.parquet",
    ]
    for key in strays:
        account["aws"].put_object(bucket, f"{prefix}/{key}", b"x" * 20)  # a client would tidy some of them
    found = list_segments(fleet.captures)
    assert found.segments == {"gate": [good]}
    assert found.sizes == {good: good.size()}
    allowed = "allowed are 1-63 of a-z 0-9 _ -, starting with a letter or digit"
    assert sorted(found.rejected) == sorted(
        [
            f"site id '..': {allowed}",
            f"site id 'A b': {allowed}",
            "gate/2026: lies deeper than <site>/segment-*.parquet",
            "gate/segment-a?b.parquet: a segment's name has letters, digits and . _ = - only",
            "gate/segment-\\n.parquet: a segment's name has letters, digits and . _ = - only",
            "gate/segment-\\xe9.parquet: a segment's name has letters, digits and . _ = - only",
            "site=gate/segment-0.parquet: gate has two segments of this name, one counts",
            "segment-9.parquet: is no folder of a site",
            f"site id '': {allowed}",
            "gate/: lies deeper than <site>/segment-*.parquet",
        ]
    )


def test_a_bucket_of_many_sites_is_list_at_once(fleet, tmp_path, monkeypatch):
    for k in range(5):
        sent(fleet, tmp_path, f"site-{k}/segment-0.parquet", "a")
    asked = []
    listed = Remote._list
    monkeypatch.setattr(Remote, "_list", lambda self, **how: asked.append(self) or listed(self, **how))
    monkeypatch.setattr(Remote, "version", lambda self: pytest.fail("asked for one object"))
    assert [b.size > 1000 for b in fleet.find().new] == [True] * 5
    assert asked == [fleet.captures]


def test_a_large_object_is_refused_before_its_bytes_are_read(fleet, tmp_path, monkeypatch):
    there = sent(fleet, tmp_path, "gate/segment-0.parquet", "a")
    small = fleet.config.data.model_copy(update={"max_bytes": 1000})
    said = f"gate/segment-0.parquet: has {there.size()} bytes, allowed 1000"
    for judge in (check_segment, read_segment):
        with pytest.raises(BadSegment, match=said):
            judge(there, site="gate", limits=small)
    assert check_segment(there, site="gate", limits=fleet.config.data) == 1


def test_an_object_that_vanishes_is_tried_again(fleet, tmp_path, monkeypatch):
    there = sent(fleet, tmp_path, "gate/segment-0.parquet", "a")
    sent(fleet, tmp_path, "gate/segment-1.parquet", "b")
    whole, found = there.read_bytes(), fleet.find()
    there.unlink()
    monkeypatch.setattr(fleet, "find", lambda **_: found)
    assert fleet.round().failed == (("gate", "segment-0.parquet: it vanished after it was listed"),)
    assert (fleet.stored("gate"), fleet.refused("gate")) == ({}, [])
    monkeypatch.undo()
    there.put(whole)
    fleet.round()
    assert fleet.stored("gate") == {"a": 0, "b": 1}


def test_frames_in_a_store_are_deleted_only_if_they_are_those_that_count(fleet, tmp_path):
    clean = sent(fleet, tmp_path, "gate/segment-0.parquet", "a")
    changed = sent(fleet, tmp_path, "gate/segment-1.parquet", "b")
    later = sent(fleet, tmp_path, "gate/segment-2.parquet", "c")
    found, done = fleet.find(), fleet.round()
    changed.put(segment(tmp_path / "other" / "gate" / "segment-1.parquet", "never ingested").read_bytes())
    kept = later.read_bytes()
    _delete_ingested(fleet.config, found, done)
    assert [p.exists() for p in (clean, changed, later)] == [False, True, False]
    later.put(kept)
    _delete_counted(fleet.config, fleet.ledger, fleet.find())
    assert [p.exists() for p in (changed, later)] == [True, False]
