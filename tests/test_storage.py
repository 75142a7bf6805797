"""Failed writes, killed writers and changed bytes: nothing torn is seen, no changed bit is used."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import blobs
from pipeline.data.anchor import open_sealed, seal
from pipeline.data.features import read_features, write_features
from pipeline.models import checkpoint
from pipeline.storage import TEMPORARY, Remote, StoreUnavailable, files, place, without_secrets, write_atomic
from tests.support.artifacts import TENSORS, TRUNK, F, anchor, block, source

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One artifact of every kind: (its file, how it is read)."""
    root = tmp_path_factory.mktemp("stored")
    state, sealed = blobs.put(root / "states", TENSORS), seal(root / "anchors", anchor())
    written = write_features(root / "features", TRUNK, "gate", block())
    checkpoint.save(root / "model", source())
    return {
        "blob": (only(root / "states"), lambda: blobs.get(root / "states", state)),
        "anchor": (only(root / "anchors"), lambda: open_sealed(root / "anchors", sealed)),
        "features": (
            written,
            lambda: read_features(root / "features", TRUNK, "gate", start=0, end=9, features=F),
        ),
        "weights": (root / "model" / checkpoint.WEIGHTS, lambda: checkpoint.load(root / "model")),
        "manifest": (root / "model" / checkpoint.MANIFEST, lambda: checkpoint.load(root / "model").manifest),
    }


def only(folder: Path) -> Path:
    (found,) = (p for p in folder.rglob("*") if p.is_file())
    return found


REPAIR = {
    "blob": "backup",
    "anchor": "backup",
    "features": "ingest",
    "weights": "restore|upgrade",
    "manifest": "",
}


def refused(read, kind: str) -> None:
    with pytest.raises((blobs.BadBlob, checkpoint.BadCheckpoint), match=REPAIR[kind]) as e:
        read()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["blob", "anchor", "features", "weights"])
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_changed_bit_is_ever_used(stored, kind, at, bit):
    path, read = stored[kind]
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[int(at * len(whole))] ^= 1 << bit
    path.write_bytes(changed)
    try:
        refused(read, kind)
    finally:
        path.write_bytes(whole)
    read()


def test_every_byte_of_a_feature_file_counts(stored):
    """A flipped bit in pages, headers, footer, lengths or magic is refused."""
    path, read = stored["features"]
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        refused(read, "features")
    path.write_bytes(whole)


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_changed_manifest_is_refused_or_says_the_same(stored, at, bit):
    """Only the white space of the JSON may differ."""
    path, read = stored["manifest"]
    whole, before = path.read_bytes(), read()
    changed = bytearray(whole)
    changed[int(at * len(whole))] ^= 1 << bit
    path.write_bytes(changed)
    try:
        found = read()
    except checkpoint.BadCheckpoint as e:
        found = str(e)
    finally:
        path.write_bytes(whole)
    assert found == before or (isinstance(found, str) and "\n" not in found)


@pytest.mark.parametrize("kind", ["blob", "anchor", "features", "weights"])
@given(share=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=9))
def test_no_torn_or_grown_file_is_ever_used(stored, kind, share, more):
    path, read = stored[kind]
    whole = path.read_bytes()
    for damaged in (whole[: int(share * len(whole))], whole + more + b"\0"):
        path.write_bytes(damaged)
        refused(read, kind)
    path.write_bytes(whole)


def test_ordinary_parquet_tools_read_a_feature_file(stored):
    import pyarrow.parquet as pq

    assert pq.read_table(stored["features"][0], partitioning=None)["offset"].to_pylist() == list(range(6))


def test_a_feature_file_without_a_digest_is_refused(tmp_path):
    import pyarrow.parquet as pq

    path = write_features(tmp_path, TRUNK, "gate", block())
    pq.write_table(pq.read_table(path, partitioning=None), path)
    with pytest.raises(blobs.BadBlob, match="version that wrote none.*ingest the segment again"):
        read_features(tmp_path, TRUNK, "gate", start=0, end=9, features=F)


