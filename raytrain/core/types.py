"""Shared types: tensor annotations, pixel quantities and batches."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat
from torch import Tensor

from raytrain.core.seeds import mix as mix
from raytrain.core.spec import FRACTION, a_number, fraction
from raytrain.core.spec import Number as Number
from raytrain.core.spec import Spec as Spec

Images = Float[Tensor, "n c h w"]  # pixels in [0, 1]
Delta = Float[Tensor, "n c h w"]  # perturbation, same unit
PerSample = Float[Tensor, " n"]
Labels = Int[Tensor, " n"]
Rows = Int[Tensor, " m"]
Mask = Bool[Tensor, " n"]

BatchNorm = Literal["eval", "train", "batch_nostat"]
"""Mode of BatchNorm (and dropout) in a pass: `eval` uses running statistics; `train` uses batch
statistics and updates the running ones; `batch_nostat` uses batch statistics only."""

AttackBatchNorm = Annotated[
    BatchNorm, Field(description="mode of BatchNorm and dropout in the passes of the attack")
]
"""The same as a field of a recipe."""


_OF_EPS = re.compile(r"\s*(?:([0-9.eE+-]+)\s*\*?\s*)?eps(?:\s*/\s*([0-9.eE+-]+))?\s*")


def _step_size(value: float | str) -> float | str:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as a string
            value = float(value)
    if isinstance(value, str):
        if _OF_EPS.fullmatch(value) is None:
            raise ValueError(
                "expected pixels in [0, 1] such as 2/255, or a multiple of the radius such as eps/4"
            )
        in_pixels(value, 1.0)
    elif not 0 < value < math.inf:
        raise ValueError("expected a positive number of pixels")
    return value


class Schedulable:
    """Annotation of a number that a curriculum may change: no state of the algorithm depends on it."""


SCHEDULABLE = Schedulable()


class Added:
    """Annotation of a field that runs recorded by earlier versions do not have.

    While it has its default it is no part of a run's signature and of its parameters in MLflow.
    """


ADDED = Added()

_PixelText = Annotated[str, Field(pattern=f"^{FRACTION.pattern}$", examples=["8/255"])]
_StepText = Annotated[
    str, Field(pattern=f"^({FRACTION.pattern}|{_OF_EPS.pattern})$", examples=["eps/4"])
]

Pixels = Annotated[
    float,
    BeforeValidator(fraction, json_schema_input_type=float | _PixelText),
    AfterValidator(a_number),
]
"""The same in pixels of [0, 1], usually written as a fraction: `8/255`."""

StepSize = Annotated[
    float | str,
    BeforeValidator(fraction, json_schema_input_type=PositiveFloat | _StepText),
    AfterValidator(_step_size),
    Field(description="pixels of [0, 1] per step, or a multiple of the radius"),
]
"""Pixels in [0, 1] (`2/255`, `0.01`) or a multiple of the threat's radius (`eps/4`, `1.25*eps`)."""


def in_pixels(step_size: float | str, eps: float) -> float:
    """A `StepSize` as a number of pixels, given the radius it may refer to.

    >>> in_pixels("eps/4", 0.1), in_pixels("1.25*eps", 0.1), in_pixels(0.01, 0.1)
    (0.025, 0.125, 0.01)
    """
    if not isinstance(step_size, str):
        return step_size
    match = _OF_EPS.fullmatch(step_size)
    assert match is not None
    try:
        factor, divisor = float(match[1] or 1), float(match[2] or 1)
        pixels = eps * factor / divisor
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{step_size!r} is not a multiple of eps such as eps/4") from None
    if eps > 0 and not 0 < pixels < math.inf:
        raise ValueError("expected a positive multiple of eps")
    return pixels


@dataclass(frozen=True)
class BatchRandom:
    """Random numbers of one batch, a function of the seed, the step and the slot in the *global*
    batch.

    Every rank draws for the whole batch and selects its own slots, so that noise and augmentation do
    not depend on the number of workers, and checkpoints need no state for them. Each `purpose` is an
    independent stream.
    """

    seed: int  # already mixed with epoch and step
    width: int  # slots in the global batch
    slots: slice | Tensor  # those of this rank
    device: torch.device

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """U(0, 1), float32, of shape (n, *shape)."""
        return torch.rand(
            self.width, *shape, generator=self._generator(purpose), device=self.device
        )[self.slots]

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """N(0, 1), float32, of shape (n, *shape)."""
        return torch.randn(
            self.width, *shape, generator=self._generator(purpose), device=self.device
        )[self.slots]

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform on 0..high-1, of shape (n,)."""
        generator = self._generator(purpose)
        return torch.randint(high, (self.width,), generator=generator, device=self.device)[
            self.slots
        ]

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(mix(self.seed, purpose))


@dataclass(frozen=True)
class AugmentedView:
    """Augmentation of each image: padded by `pad`, cropped at (top, left), mirrored or not."""

    pad: int
    top: Int[Tensor, " n"]
    left: Int[Tensor, " n"]
    mirrored: Bool[Tensor, " n"]

    def __getitem__(self, rows: Tensor) -> AugmentedView:
        return AugmentedView(self.pad, self.top[rows], self.left[rows], self.mirrored[rows])


@dataclass(frozen=True)
class Batch:
    """A mini-batch of one rank. `index` is each image's number in its split: the key of per-sample state."""

    images: Images
    labels: Labels
    index: Int[Tensor, " n"]
    rng: BatchRandom
    view: AugmentedView | None = None  # None: not augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Batch:
        """The sub-batch of these rows. `rng` is that of the whole batch: draw before narrowing."""
        view = None if self.view is None else self.view[rows]
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            index=self.index[rows],
            view=view,
        )


@dataclass(frozen=True)
class Progress:
    """Progress of training: shares in [0, 1] at the start of the epoch and of the step."""

    epoch: float = 0.0
    step: float = 0.0
    epochs: int = 0  # finished ones


BEGINNING = Progress()


Predict = Callable[[Tensor], Tensor]  # pixels (n, c, h, w) -> logits (n, classes)


def per_sample_dot(a: Delta, b: Delta) -> PerSample:
    """<a_i, b_i> for every row, (n,).

    >>> ones = torch.ones(2, 1, 2, 2)
    >>> per_sample_dot(ones, 3 * ones)
    tensor([12., 12.])
    """
    return (a * b).flatten(1).sum(1)


def over_pixels(values: PerSample) -> Float[Tensor, "n 1 1 1"]:
    """One number per sample, shaped to multiply images."""
    return values.view(-1, 1, 1, 1)
