"""File systems behind URLs: pyarrow's, or those of fsspec where pyarrow has none."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError

T = TypeVar("T")

_TRIES = 6  # at an operation, 1, 2, 4, ... seconds apart
_CHUNK = 2**20  # bytes
_PYARROW = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "file")  # never by fsspec
# A user, and a password up to the last @, since it may have any character; a port is no password.
_PASSWORD = r"[^/?@:]*:(?!\d{2,5}([/?]|$)).*@"
_USER = re.compile(rf"({_PASSWORD}|[^/?:]*@)")
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
        return fs, path.rstrip("/")
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


def download(fs: Any, at: str, file: Path) -> None:
    """Copy a file to this machine."""
    with fs.open_input_stream(at) as stream, file.open("wb") as target:
        shutil.copyfileobj(stream, target, _CHUNK)


def reason_of(error: Exception) -> str:
    """The message of an error in one line of at most 100 characters."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:100]


def retried(url: str, relative: str, operation: Callable[[Any, str], T]) -> T:
    """Carry out an operation on a file system and a path below a URL, again if it fails.

    Raises:
        FileNotFoundError: at once.
        StorageError: after the last try.
    """
    fs, base = file_system(url)
    at = base if relative == "." else f"{base}/{relative}"
    for number in range(_TRIES):
        try:
            return operation(fs, at)
        except FileNotFoundError:
            raise
        except OSError as error:
            if number + 1 == _TRIES:
                where = f"{without_secrets(url)}/{relative}"
                raise StorageError(error.errno, f"{where}: {reason_of(error)}") from error
            if number == 2:
                log_line(
                    f"raytrain: storage: {without_secrets(url)} does not answer ({reason_of(error)}); "
                    "trying again"
                )
        time.sleep(2**number)
    raise AssertionError
