"""Trials of several workers: as many at once as the cluster has room for, and one that waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raytrain.config.request import as_run
from raytrain.tuning import executor
from raytrain.tuning.executor import _Search


def manager_of(workers: int) -> Any:
    """A manager that always has a job, and counts those under way."""
    manager = SimpleNamespace(running=0, space=SimpleNamespace(base_run=None))
    manager.space.base_run = as_run(None, [f"workers={workers}", "device=cpu"])

    def begin(tune_id: str) -> dict[str, Any]:
        manager.running += 1
        return {"job": tune_id}

    manager.begin = begin
    return manager


@pytest.mark.parametrize(("workers", "most"), [(2, [2, 3, 1]), (1, [9, 9, 9])])
def test_groups_follow_the_size_of_the_cluster(
    workers: int, most: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(executor, "_ROOM_SECONDS", 0.0)
    for cpus, expected in zip([2.0, 5.0, 0.0], most, strict=True):
        monkeypatch.setattr(ray, "cluster_resources", lambda cpus=cpus: {"CPU": cpus})
        manager = manager_of(workers)
        search = _Search(manager, "steps")
        begun = [search.suggest(str(number)) for number in range(9)]
        assert sum(job is not None for job in begun) == expected
        manager.running = 0
        assert search.suggest("after") is not None
