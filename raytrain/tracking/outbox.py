"""Durable queue of records for MLflow, as JSON lines in a file: a killed process loses none of them.

Its state is a file beside it: how far it was delivered, and the MLflow run of each handle.
Offsets count from the first record that was ever written; once everything is delivered the file
starts anew, and its header holds the offset. A lock on the file, held for the lifetime of
the process, distinguishes an outbox in use from an orphan.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain.core.console import log_line
from raytrain.core.files import write_atomically
from raytrain.tracking.outbox_state import Record, RunIndex

CHUNK = 1 << 18  # bytes read at once
_COMPACT = 1 << 22  # bytes after which a delivered outbox starts anew
_EVERYTHING = 1 << 62  # an offset behind all records
_LOOKED_AT = 0.05  # seconds, longer than `outbox_look` has the lock of a file that it looks at
_HELD_BACK = 1 << 23  # bytes kept in memory while the disk takes none


class OutboxBusy(Exception):
    """Another process writes to the outbox."""


class Outbox:
    """An outbox and its state, owned by this process until `close`.

    Raises:
        SpoolBusy: if it is another's.
        OSError: if the file cannot be made or read.
    """

    def __init__(self, file: Path, uri: str, experiment: str) -> None:
        self.file, self.lock = file, threading.Lock()
        self.uri, self.experiment = uri, experiment
        # Part of a filter of MLflow, which cannot quote all characters.
        folder = re.sub(r"[^\w.-]", "-", file.parent.name)
        self.key = f"{folder}-{secrets.token_hex(6)}"
        self.run_index, self.ids = RunIndex(), dict[str, str]()
        self.at = self.tried = 0  # delivered; perhaps delivered
        self.is_older = False  # a copy: MLflow may have more of its runs
        self.waiting = 0  # records that are not delivered
        self._left = b""
        self._fd = _locked(file)
        try:
            self._state = os.open(state_of(file), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            found = self._read_state()
            self._read_header(found)
            self._replay(found)
            if found and found.get("host") != socket.gethostname():
                self._note({"host": socket.gethostname()})
        except BaseException:
            os.close(self._fd)
            raise

    # ---------------------------------------------------------------- what callers do

    def append(self, record: Record) -> None:
        """Pass a record to the operating system. Never waits for MLflow, nor for the disk."""
        line = json.dumps(record).encode() + b"\n"
        with self.lock:
            self.run_index.apply(record)
            self.waiting += 1
            if len(self._left) + len(line) > _HELD_BACK:
                self.waiting -= 1
                return
            self._write(self._left + line)

    # ---------------------------------------------------------------- what the writer does

    def read(self) -> tuple[list[Record], int, int]:
        """The next records, the offset after them, and how many lines they were."""
        if self._left:
            with self.lock:
                self._write(self._left)
        size = CHUNK
        while True:
            data = os.pread(self._fd, size, self.at - self._base + self._start)
            whole = data.rfind(b"\n") + 1
            if whole or len(data) < size:
                break
            size *= 2
        lines = data[:whole].splitlines()
        found = map(parsed, lines)
        records = [record for record in found if record and "run" in record]
        return records, self.at + whole, len(lines)

    def trying(self, until: int) -> None:
        """What lies before `until` may be in MLflow, even if this process dies now."""
        if until > self.tried:
            self.tried = until
            self._note({"tried": until})

    def named(self, handle: str, run_id: str) -> None:
        """A handle has become a run; an empty id means that MLflow refused it."""
        self.ids[handle] = run_id
        self._note({"ids": {handle: run_id}})

    def delivered(self, until: int, lines: int) -> None:
        """What lies before `until` is in MLflow."""
        self._note({"at": until})
        with self.lock:
            self.at = until
            self.waiting -= lines

    def moved(self, uri: str, experiment: str) -> None:
        """From now on the records go to this store."""
        self.uri, self.experiment = uri, experiment
        self._note(self._identity())

    def compact(self, least: int = _COMPACT) -> None:
        """Start the file anew if everything in it is delivered and it has grown beyond `least`."""
        with self.lock:
            if self.at < self.end or self._left or self.end - self._base <= least:
                return
            # The state first: killed in between, the records that are still there are behind `at`.
            self._rewrite_state()
            os.ftruncate(self._fd, 0)
            self._write_header(self.at)

    def remove(self) -> None:
        """Delete the outbox: nothing in it is needed any more."""
        # In this order, since without its state an outbox would be delivered again.
        self.file.unlink(missing_ok=True)
        state_of(self.file).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; another process may then deliver the rest."""
        os.close(self._state)
        os.close(self._fd)

    # ---------------------------------------------------------------- within

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._fd, data)
        except OSError as error:  # a full disk must not end the training
            if not self._left:
                log_line(f"raytrain: {self.file}: {error.strerror}; records are kept in memory")
            written = 0
        self.end += written
        self._left = data[written:]

    def _note(self, line: dict[str, Any]) -> None:
        os.write(self._state, json.dumps(line).encode() + b"\n")

    def _identity(self) -> dict[str, Any]:
        identity = {"spool": self.key, "uri": self.uri, "experiment": self.experiment}
        return {**identity, "host": socket.gethostname()}

    def _read_state(self) -> dict[str, Any]:
        """The state file, its lines merged; empty if there is none."""
        _cut(self._state)
        found: dict[str, Any] = {}
        for line in lines_of(self._state, 0):
            noted = parsed(line) or {}
            self.ids.update(noted.pop("ids", {}))
            found.update(noted)
        self.uri = found.get("uri", self.uri)
        self.experiment = found.get("experiment", self.experiment)
        self.key = found.get("spool", self.key)
        self.at, self.tried = found.get("at", 0), found.get("tried", 0)
        return found

    def _read_header(self, state: dict[str, Any]) -> None:
        _cut(self._fd)
        first = next(lines_of(self._fd, 0), b"")
        header = parsed(first)
        if header is None:  # new, or killed while it began anew
            if not state:
                self._note(self._identity())
            os.ftruncate(self._fd, 0)
            self._write_header(self.at)
            return
        self.key, self._base, self._start = header["spool"], header["base"], len(first) + 1
        self.end = self._base + os.fstat(self._fd).st_size - self._start
        self.at = min(max(self.at, self._base), self.end)
        self.is_older = self.tried > self.end
        self.tried = min(self.tried, self.end)
        if not state:  # the state was lost: anything may be in MLflow
            self.uri, self.experiment = header["uri"], header["experiment"]
            self._note(self._identity())
            self.tried = self.end

    def _write_header(self, base: int) -> None:
        line = json.dumps({**self._identity(), "base": base}).encode() + b"\n"
        os.write(self._fd, line)
        self._base = self.end = base
        self._start = len(line)

    def _replay(self, state: dict[str, Any]) -> None:
        self.run_index.restore(state.get("runs", {}))
        offset = max(self._base, state.get("of", 0))
        for line in lines_of(self._fd, offset - self._base + self._start):
            record = parsed(line)
            if record is not None:
                self.run_index.apply(record)
            self.waiting += offset >= self.at
            offset += len(line) + 1

    def _rewrite_state(self) -> None:
        whole = {
            **self._identity(),
            "at": self.at,
            "tried": self.tried,
            "of": self.at,
            "runs": self.run_index.plain(),
            "ids": self.ids,
        }
        file = state_of(self.file)
        write_atomically(
            file, json.dumps(whole) + "\n", durable=False
        )  # under the lock of `append`
        os.close(self._state)
        self._state = os.open(file, os.O_RDWR | os.O_APPEND)


