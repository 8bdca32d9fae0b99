"""Runs in an MLflow store: searched, and those of sweeps distinguished from others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_PAGE = 1000  # runs in one answer


def search(
    client: Any,
    experiments: list[str],
    wanted: str = "",
    most: int | None = None,
    order: Sequence[str] = (),
) -> Iterator[Any]:
    """The runs of experiments (ids) that a filter of MLflow finds, page by page."""
    token, seen = None, 0
    while True:
        page = client.search_runs(
            experiments, wanted, max_results=_PAGE, order_by=list(order), page_token=token
        )
        yield from page
        token, seen = page.token, seen + len(page)
        if not token or (most is not None and seen >= most):
            return


def every_experiment(client: Any) -> list[str]:
    """The ids of all experiments."""
    return [one.experiment_id for one in client.search_experiments()]


def existing(client: Any, run_id: str) -> Any | None:
    """A run by its id; None if there is none, or a deleted one."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    return None if run.info.lifecycle_stage == "deleted" else run


def parent_of(run: Any) -> str | None:
    """The id of the sweep's run that a trial belongs to."""
    return run.data.tags.get("mlflow.parentRunId")


def trials_of(client: Any, sweep: Any) -> Iterator[Any]:
    """The runs below a sweep's own."""
    below = f"tags.mlflow.parentRunId = '{sweep.info.run_id}'"
    return search(client, [sweep.info.experiment_id], below)


def is_sweep(run: Any) -> bool:
    """Whether a run is a sweep's own, and not a trial's."""
    return "sweep" in run.data.tags and "trial" not in run.data.tags


def quoted(name: str) -> str | None:
    """A name as MLflow's filters take it; None if they cannot."""
    for quote in "'\"":
        if quote not in name:
            return f"{quote}{name}{quote}"
    return None
