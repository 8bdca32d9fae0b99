"""Logits of images that change in a window: those of the whole network, with fewer operations."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import unchecked
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from raytrain.attacks.autoattack import counted_model as answers_module
from raytrain.attacks.autoattack.activation_cache import ActivationCache
from raytrain.attacks.autoattack.counted_model import CountedModel, folded
from raytrain.attacks.autoattack.regions import Region, Span
from raytrain.core.cost import Meter
from raytrain.models.preact_resnet import PreActResNet18
from raytrain.models.resnet import ResNet18
from raytrain.models.small_cnn import SmallCNN
from raytrain.models.wide_resnet import WideResNet

SIDE = 24


class Odd(nn.Module):
    """Layers that a region passes in unusual ways, and layers that it does not pass."""

    shift: Tensor
    frame: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, (5, 3), padding=(2, 0), dilation=(1, 2))
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.skipping = nn.Conv2d(4, 4, 1, stride=2)
        self.even = nn.Conv2d(4, 6, 2, stride=3)
        self.circular = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(6, 6, 3, padding="same")
        self.linear = nn.Linear(12, 5)
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.register_buffer("frame", torch.randn(4, SIDE, SIDE - 4))

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.wide(x) * 2 + self.shift)
        h = h * self.frame  # other numbers at other places
        two = self.grouped(h) + self.skipping(h)
        two += torch.relu(two)
        one = self.even(two).mean((2, 3))
        gate = two.mean((2, 3), keepdim=True).sigmoid()  # every place depends on every other
        three = self.same(functional.max_pool2d(self.circular(two * gate), 2))
        return self.linear(torch.cat([one, three.amax((2, 3))], 1))


class Arithmetic(nn.Module):
    """Sizes, weights and channels that are computed with, which are no maps of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.clamped = nn.Conv2d(4, 4, 3, padding=1)
        self.clamped.register_forward_hook(lambda *given: given[2].clamp(-0.1, 0.1))
        self.weight, self.linear = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        n, c, height, width = h.shape
        apart = torch.relu(self.one(h.reshape(-1, 1, height, width))).reshape(n, c * height, width)
        h = self.clamped(h) + apart.reshape(n, c, height, width)
        h = functional.conv2d(h, torch.relu(self.weight / self.weight.std()), padding=1)
        return self.linear(self.norm(h).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": lambda: SmallCNN(3, 5),
    "resnet18": lambda: ResNet18(3, 5),
    "preact_resnet18": lambda: PreActResNet18(3, 5),
    "wide_resnet": lambda: WideResNet(3, 5, depth=10, width=1),
    "odd": Odd,
    "arithmetic": Arithmetic,
}


def made(name: str) -> nn.Module:
    """A network whose BatchNorm has seen something."""
    torch.manual_seed(3)
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def answers_of(network: nn.Module, meter: Meter | None = None) -> CountedModel:
    with unchecked():
        return CountedModel(network, Meter() if meter is None else meter)


def cache_of(answers: CountedModel, images: Tensor) -> ActivationCache:
    found = answers.activation_cache(images)
    assert found is not None
    return found


def some(count: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def window_at(top: int, left: int, height: int, width: int) -> Region:
    return Region(Span(top, top + height), Span(left, left + width))


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_those_of_the_whole_network_however_the_images_have_changed(name: str) -> None:
    answers, images = answers_of(made(name)), some(5)
    generator = torch.Generator().manual_seed(2)

    def below(stop: int) -> int:
        return int(torch.randint(stop, (1,), generator=generator))

    with torch.no_grad():
        local = cache_of(answers, images)
        for attempt in range(40):
            height, width = 1 + below(6 if attempt % 4 else SIDE), 1 + below(6)
            region = window_at(below(SIDE - height + 1), below(SIDE - width + 1), height, width)
            rows = torch.randperm(5, generator=generator)[: 1 + below(5)]
            window = torch.rand(len(rows), 3, height, width, generator=generator)
            changed = images[rows]
            region.of(changed).copy_(window)
            found, wanted = local.logits(rows, region, window), answers(changed)
            assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max())), attempt
            chosen = torch.rand(len(rows), generator=generator) < 0.5
            local.update(chosen)
            images[rows[chosen]] = changed[chosen]


@pytest.mark.parametrize(("name", "share"), [("small_cnn", 0.15), ("resnet18", 0.8)])
def test_a_small_window_is_less_work(name: str, share: float) -> None:
    network, images = made(name), torch.rand(2, 3, 32, 32)
    region, window = window_at(14, 3, 3, 3), torch.rand(2, 3, 3, 3)

    def work(ask: Callable[[], Any]) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ask()
        return counter.get_total_flops()

    answers = answers_of(network)
    with torch.no_grad():
        local = cache_of(answers, images)
    part, whole = (
        work(ask)
        for ask in (
            lambda: local.logits(torch.arange(2), region, window),
            lambda: answers(images),
        )
    )
    assert 0 < part < share * whole


def test_a_question_counts_as_a_pass_and_so_does_the_beginning() -> None:
    meter = Meter()
    answers = answers_of(made("small_cnn"), meter)
    local = cache_of(answers, some(4))
    assert meter.forwards == 4
    with torch.no_grad():
        local.logits(torch.tensor([2, 0]), window_at(0, 0, 1, 1), torch.zeros(2, 3, 1, 1))
    assert (meter.forwards, meter.input_backwards) == (6, 0)


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, images = answers_of(made("small_cnn")), some(4)
    need = cache_of(answers, images).nbytes
    # The images, and what each of the three layers hands on.
    assert need == 4 * 4 * (3 * 24**2 + 32 * 24**2 + 64 * 12**2 + 64 * 6**2)
    monkeypatch.setattr(answers_module, "MAX_CACHE_BYTES", need - 1)
    assert answers.activation_cache(images) is None


# --- networks that cannot be followed ------------------------------------------------------------


def in_place_module(x: Tensor, network: Any) -> Tensor:
    return network.act(x)


def in_place_flag(x: Tensor, network: Any) -> Tensor:
    return functional.relu(x, inplace=True)


def in_place_method(x: Tensor, network: Any) -> Tensor:
    return x.relu_()


@pytest.mark.parametrize("act", [in_place_module, in_place_flag, in_place_method])
def test_a_network_that_overwrites_what_its_layers_were_given_is_not_followed(
    act: Callable[[Tensor, Any], Tensor],
) -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return act(self.conv(x), self).mean((2, 3))

    network = Overwriting().eval()
    assert not ActivationCache.fits(fx.symbolic_trace(network))
    answers = answers_of(network)
    if act is in_place_module:  # the copy that is attacked has modules that do not
        assert answers.activation_cache(some(2)) is not None
        assert network.act.inplace
    else:
        assert answers.activation_cache(some(2)) is None


def test_what_is_no_graph_of_one_input_and_one_output_is_not_followed() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return operator.add(x, 1)

    assert not ActivationCache.fits(nn.Identity())
    assert not ActivationCache.fits(fx.symbolic_trace(Pair()))
    assert not ActivationCache.fits(fx.symbolic_trace(Two()))
    assert ActivationCache.fits(folded(nn.Sequential(nn.Conv2d(1, 1, 1))))
