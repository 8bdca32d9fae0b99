"""A working copy of a storage: which of its files are as they are in the storage, and how they get there.

Beside every file the storage has `FILE.sha256`, with the digest of the file and those of versions before
it, so that an upload that was cut off and a file that was damaged are recognised. Of checkpoints the
version before the last is kept as `FILE.previous`, and is used if the last one is damaged.

Where both a file and its copy have changed, the storage is right: its writer has taken over.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from raytrain.core.console import log_line
from raytrain.core.file_systems import (
    StorageError,
    download,
    file_system,
    is_temporary,
    read,
    retried,
    without_secrets,
    write,
)

T = TypeVar("T")

_SYNCED = ".synced"  # ending of the folder beside the root: digests of files when they were last the same
_DIGEST, _PREVIOUS = ".sha256", ".previous"
_KEPT = (".pt",)  # suffixes of files whose version before the last is kept
_KNOWN = 8  # digests in FILE.sha256
_CHUNK = 2**20  # bytes


@dataclass(frozen=True)
class WorkingCopy:
    """A folder on this machine, and the URL that it is a copy of."""

    root: Path
    url: str

    def relative(self, path: Path) -> str:
        """A path below the root, with slashes."""
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
            synced = self._synced(relative)[0]
            if digest != synced:
                before = self._digests(relative)
                if synced and not {*before[:1]} <= {digest, synced, *self._claimed(relative)}:
                    return  # another machine has written since, and taken over
                self._upload(content, size, digest, before, relative)
        self._set_synced(relative, digest, _stamp(status), digest)

    def _upload(
        self, content: BinaryIO, size: int, digest: str, before: list[str], relative: str
    ) -> None:
        """Write a file of the storage, its checksum first."""
        if digest not in before[:1]:
            self._set_synced(
                relative, *self._synced(relative), *self._claimed(relative)[-_KNOWN:], digest
            )
            if before and relative.endswith(_KEPT):
                with suppress(FileNotFoundError):  # it was deleted, or never written
                    self._retried(lambda fs, at: fs.copy_file(at, at + _PREVIOUS), relative)
            # Of several: each upload since the last whole one may have been cut off.
            known = "".join(f"{one}\n" for one in [digest, *before][:_KNOWN])
            self._retried(lambda fs, at: write(fs, at, [known.encode()]), relative + _DIGEST)
        self._retried(lambda fs, at: write(fs, at, _chunks(content, size)), relative)

    def pull(self, relative: str) -> None:
        """Bring a file from the storage, unless the one here is the same or newer.

        A file without a checksum was not written by `push`, and is left out.
        """
        file = self.root / relative
        digests = self._digests(relative)
        if not digests:
            return
        if file.is_file():
            here, synced = _digest(file), self._synced(relative)[0]
            is_own = {*digests[:1]} <= {synced, *self._claimed(relative)}
            if here in digests[:1] or (here != synced and is_own):
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
                self._set_synced(relative, found, _stamp(file.stat()), digests[0])
                return
        raise StorageError(
            None,
            f"{without_secrets(self.url)}/{relative} does not match its checksum, and there is no sound "
            "version before it",
        )

    def listed(self, path: Path) -> list[str]:
        """The files in the storage at or below a path, relative to the root."""
        inside = [PurePosixPath(name) for name, _ in self._infos(path)]
        return [
            str(file)
            for file in inside
            if file.suffix not in (_DIGEST, _PREVIOUS) and not file.name.startswith(".")
        ]

    def tidy(self, folder: Path, before: float) -> None:
        """Delete the temporary files in the storage below a folder that are older than a moment."""
        for name, info in self._infos(folder):
            is_old = info.mtime_ns is not None and info.mtime_ns / 1e9 < before
            if is_old and is_temporary(PurePosixPath(name).name):
                with suppress(FileNotFoundError):
                    self._retried(lambda fs, at: fs.delete_file(at), name)

    def _infos(self, path: Path) -> list[tuple[str, Any]]:
        """The files in the storage at or below a path, by path relative to the root."""
        from pyarrow.fs import FileSelector, FileType

        def found(fs: Any, at: str) -> list[Any]:
            [info] = fs.get_file_info([at])
            if info.type == FileType.File:
                return [info]
            return fs.get_file_info(FileSelector(at, recursive=True, allow_not_found=True))

        infos = self._retried(found, self.relative(path))
        _, base = file_system(self.url)
        files = [info for info in infos if info.type == FileType.File]
        return [(info.path[len(base) :].lstrip("/"), info) for info in files]

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
            return self._retried(read, relative + _DIGEST).decode().split()
        except FileNotFoundError:
            return []

    def _fetch(self, source: str, file: Path, digests: list[str]) -> str | None:
        """Bring a file; return its digest, or None (and leave the one here) if that is not known."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.pulled")
        try:
            self._retried(lambda fs, at: download(fs, at, temporary), source)
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
        digest, stamp, *_ = self._noted(relative)
        return digest, stamp

    def _claimed(self, relative: str) -> list[str]:
        """The digests that the storage's checksum may begin with since then: of uploads that were cut off."""
        return self._noted(relative)[2:]

    def _noted(self, relative: str) -> list[str]:
        with suppress(OSError):
            return self._record(relative).read_text().split(" ")
        return ["", ""]

    def _set_synced(self, relative: str, digest: str, stamp: str, *claimed: str) -> None:
        file = self._record(relative)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(" ".join((digest, stamp, *claimed)))
        temporary.replace(file)

    def _retried(self, operation: Callable[[Any, str], T], relative: str) -> T:
        return retried(self.url, relative, operation)


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}:{status.st_size}"


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
