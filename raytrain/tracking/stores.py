"""Clients of the MLflow stores: availability, and errors that are permanent."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from raytrain.core.errors import RequestError
from raytrain.tracking.address import artifacts_beside, sqlite_file, tracking_uri
from raytrain.tracking.experiment import MADE, NOTE, note
from raytrain.tracking.run_search import parent_of, search
from raytrain.tracking.schema import make_tables
from raytrain.tracking.views import EVERY, TAG

KEY = "raytrain.key"  # the tag by which a run is found again: the outbox and the handle

_SOURCE = {"mlflow.source.type": "JOB", "mlflow.source.name": "raytrain"}
_DEFAULTS = {  # each may be overridden from outside
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_REFUSALS = {  # a retry would not help; permissions and addresses may be put right
    "ALREADY_EXISTS",
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_FOUND",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
EXISTS = {"ALREADY_EXISTS", "RESOURCE_ALREADY_EXISTS"}
MISSING = {"INVALID_PARAMETER_VALUE", "NOT_FOUND", "RESOURCE_DOES_NOT_EXIST"}
LATE = 1.0  # seconds that an answer may take
_BUSY = 60.0  # seconds beyond MLflow's own 20, for a database that other processes write to
_METRICS, _PARAMS, _TAGS = 800, 100, 100  # in one call; MLflow takes 1000 things at most

T = TypeVar("T")


class Store:
    """One experiment of an MLflow store that has answered once.

    Raises:
        RequestError: if it does not answer, or does not make the experiment.
    """

    def __init__(self, uri: str | None, experiment: str) -> None:
        self.uri, self.experiment = tracking_uri(uri), experiment
        self.client: Any = connect(self.uri)
        with usable(self.uri):
            self.experiment_id = patiently(
                lambda: _experiment_id(self.client, self.uri, experiment)
            )

    def create(self, key: str, record: Mapping[str, Any], parent: str | None) -> str:
        """Make a run and return its id; `key` is its own."""
        began = time.monotonic()
        nesting = {"mlflow.parentRunId": parent} if parent else {}
        run = self.client.create_run(
            self.experiment_id,
            start_time=record["ms"],
            run_name=record["name"],
            tags={**_SOURCE, **record["tags"], **nesting, KEY: key},
        )
        # MLflow's client retries by itself when an answer is late, and may so have made two.
        late = time.monotonic() - began > LATE
        return (self.find(key) if late else None) or run.info.run_id

    def find(self, key: str) -> str | None:
        """The run that was made under `key`, if there is one; of several, all but one are deleted."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{key}'")
        first, *others = sorted(run.info.run_id for run in found) or [None]
        for run_id in others:
            self.client.delete_run(run_id)
        return first

    def batch(self, run_id: str, points: Iterable[Any]) -> None:
        """Log metrics, parameters and tags in as few calls as MLflow allows."""
        from mlflow.entities import Metric, Param

        metrics, params, tags = [], [], {}
        for point in points:
            if isinstance(point, Metric):
                metrics.append(point)
            elif isinstance(point, Param):
                params.append(point)
            else:
                tags[point.key] = point
        pieces = (
            _pieces(metrics, _METRICS),
            _pieces(params, _PARAMS),
            _pieces(list(tags.values()), _TAGS),
        )
        for some_metrics, some_params, some_tags in zip_longest(*pieces, fillvalue=()):
            self.client.log_batch(run_id, metrics=some_metrics, params=some_params, tags=some_tags)

    def running(self, parent: str) -> dict[str, str]:
        """Children of a run that are RUNNING: the id of each, and its tag `trial`, empty if it has none."""
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.mlflow.parentRunId = '{parent}' and attributes.status = 'RUNNING'",
            max_results=50_000,
        )
        return {run.info.run_id: run.data.tags.get("trial", "") for run in found}

    def missing(self, run_id: str) -> bool:
        """Whether the store reports that it has no such run; false if it does not answer."""
        return is_missing(self.client, run_id)

    def run_name(self, run_id: str) -> str | None:
        """The name of a run; None if there is none, or no answer."""
        try:
            return self.client.get_run(run_id).info.run_name
        except Exception:  # away, or no such run
            return None

    def is_trial(self, run_id: str) -> bool:
        """Whether a run is below that of a sweep; false without an answer."""
        try:
            return parent_of(self.client.get_run(run_id)) is not None
        except Exception:  # away, or no such run
            return False

    def names(self, beginning: str) -> set[str]:
        """Names of the experiment's runs that may begin so, `_` standing for any character; empty without
        an answer.
        """
        wanted = f"attributes.run_name LIKE '{beginning}%'"
        try:
            return {run.info.run_name for run in search(self.client, [self.experiment_id], wanted)}
        except Exception:  # away: what it has is not known
            return set()

    def last_step(self, run_id: str) -> int:
        """The last epoch that the store has a row of; 0 if there is none, or no answer."""
        try:
            points = self.client.get_metric_history(run_id, "cost/fe")
        except Exception:  # away: what it has is not known
            return 0
        return max((point.step for point in points), default=0)

    def refuses(self, error: Exception) -> bool:
        """Whether the store answers and `error` was about the record: it will not take it later either."""
        from mlflow.exceptions import MlflowException

        if isinstance(error, MlflowException) and error.error_code not in _REFUSALS:
            return False
        local = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError)
        if isinstance(error, OSError) and not local:  # as all errors of the network are
            return False
        try:
            self.client.get_experiment(self.experiment_id)
        except Exception:  # not this record: nothing can be read at all
            return False
        return True