def test_a_damaged_blob_is_mended_by_who_makes_it_again(tmp_path):
    digest = blobs.put(tmp_path, TENSORS)
    path = only(tmp_path)
    for damage in (path.read_bytes()[:-3], b""):
        path.write_bytes(damage)
        assert blobs.put(tmp_path, TENSORS) == digest
        assert torch.equal(blobs.get(tmp_path, digest)["a"], TENSORS["a"])


def test_features_written_again_are_mended(tmp_path):
    path = write_features(tmp_path, TRUNK, "gate", block())
    path.write_bytes(path.read_bytes()[:40])
    write_features(tmp_path, TRUNK, "gate", block())
    assert len(read_features(tmp_path, TRUNK, "gate", start=0, end=9, features=F)) == 6


# What a child does with ROOT, on a full disk or until it is killed. `was` is the content that must survive.
WRITERS = {
    "blob": "from pipeline.data import blobs; import torch; blobs.put(ROOT, {'a': torch.zeros(50_000)})",
    "features": (
        "from tests.support.artifacts import block; from pipeline.data.features import write_features;"
        "write_features(ROOT, 't' * 64, 'gate', block(4000, features=64))"
    ),
    "checkpoint": (
        "from tests.support.artifacts import source; from pipeline.models import checkpoint;"
        "checkpoint.save(ROOT / 'm', source())"
    ),
    "bytes": "write_atomic(ROOT / 'x', b'new' * 100_000)",
    "writer": "write_atomic(ROOT / 'x', lambda tmp: tmp.write_bytes(b'new' * 100_000))",
}
PRELUDE = """
import sys; sys.path.insert(0, {repo!r})
from pathlib import Path
from pipeline.storage import StoreUnavailable, write_atomic
ROOT = Path({root!r})
"""
TELL = """
try:
    {act}
except StoreUnavailable as e:
    print(e)
"""
# the kernel writes that many bytes, then fails
SHORT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"


