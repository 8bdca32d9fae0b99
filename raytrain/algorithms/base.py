"""The interface of an algorithm, the state it may touch, and the recipe a configuration names it by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from raytrain.balls import AbstractBall
from raytrain.oracle import Meter, Precision
from raytrain.outer import AbstractOuter
from raytrain.store import SampleStore
from raytrain.types import Batch, Delta, PerSample, Spec


@dataclass
class TrainState:
    """Everything that changes while training, and so everything a checkpoint holds.

    The sampler and the noise are not here: they are functions of seed, epoch and step
    (`types.Dice`).
    """

    model: nn.Module
    wrapper: nn.Module  # the DDP wrapper, or the model itself
    optimizer: Optimizer
    precision: Precision = "fp32"
    meter: Meter = field(default_factory=Meter)
    ema: AveragedModel | None = None
    store: SampleStore | None = None  # per image, sharded
    epoch: int = 0  # epochs finished
    step: int = 0  # weight updates made
    progress: float = 0.0  # share of training done, in whole epochs
    seconds: float = 0.0  # spent training, evaluation left out
    best: float = float("-inf")  # best validation robust accuracy so far

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated: the averaged weights where they are kept."""
        return self.model if self.ema is None else self.ema.module


@dataclass(frozen=True)
class Outcome:
    """What one step leaves for the record."""

    losses: PerSample  # outer losses before the update
    delta: Delta  # the perturbation trained on
    steps: Tensor  # inner steps taken by each sample, (n,)


class AbstractAlgorithm(ABC):
    """All that the loop knows. `step` changes the `TrainState` and nothing else."""

    ball: AbstractBall

    @property
    def remembers(self) -> bool:
        """Whether a `SampleStore` is to be kept for it."""
        return False

    @abstractmethod
    def step(self, state: TrainState, batch: Batch) -> Outcome:
        """One mini-batch: find a perturbation, move the weights."""


@dataclass(frozen=True)
class Card:
    """What `raytrain algorithms NAME` tells beside the hyperparameters."""

    paper: str
    rule: str
    cost: str  # per image and weight update, in forward-equivalents
    memory: str = "none"  # state per training image
    norms: tuple[str, ...] = ("linf", "l2", "l1")
    ranges: Mapping[str, str] = field(default_factory=dict)  # hyperparameter -> range to search


class AbstractRecipe(Spec):
    """A paper's hyperparameters, flat and in the paper's names; `build` turns them into parts that run."""

    card: ClassVar[Card]

    @abstractmethod
    def build(self, ball: AbstractBall, outer: AbstractOuter) -> AbstractAlgorithm:
        """The algorithm for a threat model and an outer update."""
