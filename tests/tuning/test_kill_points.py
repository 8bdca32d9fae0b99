"""A driver may die between any two writes: the next one finishes the sweep as if nothing had happened."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from sweep_helpers import METRIC, SPACE, Launch, Store, diverged, space_of

from raytrain.config.run import RunConfig
from raytrain.distributed.jobs import Job
from raytrain.tuning.initial_trials import plan_first
from raytrain.tuning.space.search_space import SearchSpace

EPOCHS = 4


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process leaves what it wrote


class Killed(BaseException):
    """The driver is no more."""


@dataclass
class World:
    """Workers and their checkpoints: they outlive drivers as files do."""

    trained: Counter[tuple[str, int]] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    frail: dict[str, int] = field(default_factory=dict)  # trial -> epoch after which it dies once
    limit: int | None = None  # calls before the driver dies
    calls: int = 0

    def count(self, name: str) -> None:
        del name
        if self.limit is not None and self.calls == self.limit:
            raise Killed
        self.calls += 1

    def results(self, job: Job) -> Any:
        """What a slot would hand over; a checkpoint and a row are written before each of them."""
        folder, run = Path(job.folder), RunConfig.model_validate_json(job.run)
        name, file = folder.name, folder / "last.pt"
        saved = json.loads(file.read_text()) if job.resume and file.is_file() else []
        if len(saved) == EPOCHS:
            yield {**result(EPOCHS, saved[-1]), "final": True, "done": True}
            return
        if saved:  # the row of the checkpoint may have been lost
            yield {**result(len(saved), saved[-1]), "done": len(saved) / EPOCHS >= job.until}
        for epoch in range(len(saved) + 1, EPOCHS + 1):
            if run.optimizer.lr > 0.25 and epoch == 2:
                yield diverged("training diverged in epoch 2")
                return
            self.trained[name, epoch] += 1
            saved.append(run.optimizer.lr + 0.01 * epoch)
            folder.mkdir(parents=True, exist_ok=True)
            new = file.with_name("new")  # put in place whole: its other names keep the old one
            new.write_text(json.dumps(saved))
            new.replace(file)
            if self.frail.get(name) == epoch and not self.deaths[name]:
                self.deaths[name] += 1
                yield None
                return
            told = result(epoch, saved[-1])
            yield {**told, "done": told["final"] or epoch / EPOCHS >= job.until}


def result(epoch: int, value: float) -> dict[str, Any]:
    metrics = {"cost/fe": 10.0 * epoch, METRIC: value}
    return {
        "metrics": json.dumps(metrics),
        "epoch": epoch,
        "progress": epoch / EPOCHS,
        "final": epoch == EPOCHS,
        "done": epoch == EPOCHS,
    }


def drive(launch: Launch, world: World, concurrent: int = 2) -> None:
    """What Tune does, in an order that depends on nothing but the trials."""
    manager = launch.manager
    manager.recover()
    if isinstance(launch.space, SearchSpace):
        plan_first(manager, launch.space, "")
    running: deque[tuple[str, Any]] = deque()
    begun, over = 0, False
    while running or not over:
        while not over and len(running) < concurrent:
            try:
                job = manager.begin(f"t{begun}")
            except StopIteration:
                over = True
                break
            if job is None:
                break
            running.append((f"t{begun}", world.results(job["job"])))
            begun += 1
        if not running:
            continue
        tune_id, results = running.popleft()
        told = next(results)
        if told is None:
            manager.note_loss(tune_id, "its node died")
            manager.end(tune_id, None, lost=True)
        elif told["done"] or manager.row(tune_id, told):
            manager.end(tune_id, told, lost=False)
        else:
            running.append((tune_id, results))


SWEEPS: dict[str, dict[str, Any]] = {
    "retries and rejections": {
        "search": {"sampler": "random", "pruner": "none", "seed": 3},
        "constraints": ["optimizer.lr > 0.03"],
        "budget": {"trials": 4},
    },
    "early stopping": {
        "search": {
            "sampler": "tpe",
            "pruner": "asha",
            "first_rung": 1,
            "reduction": 2,
            "startup": 2,
            "seed": 1,
        },
        "budget": {"trials": 5},
    },
    "grid": {
        "search": {"sampler": "grid", "pruner": "none"},
        "space": {
            "optimizer.lr": {"choice": [0.02, 0.1, 0.3]},
            "threat.eps": {"choice": [0.1, 0.2]},
        },
        "constraints": ["optimizer.lr * threat.eps < 0.05"],
        "budget": {},
    },
    "population": {
        "search": {
            "sampler": "pbt",
            "population": {"size": 3, "interval": 2, "share": 0.34},
        },
        "space": {"optimizer.lr": {"float": [0.01, 0.24], "log": True}},
        "budget": {"trials": 3},
    },
}


def sweep_of(name: str) -> SearchSpace:
    return space_of(**{"base": {**SPACE["base"], "max_failures": 2}, **SWEEPS[name]})


def launched(folder: Path, name: str, world: World, before: Launch | None) -> Launch:
    store = Store() if before is None else before.store
    return Launch(folder, store, sweep_of(name), deaths=world.count)


def finished(folder: Path, name: str, dies_at: list[int]) -> tuple[Launch, World]:
    """A sweep whose drivers die before these calls, the last one not at all."""
    world, launch = World(frail={"t0000": 2, "t0002": 1, "t0003": 4}), None
    for limit in [*dies_at, None]:
        world.limit, world.calls = None, 0
        before = launch
        launch = launched(folder, name, world, before)
        world.limit, world.calls = limit, 0
        try:
            drive(launch, world)
            break
        except Killed:
            continue
    assert launch is not None
    return launch, world


def calls_of(tmp_path: Path, name: str) -> int:
    """How many calls an undisturbed sweep makes."""
    return finished(tmp_path / "undisturbed" / "study", name, [])[1].calls


def check(launch: Launch, world: World, name: str, alone: Launch) -> None:
    """Everything that must be true of a finished sweep, however many drivers died in it."""
    manager, store = launch.manager, launch.store
    assert launch.trials(TrialState.RUNNING, TrialState.WAITING) == []
    rows = manager.history.rows()
    expected = 5 if name == "grid" else launch.space.budget.trials
    assert len(rows) == expected == manager.progress().finished
    assert {row.state for row in rows} <= {"complete", "stopped", "diverged"}
    handles = [row.handle for row in rows]
    assert len(set(handles)) == len(handles)
    assert set(store.status) == set(handles), "a run for every trial, and none besides"
    for row in rows:
        assert store.status[row.handle] == ("FAILED" if row.state == "diverged" else "FINISHED")
        assert store.tags[row.handle]["outcome"] == row.state
        if row.state == "diverged":
            assert store.tags[row.handle]["error"] == "training diverged in epoch 2"
        if row.state == "complete":
            assert row.epochs == EPOCHS
    epochs = [(row["trial"], row["epoch"]) for row in manager.journal.rows()]
    told = {row.number: row.epochs for row in rows}
    assert {trial for trial, _ in epochs} <= set(told)
    # A row may have been written of which the study was not told before the driver died.
    assert all(epoch <= told[trial] + 1 for trial, epoch in epochs)
    if name != "population":  # there a member goes on from another's checkpoint
        assert set(world.trained.values()) == {1}, "an epoch was trained twice"
    ended = Counter(
        t.user_attrs["origin"]
        for t in launch.trials(TrialState.COMPLETE, TrialState.PRUNED)
        if "origin" in t.user_attrs
    )
    assert set(ended.values()) == {1} and set(ended) == set(told)
    if name == "grid":
        assert Counter(str(sorted(row.params.items())) for row in rows) == Counter(
            str(sorted(row.params.items())) for row in alone.manager.history.rows()
        )
    later = launch.again()
    later.manager.recover()
    before, after = manager.progress(), later.manager.progress()
    assert after.finished == before.finished and after.best == before.best
    assert after.fe_per_image == pytest.approx(before.fe_per_image)
    assert {k: n for k, n in after.outcomes.items() if k != "rejected"} == {
        k: n for k, n in before.outcomes.items() if k != "rejected"
    }
    with pytest.raises(StopIteration):
        later.manager.begin("one more")


def survives(folder: Path, name: str, deaths: Iterable[list[int]]) -> None:
    """Whether the sweep is as it should be after each of these lists of deaths."""
    alone, _ = finished(folder / "alone" / "study", name, [])
    for dies_at in deaths:
        at = "-".join(map(str, dies_at))
        launch, world = finished(folder / at / "study", name, dies_at)
        try:
            check(launch, world, name, alone)
        except BaseException as error:
            error.add_note(f"died before calls {dies_at}")
            raise


@pytest.mark.slow
@pytest.mark.parametrize("part", range(int(os.environ.get("RAYTRAIN_KILL_POINTS", "1"))))
@pytest.mark.parametrize("name", SWEEPS)
def test_a_driver_may_die_before_any_call(tmp_path: Path, name: str, part: int) -> None:
    """One call in twelve; all of them, in minutes, with RAYTRAIN_KILL_POINTS=12."""
    survives(tmp_path, name, ([limit] for limit in range(part, calls_of(tmp_path, name), 12)))


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.slow
def test_drivers_may_die_again_while_they_recover(tmp_path: Path, name: str) -> None:
    calls = calls_of(tmp_path, name)
    assert calls > 60
    survives(tmp_path, name, ([first, 1 + first % 5, 3] for first in range(3, calls, 29)))
