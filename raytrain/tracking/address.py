"""Which store a URI means, and which file a SQLite URL means.

In URLs `?` and `%` have a meaning that they do not have in the name of a folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from raytrain.config.names import check_text
from raytrain.core.errors import RequestError

_VARIABLE = "MLFLOW_TRACKING_URI"
_DEFAULT = "sqlite:///mlflow.db"
_WORDS = ("databricks", "databricks-uc", "uc")  # stores that have no scheme
_SQLITE = re.compile(
    r"(?P<driver>sqlite|sqlite\+pysqlite):///(?P<path>.*?)"
    r"(?P<settings>(?:\?\w+=[^/?&]*(?:&\w+=[^/?&]*)*)?)",
    re.DOTALL,
)
"""A URL of SQLAlchemy; what follows a `?` is part of the path unless it looks like settings."""


def tracking_uri(wanted: str | None) -> str:
    """The store in use: the configured one, else $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.

    A SQLite file is made absolute, since a relative one would be another file in every folder.

    Raises:
        RequestError: if it names no store.
    """
    named = {"tracking_uri": wanted, _VARIABLE: os.environ.get(_VARIABLE)}
    given = ((field, uri.strip()) for field, uri in named.items() if uri and uri.strip())
    field, uri = next(given, ("tracking_uri", _DEFAULT))
    if _scheme(uri) == "sqlite":
        return sqlite_uri(uri, field)
    if _scheme(uri) in ("", "file") and uri not in _WORDS:
        _check_folders_are_allowed(uri, field)
    return _lowered(uri)


def sqlite_uri(url: str, field: str) -> str:
    """A SQLite URL with its file made absolute, as `sqlite_file` reads it.

    `sqlite:///` is followed by a path as it is, `%` and `?` included; percent-encoded, as MLflow
    writes it, only where that file or its folder exists and the other does not. A URL of another
    driver than Python's own is returned as it is.

    Raises:
        RequestError: if it names no file.
    """
    url = _lowered(url)
    if not re.match(r"sqlite(\+pysqlite)?:", url):
        return url
    found = _SQLITE.fullmatch(url)
    path = "" if found is None else found["path"]
    if found is None or path in ("", ":memory:") or path.startswith("file:"):
        raise RequestError(
            f"{field}: {url!r} names no file; expected sqlite:/// and its path, such as "
            "sqlite:///mlflow.db or sqlite:////data/mlflow.db"
        )
    check_text(field, path)
    file = _meant(path) if found["driver"] == "sqlite" else Path(unquote(path))
    file = file if file.is_absolute() else file.resolve()
    check_text(field, str(file))
    return _url_of(file, found["settings"])


def sqlite_file(uri: str) -> Path | None:
    """The file of a URL that `tracking_uri` or `sqlite_uri` has returned; None for other stores."""
    found = _SQLITE.fullmatch(uri)
    if found is None:
        return None
    return Path(found["path"] if found["driver"] == "sqlite" else unquote(found["path"]))


def artifacts_beside(file: Path) -> str:
    """The URI of the folder that holds the artifacts of a SQLite store."""
    return (file.parent / "mlruns").as_uri()


def _url_of(file: Path, settings: str) -> str:
    quoted = str(file).replace("%", "%25").replace("?", "%3F")
    # SQLAlchemy decodes both spellings; MLflow makes the folder of `sqlite:///` without decoding.
    driver = "sqlite" if quoted == str(file) else "sqlite+pysqlite"
    return f"{driver}:///{quoted}{settings}"


def _meant(path: str) -> Path:
    both = Path(path), Path(unquote(path))
    files = [file for file in both if os.path.exists(file)]
    folders = [file for file in both if os.path.isdir(file.parent)]
    return (*files, *folders, *both)[0]


def _scheme(uri: str) -> str:
    """Without the driver: `postgresql` of `postgresql+psycopg://host/name`."""
    found = re.match(r"([A-Za-z][\w.-]*)(\+\w+)?:", uri)
    return "" if found is None else found[1].lower()


def _lowered(uri: str) -> str:
    """The URI with its scheme in lower case."""
    scheme, colon, rest = uri.partition(":")
    return f"{scheme.lower()}:{rest}" if colon and _scheme(uri) else uri


def _check_folders_are_allowed(uri: str, field: str) -> None:
    """Refuse a folder as a store where MLflow does."""
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise RequestError(
            f"{field}: {uri!r} is a path, and MLflow keeps no records in folders any more; expected "
            "sqlite:/// and the path of a database, or the address of a server, http://host:port"
        )
