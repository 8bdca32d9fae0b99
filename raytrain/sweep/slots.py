"""Processes that outlive trials: Tune hands them one configuration after the other.

A trial of one worker runs in the slot's own process, which already has torch and the data. A trial
of several runs on a Ray Train worker group that the slot keeps alive. Neither pays for a new process.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ray import tune

from raytrain.config import RunConfig
from raytrain.place import here
from raytrain.record import Report
from raytrain.types import RequestError, TrainingFailed
from raytrain.worker import Group, Job, job_rows


class AbstractSlot(tune.Trainable):
    """One row per `step`; a configuration that fails ends its trial, not the process."""

    _rows: Iterator[Report]

    @abstractmethod
    def begin(self, job: Job, run: RunConfig) -> Iterator[Report]:
        """Start a trial, dropping the one before it."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        job = new_config["job"]
        run = RunConfig.model_validate_json(job.run)
        self._rows = self.begin(job, run)
        return True

    def step(self) -> dict[str, Any]:
        try:
            report = next(self._rows)
        except StopIteration:  # resumed after its last epoch
            return _row({}, 0, final=True)
        except (TrainingFailed, RequestError, torch.OutOfMemoryError) as error:
            return {**_row({}, 0, final=False), "failed": str(error), "done": True}
        return _row(report.metrics(), report.epoch, final=report.final)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: checkpoints are the loop's, in the folder of the trial."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, likewise."""


def _row(metrics: dict[str, float], epoch: int, final: bool) -> dict[str, Any]:
    # One string, because Tune flattens and copies every key of a result several times.
    return {"metrics": json.dumps(metrics), "epoch": epoch, "final": final, "done": final}


class SingleSlot(AbstractSlot):
    """Trials of one worker, in this process."""

    def begin(self, job: Job, run: RunConfig) -> Iterator[Report]:
        return job_rows(job, here(run.device), job.resume)

    def cleanup(self) -> None:
        self._rows = iter(())


class GroupSlot(AbstractSlot):
    """Trials of several workers, on a Ray Train worker group started by the first of them."""

    _group: Group | None = None

    def begin(self, job: Job, run: RunConfig) -> Iterator[Report]:
        from raytrain.session import worker_resources

        if self._group is None:
            self._group = Group(
                run.workers,
                worker_resources(run),
                f"slot-{self.trial_id}",
                Path(job.folder).parents[1],
                run.max_failures,
            )
        self._group.submit(job)
        return self._group.rows()

    def cleanup(self) -> None:
        if self._group is not None:
            self._group.close()
