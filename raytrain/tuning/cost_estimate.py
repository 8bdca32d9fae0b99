"""What a configuration would cost, told without training it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raytrain.algorithms import AbstractAlgorithm, Nested
from raytrain.algorithms.yopo import stem_share
from raytrain.attacks import Gap, Never
from raytrain.config.run import RunConfig
from raytrain.core.algorithm_state import Numbers, TrainingSetup
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.train_state import TrainState
from raytrain.core.types import Batch, Clock, Dice
from raytrain.data.catalogue import SOURCES, Source
from raytrain.models import ModelSpec
from raytrain.models.classifier import Classifier
from raytrain.outer import AbstractOuter, Awp, Engm
from raytrain.outer.engm import EngmMemory

_POINTS = 5  # of every stretch of training, where numbers change over it
_FEW = 2  # images of a measured step: BatchNorm needs more than one
SMALL = SOURCES["digits"]
UNKNOWN = Source("an unknown data set", 3, 32, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)


def estimate_cost(run: RunConfig) -> float:
    """Forward-equivalents per training image of the whole run: its `fe_per_image`, or what its epochs
    come to; at most that where `is_bound(run)`.

    The meter of training counts a step on two small random images: only YOPO's cost depends on the
    network and its images, by the first layer's share of a forward. Rules that change with the epoch
    (a warm-up, own losses from the second epoch on) are priced before and after, numbers that change
    over training at five points of each stretch, ENGM's measurements by their share of the updates. An
    epoch leaves out images that fill no whole batch: the run's own count is smaller by their share.
    """
    if run.fe_per_image is not None:
        return run.fe_per_image
    with torch.random.fork_rng(devices=[]):
        return _of_epochs(run)


def is_bound(run: RunConfig) -> bool:
    """Whether a run may cost less than its price: attacks stop on their own, or the run does."""
    if run.early_stop is not None or (run.sentinels and run.sentinels.stop.limits()):
        return True
    if run.fe_per_image is not None:
        return False
    stop = getattr(getattr(run.algorithm_with({}), "attack", None), "stop", None)
    return isinstance(stop, Gap) and (stop.c_max >= 0 or stop.anchor == "start")


# -------------------------------------------------------------------- over training


@dataclass(frozen=True)
class _Moment:
    """A point of training that stands for `epochs` of it."""

    epoch: int
    progress: float
    epochs: float


def _of_epochs(run: RunConfig) -> float:
    """The sum over all epochs; what costs the same is measured once."""
    known: dict[str, float] = {}
    total = 0.0
    for moment in _moments(run):
        scheduled = run.scheduled(moment.progress)
        key = f"{_stretch(run, moment.epoch)} {_what_costs(scheduled)}"
        if key not in known:
            known[key] = _per_image(run, moment, scheduled)
        total += moment.epochs * known[key]
    return total


def _turns(run: RunConfig) -> list[int]:
    """Epochs at whose beginning a fixed rule may change the cost."""
    named = (getattr(run.algorithm, "warm", 0), getattr(run.outer, "warmup", 0))
    first = 1 if getattr(run.algorithm, "weighting", "none") != "none" else 0
    return sorted({turn for turn in (first, *named) if 0 < turn < run.epochs})


def _stretch(run: RunConfig, epoch: int) -> int:
    return sum(turn <= epoch for turn in _turns(run))


def _moments(run: RunConfig) -> Iterator[_Moment]:
    edges = [0, *_turns(run), run.epochs]
    points = _POINTS if run.curriculum else 1
    for begin, end in zip(edges, edges[1:], strict=False):
        for point in range(points):
            at = begin + (end - begin) * (point + 0.5) / points
            yield _Moment(int(at), at / run.epochs, (end - begin) / points)


def _what_costs(scheduled: Mapping[str, float | str]) -> list[Any]:
    """Whole steps; of any other number only whether it is zero, which may save a pass."""
    return [
        round(float(value)) if name == "steps" else value == 0 for name, value in scheduled.items()
    ]


# -------------------------------------------------------------------- one update


@dataclass(frozen=True)
class _Costs:
    """FE per image of the first and the second step on a batch."""

    first: float
    later: float
    updates: int  # of the weights in a step, as ENGM counts them


def _per_image(run: RunConfig, moment: _Moment, scheduled: Mapping[str, float | str]) -> float:
    """FE per image of a step, those of ENGM's rare measurements spread over all steps."""
    step = functools.partial(_measured, run, moment, scheduled)
    costs, engm = step(_FEW), _engm(run.outer)
    if engm is None or engm.estimator == "input":
        return costs.later
    every = engm.estimator == "exact"
    most = None if every else engm.probes
    probes = run.batch_size if most is None else min(most, run.batch_size)
    first = costs.first
    if engm.probe_bn == "train":  # each probe walks its whole batch back
        first += (step(_FEW + 1).first - first) * (probes - _FEW)
        share = 1.0
    else:
        share = probes / run.batch_size
    return first if every else costs.later + (first - costs.later) * share * _often(engm, costs)


