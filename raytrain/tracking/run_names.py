"""Which run a word means: a path, an id or its beginning, a name, a sweep's name, or `last`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.tracking.run_search import (
    every_experiment,
    is_sweep,
    parent_of,
    quoted,
    search,
    trials_of,
)
from raytrain.tracking.stores import reader
from raytrain.training.run_folder import TRIALS, folder_of, is_run_id, short_id

LAST_RUN = "last"
_BEGINNING = re.compile(r"[0-9a-f]{4,31}")
NEAR_RUNS = 3  # names of runs that a refusal proposes
_NAMES = 5000  # runs whose names are compared to find a near one


def run_of(word: str, storage: Path, uri: str | None) -> str:
    """Return a word that `folder_of` takes: a path below or beside `storage`, or the id of a run.

    `last` is the run or sweep that was begun last; a sweep stands for its best trial.

    Raises:
        RequestError: if the word means nothing, or several runs.
    """
    if word not in ("", LAST_RUN):
        if is_run_id(word):
            return word
        with suppress(RequestError):
            folder = folder_of(word, storage)
            if not (folder / TRIALS).is_dir():
                return word
            word = folder.name  # of a sweep
    try:
        client = reader(uri)
    except RequestError as error:
        raise RequestError(f"{word}: neither a checkpoint nor a run ({error})") from None
    return named_run(client, word).info.run_id


def named_run(client: Any, word: str) -> Any:
    """The run in MLflow that a word means; see `run_of`.

    Raises:
        RequestError: if the word means nothing, or several runs.
    """
    found = matching(client, word)
    if not found:
        raise RequestError(_unknown(client, word))
    run = single(word, found)
    return _best_trial(client, word, run) if is_sweep(run) else run


def single(word: str, found: Sequence[Any]) -> Any:
    """The only one of the runs that a word names.

    Raises:
        RequestError: if there are several.
    """
    if len(found) > 1:
        ids = ", ".join(short_id(run.info.run_id) for run in found[:3])
        more = ", ..." if len(found) > 3 else ""
        raise RequestError(
            f"{word}: {len(found)} runs have this name ({ids}{more}); expected one, such as "
            f"{short_id(found[0].info.run_id)}"
        )
    return found[0]


def matching(client: Any, word: str) -> list[Any]:
    """Runs and sweeps with this name, else those whose id begins so, the newest first."""
    experiments = every_experiment(client)
    if not experiments:
        return []

    def found(wanted: str = "") -> Iterator[Any]:
        return search(client, experiments, wanted, order=["attributes.start_time DESC"])

    if word == LAST_RUN:
        return list(islice((run for run in found() if parent_of(run) is None), 1))
    runs: dict[str, Any] = {}
    if (name := quoted(word)) is not None:
        sweeps = [run for run in found(f"tags.sweep = {name}") if is_sweep(run)]
        for run in [*sweeps, *found(f"attributes.run_name = {name}")]:
            runs[run.info.run_id] = run
    if not runs and _BEGINNING.fullmatch(word):
        return list(found(f"attributes.run_id LIKE '{word}%'"))
    return list(runs.values())


def _best_trial(client: Any, word: str, sweep: Any) -> Any:
    """The run of a sweep's best trial."""
    best = sweep.data.tags.get("best_trial")
    for run in trials_of(client, sweep) if best is not None else ():
        if run.data.tags.get("trial") == best:
            return run
    raise RequestError(
        f"{word}: this sweep has no best trial yet; expected a sweep that has ended"
    )


def _unknown(client: Any, word: str) -> str:
    """One sentence, with the nearest of the names that there are."""
    runs = search(client, every_experiment(client), most=_NAMES)
    names = (run.data.tags["sweep"] if is_sweep(run) else run.info.run_name for run in runs)
    return (
        f"{word}: neither a checkpoint nor a run; expected a path, an id or its beginning, the name of a "
        f"run or sweep, or last{nearest(word, names, NEAR_RUNS)}"
    )
