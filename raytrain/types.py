"""Words shared by everything else: frozen specifications, shapes, batches, and the errors a user meets."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RequestError(ValueError):
    """The request itself is wrong: one sentence naming the field or file and what was expected.

    The command line prints it without a traceback and exits with status 2.
    """


class TrainingFailed(RuntimeError):
    """Training began and cannot go on (divergence, a full disk): exit status 1, the run FAILED."""


class Spec(BaseModel):
    """Hyperparameters and behaviour in one frozen object; what changes while training lives elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