def _often(engm: Engm, costs: _Costs) -> float:
    """Measurements per step."""
    return costs.updates / engm.tau


def _engm(outer: AbstractOuter) -> Engm | None:
    if isinstance(outer, Awp):
        return _engm(outer.then)
    return outer if isinstance(outer, Engm) else None


def _measured(
    run: RunConfig, moment: _Moment, scheduled: Mapping[str, float | str], size: int
) -> _Costs:
    """Two steps on a batch of `size` random images, as if training were at this moment."""
    run, model, context = _one_by_one(run), _network("small_cnn", SMALL), DistributedContext()
    algorithm = _never_stopping(run.algorithm_with(scheduled))
    setting = TrainingSetup(context, model, size, _shape(SMALL), size, torch.float32, run.seed)
    state = TrainState(model, model, _Still(model), parts=algorithm.memory(setting))
    if "stem" in state.parts and ":" not in run.model.name:
        state.parts["stem"] = Numbers(share=_stem_share(run.data.name, run.model.name))
    state.epoch, state.clock = moment.epoch, Clock(moment.progress, moment.progress)
    batch = _batch(size)
    first = _fe(algorithm, state, batch) / size
    if _engm(run.outer) is None:
        return _Costs(first, first, 1)
    memory = state.part("engm", EngmMemory)
    updates = memory.updates
    return _Costs(first, _fe(algorithm, state, batch) / size, updates)


def _fe(algorithm: AbstractAlgorithm, state: TrainState, batch: Batch) -> float:
    """What one step adds to the meter, unrounded."""
    state.meter = Meter()
    algorithm.step(state, batch)
    return dataclasses.replace(state.meter, stem=0.0).fe + state.meter.stem


def _never_stopping(algorithm: AbstractAlgorithm) -> AbstractAlgorithm:
    """The same, its attack taking all its steps."""
    if not isinstance(algorithm, Nested):
        return algorithm
    attack = algorithm.attack.model_copy(update={"stop": Never()})
    return dataclasses.replace(algorithm, attack=attack)


# -------------------------------------------------------------------- stand-ins


class _Still(torch.optim.Optimizer):
    """Moves nothing. Torch's own import its compiler when the first of them is made: seconds."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": 0.0}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        del set_to_none
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self, closure: Any = None) -> Any:
        del closure


def _one_by_one(run: RunConfig) -> RunConfig:
    """Per-sample gradients without vmap, whose first use takes longer than all the rest; ENGM measures
    all samples once, in the first step.
    """
    changes: dict[str, Any] = {"outer": _measuring_once(run.outer)}
    if hasattr(run.algorithm, "chunk"):
        changes["algorithm"] = run.algorithm.model_copy(update={"chunk": 1})
    return run.model_copy(update=changes)


def _measuring_once(outer: AbstractOuter) -> AbstractOuter:
    if isinstance(outer, Awp):
        return outer.model_copy(update={"then": _measuring_once(outer.then)})
    if isinstance(outer, Engm):
        return outer.model_copy(update={"chunk": 1, "probes": None, "tau": 10**9})
    return outer


def _batch(size: int) -> Batch:
    """Random images, small ones: what a pass counts is images."""
    pixels = torch.rand(size, *_shape(SMALL), generator=torch.Generator().manual_seed(0))
    index = torch.arange(size)
    return Batch(pixels, index, index, Dice(0, size, slice(None), torch.device("cpu")))


def _network(name: str, source: Source) -> Classifier:
    return ModelSpec(name=name).build(
        source.channels, source.size, len(source.classes), source.mean, source.std
    )


def _shape(source: Source) -> tuple[int, int, int]:
    return source.channels, source.size, source.size


@functools.lru_cache(maxsize=64)
def _stem_share(data: str, model: str) -> float:
    """The first layer's part of a forward of this network, which is laid out and not built."""
    context, source = DistributedContext(torch.device("meta")), SOURCES.get(data, UNKNOWN)
    with context.device:
        network = _network(model, source)
    return stem_share(TrainingSetup(context, network, 1, _shape(source), 1, torch.float32, 0))
