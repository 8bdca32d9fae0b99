"""Ray Tune's trainables, reused for one trial after the other.

A trial of one worker runs in the trainable's process, where torch and the data are loaded. A trial of
several runs on a Ray Train worker group that the trainable keeps. Neither starts a new process.
"""

from __future__ import annotations

import gc
import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import tune

from raytrain.config.run import RunConfig
from raytrain.core.distributed_context import local_context
from raytrain.core.epoch_metrics import EpochMetrics
from raytrain.core.errors import Diverged, RequestError, TrainingFailed, WorkersLost
from raytrain.distributed.jobs import Job, RecentRows, local_rows
from raytrain.distributed.ray_data import on_cluster
from raytrain.distributed.trial_steps import TrialStepsWriter
from raytrain.distributed.worker_group import WorkerGroup
from raytrain.training.progress import SECONDS_BETWEEN_STEPS, OnStep, RateLimit, StepProgress


class AbstractTrainable(tune.Trainable):
    """One row per `step`; a configuration that fails ends its trial, not the process."""

    _rows: Iterator[EpochMetrics]
    _until = 1.0
    _again: Iterator[EpochMetrics]  # rows that are replayed
    _folder: Path  # of the trial
    _begun = 0  # trials in this process

    @abstractmethod
    def begin(self, job: Job, run: RunConfig, on_step: OnStep) -> Iterator[EpochMetrics]:
        """Start a trial, dropping the one before it."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        job = new_config["job"]
        self._rows = iter(())  # lets go of the network and the memories of the trial before
        _as_new()
        self._begun += 1
        if self._begun == 2:
            # Libraries that the first trial has loaded are here to stay: to look through them at every
            # collection takes longer than all else that a new trial needs.
            gc.freeze()
        self._until, folder = job.until, job.path
        # A driver may have died before the rows up to the last checkpoint reached it.
        self._again = iter(RecentRows(folder).rows if job.resume else [])
        self._folder = folder
        on_step = _sender(new_config.get("steps"), self.trial_id)
        self._rows = self.begin(job, RunConfig.model_validate_json(job.run), on_step)
        return True

    def step(self) -> dict[str, Any]:
        again = next(self._again, None)
        if again is not None and not again.final:
            return {**_row_of(again), "done": again.progress >= self._until}
        try:
            report = next(self._rows)
        except StopIteration:  # resumed after its last epoch, whose row may have been lost
            last = RecentRows(self._folder).rows[-1:]
            row = _row_of(last[0]) if last else _row({}, 0, 1.0, final=True)
            return {**row, "final": True, "done": True}
        except WorkersLost:
            raise  # this process is given up, and the trial tried again
        except (RequestError, TrainingFailed) as error:
            why = "diverged" if isinstance(error, Diverged) else "failed"
            return {**_row({}, 0, 0.0, final=False), why: str(error), "done": True}
        return {**_row_of(report), "done": report.final or report.progress >= self._until}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: checkpoints are the loop's, in the folder of the trial."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, likewise."""


def _row(metrics: dict[str, float], epoch: int, progress: float, final: bool) -> dict[str, Any]:
    # One string, because Tune flattens and copies every key of a result several times.
    return {
        "metrics": json.dumps(metrics),
        "epoch": epoch,
        "progress": progress,
        "final": final,
        "done": final,
    }


def _row_of(report: EpochMetrics) -> dict[str, Any]:
    row = _row(report.metrics(), report.epoch, report.progress, final=report.final)
    tags = report.tags()
    return {**row, "tags": json.dumps(tags)} if tags else row


def _sender(steps: str | None, trial: str) -> OnStep:
    """What sends steps of a trial to the actor of this name, if any, without waiting for it."""
    if steps is None:
        return lambda done: None
    writer, due = TrialStepsWriter(steps), RateLimit(SECONDS_BETWEEN_STEPS)

    def send(done: StepProgress) -> None:
        if due():
            writer.put(trial, (done.share, done.loss))

    return send


def _as_new() -> None:
    """What a trial may have changed in its process, as it was before: settings, graphs, memory."""
    gc.collect()
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class SingleTrainable(AbstractTrainable):
    """Trials of one worker, in this process."""

    def begin(self, job: Job, run: RunConfig, on_step: OnStep) -> Iterator[EpochMetrics]:
        decoding = partial(on_cluster, lambda cpus: min(cpus, int(run.cpus_per_worker)))
        context = replace(local_context(run.device), read_ahead=decoding)
        return local_rows(job, context, on_step)

    def cleanup(self) -> None:
        self._rows = iter(())
        gc.unfreeze()


class GroupTrainable(AbstractTrainable):
    """Trials of several workers, on a Ray Train worker group that one of them starts for those after it."""

    _group: WorkerGroup | None = None

    def begin(self, job: Job, run: RunConfig, on_step: OnStep) -> Iterator[EpochMetrics]:
        from raytrain.distributed.ray_session import worker_resources

        if self._group is None or not self._group.submit(job):
            self.cleanup()
            self._group = WorkerGroup(
                run.worker_range,
                worker_resources(run),
                f"slot-{self.trial_id}",
                job.path.parents[1],
                run.max_failures,
            )
            self._group.submit(job)
        return self._group.rows(on_step)

    def cleanup(self) -> None:
        if self._group is not None:
            self._group.close()
