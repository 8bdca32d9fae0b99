"""The server of the MLflow UI as a process: when it is ready, and that nothing is left of it."""

from __future__ import annotations

import os
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from raytrain.core.errors import RequestError
from raytrain.tracking import ui

SERVER = """
import http.server, os, subprocess, sys, time
port, file = int(sys.argv[1]), sys.argv[2]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(file, "w") as ids:
    ids.write(f"{os.getpid()} {child.pid}")

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ui.HOST, 0))
        return probe.getsockname()[1]


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and is not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_answers_once_it_is_given_and_is_gone_with_its_workers_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port, file = free_port(), tmp_path / "ids"
    words = [sys.executable, "-c", SERVER, str(port), str(file)]
    pids: list[int] = []
    monkeypatch.setattr(ui, "ui_server", lambda *_: (words, dict(os.environ)))
    with pytest.raises(KeyboardInterrupt), ui.serving("uri", port):
        with urllib.request.urlopen(f"http://{ui.HOST}:{port}/health") as answer:
            assert answer.status == 200
        with pytest.raises(RequestError, match=rf"^--port: {port} is in use .* such as \d+$"):
            ui.check_port(port)
        pids += [int(pid) for pid in file.read_text().split()]
        assert len(pids) == 2 and all(map(is_alive, pids))
        raise KeyboardInterrupt
    until = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))
    ui.check_port(port)


def test_a_server_that_ends_at_once_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(ui, "ui_server", lambda *_: (words, dict(os.environ)))
    with pytest.raises(RuntimeError, match="exit status 3"), ui.serving("uri", free_port()):
        raise AssertionError
