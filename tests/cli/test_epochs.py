"""Progress of one training on the screen, with a clock of the test."""

from __future__ import annotations

from typing import Any

import pytest

from raytrain.cli import train as shown
from raytrain.cli.train import Epochs
from raytrain.config.request import as_run
from raytrain.training.progress import StepProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_half_minute_says_loss_speed_and_what_is_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run: Any = as_run({"epochs": 10, "workers": 2})
    with Epochs() as epochs:
        for step in range(1, 14):
            clock[0] += 5.0
            loss = None if step < 10 else 1.5
            epochs.step(run, StepProgress(step / 100, 1, step, 64 * step, loss))
    assert capsys.readouterr().err.splitlines() == [
        # 64 images of each worker in five seconds.
        "epoch 1/10  26 images/s  6% of training  about 7:50 left",
        "epoch 1/10  loss 1.500  26 images/s  12% of training  about 7:20 left",
    ]


def test_nothing_is_said_of_what_is_left_before_two_percent(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Epochs() as epochs:
        for step in (1, 2):
            clock[0] += 31.0
            epochs.step(as_run({}), StepProgress(step / 1000, 1, step, 64 * step, None))
    assert "left" not in capsys.readouterr().err
