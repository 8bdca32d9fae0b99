"""Storage behind a URL: a working copy of it on each machine, and every finished file in the storage.

Programs read and write files of the working copy. `push` copies what was written to the storage, `pull`
brings what other machines have written; both do nothing for a folder that is no working copy.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError
from raytrain.core.file_systems import (
    StorageError,
    file_system,
    is_temporary,
    is_url,
    reason_of,
    without_secrets,
    write,
)
from raytrain.core.working_copy import WorkingCopy

CACHE = "RAYTRAIN_CACHE"  # environment variable: the folder of working copies
_MARK = ".storage-url"  # at the root of a working copy
_PROBE = ".raytrain"  # a small file in the storage that shows that it can be written
_AT_ONCE = 8  # transfers
_ABANDONED = 86400.0  # seconds


def local_root(storage: Path | str) -> Path:
    """The folder of a storage on this machine: itself, or the working copy of a URL, which is made.

    Raises:
        RequestError: naming `storage`, if there is no file system for the URL or no place for the copy.
    """
    if not is_url(storage):
        return Path(storage)
    url = str(storage).rstrip("/")
    file_system(url)
    name = re.sub(r"[^\w.-]+", "-", without_secrets(url))[:60].strip("-")
    root = cache_folder() / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    mark = root / _MARK
    if not mark.is_file():
        try:
            root.mkdir(parents=True, exist_ok=True)
            made = mark.with_name(f"{_MARK}.{os.getpid()}")
            made.touch(mode=0o600)
            made.write_text(url)
            made.replace(mark)
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


@contextmanager
def later() -> Iterator[None]:
    """Log that the storage does not answer in place of raising: what was written is pushed later on."""
    try:
        yield
    except StorageError as error:
        log_line(
            f"raytrain: storage: {error.strerror or error}; training goes on, with a copy here"
        )


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


def check(root: Path, writes: bool = True) -> None:
    """Check that the storage of a working copy can be written, or that it answers, once and without waiting.

    Raises:
        RequestError: naming `storage`.
    """
    copy = _copy_of(root)
    if copy is None:
        return
    fs, base = file_system(copy.url)
    try:
        if writes:
            write(fs, f"{base}/{_PROBE}", [b"raytrain\n"])
        else:
            _check_bucket(fs, base)
    except (OSError, ValueError, NotImplementedError) as error:
        raise RequestError(
            f"storage: {without_secrets(copy.url)} cannot be {'written' if writes else 'read'} "
            f"({reason_of(error)}); expected a storage that answers, its credentials in the environment"
        ) from None


def _check_bucket(fs: Any, base: str) -> None:
    """Raise OSError if the storage does not answer or has no such bucket; folders are made when written."""
    from pyarrow.fs import FileType

    bucket = base.partition("/")[0] or base
    [info] = fs.get_file_info([bucket])
    if fs.type_name in ("s3", "gcs") and info.type == FileType.NotFound:
        raise FileNotFoundError(errno.ENOENT, f"no bucket {bucket}")


def tidy(folder: Path) -> None:
    """Delete what writes that were cut off have left in a folder, here and in its storage.

    These are hidden files `.FILE.PID` older than a day, which no process at work has.
    """
    before = time.time() - _ABANDONED
    for file in folder.rglob(".*"):
        with suppress(OSError):
            if is_temporary(file.name) and file.stat().st_mtime < before:
                file.unlink()
    if (copy := _copy_of(folder)) is not None:
        with suppress(OSError):  # it does not answer
            copy.tidy(folder, before)


def for_ray(folder: Path) -> tuple[str, Any]:
    """The path of a folder in the storage, and its file system, as Ray takes them; a plain folder and
    None outside working copies.
    """
    copy = _copy_of(folder)
    if copy is None:
        return str(folder), None
    fs, base = file_system(copy.url)
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
    if copy is None:
        return None
    return f"{without_secrets(copy.url)}/{copy.relative(path)}".removesuffix("/.")


def shown(path: Path) -> str:
    """Where a file is, for a reader: its URL in the storage, or its path."""
    return url_of(path) or str(path)


def cache_folder() -> Path:
    """The folder of copies on this machine: `RAYTRAIN_CACHE`, or raytrain's in the user's caches.

    Raises:
        OSError: if there is none.
    """
    named = os.environ.get(CACHE, "").strip()
    if named:
        return Path(named).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    try:
        return (Path(base).expanduser() / "raytrain").resolve()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder") from None


def _copy_of(path: Path) -> WorkingCopy | None:
    """The working copy that a path is in."""
    for folder in (path := Path(os.path.abspath(path)), *path.parents):
        found = _marked(folder)
        if found is not None:
            return WorkingCopy(folder, found)
    return None


@lru_cache(maxsize=4096)
def _marked(folder: Path) -> str | None:
    with suppress(OSError):
        return (folder / _MARK).read_text()
    return None


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
