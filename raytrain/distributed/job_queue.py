"""The queue between the driver and a worker group; its process imports neither torch nor Ray Train."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Any

from raytrain.core.errors import TrainingFailed
from raytrain.core.failures import kind_and_message

_IDLE_SECONDS = 10.0  # without a job, after which a group ends and others have its room


class JobQueue:
    """Jobs one way (the newest wins), rows the other: an actor without CPUs, one per group."""

    def __init__(self, max_failures: int) -> None:
        self.number = 0
        self.job: dict[str, Any] | None = None
        self.rows: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.changed = asyncio.Condition()
        self.step: dict[str, Any] | None = None  # the newest since the last row, not polled yet
        self.taken, self.max_failures = 0, max_failures
        self.failed = 0  # the last job that one of its workers gave up
        self.left = False  # the group has ended for want of a job
        self.controller: Any = None  # Ray Train's actor that runs the group

    async def submit(self, job: dict[str, Any] | None) -> int:
        """A new job in place of the present one, by its number; None ends the group.

        0 if the group has ended for want of a job.
        """
        if self.left:
            return 0
        async with self.changed:
            self.number, self.job, self.taken = self.number + 1, job, 0
            self.rows, self.step = asyncio.Queue(), None
            self.changed.notify_all()
        return self.number

    async def next_job(self, after: int) -> tuple[int, dict[str, Any] | None, int]:
        """The job newer than `after`, and how often it was begun before.

        None ends the group: there has been no other job for a while. Number -1 if there was none at all.
        """
        async with self.changed:
            while True:
                try:
                    await asyncio.wait_for(
                        self.changed.wait_for(lambda: self.number > max(after, self.failed)),
                        _IDLE_SECONDS,
                    )
                except TimeoutError:
                    self.left = self.number > 0
                    return self.number or -1, None, 0
                self.taken += 1
                if self.taken <= self.max_failures + 1 or self.job is None:
                    return self.number, self.job, self.taken - 1
                why = f"its workers died {self.taken - 1} times"
                self.rows.put_nowait(("failed", kind_and_message(TrainingFailed(why))))
                self.failed = self.number

    async def report(self, number: int, kind: str, value: Any, ahead: int = 1) -> bool:
        """Hand over a row; False if the job was replaced. Waits while more than `ahead` are unread."""
        if number != self.number or number == self.failed:
            return False
        if kind == "failed":
            self.failed = number
        if kind == "row":
            self.taken = 1  # it makes progress
        self.rows.put_nowait((kind, value))
        self.step = None
        async with self.changed:
            await self.changed.wait_for(
                lambda: number != self.number or self.rows.qsize() <= ahead
            )
        return number == self.number

    async def note(self, number: int, step: dict[str, Any]) -> None:
        """Keep the newest step of a job; the sender does not wait."""
        if number == self.number and number != self.failed:
            self.step = step

    async def controlled_by(self, controller: Any) -> None:
        """Keep the actor that runs the group."""
        self.controller = controller

    async def abort(self) -> None:
        """End the group at once, if it is there yet: its workers die with their owner."""
        import ray

        if self.controller is not None:
            ray.kill(self.controller)

    async def poll(self, seconds: float) -> tuple[str, Any] | None:
        """The next row of the present job; if there is none for so long its newest step, or None."""
        try:
            row = await asyncio.wait_for(self.rows.get(), seconds)
        except TimeoutError:
            step, self.step = self.step, None
            return None if step is None else ("step", step)
        async with self.changed:
            self.changed.notify_all()
        return row


def started_queue(max_failures: int) -> Any:
    """A `JobQueue` as an actor on the node of this process, so that no other node takes it along."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _queue_class().options(scheduling_strategy=here).remote(max_failures)


@lru_cache(maxsize=1)
def _queue_class() -> Any:
    import ray

    return ray.remote(num_cpus=0)(JobQueue)
