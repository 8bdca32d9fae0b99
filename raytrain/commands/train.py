"""What `raytrain train` does: one run, recorded in MLflow, its checkpoints in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import join
from typing import Any

import numpy as np
import torch

from raytrain.commands.results import Result, ShownResult, word_of
from raytrain.config.request import (
    Configuration,
    Overrides,
    as_run,
    parse_overrides,
    with_keywords,
)
from raytrain.config.run import RunConfig
from raytrain.core.console import log_line
from raytrain.core.distributed_context import local_context
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import RequestError
from raytrain.core.file_systems import is_url
from raytrain.core.files import check_folder
from raytrain.core.signals import continued_by, interruptible, raise_if_interrupted
from raytrain.core.storage import check, shown, tidy
from raytrain.data.loader import Splits, SplitShard
from raytrain.distributed.jobs import Job, RecentRows, local_rows
from raytrain.distributed.ray_metrics import DriverMetrics
from raytrain.distributed.ray_session import (
    check_fits,
    concurrent_trials,
    session,
    wanted_cluster,
    worker_resources,
)
from raytrain.distributed.shared_storage import check_shared
from raytrain.distributed.worker_group import WorkerGroup
from raytrain.tracking import Tracker, provenance, run_link, tracked
from raytrain.tracking.data_sets import training_inputs
from raytrain.tracking.default_name import default_name
from raytrain.tracking.registered_model import registered
from raytrain.tracking.run_names import run_of
from raytrain.tracking.store_check import check_store
from raytrain.training.acceleration import check_mode
from raytrain.training.checkpoint import BEST, LAST, load
from raytrain.training.preview import RunPreview, preview_run
from raytrain.training.profiling import StepProfile
from raytrain.training.progress import OnStep, StepMetrics, StepProgress
from raytrain.training.run_folder import (
    TRIALS,
    fetch_checkpoints,
    folder_of,
    resume_run,
    resume_sweep_of,
    run_id_of,
    stored_run,
    to_yaml,
    write_run_file,
)
from raytrain.training.setup import check_resumable, log_changes, network, preflight

Watch = Callable[[RunConfig, EpochMetrics], None]


_SHOWN = ("valid/clean", "valid/robust", "cost/fe_per_sample")
_GRACE = 2.0  # seconds for workers to exit after a failure, before Ray ends them


@dataclass(frozen=True, repr=False)
class TrainResult(ShownResult):
    """A finished training."""

    run_id: str
    name: str
    signature: str
    metrics: dict[str, float]  # of the last epoch
    checkpoints: Path  # the folder of last.pt and best.pt
    tracking_uri: str
    page: str  # in the MLflow UI: the address below that of its server
    storage: str  # that has it, as it was given
    profile: Path | None = None  # the folder of the trace and the table of `profile`

    @property
    def weights(self) -> Path:
        """What `evaluate` and `export` take: the folder of its checkpoints."""
        return self.checkpoints

    @property
    def recorded(self) -> str:
        """What `compare` takes: the id of its run."""
        return self.run_id

    def summary(self) -> tuple[str, dict[str, str]]:
        """Its name, and the numbers of the last epoch."""
        metrics = {name: f"{self.metrics[name]:.4g}" for name in _SHOWN if name in self.metrics}
        return self.name, {**metrics, "run": self.run_id, "checkpoints": shown(self.checkpoints)}

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        paths = {name: str(value) for name, value in values.items() if isinstance(value, Path)}
        return {**values, **paths, "status": "FINISHED"}


def train(
    config: Configuration | None = None,
    overrides: Overrides = (),
    *,
    resume: Result | str | Path | None = None,
    watch: Watch | None = None,
    on_start: Callable[[RunConfig, str, int], None] | None = None,
    on_step: Callable[[RunConfig, StepProgress], None] | None = None,
    profile: bool = False,
    **fields: Any,
) -> TrainResult:
    """One training run, recorded in MLflow, its checkpoints in `storage/experiment/run_id`.

    `config` is a RunConfig, a mapping, or a YAML file; `overrides` are `key=value` words or a
    mapping of dotted paths, `fields` are fields of RunConfig. `resume` is a run to continue in its own
    folder and the MLflow run that is recorded there (a new one, if none is), as its result or a word that
    `run_of` takes, with its own configuration unless another is given. `on_start` is called with the id of
    the run and the number of training images, `watch` after every epoch, `on_step` after every step; of
    workers of Ray once a second.
    `profile` leaves a trace and a table of where the time of ten steps goes in the run's folder.

    Raises:
        RequestError: if something is wrong with the request; nothing was begun.
        TrainingFailed: if training ended early; the run is FAILED, its checkpoints are kept.

    >>> train(algorithm="dynamic", epochs=0)
    Traceback (most recent call last):
    raytrain.core.errors.RequestError: epochs: ...
    """
    given = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    asked = _checked(config, with_keywords(given, fields), resume)
    run, splits, folder = asked.run, asked.splits, asked.folder
    if profile and not _is_local(run):
        raise RequestError(
            "--profile: only a training in this process is profiled; expected workers=1 and no "
            "RAY_ADDRESS"
        )
    # MLflow is closed before Ray, whose shutdown may outlast the time until a SIGKILL.
    with (
        interruptible(),
        continued_by() as offer,
        ExitStack() as cluster,
        own_tracker(run, run.root) as tracker,
    ):
        on_cluster = cluster.enter_context(_cluster(run))
        handle, name, done = _open(tracker, run, folder, asked.epoch)
        asked.log_changes()
        run_id = _run_id(tracker, handle)
        if folder is None:
            folder = _usual_folder(run, run_id)
        else:
            tidy(folder)
        write_run_file(run, folder, run_id)
        offer(_resume_command(run, folder, run_id))
        job = Job.of(run, folder, resume=resume is not None)
        metrics: dict[str, float] = {}
        tagged: dict[str, str] = {}
        if on_start is not None:
            on_start(run, run_id, splits.train.num_images)
        publish = _publishing(run, name, on_cluster, splits, tracker)
        profiled = cluster.enter_context(StepProfile(folder / "profile")) if profile else None
        for report in _rows(
            run, job, on_cluster, _followed(run, on_step, profiled, tracker, handle)
        ):
            raise_if_interrupted()
            metrics = report.metrics()
            if report.epoch <= done:
                continue  # repeated after a restart of the workers
            done = report.epoch
            tracker.log(handle, metrics, done)
            if (tags := report.tags()) != tagged:
                tracker.tag(handle, tags)
                tagged = tags
            publish(report)
            if watch is not None:
                watch(run, report)
        cluster.close()
        log_model(tracker, handle, folder, splits.valid, metrics)
    profiles = folder / "profile" if profiled is not None and profiled.written else None
    page = run_link(tracker.experiment_id, run_id)
    return TrainResult(
        run_id=run_id,
        name=name,
        signature=run.signature(),
        metrics=metrics,
        checkpoints=folder,
        tracking_uri=tracker.uri,
        page=page,
        storage=str(run.storage),
        profile=profiles,
    )


def _usual_folder(run: RunConfig, run_id: str) -> Path:
    return (run.root / run.experiment / run_id).resolve()


def _resume_command(run: RunConfig, folder: Path, run_id: str) -> str:
    """The command that continues a training, as a shell takes it: by the beginning of its id, with what
    else is needed to find it; by its folder where that was moved.
    """
    if folder != _usual_folder(run, run_id):
        return join(["raytrain", "train", "--resume", str(folder)])
    return resume_run(run_id, run.storage, run.tracking_uri)


def preview(
    config: Configuration | None = None,
    overrides: Overrides = (),
    *,
    resume: Result | str | Path | None = None,
) -> RunPreview:
    """What `train` would do with the same arguments, and its cost; nothing is trained, recorded, written.

    Raises:
        RequestError: as `train` does.
        TrainingFailed: if the few steps that are measured fail.
    """
    asked = _checked(config, overrides, resume, writes=False)
    run, folder = asked.run, asked.folder
    run_id = None if folder is None else run_id_of(folder)
    check_store(run.tracking_uri, run.experiment, run_id)
    try:
        check_folder(run.root / run.experiment)
    except OSError as error:
        raise RequestError(
            f"storage: {error.filename} cannot be written ({error.strerror}); expected a folder that "
            "can be written"
        ) from None
    asked.log_changes()
    with interruptible():
        workers = None if _is_local(run) else check_fits(run)
        return preview_run(run, asked.splits, workers, asked.epoch)


@dataclass(frozen=True)
class _Request:
    """A run that `train` would begin."""

    run: RunConfig
    splits: Splits
    folder: Path | None  # of the run that is resumed
    before: RunConfig  # as it was when it was trained so far
    epoch: int  # finished ones of that

    def log_changes(self) -> None:
        """Log what is not as it was, if a run is resumed."""
        if self.epoch:
            log_changes(self.run, self.before, self.epoch)


def _checked(
    config: Configuration | None,
    overrides: Overrides,
    resume: Result | str | Path | None,
    writes: bool = True,
) -> _Request:
    """The run of a request, after all checks that neither Ray nor MLflow is needed for.

    Nothing is written to a storage behind a URL, unless `writes`: a file that shows that it can be.

    Raises:
        RequestError: naming the field or file.
    """
    folder, epoch = None, 0
    if resume is not None:
        asked = as_run(config, overrides)
        folder = folder_of(run_of(word_of(resume), asked.root, asked.tracking_uri), asked.root)
        fetch_checkpoints(folder)
        if folder.parent.name == TRIALS:
            raise RequestError(
                f"--resume: {word_of(resume)} is a trial of a sweep, which "
                f"{resume_sweep_of(folder, asked.root, asked.storage)} continues; expected a run of train"
            )
        if not (folder / LAST).is_file() and (folder / BEST).is_file() and load(folder).imported:
            raise RequestError(
                f"--resume: {word_of(resume)} is a network that was imported; expected a run of train: "
                "model=robustbench:FILE begins one from its weights"
            )
        config = stored_run(folder) if config is None else config
    run = as_run(config, overrides)
    saved = None if folder is None or not (folder / LAST).is_file() else load(folder / LAST)
    splits, before = preflight(run, resumed=saved is not None), run
    check(run.root, writes)
    if folder is not None and is_url(run.storage) and run.root not in folder.parents:
        raise RequestError(
            f"storage: the run to continue is in {shown(folder)}; expected the same storage as before"
        )
    if _is_local(run):
        check_mode(run, local_context(run.device).device)
    if saved is not None:
        check_resumable(run, saved, splits)
        epoch = saved.epoch
        before = saved.run
    return _Request(run, splits, folder, before, epoch)


def _is_local(run: RunConfig) -> bool:
    """Whether this process trains the run, without Ray."""
    return run.workers == 1 and wanted_cluster() is None


def log_model(
    tracker: Tracker, handle: str, folder: Path, part: SplitShard, metrics: Mapping[str, float]
) -> None:
    """The artifacts of a finished training: its checkpoints, and the network in MLflow's format.

    `metrics` are those of its last epoch.
    """
    fetch_checkpoints(folder)
    for name in (BEST, LAST):
        if (folder / name).is_file():
            tracker.artifact(handle, folder / name, "checkpoints")
    example: np.ndarray = (part.read(torch.arange(2)).cpu().float() / 255).numpy()
    saved = load(folder)
    entry = registered(saved, metrics) if saved.run.registry else None
    tracker.model(handle, network(saved).float(), example, entry)


@contextmanager
def _cluster(run: RunConfig) -> Iterator[bool]:
    """A Ray cluster where the run needs one: several workers, or RAY_ADDRESS is set."""
    if _is_local(run):
        yield False
        return
    with session(run):
        concurrent_trials(run, 1)
        check_shared(run)
        yield True


def _followed(
    run: RunConfig,
    on_step: Callable[[RunConfig, StepProgress], None] | None,
    profiled: StepProfile | None,
    tracker: Tracker,
    handle: str,
) -> OnStep:
    """What is called after a step."""
    metrics_of = StepMetrics()

    def call(done: StepProgress) -> None:
        if on_step is not None:
            on_step(run, done)
        if profiled is not None:
            profiled.step()
        if (metrics := metrics_of(done.share, done.loss)) is not None:
            tracker.log(handle, metrics, done.epoch - 1)

    return call


def _rows(
    run: RunConfig,
    job: Job,
    on_cluster: bool,
    on_step: OnStep,
) -> Iterator[EpochMetrics]:
    """The rows of a job; of one that is resumed first those that its checkpoint may be ahead of."""
    if job.resume:
        yield from RecentRows(job.path).rows
    if not on_cluster:
        yield from local_rows(job, local_context(run.device), on_step)
        return
    resources = worker_resources(run)
    group = WorkerGroup(run.worker_range, resources, "train", run.root, run.max_failures)
    try:
        group.submit(job)
        yield from group.rows(on_step)
    except BaseException:  # a signal, or a job that failed: nothing is left to wait for
        group.close(_GRACE)
        raise
    group.close()


def _publishing(
    run: RunConfig, name: str, on_cluster: bool, splits: Splits, tracker: Tracker
) -> Callable[[EpochMetrics], None]:
    """What gives a row to Ray's metrics, where the run is trained on Ray."""
    if not on_cluster:
        return lambda report: None
    metrics = DriverMetrics(name, run.experiment)

    def call(report: EpochMetrics) -> None:
        metrics.set(
            {
                "best_objective": report.best,
                "images_per_second": report.images_per_second,
                "fe_per_image": report.fe / splits.train.num_images,
                "outbox_records": tracker.waiting,
            }
        )

    return call


