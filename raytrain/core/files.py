"""Atomic replacement of files."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from raytrain.core.storage import push


@contextmanager
def atomic_writer(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file that is renamed to `path` at the end.

    If `durable`, it is flushed to the disk before, and copied to the storage after (`push`). After an error
    in writing `path` is unchanged and the temporary file is deleted. Missing folders are created.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        push(path)


def check_folder(folder: Path) -> None:
    """Check that files can be written to a folder, which may still have to be made; make nothing.

    Raises:
        OSError: if they cannot.
    """
    there = next(one for one in (folder.resolve(), *folder.resolve().parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Write a text file in UTF-8 through `atomic_writer`."""
    with atomic_writer(path, durable) as file:
        file.write(text.encode())


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock that one process of the machine has at a time; released when the process dies."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
