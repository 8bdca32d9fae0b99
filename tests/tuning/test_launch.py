"""A sweep is continued by one driver at a time, also from another machine."""

from __future__ import annotations

import optuna
import pytest

from raytrain.core.errors import RequestError
from raytrain.tuning import launch
from raytrain.tuning.launch import SILENT, Launch, launched, wait_until_free


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock; sleeping moves it."""
    clock = [1000.0]
    monkeypatch.setattr(launch.time, "time", lambda: clock[0])
    monkeypatch.setattr(
        launch.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )
    return clock


def on(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.socket, "gethostname", lambda: host)


def test_a_sweep_at_work_on_another_machine_is_refused_until_it_is_silent_or_has_ended(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study()
    wait_until_free(lambda: None, patient=False)
    wait_until_free(lambda: study, patient=False)
    on("first", monkeypatch)
    with launched(study, 0.0):
        wait_until_free(lambda: study, patient=False)  # here the lock of the outbox decides
        on("second", monkeypatch)
        now[0] += SILENT - 1
        with pytest.raises(
            RequestError, match="^--resume: .* at work on first 179 s ago; expected"
        ):
            wait_until_free(lambda: study, patient=False)
        now[0] += 1
        wait_until_free(lambda: study, patient=False)
        now[0] -= SILENT
    wait_until_free(lambda: study, patient=False)  # it has ended


def test_a_killed_driver_is_waited_for_where_that_is_wanted(
    now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = optuna.create_study()
    study.set_user_attr("launch", {"host": "first", "began": 0.0, "seen": 1000.0})
    on("second", monkeypatch)
    wait_until_free(lambda: study, patient=True)
    assert now[0] == 1000 + SILENT
    assert capsys.readouterr().err.count("waiting until that has ended") == 1


def test_a_driver_records_that_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_BEAT", 0.001)
    study = optuna.create_study()
    with launched(study, 0.5):
        while (found := Launch.of(study)) is None or found.seen is None:
            pass
        assert found.seen >= found.began and (found.used, found.ended) == (0.5, None)
    found = Launch.of(study)
    assert found is not None and (found.how, found.ended is None) == ("finished", False)
