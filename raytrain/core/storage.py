"""Storage behind a URL: a working copy of it on each machine, and every finished file in the storage.

Programs read and write files of the working copy. `push` copies what was written to the storage, `pull`
brings what other machines have written; both do nothing for a folder that is no working copy. Beside
every file the storage has `FILE.sha256`, with the digest of the file and that of the version before it,
so that an upload that was cut off and a file that was damaged are recognised. Of checkpoints the version
before the last is kept as `FILE.previous`, and is used if the last one is damaged.

Where both a file and its copy have changed, the storage is right: its writer has taken over.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError

T = TypeVar("T")

CACHE = "RAYTRAIN_CACHE"  # environment variable: the folder of working copies
_MARK = ".storage-url"  # at the root of a working copy
_PROBE = ".raytrain"  # a small file in the storage that shows that it can be written
_SYNCED = (
    ".synced"  # ending of the folder beside it: digests of files when they were last the same
)
_DIGEST, _PREVIOUS = ".sha256", ".previous"
_KEPT = (".pt",)  # suffixes of files whose version before the last is kept
_WHOLE = ("s3", "gcs", "abfs")  # file systems in which an object appears as a whole or not at all
_TRIES = 6  # at an operation on the storage, 1, 2, 4, ... seconds apart
_AT_ONCE = 8  # transfers
_CHUNK = 2**20  # bytes
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class StorageError(OSError):
    """The storage cannot be read or written, or a file in it does not match its checksum."""


def is_url(text: object) -> bool:
    """Whether a value of `storage` is a URL and not the path of a folder."""
    return _URL.match(str(text)) is not None


def without_secrets(url: str) -> str:
    """The URL without its user, password and settings."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.partition("?")[0].rpartition("@")[2]


def local_root(storage: Path | str) -> Path:
    """The folder of a storage on this machine: itself, or the working copy of a URL, which is made.

    Raises:
        RequestError: naming `storage`, if there is no file system for the URL or no place for the copy.
    """
    if not is_url(storage):
        return Path(storage)
    url = str(storage).rstrip("/")
    _file_system(url)
    name = re.sub(r"[^\w.-]+", "-", without_secrets(url))[:60].strip("-")
    root = _cache() / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    mark = root / _MARK
    if not mark.is_file():
        try:
            root.mkdir(parents=True, exist_ok=True)
            mark.touch(mode=0o600)
            mark.write_text(url)
        except OSError as error:
            raise RequestError(
                f"storage: no working copy can be made in {root.parent} ({error.strerror}); expected a "
                f"folder that can be written, in {CACHE}"
            ) from None
        _marked.cache_clear()
    return root


def push(path: Path) -> None:
    """Copy a file, or what has changed in a folder, to the storage if it is in a working copy.

    Files and folders whose name begins with a dot are left out.

    Raises:
        StorageError: if it cannot be written there.
    """
    copy = _copy_of(path)
    if copy is None:
        return
    files = [path] if path.is_file() else _files_below(path)
    changed = [file for file in files if copy.is_changed(file)]
    _all(copy.push, changed)


def pull(path: Path, wanted: Callable[[PurePosixPath], bool] = lambda file: True) -> None:
    """Bring a file, or the `wanted` files of a folder, from the storage to the working copy it is in.

    Raises:
        StorageError: if the storage does not answer, or a file in it does not match its checksum.
    """
    copy = _copy_of(path)
    if copy is None:
        return
    _all(copy.pull, [name for name in copy.listed(path) if wanted(PurePosixPath(name))])


def remove(path: Path) -> None:
    """Delete a file, in the storage too."""
    path.unlink(missing_ok=True)
    copy = _copy_of(path)
    if copy is not None:
        copy.forget(path)


def check(root: Path) -> None:
    """Check that the storage of a working copy can be written, once and without waiting.

    Raises:
        RequestError: naming `storage`.
    """
    copy = _copy_of(root)
    if copy is None:
        return
    fs, base = _file_system(copy.url)
    try:
        _write(fs, f"{base}/{_PROBE}", [b"raytrain\n"])
    except OSError as error:
        raise RequestError(
            f"storage: {without_secrets(copy.url)} cannot be written ({_reason(error)}); expected a "
            "storage that answers, its credentials in the environment"
        ) from None


def for_ray(folder: Path) -> tuple[str, Any]:
    """The path of a folder in the storage, and its file system, as Ray takes them; a plain folder and
    None outside working copies.
    """
    copy = _copy_of(folder)
    if copy is None:
        return str(folder), None
    fs, base = _file_system(copy.url)
    return f"{base}/{copy.relative(folder)}", fs


