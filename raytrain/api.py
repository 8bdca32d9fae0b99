"""The API behind the commands: `train` and `evaluate`. `tune` is in `sweep`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from raytrain import provenance
from raytrain.checkpoint import (
    BEST,
    LAST,
    Saved,
    find,
    folder_of,
    is_run_id,
    leave_run_file,
    load,
    run_id_of,
    to_yaml,
)
from raytrain.config import RunConfig
from raytrain.data.loader import Part, open_test, sweep
from raytrain.judge import Evaluation, Flags, judge
from raytrain.loop import check_resumable, network, preflight
from raytrain.place import here
from raytrain.record import EvalReport, Report
from raytrain.request import Configuration, as_run, override, parse_overrides, validated
from raytrain.session import interruptible, session, slots, wanted_cluster, worker_resources
from raytrain.tracking import Tracker, fetch, tracked
from raytrain.types import RequestError, TrainingFailed, mix
from raytrain.worker import Group, Job, job_rows

Overrides = Iterable[str] | Mapping[str, Any]
Watch = Callable[[RunConfig, Report], None]


@dataclass(frozen=True)
class TrainResult:
    """A finished training."""

    run_id: str
    name: str
    signature: str
    metrics: dict[str, float]  # of the last epoch
    checkpoints: Path  # the folder of last.pt and best.pt
    tracking_uri: str

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {**asdict(self), "checkpoints": str(self.checkpoints), "status": "FINISHED"}


@dataclass(frozen=True)
class EvalResult:
    """An evaluation on the test set."""

    report: EvalReport
    checkpoint: Path
    flags: Path  # Parquet: index, clean, robust
    run_id: str | None
    threat: str

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        values = {"checkpoint": str(self.checkpoint), "flags": str(self.flags)}
        return {**asdict(self.report), **values, "run_id": self.run_id, "threat": self.threat}


def train(
    config: Configuration | None = None,
    overrides: Overrides = (),
    *,
    resume: str | Path | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """One training run, recorded in MLflow, its checkpoints in `storage/experiment/run_id`.

    `config` is a RunConfig, a mapping, or a YAML file; `overrides` are `key=value` words or a
    mapping of dotted paths. `resume` is the id or the checkpoint folder of a run to continue in the
    same MLflow run, with its own configuration unless another is given. `watch` is called after
    every epoch.

    Raises:
        RequestError: if something is wrong with the request; nothing was begun.
        TrainingFailed: if training ended early; the run is FAILED, its checkpoints are kept.
    """
    folder = None
    if resume is not None:
        storage = as_run(config, overrides).storage
        folder = folder_of(str(resume), storage)
        config = load(folder / LAST).run if config is None else config
    run = as_run(config, overrides)
    splits = preflight(run)
    if run.workers == 1 and wanted_cluster() is None:
        here(run.device)
    if folder is not None:
        check_resumable(run, load(folder / LAST), splits)
    with interruptible(), _tracked(run, run.storage) as tracker:
        with _cluster(run) as on_cluster:
            handle, done = _open(tracker, run, folder)
            run_id = _run_id(tracker, handle)
            folder = (run.storage / run.experiment / run_id).resolve()
            leave_run_file(run, folder)
            job = Job.of(run, folder, resume=resume is not None)
            metrics: dict[str, float] = {}
            for report in _rows(run, job, on_cluster):
                metrics = report.metrics()
                if report.epoch <= done:
                    continue  # repeated after a restart of the workers
                done = report.epoch
                tracker.log(handle, metrics, done)
                if report.stopped_by is not None:
                    tracker.tag(handle, {"stopped_by": report.stopped_by})
                if watch is not None:
                    watch(run, report)
        leave_network(tracker, handle, folder, splits.valid)
    name = run.run_name or provenance.describe(run)
    return TrainResult(run_id, name, run.signature(), metrics, folder, tracker.uri)


def evaluate(
    run_or_checkpoint: str | Path,
    overrides: Overrides = (),
    *,
    which: Literal["best", "last"] = "best",
    storage: Path = Path("runs"),
) -> EvalResult:
    """Clean and PGD accuracy on the test set, sample by sample, recorded on the run it belongs to.

    `run_or_checkpoint` is the id of a run, a checkpoint folder or a checkpoint file; `which` picks
    one of a run's checkpoints. `overrides` are fields of the evaluation (`steps=50`), or `data.*`,
    `tracking_uri` and `device` of the run. With RAY_ADDRESS the work is done on that cluster.

    Raises:
        RequestError: if there is no such run, or the data does not fit it.
    """
    changes = _evaluation_changes(overrides)
    file = _checkpoint(str(run_or_checkpoint), which, storage, changes.get("tracking_uri"))
    saved = load(file)
    base = {**saved.run.model_dump(mode="json"), "evaluation": {"steps": 20}}
    run = validated(RunConfig, override(base, changes))
    with interruptible():
        report, flags = _judged_somewhere(run, saved)
    table = file.with_name(f"{file.stem}-{report.attack}.parquet")
    _write_flags(flags, table)
    run_id = run_id_of(file.parent)
    if run_id is not None:
        _record(run, run_id, report, table, storage)
    return EvalResult(report, file, table, run_id, f"{run.threat.norm} {run.threat.eps:.5g}")


def leave_network(tracker: Tracker, handle: str, folder: Path, part: Part) -> None:
    """The artifacts of a finished training: its checkpoints, and the network in MLflow's format."""
    for name in (BEST, LAST):
        if (folder / name).is_file():
            tracker.artifact(handle, folder / name, "checkpoints")
    example: np.ndarray = (part.pixels[:2].cpu().float() / 255).numpy()
    tracker.model(handle, network(load(folder)).float(), example)


