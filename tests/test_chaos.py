"""The parts of `chaos.py`: what counts steps, what plans faults, and the proxy that makes a storage fail."""

from __future__ import annotations

import importlib
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection, RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
chaos: Any = importlib.import_module("chaos")  # scripts, no package
chaos_audit: Any = importlib.import_module("chaos_audit")
chaos_network: Any = importlib.import_module("chaos_network")
chaos_proxy: Any = importlib.import_module("chaos_proxy")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]


class Files(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def proxy() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = chaos_proxy.Proxy(server.server_port)
    yield made
    made.close()
    server.shutdown()
    server.server_close()


def put(proxy: Any, path: str = "/bucket/file", size: int = 10_000) -> int:
    connection = HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    try:
        connection.request("PUT", path, b"x" * size)
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_storage_fails_as_it_is_told_to_and_is_well_again(proxy: Any) -> None:
    assert put(proxy) == 200
    for failure in ("refused", "reset"):
        proxy.fail(failure)
        with pytest.raises((ConnectionError, RemoteDisconnected)):
            put(proxy)
        proxy.heal()
        assert put(proxy) == 200
    proxy.fail("503")
    assert put(proxy, size=10) == 503
    proxy.heal()
    assert put(proxy) == 200


def test_a_transfer_is_held_by_its_name_until_it_is_let_go(proxy: Any) -> None:
    trap = proxy.trap = chaos_proxy.Trap(r"/last\.pt(\?|$)")
    assert put(proxy, "/bucket/last.pt.previous") == 200 and trap.port is None
    answers: list[int] = []
    sender = threading.Thread(target=lambda: answers.append(put(proxy, "/bucket/last.pt")))
    sender.start()
    sender.join(0.2)
    assert sender.is_alive() and not answers
    trap.over.set()
    sender.join()
    assert answers == [200] and trap.port is not None


def test_a_step_that_is_taken_again_is_known_by_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(chaos_network.FOLDER, str(tmp_path))
    monkeypatch.setattr(chaos_network, "_SECONDS", 0.0)
    network, steps = chaos_network.Recording(10), torch.rand(5, 4, 1, 8, 8)
    for pid, taken in ((1, (0, 1, 2)), (2, (1, 2, 3)), (3, (4,))):
        monkeypatch.setattr(chaos_network.os, "getpid", lambda pid=pid: pid)
        for step in taken:
            network.train()(steps[step])
            network.eval()(steps[step])
    processes = chaos_network.passes(tmp_path)
    assert [len(process) for process in processes] == [3, 3, 1]
    assert [count for _, count in chaos_audit.repeated(processes)] == [2, 0]
    assert chaos_network.images(tmp_path) == 7 * 4


def test_a_pause_is_the_longest_one_that_touches_the_time_after_a_fault() -> None:
    times = [0.0, 5.0, 6.0, 9.0, 10.0]
    assert chaos_audit.longest_pause(times, 5.5, 8.0) == 3.0
    assert chaos_audit.longest_pause(times, 4.0, 5.5) == 5.0
    assert chaos_audit.longest_pause(times, 11.0, 12.0) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_of_fault_comes_equally_often(seed: int) -> None:
    planned = chaos.plan(8, 2, 2, random.Random(seed))
    assert Counter(subject for subject, _ in planned) == {"train": 8, "elastic": 2, "sweep": 2}
    assert Counter(kind for _, kinds in planned for kind in kinds) == dict.fromkeys(chaos.KINDS, 6)
