"""What all tests share: one thread, so that results do not depend on the machine; a folder for Ray."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Compile torch, Ray and MLflow once, not in every process that a test starts.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import torch

from raytrain.core.distributed_context import keep_freed_memory

os.environ["RAYTRAIN_CACHE"] = tempfile.mkdtemp(prefix="raytrain-cache-")
atexit.register(shutil.rmtree, os.environ["RAYTRAIN_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
keep_freed_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for `--dist loadgroup`: those that start Ray one after the other, first; others by file.

    Two Rays at once take twice as long on two cores, and more than their time to start.
    """
    for item in items:
        starts_ray = item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("ray" if starts_ray else str(item.path)))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def _forget_outside() -> None:
    """No store and no cluster but a test's own; MLflow leaves the store it used last in a variable."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "GIT_COMMIT"):
        os.environ.pop(name, None)


_forget_outside()


@pytest.fixture(autouse=True, scope="module")
def nothing_from_another_file() -> None:
    _forget_outside()


@pytest.fixture(autouse=True)
def nothing_from_another_test() -> None:
    _forget_outside()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[str]:
    """Ray's own files: the path of a socket may have 107 characters, fewer than pytest's folders."""
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
