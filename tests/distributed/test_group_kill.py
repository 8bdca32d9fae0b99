"""A worker of a group dies in the middle of a trial: no row is lost, none doubled, nothing paid twice."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import metrics_of
from mlflow import MlflowClient
from ray_helpers import runs_of, started, trials_of

from raytrain.config.request import as_run
from raytrain.core import working_copy
from raytrain.core.distributed_context import DistributedContext
from raytrain.core.errors import WorkersLost
from raytrain.core.file_systems import write
from raytrain.distributed import job_queue, worker_group
from raytrain.distributed.job_queue import JobQueue
from raytrain.distributed.jobs import Job, RecentRows, job_rows
from raytrain.distributed.worker_group import WorkerGroup, _Worker
from raytrain.training.checkpoint import LAST, load
from raytrain.training.progress import StepProgress

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
stage: Any = importlib.import_module("faults_stage")  # scripts, no package
audit: Any = importlib.import_module("faults_audit")

pytestmark = [
    # MLflow's tables use a strategy that SQLAlchemy 2.1 no longer likes.
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
]


# --- a row that died between its checkpoint and the driver ------------------------------------


class Spoken:
    """Ray, and a bus that says what it was given to say."""

    def __init__(self, *said: tuple[str, Any] | None) -> None:
        self._said, self.submit, self.poll = list(said), self, self
        self.jobs: list[dict[str, Any]] = []

    def remote(self, what: Any) -> Any:
        if isinstance(what, dict):
            self.jobs.append(what)
            return None
        return self._said.pop(0)

    def get(self, answer: Any) -> Any:
        return answer


def told(folder: Path, kept: int, *said: int, before: int = 0) -> list[int]:
    """Epochs that the driver hears of, of a job whose workers kept rows up to `kept` and told `said`.

    The job is resumed if there were rows `before`.
    """
    group: Any = object.__new__(WorkerGroup)
    group._ended = None
    group._ray = group._bus = Spoken(
        *(("row", asdict(metrics_of(epoch))) for epoch in said), ("done", None)
    )
    recent = RecentRows(folder)
    for epoch in range(1, before + 1):
        recent.add(metrics_of(epoch))
    group.submit(Job("{}", str(folder), resume=before > 0))
    for epoch in range(before + 1, kept + 1):
        recent.add(metrics_of(epoch))
    reports = list(group.rows())
    assert reports == [metrics_of(report.epoch) for report in reports]
    return [report.epoch for report in reports]


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ((1, 2, 3, 4), [1, 2, 3, 4]),
        ((1, 2, 4), [1, 2, 3, 4]),
        ((2, 3, 4), [1, 2, 3, 4]),
        ((1, 2, 3), [1, 2, 3, 4]),
        ((1, 2, 2, 3, 4), [1, 2, 2, 3, 4]),
        ((1, 2, 1, 2, 4), [1, 2, 1, 2, 3, 4]),
    ],
    ids=["whole", "one lost", "the first lost", "the last lost", "trained again", "both"],
)
def test_a_row_that_a_worker_took_with_it_is_told_from_its_file(
    tmp_path: Path, said: tuple[int, ...], heard: list[int]
) -> None:
    assert told(tmp_path, 4, *said) == heard


@pytest.mark.parametrize(("said", "heard"), [((3, 4), [3, 4]), ((4,), [3, 4]), ((), [3, 4])])
def test_a_resumed_group_tells_what_came_after_it_was_resumed(
    tmp_path: Path, said: tuple[int, ...], heard: list[int]
) -> None:
    assert told(tmp_path, 4, *said, before=2) == heard


# --- steps within an epoch --------------------------------------------------------------------


def test_steps_are_passed_on_between_rows_and_are_none(tmp_path: Path) -> None:
    group: Any = object.__new__(WorkerGroup)
    group._ended = None
    steps = [StepProgress(0.1 * step, 1, step, 64 * step, None) for step in (1, 2)]
    one, other = (("step", asdict(step)) for step in steps)
    row = ("row", asdict(metrics_of(1)))
    group._ray = group._bus = Spoken(one, None, other, row, ("done", None))
    group.submit(Job("{}", str(tmp_path), resume=False))
    found: list[StepProgress] = []
    assert [report.epoch for report in group.rows(found.append)] == [1]
    assert found == steps


def test_the_newest_step_of_a_job_is_polled_once_and_gives_way_to_a_row() -> None:
    async def polled() -> list[Any]:
        bus, found = JobQueue(0), []
        number = await bus.submit(asdict(Job("{}", "", resume=False)))
        for step in (1, 2):
            await bus.note(number, {"step": step})
        found += [await bus.poll(0.01), await bus.poll(0.01)]
        await bus.note(number, {"step": 3})
        await bus.report(number, "row", "first")
        found += [await bus.poll(0.01), await bus.poll(0.01)]
        await bus.note(number, {"step": 4})
        await bus.submit(asdict(Job("{}", "", resume=False)))
        await bus.note(number, {"step": 5})
        return [*found, await bus.poll(0.01)]

    assert asyncio.run(polled()) == [("step", {"step": 2}), None, ("row", "first"), None, None]


@pytest.mark.parametrize(("rows", "given_up"), [(False, True), (True, False)])
def test_a_job_is_given_up_after_restarts_in_a_row_without_a_row(
    rows: bool, given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_queue, "_IDLE_SECONDS", 0.01)

    async def starts() -> list[int]:
        queue, begun = JobQueue(2), []
        number = await queue.submit(asdict(Job("{}", "", resume=False)))
        for _ in range(6):
            _, job, before = await queue.next_job(0)
            if job is None:  # given up: nothing is begun any more
                break
            begun.append(before)
            if rows:
                await queue.report(number, "row", {}, ahead=10)
        return begun

    begun = asyncio.run(starts())
    assert begun == ([0, 1, 2] if given_up else [0, 1, 1, 1, 1, 1])


def test_a_group_whose_workers_die_before_any_job_is_given_up_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []

    class Dying:
        """Ray Train, as far as it starts a group anew as often as it was told to."""

        def __init__(self, work: Any, *, run_config: Any, **others: Any) -> None:
            self._again = run_config.failure_config.max_failures

        def fit(self) -> None:
            while True:
                starts.append(0)
                if len(starts) > self._again >= 0:
                    raise RuntimeError("training failed:\nOSError: no space on /dev/shm")

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Dying)
    group: Any = object.__new__(WorkerGroup)
    group._ended, group._folder = None, tmp_path / "ray" / "group"
    group._ray = group._bus = Spoken(None)
    group._hold((2, 2), {"CPU": 1.0, "GPU": 0.0})
    assert group._ended and len(starts) == 51
    assert not group.submit(Job("{}", str(tmp_path), resume=False))
    group._folder_of_job, group._delivered = tmp_path, 0
    with pytest.raises(WorkersLost, match="gone: OSError: no space on /dev/shm"):
        list(group.rows())


@pytest.mark.parametrize("given_up", [False, True])
def test_a_group_without_a_job_ends_and_takes_none_any_more(
    given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_queue, "_IDLE_SECONDS", 0.01)

    async def life() -> None:
        queue, job = JobQueue(0), asdict(Job("{}", "", resume=False))
        assert await queue.next_job(0) == (-1, None, 0)  # it is younger than its first job
        number = await queue.submit(job)
        assert await queue.next_job(0) == (number, job, 0)
        after = 0 if given_up else number
        assert await queue.next_job(after) == (number, None, 0)
        assert await queue.submit(job) == 0

    asyncio.run(life())


@pytest.mark.parametrize(("rank", "sent"), [(0, [1]), (1, [])])
def test_rank_0_alone_sends_steps_and_no_more_than_one_a_second(
    rank: int, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "SECONDS_BETWEEN_STEPS", 1e9)
    found: list[int] = []
    bus: Any = SimpleNamespace(
        note=SimpleNamespace(remote=lambda number, step: found.append(step["step"]))
    )
    worker = _Worker(bus, DistributedContext(rank=rank))
    on_step = worker._on_step(1)
    for step in (1, 2, 3):
        on_step(StepProgress(0.1, 1, step, 64, None))
    assert found == sent


# --- a pause ----------------------------------------------------------------------------------


def test_workers_that_start_anew_do_not_train_beyond_a_pause(tmp_path: Path) -> None:
    run = as_run(
        {"data": {"name": "digits", "train_size": 64}, "epochs": 3, "batch_size": 32},
        ["algorithm.steps=1", "evaluation.steps=1", "device=cpu"],
    )
    paused = Job.of(run, tmp_path, resume=False, until=0.3)
    assert [row.epoch for row in job_rows(paused, DistributedContext(), resume=False)] == [1]
    checkpoint = (tmp_path / LAST).read_bytes()
    assert list(job_rows(paused, DistributedContext(), resume=True)) == []
    assert (tmp_path / LAST).read_bytes() == checkpoint
    whole = Job.of(run, tmp_path, resume=True)
    assert [row.epoch for row in job_rows(whole, DistributedContext(), resume=True)] == [2, 3]
    longer = Job.of(run.model_copy(update={"epochs": 4}), tmp_path, resume=True)
    assert [row.epoch for row in job_rows(longer, DistributedContext(), resume=True)] == [4]


def test_a_last_checkpoint_whose_upload_was_cut_off_is_in_the_storage_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksum and its row are there; the process that goes on finds it finished, on the same machine."""
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "here"))
    run = as_run(
        {"data": {"name": "digits", "train_size": 64}, "epochs": 2, "batch_size": 32},
        [
            "algorithm.steps=1",
            "evaluation.steps=1",
            "device=cpu",
            f"storage=file://{tmp_path}/bucket",
        ],
    )
    job, uploads = Job.of(run, run.root / "raytrain" / "x", resume=False), []

    def killed(fs: Any, at: str, content: Any) -> None:
        uploads.append(at)
        if sum(one.endswith(LAST) for one in uploads) == 2:
            raise KeyboardInterrupt
        write(fs, at, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(working_copy, "write", killed)
        list(job_rows(job, DistributedContext(), resume=False))
    assert list(job_rows(job, DistributedContext(), resume=True)) == []
    stored = tmp_path / "bucket" / "raytrain" / "x" / LAST
    digest = stored.with_name(f"{LAST}.sha256").read_text().split()[0]
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == digest
    assert load(stored).epoch == 2


# --- a worker that is killed ------------------------------------------------------------------

EPOCHS, IMAGES, WORKERS = 8, 256, 2
SPACE = f"""
base:
  data: {{name: digits, train_size: {IMAGES}}}
  algorithm: {{name: pgd, steps: 1}}
  epochs: {EPOCHS}
  batch_size: 64
  evaluation: {{steps: 1}}
  device: cpu
  workers: {WORKERS}
space:
  optimizer.lr: {{float: [0.01, 0.2], log: true}}
search: {{sampler: random, pruner: none, defaults: false}}
budget: {{trials: 2, concurrent: 1}}
"""
FE = 5  # of one image in an epoch: PGD of one step


def until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not done():
        assert process.poll() is None and time.monotonic() < end, "the sweep does not get there"
        time.sleep(0.02)


def workers_below(process: subprocess.Popen[str]) -> list[int]:
    """Training processes of the group."""
    return sorted(p for p in stage.below(process) if "RayTrainWorker" in stage.command_of(p))


def epochs_in(file: Path) -> int:
    return file.read_text().count("\n") if file.is_file() else 0


@pytest.mark.ray
def test_a_killed_worker_of_a_group_costs_no_row_and_doubles_none(
    tmp_path: Path, ray_folder: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(SPACE)
    folder = tmp_path / "runs" / "raytrain" / "s"
    with started(tmp_path, ray_folder, "tune", "tiny.yaml", "--name", "s", "--json") as process:
        until(lambda: epochs_in(folder / "rows.jsonl") >= 3, process)
        group = workers_below(process)
        assert len(group) == WORKERS
        os.kill(group[0], signal.SIGKILL)
        at_death = epochs_in(folder / "rows.jsonl")
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert at_death < EPOCHS, "it died too late to be missed"
    result = json.loads(out.splitlines()[-1])  # Ray tells of the death before it

    assert [trial.user_attrs["outcome"] for trial in trials_of(tmp_path, "s")] == ["complete"] * 2
    wanted = [(trial, epoch) for trial in range(2) for epoch in range(1, EPOCHS + 1)]
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [(row["trial"], row["epoch"]) for row in table] == wanted
    assert [row["cost/fe"] for row in table] == [FE * IMAGES * epoch for _, epoch in wanted]
    assert result["progress"]["fe_per_image"] == 2 * EPOCHS * FE

    (parent,), children = runs_of(tmp_path)
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    study = folder / "study.log"
    seen = audit.ended(study, "s")
    outcomes, found = audit.audit(
        folder, study, "s", f"sqlite:///{tmp_path / 'mlflow.db'}", 2, seen
    )
    assert outcomes == {"complete": 2}
    assert {name: count for name, count in found.items() if count} == {}
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for run in children:
        history = client.get_metric_history(run.info.run_id, "cost/fe")
        assert [point.step for point in history] == list(range(1, EPOCHS + 1))
