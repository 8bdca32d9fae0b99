"""Completion of the names of runs in a shell, without MLflow, which takes seconds to import."""

from __future__ import annotations

import sqlite3
from contextlib import closing

_MOST = 200  # the newest runs
_NAMES = """
SELECT name, substr(run_uuid, 1, 8), experiment FROM (
    SELECT runs.name, run_uuid, start_time, experiments.name AS experiment
    FROM runs JOIN experiments USING (experiment_id)
    WHERE runs.lifecycle_stage = 'active' AND run_uuid NOT IN (
        SELECT run_uuid FROM tags WHERE tags.key = 'mlflow.parentRunId'
    )
) ORDER BY start_time DESC LIMIT ?
"""


def run_completions(incomplete: str) -> list[tuple[str, str]]:
    """Names of runs and sweeps that begin so, each with what is shown beside it; the newest first.

    Trials of sweeps are left out; stores other than SQLite complete `last` only.
    """
    found = {"last": "the run or sweep that was begun last"}
    for name, run_id, experiment in _runs():
        found.setdefault(name, f"{run_id} in {experiment}")
    return [(name, text) for name, text in found.items() if name.startswith(incomplete)]


def _runs() -> list[tuple[str, str, str]]:
    from raytrain.core.errors import RequestError
    from raytrain.tracking.address import sqlite_file, tracking_uri

    try:
        file = sqlite_file(tracking_uri(None))
        if file is None or not file.is_file():
            return []
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            return database.execute(_NAMES, (_MOST,)).fetchall()
    except (RequestError, sqlite3.Error):  # nothing to complete is no error
        return []
