"""Import and execution of user code, with its errors as one sentence with file and line."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from raytrain.core.errors import ModelFailed, RequestError
from raytrain.core.failures import error_summary


def import_object(address: str, field: str, what: str) -> tuple[ModuleType, Any]:
    """Import the module of an address `module:name` and return it with its attribute `name`, else None.

    `what` is the word for the name in the message about a malformed address.

    Raises:
        RequestError: naming `field`, if it is no address or the module cannot be imported.
    """
    path, _, name = address.partition(":")
    if not all(part.isidentifier() for part in [*path.split("."), *name.split(".")]):
        raise RequestError(f"{field}: {address!r} is not of the form module:{what}")
    module = _module(path, field)
    found: Any = module
    with seeded_generator(), user_code_errors(address, "cannot be looked up", field):
        for part in name.split("."):
            found = getattr(found, part, None)
    return module, found


def _module(path: str, field: str) -> ModuleType:
    with seeded_generator(), user_code_errors(path, "cannot be imported", field):
        try:
            return import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise  # a module that this one imports
            raise RequestError(
                f"{field}: {path} cannot be imported ({error}); expected a module in "
                f"{Path.cwd()} or an installed one"
            ) from error


@contextmanager
def user_code_errors(name: str, deed: str, field: str = "model.name") -> Iterator[None]:
    """Run user code. After an error the message is that of `sentence`, with `deed` and `field`.

    Generators of Python and numpy start from torch's seed, so that weights drawn from them are a
    function of the run's seed. Afterwards these generators and torch's global settings are restored.

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
        raise RequestError(sentence(name, deed, error, field)) from error


@contextmanager
def seeded_generator() -> Iterator[None]:
    """Seed torch's generator on the CPU with 0 inside the block; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def sentence(name: str, deed: str, error: BaseException, field: str = "model.name") -> str:
    """`FIELD: NAME DEED: TypeError (its message) at file:line`."""
    return f"{field}: {name} {deed}: {error_summary(error)}"


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
