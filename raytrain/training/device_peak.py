"""The highest speed of GPUs, by which that of training is judged."""

from __future__ import annotations

import re

import torch
from torch import nn

from raytrain.core.errors import RequestError
from raytrain.models import ModelSpec
from raytrain.training.acceleration import flops_of

_BF16 = {
    "B200": 2250,
    r"H100 \d+GB HBM3|H200|GH200 480GB": 989,
    "H100 NVL|H200 NVL": 835,
    "H100 PCIe": 756,
    "L40S": 362,
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312,
    "L40": 181,
    "A30|RTX 4090": 165,
    "A40": 150,
    "A10": 125,
    "L4": 121,
    "RTX 3090": 71,
}
"""TFLOP/s of dense bfloat16 products, added up in float32, by the name of the device. From NVIDIA's data
sheets, which for newer devices print twice as much, with sparsity; RTX 3090 and 4090 from the white papers
on their architectures, GA102 and Ada."""


def bf16_peak(device: str) -> float | None:
    """Dense bfloat16 operations per second of a device, by the name that CUDA gives it.

    >>> bf16_peak("NVIDIA H100 80GB HBM3")
    989000000000000.0
    >>> bf16_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a part of one, or unknown
    True
    """
    name = re.sub(r"^(NVIDIA )?(GeForce )?", "", device)
    for pattern, peak in _BF16.items():
        if re.fullmatch(pattern, name):
            return peak * 1e12
    return None


def seconds_at_peak(
    spec: ModelSpec, model: nn.Module, shape: tuple[int, int, int], device: torch.device
) -> float | None:
    """Seconds of one forward-equivalent, a forward pass of one image, at the bf16 peak of `device`.

    None if the peak or the cost of the network is not known.
    """
    peak = bf16_peak(name_of(device))
    if peak is None:
        return None
    try:
        return flops_of(spec, model, shape) / peak or None
    except RequestError:
        return None


def name_of(device: torch.device) -> str:
    """Return the name of a device, as CUDA gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
