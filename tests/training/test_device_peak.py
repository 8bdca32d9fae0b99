"""The share of a GPU's peak: the table of devices, and the operations of a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raytrain.core.network import forward_flops
from raytrain.models import ModelSpec
from raytrain.training import device_peak
from raytrain.training.acceleration import flops_of
from raytrain.training.device_peak import bf16_peak, seconds_at_peak

CPU, SHAPE = torch.device("cpu"), (1, 8, 8)


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_the_peak_of_a_device_follows_from_its_name(device: str, teraflops: float) -> None:
    assert bf16_peak(device) == teraflops * 1e12


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla V100-SXM2-16GB",
        "cpu",
    ],
)
def test_parts_of_a_device_and_other_ones_have_no_known_peak(device: str) -> None:
    assert bf16_peak(device) is None


def test_a_multiplication_and_an_addition_are_two_operations() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    image = torch.zeros(1, 3, 8, 8)
    assert forward_flops(model, image) == 2 * (8 * 8 * 4 * 3 * 3 * 3) + 2 * 256 * 10


def test_a_forward_equivalent_takes_its_operations_over_the_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    spec = ModelSpec(name=f"{__name__}:linear")
    assert seconds_at_peak(spec, model, SHAPE, CPU) is None
    monkeypatch.setattr(device_peak, "name_of", lambda device: "NVIDIA H200")
    assert seconds_at_peak(spec, model, SHAPE, CPU) == 2 * 64 * 10 / 989e12


class Restless(nn.Module):
    """A network that counts its passes and draws random numbers."""

    def __init__(self, smallest: int = 1) -> None:
        super().__init__()
        self.linear, self.passes, self.smallest = nn.Linear(64, 10), 0, smallest

    def forward(self, images: Tensor) -> Tensor:
        assert len(images) >= self.smallest
        self.passes += 1
        return self.linear(images.flatten(1) + torch.rand(1))


def test_counting_operations_changes_neither_network_nor_generator() -> None:
    model, before = Restless(), torch.get_rng_state()
    assert flops_of(ModelSpec(name=f"{__name__}:restless"), model, SHAPE) == 2 * 64 * 10
    assert model.passes == 0 and torch.equal(torch.get_rng_state(), before)


def test_a_network_whose_operations_cannot_be_counted_has_no_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_peak, "name_of", lambda device: "NVIDIA H200")
    spec = ModelSpec(name=f"{__name__}:pairs")
    assert seconds_at_peak(spec, Restless(smallest=2), SHAPE, CPU) is None
