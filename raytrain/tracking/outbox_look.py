"""What an outbox holds, looked at by another process than its owner; nothing is written."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.tracking.outbox import lines_of, parsed, state_of


@dataclass(frozen=True)
class OutboxView:
    """An outbox at a moment."""

    file: Path
    held: bool | None  # whether a process has its lock; None on a file system without locks
    waiting: int  # records that are not delivered yet
    host: str | None  # the machine of its last owner
    uri: str | None  # of the store that they go to
    run_ids: frozenset[str]  # of the runs in it, as far as the store has made them
    changed: float  # seconds since 1970


def look_at(file: Path) -> OutboxView | None:
    """The outbox in a file; None if there is none."""
    try:
        opened = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        held, lines, times = _is_held(opened), lines_of(opened, 0), [os.fstat(opened).st_mtime]
        noted = _state(state_of(file))
        header = parsed(next(lines, b"")) or {}
        offset, at = header.get("base", 0), noted.get("at", 0)
        waiting, ids = 0, set(noted["ids"].values())
        for line in lines:
            waiting += offset >= at
            offset += len(line) + 1
            if b'"adopt"' in line:
                ids.add((parsed(line) or {}).get("id"))
    finally:
        os.close(opened)
    with suppress(OSError):
        times.append(state_of(file).stat().st_mtime)
    uri = noted.get("uri", header.get("uri"))
    host = noted.get("host")
    return OutboxView(file, held, waiting, host, uri, frozenset(filter(None, ids)), max(times))


def outboxes(folder: Path) -> Iterator[OutboxView]:
    """The outboxes in a folder."""
    for file in sorted(folder.glob("*.jsonl")):
        if (found := look_at(file)) is not None:
            yield found


def _state(file: Path) -> dict[str, Any]:
    """The state of an outbox, its lines merged."""
    found: dict[str, Any] = {}
    ids: dict[str, str] = {}
    with suppress(FileNotFoundError):
        for line in file.read_bytes().splitlines():
            noted = parsed(line) or {}
            ids.update(noted.pop("ids", {}))
            found.update(noted)
    return {**found, "ids": ids}


def _is_held(opened: int) -> bool | None:
    """Whether another process has the lock of a file: it is taken, shared, for a moment."""
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    fcntl.flock(opened, fcntl.LOCK_UN)
    return False
