"""The page of the MLflow UI that shows an experiment, a sweep or a run."""

from __future__ import annotations

from typing import Any

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.tracking.run_names import LAST_RUN, NEAR_RUNS, matching, single
from raytrain.tracking.run_search import every_experiment, existing, is_sweep, search
from raytrain.tracking.views import EVERY, TAG, key_of, link, run_link
from raytrain.training.run_folder import is_run_id

START = "#/experiments"
"""The list of experiments."""

_NAMES = 5000  # runs whose names are compared to find a near one


def page_of(client: Any, word: str | None = None) -> str:
    """The address, below that of the server, of what a word names; without one, of the experiment
    that was recorded in last.

    A run is named as `run_of` takes it; a name that an experiment has too is that of the run.

    Raises:
        RequestError: if the word names nothing, or several runs.
    """
    runs = _runs(client, word or LAST_RUN)
    if word is None:
        return _of_experiment(client, runs[0].info.experiment_id) if runs else START
    if runs:
        return _of_run(client, single(word, runs))
    experiment = client.get_experiment_by_name(word)
    if experiment is None or experiment.lifecycle_stage == "deleted":
        raise RequestError(_unknown(client, word))
    return _of_experiment(client, experiment.experiment_id)


def _runs(client: Any, word: str) -> list[Any]:
    if is_run_id(word):
        run = existing(client, word)
        return [] if run is None else [run]
    return matching(client, word)


def _of_experiment(client: Any, experiment_id: str) -> str:
    if TAG + EVERY in client.get_experiment(experiment_id).tags:
        return link(experiment_id, EVERY)
    return f"#/experiments/{experiment_id}/runs"  # made elsewhere


def _of_run(client: Any, run: Any) -> str:
    """The trials of a sweep; the page of any other run."""
    experiment_id, name = run.info.experiment_id, run.data.tags.get("sweep", "")
    if is_sweep(run) and TAG + key_of(name) in client.get_experiment(experiment_id).tags:
        return link(experiment_id, name)
    return run_link(experiment_id, run.info.run_id)


def _unknown(client: Any, word: str) -> str:
    runs = search(client, every_experiment(client), most=_NAMES)
    names = [one.name for one in client.search_experiments()]
    names += [run.info.run_name for run in runs]
    return (
        f"{word}: there is no such experiment, sweep or run; expected a name, an id or its beginning, "
        f"or last{nearest(word, names, NEAR_RUNS)}"
    )
