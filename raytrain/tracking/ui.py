"""The MLflow UI as a process of its own."""

from __future__ import annotations

import os
import sys

from raytrain.tracking.address import artifacts_beside, sqlite_file
from raytrain.tracking.stores import reader

_SETTINGS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "GIT_PYTHON_REFRESH": "quiet"}


def ui_server(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of a server on loopback, for a database that is ready for it.

    Raises:
        RequestError: if the store is a file that does not exist, or cannot be used.
    """
    reader(uri)  # a server makes tables that are missing without a lock
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    file = sqlite_file(uri)
    if file is not None:
        words += ["--default-artifact-root", artifacts_beside(file)]
    return words, {**_SETTINGS, **os.environ}
