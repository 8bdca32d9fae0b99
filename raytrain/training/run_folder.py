"""The folder of a run: found by path or id, with its configuration and the id of its run in MLflow."""

from __future__ import annotations

import json
import os
from glob import escape
from pathlib import Path
from shlex import join, quote
from typing import TYPE_CHECKING

import yaml

from raytrain.config.names import EXPERIMENT, STORAGE
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.files import write_atomically
from raytrain.core.storage import pull, url_of

if TYPE_CHECKING:
    from raytrain.config.run import RunConfig

LAST, BEST = "last.pt", "best.pt"
ROWS = "rows.json"  # the last rows, up to the last checkpoint
TRIALS = "trials"  # in the folder of a sweep
RUN_FILE = "run.yaml"
SPACE = "space.yaml"  # in the folder of a sweep
RUN_ID = "run_id"  # beside the checkpoints: the id of their run in MLflow
_SHORT = 8  # digits


def write_run_file(run: RunConfig, folder: Path, run_id: str | None = None) -> None:
    """Write `run.yaml`, and the id of the run if given, to the folder where the checkpoints are going to be.

    Raises:
        TrainingFailed: if it cannot be written.
    """
    _write(folder / RUN_FILE, to_yaml(run))
    if run_id is not None:
        write_run_id(folder, run_id)


def write_run_id(folder: Path, run_id: str) -> None:
    """Write the id of the run in MLflow whose checkpoints are in a folder.

    Raises:
        TrainingFailed: if it cannot be written.
    """
    _write(folder / RUN_ID, run_id)


def _write(file: Path, text: str) -> None:
    try:
        write_atomically(file, text)
    except OSError as error:
        raise TrainingFailed(
            f"storage: {file.parent} could not be written ({error.strerror or error})"
        ) from error


def to_yaml(run: RunConfig) -> str:
    """The configuration as a run file that `raytrain train` takes."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def stored_run(folder: Path) -> RunConfig:
    """The configuration of the run in a folder: of its checkpoint or, before the first, of its run file.

    Raises:
        RequestError: if there is neither.
    """
    from raytrain.config.run import RunConfig
    from raytrain.training.checkpoint import load, short

    file = folder / RUN_FILE
    if (folder / LAST).is_file() or not file.is_file():
        return load(folder / LAST).run
    try:
        return RunConfig.model_validate(yaml.safe_load(file.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{file}: not a run file ({short(error)})") from error


def recent_rows(folder: Path) -> list[EpochMetrics]:
    """The last rows of the run in a folder on this machine, up to its last checkpoint or one more."""
    file = folder / ROWS
    if not file.is_file():
        return []
    rows = json.loads(file.read_text())
    return [EpochMetrics(**{**row, "fosc_below": tuple(row["fosc_below"])}) for row in rows]


def folder_of(name: str, root: Path) -> Path:
    """The folder of a run's checkpoints (or the file itself), by path or by the id of the run.

    `root` is the folder of a storage on this machine.

    Raises:
        RequestError: if there is none.
    """
    path = Path(name)
    if os.path.exists(path):
        return path.resolve()
    found = _below(root, name)
    if not found:
        fetch_names(root)
        found = _below(root, name)
    if found:
        return found[0].resolve()
    raise RequestError(
        f"{name}: neither a checkpoint nor the id of a run with checkpoints below {url_of(root) or root}"
    )


def fetch_names(root: Path) -> None:
    """Bring the files by which runs and sweeps are found from the storage to its working copy.

    Raises:
        RequestError: naming `storage`, if it does not answer.
    """
    try:
        pull(root, lambda file: file.name in (RUN_FILE, RUN_ID, SPACE))
    except OSError as error:
        raise RequestError(f"storage: {error.strerror or error}") from None


def fetch_checkpoints(folder: Path) -> None:
    """Bring what the storage has of the folder of a run to its working copy.

    Raises:
        RequestError: naming `storage`, if it does not answer or what it has is damaged.
    """
    try:
        pull(folder)
    except OSError as error:
        raise RequestError(f"storage: {error.strerror or error}") from None


def _below(root: Path, name: str) -> list[Path]:
    found: list[Path] = []
    if not Path(name).is_absolute() and len(os.fsencode(name)) < 256:
        exactly = escape(name)
        found = [*root.glob(f"*/{exactly}"), *root.glob(f"*/*/trials/{exactly}")]
    if is_run_id(name) and not found:
        # At any depth, since the name of an experiment may have slashes.
        files = root.rglob(RUN_ID)
        found = [file.parent for file in files if file.read_text() == name]
        found += root.rglob(name)
    return found


def run_id_of(folder: Path) -> str | None:
    """The id of the MLflow run whose checkpoints are in a folder, if that is known there."""
    if (folder / RUN_ID).is_file():
        return (folder / RUN_ID).read_text()
    return folder.name if is_run_id(folder.name) else None


def short_id(run_id: str) -> str:
    """The beginning of an id that commands and lines show; `run_of` takes it for the run."""
    return run_id[:_SHORT]


def resume_sweep(name: str, experiment: str, storage: str | Path) -> str:
    """The command that continues a sweep, as a shell takes it."""
    return join(["raytrain", "tune", "--resume", name, *located(storage, experiment)])


def resume_sweep_of(trial: Path, root: Path, storage: str | Path) -> str:
    """The command that continues the sweep of the trial in a folder.

    `root` is the folder of a storage on this machine, in which the sweep need not be.
    """
    experiment = trial.parent.parent.parent
    if root.resolve() in experiment.parents:
        return resume_sweep(
            trial.parent.parent.name, experiment.relative_to(root.resolve()).as_posix(), storage
        )
    return resume_sweep(trial.parent.parent.name, experiment.name, experiment.parent)


def resume_run(run_id: str, storage: str | Path, uri: str | None) -> str:
    """The command that continues a training, as a shell takes it: by the beginning of its id."""
    where = located(storage) + ([] if uri is None else [f"tracking_uri={uri}"])
    return join(["raytrain", "train", "--resume", short_id(run_id), *where])


def located(storage: str | Path, experiment: str = EXPERIMENT) -> list[str]:
    """The words that say where a run is, as far as that is not the default."""
    given = {"experiment": (experiment, EXPERIMENT), "storage": (str(storage), STORAGE)}
    return [f"{field}={value}" for field, (value, default) in given.items() if value != default]


def option(storage: str | Path) -> str:
    """The option, after a space, by which `evaluate` and `export` find a run; empty for the default."""
    return "" if str(storage) == STORAGE else f" --storage {quote(str(storage))}"


def is_run_id(name: str) -> bool:
    """Whether a name looks like an id that MLflow gives."""
    return len(name) == 32 and all(c in "0123456789abcdef" for c in name)
