"""Output of a sweep on its parent run in MLflow and beside its study."""

from __future__ import annotations

from pathlib import Path

from raytrain.commands.train import log_model
from raytrain.core.console import log_line
from raytrain.core.files import write_atomically
from raytrain.data.loader import Splits
from raytrain.plotting.sweep_figures import draw
from raytrain.tracking import Tracker, provenance
from raytrain.training.run_folder import RUN_ID, to_yaml
from raytrain.tuning.importance import Importance
from raytrain.tuning.mlflow_runs import PARENT
from raytrain.tuning.trial_manager import TrialManager

TABLE = "trials.parquet"


def log_sweep(
    tracker: Tracker, manager: TrialManager, splits: Splits, weights: list[Importance]
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
                (folder / RUN_ID).write_text(run_id)
    return found


def _drawn(manager: TrialManager, weights: list[Importance]) -> list[Path]:
    try:
        return draw(manager.history, manager.fidelity, manager.folder / "figures", weights)
    except Exception as error:  # a picture is not worth a sweep
        log_line(f"raytrain: the figures could not be drawn ({type(error).__name__}: {error})")
        return []
