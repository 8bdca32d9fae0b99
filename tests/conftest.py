"""What all tests share: one thread, so that results do not depend on the machine; a folder for Ray."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

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


@cache
def _starts_ray(file: Path) -> bool:
    return file.is_file() and "pytest.mark.ray" in file.read_text(encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule by file; those that start Ray are one group, which comes first.

    Two Rays at once take twice as long on two cores, and more than their time to start. (The groups of
    pytest-xdist 3.8, `--dist loadgroup`, have no effect with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayFirst(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if _starts_ray(config.rootpath / file) else file

    config.option.loadscopereorder = False
    return RayFirst(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that start Ray first."""
    items.sort(key=lambda item: not _starts_ray(item.path))


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
