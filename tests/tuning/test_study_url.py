"""A study in a database: the same trial manager as in a file, and one sentence where there is no database."""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import make_url
from sweep_helpers import FakeTracker, Store, row, space_of
from test_address import UGLY

from raytrain.core.errors import RequestError
from raytrain.tuning import study
from raytrain.tuning.fidelity import Fidelity
from raytrain.tuning.study import JOURNAL, SPACE, check_name, is_begun, new_name, open_study
from raytrain.tuning.trial_manager import TrialManager

SERVER = "RAYTRAIN_TEST_STUDY_URL"
"""A database that tests may write to, such as postgresql://me@host/name."""


@pytest.fixture(params=["sqlite", "server"])
def url(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    if request.param == "server" and SERVER not in os.environ:
        pytest.skip(f"{SERVER} is not set")
    opened, real = list[optuna.storages.RDBStorage](), study.open_database

    def kept(url: str) -> optuna.storages.RDBStorage:
        opened.append(real(url))
        return opened[-1]

    monkeypatch.setattr(study, "open_database", kept)
    file = f"sqlite:///{tmp_path / 'studies.db'}"
    yield file if request.param == "sqlite" else os.environ[SERVER]
    for storage in opened:
        storage.remove_session()
        storage.engine.dispose()


@pytest.fixture
def name() -> str:
    """Of a sweep that no other test has made: a server keeps them."""
    return f"s-{uuid.uuid4().hex[:8]}"


def driver(folder: Path, url: str, store: Store, resume: bool) -> TrialManager:
    """A driver of the sweep that `folder` is named after."""
    space = space_of()
    opened = open_study(folder.name, folder, space, space.hash(), resume, 4.0, url)
    fidelity = Fidelity.of(space.base_run, 10)
    return TrialManager(opened, space, FakeTracker(store), folder, fidelity)


def complete(manager: TrialManager, values: list[float], first: int = 1) -> None:
    """Train a trial that was begun as `x`, from epoch `first` on."""
    *before, last = enumerate(values, start=first)
    for epoch, value in before:
        manager.row("x", row(epoch, value))
    manager.end("x", row(*last, final=True), lost=False)


def test_a_sweep_in_a_database_goes_on_after_its_driver_died(
    tmp_path: Path, url: str, name: str
) -> None:
    folder, store = tmp_path / "experiment" / name, Store()
    first = driver(folder, url, store, resume=False)
    exact = [0.1, 1 / 3, 0.2 + 1e-16, 2 / 3]
    first.begin("x")
    complete(first, exact)
    first.begin("x")
    first.row("x", row(1, 0.1))
    first.row("x", row(2, float("nan")))
    was = [(t.number, t.params, t.values, t.intermediate_values) for t in first.history.trials()]

    again = driver(folder, url, store, resume=True)
    assert again.recover() == 1
    trials = again.history.trials()
    assert [(t.number, t.params, t.values) for t in trials[:1]] == [was[0][:3]]
    assert trials[0].value == exact[-1]
    assert list(trials[0].intermediate_values.values()) == exact
    resumed = again.begin("x")
    assert resumed is not None and resumed["job"].resume
    assert again.history.trials()[2].params == was[1][1]
    complete(again, [0.3, 0.4], first=3)
    for _ in range(2):
        again.begin("x")
        complete(again, [0.2] * 4)
    with pytest.raises(StopIteration):
        again.begin("x")
    done = [t for t in again.history.trials() if t.state == TrialState.COMPLETE]
    assert len(done) == 4 == len({t.params["optimizer.lr"] for t in done})
    assert store.rows == {f"t{n:04d}": [1, 2, 3, 4] for n in (0, 1, 3, 4)}
    assert set(store.status.values()) == {"FINISHED"}


def test_a_database_knows_which_sweeps_there_are(tmp_path: Path, url: str, name: str) -> None:
    folder = tmp_path / "experiment" / name
    with pytest.raises(RequestError, match=rf"^--resume: there is no sweep {name} in \w+://"):
        check_name(name, folder, True, url)
    check_name(name, folder, False, url)
    assert not folder.exists()
    assert not is_begun(name, folder, url)
    driver(folder, url, Store(), resume=False)
    check_name(name, folder, True, url)
    assert is_begun(name, folder, url)
    check_name(name, tmp_path / "other" / name, False, url)
    with pytest.raises(RequestError, match=rf"^--name: a sweep {name} exists; .*--resume {name}$"):
        check_name(name, folder, False, url)


@pytest.mark.parametrize("file", [JOURNAL, SPACE])
def test_a_folder_shows_that_a_sweep_was_begun(tmp_path: Path, file: str) -> None:
    assert not is_begun(tmp_path.name, tmp_path, None)
    (tmp_path / file).touch()
    assert is_begun(tmp_path.name, tmp_path, None)


def test_a_sweep_that_another_process_has_just_begun_is_not_joined(
    tmp_path: Path, url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(tmp_path / "one" / "experiment" / name, url, Store(), resume=False)
    monkeypatch.setattr(optuna, "get_all_study_names", lambda _: [])  # as it was a moment ago
    with pytest.raises(RequestError, match=rf"^--name: a sweep {name} exists; .*--resume {name}$"):
        driver(tmp_path / "two" / "experiment" / name, url, Store(), resume=False)


def test_a_study_lies_in_a_folder_whose_name_means_something_in_addresses(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / UGLY).mkdir()
    monkeypatch.chdir(tmp_path / UGLY)
    folder = tmp_path / "experiment" / name
    relative, absolute = "sqlite:///s.db", f"SQLITE:///{tmp_path / UGLY}/s.db"
    driver(folder, relative, Store(), resume=False)
    check_name(name, folder, True, absolute)
    place = re.escape(f"sqlite:///{tmp_path / UGLY}/s.db")
    with pytest.raises(RequestError, match=rf"^--resume: there is no sweep x in {place}$"):
        check_name("x", folder.with_name("x"), True, absolute)
    assert os.listdir(tmp_path / UGLY) == ["s.db"]
    assert sorted(os.listdir(tmp_path)) == sorted(["experiment", UGLY])


def test_a_name_is_refused_that_a_database_keeps_only_a_part_of(tmp_path: Path, url: str) -> None:
    folder = tmp_path / ("e" * 255)
    check_name("x" * 121, folder / ("x" * 121), False, url)
    with pytest.raises(RequestError, match=r"^--name: .* too long .*; expected 1 fewer$"):
        check_name("x" * 122, folder / ("x" * 122), False, url)
    check_name("x" * 250, folder / ("x" * 250), False, None)


def test_sweeps_that_begin_in_the_same_second_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.time, "strftime", lambda _: "20261121-093000")
    with new_name("s", tmp_path / "e") as first, new_name("s", tmp_path / "e") as second:
        assert (first, second) == ("s-20261121-093000", "s-20261121-093000-2")
        (tmp_path / "e" / first / JOURNAL).touch()
    assert os.listdir(tmp_path / "e") == [first]


# --- where there is none ----------------------------------------------------------------------


def refusal(url: str) -> str:
    with pytest.raises(RequestError) as error:
        check_name("s", Path("experiment") / "s", False, url)
    said = str(error.value)
    assert "\n" not in said and "secret" not in said and said.startswith("study: ")
    return said


@pytest.mark.parametrize(
    ("url", "driver", "extra"),
    [
        ("postgresql://me@host/name", "psycopg", "postgresql"),
        ("postgresql+psycopg://me@host/name", "psycopg", "postgresql"),
        ("mysql://me@host/name", "pymysql", "mysql"),
        ("mariadb://me@host/name", "pymysql", "mysql"),
    ],
)
def test_a_driver_that_is_not_installed_is_named_by_its_extra(
    url: str, driver: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    said = refusal(f"{url}?passfile=secret")
    assert f"the extra {extra}: uv pip install -e '.[{extra}]'" in said
    assert f"{url.partition('://')[0]}://host/name needs" in said


def test_a_driver_that_is_no_extra_is_the_business_of_whoever_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    assert "SQLAlchemy uses for mysql+mysqldb" in refusal("mysql+mysqldb://me:secret@host/name")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense://me:secret@host/name", "nonsense"),
        ("no url", "Could not parse"),
        ("sqlite:////no/such/folder/s.db?timeout=1", "unable to open database file"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_in_one_sentence(url: str, reason: str) -> None:
    said = refusal(url)
    assert reason in said and "such as postgresql://host/name" in said


def test_what_a_driver_says_comes_without_what_sqlalchemy_adds() -> None:
    said = refusal("sqlite:////no/such/folder/s.db")
    assert "(unable to open database file)" in said and "sqlite3." not in said


def test_a_server_that_asks_for_another_password_is_told_from_one_that_is_away() -> None:
    if SERVER not in os.environ:
        pytest.skip(f"{SERVER} is not set")
    base = make_url(os.environ[SERVER])
    wrong = base.set(username="nobody", query={}).render_as_string(hide_password=False)
    away = base.set(port=1, query={}).render_as_string(hide_password=False)
    assert refusal(wrong).partition("(")[2] != refusal(away).partition("(")[2]
