"""The networks of the package: their sizes, their formulas, their two stages."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from raytrain.core.errors import RequestError
from raytrain.models import Classifier, ModelSpec

GREY = {"mean": [0.3], "std": [0.4]}
COLOUR = {"mean": [0.49, 0.48, 0.44], "std": [0.24, 0.25, 0.26]}
OWN = ["small_cnn", "small_cnn_nobn", "resnet18", "preact_resnet18", "wideresnet-10-1"]
OWN += ["wideresnet-10-1-silu"]


def build(name: str, classes: int = 10) -> Classifier:
    """A network for three 16x16 channels, every parameter and statistic away from its start."""
    torch.manual_seed(0)
    model = ModelSpec(name=name).build(3, 16, classes, **COLOUR)
    for tensor in model.backbone.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return model


def images(side: int = 16) -> Tensor:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "channels", "count"),
    [
        ("small_cnn", 1, 56_554),
        ("small_cnn_nobn", 1, 56_394),
        ("resnet18", 3, 11_173_962),
        ("preact_resnet18", 3, 11_172_170),
        ("wideresnet-28-10", 3, 36_479_194),
        ("wideresnet-34-10", 3, 46_160_474),
        ("wideresnet-28-10-silu", 3, 36_479_194),
        ("wideresnet-70-16-silu", 3, 266_796_506),
    ],
)
def test_number_of_parameters_is_the_published_one(name: str, channels: int, count: int) -> None:
    with torch.device("meta"):
        model = ModelSpec(name=name).build(channels, 32, 10, [0.0] * channels, [1.0] * channels)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_resnet18_is_torchvisions_with_a_small_first_convolution() -> None:
    model = build("resnet18").backbone.eval()
    oracle = resnet18(weights=None, num_classes=10).eval()
    oracle.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    oracle.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"shortcut": "downsample", "linear": "fc"}
    state = {}
    for key, value in model.state_dict().items():
        state[".".join(names.get(part, part) for part in key.split("."))] = value
    oracle.load_state_dict(state)
    torch.testing.assert_close(model(images()), oracle(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
class TestEveryNetwork:
    def test_rest_of_stem_is_forward_bit_for_bit(self, name: str) -> None:
        model, x = build(name).eval(), images()
        assert torch.equal(model.rest(model.stem(x)), model(x))

    def test_stem_is_the_normaliser_and_the_first_convolution(self, name: str) -> None:
        model, x = build(name), images()
        first = model.backbone.get_submodule("init_conv" if "silu" in name else "conv1")
        assert torch.equal(model.stem(x), first(model.normalise(x)))

    def test_model_is_the_backbone_on_normalised_images(self, name: str) -> None:
        model, x = build(name).eval(), images()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (COLOUR["mean"], COLOUR["std"]))
        assert torch.equal(model(x), model.backbone((x - mean) / std))

    def test_outputs_are_logits_of_any_sign(self, name: str) -> None:
        logits = build(name, classes=7)(images()).detach()
        assert logits.shape == (4, 7)
        assert not torch.allclose(logits.sum(1), torch.ones(4))

    def test_last_layer_is_linear(self, name: str) -> None:
        """Doubling its weights doubles the logits: neither softmax nor a bound comes after it."""
        model, x = build(name).eval(), images()
        once = model(x)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.load_state_dict({key: 2 * value for key, value in last.state_dict().items()})
        torch.testing.assert_close(model(x), 2 * once)

    def test_images_of_another_side_are_taken(self, name: str) -> None:
        assert build(name)(images(side=20)).shape == (4, 10)

    def test_seed_decides_the_weights(self, name: str) -> None:
        first, second = build(name).state_dict(), build(name).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_gradient_reaches_the_images_and_every_parameter(self, name: str) -> None:
        model, x = build(name), images().requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_batchnorm_images_of_a_batch_do_not_meet() -> None:
    model = ModelSpec(name="small_cnn_nobn").build(1, 8, 10, **GREY)
    x = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(model(x)[:2], model(x[:2]), rtol=1e-5, atol=1e-6)
    assert not any("running" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("name", "weight", "bias"),
    [
        ("wideresnet-10-4", "block3.layer.0.conv1.weight", "fc.bias"),
        ("wideresnet-10-4-silu", "layer.2.block.0.conv_0.weight", "logits.bias"),
    ],
)
def test_wide_resnet_starts_as_he_normal_by_fan_out(name: str, weight: str, bias: str) -> None:
    torch.manual_seed(0)
    state = ModelSpec(name=name).build(3, 32, 10, **COLOUR).backbone.state_dict()
    values = state[weight]  # 128 to 256 channels
    expected = math.sqrt(2 / (9 * 256))
    assert values.numel() > 250_000  # the sample's deviation is then within 1% of the law's
    assert values.std().item() == pytest.approx(expected, rel=0.01)
    assert state[bias].eq(0).all()


def test_normalise_false_hands_the_pixels_to_the_backbone() -> None:
    model = ModelSpec(name="small_cnn", normalise=False).build(1, 8, 10, **GREY).eval()
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(model(x), model.backbone(x))


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.5], [0.2]), ([0.5] * 3, [0.2, 0.0, 0.2]), ([0.5, math.nan, 0.5], [0.2] * 3)],
)
def test_statistics_that_do_not_fit_the_channels_are_refused(
    mean: list[float], std: list[float]
) -> None:
    with pytest.raises(RequestError, match="^data: mean and std need one finite number for each"):
        ModelSpec(name="small_cnn").build(3, 8, 10, mean, std)
