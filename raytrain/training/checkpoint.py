"""A TrainState as one file, written whole or not at all, that any number of workers can go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from raytrain.config.run import RunConfig
from raytrain.core.cost import Meter
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.files import atomic_writer
from raytrain.core.storage import later
from raytrain.core.train_state import TrainState
from raytrain.training.part_epoch import PartEpoch, set_statistics, statistics
from raytrain.training.run_folder import BEST as BEST
from raytrain.training.run_folder import LAST as LAST

_FORMAT = 2
_EXECUTED = ("lr", "fused", "foreach", "capturable")  # settings that are not those of a checkpoint


@dataclass(frozen=True)
class Saved:
    """What a checkpoint file holds, with its configuration validated anew."""

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
        """What sentinels had seen at the last validation."""
        return self.content["counters"].get("seen", {})

    @property
    def imported(self) -> bool:
        """Whether its network is that of a file, on which no step was trained."""
        return self.run.model.weights is not None and self.content["counters"]["step"] == 0

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits of the network that is to be judged: of names and numbers."""
        return fingerprint(self.weights)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The network that is to be judged: the averaged one where averages were kept."""
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
            RequestError: if label k is another class than output k.
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


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """12 hexadecimal digits of names and numbers."""
    found = hashlib.sha256()
    for name, tensor in weights.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def save(state: TrainState, run: RunConfig, path: Path, context: DistributedContext) -> None:
    """Write `path`: a collective, though only the leading worker writes.

    Raises:
        TrainingFailed: if the file cannot be written; what was there before is untouched.
    """
    parts = {name: part.state_dict() for name, part in state.parts.items()}
    randomness = _random_states(context)
    cost = asdict(state.meter.total(context))
    # Between epochs they are the same on all workers, and part of the network.
    kept = {} if state.part_epoch is None else _statistics(state, context)
    problem = None
    if context.leads:
        problem = _write(path, _content(state, run, parts, randomness, cost, kept))
    # All workers learn of a full disk, or the others would wait for the leading one for ever.
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
    statistics: dict[str, dict[str, torch.Tensor]],
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "run": run.model_dump_json(),
        "model": state.model.state_dict(),
        "optimizer": _plain(state.optimizer.state_dict()),
        "ema": None if state.ema is None else state.ema.state_dict(),
        "parts": parts,
        "random": randomness,
        "meter": cost,
        "counters": {
            "epoch": state.epoch,
            "step": state.step,
            "seconds": state.seconds,
            "compile_seconds": state.compile_seconds,
            "best": state.best,
            "waited": state.patience_count,
            "seen": dict(state.sentinel_values),
        },
        "classes": list(state.classes),
        "part_epoch": None if state.part_epoch is None else asdict(state.part_epoch),
        "statistics": statistics,
    }


def _write(path: Path, content: dict[str, Any]) -> str | None:
    """What went wrong, if anything."""
    try:
        with later():
            save_atomically(path, content)
    except OSError as error:
        return error.strerror or str(error)
    return None


def save_atomically(path: Path, content: dict[str, Any]) -> None:
    """torch.save that replaces `path` as a whole, see `atomic_writer`."""
    with atomic_writer(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch wraps a failed write of its zip file
            raise OSError(str(error).splitlines()[0]) from error


def load(path: Path) -> Saved:
    """Read a checkpoint file, or the `best.pt` (else `last.pt`) of a folder. Never runs code from
    it.

    Raises:
        RequestError: if there is none, or it is not one of ours.
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
        # Whatever a truncated or foreign file makes the reader trip over.
        raise RequestError(f"{file}: not a checkpoint of raytrain, or a truncated one") from error
    return Saved(run, content)


def find(path: Path) -> Path:
    """The checkpoint file that `path` means."""
    if path.is_file():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise RequestError(f"{path}: expected a checkpoint file, or a folder with {BEST} or {LAST}")


def restore(state: TrainState, saved: Saved, context: DistributedContext) -> None:
    """Continue where `saved` stopped; the number of workers may have changed.

    Raises:
        RequestError: if the run is of another kind than that of the checkpoint.
    """
    content = saved.content
    saved.check_classes(state.classes)
    try:
        state.model.load_state_dict(content["model"])
        _load_optimizer(state.optimizer, content["optimizer"])
        if state.ema is not None:
            state.ema.load_state_dict(content["ema"])
        for name, part in state.parts.items():
            if isinstance(part, torch.optim.Optimizer):
                _load_optimizer(part, content["parts"][name])
            else:
                part.load_state_dict(content["parts"][name])
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        # Each holder complains in its own way of a state that is not its own.
        raise RequestError(
            "--resume: the checkpoint does not fit this run; expected the same model, algorithm, "
            f"outer, optimizer and ema as {_kind_of(saved.run)} (seen: {short(error)})"
        ) from error
    # The counters are totals over the workers: one of them carries on with the old sum.
    state.meter = Meter(**content["meter"]) if context.leads else Meter()
    counters = content["counters"]
    state.epoch, state.step = counters["epoch"], counters["step"]
    state.seconds, state.best = counters["seconds"], counters["best"]
    state.compile_seconds = counters.get("compile_seconds", 0.0)
    state.patience_count, state.sentinel_values = (
        counters["waited"],
        dict(counters.get("seen", {})),
    )
    state.part_epoch = PartEpoch.of(content.get("part_epoch"))
    for name, model in _networks(state).items():
        if values := content.get("statistics", {}).get(name):
            set_statistics(model, values, context)
    _set_random_states(content["random"], context)


def _networks(state: TrainState) -> dict[str, torch.nn.Module]:
    averaged = {} if state.ema is None else {"ema": state.ema.module}
    return {"model": state.model, **averaged}


def _statistics(
    state: TrainState, context: DistributedContext
) -> dict[str, dict[str, torch.Tensor]]:
    return {name: statistics(model, context) for name, model in _networks(state).items()}


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's content without tensors among its settings, so that it fits any device."""
    groups = [{**group, "lr": float(group["lr"])} for group in content["param_groups"]]
    return {**content, "param_groups": groups}


def _load_optimizer(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load an optimiser's state; its rate and how it is executed stay as they are here.

    So does the order of numbers in memory: a fused update needs that of the weights.
    """
    groups = [
        {**given, **{name: own[name] for name in _EXECUTED if name in own}}
        for given, own in zip(content["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**content, "param_groups": groups})
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _kind_of(run: RunConfig) -> str:
    kinds = f"{run.model.name}, {run.algorithm.name}, {run.outer.name}"
    return f"{kinds}, ema={run.ema if run.ema is None else f'{run.ema:g}'}"


def short(error: Exception) -> str:
    """The type of an error and the first line of its message, in at most 200 characters."""
    return f"{type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _random_states(context: DistributedContext) -> dict[str, torch.Tensor]:
    """Every worker's generators (dropout), one row each: a collective."""
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