def is_missing(client: Any, run_id: str) -> bool:
    """Whether a store reports that it has no such run; false if it does not answer."""
    try:
        return client.get_run(run_id).info.lifecycle_stage == "deleted"
    except Exception as error:
        return code_of(error) in MISSING


def fetch(uri: str | None, run_id: str, artifact: str, folder: Path) -> Path:
    """An artifact of a run, copied into `folder`.

    Raises:
        RequestError: if MLflow has no such run, or the run no such artifact, or it cannot be copied.
    """
    uri = tracking_uri(uri)
    said = f"{run_id}: MLflow at {uri} has no {artifact} of this run"
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        raise RequestError(f"{said} (there is no such database)")
    client = connect(uri)
    try:
        client.get_run(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, artifact, str(folder)))
    except Exception as error:  # each kind of store of artifacts has kinds of errors of its own
        if not _is_missing(error):
            said = f"{run_id}: {artifact} could not be copied from MLflow at {uri} to {folder}"
        raise RequestError(f"{said} ({first_line(error)})") from None


def reader(uri: str | None) -> Any:
    """A client of a store that is there, for reading only.

    Raises:
        RequestError: if it does not answer, or is a file that does not exist.
    """
    uri = tracking_uri(uri)
    check_exists(uri)
    return connect(uri)


def check_exists(uri: str) -> None:
    """Refuse a database that MLflow would have to make.

    Raises:
        RequestError: if `uri` is that of a file that does not exist.
    """
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        raise RequestError(f"{file}: no such MLflow database; `raytrain train` makes one")


def first_line(error: Exception) -> str:
    """The first line of an error, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def code_of(error: Exception) -> str:
    """MLflow's name of an error; empty for errors that are not MLflow's."""
    return str(getattr(error, "error_code", ""))


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns, which is repeated as long as other processes are in the way of it.

    Raises:
        MlflowException: as `call` does.
    """
    from mlflow.exceptions import MlflowException

    until = time.monotonic() + _BUSY
    while True:
        try:
            return call()
        except MlflowException as error:
            if not _is_in_the_way(error) or time.monotonic() > until:
                raise
        time.sleep(0.1)


def _is_in_the_way(error: Exception) -> bool:
    """Whether another process was writing to the database, the same thing perhaps, at this moment."""
    from sqlalchemy.exc import DBAPIError, IntegrityError

    cause: Any = error.__cause__
    if isinstance(cause, IntegrityError):
        return code_of(error) == "BAD_REQUEST"  # MLflow did not expect it
    number = getattr(cause.orig, "sqlite_errorcode", 0) if isinstance(cause, DBAPIError) else 0
    return number & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _is_missing(error: Exception) -> bool:
    """Whether an error means that there is no such run or artifact."""
    answer = getattr(error, "response", None)  # of a server of artifacts
    absent = code_of(error) in MISSING or getattr(answer, "status_code", 0) == 404
    return absent or isinstance(error, FileNotFoundError)


