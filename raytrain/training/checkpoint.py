"""Checkpoints: a TrainState as one atomically written file, for any number of workers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from raytrain.config.run import RunConfig
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.files import atomic_writer, write_atomically
from raytrain.core.train_state import TrainState
from raytrain.core.types import RequestError, TrainingFailed

LAST, BEST = "last.pt", "best.pt"
RUN_FILE = "run.yaml"
RUN_ID = "run_id"  # file beside the checkpoints of a trial: the id of its run in MLflow
ROWS = "rows.json"  # file beside them: the last rows, up to the last checkpoint
_FORMAT = 2


@dataclass(frozen=True)
class Saved:
    """Content of a checkpoint file, with its configuration validated again."""

    run: RunConfig
    content: dict[str, Any]

    @property
    def epoch(self) -> int:
        """Epochs finished when it was written."""
        return self.content["counters"]["epoch"]

    @property
    def patience_count(self) -> int:
        """Validations in a row without a gain when it was written."""
        return self.content["counters"]["waited"]

    @property
    def sentinel_values(self) -> dict[str, float]:
        """Sentinel values of the last validation."""
        return self.content["counters"].get("seen", {})

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits of the evaluated network: a hash of the names and values of its weights."""
        found = hashlib.sha256()
        for name, tensor in self.weights.items():
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:12]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Weights of the evaluated network: the averaged one if `ema` was set."""
        averaged = self.content["ema"]
        if averaged is None:
            return self.content["model"]
        return {
            name.removeprefix("module."): value
            for name, value in averaged.items()
            if name.startswith("module.")
        }

    def check_classes(self, classes: tuple[str, ...]) -> None:
        """Compare the classes of a data set with those that the network was trained on.

        Plain numbers, of files without class names, fit as many names; a checkpoint of an earlier
        version holds no classes and is not compared.

        Raises:
            RequestError: if label k and output k are different classes.
        """
        trained = tuple(self.content.get("classes") or classes)
        expected = (
            f"data.name: expected the {len(trained)} classes that the network was trained on"
        )
        if len(trained) != len(classes):
            raise RequestError(f"{expected}, found {len(classes)}")
        numbers = tuple(str(number) for number in range(len(trained)))
        if numbers in (trained, classes) and set(trained) != set(classes):
            return
        for k, (name, found) in enumerate(zip(trained, classes, strict=True)):
            if name != found:
                raise RequestError(
                    f"{expected}, in the same order; found '{found}' in place of '{name}' as "
                    f"class {k}"
                )


def save(state: TrainState, run: RunConfig, path: Path, context: DistributedContext) -> None:
    """Write `path` on the leading worker: a collective.

    Raises:
        TrainingFailed: if the file cannot be written; the previous one is then unchanged.
    """
    parts = {name: part.state_dict() for name, part in state.parts.items()}
    randomness = _random_states(context)
    cost = asdict(state.meter.total(context))
    problem = None
    if context.leads:
        problem = _write(path, _content(state, run, parts, randomness, cost))
    # All workers raise after a write error, or the others would wait for the leading one for ever.
    failed = context.total(
        torch.tensor(problem is not None, dtype=torch.int64, device=context.device)
    )
    if failed:
        raise TrainingFailed(
            f"storage: {path} could not be written ({problem or 'see the leading worker'}); the "
            "checkpoint before it is untouched"
        )


def _content(
    state: TrainState,
    run: RunConfig,
    parts: dict[str, Any],
    randomness: dict[str, torch.Tensor],
    cost: dict[str, int | float],
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "run": run.model_dump_json(),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "ema": None if state.ema is None else state.ema.state_dict(),
        "parts": parts,
        "random": randomness,
        "meter": cost,
        "counters": {
            "epoch": state.epoch,
            "step": state.step,
            "seconds": state.seconds,
            "best": state.best,
            "waited": state.patience_count,
            "seen": dict(state.sentinel_values),
        },
        "classes": list(state.classes),
    }


def _write(path: Path, content: dict[str, Any]) -> str | None:
    """Write the file; return the message of an error, if there is one."""
    try:
        save_atomically(path, content)
    except OSError as error:
        return error.strerror or str(error)
    return None


def save_atomically(path: Path, content: dict[str, Any]) -> None:
    """torch.save through `atomic_writer`, which renames the finished file to `path`."""
    with atomic_writer(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch wraps a failed write of its zip file
            raise OSError(str(error).splitlines()[0]) from error


def load(path: Path) -> Saved:
    """Read a checkpoint file, or the `best.pt` (else `last.pt`) of a folder. Never runs code from
    the file.

    Raises:
        RequestError: if there is none, or it is no checkpoint of raytrain.
    """
    file = find(path)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if content["format"] != _FORMAT:
            raise RequestError(
                f"{file}: a checkpoint of format {content['format']}; this version reads {_FORMAT}"
            )
        run = RunConfig.model_validate_json(content["run"])
    except RequestError:
        raise
    except ValidationError as error:
        raise RequestError(
            f"{file}: its configuration is not valid in this version ({error.errors()[0]['msg']})"
        ) from error
    except Exception as error:
        # Truncated or foreign files raise errors of many types.
        raise RequestError(f"{file}: not a checkpoint of raytrain, or a truncated one") from error
    return Saved(run, content)


def stored_run(folder: Path) -> RunConfig:
    """Return the configuration of the run in a folder, from its checkpoint or else its run file.

    Raises:
        RequestError: if there is neither.
    """
    file = folder / RUN_FILE
    if (folder / LAST).is_file() or not file.is_file():
        return load(folder / LAST).run
    try:
        return RunConfig.model_validate(yaml.safe_load(file.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{file}: not a run file ({_short(error)})") from error


def find(path: Path) -> Path:
    """Return the checkpoint file at `path` or in the folder `path`."""
    if path.is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise RequestError(f"{path}: expected a checkpoint file, or a folder with {BEST} or {LAST}")


def folder_of(name: str, storage: Path) -> Path:
    """Return the folder of a run's checkpoints (or the file itself), by path or by the id of the run.

    Raises:
        RequestError: if there is none.
    """
    path = Path(name)
    if os.path.exists(path):
        return path.resolve()
    found: list[Path] = []
    if not path.is_absolute() and len(os.fsencode(name)) < 256:
        exactly = escape(name)
        found = [*storage.glob(f"*/{exactly}"), *storage.glob(f"*/*/trials/{exactly}")]
    if is_run_id(name) and not found:
        # At any depth, since the name of an experiment may have slashes.
        files = storage.rglob(f"trials/*/{RUN_ID}")
        found = [file.parent for file in files if file.read_text() == name]
        found += storage.rglob(name)
    if found:
        return found[0].resolve()
    raise RequestError(
        f"{name}: neither a checkpoint nor the id of a run with checkpoints below {storage}"
    )


def run_id_of(folder: Path) -> str | None:
    """Return the id of the MLflow run whose checkpoints are in a folder, if the folder has it."""
    if (folder / RUN_ID).is_file():
        return (folder / RUN_ID).read_text()
    return folder.name if is_run_id(folder.name) else None


def is_run_id(name: str) -> bool:
    """Whether a name has the form of an MLflow run id."""
    return len(name) == 32 and all(c in "0123456789abcdef" for c in name)


def restore(state: TrainState, saved: Saved, context: DistributedContext) -> None:
    """Load `saved` into `state`; the number of workers may have changed.

    Raises:
        RequestError: if the run is of another kind than that of the checkpoint.
    """
    content = saved.content
    saved.check_classes(state.classes)
    try:
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.ema is not None:
            state.ema.load_state_dict(content["ema"])
        for name, part in state.parts.items():
            part.load_state_dict(content["parts"][name])
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        # Each part raises its own type of error for a state of another kind.
        raise RequestError(
            "--resume: the checkpoint does not fit this run; expected the same model, algorithm, "
            f"outer, optimizer and ema as {_kind_of(saved.run)} (seen: {_short(error)})"
        ) from error
    # The counters are totals over the workers: one of them starts from the old sum.
    state.meter = Meter(**content["meter"]) if context.leads else Meter()
    counters = content["counters"]
    state.epoch, state.step = counters["epoch"], counters["step"]
    state.seconds, state.best = counters["seconds"], counters["best"]
    state.patience_count, state.sentinel_values = (
        counters["waited"],
        dict(counters.get("seen", {})),
    )
    _set_random_states(content["random"], context)


def _kind_of(run: RunConfig) -> str:
    kinds = f"{run.model.name}, {run.algorithm.name}, {run.outer.name}"
    return f"{kinds}, ema={run.ema if run.ema is None else f'{run.ema:g}'}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}"[:200]


def write_run_file(run: RunConfig, folder: Path) -> None:
    """Write `run.yaml` to the future folder of the checkpoints.

    Raises:
        TrainingFailed: if it cannot be written.
    """
    try:
        write_atomically(folder / RUN_FILE, to_yaml(run))
    except OSError as error:
        raise TrainingFailed(
            f"storage: {folder} could not be written ({error.strerror or error})"
        ) from error


def to_yaml(run: RunConfig) -> str:
    """Return the configuration as a run file for `raytrain train`."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _random_states(context: DistributedContext) -> dict[str, torch.Tensor]:
    """Return the state of every worker's generators (for dropout), one row each: a collective."""
    states = {"cpu": torch.get_rng_state()}
    if context.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(context.device)
    return {
        name: context.gather(value[None].to(context.device)).cpu()
        for name, value in states.items()
    }


def _set_random_states(states: dict[str, torch.Tensor], context: DistributedContext) -> None:
    if context.rank < len(states["cpu"]):
        # Cloned: torch reads a state from the start of its storage, whatever the view's offset.
        torch.set_rng_state(states["cpu"][context.rank].clone())
        if "cuda" in states and context.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"][context.rank].clone(), context.device)
