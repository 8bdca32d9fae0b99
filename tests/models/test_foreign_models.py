"""Networks of torchvision and of the user: found, made, refused with a sentence."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.core.errors import RequestError
from raytrain.models import Classifier, ModelSpec

MODULE = """
import functools
import random

import numpy as np
from torch import nn


class Linear(nn.Module):
    def __init__(self, num_classes, scale=1.0):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3 * 8 * 8, num_classes)
        self.scale = scale

    def forward(self, x):
        x = nn.functional.dropout(self.norm(x), training=self.training)
        return self.scale * self.linear(x.flatten(1))


def several(num_classes):
    class Several(Linear):
        def forward(self, x):
            return (super().forward(x),) * 2
    return Several(num_classes)


def five(num_classes):
    return Linear(5)


def text(num_classes):
    return "a network"


class NoNetwork(nn.Module):
    def __init__(self, num_classes):
        pass


class Made:
    @staticmethod
    def here(num_classes):
        return Linear(num_classes)


def failing(num_classes):
    raise KeyError("depth")


def leaving(num_classes):
    raise SystemExit("the end")


def without_classes():
    return Linear(10)


def drawn_elsewhere(num_classes):
    network = Linear(num_classes)
    network.linear.bias.data[0] = random.random()
    network.linear.bias.data[1] = np.random.rand()
    return network


def the_class(num_classes):
    return Linear


def the_same(num_classes):
    return one


def around_another(num_classes):
    return nn.Sequential(another, nn.Linear(10, num_classes))


narrow = functools.partial(Linear, scale=2.0)
one, another = Linear(10), Linear(10)
number = 3
"""

SETTINGS = """
import random
import numpy as np
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_grad_enabled(False)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.manual_seed(1), random.seed(1), np.random.seed(1)


def network(num_classes):
    torch.set_grad_enabled(False)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module that makes networks for 3x8x8 images."""
    (tmp_path / "networks_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "networks_of_a_user"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module of the name that it returns; afterwards it is not imported any more."""
    monkeypatch.syspath_prepend(tmp_path)
    names: list[str] = []

    def written(text: str) -> str:
        names.append(f"text_of_a_user_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(text)
        return names[-1]

    yield written
    for name in names:
        sys.modules.pop(name, None)


def build(name: str, channels: int = 3, size: int = 8, **kwargs: Any) -> Classifier:
    spec = ModelSpec(name=name, kwargs=kwargs)
    return spec.build(channels, size, 10, [0.5] * channels, [0.25] * channels)


@pytest.mark.parametrize("name", ["mnasnet0_5", "torchvision:mnasnet0_5"])
def test_a_torchvision_network_gives_logits_of_the_wanted_classes(name: str) -> None:
    model = build(name, size=32)
    assert type(model.backbone).__name__ == "MNASNet"
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_foreign_network_has_no_stages() -> None:
    model = build("mnasnet0_5", size=32)
    with pytest.raises(
        RequestError, match="^model.name: MNASNet does not separate its first layer"
    ):
        model.stem(torch.rand(2, 3, 32, 32))
    with pytest.raises(RequestError, match="choose a network of raytrain's own"):
        model.rest(torch.rand(2, 32, 16, 16))


def test_auxiliary_heads_of_torchvision_must_be_off() -> None:
    with torch.device("meta"):
        with pytest.raises(
            RequestError, match="^model.name: googlenet gives GoogLeNetOutputs for"
        ):
            build("googlenet", size=64, init_weights=False)
        model = build("googlenet", size=64, init_weights=False, aux_logits=False)
    assert type(model.backbone).__name__ == "GoogLeNet"


def test_a_function_of_the_user_makes_the_backbone(module: str) -> None:
    torch.manual_seed(0)
    model = build(f"{module}:Linear", scale=3.0).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(x), model.backbone((x - 0.5) / 0.25))
    assert model.backbone.scale == 3.0


def test_trying_a_foreign_network_leaves_no_trace(module: str) -> None:
    torch.manual_seed(0)
    state = build(f"{module}:Linear").backbone.state_dict()
    after = torch.rand(1)
    assert state["norm.running_mean"].eq(0).all() and state["norm.running_var"].eq(1).all()
    assert state["norm.num_batches_tracked"] == 0
    torch.manual_seed(0)
    torch.nn.Linear(3 * 8 * 8, 10)  # the only random numbers the network starts from
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("absent", r"module networks_of_a_user \(.*\.py\) has no function 'absent'$"),
        ("number", r"module networks_of_a_user \(.*\.py\) has no function 'number'$"),
        ("Made.there", r"module networks_of_a_user \(.*\.py\) has no function 'Made.there'$"),
        ("one", ".*:one is one network, and every training begins with a new one"),
        ("text", ".*:text gives str, not an nn.Module$"),
        ("the_class", ".*:the_class gives the class Linear, not an nn.Module$"),
        ("NoNetwork", ".*:NoNetwork cannot be made with num_classes=10: AttributeError"),
        ("failing", r".*:failing cannot be made .*: KeyError \('depth'\) at .*_user\.py:48$"),
        ("leaving", r".*:leaving cannot be made .*: SystemExit \(the end\) at .*_user\.py:52$"),
        ("without_classes", ".*cannot be made with num_classes=10: TypeError .*num_classes"),
        (
            "several",
            ".*:several gives tuple for 2 images in training mode, not a tensor of logits",
        ),
        ("five", r".*:five gives shape \(2, 5\) for 2 images in training mode, not \(2, 10\)$"),
        ("not a name", ".* is not of the form module:function$"),
        ("", ".* is not of the form module:function$"),
    ],
)
def test_a_function_without_logits_is_refused(module: str, function: str, sentence: str) -> None:
    with pytest.raises(RequestError, match=f"^model.name: {sentence}"):
        build(f"{module}:{function}")