def _open(
    tracker: Tracker, run: RunConfig, folder: Path | None, epoch: int
) -> tuple[str, str, int]:
    """The handle and the name of the MLflow run to write to, and the last epoch that it gets no row of.

    A run that is resumed from the `folder` with a checkpoint after `epoch` is the one recorded there.
    """
    handle = None if folder is None else run_id_of(folder)
    where = "" if folder is None else shown(folder)
    if handle is not None:
        if not tracker.has_run(handle):
            raise RequestError(f"{handle}: MLflow at {tracker.uri} has no such run to continue")
        if tracker.is_trial(handle):
            raise RequestError(f"--resume: {where} is a trial of a sweep; expected a run of train")
        tracker.adopt(handle, handle)
        tracker.reopen(handle)
        name = tracker.run_name(handle) or run.run_name or default_name(run)
        return handle, name, tracker.last_step(handle)
    if folder is not None:
        log_line(
            f"raytrain: --resume: {where} does not record which run of MLflow it is of; a new run goes on "
            "from its checkpoint"
        )
    name = run.run_name or tracker.unused_name(default_name(run))
    tracker.open(
        "run",
        name,
        provenance.parameters(run),
        provenance.tags(run),
        note=provenance.note(run),
    )
    tracker.text("run", to_yaml(run), "run.yaml")
    tracker.inputs("run", training_inputs(run.data))
    return "run", name, epoch


def _run_id(tracker: Tracker, handle: str) -> str:
    """The id of the run, which names its folder."""
    run_id = tracker.run_id(handle)
    if run_id is None:
        raise RequestError(
            f"tracking_uri: MLflow at {tracker.uri} made no run; expected an answer"
        )
    return run_id


def own_tracker(run: RunConfig, storage: Path) -> AbstractContextManager[Tracker]:
    """A tracker with an outbox of its own, which also delivers the outboxes of dead processes beside it."""
    folder = (storage / run.experiment / ".mlflow").resolve()
    outbox = folder / f"{time.time_ns():x}-{os.getpid()}.jsonl"
    return tracked(run.tracking_uri, run.experiment, outbox, folder)
