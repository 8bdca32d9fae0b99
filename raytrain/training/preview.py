"""What a run would do, without doing it: its data and steps, its cost, memory, execution and time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raytrain.config.cost_estimate import estimate_cost, estimate_validation, is_bound
from raytrain.config.field_list import RunField, fields_of
from raytrain.config.performance import Mode
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext, local_context
from raytrain.core.errors import Diverged
from raytrain.core.failures import as_failure
from raytrain.core.network import forward_flops, trainable
from raytrain.core.train_state import TrainState
from raytrain.data.loader import Splits, num_steps
from raytrain.training.acceleration import Execution, execution, set_up_device, steps_in
from raytrain.training.progress import StepProgress
from raytrain.training.setup import splits_of, start
from raytrain.training.trainer import train_epoch

_LARGEST_STEP = {"cpu": 1e12, "cuda": 1e15}
"""Floating-point operations of a step that is measured: up to a minute on one core, seconds on a GPU."""

_WARM_UP: dict[Mode, int] = {"eager": 1, "graph": 3}
"""Steps before those that count: buffers are made in them, and a graph recorded."""

_MEASURED = 5  # steps at most
_LONG = 2.0  # seconds, after which no further step is measured
_LONGEST = 20.0  # seconds of the first step, after which it is the only one


@dataclass(frozen=True)
class MeasuredSteps:
    """Steps on a copy of the network that is thrown away."""

    steps: int
    images: int  # in each
    seconds: float  # of one
    fe: float  # forward-equivalents of one

    def __str__(self) -> str:
        several = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{several} of {self.images} images measured, {1e3 * self.seconds:,.0f} ms each"


@dataclass(frozen=True)
class RunPreview:
    """A run before it begins, or goes on: numbers are of the whole run.

    Costs are in forward-equivalents (FE), memory in bytes.
    """

    run: RunConfig
    images: int  # training images
    validation_images: int
    steps_per_epoch: int
    epochs: int  # where the run ends by cost: about
    fe_per_image: float
    bound: bool  # whether the run may cost less: its attacks stop on their own, or it does
    fe: float  # of all steps
    validation_fe: float | None  # of all validations, at most
    forward_flops: int | None  # floating-point operations of a forward pass of one image
    memory: dict[str, int]  # of weights, gradients, optimizer, averaged weights, images
    algorithm_memory: dict[str, int]  # of what the algorithm keeps between steps, by its name
    execution: Execution
    resumed_after: int  # epochs
    measured: MeasuredSteps | None  # by this process; None if Ray's workers train the run
    additional_images: int = 0  # of which every batch has a share

    @property
    def fields(self) -> list[RunField]:
        """The resolved configuration."""
        return fields_of(self.run)

    @property
    def flops(self) -> float | None:
        """Floating-point operations of all steps: of matrix products and convolutions alone."""
        return None if self.forward_flops is None else self.fe * self.forward_flops

    @property
    def seconds(self) -> float | None:
        """Time of steps and validations, if each FE takes as long as in the measured steps."""
        if self.measured is None or not self.measured.fe:
            return None
        return self.measured.seconds / self.measured.fe * (self.fe + (self.validation_fe or 0.0))

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        changed = [one for one in self.fields if one.changed and not one.record]
        values = {name: value for name, value in vars(self).items() if name != "run"}
        return {
            "signature": self.run.signature(),
            "config": self.run.model_dump(mode="json"),
            "changed": {one.path: {"value": one.value, "default": one.default} for one in changed},
            **values,
            "flops": self.flops,
            "execution": str(self.execution),
            "measured": None if self.measured is None else asdict(self.measured),
            "seconds": self.seconds,
        }


def preview_run(
    run: RunConfig,
    splits: Splits,
    workers: Literal["cpu", "cuda"] | None,
    resumed_after: int = 0,
) -> RunPreview:
    """Preview a run that `preflight` has checked, on its `splits`.

    `workers` is the kind of device of Ray's workers; None if this process would train, which then
    measures a few steps on a copy of the network.

    Raises:
        RequestError: if the configured mode of execution is not possible.
        TrainingFailed: if a step fails.
    """
    context = local_context(run.device) if workers is None else DistributedContext()
    device = context.device if workers is None else torch.device(workers)
    per_epoch = num_steps(splits.train, run.batch_size)
    fe_per_epoch = estimate_cost(run.model_copy(update={"fe_per_image": None})) / run.epochs
    fe_per_image, epochs = fe_per_epoch * run.epochs, run.epochs
    fe = fe_per_image * per_epoch * run.batch_size
    if run.fe_per_image is not None:
        fe_per_image, epochs = run.fe_per_image, math.ceil(run.fe_per_image / fe_per_epoch)
        fe = fe_per_image * splits.train.num_images
    validation = estimate_validation(run, splits.valid.num_images)
    try:
        with _random_numbers_kept(context.device):
            set_up_device(run, context.device)
            state = start(run, splits_of(run, context), context, resumed=True)
            how = execution(run, splits, device, state.model)
            flops = _flops(state.model, splits.train.shape)
            memory, algorithm_memory = _memory(run, state, splits), _sizes(state)
            del state
            measured = None
            if workers is None:
                step = (flops or 0) * fe_per_epoch * run.batch_size
                tried = _smaller(run, step, device)
                measured, after = _measured(tried, context, how, resumed_after > 0)
                if tried.batch_size == run.batch_size:  # with what its first steps have made
                    algorithm_memory = after
    except Exception as error:
        raise as_failure(error) from error
    return RunPreview(
        run=run,
        images=splits.train.num_images,
        validation_images=splits.valid.num_images,
        steps_per_epoch=per_epoch,
        epochs=epochs,
        fe_per_image=fe_per_image,
        bound=is_bound(run),
        fe=fe,
        validation_fe=None if validation is None else validation * _validations(run, epochs),
        forward_flops=flops,
        memory=memory,
        algorithm_memory=algorithm_memory,
        execution=how,
        resumed_after=resumed_after,
        measured=measured,
        additional_images=0 if splits.extra is None else splits.extra.num_images,
    )


def _validations(run: RunConfig, epochs: int) -> int:
    return math.ceil(epochs / run.evaluation.every)


def _random_numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _flops(model: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """Operations of a forward pass of one image; None for a network whose operations torch cannot count."""
    weight = next(model.parameters())
    with suppress(Exception):  # whatever the code of a network raises under a mode of dispatch
        return forward_flops(model, weight.new_zeros(1, *shape))
    return None


def _memory(run: RunConfig, state: TrainState, splits: Splits) -> dict[str, int]:
    """Bytes of what is there in every step, by name; none of passes, libraries and the process itself."""
    weights = _bytes([*state.model.parameters(), *state.model.buffers()])
    trained = _bytes(trainable(state.model))
    return {
        "weights": weights,
        "gradients": trained,
        "optimizer": trained if run.optimizer.momentum else 0,
        "averaged": weights if state.ema is not None else 0,
        "images": sum(shard.bytes_in_memory for shard in splits.shards),
    }


def _sizes(state: TrainState) -> dict[str, int]:
    return {name: _bytes(_tensors(part.state_dict())) for name, part in state.parts.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _smaller(run: RunConfig, flops: float, device: torch.device) -> RunConfig:
    """The run with a smaller batch, if a step of so many operations takes too long to be measured."""
    share = min(1.0, _LARGEST_STEP[device.type] / max(flops, 1.0))
    images = min(run.batch_size, max(2, int(share * run.batch_size)))
    if run.data.extra is not None:  # a batch has images of both sources
        rarest = min(run.data.extra.share, 1 - run.data.extra.share)
        images = min(run.batch_size, max(images, math.ceil(1 / rarest)))
    return run.model_copy(update={"batch_size": images})


class _Enough(Exception):
    """Steps have been measured."""


class _StopWatch:
    """Time and cost of every step, until there are enough."""

    def __init__(self, state: TrainState, warm_up: int) -> None:
        self._state, self._warm_up = state, warm_up
        self._laps: list[tuple[float, int]] = []  # seconds, FE
        self._fe, self._began = 0, time.perf_counter()

    def __call__(self, done: StepProgress) -> None:
        del done
        if self._state.context.device.type == "cuda":
            torch.cuda.synchronize(self._state.context.device)
        fe = self._state.meter.fe
        self._laps.append((time.perf_counter() - self._began, fe - self._fe))
        counted = [seconds for seconds, _ in self._laps[self._warm_up :]]
        if len(counted) == _MEASURED or sum(counted) >= _LONG or self._laps[0][0] >= _LONGEST:
            raise _Enough
        self._fe, self._began = fe, time.perf_counter()

    def result(self, images: int) -> MeasuredSteps:
        """The mean of the steps after the first ones, or the last if there are only these."""
        laps = self._laps[self._warm_up :] or self._laps[-1:]
        seconds, fe = (sum(values) / len(laps) for values in zip(*laps, strict=True))
        return MeasuredSteps(len(laps), images, seconds, fe)


def _measured(
    run: RunConfig, context: DistributedContext, how: Execution, resumed: bool
) -> tuple[MeasuredSteps, dict[str, int]]:
    """Measure steps of a new state, and the memory of its algorithm after them.

    Steps of compiled passes are run one by one: compiling would take longer than they do.
    """
    splits = splits_of(run, context)
    state = start(run, splits, context, resumed)
    mode: Mode = "graph" if how.mode == "graph" else "eager"
    watch = _StopWatch(state, _WARM_UP[mode])
    steps = steps_in(mode, state)
    with suppress(_Enough, Diverged):
        for _ in range(1 + _WARM_UP[mode]):  # an epoch may have a single step
            train_epoch(run, splits, state, steps, watch)
    return watch.result(run.batch_size), _sizes(state)
