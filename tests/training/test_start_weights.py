"""Runs that start from weights of RobustBench: their network, average, checkpoint and contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.train_state import TrainState
from raytrain.models import ModelSpec, robustbench_state_dict
from raytrain.tracking.provenance import contract_of, parameters
from raytrain.training.checkpoint import LAST, load, save
from raytrain.training.setup import network, preflight, splits_of, start
from raytrain.training.trainer import fit

CONTEXT = DistributedContext()
MEAN, STD = (0.25,), (0.5,)


def theirs(folder: Path, classes: int = 10) -> tuple[Path, dict[str, Tensor]]:
    """A file of a network for digits, and the state dict in it."""
    torch.manual_seed(7)
    model = ModelSpec(name="wideresnet-10-1-silu").build(1, 8, classes, [0.0], [1.0])
    state = {key: value.clone() for key, value in robustbench_state_dict(model).items()}
    buffers = {"mean": torch.tensor(MEAN).view(1, 1, 1), "std": torch.tensor(STD).view(1, 1, 1)}
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in {**state, **buffers}.items()}},
        folder / "theirs.pt",
    )
    return folder / "theirs.pt", state


def run_of(path: Path | None = None, **changes: Any) -> RunConfig:
    """Four steps of plain gradient descent on 64 digits, one per epoch."""
    values = {
        "data": {"name": "digits", "train_size": 64, "validation": 60, "pad": 0},
        "model": "small_cnn" if path is None else f"robustbench:{path}",
        "algorithm": {"name": "pgd", "steps": 1},
        "optimizer": {"momentum": 0, "weight_decay": 0, "schedule": "constant"},
        "batch_size": 64,
        "epochs": 4,
        "evaluation": {"steps": 1},
        "device": "cpu",
    }
    return RunConfig.model_validate({**values, **changes})


def weights(state: TrainState, averaged: bool = False) -> Tensor:
    """All parameters as one row of numbers, in float64."""
    model = state.eval_model if averaged else state.model
    return torch.cat([weight.detach().double().flatten() for weight in model.parameters()])


def trajectory(run: RunConfig) -> tuple[list[Tensor], Tensor]:
    """The trained weights before the first step and after each, and the average at the end."""
    steps, average = [weights(start(run, splits_of(run, CONTEXT), CONTEXT))], None
    for _, state in fit(run, CONTEXT):
        steps.append(weights(state))
        average = weights(state, averaged=True)
    assert average is not None
    return steps, average


def averaged(steps: list[Tensor], decay: float) -> Tensor:
    """decay^T steps[0] + (1 - decay) sum_t decay^(T - t) steps[t], T the number of the last."""
    last = len(steps) - 1
    terms = [(1 - decay) * decay ** (last - t) * steps[t] for t in range(1, last + 1)]
    return decay**last * steps[0] + sum(terms)


def test_a_run_starts_from_the_weights_and_the_normaliser_of_the_file(tmp_path: Path) -> None:
    path, state = theirs(tmp_path)
    run = run_of(path, ema=0.9)
    preflight(run)
    begun = start(run, splits_of(run, CONTEXT), CONTEXT)
    for model in (begun.model, begun.eval_model):
        found = model.state_dict()
        for key, value in state.items():
            assert torch.equal(found[f"backbone.{key}"], value), key
        assert torch.equal(found["normalise.mean"].flatten(), torch.tensor(MEAN))
        assert torch.equal(found["normalise.std"].flatten(), torch.tensor(STD))


def test_the_average_begins_with_the_loaded_weights(tmp_path: Path) -> None:
    run = run_of(theirs(tmp_path)[0], ema=0.5)
    steps, average = trajectory(run)
    assert (average - averaged(steps, 0.5)).abs().max() < 1e-6 < (steps[0] - steps[-1]).abs().max()


def test_the_average_of_smoothed_training_is_that_of_its_weights_after_each_step() -> None:
    """Random weights are not in it: the first term is the weights after the first step."""
    smoothed = {"name": "pgd", "steps": 1, "label_smoothing": 0.1}
    run = run_of(algorithm=smoothed, ema=0.5)
    steps, average = trajectory(run)
    assert (average - averaged(steps[1:], 0.5)).abs().max() < 1e-6
    assert (average - averaged(steps, 0.5)).abs().max() > 1e-4
    without, last = trajectory(run_of(algorithm=smoothed))
    assert all(torch.equal(*both) for both in zip(steps, without, strict=True))
    assert torch.equal(last, without[-1])


def test_the_first_step_of_smoothed_training_is_down_the_gradient_of_the_smoothed_loss() -> None:
    """Of 0.9 (-log p_y) + 0.1 mean_k (-log p_k), without an attack."""
    natural = {"name": "pgd", "steps": 0, "start": "zero", "label_smoothing": 0.1}
    run = run_of(algorithm=natural, epochs=1, ema=0.5)
    splits = splits_of(run, CONTEXT)
    state = start(run, splits, CONTEXT)
    images, labels = splits.train.read(torch.arange(64)).float() / 255, splits.train.labels
    negative = -state.model.train()(images).log_softmax(1)
    own = negative.gather(1, labels[:, None])[:, 0]
    loss = (0.9 * own + 0.1 * negative.mean(1)).mean()
    grads = torch.autograd.grad(loss, list(state.model.parameters()))
    gradient = torch.cat([grad.double().flatten() for grad in grads])
    (first, second), average = trajectory(run)
    step = run.optimizer.lr * gradient
    assert (first - step - second).abs().max() < 1e-5 < 1e-3 < step.abs().max()
    assert torch.equal(average, second)


def test_a_checkpoint_needs_the_file_no_more(tmp_path: Path) -> None:
    path, _ = theirs(tmp_path)
    run = run_of(path, ema=0.9)
    rows = list(fit(run, CONTEXT))
    whole = weights(rows[-1][1])
    for report, state in fit(run, CONTEXT):
        if report.epoch == 2:
            save(state, run, tmp_path / LAST, CONTEXT)
            break
    path.unlink()
    saved = load(tmp_path / LAST)
    assert saved.run == run and saved.run.model.weights == path
    assert torch.equal(network(saved).state_dict()["normalise.mean"].flatten(), torch.tensor(MEAN))
    preflight(saved.run, resumed=True)
    resumed = list(fit(saved.run, CONTEXT, saved))
    assert torch.equal(weights(resumed[-1][1]), whole)
    with pytest.raises(RequestError, match="^model.weights: no such file"):
        preflight(saved.run)


def test_a_file_for_other_classes_is_refused_before_training(tmp_path: Path) -> None:
    path, _ = theirs(tmp_path, classes=7)
    with pytest.raises(
        RequestError, match="^model.weights: .* for 7 classes .*expected .* 10 classes"
    ):
        preflight(run_of(path))


def test_the_contract_has_the_normaliser_that_the_network_applies(tmp_path: Path) -> None:
    run = run_of(theirs(tmp_path)[0])
    assert "(mean 0.25, std 0.5)" in contract_of(run).text
    parameter = parameters(run)
    assert (parameter["model.mean"], parameter["model.weights"]) == (
        [0.25],
        str(run.model.weights),
    )
    plain = run_of()
    assert (contract_of(plain).hash, contract_of(plain).mean) == ("fcc75171", (0.3058,))
    assert not {"model.mean", "model.std", "model.weights"} & parameters(plain).keys()
    pixels = contract_of(run_of(model={"name": "small_cnn", "normalise": False}))
    assert (pixels.mean, pixels.std) == ((0.0,), (1.0,))
    assert pixels.text == "linf eps 0.1 in [0, 1], no normaliser, BatchNorm eval"
