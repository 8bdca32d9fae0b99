"""How far training has come, as a share: in epochs, or in what it has cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.train_state import TrainState
from raytrain.core.types import Progress


class AbstractProgress(ABC):
    """Asked before every step where training stands, and after it whether it is over.

    All workers must ask alike: the answer may be a collective.
    """

    @abstractmethod
    def begin(self, state: TrainState) -> None:
        """An epoch is about to begin."""

    @abstractmethod
    def at(self, state: TrainState, done: int) -> Progress:
        """The progress before a step, `done` steps of its epoch being over."""

    @abstractmethod
    def middle(self, state: TrainState, done: int) -> float:
        """The share of training at the middle of that step: where its learning rate is taken."""

    @abstractmethod
    def progress(self, state: TrainState) -> float:
        """The share of training that is done, up to 1."""

    @abstractmethod
    def over(self, state: TrainState) -> bool:
        """Whether training is at its end; asked after every step and every epoch."""


@dataclass
class ByEpochs(AbstractProgress):
    """So many passes over the training images, each of `steps` steps."""

    epochs: int
    steps: int

    def begin(self, state: TrainState) -> None:
        del state

    def at(self, state: TrainState, done: int) -> Progress:
        begun, now = state.epoch / self.epochs, (state.epoch + done / self.steps) / self.epochs
        return Progress(begun, now, state.epoch)

    def middle(self, state: TrainState, done: int) -> float:
        return (state.epoch + (done + 0.5) / self.steps) / self.epochs

    def progress(self, state: TrainState) -> float:
        return min(1.0, state.epoch / self.epochs)

    def over(self, state: TrainState) -> bool:
        return state.epoch >= self.epochs


@dataclass
class ByCost(AbstractProgress):
    """Until training has cost `fe_per_image` forward-equivalents per training image.

    It ends at the step nearest to that, in the middle of an epoch if need be: half a mean step more or
    less. Schedules run over the cost, so a method whose steps are dear sees the same shares of training.
    """

    fe_per_image: float
    num_images: int  # over all workers
    context: DistributedContext

    def __post_init__(self) -> None:
        self._spent = self._began = 0.0

    def begin(self, state: TrainState) -> None:
        self._began = self._spent = self._share(state)

    def at(self, state: TrainState, done: int) -> Progress:
        del done
        return Progress(self._began, self._spent, state.epoch)

    def middle(self, state: TrainState, done: int) -> float:
        del done
        return min(1.0, self._spent + self._half_step(state))

    def progress(self, state: TrainState) -> float:
        return min(1.0, self._share(state))

    def over(self, state: TrainState) -> bool:
        self._spent = self._share(state)
        return self._spent + self._half_step(state) >= 1

    def _share(self, state: TrainState) -> float:
        return state.meter.over(self.context).fe / (self.num_images * self.fe_per_image)

    def _half_step(self, state: TrainState) -> float:
        return self._spent / (2 * state.step) if state.step else 0.0
