"""What a run begins with: its images, network and state, and the checks before training."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raytrain.config.run import RUNTIME, RunConfig
from raytrain.core.algorithm_state import TrainingSetup
from raytrain.core.console import log_line
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.core.network import copy_of
from raytrain.core.train_state import TrainState
from raytrain.core.types import BatchRandom, mix
from raytrain.core.user_code import user_code_errors
from raytrain.data.catalogue import Source
from raytrain.data.loader import Splits, SplitShard, num_steps, open_source, open_splits
from raytrain.data.spec import DataSpec
from raytrain.evaluation.checks import of_answers
from raytrain.models import Classifier, check_network, check_single_images
from raytrain.training.acceleration import memory_format
from raytrain.training.checkpoint import Saved, restore
from raytrain.training.progress import AbstractProgress, ByCost, ByEpochs

_NUM_CHECKED = 16  # training images on which a network of the user is checked before training


def splits_of(run: RunConfig, context: DistributedContext) -> Splits:
    """Read the images of a run, on the device and in the form in which it is trained on them."""
    dtype = torch.float64 if run.precision == "fp64" else torch.float32
    return open_splits(run.data, context, dtype, memory_format(run), run.batch_size)


def check_resumable(run: RunConfig, saved: Saved, splits: Splits) -> None:
    """Check that the checkpoint is of this run and that training from it is not complete.

    The length, the evaluation and numbers such as the learning rate may change: see `log_changes`.

    Raises:
        RequestError: naming what was expected.
    """
    check_kinds(run, saved.run)
    if saved.content.get("part_epoch") is not None:
        for field in ("batch_size", "seed", "data"):
            if run.computed()[field] != saved.run.computed()[field]:
                raise RequestError(
                    f"{field}: the checkpoint is within an epoch, whose batches depend on it; expected "
                    "the same as before until the next epoch has ended"
                )
    state = start(run, splits, DistributedContext(), resumed=True)
    restore(state, saved, DistributedContext())
    if build_progress(run, splits, DistributedContext()).is_complete(state):
        by_epochs = run.fe_per_image is None
        end = f"epochs: {saved.epoch}" if by_epochs else f"fe_per_image: {run.fe_per_image:g}"
        found = f"; found {run.epochs}" if by_epochs and run.epochs < saved.epoch else ""
        raise RequestError(f"{end} have been trained already; expected more, to go on{found}")
    if why := run.reason_to_stop(saved.patience_count, saved.sentinel_values):
        rule = why.partition(":")[0]
        raise RequestError(
            f"{why}: the run has stopped early after {saved.epoch} epochs; {rule}=null goes on to the "
            "end"
        )


_IDENTITY = ("algorithm", "outer", "model", "threat")
_FREE = RUNTIME | {"data", "epochs", "fe_per_image", "early_stop", "evaluation", "sentinels"}


def check_kinds(run: RunConfig, before: RunConfig) -> None:
    """Refuse another kind of algorithm, outer update, network or threat model."""
    for field in _IDENTITY:
        key = "norm" if field == "threat" else "name"
        now, then = (getattr(getattr(one, field), key) for one in (run, before))
        if now != then:
            raise RequestError(
                f"{field}: the run to continue was trained with {then}, found {now}; expected the "
                "same, or a new run"
            )


def log_changes(run: RunConfig, before: RunConfig, epoch: int) -> None:
    """Log a line for another length, which changes all schedules, and one for other changed fields.

    `epoch` epochs of the run were trained as it was `before`.
    """
    changed = [
        field
        for field in RunConfig.model_fields
        if field not in _FREE and getattr(run, field) != getattr(before, field)
    ]
    if _length(run) != _length(before):
        log_line(
            f"raytrain: --resume: {_length(before)} changed to {_length(run)}; after epoch {epoch} "
            "the learning rate and other schedules continue as in a run of this length"
        )
    if changed:
        log_line(
            f"raytrain: --resume: {', '.join(changed)} changed since the run began; its parameters in "
            "MLflow are those of its beginning"
        )


def _length(run: RunConfig) -> str:
    return (
        f"epochs={run.epochs}"
        if run.fe_per_image is None
        else f"fe_per_image={run.fe_per_image:g}"
    )


def preflight(run: RunConfig, resumed: bool = False) -> Splits:
    """Check a run before training: read the data, build and try the network, allocate the state.

    Weights to start from are read unless the run is `resumed`, from a checkpoint.

    Raises:
        RequestError: naming the field or file.
    """
    run.check_names()
    splits = open_splits(run.data, DistributedContext(), batch_size=run.batch_size)
    run.check_radius(splits.train.shape)
    num_steps(splits.train, run.batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix(run.seed, "weights"))
        model = build_model(run, splits.source)
        if run.model.users:
            build_model(run, splits.source)  # raises if it shares weights with the first
    if not resumed:
        load_weights(run, model, splits.source)
    _check_network(run, model, splits, DistributedContext())
    if run.model.users:
        _warn(run, model, splits.train)
    run.algorithm.build(run.threat, run.outer).memory(
        _setup(run, splits, model, DistributedContext())
    )
    return splits


def _check_network(
    run: RunConfig, model: Classifier, splits: Splits, context: DistributedContext
) -> None:
    """Try the network on the device and in the precision of training, unless `build` has done so."""
    shape, classes = splits.train.shape, len(splits.source.classes)
    as_built = context.device.type == "cpu" and run.precision == "fp32"
    if run.model.foreign(splits.source.size) and not as_built:
        check_network(model, shape, classes, context.device, run.precision)
    if run.batch_size == run.workers:
        check_single_images(model, shape, classes, run.workers)


def _warn(run: RunConfig, model: Classifier, part: SplitShard) -> None:
    """Log a line for every check of the evaluation that the outputs of the network fail."""
    rows = part.index(torch.arange(min(_NUM_CHECKED, part.num_images)))
    batch = part.batch(rows, BatchRandom(0, len(rows), slice(None), rows.device))
    with user_code_errors(model.name, "cannot be tried on training images"):
        findings = of_answers(model, batch.images, run.seed)
    for finding in findings:
        if not finding.passed:
            log_line(f"raytrain: model.name: {model.name}: {finding.sentence}")


def build_progress(
    run: RunConfig, splits: Splits, context: DistributedContext
) -> AbstractProgress:
    """Return the progress of a run: in epochs, or in cost if `fe_per_image` is set."""
    if run.fe_per_image is not None:
        return ByCost(run.fe_per_image, splits.train.num_images, context)
    return ByEpochs(run.epochs, num_steps(splits.train, run.batch_size))


def start(
    run: RunConfig, splits: Splits, context: DistributedContext, resumed: bool = False
) -> TrainState:
    """Return the initial state: network, optimiser and parts, the same on every worker.

    `resumed`: the weights are going to be those of a checkpoint, and `model.weights` is not read.
    """
    torch.manual_seed(mix(run.seed, "weights"))
    model = build_model(run, splits.source)
    if not resumed:
        load_weights(run, model, splits.source)
    _check_network(run, model, splits, context)
    model = model.to(context.device, splits.train.dtype).to(memory_format=memory_format(run))
    wrapper = context.wrap(model, fixed=not run.model.users)
    torch.manual_seed(mix(run.seed, "dropout", context.rank))
    ema = None
    if run.ema is not None:
        average = get_ema_multi_avg_fn(run.ema)
        ema = AveragedModel(copy_of(model), multi_avg_fn=average, use_buffers=True)
        if (
            run.model.weights is not None
        ):  # of random weights the first step is not averaged with them
            ema.n_averaged.fill_(1)
    return TrainState(
        model=model,
        wrapper=wrapper,
        optimizer=run.optimizer.build(model),
        precision=run.precision,
        context=context,
        parts=run.algorithm.build(run.threat, run.outer).memory(
            _setup(run, splits, model, context)
        ),
        ema=ema,
        classes=splits.source.classes,
    )


def _setup(
    run: RunConfig, splits: Splits, model: nn.Module, context: DistributedContext
) -> TrainingSetup:
    return TrainingSetup(
        context=context,
        model=model,
        num_images=splits.num_indices,
        shape=splits.train.shape,
        batch_size=run.batch_size,
        dtype=splits.train.dtype,
        seed=run.seed,
    )


def build_model(run: RunConfig, source: Source) -> Classifier:
    """Build the configured network for the images and classes of `source`."""
    return run.model.build(
        source.channels, source.size, len(source.classes), source.mean, source.std
    )


def load_weights(run: RunConfig, model: Classifier, source: Source) -> None:
    """Load the weights that the run starts from, if any, into its network for the images of `source`."""
    run.model.load_weights(model, source.channels, len(source.classes))


def network(saved: Saved, data: DataSpec | None = None) -> torch.nn.Module:
    """Load the network of a checkpoint, on the CPU, in eval mode, from images in [0, 1] to logits.

    `data` replaces the data set of the checkpoint, for example if its files have moved.

    Raises:
        RequestError: if the data set has other classes than those it was trained on.
    """
    source = open_source(data or saved.run.data)
    saved.check_classes(source.classes)
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced
        model = build_model(saved.run, source)
    if saved.run.precision == "fp64":
        model = model.double()
    with user_code_errors(model.name, "is not the network of the checkpoint"):
        model.load_state_dict(saved.weights)
    return model.eval()
