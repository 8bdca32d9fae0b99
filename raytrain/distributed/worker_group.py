"""Ray Train: a persistent group of workers that pulls jobs; only the first job includes the start-up.

The driver submits a job and polls its rows; rank 0 fetches the job, broadcasts it, and polls after
every epoch whether to continue. When a worker dies, Ray Train restarts the group, and the job
resumes from its last checkpoint. Jobs end cooperatively; a group is killed only after a signal
or a failure, when nothing else is to run on it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raytrain.core.console import log_line
from raytrain.core.distributed_context import DistributedContext, keep_freed_memory
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import RequestError, TrainingFailed, WorkersLost
from raytrain.core.failures import as_failure, from_kind_and_message, is_lost, kind_and_message
from raytrain.core.storage import for_ray
from raytrain.distributed.job_queue import started_queue
from raytrain.distributed.jobs import Job, RecentRows, job_rows
from raytrain.distributed.ray_data import on_cluster
from raytrain.training.progress import SECONDS_BETWEEN_STEPS, OnStep, RateLimit, StepProgress

_LOSSES = 50  # of a group, also before a job has begun; a job has its own limit
_RESIZE_SECONDS = 30.0  # at least, between two looks for room for more workers
_QUIET_SECONDS = 60.0  # without a step, after which a line says so
_ABORTS = 20  # tries to end a group that is being started, a second apart


def _announcement(bus: Any) -> Any:
    """A callback of Ray Train's that gives the bus the actor it runs in, which `fit` keeps to itself."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Announcement(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            del train_run_context
            ray.get(bus.controlled_by.remote(ray.get_runtime_context().current_actor))

    return Announcement()


def work(settings: dict[str, Any]) -> None:
    """What every worker of a group does: job after job, until there is none."""
    import ray.train
    from ray.train.torch import get_device

    train_context = ray.train.get_context()
    device = get_device()
    keep_freed_memory()
    context = DistributedContext(
        device if not isinstance(device, list) else device[0],
        train_context.get_world_rank(),
        train_context.get_world_size(),
        partial(on_cluster, lambda cpus: cpus // train_context.get_world_size()),
    )
    worker, number = _Worker(settings["bus"], context), 0
    while True:
        newer, job, before = worker.next_job(number)
        if newer < 0:
            continue
        if job is None:
            return
        number = newer
        worker.train(number, job, resume=job.resume or before > 0)


@dataclass(frozen=True)
class _Worker:
    """One worker of a group; rank 0 communicates with the bus for all."""

    bus: Any
    context: DistributedContext

    def next_job(self, after: int) -> tuple[int, Job | None, int]:
        """See `JobQueue.next_job`; the same on every rank."""
        number, job, before = self._agree(
            self._call("next_job", after) if self.context.leads else None
        )
        return number, None if job is None else Job(**job), before

    def train(self, number: int, job: Job, resume: bool) -> None:
        """Train a job and report its rows.

        Raises:
            Exception: after which the group has to start anew.
        """
        try:
            for report in job_rows(job, self.context, resume, self._on_step(number)):
                if not self._report(number, "row", asdict(report)):
                    break
            else:
                self._report(number, "done", None, 10)
        except (TrainingFailed, RequestError) as error:
            # Raised on every rank alike; a bad configuration must not cost the group its life.
            self._report(number, "failed", kind_and_message(error), 10)
        except Exception as error:
            # Perhaps on this rank alone, while the others wait in a collective.
            if not is_lost(error):
                self._call("report", number, "failed", kind_and_message(as_failure(error)), 10)
            raise

    def _on_step(self, number: int) -> OnStep:
        """What sends the steps of rank 0 to the bus, without waiting for it."""
        due = RateLimit(SECONDS_BETWEEN_STEPS)

        def send(done: StepProgress) -> None:
            if self.context.leads and due():
                self.bus.note.remote(number, asdict(done))

        return send

    def _report(self, number: int, kind: str, value: Any, ahead: int = 1) -> bool:
        leads = self.context.leads
        return self._agree(self._call("report", number, kind, value, ahead) if leads else None)

    def _call(self, method: str, *given: Any) -> Any:
        import ray

        return ray.get(getattr(self.bus, method).remote(*given))

    def _agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        if self.context.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.context.device)
        return box[0]


