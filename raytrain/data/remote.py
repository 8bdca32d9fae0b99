"""Parquet files behind a URL: a copy of them on this machine, for all its processes."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from raytrain.core.errors import RequestError
from raytrain.core.file_systems import download, file_system, reason_of, without_secrets
from raytrain.core.files import locked
from raytrain.core.storage import cache_folder

SUFFIX = ".parquet"


def local_copy(url: str, field: str = "data.name") -> Path:
    """The file or folder of a URL on this machine, with the Parquet files beside the file.

    A file is brought again if its size or its time has changed; processes that begin together bring it
    once.

    Raises:
        RequestError: naming `field`, if it cannot be read.
    """
    url = url.rstrip("/")
    parent, _, name = url.partition("?")[0].rpartition("/")
    is_file = name.endswith(SUFFIX)
    try:
        fs, at = file_system(url, field)
        root, local = (at.rpartition("/")[0], parent) if is_file else (at, url)
        folder = cache_folder() / "data" / _name_of(local)
        files = _listed(fs, root, recursive=not is_file)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            for info in files:
                _bring(fs, info, folder / info.path[len(root) :].lstrip("/"))
    except OSError as error:
        raise RequestError(
            f"{field}: {without_secrets(url)} cannot be read ({reason_of(error)}); expected a Parquet file "
            "or a folder of them"
        ) from None
    return folder / PurePosixPath(at).name if is_file else folder


def _name_of(url: str) -> str:
    shown = re.sub(r"[^\w.-]+", "-", without_secrets(url))[-60:].strip("-")
    return f"{shown}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def _listed(fs: Any, root: str, recursive: bool) -> list[Any]:
    from pyarrow.fs import FileSelector, FileType

    infos = fs.get_file_info(FileSelector(root, recursive=recursive))
    files = [info for info in infos if info.type == FileType.File and info.path.endswith(SUFFIX)]
    return [info for info in files if "/." not in info.path[len(root) :]]


def _bring(fs: Any, info: Any, file: Path) -> None:
    record = file.with_name(f".{file.name}.origin")
    origin = f"{info.size} {info.mtime_ns}"
    if file.is_file() and record.is_file() and record.read_text() == origin:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        download(fs, info.path, temporary)
        record.unlink(missing_ok=True)
        temporary.replace(file)
        record.write_text(origin)
    finally:
        temporary.unlink(missing_ok=True)
