"""Networks of torchvision and of the user: built, tried once, refused with a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.models import Classifier, ModelSpec
from raytrain.types import RequestError

MODULE = """
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


number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module that makes networks for 3x8x8 images."""
    (tmp_path / "networks_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "networks_of_a_user"


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
    with pytest.raises(RequestError, match="^model.name: MNASNet does not tell its first layer"):
        model.stem(torch.rand(2, 3, 32, 32))
    with pytest.raises(RequestError, match="choose a network of raytrain's own"):
        model.rest(torch.rand(2, 32, 16, 16))


def test_auxiliary_heads_of_torchvision_must_be_off() -> None:
    with torch.device("meta"):
        with pytest.raises(RequestError, match="^model.name: googlenet gives GoogLeNetOutputs in"):
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
        ("absent", "^model.name: module networks_of_a_user has no function 'absent'$"),
        ("number", "^model.name: module networks_of_a_user has no function 'number'$"),
        ("text", "^model.name: .*:text gives str, not an nn.Module$"),
        ("several", "^model.name: .*:several gives tuple in training, not logits"),
        ("five", r"^model.name: .*:five gives shape \(2, 5\) for 2 images, not \(2, 10\)$"),
        ("not a name", "^model.name: .* is not of the form module:function$"),
    ],
)
def test_a_function_without_logits_is_refused(module: str, function: str, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        build(f"{module}:{function}")


def test_what_a_network_cannot_take_is_named(module: str) -> None:
    with pytest.raises(RequestError, match="^model.name: no_such_module cannot be imported"):
        build("no_such_module:function")
    with pytest.raises(RequestError, match="^model.name: .* cannot take images of 3x9x9"):
        build(f"{module}:Linear", size=9)
    with pytest.raises(RequestError, match="takes 3 channels and the images have 1$"):
        build("torchvision:resnet18", channels=1, size=64)


@pytest.mark.parametrize("key", ["depth", "num_classes", "weights", "pretrained"])
def test_kwargs_that_do_not_belong_are_refused(key: str) -> None:
    with pytest.raises(RequestError, match="^model.kwargs: mnasnet0_5 refuses them"):
        build("mnasnet0_5", size=32, **{key: True})
