"""The processes of `faults.py`: MLflow's server, Ray nodes and a driver, started and killed at will.

All on loopback, on ports and in folders of their own; Linux only, since processes are found in /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Process = subprocess.Popen[bytes]

_NODE = ("--min-worker-port=0", "--max-worker-port=0", "--block")
HEAD = ("--head", "--include-dashboard=false", "--disable-usage-stats")
_SLOT = ("ray::SingleSlot", "ray::ResourceTrainable")  # idle, and at work
_HEALTH = {  # a lost node is found lost in seconds, where Ray's own patience is half a minute
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


class Stage:
    """Everything that a sweep needs, and the means to take it away."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.folder, self._ray_folder = folder, ray_folder
        self.mlflow_uri = f"http://127.0.0.1:{free_port()}"
        self._address = f"127.0.0.1:{free_port()}"
        self._env = _environment(ray_folder, self.mlflow_uri)
        self._all: list[Process] = []
        self.launches = 0
        self.server: Process | None = None
        self.head: Process | None = None
        self.node: Process | None = None
        self.driver: Process | None = None

    def start(self) -> None:
        """Everything but the driver."""
        self.start_server()
        self.head = self._ray(*HEAD, f"--port={self._address.rpartition(':')[2]}")
        until(lambda: listens(self._address), 60, "the head of the cluster listens")
        self.start_node()
        until(self.answers, 120, "MLflow answers")

    # ---------------------------------------------------------------- MLflow

    def start_server(self) -> None:
        """The server, as a process group of its own."""
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        port = self.mlflow_uri.rpartition(":")[2]
        self.server = self._begin(
            [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}"]
            + [f"--backend-store-uri={store}", "--workers=1"]
            + [f"--artifacts-destination={self.folder / 'artifacts'}"],
            "server",
        )

    def signal_server(self, number: signal.Signals) -> None:
        """SIGKILL, SIGSTOP or SIGCONT to all its processes."""
        assert self.server is not None
        os.killpg(self.server.pid, number)
        if number == signal.SIGKILL:
            self.server.wait()

    def answers(self) -> bool:
        """Whether MLflow does, within a second."""
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.mlflow_uri}/health", timeout=1).status == 200
        return False

    # ---------------------------------------------------------------- Ray

    def start_node(self) -> None:
        """The node that can be lost; the other one is the head."""
        self.node = self._ray(f"--address={self._address}")

    def node_killed(self) -> bool:
        """SIGKILL the raylet of the node; its workers find out by themselves. False if it is not there."""
        raylets = [pid for pid in below(self.node) if "/raylet/raylet" in command_of(pid)]
        for pid in raylets:
            os.kill(pid, signal.SIGKILL)
        return bool(raylets)

    def slots(self) -> list[int]:
        """The processes in which trials run."""
        found = [*below(self.head), *below(self.node)]
        return sorted(pid for pid in found if command_of(pid).startswith(_SLOT))

    def _ray(self, *words: str, cpus: int = 1, **env: str) -> Process:
        ray = str(Path(sys.executable).with_name("ray"))
        head = "--head" in words
        where = [f"--temp-dir={self._ray_folder}", "--node-ip-address=127.0.0.1"] if head else []
        command = [ray, "start", *words, *where, f"--num-cpus={cpus}", *_NODE]
        return self._begin(command, "ray", **env)

    # ---------------------------------------------------------------- the driver

    def launch(self, *words: str, **env: str) -> None:
        """A command of raytrain's on that cluster."""
        self.launches += 1
        command = [
            sys.executable,
            "-c",
            "from raytrain.cli.app import main; main()",
            *words,
        ]
        env = {"RAY_ADDRESS": self._address, **env}
        self.driver = self._begin(command, f"driver-{self.launches}", **env)

    def kill_driver(self) -> None:
        """As a machine that loses its power would."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()

    def said(self) -> str:
        """What the last launch wrote."""
        return (self.folder / f"driver-{self.launches}.log").read_text()

    # ---------------------------------------------------------------- within

    def _begin(self, command: list[str], name: str, **env: str) -> Process:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self._env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._all.append(process)
        return process

    def close(self) -> None:
        """End whatever was started here."""
        left = [pid for process in self._all for pid in [process.pid, *below(process)]]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._all:
            process.wait()


@contextmanager
def stage(keep: bool = False) -> Iterator[Stage]:
    """A stage in temporary folders; `keep` leaves them there, to look into."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    # Ray's own: the path of a socket may have 107 characters.
    ray_folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    made = Stage(folder, ray_folder)
    try:
        made.start()
        yield made
    finally:
        made.close()
        shutil.rmtree(ray_folder, ignore_errors=True)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _environment(ray_folder: Path, mlflow_uri: str) -> dict[str, str]:
    """For all processes: a token of their own, one thread each, and no proxy in between."""
    token = ray_folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    outside = ("PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS", "RAY_TMPDIR")
    env = {name: value for name, value in os.environ.items() if name not in outside}
    if "PYTHONDONTWRITEBYTECODE" in os.environ:  # or every process compiles all of torch anew
        env["PYTHONPYCACHEPREFIX"] = str(ray_folder / "compiled")
    return {
        **env,
        **_HEALTH,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",  # so that a stopped server is given up while stopped
        "OMP_NUM_THREADS": "1",
        "no_proxy": "127.0.0.1",
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def until(done: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s until {what}")
        time.sleep(0.2)


def below(process: Process | None) -> list[int]:
    """The descendants of a process."""
    if process is None:
        return []
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            # The name, in parentheses, may hold anything; the parent is the second word after it.
            after = (entry / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(after[1]), []).append(int(entry.name))
    found, todo = [], [process.pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def command_of(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return ""


def result_of(said: str) -> dict[str, object]:
    """The JSON object that a command printed last."""
    return json.loads(said.splitlines()[-1])
