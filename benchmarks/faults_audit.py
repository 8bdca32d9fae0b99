"""What a sweep left behind, counted from the outside: its study, its rows, its table and its MLflow runs."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from raytrain.core.epoch_metrics import METRICS
from raytrain.tuning.budget import ENDED

_WELL = ("complete", "stopped", "infeasible")  # end as FINISHED in MLflow, the others as FAILED


@dataclass(frozen=True)
class Ended:
    """A trial that had ended, as the study told it."""

    attempt: int
    outcome: str
    epochs: int
    values: tuple[float, ...]
    params: str
    at: float  # seconds since the epoch


def ended(study: Path, name: str) -> dict[int, Ended]:
    """The trials of a sweep that have ended, by the number of their first attempt."""
    trials = attempts(study, name)
    return {_origin(trial): _ended(trial) for trial in _final(trials)}


def attempts(study: Path, name: str) -> list[FrozenTrial]:
    """All trials of the study in a journal; none if it is only being made."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not study.is_file():
        return []
    storage = JournalStorage(JournalFileBackend(str(study)))
    try:
        return optuna.load_study(study_name=name, storage=storage).get_trials()
    except KeyError:
        return []


def audit(
    folder: Path, study: Path, name: str, uri: str, budget: int, seen: Mapping[int, Ended]
) -> tuple[dict[str, int], dict[str, int]]:
    """Trials by outcome, and every violation with how often it was found; each is told on stderr.

    `name` is that of the sweep in its `study`, a journal; `folder` holds its files, and is in that of its
    experiment.
    """
    trials = attempts(study, name)
    final = ended(study, name)
    rows = _rows(folder / "rows.jsonl")
    found = {
        **_of_study(trials, final, budget, seen),
        **_of_rows(rows, final, folder / "trials.parquet"),
        **_of_mlflow(MlflowClient(uri), folder.parent.name, rows, final),
    }
    for violation, cases in found.items():
        for case in cases:
            print(f"{violation}: {case}", file=sys.stderr)
    counts = {violation: len(cases) for violation, cases in found.items()}
    return dict(Counter(one.outcome for one in final.values())), counts


def _of_study(
    trials: list[FrozenTrial], final: dict[int, Ended], budget: int, seen: Mapping[int, Ended]
) -> dict[str, list[str]]:
    ends = Counter(_origin(trial) for trial in _final(trials))
    params = Counter(one.params for one in final.values())
    over = {one.attempt for one in final.values()}
    again = [t for t in trials if t.user_attrs.get("resume_of") in over]
    return {
        "finished trials lost or changed": [
            f"t{number:04d} was {was}, is {final.get(number)}"
            for number, was in seen.items()
            if final.get(number) != was
        ],
        "trials that ended twice or went on after their end": [
            *(f"t{number:04d} ended {count} times" for number, count in ends.items() if count > 1),
            *(f"attempt {trial.number} goes on with one that had ended" for trial in again),
        ],
        "configurations tried twice": [text for text, count in params.items() if count > 1],
        "attempts left open in the study": [
            f"attempt {trial.number} is {trial.state.name}"
            for trial in trials
            if not trial.state.is_finished()
        ],
        "trials beside the budget": (abs(len(final) - budget) * [f"{len(final)}, not {budget}"]),
    }


def _of_rows(
    rows: list[dict[str, Any]], final: dict[int, Ended], table: Path
) -> dict[str, list[str]]:
    epochs = _epochs(rows)
    kept = pq.read_table(table, columns=["trial", "epoch"]).to_pylist()
    in_table = Counter((row["trial"], row["epoch"]) for row in kept)
    journal = {(row["trial"], row["epoch"]) for row in rows}
    late = [
        f"t{row['trial']:04d} epoch {row['epoch']}"
        for row in rows
        if row["trial"] in final and row["time"] / 1000 > final[row["trial"]].at + 0.1
    ]
    gaps = [
        f"t{number:04d}: epoch {epoch}"
        for number, one in final.items()
        for epoch in range(1, one.epochs + 1)
        if epoch not in epochs[number]
    ]
    unequal = sorted(journal.symmetric_difference(in_table))
    doubled = [key for key, count in in_table.items() if count > 1]
    return {
        "epochs recorded after the end of their trial": late,
        "epochs missing in the rows": gaps,
        "rows missing or doubled in the table": [str(key) for key in (*unequal, *doubled)],
    }


