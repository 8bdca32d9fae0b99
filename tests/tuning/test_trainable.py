"""Slots: processes that outlive trials, and forget them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytrain.config.request import as_run
from raytrain.core.epoch_metrics import TIMED
from raytrain.distributed.jobs import Job
from raytrain.tuning import trainable
from raytrain.tuning.trainable import SingleTrainable


def breaking_net(num_classes: int) -> nn.Module:
    """Changes its process, then fails."""
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(99)
    raise RuntimeError(f"no network for {num_classes} classes")


class OnABrokenDevice(nn.Module):
    """Fails as CUDA does in the steps of training, but not in checks on three images at most."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return self.layers(x)


RUN: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 128, "validation": 60},
    "model": "small_cnn",
    "algorithm": {"name": "pgd", "steps": 1, "start": "remembered"},
    "epochs": 2,
    "batch_size": 64,
    "evaluation": {"steps": 1},
    "device": "cpu",
}


def job_of(
    folder: Path, until: float = 1.0, resume: bool = False, **changes: Any
) -> dict[str, Any]:
    return {"job": Job.of(as_run({**RUN, **changes}), folder, resume, until)}


def rows(slot: SingleTrainable, config: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole trial, its clock left out."""
    assert slot.reset_config(config)
    told = []
    while not told or not told[-1]["done"]:
        told.append(slot.step())
        metrics = json.loads(told[-1]["metrics"])
        for name in TIMED:
            metrics.pop(name, None)
        told[-1]["metrics"] = metrics
    return told


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[SingleTrainable]:
    slot = SingleTrainable(job_of(tmp_path / "first"))
    yield slot
    slot.cleanup()


@pytest.mark.parametrize(
    ("bad", "outcome"),
    [
        ({"model": f"{__name__}:breaking_net"}, "failed"),
        ({"optimizer": {"lr": 1e9}}, "diverged"),
        ({"precision": "fp64"}, None),
    ],
    ids=["raises", "diverges", "float64"],
)
@pytest.mark.slow
def test_a_trial_is_the_same_whatever_its_process_did_before(
    slot: SingleTrainable, bad: dict[str, Any], outcome: str | None, tmp_path: Path
) -> None:
    wanted = rows(slot, job_of(tmp_path / "a"))
    assert [row["final"] for row in wanted] == [False, True]
    told = rows(slot, job_of(tmp_path / "bad", **bad))
    assert {"failed", "diverged"} & set(told[-1]) == {outcome} - {None}
    assert told[-1]["done"] and told[-1]["final"] == (outcome is None)
    assert rows(slot, job_of(tmp_path / "b")) == wanted


def test_the_reason_of_a_failure_says_where(slot: SingleTrainable, tmp_path: Path) -> None:
    told = rows(slot, job_of(tmp_path / "bad", model=f"{__name__}:breaking_net"))
    assert "no network for 10 classes" in told[-1]["failed"]


def test_a_trial_pauses_where_it_was_told_to_and_goes_on_there(
    slot: SingleTrainable, tmp_path: Path
) -> None:
    wanted = rows(slot, job_of(tmp_path / "whole", epochs=3))
    first = rows(slot, job_of(tmp_path / "parts", until=0.3, epochs=3))
    assert [row["epoch"] for row in first] == [1] and not first[0]["final"]
    rest = rows(slot, job_of(tmp_path / "parts", resume=True, epochs=3))
    assert [row["epoch"] for row in rest] == [1, 2, 3], (
        "the row up to its checkpoint is told again"
    )
    assert [row["metrics"] for row in rest] == [row["metrics"] for row in wanted]


def test_a_trial_resumed_after_its_end_tells_its_rows_again(
    slot: SingleTrainable, tmp_path: Path
) -> None:
    wanted = rows(slot, job_of(tmp_path / "a"))
    assert rows(slot, job_of(tmp_path / "a", resume=True)) == wanted


def test_a_process_whose_device_is_broken_is_given_up(
    slot: SingleTrainable, tmp_path: Path
) -> None:
    assert slot.reset_config(job_of(tmp_path / "a", model=f"{__name__}:OnABrokenDevice"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        slot.step()


def test_the_first_step_of_a_trial_is_sent_and_no_more_than_one_a_second(
    slot: SingleTrainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, str, float]] = []

    class Writer:
        def __init__(self, name: str) -> None:
            self.name = name

        def put(self, trial: str, step: tuple[float, float | None]) -> None:
            sent.append((self.name, trial, step[0]))

    monkeypatch.setattr(trainable, "TrialStepsWriter", Writer)
    monkeypatch.setattr(trainable, "SECONDS_BETWEEN_STEPS", 1e9)
    rows(slot, {**job_of(tmp_path / "a"), "steps": "board"})
    rows(slot, {**job_of(tmp_path / "b"), "steps": "board"})
    # Two epochs of two steps: the middle of the first step is an eighth of training.
    assert sent == [("board", slot.trial_id, 1 / 8)] * 2
