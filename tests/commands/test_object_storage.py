"""Training with its checkpoints in an S3 bucket, continued on another machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSelector, S3FileSystem

import raytrain
from raytrain.commands.train import preview
from raytrain.core import file_systems
from raytrain.core.errors import RequestError
from raytrain.core.file_systems import file_system
from raytrain.core.storage import CACHE, local_root, pull
from raytrain.training.checkpoint import load

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.slow,
]

RUN: dict[str, Any] = {
    "data": {"name": "digits", "train_size": 128},
    "algorithm": {"name": "pgd", "steps": 1},
    "batch_size": 64,
    "evaluation": {"steps": 1},
    "device": "cpu",
    "registry": False,
    "epochs": 4,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    """An S3 server, which has its port and its buckets again if it is stopped and started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    moto.start()
    yield moto
    stop(moto)


def stop(server: ThreadedMotoServer) -> None:
    """Stop it so that connections to it are refused."""
    made = server._server
    assert made is not None
    server.stop()
    made.server_close()


@pytest.fixture
def bucket(server: ThreadedMotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a folder in a bucket of its own."""
    where = "{}:{}".format(*server.get_host_and_port())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv(CACHE, str(tmp_path / "first"))
    name = "b" + tmp_path.name.replace("_", "-").lower()[:40]
    fs = S3FileSystem(
        endpoint_override=where, scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    fs.create_dir(name)
    return f"s3://{name}/runs?endpoint_override={where}&scheme=http&region=us-east-1"


def weights(url: str, run_id: str) -> dict[str, torch.Tensor]:
    return load(local_root(url) / "raytrain" / run_id / "last.pt").content["model"]


def test_a_training_goes_on_from_the_bucket_alone_bit_by_bit(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def watch(run: Any, row: Any) -> None:
        if row.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        raytrain.train(RUN, {"storage": bucket}, watch=watch)
    run_id = next((tmp_path / "first").glob("*/raytrain/*/last.pt")).parent.name
    monkeypatch.setenv(CACHE, str(tmp_path / "second"))
    resumed = raytrain.train(None, {"storage": bucket}, resume=run_id)
    assert resumed.run_id == run_id and "s3://" in dict(resumed.summary()[1])["checkpoints"]
    whole = raytrain.train(RUN, {"storage": str(tmp_path / "plain")})
    expected = load(whole.checkpoints / "last.pt").content["model"]
    monkeypatch.setenv(CACHE, str(tmp_path / "third"))
    raytrain.evaluate(run_id, {"attacks": "fgsm", "images": 8}, storage=bucket, which="last")
    found = weights(bucket, run_id)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_bucket_that_is_not_there_is_refused_before_anything_begins(
    bucket: str, tmp_path: Path
) -> None:
    wrong = bucket.replace("s3://b", "s3://c", 1)
    with pytest.raises(RequestError, match="storage: s3://c.*cannot be written"):
        raytrain.train(RUN, {"storage": wrong})
    with pytest.raises(RequestError, match="storage: s3://c.*cannot be read .no bucket"):
        preview(RUN, {"storage": wrong})
    assert not (tmp_path / "mlflow.db").exists()


def test_a_storage_that_is_away_for_some_epochs_has_the_whole_run_in_the_end(
    bucket: str,
    server: ThreadedMotoServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(file_systems.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(file_systems, "_TRIES", 3)

    def watch(run: Any, row: Any) -> None:
        if row.epoch == 1:
            stop(server)
        if row.epoch == 3:
            server.start()

    run_id = raytrain.train(RUN, {"storage": bucket}, watch=watch).run_id
    said = capsys.readouterr().err
    assert "does not answer" in said and "training goes on, with a copy here" in said
    monkeypatch.setenv(CACHE, str(tmp_path / "second"))
    pull(local_root(bucket))
    found = weights(bucket, run_id)
    whole = raytrain.train(RUN, {"storage": str(tmp_path / "plain")})
    expected = load(whole.checkpoints / "last.pt").content["model"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_dry_run_leaves_the_bucket_as_it_was(bucket: str) -> None:
    preview(RUN, {"storage": bucket})
    fs, base = file_system(bucket)
    assert fs.get_file_info(FileSelector(base.partition("/")[0], recursive=True)) == []
