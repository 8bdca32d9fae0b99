"""Output of a sweep on its parent run in MLflow and beside its study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from raytrain.commands.train import log_model
from raytrain.core.console import log_line
from raytrain.core.files import write_atomically
from raytrain.data.loader import Splits
from raytrain.plotting.sweep_figures import draw
from raytrain.tracking import Tracker, provenance
from raytrain.training.run_folder import RUN_ID, to_yaml
from raytrain.tuning.budget import TrialRow
from raytrain.tuning.cost_curves import CostCurve, read_curves
from raytrain.tuning.importance import (
    EqualCost,
    Importance,
    Method,
    importances,
    importances_at_equal_cost,
)
from raytrain.tuning.mlflow_runs import PARENT
from raytrain.tuning.space.labels import algorithm_of
from raytrain.tuning.space.search_space import SearchSpace
from raytrain.tuning.trial_manager import TrialManager

TABLE = "trials.parquet"
_FEWEST = 3  # finished trials of an algorithm, below which a sweep warns


@dataclass(frozen=True)
class WhatMattered:
    """Importances of the parameters for the first objective, and the curves they are of."""

    finished: list[Importance]  # at the end of finished trials
    equal: EqualCost | None  # of finished and stopped trials at equal cost
    curves: dict[int, CostCurve]  # of every trial, by its number


def what_mattered(manager: TrialManager, method: Method) -> WhatMattered:
    """What mattered in a sweep, by Optuna's evaluator `method`."""
    study, metric = manager.study, manager.space.objective[0].metric
    curves = read_curves(manager.journal, manager.fidelity, metric)
    finished = importances(study, method)
    return WhatMattered(finished, importances_at_equal_cost(study, curves, method), curves)


def few_finished(space: SearchSpace, rows: Iterable[TrialRow]) -> str | None:
    """A sentence if a sweep over several algorithms has too few finished trials of one of them."""
    if space.algorithms is None:
        return None
    done = Counter(algorithm_of(row.params) for row in rows if row.state == "complete")
    counts = {name: done[str(name)] for name in space.algorithms[1]}
    few = [f"{name} ({count})" for name, count in counts.items() if count < _FEWEST]
    if not few:
        return None
    return (
        f"fewer than {_FEWEST} trials were trained to their end of {', '.join(few)}: the sweep does not "
        "rank them; continue it with more trials"
    )


def log_sweep(
    tracker: Tracker, manager: TrialManager, splits: Splits, weights: WhatMattered
) -> Path | None:
    """Rows, figures, totals, and of the best trial its run file (which is returned) and network."""
    folder, progress, best = manager.folder, manager.progress(), manager.best()
    table = folder / TABLE
    manager.journal.write_parquet(table)
    tracker.artifact(PARENT, table)
    for figure in _drawn(manager, weights):
        tracker.artifact(PARENT, figure, "figures")
    tracker.log(
        PARENT,
        {
            "sweep/trials": float(progress.finished),
            "sweep/fe_per_image": progress.fe_per_image,
            **{f"sweep/{outcome}": float(n) for outcome, n in progress.outcomes.items()},
        },
    )
    if best is None or best.value is None:
        return None
    tracker.log(PARENT, {"sweep/best": best.value})
    tracker.tag(PARENT, {"best_trial": best.handle})
    run = manager.space.run(best.params)
    tracker.result(PARENT, provenance.parameters(run), best.metrics, provenance.tags(run, "sweep"))
    best_file = folder / "best.yaml"
    write_atomically(best_file, to_yaml(run))
    tracker.artifact(PARENT, best_file)
    log_model(tracker, best.handle, folder / "trials" / best.handle, splits.valid, best.metrics)
    return best_file


def write_run_ids(tracker: Tracker, manager: TrialManager) -> dict[str, str]:
    """The ids of the runs in MLflow, as far as they are assigned; also written to the trials' folders,
    for commands that take either.
    """
    tracker.flush(20.0)
    found: dict[str, str] = {}
    for handle in (PARENT, *(row.handle for row in manager.history.rows())):
        if run_id := tracker.run_id(handle, 0.0):
            found[handle] = run_id
            folder = manager.folder / "trials" / handle
            if folder.is_dir():
                write_atomically(folder / RUN_ID, run_id)
    return found


def _drawn(manager: TrialManager, weights: WhatMattered) -> list[Path]:
    folder = manager.folder / "figures"
    space = manager.space
    units = space.units() if isinstance(space, SearchSpace) else {}
    measured = weights.curves, weights.finished, weights.equal, units
    try:
        return draw(manager.history, manager.fidelity, folder, *measured)
    except Exception as error:  # a picture is not worth a sweep
        log_line(f"raytrain: the figures could not be drawn ({type(error).__name__}: {error})")
        return []
