"""`raytrain status`: how a sweep or a training is doing, from its study and its files alone.

No Ray and no MLflow server is needed, and nothing is written but the working copy of a storage behind
a URL. Neither torch nor MLflow is imported, unless a name is one that only MLflow has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytrain.commands.observed import Place
from raytrain.commands.sweep_status import SweepStatus, sweep_status
from raytrain.commands.training_status import TrainingStatus, training_status
from raytrain.config.names import STORAGE
from raytrain.core.errors import RequestError
from raytrain.core.storage import local_root
from raytrain.tracking.address import sqlite_file
from raytrain.tracking.address import tracking_uri as store
from raytrain.training.named_folder import LAST, named_folder, unknown
from raytrain.training.run_folder import SPACE, short_id


def status(
    name: str = LAST,
    *,
    storage: str | Path = STORAGE,
    experiment: str | None = None,
    tracking_uri: str | None = None,
) -> SweepStatus | TrainingStatus:
    """How a sweep or a training is doing.

    `name` is what `named_folder` takes, or the name of a run in MLflow at `tracking_uri`.

    Raises:
        RequestError: if there is none of this name, or several; if its storage or its study does not
            answer.
    """
    root = local_root(storage)
    folder = named_folder(name, root, experiment)
    if folder is None:
        folder = _recorded_folder(name, root, tracking_uri)
    is_inside = root.resolve() in folder.parents
    where = Place(folder, str(storage if is_inside else folder.parent.parent))
    return sweep_status(where) if (folder / SPACE).is_file() else training_status(where)


def _recorded_folder(name: str, root: Path, uri: str | None) -> Path:
    """The folder of the run, or of the sweep, that MLflow has under a name.

    Raises:
        RequestError: if there is none, or MLflow does not answer.
    """
    uri = store(uri)
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        raise unknown(name, root)
    run = _recorded_run(name, root, uri)
    folder = named_folder(run.data.tags.get("sweep", run.info.run_id), root, None)
    if folder is None:
        run_id = short_id(run.info.run_id)
        raise RequestError(
            f"{name}: the run {run_id} has no folder below storage; expected storage="
        )
    return folder


def _recorded_run(name: str, root: Path, uri: str) -> Any:
    from raytrain.tracking.run_names import matching, single
    from raytrain.tracking.stores import first_line, reader

    try:
        found = matching(reader(uri), name)
    except RequestError:
        raise
    except Exception as error:  # whatever a client raises for a server that is away
        reason = f", and MLflow at {uri} does not answer ({first_line(error)})"
        raise unknown(name, root, reason) from None
    if not found:
        raise unknown(name, root)
    return single(name, found)
