"""Errors: bad input, and failures of a training; imports nothing."""

from __future__ import annotations


class RequestError(ValueError):
    """Bad input: one sentence naming the field or file and what was expected.

    The command line prints it without a traceback and exits with status 2. `path` is
    the field, key by key, where it is known.
    """

    def __init__(self, message: str = "", path: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


class TrainingFailed(RuntimeError):
    """Failure during training (divergence, a full disk): exit status 1, the run is recorded as FAILED."""


class Diverged(TrainingFailed):
    """The loss is not finite or too large, which the hyperparameters caused."""


class WorkersLost(TrainingFailed):
    """A training process has died, which the configuration did not cause: a retry may succeed."""


class NotReplayable(RuntimeError):
    """A training step cannot be recorded once and replayed: the reason, as a clause."""


class ModelFailed(RuntimeError):
    """Error raised by the code of a network, possibly on one of several workers only."""
