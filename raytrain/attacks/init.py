"""Initial perturbations of attacks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Annotated, Any, Literal, final

import torch
from pydantic import Field, PositiveFloat

from raytrain.core.registry import OneOf, Registry
from raytrain.core.sample_store import SampleStore
from raytrain.core.threat_models import AbstractThreatModel, in_box
from raytrain.core.types import BEGINNING, Batch, Delta, Pixels, Progress, Spec


class AbstractInit(Spec):
    """The first perturbation of an attack. Always inside the pixel box."""

    kind: Any = None

    @abstractmethod
    def delta(
        self,
        threat: AbstractThreatModel,
        batch: Batch,
        store: SampleStore | None = None,
        progress: Progress = BEGINNING,
    ) -> Delta:
        """(n, c, h, w). `store` holds the last perturbation of each image, if `remembers`."""

    @property
    def remembers(self) -> bool:
        """Whether this start needs a `SampleStore` in the state of the algorithm."""
        return False

    def replay_key(self, progress: Progress) -> Hashable:
        """All that `delta` takes from `progress`; see `AbstractAlgorithm.replay_key`."""
        return progress


class _Timeless(AbstractInit):
    """A start that takes nothing from the progress of training."""

    def replay_key(self, progress: Progress) -> Hashable:
        return ()


@final
class Zero(_Timeless):
    """delta = 0."""

    kind: Literal["zero"] = "zero"

    def delta(
        self,
        threat: AbstractThreatModel,
        batch: Batch,
        store: SampleStore | None = None,
        progress: Progress = BEGINNING,
    ) -> Delta:
        del threat, store, progress
        return torch.zeros_like(batch.images)


@final
class Uniform(_Timeless):
    """delta = random point of the ball scaled by `radius`, clipped to the pixel box.

    l-inf: every pixel U(-eps, eps). l2 and l1: uniform direction, uniform length.
    """

    kind: Literal["uniform"] = "uniform"
    radius: Annotated[
        PositiveFloat, Field(description="in multiples of eps (k of N-FGSM); 1 fills the ball")
    ] = 1.0

    def delta(
        self,
        threat: AbstractThreatModel,
        batch: Batch,
        store: SampleStore | None = None,
        progress: Progress = BEGINNING,
    ) -> Delta:
        del store, progress
        return in_box(threat.noise(batch.images, batch.rng, "start", self.radius), batch.images)


@final
class Gaussian(_Timeless):
    """delta = std * N(0, 1), clipped to ball and pixel box.

    The start of TRADES and MART (std 0.001), whose public codes do not clip it before the first
    gradient. The KL that TRADES maximises has no gradient at delta = 0.
    """

    kind: Literal["gaussian"] = "gaussian"
    std: Annotated[Pixels, Field(gt=0, description="pixels of [0, 1]")] = 0.001

    def delta(
        self,
        threat: AbstractThreatModel,
        batch: Batch,
        store: SampleStore | None = None,
        progress: Progress = BEGINNING,
    ) -> Delta:
        del store, progress
        noise = batch.rng.normal("start", *batch.images.shape[1:]).to(batch.images.dtype)
        return threat.feasible(self.std * noise, batch.images)


@final
class Remembered(_Timeless):
    """delta = final perturbation of the last attack on the same image (ATTA, Zheng et al. 2020),
    transformed with its crop and flip.

    Stored in the run's precision: 4 bytes per pixel and channel of every training image.
    """

    kind: Literal["remembered"] = "remembered"

    def delta(
        self,
        threat: AbstractThreatModel,
        batch: Batch,
        store: SampleStore | None = None,
        progress: Progress = BEGINNING,
    ) -> Delta:
        del progress
        assert store is not None
        return threat.feasible(store.read(batch), batch.images)

    @property
    def remembers(self) -> bool:
        return True


INITS = Registry(AbstractInit, "kind")
INITS.register(Zero, Uniform, Gaussian, Remembered)

Init = Annotated[
    AbstractInit, OneOf(INITS, "uniform"), Field(description="where the attack begins")
]
