"""The SiLU WideResNet beside a restatement of its formula, and its parameter names."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from raytrain.models import ModelSpec, robustbench_state_dict

State = dict[str, Tensor]


def network(depth: int, width: int) -> tuple[torch.nn.Module, State]:
    """In float64, every weight and statistic away from its start."""
    torch.manual_seed(0)
    spec = ModelSpec(name=f"wideresnet-{depth}-{width}-silu")
    model = spec.build(3, 16, 10, [0.0] * 3, [1.0] * 3).double().eval()
    state = robustbench_state_dict(model)
    for tensor in state.values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return model, state


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """BatchNorm with running statistics."""
    mean, var, weight, bias = (
        state[f"{name}.{field}"].view(-1, 1, 1)
        for field in ("running_mean", "running_var", "weight", "bias")
    )
    return weight * (x - mean) / (var + 1e-5).sqrt() + bias


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def same(weight: Tensor, x: Tensor, stride: int) -> Tensor:
    """TensorFlow's "SAME" for a 3x3 kernel: every window of the image with a border of 1, of which
    stride 2 takes those around pixels 1, 3, 5, ... of an even side, and 0, 2, 4, ... of an odd one.
    """
    first = 1 if stride == 2 and x.shape[2] % 2 == 0 else 0
    return conv2d(x, weight, padding=1)[:, :, first::stride, first::stride]


def restated(state: State, x: Tensor, depth: int) -> Tensor:
    """The network as a formula, from its state dict alone."""
    x = conv2d(x, state["init_conv.weight"], padding=1)
    for group in range(3):
        for number in range((depth - 4) // 6):
            block = f"layer.{group}.block.{number}"
            stride = 2 if group > 0 and number == 0 else 1
            a = swish(norm(state, f"{block}.batchnorm_0", x))
            h = same(state[f"{block}.conv_0.weight"], a, stride)
            h = same(
                state[f"{block}.conv_1.weight"], swish(norm(state, f"{block}.batchnorm_1", h)), 1
            )
            shortcut = state.get(f"{block}.shortcut.weight")
            if shortcut is not None:
                thinned = a[:, :, ::stride, ::stride]
                x = torch.einsum("mk,nkhw->nmhw", shortcut[:, :, 0, 0], thinned)
            x = x + h
    means = swish(norm(state, "batchnorm", x)).mean((2, 3))
    return means @ state["logits.weight"].T + state["logits.bias"]


@pytest.mark.parametrize("side", [16, 15, 10])
@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2)])
def test_it_is_the_formula(depth: int, width: int, side: int) -> None:
    model, state = network(depth, width)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, side, side, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = model(x), restated(state, x, depth)
    assert bool(found.isfinite().all()) and float(wanted.std()) > 0
    assert float((found - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


def test_parameter_names_and_shapes_are_those_of_robustbench() -> None:
    with torch.device("meta"):
        model = ModelSpec(name="wideresnet-28-10-silu").build(3, 32, 10, [0.0] * 3, [1.0] * 3)
    found = {key: tuple(value.shape) for key, value in robustbench_state_dict(model).items()}
    expected: dict[str, tuple[int, ...]] = {"init_conv.weight": (16, 3, 3, 3)}

    def batch_norm(name: str, width: int) -> None:
        fields = ("weight", "bias", "running_mean", "running_var")
        expected.update({f"{name}.{field}": (width,) for field in fields})
        expected[f"{name}.num_batches_tracked"] = ()

    before = 16
    for group, width in enumerate((160, 320, 640)):
        for number in range(4):
            block = f"layer.{group}.block.{number}"
            batch_norm(f"{block}.batchnorm_0", before)
            batch_norm(f"{block}.batchnorm_1", width)
            expected[f"{block}.conv_0.weight"] = (width, before, 3, 3)
            expected[f"{block}.conv_1.weight"] = (width, width, 3, 3)
            if number == 0:
                expected[f"{block}.shortcut.weight"] = (width, before, 1, 1)
            before = width
    batch_norm("batchnorm", 640)
    expected |= {"logits.weight": (10, 640), "logits.bias": (10,)}
    assert found == expected


@pytest.mark.parametrize(("depth", "width", "classes"), [(28, 10, 10), (10, 1, 7), (16, 3, 100)])
def test_number_of_parameters_is_the_formula(depth: int, width: int, classes: int) -> None:
    """Per block from i to o channels: BatchNorms 2 i + 2 o, convolutions 9 i o + 9 o o, shortcut i o."""
    with torch.device("meta"):
        spec = ModelSpec(name=f"wideresnet-{depth}-{width}-silu")
        model = spec.build(3, 32, classes, [0.0] * 3, [1.0] * 3)
    blocks = (depth - 4) // 6
    expected, before = 9 * 3 * 16, 16
    for out in (16 * width, 32 * width, 64 * width):
        first = 2 * before + 9 * before * out + 2 * out + 9 * out * out
        expected += first + (before * out if before != out else 0)
        expected += (blocks - 1) * (4 * out + 18 * out * out)
        before = out
    expected += 2 * before + before * classes + classes
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
