"""Reads, lists and atomically writes files in a local folder or in an object store named by a URL.

A store's URL looks like ``s3://bucket/prefix?endpoint_override=…``. A write appears whole or not at all:
locally by a temporary name, fsync and rename, in a store by one upload that becomes visible when it ends.
Credentials come from the environment or the machine's role, never from a URL.
"""

from __future__ import annotations

import fnmatch
import os
import re
import tempfile
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit

from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

SCHEMES = ("s3", "gs", "abfs", "abfss")
TEMPORARY = ".tmp-"  # prefix of the name of a file that is still being written
SECRET_IN_URL = re.compile(r"//[^/@\s]*@|[?&]\w*(?:secret|token|password|key)\w*=[^&\s'\"]*", re.IGNORECASE)
CREDENTIAL_ERRORS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
    "INVALID_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN",
    "INVALID_SIGNATURE",
    "HTTP status 403",
    "HTTP status 401",
)


class StoreUnavailable(PalisadeError, OSError):
    """Bytes that could not be read or written; the message is one line with the place and the next step."""

    exit_code = 5


@dataclass(frozen=True, order=True)
class Remote:
    """An object or a prefix in a store, with the methods of ``pathlib.Path`` that this project uses.

    ``str`` of it is its URL.
    """

    scheme: str
    key: str  # bucket/…
    query: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str) -> Remote:
        return replace(self, key=f"{self.key}/{name}")

    def joinpath(self, *names: str) -> Remote:
        """Returns the place below this one."""
        return replace(self, key="/".join((self.key, *names)))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    def exists(self) -> bool:
        """Returns True if this is an object or the prefix of one."""
        from pyarrow.fs import FileType

        with _store_errors(self):
            return self._store().get_file_info(self.key).type != FileType.NotFound

    def size(self) -> int:
        """Returns the size of the object in bytes; raises FileNotFoundError."""
        return self.version()[0]

    def version(self) -> tuple[int, int]:
        """Returns (bytes, nanoseconds since 1970 of the last write); raises FileNotFoundError."""
        with _store_errors(self):
            info = self._store().get_file_info(self.key)
            if not info.is_file:
                raise FileNotFoundError
        return int(info.size), int(info.mtime_ns)

    def read_bytes(self) -> bytes:
        """Returns the content of the object; raises FileNotFoundError."""
        with _store_errors(self), self._store().open_input_stream(self.key) as stream:
            return stream.read()

    @contextmanager
    def open(self, _mode: Literal["rb"], /) -> Iterator[NativeFile]:
        """Opens the object for reading in parts; raises FileNotFoundError."""
        with _store_errors(self), self._store().open_input_file(self.key) as file:
            yield file

    def glob(self, pattern: str) -> Iterator[Remote]:
        """Yields the objects directly below this prefix whose name matches ``pattern``."""
        objects = (replace(self, key=info.path) for info in self._list(recursive=False))
        yield from (r for r in objects if fnmatch.fnmatchcase(r.name, pattern))

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Deletes the object; raises FileNotFoundError unless ``missing_ok``."""
        try:
            with _store_errors(self):
                self._store().delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def files(self) -> Iterator[StoredFile]:
        """Yields every object below this prefix."""
        for info in self._list(recursive=True):
            parts = tuple(info.path.removeprefix(f"{self.key}/").split("/"))
            yield StoredFile(replace(self, key=info.path), parts, int(info.size), info.mtime)

    def put(self, data: bytes) -> None:
        """Uploads ``data``; readers see all of it or nothing. Raises StoreUnavailable if bytes are lost."""
        with _store_errors(self):
            stream = self._store().open_output_stream(self.key)
            stream.write(data)  # no `with`: on an error, closing would publish the part that was sent
            stream.close()
            stored = self._store().get_file_info(self.key).size
        if stored != len(data):
            raise StoreUnavailable(
                f"{self}: the store holds {stored} of {len(data)} bytes; run the same command again"
            )

    def _list(self, *, recursive: bool) -> list[FileInfo]:
        from pyarrow.fs import FileSelector, FileType

        with _store_errors(self):
            entries = self._store().get_file_info(
                FileSelector(self.key, allow_not_found=True, recursive=recursive)
            )
        return [info for info in entries if info.type == FileType.File]

    def _store(self) -> FileSystem:
        return _connection(self.scheme, self.key.partition("/")[0], self.query)


Place = Path | Remote


class StoredFile(NamedTuple):
    """One entry of a listing."""

    place: Place
    parts: tuple[str, ...]  # path below the listed root
    size: int  # bytes
    modified_at: datetime  # UTC


def place(text: str) -> Place:
    """Returns the place that a path (made absolute) or URL names; raises ValueError for an invalid URL."""
    scheme, colon, rest = text.partition("://")
    if not colon:
        return Path(text).resolve()
    url = urlsplit(text)
    if scheme == "file":
        return Path(url.path).resolve()
    if SECRET_IN_URL.search(text):
        raise ValueError(
            "a URL that holds credentials; put them into the environment, "
            "e.g. AWS_ACCESS_KEY_ID, or use a role"
        )
    if scheme not in SCHEMES or not url.netloc:
        raise ValueError(
            f"no path and no URL of an object store; allowed: {', '.join(f'{s}://…' for s in SCHEMES)}"
        )
    return Remote(scheme, rest.partition("?")[0].rstrip("/"), url.query)


def check_place(text: str) -> str:
    """Returns ``text`` if ``place`` accepts it, else raises ValueError; validates configuration fields."""
    place(text)
    return text


def without_secrets(text: str) -> str:
    """Returns ``text`` with every part of a URL that may be a secret replaced by ``***``."""
    return SECRET_IN_URL.sub(
        lambda m: "//***@" if m[0].startswith("//") else m[0].partition("=")[0] + "=***", text
    )


def size(path: Place) -> int:
    """Returns the size of a file or object in bytes; raises FileNotFoundError."""
    return path.size() if isinstance(path, Remote) else path.stat().st_size


def version(path: Place) -> tuple[int, int]:
    """Returns (bytes, nanoseconds since 1970 of the last write), which changes when the file is replaced."""
    if isinstance(path, Remote):
        return path.version()
    info = path.stat()
    return info.st_size, info.st_mtime_ns


def files(root: Place) -> Iterator[StoredFile]:
    """Yields every file below ``root`` in no particular order; nothing if ``root`` does not exist."""
    if isinstance(root, Remote):
        yield from root.files()
        return
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            try:
                info = path.stat(follow_symlinks=False)
            except FileNotFoundError:  # deleted or renamed since the folder was read
                continue
            parts = path.relative_to(root).parts
            yield StoredFile(path, parts, info.st_size, datetime.fromtimestamp(info.st_mtime, UTC))


def write_atomic(path: Place, content: bytes | Callable[[Path], object]) -> None:
    """Writes ``content`` to ``path`` so that readers see all of it or nothing; raises StoreUnavailable.

    ``content`` is bytes, or a function that fills the file at the path it gets. A writer that is killed
    leaves at most a file whose name begins with TEMPORARY; ``palisade gc`` removes such files.
    """
    if isinstance(path, Remote):
        path.put(content if isinstance(content, bytes) else _bytes_filled_by(content))
        return
    tmp = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        _make_folder(path.parent)
        if isinstance(content, bytes):
            tmp.write_bytes(content)
        else:
            content(tmp)
        _fsync(tmp)
        tmp.replace(path)
        _fsync(path.parent)
    except StoreUnavailable:
        raise
    except OSError as e:
        cause = os.strerror(e.errno) if e.errno else " ".join(str(e).split())[:160]
        raise StoreUnavailable(
            f"{path}: cannot be written: {cause}; make room or give access, then run the same command again"
        ) from e
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def _bytes_filled_by(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "content")
        return (Path(folder) / "content").read_bytes()


def _make_folder(path: Path) -> None:
    """Creates ``path`` and fsyncs each parent, so that a power cut cannot lose the folder of a file."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@lru_cache(maxsize=8)
