"""The API behind the commands: `train` and `evaluate`. `tune` is in `sweep`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain import provenance
from raytrain.checkpoint import BEST, LAST, Saved, find, load, to_yaml
from raytrain.config import RunConfig
from raytrain.data.loader import open_test, sweep
from raytrain.judge import Evaluation, Flags, judge
from raytrain.loop import build_model, preflight
from raytrain.place import Place
from raytrain.record import EvalReport, Report
from raytrain.request import override, parse_overrides, read_run, validated
from raytrain.session import session, slots, wanted_cluster, worker_resources
from raytrain.tracking import Status, Tracker
from raytrain.types import RequestError, TrainingFailed, mix
from raytrain.worker import Group, Job, job_rows

Configuration = RunConfig | Mapping[str, Any] | str | Path
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
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    resume: str | Path | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """One training run, recorded in MLflow, its checkpoints in `storage/experiment/run_id`.

    `config` is a RunConfig, a mapping, or a YAML file; `overrides` are `key=value` words or a mapping
    of dotted paths. `resume` is the id or the checkpoint folder of a run to continue, in the same
    MLflow run. `watch` is called after every epoch.

    Raises:
        RequestError: if something is wrong with the request; nothing was begun.
        TrainingFailed: if training ended early; the run is FAILED, its checkpoints are kept.
    """
    saved, folder = None, None
    if resume is not None:
        folder = checkpoint_folder(str(resume), storage=_storage(config, overrides))
        saved = load(folder / LAST)
        config = saved.run if config is None else config
    run = as_run(config, overrides)
    splits = preflight(run)
    example = _example(splits.valid.pixels)
    with _in_cluster(run) as on_cluster, interruptible():
        tracker = Tracker(run.tracking_uri, run.experiment)
        status: Status = "FAILED"
        try:
            run_id, done = _open(tracker, run, folder)
            folder = (run.storage / run.experiment / run_id).resolve()
            job = Job(run.model_dump_json(), str(folder), resume=saved is not None)
            last: Report | None = None
            for report in _rows(run, job, on_cluster):
                if report.epoch > done:
                    tracker.log(run_id, report.metrics(), report.epoch)
                    done = report.epoch
                    if watch is not None:
                        watch(run, report)
                last = report
            if last is None:
                raise RequestError(f"epochs: the run has already finished its {run.epochs} epochs")
            _leave(tracker, run, run_id, folder, example)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            tracker.shut(status)
    return TrainResult(
        run_id,
        run.run_name or provenance.describe(run),
        run.signature(),
        last.metrics(),
        folder,
        tracker.uri,
    )


def evaluate(
    run_or_checkpoint: str | Path,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    which: str | None = None,
    storage: Path = Path("runs"),
) -> EvalResult:
    """Clean and PGD accuracy on the test set, sample by sample, recorded on the run it belongs to.

    `run_or_checkpoint` is the id of a run, a checkpoint folder or a checkpoint file; `which` picks
    `best` (default) or `last` in a folder. `overrides` are fields of the evaluation (`steps=50`), or
    `data.*`, `tracking_uri` and `device` of the run.

    Raises:
        RequestError: if there is no such run, or the data does not fit it.
    """
    folder = checkpoint_folder(str(run_or_checkpoint), storage)
    file = find(folder if which is None else folder / f"{which}.pt")
    saved = load(file)
    evaluation, run = _evaluation(saved, overrides)
    with interruptible():
        report, flags, classes = _judged(run, saved, evaluation)
    table = file.with_name(f"{file.stem}-{evaluation.name}.parquet")
    _write_flags(flags, classes, table)
    run_id = file.parent.name if _is_run_id(file.parent.name) else None
    if run_id is not None:
        _record(run, run_id, report, table)
    threat = f"{run.threat.norm} {run.threat.eps:.5g}"
    return EvalResult(report, file, table, run_id, threat)


def as_run(
    config: Configuration | None, overrides: Iterable[str] | Mapping[str, Any] = ()
) -> RunConfig:
    """A validated RunConfig from any of the forms that the API takes."""
    words = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    if config is None or isinstance(config, str | Path):
        base = read_run(None if config is None else Path(config))
        if not words:
            return base
        from raytrain.request import read_yaml

        values = {} if config is None else read_yaml(Path(config))
    else:
        values = config.model_dump(mode="json") if isinstance(config, RunConfig) else config
    return validated(RunConfig, override(values, words))


def checkpoint_folder(name: str, storage: Path) -> Path:
    """The folder of a run's checkpoints (or the file itself), by path or by the id of the run.

    Raises:
        RequestError: if there is none.
    """
    path = Path(name)
    if path.exists():
        return path.resolve()
    found = sorted(storage.glob(f"*/{name}")) + sorted(storage.glob(f"*/*/{name}"))
    if found:
        return found[0].resolve()
    raise RequestError(
        f"{name}: neither a checkpoint nor the id of a run with checkpoints below {storage}"
    )


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM (Slurm, Kubernetes) end the work the way Ctrl-C does: recorded, not abandoned."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _in_cluster(run: RunConfig) -> Iterator[bool]:
    """A Ray cluster where the run needs one: several workers, or RAY_ADDRESS is set."""
    if run.workers == 1 and wanted_cluster() is None:
        yield False
        return
    with session(run):
        slots(run, 1)
        yield True


def _rows(run: RunConfig, job: Job, on_cluster: bool) -> Iterator[Report]:
    if not on_cluster:
        yield from job_rows(job, here(run), job.resume)
        return
    group = Group(
        run.workers, worker_resources(run), "train", run.storage, failures=run.max_failures
    )
    try:
        group.submit(job)
        yield from group.rows()
    finally:
        group.close()


def here(run: RunConfig) -> Place:
    """This process as the only worker.

    Raises:
        RequestError: if device=cuda and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if run.device == "cuda" and not has_gpu:
        raise RequestError("device: cuda was asked for and no CUDA device is visible")
    return Place(torch.device("cuda" if has_gpu and run.device != "cpu" else "cpu"))