def _pieces(things: list[Any], size: int) -> Iterator[list[Any]]:
    return (things[first : first + size] for first in range(0, len(things), size))


def connect(uri: str) -> Any:
    """A client of `uri` that has answered once."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It prints a traceback whenever a database is locked; the writer retries and logs one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

    with usable(uri):
        if is_database(uri):
            make_tables(uri)
        client = patiently(lambda: MlflowClient(tracking_uri=uri))
        patiently(lambda: client.search_experiments(max_results=1))
    return client


@contextmanager
def usable(uri: str) -> Iterator[None]:
    """Say in one sentence why a store cannot be used."""
    try:
        yield
    except RequestError:
        raise
    except ImportError as error:
        raise RequestError(
            f"tracking_uri: {uri} needs a package that is not installed ({first_line(error)})"
        ) from None
    except Exception as error:
        # Of sqlalchemy, alembic, urllib3, MLflow or a driver, and the reason is theirs.
        what, wanted = "does not answer", "a running server"
        if is_database(uri):
            what = "cannot be used"
            wanted = "a database of MLflow, or a new file in a folder that can be written"
        reason = first_line(getattr(error, "orig", None) or error)
        raise RequestError(
            f"tracking_uri: MLflow at {uri} {what} ({reason}); expected {wanted}"
        ) from None


def is_database(uri: str) -> bool:
    from mlflow.store.db.db_types import DATABASE_ENGINES

    return uri.partition(":")[0].partition("+")[0] in DATABASE_ENGINES


def _experiment_id(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        made = _new_experiment(client, uri, name)
        if made is not None:
            return made
        found = client.get_experiment_by_name(name)
    check_not_deleted(name, found.lifecycle_stage)
    _renew_view(client, found)
    return found.experiment_id


def check_not_deleted(experiment: str, stage: str) -> None:
    """Refuse an experiment that was deleted: its name is still taken.

    Raises:
        RequestError: with what can be done.
    """
    if stage == "deleted":
        raise RequestError(
            f"experiment: {experiment!r} was deleted in MLflow; restore it or choose another name"
        )


def _renew_view(client: Any, experiment: Any) -> None:
    """The view of an experiment made here as it is made now; experiments made elsewhere have none."""
    key = TAG + EVERY
    if experiment.tags.get(key, MADE[key]) != MADE[key]:
        client.set_experiment_tag(experiment.experiment_id, key, MADE[key])


def _new_experiment(client: Any, uri: str, name: str) -> str | None:
    """The id of an experiment made now; None if another process has made it in the meantime."""
    from mlflow.exceptions import MlflowException

    file = sqlite_file(uri)
    try:
        made = client.create_experiment(name, file and artifacts_beside(file), tags=MADE)
    except MlflowException as error:
        if code_of(error) in EXISTS:
            return None
        if code_of(error) not in _REFUSALS:
            raise
        raise RequestError(
            f"experiment: MLflow at {uri} does not make {name!r} ({first_line(error)})"
        ) from None
    patiently(lambda: client.set_experiment_tag(made, NOTE, note(made)))
    return made


def finished_runs(
    uri: str | None, experiment: str
) -> list[tuple[dict[str, str], dict[str, float]]]:
    """Parameters and last metrics of the latest runs of an experiment that were trained to the end.

    Raises:
        RequestError: if there is no such experiment.
    """
    uri = tracking_uri(uri)
    client = connect(uri)
    with usable(uri):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise RequestError(f"search.earlier: MLflow at {uri} has no experiment {experiment!r}")
        runs = client.search_runs(
            [found.experiment_id], "attributes.status = 'FINISHED'", max_results=2000
        )
    return [(run.data.params, run.data.metrics) for run in runs if _whole(run.data.tags)]


def _whole(tags: Mapping[str, str]) -> bool:
    """Whether a finished run is one training: no sweep's own run, and no trial that was stopped early."""
    of_sweep = "sweep" in tags and "trial" not in tags
    return not of_sweep and tags.get("outcome") != "stopped"
