"""Shared by all checks: `Finding`, a model whose state is restored, its logits."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from raytrain.core.errors import RequestError
from raytrain.core.network import autocast, mode
from raytrain.core.types import Images, Labels, mix


@dataclass(frozen=True)
class Finding:
    """The result of one check; `value` is the measurement, in the unit that the sentence names."""

    check: str
    passed: bool
    sentence: str
    value: float = math.nan  # NaN: not recorded


@contextmanager
def still(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """The model in eval mode, every source of randomness seeded.

    Afterwards modes, buffers and the generators of torch, numpy and Python are restored, also for a
    defence that draws numbers or counts its calls.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    python, legacy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    seed = mix(seed, "checks")
    try:
        with torch.random.fork_rng(devices=devices), mode(model, "eval"), autocast(device, "fp32"):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)


def logits_of(model: nn.Module, images: Images) -> Float[Tensor, "n classes"]:
    """The model's answer, without a graph.

    Raises RequestError if it is not one row of at least two numbers for each image.
    """
    with torch.no_grad():
        logits = model(images)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        raise RequestError(
            f"model: expected logits of shape ({len(images)}, classes), found {shape}"
        )
    if logits.shape[1] < 2:
        raise RequestError(f"model: expected logits of at least two classes, found {shape}")
    return logits


ONE_CLASS = (
    "The model answers one class, whatever the image: there is nothing for an attack to change."
)


def one_class(predicted: Labels, labels: Labels) -> bool:
    """Whether training collapsed: one answer for images of several classes, which is truly robust."""
    return len(labels.unique()) > 1 and len(predicted.unique()) == 1


def percent(share: float) -> str:
    """A share as text: `12.5 %`, `100 %`."""
    return f"{100 * share:.3g} %"