def _cause(error: Exception) -> str:
    """The line of a report of Ray Train's that names what a worker raised; its last one if none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b.*:", line)]
    return (raised or lines or [type(error).__name__])[-1][:300]


class WorkerGroup:
    """A living Ray Train worker group, from the driver's side.

    `resources` are those of one worker. The group has as many workers as there is room for, from the
    first to the second of `workers`, and is started anew from the last checkpoint when that changes.
    Its name is made unique, since Ray Train restores a run whose name it has seen. A job fails when it
    was restarted `failures` times in a row without an epoch in between. A group without a job ends after
    some seconds, so that it takes no room from those that wait for it.
    """

    def __init__(
        self,
        workers: tuple[int, int],
        resources: dict[str, float],
        name: str,
        storage: Path,
        failures: int,
    ) -> None:
        import ray

        self._ray = ray
        self._bus = started_queue(failures)
        name = f"{name}-{time.time_ns():x}"
        self._folder = storage.resolve() / "ray" / name
        self._folder_of_job = Path()
        self._delivered = 0  # the last epoch whose row the driver received before the resumption
        self._ended: str | None = None  # why the group is gone, if it is
        self._thread = threading.Thread(
            target=self._hold,
            args=(workers, resources),
            name="group",
            daemon=True,
        )
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Begin a job; one that is running is dropped at its next epoch. False if the group has ended."""
        if self._ended is not None:
            return False
        self._folder_of_job = job.path
        before = RecentRows(self._folder_of_job, job.resume).rows
        self._delivered = max((row.epoch for row in before), default=0)
        return self._ray.get(self._bus.submit.remote(asdict(job))) != 0

    def rows(self, on_step: OnStep = lambda done: None) -> Iterator[EpochMetrics]:
        """The rows of the job until it ends; after a restart of the group an epoch may come twice,
        and none is missing. In between `on_step` is called about once a second with the newest step.

        Raises:
            RequestError, TrainingFailed: as the job did, at once; or if its workers died too often.
            WorkersLost: if the group is gone.
        """
        folder, last = self._folder_of_job, self._delivered
        quiet = RateLimit(_QUIET_SECONDS, wait=True)
        while True:
            polled = self._ray.get(self._bus.poll.remote(1.0))
            if polled is None and self._ended is not None:
                raise WorkersLost(f"the worker group is gone: {self._ended}")
            if polled is None:
                if quiet():
                    log_line(
                        f"raytrain: no step for {_QUIET_SECONDS:.0f} s: the workers are being started, or "
                        "wait for room on the cluster (ray status)"
                    )
                continue
            quiet = RateLimit(_QUIET_SECONDS, wait=True)
            kind, value = polled
            if kind == "done":
                yield from RecentRows(folder).between(last)
                return
            if kind == "failed":
                raise from_kind_and_message(*value)
            if kind == "step":
                on_step(StepProgress(**value))
                continue
            report = EpochMetrics(**value)
            if report.epoch > last + 1:  # a worker died between a checkpoint and its row
                yield from RecentRows(folder).between(last, report.epoch)
            yield report
            last = max(last, report.epoch)

    def close(self, seconds: float = 60.0) -> None:
        """Wait this long for the workers to finish their epoch and exit; then end them."""
        with contextlib.suppress(Exception):  # the bus may be gone together with its node
            self._ray.get(self._bus.submit.remote(None), timeout=seconds)
        self._thread.join(seconds)
        for _ in range(
            _ABORTS
        ):  # a thread that still waits for Ray would not survive its shutdown
            if not self._thread.is_alive():
                break
            with contextlib.suppress(Exception):
                self._ray.get(self._bus.abort.remote(), timeout=seconds)
            self._thread.join(1.0)
        with contextlib.suppress(Exception):
            self._ray.kill(self._bus)
        self._forget()

    def _forget(self) -> None:
        """Remove Ray Train's own files, which are never read again."""
        path, file_system = for_ray(self._folder)
        with contextlib.suppress(OSError):
            if file_system is None:
                shutil.rmtree(path)
            else:
                file_system.delete_dir(path)

    def _hold(self, workers: tuple[int, int], resources: dict[str, float]) -> None:
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        storage_path, file_system = for_ray(self._folder.parent)
        trainer = TorchTrainer(
            work,
            train_loop_config={"bus": self._bus},
            scaling_config=ScalingConfig(
                num_workers=workers if workers[0] < workers[1] else workers[1],
                elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
                use_gpu=resources["GPU"] > 0,
                resources_per_worker={k: v for k, v in resources.items() if v},
            ),
            run_config=RunConfig(
                name=self._folder.name,
                storage_path=storage_path,
                storage_filesystem=file_system,
                failure_config=FailureConfig(max_failures=_LOSSES, controller_failure_limit=-1),
                logging_config=LoggingConfig(log_level="ERROR"),
                callbacks=[_announcement(self._bus)],
            ),
        )
        try:
            trainer.fit()
            self._ended = "it was ended by the driver"
        except Exception as error:  # returned to the poller of rows
            self._ended = _cause(error)
