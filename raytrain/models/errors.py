"""Errors of code that is not raytrain's: what was raised, and in which line, as one sentence."""

from __future__ import annotations

import random
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from raytrain.types import RequestError

_PACKAGES = ("site-packages", "dist-packages")
_PYTHON = sysconfig.get_paths()["stdlib"]
_OURS = [str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)]
_OURS.append(f"{_OURS[-1]}vision")
_LONGEST = 300  # characters of a message


class ModelFailed(RuntimeError):
    """The forward pass of a network raised an error, at any time."""


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


def told(error: BaseException) -> str:
    """The kind of an error, its message in one line, and where it was raised."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # its own __str__ fails
        text = ""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    line = " ".join(words)[:_LONGEST]
    kind = type(error).__name__
    return (f"{kind} ({line})" if line else kind) + _where(error)


def _where(error: BaseException) -> str:
    """` at file:line` of the innermost frame that belongs to the user, if there is one.

    That is code which is not installed; for a network of an installed package, code of a package.
    """
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f" at {error.filename}:{error.lineno}"
    found: dict[bool, str] = {}
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        packaged = any(part in _PACKAGES for part in Path(file).parts)
        # Generated code and the import system have names in angle brackets.
        if not (file.startswith(("<", *_OURS)) or (file.startswith(_PYTHON) and not packaged)):
            found[packaged] = f" at {file}:{line}"
    return found.get(False) or found.get(True, "")


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
