"""Training steps that are recorded once and replayed on new data: each kind of step as one CUDA graph.

Batches are copied into static tensors, random numbers are drawn beforehand into static tensors, the
learning rate is a tensor, and steps whose numbers differ (`AbstractAlgorithm.replay_key`) are recorded
apart. Of steps that cannot be recorded as a whole the passes of the network are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from raytrain.algorithms import AbstractAlgorithm
from raytrain.core.console import log_line
from raytrain.core.errors import NotReplayable
from raytrain.core.network import FrozenNetwork, trainable
from raytrain.core.recording import NUM_EAGER, RecordedPasses, Recorder, Replay
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import AugmentedView, Batch, BatchRandom, MixedLabels

Step = Callable[[], StepResult]

_MAX_KINDS = 8  # each holds random numbers and, once recorded, the memory of a step

Steps = Callable[[AbstractAlgorithm, Batch, Mapping[str, float | str]], StepResult]
"""Runs one step: of an algorithm, on a batch, with these numbers of a curriculum."""


@runtime_checkable
class Counted(Protocol):
    """A part of the state that counts on the host, by as much in every step with the same key."""

    counts: dict[str, int]


def eager_steps(state: TrainState) -> Steps:
    """Return steps that launch their operations one by one."""
    return lambda algorithm, batch, scheduled: algorithm.step(state, batch)


class StaticRandom(BatchRandom):
    """The random numbers of `BatchRandom`, in tensors that stay where they are.

    What has been drawn for one batch is drawn for the next one by `refill`.
    """

    def __init__(self, source: BatchRandom) -> None:
        super().__init__(source.seed, source.width, source.slots, source.device)
        self._values: dict[tuple[Any, ...], Tensor] = {}
        self._source = [source]  # none while a step is recorded

    def refill(self, source: BatchRandom) -> None:
        """Draw for another batch what has been drawn so far."""
        self._source[:] = [source]
        for (method, *arguments), values in self._values.items():
            values.copy_(getattr(source, method)(*arguments))

    def close(self) -> None:
        """Refuse to draw what has not been drawn before: a recording would fix its values."""
        self._source.clear()

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return self._drawn("uniform", purpose, *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self._drawn("normal", purpose, *shape)

    def integers(self, purpose: str, high: int) -> Tensor:
        return self._drawn("integers", purpose, high)

    def _drawn(self, method: str, *arguments: Any) -> Tensor:
        key = (method, *arguments)
        if key not in self._values:
            if not self._source:
                raise NotReplayable(f"a later step draws other random numbers ({arguments[0]})")
            self._values[key] = getattr(self._source[0], method)(*arguments).clone()
        return self._values[key]


@dataclass
class _Kind:
    """Steps with the same key."""

    rng: StaticRandom
    seen: int = 0
    recorded: tuple[Replay, StepResult] | None = None
    counts: list[dict[str, float]] = field(default_factory=list)  # of a step, for each counter


class ReplayedSteps:
    """Run the first steps of every kind, then record one, and replay it from there on."""

    def __init__(self, state: TrainState, recorder: Recorder) -> None:
        self._state, self._recorder = state, recorder
        self._kinds: dict[Hashable, _Kind] = {}
        self._batch: Batch | None = None  # static
        self.replayed = 0  # steps so far

    def __call__(
        self, algorithm: AbstractAlgorithm, batch: Batch, scheduled: Mapping[str, float | str]
    ) -> StepResult:
        if self._state.context.world > 1:
            raise NotReplayable("collectives are not recorded")
        key = algorithm.replay_key(self._state), tuple(scheduled.items())
        static = self._filled(batch)
        kind = self._kind(key, batch.rng)
        kind.rng.refill(batch.rng)
        kind.seen += 1
        if kind.recorded is None:

            def step() -> StepResult:
                return algorithm.step(self._state, replace(static, rng=kind.rng))

            if kind.seen <= NUM_EAGER:
                return self._recorder.run(step)
            return self._record(kind, step)
        replay, result = kind.recorded
        for counter, more in zip(_counters(self._state), kind.counts, strict=True):
            for name, count in more.items():
                counter[name] += count
        replay()
        self.replayed += 1
        return result

    def _record(self, kind: _Kind, step: Step) -> StepResult:
        before = [dict(counter) for counter in _counters(self._state)]
        kind.rng.close()
        try:
            kind.recorded = self._recorder.record(step)
        except RuntimeError as error:
            for counter, values in zip(_counters(self._state), before, strict=True):
                counter.update(values)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise NotReplayable(reason) from error
        kind.counts = [
            {name: value - old[name] for name, value in new.items()}
            for new, old in zip(_counters(self._state), before, strict=True)
        ]
        return kind.recorded[1]

    def _kind(self, key: Hashable, rng: BatchRandom) -> _Kind:
        """The kind of this key; the one that has not been seen for longest makes room for a new one."""
        kind = self._kinds.pop(key, None)
        if kind is None:
            kind = _Kind(StaticRandom(rng))
            if len(self._kinds) >= _MAX_KINDS:
                oldest = self._kinds.pop(next(iter(self._kinds)))
                if oldest.recorded is None:
                    raise NotReplayable("the numbers of a step change too often to be recorded")
        self._kinds[key] = kind
        return kind

    def _filled(self, batch: Batch) -> Batch:
        """The static batch, with the images of this one."""
        if self._batch is None:
            self._batch = _copy(batch)
        static, given = _tensors(self._batch), _tensors(batch)
        if [one.shape for one in static] != [one.shape for one in given]:
            raise NotReplayable("batches differ in size")
        for ours, values in zip(static, given, strict=True):
            ours.copy_(values)
        return self._batch


class ReplayedWherePossible:
    """Replayed steps; from the first on that cannot be replayed, steps with replayed passes.

    `new_recorder` returns a recorder; recordings of one recorder share memory.
    """

    def __init__(self, state: TrainState, new_recorder: Callable[[], Recorder]) -> None:
        self._state, self._new_recorder = state, new_recorder
        self._steps: Steps = ReplayedSteps(state, new_recorder())

    def __call__(
        self, algorithm: AbstractAlgorithm, batch: Batch, scheduled: Mapping[str, float | str]
    ) -> StepResult:
        try:
            return self._steps(algorithm, batch, scheduled)
        except NotReplayable as reason:
            if self._state.context.leads:
                log_line(f"raytrain: performance: passes are recorded, not whole steps: {reason}")
            self._state.execution += f"; passes recorded, not steps: {reason}"
            record_passes(self._state, self._new_recorder, len(batch))
            self._steps = eager_steps(self._state)
        return self._steps(algorithm, batch, scheduled)


def record_passes(
    state: TrainState, new_recorder: Callable[[], Recorder], batch_size: int
) -> None:
    """Record the passes of the network: those of attacks, and with one worker those of updates."""
    frozen = state.frozen or FrozenNetwork.of(state.model, lambda module: module)
    attacked = RecordedPasses(frozen.predict, frozen.module, new_recorder(), batch_size)
    state.frozen = FrozenNetwork(frozen.module, attacked)
    if state.context.world == 1:
        state.compiled = RecordedPasses(
            state.compiled or state.wrapper,
            state.model,
            new_recorder(),
            batch_size,
            trainable(state.model),
        )


def _counters(state: TrainState) -> list[dict[str, Any]]:
    """What steps count on the host."""
    parts = [part.counts for part in state.parts.values() if isinstance(part, Counted)]
    return [vars(state.meter), *parts]


def _tensors(batch: Batch) -> list[Tensor]:
    view = [] if batch.view is None else [batch.view.top, batch.view.left, batch.view.mirrored]
    mixed = [] if batch.mixed is None else [batch.mixed.other, batch.mixed.share]
    return [batch.images, batch.labels, batch.index, *mixed, *view]


def _copy(batch: Batch) -> Batch:
    images, labels, index, *rest = (one.clone() for one in _tensors(batch))
    mixed = None if batch.mixed is None else MixedLabels(*rest[:2])
    view = None if batch.view is None else AugmentedView(batch.view.pad, *rest[-3:])
    return replace(batch, images=images, labels=labels, index=index, view=view, mixed=mixed)
