"""State that changes during training: the content of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from raytrain.core.algorithm_state import Stateful
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.losses import AbstractLoss
from raytrain.core.network import FrozenNetwork, Precision
from raytrain.core.oracle import Oracle
from raytrain.core.types import BEGINNING, Batch, BatchNorm, Predict, Progress

P = TypeVar("P")


@dataclass
class TrainState:
    """State of one worker. `parts` holds the state of the algorithm and of the outer update, by name.

    The sampler and the noise are not here: they are functions of seed, epoch and step
    (`types.BatchRandom`).
    """

    model: nn.Module
    wrapper: Predict  # the DDP wrapper, or the model itself
    optimizer: Optimizer
    compiled: Predict | None = None  # a compiled form of `wrapper`
    frozen: FrozenNetwork | None = None  # for attacks; None: the model itself
    precision: Precision = "fp32"
    context: DistributedContext = DistributedContext()
    parts: dict[str, Stateful] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    ema: AveragedModel | None = None
    epoch: int = 0  # epochs finished
    part_epoch: Any = None  # the next epoch, as far as it is done; None between epochs
    step: int = 0  # batches trained on
    progress: Progress = BEGINNING
    seconds: float = 0.0  # spent training and compiling, evaluation left out
    compile_seconds: float = 0.0  # of them by torch.compile
    best: float = float("-inf")  # best validation robust accuracy so far
    patience_count: int = 0  # validations since the last one that counted as better
    sentinel_values: dict[str, float] = field(default_factory=dict)  # of the last validation
    stopped_by: str | None = None  # why training ends early
    execution: str = "eager"  # how steps are executed, and why
    classes: tuple[str, ...] = ()  # names, in the order of the network's outputs

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated: the averaged one if `ema` is set."""
        return self.model if self.ema is None else self.ema.module

    def oracle(self, batch: Batch, objective: AbstractLoss, attack_bn: BatchNorm) -> Oracle:
        """Return the oracle of an objective on a batch, which counts on this state's meter."""
        return Oracle(
            self.model,
            objective,
            batch,
            self.meter,
            wrapper=self.wrapper,
            compiled=self.compiled,
            frozen=self.frozen,
            context=self.context,
            attack_bn=attack_bn,
            precision=self.precision,
        )

    def part(self, name: str, kind: type[P]) -> P:
        """Return the part of this name."""
        found = self.parts[name]
        assert isinstance(found, kind), f"{name} is a {type(found).__name__}"
        return found


@dataclass(frozen=True)
class StepResult:
    """Result of one step: losses, perturbation and numbers of steps."""

    losses: Tensor  # outer losses before the update, (n,)
    delta: Tensor  # the perturbation at the end of the step: trained on, or (free, yopo) the next
    steps: Tensor  # inner steps taken by each sample, (n,)
