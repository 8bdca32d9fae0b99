"""File systems behind URLs: pyarrow's, or those of fsspec where pyarrow has none."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError
from raytrain.core.signals import interrupted

T = TypeVar("T")

_TRIES = 6  # at an operation, 1, 2, 4, ... seconds apart
_LOOK = 0.25  # seconds between two looks at signals meanwhile
_SLOW = 3.0  # seconds after which a failure is said
_CONNECT, _SILENT = 3.0, 3.0  # seconds that S3 may take to connect, and between two bytes
_S3_TRIES = 2  # pyarrow's own, at each request
_GCS_TRIES = 15  # seconds of them
_CHUNK = 2**20  # bytes
_PYARROW = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "file")  # never by fsspec
# A user, and a password up to the last @, since it may have any character; a port is no password.
_PASSWORD = r"[^/?@:]*:(?!\d{2,5}([/?]|$)).*@"
_USER = re.compile(rf"({_PASSWORD}|[^/?:]*@)")
_OF_PYARROW = re.compile(r"^When .*?: (?=AWS Error)")  # what it did, at length
_TEMPORARY = re.compile(r"\..+\.\d+(\.[0-9a-f]+|\.pulled)?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class StorageError(OSError):
    """The storage cannot be read or written, or a file in it does not match its checksum."""


def is_url(text: object) -> bool:
    """Whether a value of `storage` is a URL and not the path of a folder."""
    return _URL.match(str(text)) is not None


def without_secrets(url: str) -> str:
    """The URL without its user, password and settings."""
    scheme, separator, rest = url.partition("://")
    user = _USER.match(rest)
    return scheme + separator + rest[user.end() if user else 0 :].partition("?")[0]


@lru_cache(maxsize=64)
def file_system(url: str, field: str = "storage") -> tuple[Any, str]:
    """The file system of a URL and the path in it: pyarrow's, or that of fsspec where pyarrow has none.

    Raises:
        RequestError: naming `field`, if neither has one, or if the URL has a password, which would be
            recorded with it.
    """
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    scheme, rest = urlsplit(url).scheme, url.partition("://")[2]
    if (
        not rest.strip("/")
        or "#" in rest
        or (scheme == "file" and ("?" in rest or rest[0] != "/"))
    ):
        raise RequestError(
            f"{field}: {without_secrets(url)} is not a URL of a folder; expected one such as "
            "s3://BUCKET/FOLDER or file:///FOLDER, with %23 for # and %3F for ?"
        )
    if re.match(_PASSWORD, rest):
        raise RequestError(
            f"{field}: the URL is recorded; expected one without a password or key, which belong in the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the like)"
        )
    try:
        fs, path = FileSystem.from_uri(url)
        return _with_time_limits(fs), path.rstrip("/")
    except (ValueError, NotImplementedError) as error:  # a scheme that it does not have
        reason = str(error).splitlines()[0]
    except OSError as error:  # a library is missing, or the bucket cannot be found
        raise RequestError(
            f"{field}: {without_secrets(url)} cannot be used ({reason_of(error)}); expected a storage that "
            "answers"
        ) from None
    try:
        if scheme in _PYARROW:
            raise ValueError(reason)
        from fsspec.core import url_to_fs

        other, path = url_to_fs(url)
        return PyFileSystem(FSSpecHandler(other)), path.rstrip("/")
    except Exception:  # fsspec's own, and those of the package it needs
        raise RequestError(
            f"{field}: no file system for {scheme}:// ({reason[:100]}); expected the path of a folder, or "
            "a URL such as s3://BUCKET/FOLDER, gs://, abfs:// or hdfs://"
        ) from None


def _with_time_limits(fs: Any) -> Any:
    """The same file system, whose requests end soon where nothing answers: no signal ends them."""
    import pyarrow.fs

    own: dict[str, Any]
    if fs.type_name == "s3":
        tries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_S3_TRIES)
        own = {"connect_timeout": _CONNECT, "request_timeout": _SILENT, "retry_strategy": tries}
    elif fs.type_name == "gcs":
        own = {"retry_time_limit": timedelta(seconds=_GCS_TRIES)}
    else:
        return fs
    [settings] = fs.__reduce__()[1]
    return type(fs)(**{**settings, **own})


def read(fs: Any, at: str) -> bytes:
    """The content of a file."""
    with fs.open_input_stream(at) as stream:
        return stream.read()


def write(fs: Any, at: str, content: Iterable[bytes]) -> None:
    """Write a file, which appears at `at` when it is whole.

    It is renamed for that, on object stores too: pyarrow completes an upload also after an exception.
    """
    folder, _, name = at.rpartition("/")
    fs.create_dir(folder, recursive=True)
    temporary = f"{folder}/.{name}.{os.getpid()}.{time.monotonic_ns():x}"
    with fs.open_output_stream(temporary) as stream:
        for chunk in content:
            stream.write(chunk)
    fs.move(temporary, at)


def is_temporary(name: str) -> bool:
    """Whether a file has the name of one that is being written: `.FILE.PID`, and more after that."""
    return _TEMPORARY.fullmatch(name) is not None


def download(fs: Any, at: str, file: Path) -> None:
    """Copy a file to this machine."""
    with fs.open_input_stream(at) as stream, file.open("wb") as target:
        shutil.copyfileobj(stream, target, _CHUNK)


def reason_of(error: Exception) -> str:
    """The message of an error in one line of at most 100 characters."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return _OF_PYARROW.sub("", text)[:100]


_away: set[str] = set()  # URLs that do not answer, which has been said


def retried(url: str, relative: str, operation: Callable[[Any, str], T]) -> T:
    """Carry out an operation on a file system and a path below a URL, again if it fails.

    After a signal it is tried once, and not at all if the storage did not answer before.

    Raises:
        FileNotFoundError: at once.
        StorageError: after the last try.
    """
    fs, base = file_system(url)
    at = base if relative == "." else f"{base}/{relative}"
    where = f"{without_secrets(url)}/{relative}"
    began = time.monotonic()
    for number in range(_TRIES):
        if interrupted() and url in _away:
            raise StorageError(None, f"{where}: no answer")
        try:
            found = operation(fs, at)
        except FileNotFoundError:
            _away.discard(url)
            raise
        except OSError as error:
            if number >= 2 or time.monotonic() - began > _SLOW:
                _say_away(url, error)
            if number + 1 == _TRIES or interrupted():
                raise StorageError(error.errno, f"{where}: {reason_of(error)}") from error
        else:
            _away.discard(url)
            return found
        _wait(2.0**number)
    raise AssertionError


def _say_away(url: str, error: OSError) -> None:
    if url not in _away:
        _away.add(url)
        log_line(
            f"raytrain: storage: {without_secrets(url)} does not answer ({reason_of(error)}); trying again"
        )


def _wait(seconds: float) -> None:
    """Sleep until a signal is received."""
    for _ in range(round(seconds / _LOOK)):
        if interrupted():
            return
        time.sleep(_LOOK)
