"""What a sweep leaves on its parent run in MLflow and beside its study."""

from __future__ import annotations

from pathlib import Path

from raytrain.api import leave_network
from raytrain.checkpoint import RUN_ID, to_yaml
from raytrain.data.loader import Splits
from raytrain.say import say
from raytrain.sweep.figures import draw
from raytrain.sweep.importance import Importance
from raytrain.sweep.ledger import Ledger
from raytrain.sweep.mirror import PARENT
from raytrain.tracking import Tracker

TABLE = "trials.parquet"


def leave(
    tracker: Tracker, ledger: Ledger, splits: Splits, weights: list[Importance]
) -> Path | None:
    """Rows, figures, totals, and of the best trial its run file (which is returned) and network."""
    folder, progress, best = ledger.folder, ledger.progress(), ledger.best()
    table = folder / TABLE
    ledger.journal.write_parquet(table)
    tracker.artifact(PARENT, table)
    for figure in _drawn(ledger, weights):
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
    tracker.log(PARENT, {**best.metrics, "sweep/best": best.value})
    tracker.tag(PARENT, {"best_trial": best.handle})
    best_file = folder / "best.yaml"
    best_file.write_text(to_yaml(ledger.space.run(best.params)))
    tracker.artifact(PARENT, best_file)
    leave_network(
        tracker, best.handle, folder / "trials" / best.handle, splits.valid, best.metrics
    )
    return best_file


def leave_run_ids(tracker: Tracker, ledger: Ledger) -> dict[str, str]:
    """The ids of the runs in MLflow, as far as it has given them; also left in the trials' folders, for
    commands that are given one of the two.
    """
    tracker.flush(20.0)
    found: dict[str, str] = {}
    for handle in (PARENT, *(row.handle for row in ledger.history.rows())):
        if run_id := tracker.run_id(handle, 0.0):
            found[handle] = run_id
            folder = ledger.folder / "trials" / handle
            if folder.is_dir():
                (folder / RUN_ID).write_text(run_id)
    return found


def _drawn(ledger: Ledger, weights: list[Importance]) -> list[Path]:
    try:
        return draw(ledger.history, ledger.fidelity, ledger.folder / "figures", weights)
    except Exception as error:  # a picture is not worth a sweep
        say(f"raytrain: the figures could not be drawn ({type(error).__name__}: {error})")
        return []
