"""Where bytes lie: a folder of this machine, or an object store by URL (``s3://bucket/prefix?endpoint_override=…``).

Whatever is written appears whole or not at all: here by a temporary name, fsync and rename, in a store by one upload that
the store makes visible when it has ended. Credentials come from the environment (or the machine's role), never from a URL.
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

SCHEMES = ("s3", "gs", "abfs", "abfss")
TEMPORARY = ".tmp-"  # how the name of a file begins that is not whole yet
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


class StoreUnavailable(OSError):
    """Bytes could not be read or written: one line that names the place and the next step."""


@dataclass(frozen=True, order=True)
class Remote:
    """An object, or a prefix of objects, with those names of ``pathlib.Path`` that are used here; ``str`` is its URL."""

    scheme: str
    key: str  # bucket/…
    query: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str) -> Remote:
        return replace(self, key=f"{self.key}/{name}")

    def joinpath(self, *names: str) -> Remote:
        """Below this place."""
        return replace(self, key="/".join((self.key, *names)))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    def exists(self) -> bool:
        """Whether this is an object, or the prefix of one."""
        from pyarrow.fs import FileType

        with _store_errors(self):
            return self._store().get_file_info(self.key).type != FileType.NotFound

    def size(self) -> int:
        """Bytes of the object; raises FileNotFoundError."""
        return self.version()[0]

    def version(self) -> tuple[int, int]:
        """See ``version``."""
        with _store_errors(self):
            found = self._store().get_file_info(self.key)
            if not found.is_file:
                raise FileNotFoundError
        return int(found.size), int(found.mtime_ns)

    def read_bytes(self) -> bytes:
        """The whole object; raises FileNotFoundError."""
        with _store_errors(self), self._store().open_input_stream(self.key) as stream:
            return stream.read()

    @contextmanager
    def open(self, _mode: Literal["rb"], /) -> Iterator[NativeFile]:
        """The object, to be read in parts; raises FileNotFoundError."""
        with _store_errors(self), self._store().open_input_file(self.key) as file:
            yield file

    def glob(self, pattern: str) -> Iterator[Remote]:
        """Objects right below this prefix whose name matches."""
        found = (replace(self, key=info.path) for info in self._listed(recursive=False))
        yield from (r for r in found if fnmatch.fnmatchcase(r.name, pattern))

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            with _store_errors(self):
                self._store().delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def files(self) -> Iterator[StoredFile]:
        """Every object below this prefix."""
        for info in self._listed(recursive=True):
            inside = tuple(info.path.removeprefix(f"{self.key}/").split("/"))
            yield StoredFile(replace(self, key=info.path), inside, int(info.size), info.mtime)

    def put(self, data: bytes) -> None:
        """Upload; nobody sees a part of it. What the store then holds must have the size that was sent."""
        with _store_errors(self):
            stream = self._store().open_output_stream(self.key)
            stream.write(data)  # one write and no `with`: closing makes visible what was sent until then
            stream.close()
            found = self._store().get_file_info(self.key).size
        if found != len(data):
            raise StoreUnavailable(
                f"{self}: the store holds {found} of {len(data)} bytes; run the same command again"
            )

    def _listed(self, *, recursive: bool) -> list[FileInfo]:
        from pyarrow.fs import FileSelector, FileType

        with _store_errors(self):
            found = self._store().get_file_info(
                FileSelector(self.key, allow_not_found=True, recursive=recursive)
            )
        return [info for info in found if info.type == FileType.File]

    def _store(self) -> FileSystem:
        return _connection(self.scheme, self.key.partition("/")[0], self.query)


Place = Path | Remote


class StoredFile(NamedTuple):
    """A file as a listing shows it."""

    place: Place
    inside: tuple[str, ...]  # its name below what was listed, part by part
    size: int  # bytes
    at: datetime  # last written, UTC


def place(text: str) -> Place:
    """The place that a path (from then on absolute) or URL names; raises ValueError for a URL that cannot be one."""
    scheme, colon, rest = text.partition("://")
    if not colon:
        return Path(text).resolve()
    url = urlsplit(text)
    if scheme == "file":
        return Path(url.path).resolve()
    if SECRET_IN_URL.search(text):
        raise ValueError(
            "a URL that holds credentials; put them into the environment, e.g. AWS_ACCESS_KEY_ID, or use a role"
        )
    if scheme not in SCHEMES or not url.netloc:
        raise ValueError(
            f"no path and no URL of an object store; allowed: {', '.join(f'{s}://…' for s in SCHEMES)}"
        )
    return Remote(scheme, rest.partition("?")[0].rstrip("/"), url.query)


def check_place(text: str) -> str:
    """``text`` if it names a place, for validation; raises ValueError."""
    place(text)
    return text


def without_secrets(text: str) -> str:
    """``text`` without what may be a secret in a URL."""
    return SECRET_IN_URL.sub(
        lambda m: "//***@" if m[0].startswith("//") else m[0].partition("=")[0] + "=***", text
    )


def size(path: Place) -> int:
    """Bytes of a file or object; raises FileNotFoundError."""
    return path.size() if isinstance(path, Remote) else path.stat().st_size


def version(path: Place) -> tuple[int, int]:
    """(bytes, nanoseconds since 1970 when it was written): tells a file or object from a later one of its name."""
    if isinstance(path, Remote):
        return path.version()
    info = path.stat()
    return info.st_size, info.st_mtime_ns


def files(root: Place) -> Iterator[StoredFile]:
    """Every file below ``root``, in no order; nothing where there is no such place."""
    if isinstance(root, Remote):
        yield from root.files()
        return
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            try:
                info = path.stat(follow_symlinks=False)
            except FileNotFoundError:  # written or renamed meanwhile
                continue
            inside = path.relative_to(root).parts
            yield StoredFile(path, inside, info.st_size, datetime.fromtimestamp(info.st_mtime, UTC))


def write_atomic(path: Place, content: bytes | Callable[[Path], object]) -> None:
    """Put ``content``, or the file that it fills, at ``path``: readers see all of it or nothing. Raises StoreUnavailable.

    A writer that is killed leaves at most a file whose name begins with TEMPORARY; ``palisade gc`` removes those.
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
        what = os.strerror(e.errno) if e.errno else " ".join(str(e).split())[:160]
        raise StoreUnavailable(
            f"{path}: cannot be written: {what}; make room or give access, then run the same command again"
        ) from e
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def _bytes_filled_by(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "content")
        return (Path(folder) / "content").read_bytes()


def _make_folder(path: Path) -> None:
    """Make ``path`` so that a power cut does not take the folder with the file in it."""
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
    """The store's connection of this process. A bucket that is not there would else look like an empty one."""
    import pyarrow as pa
    from pyarrow.fs import FileSystem, FileType

    options = "&".join(
        q for q in (query, "allow_delayed_open=true" if scheme == "s3" else "") if q
    )  # small: one PUT
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
    """Turn what a store answers into one line; FileNotFoundError stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(2, "no such object", str(remote)) from None
    except StoreUnavailable:
        raise
    except OSError as e:
        said = " ".join(str(e).split())
        place = f"{remote.scheme}://{remote.key}"
        if "NO_SUCH_BUCKET" in said:
            raise StoreUnavailable(
                f"{place}: there is no such bucket; create it, or correct ledger.artifacts"
            ) from None
        if any(word in said for word in CREDENTIAL_ERRORS):
            raise StoreUnavailable(
                f"{place}: the store refuses these credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "(or the role) of somebody who may list, read, write and delete there"
            ) from None
        cause = said.partition("AWS Error ")[2] or said
        raise StoreUnavailable(
            f"{place}: the store does not answer ({without_secrets(cause)[:120]}); check endpoint and network, then run again"
        ) from None
