"""The cluster of `chaos.py`: a head, nodes that come and go, an S3 server behind a proxy, and MLflow's."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from chaos_network import FOLDER
from chaos_proxy import Proxy
from faults_stage import HEAD, Process, Stage, below, free_port, listens, until

_BUCKET = "chaos"
_REGION = "us-east-1"


class Cluster(Stage):
    """A head without CPUs, nodes of one CPU each with a working copy of its own, and a storage."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        super().__init__(folder, ray_folder)
        self._s3 = free_port()
        self.proxy = Proxy(self._s3)
        self.nodes: dict[int, Process] = {}
        self.steps = folder / "steps"
        self._ever = 0
        here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        before = [self._env["PYTHONPATH"]] if self._env.get("PYTHONPATH") else []
        self._env |= {
            "AWS_ACCESS_KEY_ID": "anything",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_EC2_METADATA_DISABLED": "true",
            "PYTHONPATH": os.pathsep.join([*here, *before]),
        }

    @property
    def storage(self) -> str:
        """Its URL, through the proxy."""
        at = f"127.0.0.1:{self.proxy.port}"
        return f"s3://{_BUCKET}/runs?endpoint_override={at}&scheme=http&region={_REGION}"

    def start(self) -> None:
        self.start_server()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._s3)]
        self._begin(command, "s3")
        self.head = self._ray(*HEAD, f"--port={self._address.rpartition(':')[2]}", cpus=0)
        until(lambda: listens(self._address), 60, "the head of the cluster listens")
        for _ in range(3):
            self.add_node()
        until(lambda: listens(f"127.0.0.1:{self._s3}"), 60, "the S3 server listens")
        self._client().create_bucket(Bucket=_BUCKET)
        until(self.answers, 120, "MLflow answers")

    def clear_steps(self) -> None:
        """Forget what networks have recorded."""
        shutil.rmtree(self.steps, ignore_errors=True)
        self.steps.mkdir()

    def add_node(self) -> None:
        """One more node, new on this machine."""
        self._ever += 1
        name = f"node-{self._ever}"
        place = self._ray_folder / name
        cache = self.folder / name
        self.steps.mkdir(exist_ok=True)
        env = {"RAYTRAIN_CACHE": str(cache), FOLDER: str(self.steps)}
        words = (f"--address={self._address}", f"--temp-dir={place}")
        self.nodes[self._ever] = self._ray(*words, cpus=1, **env)

    def lose_node(self, number: int) -> None:
        """SIGKILL every process of a node at once, and delete its disk."""
        process = self.nodes.pop(number)
        for pid in [*below(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(self.folder / f"node-{number}", ignore_errors=True)

    def node_of(self, pid: int) -> int | None:
        """The node that a process is on; None for one of the head or the driver."""
        for number, process in self.nodes.items():
            if pid in below(process):
                return number
        return None

    def at_work(self, since: float) -> list[int]:
        """The nodes on which a network has recorded a pass in the last seconds."""
        recent = time.time() - since
        files = [file for file in self.steps.iterdir() if file.stat().st_mtime >= recent]
        nodes = [self.node_of(int(file.name.partition(".")[2])) for file in files]
        return sorted({node for node in nodes if node is not None})

    def sender(self, port: int) -> int | None:
        """The node of the process that a connection to the proxy comes from."""
        inode = _inode(port)
        for number, process in self.nodes.items():
            if any(_has(pid, inode) for pid in below(process)):
                return number
        return None

    def file(self, path: str) -> bytes:
        """A file of the storage, past the proxy."""
        return self._client().get_object(Bucket=_BUCKET, Key=f"runs/{path}")["Body"].read()

    def _client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self._s3}",
            region_name=_REGION,
            aws_access_key_id="anything",
            aws_secret_access_key="anything",
        )


def _inode(port: int) -> str:
    """The socket of the process that has this local port."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if int(words[1].rpartition(":")[2], 16) == port:
            return words[9]
    return ""


def _has(pid: int, inode: str) -> bool:
    with contextlib.suppress(OSError):
        return any(
            os.readlink(file) == f"socket:[{inode}]" for file in Path(f"/proc/{pid}/fd").iterdir()
        )
    return False


@contextmanager
def cluster(keep: bool = False) -> Iterator[Cluster]:
    """A cluster in temporary folders; `keep` leaves them there, to look into."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    ray_folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))  # short, for the paths of sockets
    made = Cluster(folder, ray_folder)
    try:
        made.start()
        yield made
    finally:
        made.close()
        made.proxy.close()
        shutil.rmtree(ray_folder, ignore_errors=True)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
