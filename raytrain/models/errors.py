"""Errors of code that is not raytrain's: what was raised, and in which line, as one sentence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from raytrain.core.failures import told
from raytrain.core.types import ModelFailed, RequestError


@contextmanager
def guarded(name: str, deed: str) -> Iterator[None]:
    """Run code of the user before training. `deed` says what was not possible if it raises.

    Generators of Python and numpy start from torch's seed, so that weights drawn from them are a
    function of the run's seed. Afterwards these generators and torch's global settings are as before.

    Raises:
        RequestError: instead of any error inside, SystemExit too; only Ctrl-C passes.
    """
    try:
        with _global_state_kept():
            random.seed(torch.initial_seed())
            np.random.seed(torch.initial_seed() % 2**32)
            yield
    except (KeyboardInterrupt, GeneratorExit, RequestError):
        raise
    except ModelFailed as failed:
        raise RequestError(str(failed)) from failed.__cause__
    except BaseException as error:
        raise RequestError(sentence(name, deed, error)) from error


@contextmanager
def isolated() -> Iterator[None]:
    """torch's generator on the CPU starts from 0 inside, and is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def sentence(name: str, deed: str, error: BaseException) -> str:
    """`model.name: NAME DEED: TypeError (its message) at file:line`."""
    return f"model.name: {name} {deed}: {told(error)}"


@contextmanager
def _global_state_kept() -> Iterator[None]:
    python, legacy = random.getstate(), np.random.get_state()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