@contextmanager
def _cluster(run: RunConfig) -> Iterator[bool]:
    """A Ray cluster where the run needs one: several workers, or RAY_ADDRESS is set."""
    if run.workers == 1 and wanted_cluster() is None:
        yield False
        return
    with session(run):
        slots(run, 1)
        yield True


def _rows(run: RunConfig, job: Job, on_cluster: bool) -> Iterator[Report]:
    if not on_cluster:
        yield from job_rows(job, here(run.device), job.resume)
        return
    resources = worker_resources(run)
    group = Group(run.workers, resources, "train", run.storage, run.max_failures)
    try:
        group.submit(job)
        yield from group.rows()
    finally:
        group.close()


def _open(tracker: Tracker, run: RunConfig, folder: Path | None) -> tuple[str, int]:
    """The handle of the MLflow run to write to, and the epochs it already has."""
    if folder is not None and is_run_id(folder.name):
        handle = folder.name
        if not tracker.knows(handle):
            raise RequestError(f"{handle}: MLflow at {tracker.uri} has no such run to continue")
        tracker.adopt(handle, handle)
        tracker.reopen(handle)
        return handle, tracker.last_step(handle)
    name = run.run_name or provenance.describe(run)
    tracker.open("run", name, provenance.parameters(run), provenance.tags(run))
    tracker.text("run", to_yaml(run), "run.yaml")
    return "run", 0


def _run_id(tracker: Tracker, handle: str) -> str:
    """The id of the run, which names its folder."""
    run_id = tracker.run_id(handle)
    if run_id is None:
        raise RequestError(
            f"tracking_uri: MLflow at {tracker.uri} made no run; expected an answer"
        )
    return run_id


def _tracked(run: RunConfig, storage: Path) -> AbstractContextManager[Tracker]:
    """A tracker with a spool of its own, which also delivers what dead processes left beside it."""
    folder = (storage / run.experiment / ".mlflow").resolve()
    spool = folder / f"{time.time_ns():x}-{os.getpid()}.jsonl"
    return tracked(run.tracking_uri, run.experiment, spool, folder)


def _evaluation_changes(overrides: Overrides) -> dict[str, Any]:
    words = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    own = Evaluation.model_fields
    changes = {f"evaluation.{path}" if path in own else path: v for path, v in words.items()}
    for path in changes:
        if path.split(".")[0] not in {"evaluation", "data", "tracking_uri", "device"}:
            raise RequestError(
                f"{path}: expected a field of the evaluation ({', '.join(own)}), data.*, "
                "tracking_uri or device; the threat model and the network are the run's own"
            )
    return changes


def _checkpoint(name: str, which: Literal["best", "last"], storage: Path, uri: str | None) -> Path:
    """The checkpoint that was meant, fetched from MLflow if this machine does not have it."""
    try:
        folder = folder_of(name, storage)
    except RequestError:
        if not is_run_id(name):
            raise
        return fetch(uri, name, f"checkpoints/{which}.pt", storage / "fetched" / name)
    if folder.is_file():
        return folder
    return find(folder / f"{which}.pt" if (folder / f"{which}.pt").is_file() else folder)


def _judged_somewhere(run: RunConfig, saved: Saved) -> tuple[EvalReport, Flags]:
    if wanted_cluster() is None:
        return _judged(run, saved)
    with session(run):
        import ray

        slots(run.model_copy(update={"workers": 1}), 1)
        needs = worker_resources(run)
        remote = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"])(_judged)
        return ray.get(remote.remote(run, saved))


def _judged(run: RunConfig, saved: Saved) -> tuple[EvalReport, Flags]:
    place = here(run.device)
    dtype = torch.float64 if run.precision == "fp64" else torch.float32
    part, _ = open_test(run.data, place, dtype)
    model = network(saved).to(place.device)
    batches = sweep(part, run.evaluation.batch_size, mix(run.seed, "test"))
    report, flags = judge(model, batches, run.threat, run.evaluation, place, run.precision)
    return report, Flags(flags.index.cpu(), flags.clean.cpu(), flags.robust.cpu())


def _write_flags(flags: Flags, file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: value.numpy() for name, value in vars(flags).items()})
    try:
        pq.write_table(table, file)
    except OSError as error:
        raise TrainingFailed(
            f"{file}: could not be written ({error.strerror or error})"
        ) from error


def _record(run: RunConfig, run_id: str, report: EvalReport, table: Path, storage: Path) -> None:
    accuracies = {"test/clean": report.clean, f"test/{report.attack}": report.robust}
    counts = {"test/images": float(report.images), "test/fe": float(report.fe)}
    with _tracked(run, storage) as tracker:
        if not tracker.knows(run_id):
            return  # a checkpoint that came without its run
        tracker.adopt(run_id, run_id)
        tracker.log(run_id, {**accuracies, **counts})
        tracker.artifact(run_id, table, "evaluation")
