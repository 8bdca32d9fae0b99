"""The lines of a sweep where stderr is no terminal, with a clock of the test."""

from __future__ import annotations

import pytest

from raytrain.cli import tune as shown
from raytrain.cli.tune import Trials, plain
from raytrain.tuning.budget import Budget, Running, SweepProgress


def progress(finished: int, share: float) -> SweepProgress:
    running = (Running(finished, 3, share, None, {}), Running(finished + 1, 3, share, None, {}))
    outcomes = {"complete": finished}
    return SweepProgress(finished, Budget(trials=9), outcomes, 0, 0.0, 1.0, None, None, running)


def test_a_sweep_has_a_line_when_it_begins_per_trial_and_per_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    with Trials() as trials:
        for later, finished, share in [(0, 0, 0), (29, 0, 0.2), (31, 0, 0.4), (32, 1, 0.1)]:
            now[0] = 1000.0 + later
            trials(progress(finished, share))
    lines = capsys.readouterr().err.splitlines()
    assert "2 running (epoch 3, 0.0% of training)" in lines[0]
    assert "2 running (epoch 3, 40.0% of training)" in lines[1]
    assert lines[2].startswith("trial 1/9") and len(lines) == 3


def test_trials_in_different_epochs_are_shown_by_the_first_and_the_last() -> None:
    running = (Running(0, 1, 0.01, None, {}), Running(1, 4, 0.06, None, {}))
    shown_line = plain(SweepProgress(0, Budget(trials=9), {}, 0, 0.0, 1.0, None, None, running))
    assert "2 running (epochs 1 to 4, 3.5% of training)" in shown_line
