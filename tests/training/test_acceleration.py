"""Which mode of execution a run gets and why, and that compiled passes compute what plain ones do."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import ball_of, batch_of, equal, state_of, tensors, tiny_net, unchecked
from torch import Tensor, nn

from raytrain.algorithms import RECIPES, AbstractAlgorithm, FgsmRs, GradAlign, Pgd
from raytrain.config.request import as_run
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.network import FrozenNetwork
from raytrain.core.train_state import TrainState
from raytrain.data.loader import Splits, SplitShard, open_splits
from raytrain.data.sources import Source
from raytrain.models import Classifier, ModelSpec
from raytrain.outer import Engm
from raytrain.testing.algorithms import built
from raytrain.training.acceleration import execution
from raytrain.training.setup import build_model
from raytrain.training.trainer import fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITHOUT_DEFAULTS = {"nested"}

compiled = partial(torch.compile, backend="eager", fullgraph=True)


@pytest.fixture(scope="module")
def digits() -> Splits:
    return open_splits(as_run(None).data, DistributedContext())


def large(splits: Splits) -> Splits:
    """As many images as CIFAR-10, of which only the number is looked at."""
    return replace(splits, train=replace(splits.train, num_images=49_000))


@pytest.mark.parametrize(
    ("given", "device", "mode", "reason"),
    [
        ({}, CPU, "eager", "too short to compile"),
        ({"epochs": 3000}, CPU, "compile", "floating-point operations"),
        ({"epochs": 3000}, CUDA, "graph", "too short to compile"),
        ({"model": "resnet18", "epochs": 3000}, CUDA, "compile", "floating-point operations"),
        ({"model": "resnet18", "epochs": 1, "algorithm": "natural"}, CPU, "eager", "too short"),
        ({"epochs": 3000, "performance": "eager"}, CUDA, "eager", "as configured"),
        ({"performance": "graph"}, CUDA, "graph", "as configured"),
        ({"performance": {"mode": "compile"}}, CPU, "compile", "as configured"),
        ({"epochs": 3000, "workers": 2, "batch_size": 64}, CUDA, "graph", "too short"),
        (
            {"epochs": 9000, "model": f"{__name__}:dropout_net"},
            CUDA,
            "eager",
            "only where configured",
        ),
        (
            {"epochs": 9000, "model": f"{__name__}:dropout_net"},
            CPU,
            "eager",
            "only where configured",
        ),
    ],
)
def test_the_mode_follows_from_device_network_and_length(
    digits: Splits, given: dict[str, Any], device: torch.device, mode: str, reason: str
) -> None:
    run = as_run(given)
    chosen = execution(run, large(digits), device, build_model(run, digits.source))
    assert chosen.mode == mode and reason in chosen.reason


@pytest.mark.parametrize(
    "model",
    [
        {"name": "torchvision:googlenet", "kwargs": {"aux_logits": False, "init_weights": False}},
        {"name": "torchvision:regnet_y_400mf"},
    ],
    ids=lambda model: model["name"].partition(":")[2],
)
def test_the_length_of_a_run_is_that_of_its_own_network(model: dict[str, Any]) -> None:
    # One needs its arguments, the other cannot be made on torch's device without memory.
    run, splits = as_run({"model": model}), color_splits()
    assert execution(run, splits, CPU, build_model(run, splits.source)).mode == "eager"


def color_splits() -> Splits:
    """Two images of 3x32x32."""
    pixels, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2)
    part = SplitShard(pixels, labels, len(labels), DistributedContext())
    return Splits(part, part, Source("colors", 3, 32, ("a", "b"), (0.5,) * 3, (0.25,) * 3))


def test_what_is_asked_for_and_impossible_is_refused(digits: Splits) -> None:
    with pytest.raises(
        RequestError, match="performance.mode: graph needs a CUDA device; expected auto or eager"
    ):
        execution(as_run({"performance": "graph"}), digits, CPU, nn.Linear(1, 1))
    with pytest.raises(RequestError, match="performance.mode: graph needs a GPU; expected auto"):
        as_run({"performance": "graph", "device": "cpu"})
    with pytest.raises(RequestError, match="performance"):
        as_run({"performance": "fast"})


def steps(algorithm: AbstractAlgorithm, *, frozen: bool) -> tuple[TrainState, list[Tensor]]:
    """Three steps, of a compiled network if `frozen`."""
    torch._dynamo.reset()
    state = state_of(tiny_net(batch_norm=True), algorithm)
    if frozen:
        state.frozen = FrozenNetwork.of(state.model, compiled)
        state.compiled = compiled(state.model)
    found: list[Tensor] = []
    for seed in range(3):
        result = algorithm.step(state, batch_of(8, seed=seed))
        found += [result.losses, result.delta]
        state.step += 1
    return state, found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES.own.keys() - WITHOUT_DEFAULTS))
def test_compiled_passes_have_no_break_and_the_same_bits(name: str) -> None:
    algorithm = built(RECIPES[name].model_validate({}))
    (plain, wanted), (state, found) = (steps(algorithm, frozen=frozen) for frozen in (False, True))
    assert all(map(torch.equal, found, wanted))
    assert equal(state, plain) and state.meter == plain.meter
    ours, theirs = (
        dict(tensors({name: part.state_dict() for name, part in one.parts.items()}))
        for one in (state, plain)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    "algorithm",
    [
        built(GradAlign()),
        GradAlign().build(ball_of("linf"), Engm(tau=2, chunk=1)),
        Pgd(steps=1).build(ball_of("linf"), Engm(tau=2, chunk=1, probe_bn="train")),
    ],
    ids=["gradalign", "gradalign-engm", "engm-train"],
)
def test_a_pass_that_is_differentiated_twice_is_not_compiled(algorithm: AbstractAlgorithm) -> None:
    def once(module: nn.Module) -> Any:
        def call(images: Tensor) -> Tensor:
            return _DifferentiableOnce.apply(module(images))  # pyright: ignore[reportReturnType]

        return call

    state = state_of(tiny_net(batch_norm=True), algorithm)
    state.frozen, state.compiled = FrozenNetwork.of(state.model, once), once(state.model)
    for seed in range(2):
        algorithm.step(state, batch_of(8, seed=seed))


class _DifferentiableOnce(torch.autograd.Function):
    """The identity, whose gradient may be computed once and not be differentiated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.used = False
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert not ctx.used
        ctx.used = True
        return grad