def _open(tracker: Tracker, run: RunConfig, folder: Path | None) -> tuple[str, int]:
    """The MLflow run to write to, and the epochs it already has."""
    if folder is not None and _is_run_id(folder.name):
        return folder.name, tracker.reopen(folder.name)
    run_id = tracker.open(
        run.run_name or provenance.describe(run), provenance.parameters(run), provenance.tags(run)
    )
    tracker.text(run_id, to_yaml(run), "run.yaml")
    return run_id, 0


def _leave(
    tracker: Tracker, run: RunConfig, run_id: str, folder: Path, example: np.ndarray
) -> None:
    """The artifacts of a finished run: its checkpoints, and the network in MLflow's own format."""
    for name in (BEST, LAST):
        if (folder / name).is_file():
            tracker.artifact(run_id, folder / name, "checkpoints")
    saved = load(folder)
    tracker.model(run_id, network(saved), example)


def network(saved: Saved) -> torch.nn.Module:
    """The network of a checkpoint, on the CPU, in eval mode, from images in [0, 1] to logits."""
    from raytrain.data.loader import open_splits

    splits = open_splits(saved.run.data, Place())
    model = build_model(saved.run, splits.source)
    if saved.run.precision == "fp64":
        model = model.double()
    model.load_state_dict(saved.weights)
    return model.eval()


def _example(pixels: torch.Tensor) -> np.ndarray:
    return (pixels[:2].cpu().float() / 255).numpy()


def _storage(config: Configuration | None, overrides: Iterable[str] | Mapping[str, Any]) -> Path:
    words = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    if "storage" in words:
        return Path(words["storage"])
    return RunConfig.model_fields["storage"].default if config is None else as_run(config).storage


def _evaluation(
    saved: Saved, overrides: Iterable[str] | Mapping[str, Any]
) -> tuple[Evaluation, RunConfig]:
    words = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    words = {
        f"evaluation.{path}" if path in Evaluation.model_fields else path: value
        for path, value in words.items()
    }
    for path in words:
        if path.split(".")[0] not in {"evaluation", "data", "tracking_uri", "device"}:
            raise RequestError(
                f"{path}: expected a field of the evaluation ({', '.join(Evaluation.model_fields)}), "
                "data.*, tracking_uri or device; the threat model and the network are the run's own"
            )
    values = override({"evaluation": {"steps": 20}}, words)
    base = saved.run.model_dump(mode="json")
    base["evaluation"] = {}
    run = validated(RunConfig, override(base, _dotted(values)))
    return run.evaluation, run


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _judged(
    run: RunConfig, saved: Saved, evaluation: Evaluation
) -> tuple[EvalReport, Flags, tuple[str, ...]]:
    place = here(run)
    dtype = torch.float64 if run.precision == "fp64" else torch.float32
    part, source = open_test(run.data, place, dtype)
    model = network(saved).to(place.device)
    batches = sweep(part, evaluation.batch_size, mix(run.seed, "test"))
    report, flags = judge(model, batches, run.threat, evaluation, place, run.precision)
    return report, flags, source.classes


def _write_flags(flags: Flags, classes: tuple[str, ...], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    del classes
    columns = {
        "index": flags.index.cpu().numpy(),
        "clean": flags.clean.cpu().numpy(),
        "robust": flags.robust.cpu().numpy(),
    }
    try:
        pq.write_table(pa.table(columns), file)
    except OSError as error:
        raise TrainingFailed(
            f"{file}: could not be written ({error.strerror or error})"
        ) from error


def _record(run: RunConfig, run_id: str, report: EvalReport, table: Path) -> None:
    tracker = Tracker(run.tracking_uri, run.experiment)
    name = report.attack
    try:
        tracker.log(
            run_id,
            {
                "test/clean": report.clean,
                f"test/{name}": report.robust,
                "test/images": float(report.images),
                "cost/test_fe": float(report.fe),
            },
        )
        tracker.artifact(run_id, table, "evaluation")
    finally:
        tracker.shut("FINISHED")


def _is_run_id(name: str) -> bool:
    return len(name) == 32 and all(c in "0123456789abcdef" for c in name)
