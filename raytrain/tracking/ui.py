"""The MLflow UI as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from raytrain.core.errors import RequestError
from raytrain.tracking.address import artifacts_beside, sqlite_file
from raytrain.tracking.stores import reader

HOST = "127.0.0.1"

_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "PYTHONWARNINGS": "ignore",  # of MLflow about its own libraries
}
_PATIENCE = 180.0  # seconds until the server answers
_GRACE = 10.0  # seconds for it to end


def ui_server(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of a server on loopback, for a database that is ready for it.

    Raises:
        RequestError: if the store is a file that does not exist, or cannot be used.
    """
    reader(uri)  # a server makes tables that are missing without a lock
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    words += ["--host", HOST, "--port", str(port), "--workers", "1"]
    words += ["--uvicorn-opts", "--log-level warning --no-access-log"]
    file = sqlite_file(uri)
    if file is not None:
        words += ["--default-artifact-root", artifacts_beside(file)]
    return words, {**_SETTINGS, **os.environ}


def check_port(port: int) -> None:
    """Refuse a port that another process listens on.

    Raises:
        RequestError: naming a free one.
    """
    if not _is_free(port):
        others = (*range(port + 1, min(port + 100, 65536)), 0)
        free = next(other for other in others if other == 0 or _is_free(other))
        instead = f"another one, such as {free}" if free else "another one"
        raise RequestError(f"--port: {port} is in use on {HOST}; expected {instead}")


@contextmanager
def serving(uri: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers at `http://127.0.0.1:port`, until the end of the block.

    Raises:
        RequestError: if the port is in use, or the store cannot be used.
        RuntimeError: if the server ended, or does not answer.
    """
    check_port(port)
    words, settings = ui_server(uri, port)
    server = subprocess.Popen(words, env=settings, start_new_session=True)
    try:
        _wait_until_it_answers(server, port)
        yield server
    finally:
        _end(server)


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"the MLflow server ended with exit status {server.returncode}")
        try:
            with direct.open(f"http://{HOST}:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the MLflow server does not answer at http://{HOST}:{port}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which are the processes of its group."""
    until = time.monotonic() + _GRACE
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        while time.monotonic() < until:
            server.poll()
            os.killpg(server.pid, 0)  # fails once there is none left
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
