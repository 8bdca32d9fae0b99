"""How Ray is started or joined, without starting it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.request import as_run
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.distributed.ray_session import (
    check_fits,
    concurrent_trials,
    session,
    socket_folder,
)


def test_a_folder_that_is_too_long_for_sockets_is_replaced_by_a_short_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/short")
    assert socket_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "long/" * 17)
    folder = socket_folder()
    assert folder is not None and len(folder) < 30 and Path(folder).parent.is_dir()


def test_a_start_that_takes_too_long_is_tried_again_and_then_explained(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    def slow(**settings: Any) -> None:
        calls.append(settings)
        if len(calls) < failures + 1:
            raise Exception("The current node timed out during startup. This could happen.")

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failures = 2
    with session(as_run(None)):
        assert len(calls) == 3
    assert capsys.readouterr().err.count("trying again") == 2
    calls.clear()
    failures = 3
    with (
        pytest.raises(TrainingFailed, match="^Ray did not start .* 3 tries .*timed out"),
        session(as_run(None)),
    ):
        pass
    assert len(calls) == 3


# --- which cluster, without starting one ------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray would have been started with."""
    import ray

    made: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda *_, **settings: made.append(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return made


def test_without_an_address_a_cluster_is_started_even_where_another_is_running(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with session(as_run(None, ["workers=2"]), trials=3):
        pass
    (settings,) = calls
    # Without an address Ray joins whatever `ray start` has left on this machine, and then refuses
    # to be told how many cores there are.
    assert settings["address"] == "local"
    assert settings["num_cpus"] >= 6


def test_with_an_address_that_cluster_is_joined(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with session(as_run(None)):
        pass
    assert calls[0]["address"] == "10.0.0.1:6379"
    assert "num_cpus" not in calls[0]


def test_an_address_where_nobody_answers_is_refused(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def nobody(**settings: Any) -> None:
        raise ConnectionError(f"no answer at {settings['address']}\nmore")

    monkeypatch.setattr(ray, "init", nobody)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with (
        pytest.raises(RequestError, match=r"^RAY_ADDRESS: .*10\.0\.0\.1:6379") as caught,
        session(as_run(None)),
    ):
        pass
    assert "\n" not in str(caught.value) and calls == []


@pytest.mark.parametrize(
    ("words", "have", "wanted", "fit"),
    [
        ("workers=1", {"CPU": 4}, None, 4),
        ("workers=1", {"CPU": 4}, 3, 3),
        ("workers=2", {"CPU": 5}, None, 2),
        ("workers=2 cpus_per_worker=2", {"CPU": 5}, None, 1),
        ("workers=1", {"CPU": 16, "GPU": 2}, None, 2),
        ("workers=1 gpus_per_worker=0.25", {"CPU": 16, "GPU": 2}, None, 8),
        ("workers=1 device=cpu", {"CPU": 16, "GPU": 2}, None, 16),
        ("workers=3 batch_size=96", {"CPU": 2}, None, 0),
        ("workers=1 device=cuda", {"CPU": 2}, None, 0),
    ],
)
def test_trials_are_as_many_as_fit_the_cluster_and_none_is_refused(
    words: str,
    have: dict[str, float],
    wanted: int | None,
    fit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    run = as_run(None, words.split())
    if fit:
        assert concurrent_trials(run, wanted) == fit
        return
    with pytest.raises(RequestError, match=rf"^workers: {run.workers} workers of .* room for"):
        concurrent_trials(run, wanted)


def test_steps_that_need_a_gpu_are_refused_on_a_cluster_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    run = as_run({"performance": "graph"})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4, "GPU": 2})
    assert concurrent_trials(run, None) == 2
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4})
    with pytest.raises(RequestError, match="performance.mode: graph needs a GPU"):
        concurrent_trials(run, None)


@pytest.mark.parametrize(
    ("words", "gpus", "device"),
    [
        ("workers=2", 0, "cpu"),
        ("workers=2", 2, "cuda"),
        ("workers=2 device=cpu", 1, "cpu"),
        ("workers=8 cpus_per_worker=999", 0, "cpu"),  # a local cluster counts workers
        ("workers=4 gpus_per_worker=0.25", 1, "cuda"),
        ("workers=2", 1, None),
        ("workers=2 device=cuda", 0, None),
    ],
)
def test_whether_workers_fit_is_known_before_ray_is_started(
    words: str, gpus: int, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    import torch

    def started(**_: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    run = as_run(None, words.split())
    if device is not None:
        assert check_fits(run) == device
        return
    with pytest.raises(RequestError, match=f"^workers: 2 workers .* room for {gpus}$"):
        check_fits(run)


def test_a_named_cluster_is_asked_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    joined: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "init", lambda address, **_: joined.append(address))
    monkeypatch.setattr(ray, "shutdown", lambda: joined.append("left"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    assert check_fits(as_run(None, ["workers=2"])) == "cuda"
    with pytest.raises(RequestError, match="^workers: 4 workers .* room for 2"):
        check_fits(as_run(None, ["workers=4"]))
    assert joined == ["10.0.0.1:6379", "left"] * 2


def test_a_session_within_another_uses_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    calls: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: calls[-1:] == ["init"])
    monkeypatch.setattr(ray, "init", lambda **_: calls.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    with session(as_run(None)):
        with session(as_run(None)):
            pass
        assert calls == ["init"]
    assert calls == ["init", "shutdown"]


@pytest.mark.ray
def test_a_session_also_where_ray_was_imported_first_and_images_decoded_by_it(
    ray_folder: str,
) -> None:
    """The session has the token; requests come in order, though a worker holds all processors."""
    code = """
import ray
import torch
from raytrain.config.request import as_run
from raytrain.distributed.ray_data import on_cluster
from raytrain.distributed.ray_session import session

def read(number, shape):
    return torch.full(shape, number, dtype=torch.uint8)

class Worker:
    def numbers(self):
        requests = [(number, (3, 2 + number % 2)) for number in range(12)]
        ahead = on_cluster(lambda cpus: cpus, read, requests)
        return [(int(pixels.max()), tuple(pixels.shape)) for pixels in ahead] == requests

with session(as_run(None)):
    cpus = ray.cluster_resources()["CPU"]
    worker = ray.remote(num_cpus=cpus)(Worker).remote()
    print(ray.get(worker.numbers.remote(), timeout=150))
"""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "RAY_TMPDIR": ray_folder},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
