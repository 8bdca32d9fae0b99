"""A store is checked without being changed: what a tracker would refuse is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain.core.errors import RequestError
from raytrain.core.files import check_folder
from raytrain.tracking import store_check
from raytrain.tracking.store_check import check_store


class Server:
    """An MLflow server with one experiment and one run."""

    def __init__(self, stage: str = "active") -> None:
        self.stage = stage

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(lifecycle_stage=self.stage) if name == "mine" else None

    def get_run(self, run_id: str) -> Any:
        stage = "active" if run_id == "a" * 32 else "deleted"
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage=stage))


def test_a_database_that_is_not_there_is_not_made(here: Path) -> None:
    check_store("sqlite:///new/folder/mlflow.db", "mine")
    assert list(here.iterdir()) == []
    with pytest.raises(RequestError, match="has no such run to continue"):
        check_store("sqlite:///new/folder/mlflow.db", "mine", "a" * 32)


def test_an_empty_file_is_a_new_database(here: Path) -> None:
    (here / "mlflow.db").touch()
    check_store("sqlite:///mlflow.db", "mine")
    assert (here / "mlflow.db").stat().st_size == 0


def test_a_database_below_a_file_is_refused(here: Path) -> None:
    (here / "file").touch()
    with pytest.raises(RequestError, match=r"^tracking_uri: .*cannot be used .*Not a directory"):
        check_store("sqlite:///file/mlflow.db", "mine")


def test_a_server_is_asked_for_the_experiment_and_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_check, "connect", lambda uri: Server())
    for run_id in (None, "a" * 32):
        check_store("http://host:5000", "mine", run_id)
        check_store("http://host:5000", "new", run_id)
    with pytest.raises(RequestError, match=f"{'b' * 32}: MLflow at http://host:5000 has no such"):
        check_store("http://host:5000", "mine", "b" * 32)
    monkeypatch.setattr(store_check, "connect", lambda uri: Server("deleted"))
    with pytest.raises(RequestError, match="^experiment: 'mine' was deleted"):
        check_store("http://host:5000", "mine")


def test_a_database_server_without_a_driver_or_an_answer_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^tracking_uri: ") as caught:
        check_store("postgresql://127.0.0.1:9/mlflow", "mine")
    assert "\n" not in str(caught.value)


def test_a_folder_can_be_made_where_the_nearest_one_can_be_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(here / "a" / "b")
    assert list(here.iterdir()) == []
    (here / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_folder(here / "file" / "b")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=str(here)):
        check_folder(here / "a" / "b")
