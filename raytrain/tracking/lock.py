"""One process at a time, for what MLflow's client cannot do in one transaction."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

from raytrain.tracking.address import sqlite_file

_PATIENCE = 120.0  # seconds, after which it is done all the same


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Hold a lock on the folder of a SQLite store, where the file system has locks; no file is left.

    A server has no such lock.
    """
    file = sqlite_file(uri)
    try:
        folder = None if file is None else os.open(file.parent, os.O_RDONLY)
    except OSError:  # not ours to read
        folder = None
    try:
        if folder is not None:
            _lock(folder)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _lock(folder: int) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a file system without locks
        time.sleep(0.05)
