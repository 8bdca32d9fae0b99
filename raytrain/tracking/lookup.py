"""Read one run from MLflow; read-only."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from raytrain.core.console import log_line
from raytrain.core.errors import RequestError
from raytrain.tracking.address import sqlite_file, tracking_uri
from raytrain.tracking.stores import first_line, reader


@dataclass(frozen=True)
class Seen:
    """Tags and last metrics of a run; its text artifacts by path."""

    tags: dict[str, str]
    metrics: dict[str, float]
    texts: dict[str, str]


def look_up(uri: str | None, run_id: str, folder: str, file: str) -> Seen | None:
    """A run with its artifacts `folder/*/file`; None if the store has no such run or is out of reach."""
    try:
        uri = tracking_uri(uri)
        database = sqlite_file(uri)
        if database is not None and not database.is_file():
            return None  # a query would create it
        return _seen(uri, run_id, folder, file)
    except RequestError as error:
        log_line(f"raytrain: {error}; going on without it")
    except Exception as error:  # no such run, or an artifact that went away: each store its own
        log_line(f"raytrain: MLflow at {uri} does not return run {run_id} ({first_line(error)})")
    return None


def _seen(uri: str, run_id: str, folder: str, file: str) -> Seen:
    client = reader(uri)
    run = client.get_run(run_id)
    texts = {}
    with tempfile.TemporaryDirectory() as scratch:
        for entry in client.list_artifacts(run_id, folder):
            wanted = f"{entry.path}/{file}"
            if entry.is_dir and wanted in {
                a.path for a in client.list_artifacts(run_id, entry.path)
            }:
                texts[wanted] = Path(
                    client.download_artifacts(run_id, wanted, scratch)
                ).read_text()
    return Seen(dict(run.data.tags), dict(run.data.metrics), texts)
