"""A network is tried before it is trained: what training and evaluation need, and no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import same
from torch import Tensor, nn
from torch.nn.functional import dropout, one_hot

from raytrain.attacks.autoattack.counted_model import CountedModel
from raytrain.config.run import RunConfig
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.models import Classifier, ModelSpec
from raytrain.training.checkpoint import Saved
from raytrain.training.setup import network, preflight
from raytrain.training.trainer import fit


class Net(nn.Module):
    """A convolution and a linear layer for 8x8 images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.linear = nn.Linear(3 * 64, num_classes)

    def forward(self, x: Tensor) -> Any:
        return self.linear(torch.relu(self.conv(x)).flatten(1))


class RaisesInEval(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else {}["missing"]


class Squeezes(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).squeeze()


class PairsOnly(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).view(2, -1)


class InDict(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class NoGradient(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return super().forward(x)


class NoGradientInEval(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class SwitchesGradientsOff(Net):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        torch.set_grad_enabled(False)
        return logits


class Detaches(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.detach())


class OneHot(Net):
    def forward(self, x: Tensor) -> Any:
        return one_hot(super().forward(x).argmax(1), 10)


class Wide(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).double()


class NotFinite(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) / 0


class SteepAtZero(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + (0 * x).flatten(1).sum(1, keepdim=True).sqrt()


class OtherWeights(Net):
    def forward(self, x: Tensor) -> Any:
        self.linear.weight = nn.Parameter(self.linear.weight.detach() + 0)
        return super().forward(x)


class MoreWeights(Net):
    def forward(self, x: Tensor) -> Any:
        if not hasattr(self, "late"):
            self.late = nn.Linear(10, 10)
        return self.late(super().forward(x))


class Uncopied(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("only one of these")


class BrokenBackward(Net):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            raise OSError("no way back")

    def forward(self, x: Tensor) -> Any:
        return self.Double.apply(super().forward(x))


class ExtraState(Net):
    def get_extra_state(self) -> Any:
        return {"passes": 3}

    def set_extra_state(self, state: Any) -> None:
        del state


class Unreadable(Net):
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise LookupError("written by somebody else")


class LazyInTraining(Net):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.extra = nn.LazyLinear(num_classes)

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return self.extra(logits) if self.training else logits


class Sparse(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.table = nn.Embedding(10, num_classes, sparse=True)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x.flatten(1)) @ self.table(torch.arange(10))


def frozen(num_classes: int) -> nn.Module:
    return Net(num_classes).requires_grad_(False)


def without_weights(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(num_classes))


def not_a_number(num_classes: int) -> nn.Module:
    model = Net(num_classes)
    nn.init.constant_(model.linear.bias, torch.nan)
    return model


def complex_weights(num_classes: int) -> nn.Module:
    model = Net(num_classes)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return model


def on_meta(num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return Net(num_classes)


REFUSED = {
    "RaisesInEval": "cannot take 1 image of 1x8x8 in evaluation mode: KeyError .*_network_checks.py:",
    "Squeezes": r"gives shape \(10,\) for 1 image in evaluation mode, not \(1, 10\)$",
    "PairsOnly": r"gives shape \(2, 5\) for 1 image in evaluation mode, not \(1, 10\)$",
    "InDict": "gives dict for 2 images in training mode, not a tensor of logits",
    "NoGradient": "gives logits without a gradient for 2 images in training mode; .* no no_grad$",
    "NoGradientInEval": "gives logits without a gradient for 1 image in evaluation mode; expected",
    "SwitchesGradientsOff": "gives logits without a gradient for 2 images in training mode; expected",
    "Detaches": "gives logits without a gradient for the pixels for 2 images in training mode",
    "OneHot": "gives int64 for 2 images in training mode; expected float32 logits$",
    "Wide": "gives float64 for 2 images in training mode; expected float32 logits$",
    "NotFinite": "gives logits that are not finite for 2 images in training mode$",
    "SteepAtZero": "has a gradient for the pixels that is not finite for 2 images in training mode$",
    "OtherWeights": "makes the weight linear.weight in its forward pass; expected",
    "MoreWeights": "makes the weight late.weight in its forward pass; .* nn.LazyLinear$",
    "Uncopied": r"cannot be copied, .*: TypeError \(only one of these\) at .*test_network_checks.py:",
    "BrokenBackward": r"cannot be differentiated .*: OSError \(no way back\) at .*test_network_checks.py:",
    "ExtraState": "keeps _extra_state, which is no tensor; checkpoints hold tensors$",
    "Unreadable": "cannot be read from a checkpoint .*: LookupError .* at .*test_network_checks.py:",
    "LazyInTraining": "leaves extra.weight without a size after a pass in evaluation mode$",
    "Sparse": "has a sparse gradient for table.weight; expected a dense one$",
    "frozen": "has nothing to train: none of its 4 weights requires_grad$",
    "without_weights": "has nothing to train: none of its 0 weights requires_grad$",
    "not_a_number": "starts with numbers in linear.bias that are not finite$",
    "complex_weights": "has the complex weight phase; expected real ones$",
    "on_meta": "cannot be moved to cpu: NotImplementedError .*meta tensor",
}


def build(function: str) -> Classifier:
    return ModelSpec(name=f"{__name__}:{function}").build(1, 8, 10, [0.5], [0.25])


def run_of(**changes: Any) -> RunConfig:
    values = {
        "data": {"name": "digits", "train_size": 64, "validation": 60},
        "algorithm": {"name": "pgd", "steps": 1},
        "batch_size": 32,
        "epochs": 1,
        "evaluation": {"steps": 1},
        "sentinels": None,
        "device": "cpu",
    }
    return RunConfig.model_validate({**values, **changes})


@pytest.mark.parametrize(("function", "sentence"), REFUSED.items())
def test_a_network_that_cannot_be_trained_or_evaluated_is_refused(
    function: str, sentence: str
) -> None:
    with pytest.raises(RequestError, match=f"^model.name: {__name__}:{function} {sentence}"):
        build(function)
    assert torch.is_grad_enabled()


class InPlace(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(0.5))


def test_a_network_may_overwrite_what_it_is_given() -> None:
    model = build("InPlace")
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    before = images.detach().clone()
    backbone: Any = model.backbone
    wanted = backbone.linear(torch.relu(backbone.conv((before - 0.5) / 0.25 - 0.5)).flatten(1))
    assert torch.equal(model(images), wanted)
    assert torch.equal(images, before)


def double(num_classes: int) -> nn.Module:
    return Net(num_classes).double()


def half(num_classes: int) -> nn.Module:
    return Net(num_classes).to(torch.bfloat16)


@pytest.mark.parametrize("function", ["double", "half"])
def test_weights_of_any_width_become_those_of_the_run(function: str) -> None:
    assert {p.dtype for p in build(function).parameters()} == {torch.float32}
    _, state = next(
        fit(run_of(model=f"{__name__}:{function}", precision="fp64"), DistributedContext())
    )
    assert {p.dtype for p in state.model.parameters()} == {torch.float64}


class Lazy(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d()
        self.linear = nn.LazyLinear(num_classes)

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.norm(self.conv(x)).flatten(1))


def test_lazy_layers_have_weights_of_the_seed_that_are_trained_and_read_again() -> None:
    torch.manual_seed(0)
    first = build("Lazy")
    torch.manual_seed(0)
    assert same(first, build("Lazy")) and not same(first, build("Lazy"))
    assert first.backbone.get_buffer("norm.running_var").eq(1).all()
    assert first.backbone.get_buffer("norm.num_batches_tracked") == 0
    run = run_of(model=f"{__name__}:Lazy")
    _, state = next(fit(run, DistributedContext()))
    assert len(state.optimizer.param_groups[0]["params"]) == 6
    read = network(Saved(run, {"ema": None, "model": state.model.state_dict()}))
    assert same(read, state.model)


class Counts(Net):
    """Counts its passes, draws random numbers and has statistics."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm, self.passes = nn.BatchNorm1d(num_classes), 0

    def forward(self, x: Tensor) -> Any:
        self.passes += 1
        return dropout(self.norm(super().forward(x)), training=self.training)


def test_trying_a_network_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, after = build("Counts"), torch.get_rng_state()
    torch.manual_seed(0)
    assert same(model.backbone, Counts(10))
    assert torch.equal(after, torch.get_rng_state())
    assert model.backbone.passes == 0
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


class Keeps(Net):
    """Keeps the features of its last pass."""

    def forward(self, x: Tensor) -> Any:
        self.kept = {"features": [torch.relu(self.conv(x))]}
        return self.linear(self.kept["features"][0].flatten(1))


def test_a_network_that_keeps_its_features_is_attacked_after_a_training_pass() -> None:
    model = build("Keeps")
    images = torch.rand(2, 1, 8, 8)
    logits = model(images)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    found = CountedModel(model, Meter()).classes(images)
    assert torch.equal(found, logits.argmax(1))
    assert vars(model.backbone)["kept"]["features"][0].requires_grad


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("function", ["frozen", "RaisesInEval", "Squeezes", "cached"])
def test_the_verdict_comes_before_training_for_any_number_of_workers(
    workers: int, function: str
) -> None:
    with pytest.raises(RequestError, match=f"^model.name: {__name__}:{function}"):
        preflight(run_of(model=f"{__name__}:{function}", workers=workers))


_MADE: list[nn.Module] = []


def cached(num_classes: int) -> nn.Module:
    if not _MADE:
        _MADE.append(Net(num_classes))
    return _MADE[0]


class FloatInside(Net):
    def forward(self, x: Tensor) -> Any:
        return self.linear(torch.relu(self.conv(x)).float().flatten(1))


def test_a_network_is_tried_in_the_precision_of_the_run() -> None:
    for precision in ("fp32", "bf16"):
        preflight(run_of(model=f"{__name__}:FloatInside", precision=precision))
    with pytest.raises(RequestError, match="FloatInside cannot take 2 images of .*: RuntimeError"):
        preflight(run_of(model=f"{__name__}:FloatInside", precision="fp64"))


class Normed(Net):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm = nn.BatchNorm1d(num_classes)

    def forward(self, x: Tensor) -> Any:
        return self.norm(super().forward(x))


def test_one_image_per_worker_is_refused_where_batchnorm_cannot_train_on_it() -> None:
    for model in (f"{__name__}:Normed", "resnet18"):  # whose last activations are one pixel
        with pytest.raises(
            RequestError, match="^batch_size: 2 is one image per worker; .* 4, since"
        ):
            preflight(run_of(model=model, batch_size=2, workers=2))
    preflight(run_of(model=f"{__name__}:Normed", batch_size=4, workers=2))
    preflight(run_of(model=f"{__name__}:Net", batch_size=2, workers=2))


class Softmax(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).softmax(1)


class Random(Net):
    def forward(self, x: Tensor) -> Any:
        return dropout(super().forward(x), training=True)


class Neighbours(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("Softmax", "answers probabilities"),
        ("Random", "other logits at the next call"),
        ("Neighbours", "depend on the other images"),
        ("Net", ""),
    ],
)
def test_what_evaluation_will_find_is_said_before_training(
    function: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    preflight(run_of(model=f"{__name__}:{function}"))
    said = capsys.readouterr().err
    assert said.startswith(f"raytrain: model.name: {__name__}:{function}: ") if words else not said
    assert words in said and said.count("\n") == (1 if words else 0)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    weights = build("Net").state_dict()
    run = run_of(model=f"{__name__}:Counts")
    with pytest.raises(RequestError, match="Counts is not the network of the checkpoint: .*norm"):
        network(Saved(run, {"ema": None, "model": weights}))
