"""Whether a store can be used, found out without making or changing anything in it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from raytrain.core.errors import RequestError
from raytrain.core.files import check_folder
from raytrain.tracking.address import sqlite_file, tracking_uri
from raytrain.tracking.stores import check_not_deleted, connect, is_database, is_missing, usable


def check_store(uri: str | None, experiment: str, run_id: str | None = None) -> None:
    """Refuse what a `Tracker` would refuse, and a run to be continued that the store does not have.

    Databases other than SQLite are connected to, and not read: MLflow's client would make its tables.

    Raises:
        RequestError: naming the field.
    """
    uri = tracking_uri(uri)
    file = sqlite_file(uri)
    missing = False
    with usable(uri):
        if file is not None:
            missing = not _in_file(file, experiment, run_id)
        elif is_database(uri):
            from mlflow.store.db.utils import create_sqlalchemy_engine

            create_sqlalchemy_engine(uri).connect().close()
        else:
            missing = not _on_server(connect(uri), experiment, run_id)
    if missing:
        raise RequestError(f"{run_id}: MLflow at {uri} has no such run to continue")


def _in_file(file: Path, experiment: str, run_id: str | None) -> bool:
    """Whether a SQLite file has the run, if one is given; raises if it cannot be used."""
    if not file.exists():
        check_folder(file.parent)
        return run_id is None
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        known = "SELECT name FROM sqlite_master WHERE name = 'experiments'"
        if not connection.execute(known).fetchall():
            return run_id is None
        stages = "SELECT lifecycle_stage FROM experiments WHERE name = ?"
        for (stage,) in connection.execute(stages, [experiment]):
            check_not_deleted(experiment, stage)
        runs = "SELECT 1 FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active'"
        found = run_id is None or connection.execute(runs, [run_id]).fetchall()
    if not os.access(file, os.W_OK):
        raise PermissionError(f"{file} cannot be written")
    return bool(found)


def _on_server(client: Any, experiment: str, run_id: str | None) -> bool:
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        check_not_deleted(experiment, found.lifecycle_stage)
    return run_id is None or not is_missing(client, run_id)