def changed_at(file: Path) -> float | None:
    """When a file was written, in the storage if it is in a working copy; None if it is not there.

    In seconds since 1970. Raises StorageError if the storage does not answer.
    """
    copy = _copy_of(file)
    if copy is not None:
        return copy.changed_at(copy.relative(file))
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def url_of(path: Path) -> str | None:
    """The URL of a file or folder in the storage, without secrets; None outside working copies."""
    copy = _copy_of(path)
    return None if copy is None else f"{without_secrets(copy.url)}/{copy.relative(path)}"


def shown(path: Path) -> str:
    """Where a file is, for a reader: its URL in the storage, or its path."""
    return url_of(path) or str(path)


@dataclass(frozen=True)
class _WorkingCopy:
    root: Path
    url: str

    def relative(self, path: Path) -> str:
        return Path(os.path.abspath(path)).relative_to(self.root).as_posix()

    def is_changed(self, file: Path) -> bool:
        """Whether a file is not as it was when the storage had the same."""
        return self._synced(self.relative(file))[1] != _stamp(file.stat())

    def push(self, file: Path) -> None:
        """Copy a file to the storage, its checksum first."""
        relative = self.relative(file)
        with file.open("rb") as content:
            status = os.fstat(content.fileno())
            size = status.st_size  # what is appended from now on is left out
            digest = _digest_of(content, size)
            if digest != self._synced(relative)[0]:
                self._upload(content, size, digest, relative)
        self._set_synced(relative, digest, _stamp(status))

    def _upload(self, content: BinaryIO, size: int, digest: str, relative: str) -> None:
        """Write a file of the storage, its checksum first."""
        before = self._digests(relative)
        if digest not in before[:1]:
            if before and relative.endswith(_KEPT):
                with suppress(FileNotFoundError):  # it was deleted, or never written
                    self._retried(lambda fs, at: fs.copy_file(at, at + _PREVIOUS), relative)
            known = "".join(f"{one}\n" for one in (digest, *before[:1]))
            self._retried(lambda fs, at: _write(fs, at, [known.encode()]), relative + _DIGEST)
        self._retried(lambda fs, at: _write(fs, at, _chunks(content, size)), relative)

    def pull(self, relative: str) -> None:
        """Bring a file from the storage, unless the one here is the same or newer."""
        file = self.root / relative
        digests = self._digests(relative)
        if file.is_file():
            here, synced = _digest(file), self._synced(relative)[0]
            if here in digests[:1] or (here != synced and synced in digests[:1]):
                return
        for source in (relative, relative + _PREVIOUS):
            try:
                found = self._fetch(source, file, digests)
            except FileNotFoundError:
                continue
            if found is not None:
                if source != relative:
                    log_line(
                        f"raytrain: storage: {without_secrets(self.url)}/{relative} does not match its "
                        "checksum; the version before it is used"
                    )
                self._set_synced(relative, found, _stamp(file.stat()))
                return
        raise StorageError(
            None,
            f"{without_secrets(self.url)}/{relative} does not match its checksum, and there is no sound "
            "version before it",
        )

    def listed(self, path: Path) -> list[str]:
        """The files in the storage at or below a path, relative to the root."""
        from pyarrow.fs import FileSelector, FileType

        def found(fs: Any, at: str) -> list[Any]:
            [info] = fs.get_file_info([at])
            if info.type == FileType.File:
                return [info]
            return fs.get_file_info(FileSelector(at, recursive=True, allow_not_found=True))

        infos = self._retried(found, self.relative(path))
        _, base = _file_system(self.url)
        names = [info.path for info in infos if info.type == FileType.File]
        inside = [name[len(base) :].lstrip("/") for name in names]
        return [name for name in inside if not name.endswith((_DIGEST, _PREVIOUS))]

    def changed_at(self, relative: str) -> float | None:
        """When the storage got a file; None if it has none."""
        [info] = self._retried(lambda fs, at: fs.get_file_info([at]), relative)
        return None if info.mtime_ns is None else info.mtime_ns / 1e9

    def forget(self, path: Path) -> None:
        """Delete what the storage has of a file."""
        relative = self.relative(path)
        for suffix in ("", _DIGEST, _PREVIOUS):
            with suppress(FileNotFoundError):
                self._retried(lambda fs, at: fs.delete_file(at), relative + suffix)
        self._record(relative).unlink(missing_ok=True)

    def _digests(self, relative: str) -> list[str]:
        """The digests of a file and of the version before it; none if it was never written."""
        try:
            return self._retried(_read, relative + _DIGEST).decode().split()
        except FileNotFoundError:
            return []

    def _fetch(self, source: str, file: Path, digests: list[str]) -> str | None:
        """Bring a file; return its digest, or None (and leave the one here) if that is not known."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.pulled")
        try:
            self._retried(lambda fs, at: _download(fs, at, temporary), source)
            digest = _digest(temporary)
            if digest not in digests:
                return None
            temporary.replace(file)
            return digest
        finally:
            temporary.unlink(missing_ok=True)

    def _record(self, relative: str) -> Path:
        return self.root.with_name(self.root.name + _SYNCED) / relative

    def _synced(self, relative: str) -> tuple[str, str]:
        """Digest and stamp of a file when the storage had the same; empty if that was never so."""
        with suppress(OSError, ValueError):
            digest, stamp = self._record(relative).read_text().split()
            return digest, stamp
        return "", ""

    def _set_synced(self, relative: str, digest: str, stamp: str) -> None:
        file = self._record(relative)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(f"{digest} {stamp}")
        temporary.replace(file)

    def _retried(self, operation: Callable[[Any, str], T], relative: str) -> T:
        """Carry out an operation on a path of the storage, again if it fails.

        Raises:
            FileNotFoundError: at once.
            StorageError: after the last try.
        """
        fs, base = _file_system(self.url)
        at = f"{base}/{relative}".rstrip("/.")
        for number in range(_TRIES):
            try:
                return operation(fs, at)
            except FileNotFoundError:
                raise
            except OSError as error:
                if number + 1 == _TRIES:
                    shown = f"{without_secrets(self.url)}/{relative}"
                    raise StorageError(error.errno, f"{shown}: {_reason(error)}") from error
                if number == 2:
                    log_line(
                        f"raytrain: storage: {without_secrets(self.url)} does not answer "
                        f"({_reason(error)}); trying again"
                    )
            time.sleep(2**number)
        raise AssertionError


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}:{status.st_size}"


def _reason(error: OSError) -> str:
    text = " ".join(str(error.strerror or error).split())
    return text[:100]


def _cache() -> Path:
    named = os.environ.get(CACHE, "").strip()
    if named:
        return Path(named).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return (Path(base).expanduser() / "raytrain").resolve()


def _copy_of(path: Path) -> _WorkingCopy | None:
    """The working copy that a path is in."""
    for folder in (path := Path(os.path.abspath(path)), *path.parents):
        found = _marked(folder)
        if found is not None:
            return _WorkingCopy(folder, found)
    return None


@lru_cache(maxsize=4096)
def _marked(folder: Path) -> str | None:
    with suppress(OSError):
        return (folder / _MARK).read_text()
    return None


@lru_cache(maxsize=64)
def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it: pyarrow's, or that of fsspec where pyarrow has none.

    Raises:
        RequestError: if neither has one.
    """
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    scheme = urlsplit(url).scheme
    try:
        fs, path = FileSystem.from_uri(url)
        return fs, path.rstrip("/")
    except (ValueError, NotImplementedError) as error:  # a scheme that it does not have
        reason = str(error).splitlines()[0]
    except OSError as error:  # a library is missing, or the bucket cannot be found
        raise RequestError(
            f"storage: {without_secrets(url)} cannot be used ({_reason(error)}); expected a storage that "
            "answers"
        ) from None
    try:
        from fsspec.core import url_to_fs

        other, path = url_to_fs(url)
        return PyFileSystem(FSSpecHandler(other)), path.rstrip("/")
    except Exception:  # fsspec's own, and those of the package it needs
        raise RequestError(
            f"storage: no file system for {scheme}:// ({reason[:100]}); expected the path of a folder, or "
            "a URL such as s3://BUCKET/FOLDER, gs://, abfs:// or hdfs://"
        ) from None


