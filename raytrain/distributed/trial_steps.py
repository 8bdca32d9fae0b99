"""How far trials are within an epoch, from their processes to the driver: an actor of Ray.

The process of the actor imports this module, and nothing heavy with it.
"""

from __future__ import annotations

from typing import Any

Step = tuple[float, float | None]
"""Share of training that is done; mean loss of the epoch so far, once it was read from the device."""


class _TrialSteps:
    """The newest step of every trial; the actor."""

    def __init__(self) -> None:
        self._newest: dict[str, Step] = {}

    def put(self, trial: str, step: Step) -> None:
        self._newest[trial] = step

    def take(self) -> dict[str, Step]:
        newest, self._newest = self._newest, {}
        return newest


class TrialStepsReader:
    """The driver's side: starts the actor under a name, and reads it without waiting."""

    def __init__(self, name: str) -> None:
        import ray

        self._ray = ray
        actor = ray.remote(num_cpus=0, max_restarts=-1)(_TrialSteps)
        self._actor: Any = actor.options(name=name).remote()  # pyright: ignore
        self._answer: Any = self._actor.take.remote()

    def read(self) -> dict[str, Step]:
        """Steps since they were last read, by trial; empty while the actor does not answer."""
        from ray.exceptions import RayError

        ready, _ = self._ray.wait([self._answer], timeout=0)
        if not ready:
            return {}
        answer, self._answer = self._answer, self._actor.take.remote()
        try:
            return self._ray.get(answer)
        except RayError:  # its node has died, and it is started anew
            return {}

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)


class TrialStepsWriter:
    """A trial's side: sends its steps without waiting."""

    def __init__(self, name: str) -> None:
        import ray

        try:
            self._actor: Any = ray.get_actor(name)
        except ValueError:  # its node has died
            self._actor = None

    def put(self, trial: str, step: Step) -> None:
        """Send a step."""
        if self._actor is not None:
            self._actor.put.remote(trial, step)
