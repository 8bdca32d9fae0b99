"""Training of one run, epoch by epoch, with validation. Independent of Ray, MLflow and Optuna."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from raytrain.algorithms import AbstractAlgorithm
from raytrain.config.run import RunConfig
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.epoch_metrics import FOSC_EDGES, EpochMetrics, robust_drop
from raytrain.core.errors import Diverged, TrainingFailed
from raytrain.core.losses import CrossEntropy
from raytrain.core.oracle import Oracle
from raytrain.core.regions import STEP, region
from raytrain.core.storage import push
from raytrain.core.threat_models import AbstractThreatModel
from raytrain.core.train_state import StepResult, TrainState
from raytrain.core.types import Batch, mix
from raytrain.data.loader import (
    Splits,
    SplitShard,
    iter_eval,
    iter_train,
)
from raytrain.evaluation.sentinels import probe, readings
from raytrain.evaluation.validation import validate
from raytrain.training.acceleration import accelerate, set_up_device
from raytrain.training.checkpoint import BEST, LAST, Saved, restore, save
from raytrain.training.compilation import CompileCounter, Compiled
from raytrain.training.device_peak import seconds_at_peak
from raytrain.training.part_epoch import PartEpoch, WithinEpoch
from raytrain.training.progress import (
    AbstractProgress,
    OnStep,
    StepProgress,
)
from raytrain.training.replay import Steps
from raytrain.training.setup import build_progress, splits_of, start

DIVERGED = 1e4
"""A mean loss above this many nats is divergence; uniform guessing among ten classes costs 2.3."""

_CHECK_EVERY = {"cpu": 10, "cuda": 50}
"""Steps between checks of the loss, each of which synchronises device and workers."""


@dataclass
class _Sums:
    """Totals of an epoch, accumulated on the device and read once per check or epoch."""

    loss: Tensor
    steps: Tensor
    samples: int = 0

    @classmethod
    def of(cls, part: PartEpoch | None, context: DistributedContext) -> _Sums:
        """The totals at the start of an epoch, or of the part of one that is done: on the leading worker."""
        have = part if context.leads else None
        device = context.device
        return cls(
            torch.tensor(have.loss if have else 0.0, dtype=torch.float64, device=device),
            torch.tensor(have.inner_steps if have else 0, device=device),
            int(have.samples) if have else 0,
        )

    def add(self, result: StepResult) -> None:
        self.loss += result.losses.sum(dtype=torch.float64)
        self.steps += result.steps.sum()
        self.samples += len(result.losses)

    def totals(self, context: DistributedContext) -> tuple[float, float, float]:
        """Loss, inner steps and samples, over all workers: a collective."""
        loss, steps, samples = context.total(
            torch.stack([self.loss, self.steps.double(), self.loss.new_tensor(self.samples)])
        ).tolist()
        return loss, steps, samples

    def means(self, context: DistributedContext) -> tuple[float, float]:
        """Loss and inner steps per sample, over all workers: a collective."""
        loss, steps, samples = self.totals(context)
        return loss / samples, steps / samples


@dataclass(frozen=True)
class _Training:
    """What stays the same from epoch to epoch."""

    run: RunConfig
    splits: Splits
    progress: AbstractProgress
    steps: Steps
    on_step: OnStep
    compiler: CompileCounter = field(default_factory=CompileCounter)
    seconds_at_peak: float | None = None  # of one forward-equivalent; None: not known
    within: WithinEpoch = WithinEpoch()


def fit(
    run: RunConfig,
    context: DistributedContext,
    resume: Saved | None = None,
    on_step: OnStep = lambda done: None,
    within: WithinEpoch | None = None,
) -> Iterator[tuple[EpochMetrics, TrainState]]:
    """Train to the end of `run`, yielding once per epoch; iterate on all workers alike.

    The yielded state is not a copy: save it before the next iteration. Checkpoints are also written
    `within` epochs, if given.

    Raises:
        RequestError: if the configuration does not fit the data.
        Diverged: if the loss is not finite or above `DIVERGED`.
    """
    splits = splits_of(run, context)
    run.check_radius(splits.train.shape)
    set_up_device(run, context.device)
    state = start(run, splits, context, resumed=resume is not None)
    if resume is not None:
        restore(state, resume, context)
        state.stopped_by = run.reason_to_stop(state.patience_count, state.sentinel_values)
    progress = build_progress(run, splits, context)
    at_peak = seconds_at_peak(run.model, state.model, splits.train.shape, context.device)
    compiler = CompileCounter()
    steps = accelerate(run, state, splits)
    _count_compiling(state, compiler.read().seconds)
    training = _Training(
        run, splits, progress, steps, on_step, compiler, at_peak, within or WithinEpoch()
    )
    while not (progress.is_complete(state) or state.stopped_by):
        yield _epoch(training, state), state


def fit_and_checkpoint(
    run: RunConfig,
    context: DistributedContext,
    folder: Path,
    resume: Saved | None = None,
    note: Callable[[EpochMetrics], None] | None = None,
    on_step: OnStep = lambda done: None,
) -> Iterator[EpochMetrics]:
    """Run `fit` and write `last.pt` and `best.pt` to `folder`, each before its epoch is yielded.

    `note` is called with every row before the checkpoints of its epoch are written.

    Raises:
        TrainingFailed: on every worker, also if the folder cannot be written.
    """
    within = WithinEpoch(
        run.checkpoint_minutes, lambda state: save(state, run, folder / LAST, context)
    )
    for report, state in fit(run, context, resume, on_step, within):
        if note is not None:
            note(report)
        if report.improved:
            save(state, run, folder / BEST, context)
        if state.epoch % run.checkpoint_every == 0 or report.final:
            save(state, run, folder / LAST, context)
        within.restart()
        if report.final:
            _leave(folder, context)
        yield report


def _leave(folder: Path, context: DistributedContext) -> None:
    """Copy what the storage does not have yet at the end of a run: a collective.

    Raises:
        TrainingFailed: on every worker, if it does not answer; the run is whole on the leading one.
    """
    problem = None
    if context.leads:
        try:
            push(folder)
        except OSError as error:
            problem = error.strerror or str(error)
    if context.total(torch.tensor(int(problem is not None), device=context.device)):
        raise TrainingFailed(
            f"storage: {problem or 'see the leading worker'}; the run is whole in {folder} of its machine"
        )


def train_epoch(
    run: RunConfig, splits: Splits, state: TrainState, steps: Steps, on_step: OnStep
) -> None:
    """Run the steps of one epoch, without a validation; what `on_step` raises ends them.

    Raises:
        Diverged: as `fit` does.
    """
    progress = build_progress(run, splits, state.context)
    training = _Training(run, splits, progress, steps, on_step)
    _train(training, state, _Clock(training.compiler))


def _epoch(training: _Training, state: TrainState) -> EpochMetrics:
    run, progress, context = training.run, training.progress, state.context
    trained, speed = _timed(training, state)
    state.epoch += 1
    context.average_buffers(state.model)
    if state.ema is not None:
        context.average_buffers(state.ema.module)
    fosc, fosc_box = _probe(trained.algorithm.ball, state, trained.batch, trained.result, context)
    own = trained.algorithm.measures(state, trained.batch)
    over = progress.is_complete(state)
    due = state.epoch % run.evaluation.every == 0 or over
    valid = _validate(run, state, training.splits.valid, context) if due else _ValidationResult()
    meter = state.meter.total(context)
    return EpochMetrics(
        epoch=state.epoch,
        progress=progress.share(state),
        loss=trained.loss,
        inner_steps=trained.inner_steps,
        fosc=float(fosc.mean()),
        fosc_box=float(fosc_box.mean()),
        fosc_p90=float(fosc.quantile(0.9)),
        lr=trained.rate,
        fe=meter.fe,
        samples=meter.samples,
        seconds=state.seconds,
        compile_seconds=state.compile_seconds,
        images_per_second=run.batch_size / speed.seconds_per_step,
        step_ms=1e3 * speed.seconds_per_step,
        bf16_peak_share=speed.bf16_peak_share,
        execution=speed.execution,
        clean=valid.clean,
        robust=valid.robust,
        best=state.best if due else None,
        improved=valid.improved,
        final=over or state.stopped_by is not None,
        stopped_early=state.stopped_by is not None and not over,
        stopped_by=None if over else state.stopped_by,
        fosc_below=tuple(float((fosc <= edge).double().mean()) for edge in FOSC_EDGES),
        own=own,
        sentinels=valid.sentinels,
    )


@dataclass(frozen=True)
class _ValidationResult:
    """Result of a validation; the defaults are those of an epoch without one."""

    clean: float | None = None
    robust: float | None = None
    improved: bool = False
    sentinels: Mapping[str, float] = field(default_factory=dict)


def _validate(
    run: RunConfig, state: TrainState, part: SplitShard, context: DistributedContext
) -> _ValidationResult:
    """Validate the network, compute the sentinels, and set `stopped_by` if a rule ends training."""
    batch_size, model = run.evaluation.batch_size, state.eval_model
    batches = iter_eval(part, batch_size, mix(run.seed, "valid"), run.evaluation.images)
    validation, flags = validate(
        model, batches, run.threat, run.evaluation, context, run.precision
    )
    improved = validation.robust > state.best
    gain = 0.0 if run.early_stop is None else run.early_stop.min_gain
    state.patience_count = 0 if validation.robust > state.best + gain else state.patience_count + 1
    state.best = max(state.best, validation.robust)
    sentinel_values: dict[str, float] = {}
    if run.sentinels is not None:
        ball, corners = run.evaluation.ball(run.threat), run.sentinels.corners
        probed = probe(part, flags, run.sentinels.images, batch_size, run.seed)
        sentinel_values = readings(model, probed, ball, corners, context, run.precision)
    state.sentinel_values = {
        **sentinel_values,
        "robust_drop": robust_drop(state.best, validation.robust),
    }
    state.stopped_by = run.reason_to_stop(state.patience_count, state.sentinel_values)
    return _ValidationResult(validation.clean, validation.robust, improved, sentinel_values)


@dataclass(frozen=True)
class _EpochResult:
    """Result of the steps of an epoch."""

    algorithm: AbstractAlgorithm  # of the last step
    batch: Batch  # the last one
    result: StepResult  # of the last step
    loss: float  # means over the epoch
    inner_steps: float
    rate: float  # of the last step


@dataclass(frozen=True)
class _Speed:
    """How fast the steps of an epoch were, compiling left out, and how they were executed."""

    seconds_per_step: float
    bf16_peak_share: float | None
    execution: str


def _timed(training: _Training, state: TrainState) -> tuple[_EpochResult, _Speed]:
    """Run and time the steps of one epoch."""
    first, fe, clock = state.step, state.meter.fe, _Clock(training.compiler)
    trained = _train(training, state, clock)
    _synchronise(state.context)
    compiled, seconds = clock.add(state), clock.training
    at_peak = training.seconds_at_peak
    speed = _Speed(
        seconds_per_step=seconds / (state.step - first),
        bf16_peak_share=None if at_peak is None else (state.meter.fe - fe) * at_peak / seconds,
        execution=state.execution if state.compiled is None else f"{state.execution}; {compiled}",
    )
    return trained, speed


def _count_compiling(state: TrainState, seconds: float) -> None:
    state.seconds += seconds
    state.compile_seconds += seconds


class _Clock:
    """The seconds of an epoch so far."""

    def __init__(self, compiler: CompileCounter) -> None:
        self.training = 0.0  # compiling left out
        self._compiler, self._compiled = compiler, compiler.read().seconds
        self._last = time.perf_counter()

    def add(self, state: TrainState) -> Compiled:
        """Add the seconds since the last call to those of the state; return what has been compiled."""
        now, compiled = time.perf_counter(), self._compiler.read()
        compiling = compiled.seconds - self._compiled
        seconds = now - self._last - compiling
        state.seconds += seconds
        _count_compiling(state, compiling)
        self.training += seconds
        self._last, self._compiled = now, compiled.seconds
        return compiled


def _train(training: _Training, state: TrainState, clock: _Clock) -> _EpochResult:
    """Run the steps of one epoch, or what is left of one, or fewer if training is complete within it."""
    run, progress, context = training.run, training.progress, state.context
    source, spec, epoch = training.splits.source, run.data, state.epoch
    pad = source.pad if spec.pad is None else spec.pad
    flip = source.flip if spec.flip is None else spec.flip
    state.model.train()
    part, state.part_epoch = state.part_epoch, None
    sums = _Sums.of(part, context)
    scheduled: dict[str, float | str] = {}
    algorithm, batch, result, rate = run.algorithm_with({}), None, None, 0.0
    loss, every = None, _CHECK_EVERY[context.device.type]
    first, began = (
        part.done if part else 0,
        progress.start_epoch(state, part.began if part else None),
    )
    train, extra = training.splits.train, training.splits.extra
    last = train.num_images // run.batch_size - 1
    for done, batch in enumerate(
        iter_train(train, run.batch_size, run.seed, epoch, pad, flip, first, extra, spec.cutmix),
        first,
    ):
        rate = run.optimizer.set_rate(state.optimizer, progress.mid_step_share(state, done))
        state.progress = progress.before_step(state, done)
        if (now := run.scheduled(state.progress.step)) != scheduled:
            scheduled, algorithm = now, run.algorithm_with(now)
        with region(STEP):
            result = training.steps(algorithm, batch, scheduled)
        state.step += 1
        state.meter.samples += len(batch)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        sums.add(result)
        if (done + 1) % every == 0:
            loss, _ = sums.means(context)
            _check_finite(loss, epoch)
        share = progress.mid_step_share(state, done)
        training.on_step(StepProgress(share, epoch + 1, state.step, state.meter.samples, loss))
        if progress.is_complete(state):
            break
        if (done + 1) % every == 0 and done < last and training.within.is_due(context):
            clock.add(state)
            state.part_epoch = PartEpoch(done + 1, began, *sums.totals(context))
            training.within.save(state)
            state.part_epoch = None
    assert batch is not None and result is not None
    loss, inner_steps = sums.means(context)
    _check_finite(loss, epoch)
    return _EpochResult(algorithm, batch, result, loss, inner_steps, rate)


def _probe(
    ball: AbstractThreatModel,
    state: TrainState,
    batch: Batch,
    result: StepResult,
    context: DistributedContext,
) -> tuple[Tensor, Tensor]:
    """FOSC of the last training perturbations at the weights they led to, in eval mode, over all
    workers.

    One gradient per epoch, the same for every algorithm; it is not part of the training cost.
    """
    oracle = Oracle(
        state.model,
        CrossEntropy(),
        batch,
        Meter(),
        attack_bn="eval",
        precision=state.precision,
    )
    _, grad = oracle.delta_grad(result.delta)
    return (
        context.gather(ball.gap(result.delta, grad)),
        context.gather(ball.box_gap(result.delta, grad, batch.images)),
    )


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss) or loss > DIVERGED:
        raise Diverged(
            f"training diverged in epoch {epoch + 1}: the mean loss is {loss:.3g}; a smaller "
            "optimizer.lr usually helps"
        )


def _synchronise(context: DistributedContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