def child(root: Path, code: str, *, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    program = PRELUDE.format(repo=str(REPO), root=str(root)) + code
    return subprocess.run(
        [*before, sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_a_short_write_is_one_line_and_leaves_what_was_there(tmp_path, kind):
    (tmp_path / "x").write_bytes(b"old")
    done = child(tmp_path, SHORT + TELL.format(act=WRITERS[kind]))
    assert done.returncode == 0, done.stderr
    assert "cannot be written: File too large; make room" in done.stdout
    assert done.stdout.count("\n") == 1
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [f.place.name for f in files(tmp_path)] == ["x"]


def on_a_small_disk(root: Path, code: str, *, size: str) -> list[str] | None:
    """Lines that ``code`` prints on a file system of ``size`` at ``root``, mounted for a child alone.

    None where no file system may be mounted.
    """
    own = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    mount = f'mount -t tmpfs -o size={size} none {root} && exec {sys.executable} -c "$0"'
    program = PRELUDE.format(repo=str(REPO), root=str(root)) + code
    done = subprocess.run([*own, mount, program], capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, kind):
    look = "print(sorted(p.name for p in ROOT.rglob('*') if p.is_file()), (ROOT / 'x').read_bytes())"
    lines = on_a_small_disk(
        tmp_path, f"(ROOT / 'x').write_bytes(b'old')\n{TELL.format(act=WRITERS[kind])}\n{look}", size="16k"
    )
    if lines is None:
        with pytest.raises(StoreUnavailable, match="No space left on device; make room"):
            write_atomic(tmp_path / "x", lambda _: Path("/dev/full").write_bytes(b"x"))
        return
    said, left = lines
    assert "cannot be written: No space left on device; make room" in said
    assert left == "['x'] b'old'"


COMMIT = """
from tests.support.garbage import SITES, begun, verify
from tests.support.ledgers import GOOD
from pipeline.ledger import LedgerUnavailable
from pipeline.ledger.verdicts import Verdicts
f = begun(ROOT)
f.window(SITES, GOOD)
f.day += 1
commit, before = Verdicts.commit, f.ledger.streams.sites()

def full(*args, **kwargs):
    try:
        with (ROOT / "fill").open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
    except OSError:
        pass
    return commit(*args, **kwargs)

Verdicts.commit = full
try:
    f.window(SITES, GOOD)
except LedgerUnavailable as e:
    print(e)
(ROOT / "fill").unlink()
now = [(s.learned_offset, s.learner) for s in f.ledger.streams.sites()]
print(now == [(s.learned_offset, s.learner) for s in before])
Verdicts.commit = commit
f.window(SITES, GOOD)
verify(f, keep=9)
print([s.learned_offset for s in f.ledger.streams.sites()])
"""


def test_a_disk_that_is_full_at_the_commit_loses_nothing(tmp_path):
    """Blobs are written, then the transaction finds no room: nothing counts, and the next run goes on."""
    lines = on_a_small_disk(tmp_path, COMMIT, size="2m")
    if lines is None:
        pytest.skip("no file system may be mounted here")
    said, unchanged, learned = lines
    assert "full" in said or "disk I/O error" in said
    assert unchanged == "True"
    assert learned == "[12, 12]", "the second window is learned together with the third"


KILLS = {
    "half written": "write_atomic(ROOT / 'x', lambda tmp: (tmp.write_bytes(b'ne'), die()))",
    "before fsync": "storage._fsync = lambda p: die(); write_atomic(ROOT / 'x', b'new')",
    "before rename": "Path.replace = lambda a, b: die(); write_atomic(ROOT / 'x', b'new')",
    "after rename": (
        "f = Path.replace; Path.replace = lambda a, b: (f(a, b), die()); write_atomic(ROOT / 'x', b'new')"
    ),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path, when):
    (tmp_path / "x").write_bytes(b"old")
    die = "import os, signal; from pipeline import storage\n"
    die += "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
    assert child(tmp_path, die + KILLS[when]).returncode == -signal.SIGKILL
    assert (tmp_path / "x").read_bytes() == (b"new" if when == "after rename" else b"old")
    others = [f.place.name for f in files(tmp_path) if f.place.name != "x"]
    assert len(others) == (when != "after rename")
    assert all(name.startswith(TEMPORARY) for name in others)
    write_atomic(tmp_path / "x", b"again")
    assert (tmp_path / "x").read_bytes() == b"again"


def test_others_may_read_what_was_written(tmp_path):
    """Files get the mode of the umask, because a report server or a second pod runs under another user."""
    write_atomic(tmp_path / "deep" / "x", b"1")
    (tmp_path / "plain").write_bytes(b"1")
    assert (tmp_path / "deep" / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x", b"1")


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place("run/artifacts") == tmp_path / "run" / "artifacts"
    assert place("file:///srv/a") == Path("/srv/a")
    remote = place("s3://bucket/pre/?endpoint_override=localhost:9000&scheme=http")
    assert isinstance(remote, Remote)
    below = remote / "a" / "b.parquet"
    assert str(below) == "s3://bucket/pre/a/b.parquet?endpoint_override=localhost:9000&scheme=http"
    assert place(str(below)) == below == remote.joinpath("a", "b.parquet")
    assert (below.name, below.stem) == ("b.parquet", "b")


def test_pages_and_working_files_stay_on_the_machine(tmp_path, monkeypatch):
    from pipeline.config import load

    monkeypatch.chdir(tmp_path)
    far, here = (load(None, [f"ledger.artifacts={where}"]) for where in ("s3://bucket/x", "mine"))
    assert str(far.place("states")) == "s3://bucket/x/states"
    assert far.folder("reports") == tmp_path / "run" / "artifacts" / "reports"
    assert here.folder("reports") == here.place("reports") == tmp_path / "mine" / "reports"


@pytest.mark.parametrize(
    "url",
    [
        "s3://id:hush@bucket/x",
        "s3://bucket/x?secret_key=hush",
        "abfs://bucket/x?client_secret=hush",
        "http://x/y",
        "s3://",
    ],
)
def test_a_url_with_credentials_or_of_no_store_is_refused_without_showing_them(url):
    from pipeline.config import ConfigError, load

    with pytest.raises(ConfigError) as e:
        load(None, [f"ledger.artifacts={url}"])
    assert "ledger.artifacts" in str(e.value)
    assert "hush" not in str(e.value)
    assert "allowed: s3://…" in str(e.value) or "environment" in str(e.value)
    assert "hush" not in without_secrets(url)