def _read(fs: Any, at: str) -> bytes:
    with fs.open_input_stream(at) as stream:
        return stream.read()


def _write(fs: Any, at: str, content: Iterable[bytes]) -> None:
    with _stream(fs, at) as stream:
        for chunk in content:
            stream.write(chunk)


def _download(fs: Any, at: str, file: Path) -> None:
    with fs.open_input_stream(at) as stream, file.open("wb") as target:
        shutil.copyfileobj(stream, target, _CHUNK)


@contextmanager
def _stream(fs: Any, at: str) -> Iterator[Any]:
    """A stream whose file appears at `at` as a whole: at its end, or by a rename."""
    if fs.type_name in _WHOLE:
        with fs.open_output_stream(at) as stream:
            yield stream
        return
    folder, _, name = at.rpartition("/")
    fs.create_dir(folder, recursive=True)
    temporary = f"{folder}/.{name}.{os.getpid()}"
    with fs.open_output_stream(temporary) as stream:
        yield stream
    fs.move(temporary, at)


def _digest_of(content: BinaryIO, size: int) -> str:
    """SHA-256 of the first `size` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in _chunks(content, size):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(content: BinaryIO, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, in pieces."""
    content.seek(0)
    while size > 0 and (chunk := content.read(min(_CHUNK, size))):
        size -= len(chunk)
        yield chunk


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _files_below(folder: Path) -> list[Path]:
    """Files whose path below a folder has no part that begins with a dot."""
    found = []
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(directory, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _all(operation: Callable[[Any], None], values: list[Any]) -> None:
    if len(values) < 2:
        for value in values:
            operation(value)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(operation, values):
            pass
