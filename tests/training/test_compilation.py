"""What torch.compile did in a run, and that its seconds are no part of the speed of steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import unchecked
from torch import nn

from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.training import device_peak, trainer
from raytrain.training.checkpoint import load, restore, save
from raytrain.training.compilation import CompileCounter, Compiled
from raytrain.training.trainer import fit

HERE = DistributedContext()
FLOPS = 2 * 16 * 10  # of `linear_net`
FE = 7 * 128  # of an epoch: two gradients for the pixels, one for the weights


def linear_net(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))


def run_of(mode: str) -> RunConfig:
    """Two epochs of two steps."""
    return as_run(
        {
            "data": {"name": "digits", "train_size": 128, "validation": 60},
            "model": f"{__name__}:linear_net",
            "algorithm": {"name": "pgd", "steps": 2},
            "batch_size": 64,
            "epochs": 2,
            "evaluation": {"steps": 1},
            "performance": mode,
            "device": "cpu",
        }
    )


def rows_of(run: RunConfig) -> list[EpochMetrics]:
    return [report for report, _ in fit(run, HERE)]


def counted(report: EpochMetrics) -> tuple[str, float]:
    """What the tag says, and the seconds."""
    return report.tags()["execution"].partition("; ")[2], report.metrics()["cost/compile_seconds"]


@pytest.mark.slow
def test_a_second_run_of_the_same_shapes_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = {}
    for name in ("first", "in the same process", "in another process"):
        if name != "in the same process":
            torch._dynamo.reset()  # forgets what a new process does not know
        with unchecked():
            _, last = rows_of(run_of("compile"))
        found[name] = counted(last)
    assert {name: said for name, (said, _) in found.items()} == {
        "first": "graphs traced 2 (recompilations 1), passes compiled 4, loaded from disk 0",
        "in the same process": "graphs traced 0 (recompilations 0), passes compiled 0, loaded from disk 0",
        "in another process": "graphs traced 2 (recompilations 1), passes compiled 0, loaded from disk 4",
    }
    assert found["first"][1] > found["in another process"][1] > 0
    assert found["in the same process"][1] == 0


def test_a_run_that_compiles_nothing_says_nothing_of_it() -> None:
    for report in rows_of(run_of("eager")):
        assert report.tags()["execution"] == "eager (as configured)"
        assert report.metrics()["cost/compile_seconds"] == 0


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of 10 s, before the first of which compiling takes 3 s, and within it 4 s."""

    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 10

    clock, compiling = ticks(), iter([3.0, 3.0, 7.0, 7.0, 7.0])
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(
        CompileCounter, "read", lambda self: Compiled(0, 0, 0, 0, seconds=next(compiling))
    )


@pytest.mark.usefixtures("timed")
def test_compiling_is_a_part_of_the_seconds_and_none_of_the_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_peak, "name_of", lambda device: "NVIDIA A100-SXM4-80GB")
    first, second = (report.metrics() for report in rows_of(run_of("eager")))
    # Between two looks at the clock: 10 s.
    assert (first["cost/seconds"], second["cost/seconds"]) == (3 + 10, 3 + 10 + 10)
    assert (first["cost/compile_seconds"], second["cost/compile_seconds"]) == (7, 7)
    assert (first["cost/step_ms"], second["cost/step_ms"]) == (1e3 * 6 / 2, 1e3 * 10 / 2)
    assert first["cost/images_per_second"] == pytest.approx(128 / 6)
    assert first["cost/bf16_peak_share"] == pytest.approx(FE * FLOPS / 6 / 312e12)
    assert second["cost/bf16_peak_share"] == pytest.approx(FE * FLOPS / 10 / 312e12)


def test_the_seconds_of_compiling_go_on_after_a_checkpoint(tmp_path: Path) -> None:
    run, path = run_of("eager"), tmp_path / "last.pt"
    *_, (_, state) = fit(run, HERE)
    state.compile_seconds = 5.0
    save(state, run, path, HERE)
    state.compile_seconds = 0.0
    saved = load(path)
    restore(state, saved, HERE)
    assert state.compile_seconds == 5
    del saved.content["counters"]["compile_seconds"]  # as versions before this one wrote it
    restore(state, saved, HERE)
    assert state.compile_seconds == 0
