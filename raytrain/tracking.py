"""MLflow, written by one thread of the driver so that training never waits for it.

A sweep is a parent run and its trials are the children; a single training is a run of its own.
Workers never import mlflow.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raytrain.say import say
from raytrain.types import RequestError

Status = Literal["FINISHED", "FAILED", "KILLED"]

_BATCH_SECONDS = 0.5  # rows are collected this long before they are written
_RETRY_SECONDS = 5.0
_SOURCE = {"mlflow.source.type": "JOB", "mlflow.source.name": "raytrain"}
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the view the UI opens
_DEFAULTS = {  # each may be overridden from outside
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(wanted: str | None) -> str:
    """The store in use: the configured one, else $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db, absolute."""
    uri = wanted or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        # A relative file would be another one in every process that runs elsewhere.
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


@dataclass(frozen=True)
class _Row:
    run_id: str
    metrics: Mapping[str, float]
    step: int
    milliseconds: int


@dataclass(frozen=True)
class _Tags:
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class _End:
    run_id: str
    status: Status


_Record = _Row | _Tags | _End


class Tracker:
    """One MLflow experiment, held open by the driver of a training or a sweep.

    Raises:
        RequestError: if the store does not answer when it is opened.
    """

    def __init__(self, uri: str | None, experiment: str) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        self.uri = tracking_uri(uri)
        self.experiment = experiment
        self._client = _connect(self.uri)
        self.experiment_id = _experiment_id(self._client, self.uri, experiment)
        self._pending: list[_Record] = []
        self._changed = threading.Condition()
        self._writing = self._hurry = self._stopping = self._complained = False
        self._open: dict[str, None] = {}
        self._thread = threading.Thread(target=self._write_for_ever, name="mlflow", daemon=True)
        self._thread.start()

    def open(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> str:
        """Begin a run and return its id; it stays RUNNING until `close`."""
        from mlflow.entities import Param

        nesting = {} if parent is None else {"mlflow.parentRunId": parent}
        run = self._client.create_run(
            self.experiment_id,
            run_name=name,
            tags={**_SOURCE, **tags, **nesting},
        )
        run_id = run.info.run_id
        self._open[run_id] = None
        logged = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for first in range(0, len(logged), 100):
            self._client.log_batch(run_id, params=logged[first : first + 100])
        return run_id

    def knows(self, run_id: str) -> bool:
        """Whether the store has this run."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(run_id)
        except MlflowException:
            return False
        return True

    def reopen(self, run_id: str) -> int:
        """Continue a run of an earlier launch; returns the last epoch it has a row of (0: none).

        Raises:
            RequestError: if the store does not have it.
        """
        self.flush()
        if not self.knows(run_id):
            raise RequestError(f"{run_id}: MLflow at {self.uri} has no such run to continue")
        self._client.update_run(run_id, status="RUNNING")
        self._open[run_id] = None
        return max(
            (point.step for point in self._client.get_metric_history(run_id, "cost/fe")), default=0
        )

    def unfinished(self, parent: str) -> list[str]:
        """Children of a run that are still RUNNING, such as those of a driver that died."""
        self.flush()
        found = self._client.search_runs(
            [self.experiment_id],
            f"tags.mlflow.parentRunId = '{parent}' and attributes.status = 'RUNNING'",
            max_results=50_000,
        )
        return [run.info.run_id for run in found]

    def log(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Queue a row of metrics; returns at once."""
        self._put(_Row(run_id, metrics, step, int(time.time() * 1000)))

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Queue tags; returns at once."""
        self._put(_Tags(run_id, tags))

    def text(self, run_id: str, text: str, file: str) -> None:
        """A text artifact."""
        self._client.log_text(run_id, text, file)

    def artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """A file, or the contents of a folder, as an artifact."""
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), folder)
        else:
            self._client.log_artifact(run_id, str(path), folder)

    def model(self, run_id: str, model: Any, example: Any) -> None:
        """The network in MLflow's PyTorch flavour, exported as a graph that loads without pickles.

        `example` is a numpy batch of at least two images; other batch sizes work too.
        """
        import mlflow
        from mlflow import pytorch
        from mlflow.models import infer_signature

        noisy = [logging.getLogger(name) for name in ("mlflow", "torch.export", "torch._dynamo")]
        levels = [logger.level for logger in noisy]
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(self.uri)
        try:
            with mlflow.start_run(run_id, nested=True):
                pytorch.log_model(
                    model.cpu().eval(),
                    name="model",
                    input_example=example,
                    signature=infer_signature(example, example[:, 0, 0, :1]),
                    pip_requirements=["torch", "numpy"],
                )
        finally:
            mlflow.set_tracking_uri(before)
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)

    def close(self, run_id: str, status: Status) -> None:
        """Queue the end of a run, after all its rows; returns at once."""
        self._open.pop(run_id, None)
        self._put(_End(run_id, status))

    def flush(self, seconds: float = 60.0) -> bool:
        """Wait until everything queued is in the store; False, and a word on stderr, if it is not."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._pending and not self._writing, seconds)
            self._hurry = False
        if not done:
            self._complain(f"{len(self._pending)} records could not be written", again=True)
        return done

    def shut(self, status: Status) -> None:
        """End what is still open with `status`, write everything and stop the thread."""
        for run_id in list(self._open):
            self.close(run_id, status)
        self.flush()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=20)

    def _put(self, record: _Record) -> None:
        with self._changed:
            self._pending.append(record)
            self._changed.notify_all()

    def _write_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._stopping)
                if self._stopping:
                    return
                self._changed.wait_for(lambda: self._hurry or self._stopping, _BATCH_SECONDS)
                taken, self._pending, self._writing = self._pending, [], True
            refused = self._write(taken)
            with self._changed:
                self._pending = refused + self._pending
                self._writing = False
                self._changed.notify_all()
                if refused:  # the store is away: wait before trying again
                    self._changed.wait_for(lambda: self._stopping, _RETRY_SECONDS)

    def _write(self, records: list[_Record]) -> list[_Record]:
        """Write what can be written, run by run and in order; returns the rest."""
        by_run: dict[str, list[_Record]] = {}
        for record in records:
            by_run.setdefault(record.run_id, []).append(record)
        refused: list[_Record] = []
        for run_id, mine in by_run.items():
            try:
                self._write_run(run_id, mine)
            except Exception as error:  # the edge: kept, and tried again with the next batch
                self._complain(str(error))
                refused += mine
        return refused

    def _write_run(self, run_id: str, records: list[_Record]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(name, float(value), row.milliseconds, row.step)
            for row in records
            if isinstance(row, _Row)
            for name, value in row.metrics.items()
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(run_id, metrics=metrics[first : first + 1000])
        tags = {k: v for row in records if isinstance(row, _Tags) for k, v in row.tags.items()}
        if tags:
            self._client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])
        for record in records:
            if isinstance(record, _End):
                self._client.set_terminated(run_id, record.status)

    def _complain(self, problem: str, again: bool = False) -> None:
        if self._complained and not again:
            return
        self._complained = True
        first = problem.splitlines()[0] if problem else "no answer"
        say(f"raytrain: MLflow at {self.uri}: {first[:200]}")


@contextmanager
def tracked(uri: str | None, experiment: str) -> Iterator[Tracker]:
    """A tracker for the time of a command: whatever is still open ends as the command does.

    Raises:
        RequestError: if the store does not answer.
    """
    tracker = Tracker(uri, experiment)
    status: Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.shut(status)


def fetch(uri: str | None, run_id: str, artifact: str, folder: Path) -> Path:
    """An artifact of a run, copied into `folder`.

    Raises:
        RequestError: if MLflow has no such run, or the run no such artifact.
    """
    uri = tracking_uri(uri)
    client = _connect(uri)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return Path(client.download_artifacts(run_id, artifact, str(folder)))
    except Exception as error:
        # A missing run and a missing file come as different kinds from different stores.
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"{run_id}: MLflow at {uri} has no {artifact} of this run ({problem[:200]})"
        ) from None


def _connect(uri: str) -> Any:
    """A client of `uri` that has answered once."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)

    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        # sqlalchemy, urllib3, MLflow's own: all mean the same to the user.
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"tracking_uri: MLflow at {uri} does not answer ({problem[:200]}); expected a running "
            "server or a file that can be written"
        ) from None
    return client


def _experiment_id(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise RequestError(
            f"experiment: {name!r} was deleted in MLflow; restore it or choose another name"
        )
    if found is not None:
        return found.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        # Beside the database, wherever the command was started.
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlruns").as_uri()
    try:
        return client.create_experiment(name, location, tags=_EXPERIMENT_TAGS)
    except MlflowException:  # another process was faster
        return client.get_experiment_by_name(name).experiment_id