def _connection(scheme: str, bucket: str, query: str) -> FileSystem:
    """Returns this process's connection to a bucket; raises StoreUnavailable if there is no such bucket.

    Without that check a missing bucket would look like an empty one.
    """
    import pyarrow as pa
    from pyarrow.fs import FileSystem, FileType

    delayed = "allow_delayed_open=true" if scheme == "s3" else ""  # one PUT for a small object
    options = "&".join(q for q in (query, delayed) if q)
    try:
        store, _ = FileSystem.from_uri(f"{scheme}://{bucket}" + (f"?{options}" if options else ""))
    except (pa.ArrowException, ValueError) as e:
        raise StoreUnavailable(
            f"{scheme}://{bucket}: not a URL of a store: {' '.join(str(e).split())[:160]}"
        ) from None
    if store.get_file_info(bucket).type == FileType.NotFound:
        raise StoreUnavailable(
            f"{scheme}://{bucket}: there is no such bucket; create it, or correct ledger.artifacts"
        )
    return store


@contextmanager
def _store_errors(remote: Remote) -> Iterator[None]:
    """Turns an error of the store into StoreUnavailable with one line; FileNotFoundError stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(2, "no such object", str(remote)) from None
    except StoreUnavailable:
        raise
    except OSError as e:
        message = " ".join(str(e).split())
        place = f"{remote.scheme}://{remote.key}"
        if "NO_SUCH_BUCKET" in message:
            raise StoreUnavailable(
                f"{place}: there is no such bucket; create it, or correct ledger.artifacts"
            ) from None
        if any(word in message for word in CREDENTIAL_ERRORS):
            raise StoreUnavailable(
                f"{place}: the store refuses these credentials; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (or the role) of somebody who may list, read, write and delete there"
            ) from None
        cause = message.partition("AWS Error ")[2] or message
        raise StoreUnavailable(
            f"{place}: the store does not answer ({without_secrets(cause)[:120]}); "
            "check endpoint and network, then run again"
        ) from None
