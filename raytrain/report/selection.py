"""Which runs are meant by the words of `raytrain compare`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.core.errors import RequestError
from raytrain.core.nearest import nearest
from raytrain.tracking.run_names import NEAR_RUNS, matching
from raytrain.tracking.run_search import (
    every_experiment,
    existing,
    is_sweep,
    parent_of,
    quoted,
    search,
    trials_of,
)
from raytrain.training.run_folder import run_id_of, short_id

DEFAULT = "raytrain"
"""The experiment that is compared where no word is given: the one that `train` and `tune` record in."""

_KINDS = ("experiment", "sweep", "run")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_NAMES = 5000  # runs whose names are looked through for a near one


@dataclass(frozen=True)
class Chosen:
    """The runs of a comparison, as MLflow has them, in the order in which they began."""

    title: str
    runs: list[Any]
    parent: Any | None  # the sweep's own run, if these are its trials, all of them


def choose(client: Any, words: Sequence[str]) -> Chosen:
    """All runs that the words name, each once; a sweep's own run stands for its trials.

    A word is a run's id or its beginning, the folder of a run, `last` (the run or sweep that was begun
    last), or the name of an experiment, a sweep or a run. `experiment:`, `sweep:` or
    `run:` before it say which, where a name has several.

    Raises:
        RequestError: for a word that names nothing, or more than one thing.
    """
    found: dict[str, Any] = {}
    for word in words or [f"experiment:{DEFAULT}"]:
        for run in _meant(client, word):
            found.setdefault(run.info.run_id, run)
    runs = sorted(found.values(), key=lambda run: (run.info.start_time or 0, run.info.run_id))
    title = ", ".join(_kind_and_name(word)[1] for word in words) if words else DEFAULT
    return Chosen(title, runs, _sweep_of(client, runs))


def _sweep_of(client: Any, runs: Sequence[Any]) -> Any | None:
    """The sweep's own run, if these are all of its trials."""
    parents = {parent_of(run) for run in runs}
    (parent,) = parents if len(parents) == 1 else (None,)
    sweep = None if parent is None else existing(client, parent)
    if sweep is None:
        return None
    trials = {run.info.run_id for run in _unfolded(client, sweep)}
    return sweep if trials == {run.info.run_id for run in runs} else None


def _kind_and_name(word: str) -> tuple[str, str]:
    """`sweep` and `mine` of `sweep:mine`; a name that has a colon of its own is whole."""
    kind, colon, rest = word.partition(":")
    return (kind, rest) if colon and kind in _KINDS else ("", word)


def _meant(client: Any, word: str) -> list[Any]:
    kind, name = _kind_and_name(word)
    kinds = (kind,) if kind else _KINDS
    if "run" in kinds and (run := _by_id(client, name)) is not None:
        return _unfolded(client, run)
    by_kind = {kind: _by_name(client, kind, name) for kind in kinds}
    meanings = {kind: found for kind, found in by_kind.items() if found is not None}
    if not meanings and "run" in kinds and (run := _begun(client, word, name)) is not None:
        return _unfolded(client, run)
    if not meanings:
        raise RequestError(_unknown(client, word, name, kinds))
    if len(meanings) > 1:
        said = " and ".join(f"{'an' if k == 'experiment' else 'a'} {k}" for k in meanings)
        wanted = " or ".join(f"{kind}:{name}" for kind in meanings)
        raise RequestError(f"{word}: this is the name of {said}; expected {wanted}")
    ((kind, runs),) = meanings.items()
    if kind == "run" and len(runs) > 1 and len(kinds) > 1:
        raise RequestError(
            f"{word}: {len(runs)} runs have this name ({_ids(runs)}); expected one id, or run:{name} "
            "for all of them"
        )
    if kind != "experiment":
        runs = [one for run in runs for one in _unfolded(client, run)]
    runs = [run for run in runs if not is_sweep(run)]
    if not runs:
        raise RequestError(f"{word}: there is no run in this {kind} yet; expected at least one")
    return runs


def _by_id(client: Any, name: str) -> Any | None:
    """The run with this id, or whose checkpoints are in this folder."""
    if os.path.exists(name):
        name = run_id_of(Path(name).resolve()) or name
    return existing(client, name) if _RUN_ID.fullmatch(name) else None


def _begun(client: Any, word: str, name: str) -> Any | None:
    """The run that was begun last, if `name` is `last`, or the one whose id begins with it."""
    runs = matching(client, name)
    if len(runs) > 1:
        raise RequestError(f"{word}: {len(runs)} ids begin so ({_ids(runs)}); expected one")
    return runs[0] if runs else None


def _ids(runs: Sequence[Any]) -> str:
    return ", ".join(short_id(run.info.run_id) for run in runs[:3]) + (
        ", ..." if len(runs) > 3 else ""
    )


def _by_name(client: Any, kind: str, name: str) -> list[Any] | None:
    """What has this name; None if nothing has."""
    if kind == "experiment":
        found = client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage == "deleted":
            return None
        runs = list(search(client, [found.experiment_id]))
        parents = {parent_of(run) for run in runs}
        return [run for run in runs if run.info.run_id not in parents]
    every = every_experiment(client)
    if (wanted := quoted(name)) is None or not every:
        return None
    if kind == "sweep":
        sweeps = search(client, every, f"tags.sweep = {wanted}")
        return [run for run in sweeps if is_sweep(run)] or None
    named = search(client, every, f"attributes.run_name = {wanted}")
    return [run for run in named if not is_sweep(run)] or None


def _unfolded(client: Any, run: Any) -> list[Any]:
    """A run, or the trials of the sweep that it stands for."""
    trials = list(trials_of(client, run))
    return trials or ([] if is_sweep(run) else [run])


def _unknown(client: Any, word: str, name: str, kinds: Sequence[str]) -> str:
    """One sentence, with the nearest of the names that there are."""
    experiments = client.search_experiments()
    known = [one.name for one in experiments] if "experiment" in kinds else []
    for run in search(client, [one.experiment_id for one in experiments], most=_NAMES):
        wanted = "sweep" if is_sweep(run) else "run"
        if wanted in kinds:
            known.append(run.data.tags["sweep"] if wanted == "sweep" else run.info.run_name)
    near = nearest(name, known, NEAR_RUNS)
    return f"{word}: MLflow has no {' and no '.join(kinds)} of this name{near}"