def _of_mlflow(
    client: MlflowClient, experiment: str, rows: list[dict[str, Any]], final: dict[int, Ended]
) -> dict[str, list[str]]:
    parents, children = _runs(client, experiment)
    by_handle = defaultdict(list)
    for run in children:
        by_handle[run.data.tags.get("trial", run.info.run_id)].append(run)
    wanted = {f"t{number:04d}": one for number, one in final.items()}
    wrong = [
        f"{handle}: {run.info.status}, {run.data.tags.get('outcome')}, not {wanted[handle].outcome}"
        for handle, runs in by_handle.items()
        for run in runs
        if handle in wanted and not _agrees(run, wanted[handle].outcome)
    ]
    missing, doubled, wrong_values = _points(client, rows, by_handle)
    return {
        "parent runs beside the one": [run.info.run_id for run in parents[1:]],
        "MLflow runs missing": [handle for handle in wanted if handle not in by_handle],
        "MLflow runs doubled": [h for h, runs in by_handle.items() for _ in runs[1:]],
        "MLflow runs of no trial": [handle for handle in by_handle if handle not in wanted],
        "MLflow runs left RUNNING": [
            run.info.run_name or ""
            for run in (*parents, *children)
            if run.info.status == "RUNNING"
        ],
        "MLflow runs that ended otherwise than their trial": wrong,
        "rows missing in MLflow": missing,
        "metric points doubled": doubled,
        "metric points of another value": wrong_values,
    }


def _points(
    client: MlflowClient, rows: list[dict[str, Any]], by_handle: Mapping[str, list[Run]]
) -> tuple[list[str], list[str], list[str]]:
    """Points missing, there twice, and of another value than in any of the rows."""
    missing, doubled, wrong = [], [], []
    for trial, epochs in _epochs(rows).items():
        handle = f"t{trial:04d}"
        for run in by_handle.get(handle, [])[:1]:
            for metric in sorted(
                {name for each in epochs.values() for row in each for name in row}
            ):
                points = defaultdict(list)
                for point in client.get_metric_history(run.info.run_id, metric):
                    points[point.step].append(point.value)
                for epoch, each in epochs.items():
                    told = [row[metric] for row in each if metric in row]
                    where = f"{handle} epoch {epoch}: {metric}"
                    if not told:
                        continue
                    if not points[epoch]:
                        missing.append(where)
                    elif len(points[epoch]) > 1:
                        doubled.append(f"{where} {points[epoch]}")
                    elif not any(_same(points[epoch][0], value) for value in told):
                        wrong.append(f"{where} {points[epoch]}, not {told}")
    return missing, doubled, wrong


def runs_of(client: MlflowClient, name: str) -> list[Run]:
    """All runs of an experiment."""
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], max_results=5000))


def _runs(client: MlflowClient, experiment: str) -> tuple[list[Run], list[Run]]:
    runs = runs_of(client, experiment)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in children], children


def _agrees(run: Run, outcome: str) -> bool:
    status = "FINISHED" if outcome in _WELL else "FAILED"
    return (run.info.status, run.data.tags.get("outcome")) == (status, outcome)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # torn by a death
            continue
    return rows


def _epochs(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[int, list[dict[str, float]]]]:
    """The metrics of every row, by trial and epoch: more than one where an epoch was recorded twice."""
    epochs: dict[int, dict[int, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        metrics = {name: value for name, value in row.items() if name in METRICS}
        epochs[row["trial"]][row["epoch"]].append(metrics)
    return epochs


def _final(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The attempts with which a trial ended for good."""
    followed = {trial.user_attrs.get("resume_of") for trial in trials}
    return [
        trial
        for trial in trials
        if trial.state.is_finished()
        and trial.number not in followed
        and trial.user_attrs.get("outcome") in ENDED
    ]


def _origin(trial: FrozenTrial) -> int:
    return trial.user_attrs.get("origin", trial.number)


def _ended(trial: FrozenTrial) -> Ended:
    assert trial.datetime_complete is not None
    fixed = trial.system_attrs.get("fixed_params", {})
    return Ended(
        attempt=trial.number,
        outcome=trial.user_attrs["outcome"],
        epochs=trial.user_attrs.get("last", {}).get("epoch", 0),
        values=tuple(trial.values or ()),
        params=json.dumps({**fixed, **trial.params}, sort_keys=True),
        at=trial.datetime_complete.timestamp(),
    )
