"""Progress of a training run as a share in [0, 1]: of its epochs, or of its cost."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from raytrain.core.distributed_context import DistributedContext
from raytrain.core.train_state import TrainState
from raytrain.core.types import Progress


@dataclass(frozen=True)
class StepProgress:
    """Where training is after a step."""

    share: float  # of training that is done
    epoch: int  # that is under way, from 1
    step: int  # steps so far
    samples: int  # images so far, of this worker
    loss: float | None  # mean of the epoch, as it was last read from the device


OnStep = Callable[[StepProgress], None]
"""Called after every step."""

SECONDS_BETWEEN_STEPS = 1.0
"""Between two steps that another process sends to the driver."""

_BETWEEN_METRICS = 60.0  # seconds


class RateLimit:
    """True at most once in `seconds`: at the first call, or with `wait` after so many seconds."""

    def __init__(self, seconds: float, wait: bool = False) -> None:
        self._seconds = seconds
        self._due = time.monotonic() + seconds if wait else -math.inf

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + self._seconds
        return True


class StepMetrics:
    """Metrics of a training within an epoch, at most once a minute."""

    def __init__(self) -> None:
        self._due = RateLimit(_BETWEEN_METRICS, wait=True)

    def __call__(self, share: float, loss: float | None) -> dict[str, float] | None:
        """The metrics, where they are due; None otherwise, and as long as there is no loss."""
        if loss is None or not self._due():
            return None
        return {"step/loss": loss, "step/share": share}


class AbstractProgress(ABC):
    """Progress of a run: its share before every step, and whether it is complete after it.

    Every method may be a collective: call each on all workers in the same order.
    """

    @abstractmethod
    def start_epoch(self, state: TrainState, began: float | None = None) -> float:
        """Prepare for the steps of the next epoch, or for what is left of one that began at a share.

        Returns the share at which the epoch began.
        """

    @abstractmethod
    def before_step(self, state: TrainState, done: int) -> Progress:
        """The progress before a step, after `done` steps of its epoch."""

    @abstractmethod
    def mid_step_share(self, state: TrainState, done: int) -> float:
        """The share of training at the middle of that step, which decides its learning rate."""

    @abstractmethod
    def share(self, state: TrainState) -> float:
        """The share of training that is done, up to 1."""

    @abstractmethod
    def is_complete(self, state: TrainState) -> bool:
        """Whether training is at its end; called after every step and every epoch."""


@dataclass
class ByEpochs(AbstractProgress):
    """Training of `epochs` passes over the training images, each of `steps` steps."""

    epochs: int
    steps: int

    def start_epoch(self, state: TrainState, began: float | None = None) -> float:
        del began
        return self.share(state)

    def before_step(self, state: TrainState, done: int) -> Progress:
        begun, now = state.epoch / self.epochs, (state.epoch + done / self.steps) / self.epochs
        return Progress(begun, now, state.epoch)

    def mid_step_share(self, state: TrainState, done: int) -> float:
        return (state.epoch + (done + 0.5) / self.steps) / self.epochs

    def share(self, state: TrainState) -> float:
        return min(1.0, state.epoch / self.epochs)

    def is_complete(self, state: TrainState) -> bool:
        return state.epoch >= self.epochs


@dataclass
class ByCost(AbstractProgress):
    """Training that ends at a cost of `fe_per_image` forward-equivalents per training image.

    It ends at the step nearest to that, if necessary within an epoch: the error is at most half a mean
    step. Schedules are functions of the cost, hence of the same shares of training for every method,
    whatever a step costs.
    """

    fe_per_image: float
    num_images: int  # over all workers
    context: DistributedContext

    def __post_init__(self) -> None:
        self._spent = self._began = 0.0

    def start_epoch(self, state: TrainState, began: float | None = None) -> float:
        self._spent = self._cost_share(state)
        self._began = self._spent if began is None else began
        return self._began

    def before_step(self, state: TrainState, done: int) -> Progress:
        del done
        return Progress(self._began, self._spent, state.epoch)

    def mid_step_share(self, state: TrainState, done: int) -> float:
        del done
        return min(1.0, self._spent + self._half_step(state))

    def share(self, state: TrainState) -> float:
        return min(1.0, self._cost_share(state))

    def is_complete(self, state: TrainState) -> bool:
        self._spent = self._cost_share(state)
        return self._spent + self._half_step(state) >= 1

    def _cost_share(self, state: TrainState) -> float:
        return state.meter.total(self.context).fe / (self.num_images * self.fe_per_image)

    def _half_step(self, state: TrainState) -> float:
        return self._spent / (2 * state.step) if state.step else 0.0