def state_of(file: Path) -> Path:
    """The state of an outbox."""
    return file.with_suffix(".state")


def mark_as_tried(file: Path) -> None:
    """Note that all records of an outbox may be in MLflow: for a copy that is older than its original."""
    with state_of(file).open("a") as state:
        state.write(json.dumps({"tried": _EVERYTHING}) + "\n")


def orphans(folder: Path, uri: str, experiment: str) -> Iterator[Outbox]:
    """The outboxes in `folder` that no process holds and that belong to this store."""
    for file in sorted(folder.glob("*.jsonl")):
        try:
            # A file without either is being created.
            if not any(_identified(each) for each in (file, state_of(file))):
                continue
            outbox = Outbox(file, uri, experiment)
        except (OutboxBusy, OSError, ValueError, KeyError):
            continue
        if (outbox.uri, outbox.experiment) == (uri, experiment):
            yield outbox
        else:
            outbox.close()


def _identified(file: Path) -> bool:
    if not file.exists():
        return False
    with file.open("rb") as lines:
        return "spool" in (parsed(lines.readline().rstrip(b"\n")) or {})


def _locked(file: Path) -> int:
    """The file, opened for appending, with the lock of its owner."""
    is_first = True
    while True:
        fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(fd)
                if not is_first:
                    raise OutboxBusy(str(file)) from None
                is_first = False
                time.sleep(_LOOKED_AT)
                continue
            # A file system without locks: it is taken on trust.
        try:
            if os.path.samestat(os.fstat(fd), os.stat(file)):
                return fd
        except FileNotFoundError:
            pass  # its last owner has just removed it
        os.close(fd)


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line as a record; None if it was not written to its end."""
    try:
        found = json.loads(line)
    except ValueError:  # torn
        return None
    return found if isinstance(found, dict) else None


def _cut(fd: int) -> None:
    """Drop a last line that was not written to its end."""
    size = end = os.fstat(fd).st_size
    while end > 0:
        begin = max(0, end - CHUNK)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < size:
        os.ftruncate(fd, end)


def lines_of(fd: int, offset: int) -> Iterator[bytes]:
    """The lines from `offset` on, without their ends, a chunk in memory at a time."""
    rest = b""
    while data := os.pread(fd, CHUNK, offset):
        offset += len(data)
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