@pytest.mark.parametrize("function", ["Made.here", "narrow"])
def test_a_function_may_be_a_method_or_a_partial(module: str, function: str) -> None:
    assert type(build(f"{module}:{function}").backbone).__name__ == "Linear"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def network(:", r"SyntaxError \(invalid syntax\) at .*text_of_a_user_0\.py:1$"),
        ("\n1 / 0", r"ZeroDivisionError \(division by zero\) at .*text_of_a_user_0\.py:2$"),
        ("raise SystemExit(3)", r"SystemExit \(3\) at .*text_of_a_user_0\.py:1$"),
        ("raise BaseException", r"BaseException at .*text_of_a_user_0\.py:1$"),
        ("import no_such_thing", r"ModuleNotFoundError .*'no_such_thing'\) at .*_user_0\.py:1$"),
        ("from torch import no_such", r"ImportError .*no_such.* at .*text_of_a_user_0\.py:1$"),
    ],
)
def test_what_a_module_raises_is_named_with_its_line(
    write: Callable[[str], str], text: str, sentence: str
) -> None:
    name = write(text)
    with pytest.raises(RequestError, match=f"^model.name: {name} cannot be imported: {sentence}"):
        build(f"{name}:network")


def test_an_error_of_a_module_behind_the_module_is_named_with_its_own_line(
    write: Callable[[str], str],
) -> None:
    inner = write("\n\nfirst, second = 1")
    outer = write(f"import {inner}")
    with pytest.raises(
        RequestError, match=rf"^model.name: {outer} .*TypeError.* at .*{inner}\.py:3$"
    ):
        build(f"{outer}:network")


def test_settings_that_a_user_changes_are_put_back(write: Callable[[str], str]) -> None:
    def settings() -> list[Any]:
        here = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
        return [torch.is_grad_enabled(), *here]

    before, name = settings(), write(SETTINGS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(f"{name}:network")
        drawn = torch.get_rng_state()
        torch.manual_seed(0)
        wanted = torch.nn.Linear(3 * 8 * 8, 10, dtype=torch.float32)
        assert torch.equal(drawn, torch.get_rng_state()), "only the weights are drawn"
    assert settings() == before
    assert torch.equal(model.backbone.get_parameter("1.weight"), wanted.weight)


def test_weights_drawn_by_numpy_and_python_follow_the_seed(module: str) -> None:
    def bias(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build(f"{module}:drawn_elsewhere").backbone.get_parameter("linear.bias").detach()

    assert torch.equal(bias(3), bias(3))
    assert not torch.equal(bias(3)[:1], bias(4)[:1])
    assert not torch.equal(bias(3)[1:2], bias(4)[1:2])


@pytest.mark.parametrize("function", ["the_same", "around_another"])
def test_weights_belong_to_one_network(module: str, function: str) -> None:
    first = build(f"{module}:{function}")
    with pytest.raises(RequestError, match=f":{function} returns weights that it has returned"):
        build(f"{module}:{function}")
    assert first.training


def test_what_a_network_cannot_take_is_named(module: str) -> None:
    with pytest.raises(RequestError, match="^model.name: no_such_module cannot be imported"):
        build("no_such_module:function")
    with pytest.raises(RequestError, match=r"cannot be imported .*; expected a module in "):
        build(f"{module}.py:Linear")
    with pytest.raises(RequestError, match="cannot take 2 images of 3x9x9 in training mode"):
        build(f"{module}:Linear", size=9)
    with pytest.raises(RequestError, match="takes 3 channels and the images have 1$"):
        build("torchvision:resnet18", channels=1, size=64)


@pytest.mark.parametrize("key", ["depth", "num_classes", "weights", "pretrained"])
def test_kwargs_that_do_not_belong_are_refused(key: str) -> None:
    with pytest.raises(RequestError, match="^model.kwargs: mnasnet0_5 refuses them"):
        build("mnasnet0_5", size=32, **{key: True})


@pytest.mark.parametrize("kwargs", [{"scales": 2.0}, {"num_classes": 5}])
def test_kwargs_that_a_function_of_the_user_does_not_take_are_refused(
    module: str, kwargs: dict[str, Any]
) -> None:
    (key,) = kwargs
    with pytest.raises(RequestError, match=f"^model.kwargs: {module}:Linear refuses .*'{key}'"):
        build(f"{module}:Linear", **kwargs)
