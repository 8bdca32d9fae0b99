"""A store is where its address says, whatever the folders are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytrain.cli.common import open_ui
from raytrain.core.errors import RequestError
from raytrain.tracking import sqlite_file, sqlite_uri, tracking_uri

UGLY = "we ird #1?x=2%20é&;y+@:[z]'\"$%25{b}"
"""A folder's name with every character that means something in an address."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "part", [UGLY, "plain", "a%20b", "a?b", "100%", "a?b=c", "?", "%3F", "a b "]
)
def test_a_path_after_sqlite_is_the_path(part: str, here: Path) -> None:
    (here / part).mkdir()
    wanted = here / part / "x.db"
    for given in (f"sqlite:///{part}/x.db", f"sqlite:///{wanted}", f"SQLite:///{wanted} "):
        uri = tracking_uri(given)
        assert sqlite_file(uri) == wanted
        assert tracking_uri(uri) == uri == sqlite_uri(uri, "study")


@pytest.mark.parametrize("part", [UGLY, "a%20b", "a?b"])
def test_sqlalchemy_finds_the_same_file(part: str, here: Path) -> None:
    from sqlalchemy import make_url

    assert make_url(tracking_uri(f"sqlite:///{part}/x.db")).database == str(here / part / "x.db")


def test_the_default_is_a_file_in_a_folder_of_any_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / UGLY).mkdir()
    monkeypatch.chdir(here / UGLY)
    assert sqlite_file(tracking_uri(None)) == here / UGLY / "mlflow.db"


def test_an_ordinary_path_makes_an_ordinary_address(here: Path) -> None:
    assert tracking_uri("sqlite:///a b/é#.db") == f"sqlite:///{here}/a b/é#.db"
    assert tracking_uri("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"


def test_percent_encoding_means_the_file_or_folder_that_is_there(here: Path) -> None:
    (here / "my project").mkdir()
    decoded, written = here / "my project" / "x.db", here / "my%20project" / "x.db"
    uri = "sqlite:///my%20project/x.db"
    assert sqlite_file(tracking_uri(uri)) == decoded
    written.parent.mkdir()
    assert sqlite_file(tracking_uri(uri)) == written
    decoded.touch()
    assert sqlite_file(tracking_uri(uri)) == decoded
    written.touch()
    assert sqlite_file(tracking_uri(uri)) == written
    assert sqlite_file(tracking_uri("sqlite:///no%20folder/x.db")) == here / "no%20folder" / "x.db"


@pytest.mark.parametrize("settings", ["?timeout=60", "?timeout=60&check_same_thread=false"])
def test_settings_are_no_part_of_the_file(settings: str, here: Path) -> None:
    uri = tracking_uri(f"sqlite:///x.db{settings}")
    assert uri == f"sqlite:///{here}/x.db{settings}"
    assert sqlite_file(uri) == here / "x.db"


@pytest.mark.parametrize(
    "uri",
    [
        *("sqlite:", "sqlite:x.db", "sqlite:/x.db", "sqlite://x.db", "sqlite://", "sqlite:///"),
        *("sqlite:///:memory:", "sqlite:///file:/tmp/x.db?uri=true", "sqlite:///a\0b.db"),
        *("sqlite+pysqlite://", "sqlite:///?timeout=60"),
    ],
)
@pytest.mark.parametrize("field", ["tracking_uri", "study"])
def test_an_address_without_a_file_is_refused(uri: str, field: str) -> None:
    with pytest.raises(RequestError, match=rf"^{field}: .*expected ") as caught:
        sqlite_uri(uri, field)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "/tmp/x", "mlflow.db", "file:///tmp/x", "FILE:x"]
)
def test_a_path_is_no_store(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"^tracking_uri: .* is a path, .*expected sqlite:///"):
        tracking_uri(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(RequestError, match=r"^MLFLOW_TRACKING_URI: .* is a path"):
        tracking_uri(None)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert tracking_uri(None).lower() == uri.lower()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (" http://host:5000 \n", "http://host:5000"),
        ("HTTPS://Host/Path", "https://Host/Path"),
        ("PostgreSQL+psycopg://Me@h/N?x=#%20", "postgresql+psycopg://Me@h/N?x=#%20"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_other_addresses_stay_what_they_are_but_for_the_case_of_their_scheme(
    given: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(given) == wanted
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri(None) == tracking_uri("  ") == wanted
    assert sqlite_file(wanted) is None


def test_the_command_that_opens_the_ui_leads_to_the_store(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    for folder in (here / "other", here / UGLY):
        words = shlex.split(open_ui(tracking_uri(f"sqlite:///{folder}/mlflow.db"), "a b", "#/x"))
        assert words[:4] == ["raytrain", "ui", "a b", "--uri"]
        assert sqlite_file(tracking_uri(words[4])) == folder / "mlflow.db"
    assert open_ui(tracking_uri(None), "s", "#/x") == "raytrain ui s"
    assert open_ui("http://host:5000/", "s", "#/x") == "http://host:5000/#/x"