@pytest.mark.parametrize("bn", ["eval", "train", "batch_nostat"])
def test_attacks_on_the_frozen_network_leave_flags_and_gradients_of_the_trained_one(
    bn: Any,
) -> None:
    algorithm = built(FgsmRs(attack_bn=bn))
    state = state_of(tiny_net(batch_norm=True), algorithm)
    state.frozen = FrozenNetwork.of(state.model, lambda module: module)
    flags = [module.training for module in state.model.modules()]
    oracle = state.oracle(batch_of(8), Pgd().cross_entropy(), bn)
    oracle.delta_grad(torch.zeros(8, 1, 8, 8, dtype=torch.float64))
    assert [module.training for module in state.model.modules()] == flags
    assert all(p.grad is None for p in state.model.parameters())
    assert not any(p.requires_grad for p in state.frozen.module.parameters())
    theirs = state.frozen.module.state_dict()
    for name, value in state.model.state_dict().items():  # running statistics too
        assert value.data_ptr() == theirs[name].data_ptr() and torch.equal(value, theirs[name])


def dropout_net(num_classes: int) -> nn.Module:
    conv, norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
    linear = nn.Linear(4 * 6 * 6, num_classes)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), linear)


@pytest.mark.slow
def test_a_compiled_run_trains_what_a_plain_one_trains_with_the_same_dropout() -> None:
    given = {
        "data": {"name": "digits", "train_size": 256},
        "model": f"{__name__}:dropout_net",
        "batch_size": 64,
        "epochs": 2,
        "algorithm": {"name": "pgd", "steps": 2, "start": "zero"},
        "evaluation": {"steps": 1},
        "precision": "fp64",
        "device": "cpu",
    }
    losses: dict[str, float] = {}
    for mode in ("eager", "compile"):
        with unchecked():
            *_, (report, state) = fit(as_run({**given, "performance": mode}), DistributedContext())
        losses[mode] = report.loss
        assert state.execution == f"{mode} (as configured)"
        assert report.images_per_second is not None and report.images_per_second > 0
    assert losses["compile"] == pytest.approx(losses["eager"], rel=1e-9)


@pytest.mark.parametrize("kind", ["raises", "differs"])
def test_a_network_that_does_not_compile_is_trained_as_it_is(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiler(module: nn.Module) -> Any:
        def call(images: Tensor) -> Tensor:
            if kind == "raises":
                raise RuntimeError("no such instruction\nand more")
            return 2 * module(images)

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    given = {"data": {"name": "digits", "train_size": 128}, "epochs": 1, "batch_size": 64}
    given |= {"evaluation": {"steps": 1}, "algorithm": "fgsm_rs", "device": "cpu"}
    found = {}
    for mode in ("compile", "eager"):
        *_, (report, state) = fit(as_run({**given, "performance": mode}), DistributedContext())
        found[mode] = report.loss
        assert state.execution.startswith("eager (")
    assert found["compile"] == found["eager"] and math.isfinite(found["eager"])
    reason = "no such instruction" if kind == "raises" else "computes something else"
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_the_networks_of_raytrain_compile_without_a_break_in_every_mode() -> None:
    for name in ("small_cnn", "preact_resnet18"):
        model = ModelSpec(name=name).build(3, 32, 10, (0.5,) * 3, (0.25,) * 3)
        assert isinstance(model, Classifier)
        frozen = FrozenNetwork.of(model, compiled)
        images = torch.rand(2, 3, 32, 32)
        for training in (False, True):
            frozen.module.train(training)
            torch._dynamo.reset()
            with unchecked():
                assert torch.equal(frozen.predict(images), frozen.module(images))
