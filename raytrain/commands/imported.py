"""A network in a file of RobustBench as a run of its own: a checkpoint of zero epochs, and an MLflow run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrain.commands.train import own_tracker
from raytrain.config.request import as_run
from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import RequestError
from raytrain.tracking import Tracker, provenance
from raytrain.training.checkpoint import BEST, fingerprint, save
from raytrain.training.run_folder import (
    fetch_checkpoints,
    run_id_of,
    to_yaml,
    write_run_id,
)
from raytrain.training.setup import preflight, start

CHOSEN = ("data", "model", "threat")
"""Fields of a run that are true of a network which was not trained here."""
_OF_TRAINING = ("algorithm", "outer", "signature", "seed", "workers")  # tags


def imported(word: str, changes: Mapping[str, Any], storage: str | Path) -> Path:
    """Make a checkpoint and an MLflow run of `robustbench:FILE`, and return the folder of the checkpoint.

    `changes` are fields of the run by dotted path, of which data, model and threat model are taken. The
    same weights under the same configuration are one run, wherever their file is.

    Raises:
        RequestError: if there is no such file, or it does not fit the data.
        TrainingFailed: if the checkpoint cannot be written.
    """
    fields = (*CHOSEN, "tracking_uri")
    chosen = {path: value for path, value in changes.items() if path.split(".")[0] in fields}
    run = as_run({"model": word, "storage": str(storage)}, chosen)
    splits, context = preflight(run), DistributedContext()
    located = run.model_copy(update={"data": run.data.located()})
    state = start(located, splits, context)
    name = f"robustbench-{_file(run).stem}"
    folder = run.root / run.experiment / f"{name}-{_digest(run, state.model.state_dict())}"
    fetch_checkpoints(folder)
    with own_tracker(run, run.root) as tracker:
        run_id = run_id_of(folder)
        if run_id is None or not (folder / BEST).is_file() or not tracker.has_run(run_id):
            save(state, located, folder / BEST, context)
            write_run_id(folder, _recorded(tracker, run, name, folder / BEST))
    return folder.resolve()


def _digest(run: RunConfig, weights: Mapping[str, Any]) -> str:
    """8 hexadecimal digits of the network and of the configuration, without the path of its file."""
    model = run.model.model_copy(update={"weights": None})
    signature = run.model_copy(update={"model": model}).signature()
    return hashlib.sha256(f"{fingerprint(weights)} {signature}".encode()).hexdigest()[:8]


def _recorded(tracker: Tracker, run: RunConfig, name: str, checkpoint: Path) -> str:
    """Open and end an MLflow run with the parameters and tags that do not concern training; its id."""
    tags = provenance.tags(run, "imported")
    parameters = provenance.parameters(run)
    tracker.open(
        "imported",
        tracker.unused_name(name),
        {path: value for path, value in parameters.items() if path.split(".")[0] in CHOSEN},
        {tag: value for tag, value in tags.items() if tag not in _OF_TRAINING},
        note=f"**{_file(run).name}**, a {provenance.model_of(run)} that was not trained here: its training "
        f"cost is not known.\n\nThreat model: {provenance.contract_of(run).text}.\n",
    )
    tracker.text("imported", to_yaml(run), "run.yaml")
    tracker.artifact("imported", checkpoint, "checkpoints")
    run_id = tracker.run_id("imported")
    if run_id is None:
        raise RequestError(
            f"tracking_uri: MLflow at {tracker.uri} made no run; expected an answer"
        )
    return run_id


def _file(run: RunConfig) -> Path:
    assert run.model.weights is not None
    return run.model.weights
