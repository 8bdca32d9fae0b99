"""A sweep is continued by one driver at a time, also from another machine."""

from __future__ import annotations

import optuna
import pytest

from raytrain.core.errors import RequestError
from raytrain.tuning import launch
from raytrain.tuning.launch import SILENT, check_not_at_work, launched


def test_a_sweep_at_work_on_another_machine_is_refused_until_it_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = optuna.create_study()
    now, host = [1000.0], ["first"]
    monkeypatch.setattr(launch.time, "time", lambda: now[0])
    monkeypatch.setattr(launch.socket, "gethostname", lambda: host[0])
    check_not_at_work(study)
    with launched(study, 0.0):
        check_not_at_work(study)  # here the lock of the outbox decides
        host[0] = "second"
        trial = study.ask()
        trial.set_user_attr("last", {"time": 1100.0})
        now[0] = 1100.0 + SILENT - 1
        with pytest.raises(
            RequestError, match="^--resume: .* was at work on first 179 s ago; exp"
        ):
            check_not_at_work(study)
        now[0] += 1
        check_not_at_work(study)
        host[0] = "first"
    host[0], now[0] = "second", 1101.0
    check_not_at_work(study)  # it has ended
