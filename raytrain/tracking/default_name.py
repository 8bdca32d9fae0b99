"""The name of a run where none is given: algorithm, data, and what differs from the defaults."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytrain.config.run import RunConfig
from raytrain.tracking.data_sets import data_name

LONGEST = 60  # characters

_FIRST = ("model", "threat", "algorithm", "outer", "optimizer", "seed", "epochs", "fe_per_image")
"""Fields that are named before others."""
_SHORT = ("model", "data", "threat", "algorithm", "outer", "optimizer")
"""Records whose fields are named without them."""
_UNNAMED = ("data.root", "data.test_path", "model.mean", "model.std")
"""Fields that are not named: where files are, and what is too long."""
_KINDS = ("name", "kind")  # fields named by their record


def default_name(run: RunConfig) -> str:
    """The name of a run as a function of what its signature depends on: `dynamic-digits-c_max0.3-epochs30`.

    Algorithm, its preset, the outer update unless it is sgd, the data set, and the fields that are not as
    they would be by default; of letters, digits, `.`, `_` and `-` only. What does not fit into `LONGEST`
    characters, or cannot be written exactly, is replaced by the beginning of the signature.
    """
    preset = getattr(run.algorithm, "preset", None)
    outer = None if run.outer.name == "sgd" else run.outer.name
    known = [run.algorithm.name, preset, outer, data_name(run.data)]
    parts = [_cleaned(str(word).rpartition(":")[2]) for word in known if word is not None]
    default = _default(run)
    exact = default is not None
    mark = run.signature()[:6]
    for path, value in [] if default is None else _differing(run, default):
        text, whole = _text(path, value)
        fits = len("-".join([*parts, text, mark])) <= LONGEST
        exact = exact and whole and fits
        if not fits:
            break
        parts.append(text)
    name = "-".join(parts if exact else [*parts, mark])
    return name if len(name) <= LONGEST else f"{name[: LONGEST - len(mark) - 1]}-{mark}"


def _default(run: RunConfig) -> RunConfig | None:
    """The run of the same algorithm, outer update and data with all else left out; None if there is none."""
    algorithm = {"name": run.algorithm.name, "preset": getattr(run.algorithm, "preset", None)}
    values = {
        "data": {"name": run.data.name},
        "algorithm": {key: value for key, value in algorithm.items() if value is not None},
        "outer": {"name": run.outer.name},
    }
    with suppress(ValidationError):
        return RunConfig.model_validate(values)
    return None


def _differing(run: RunConfig, default: RunConfig) -> list[tuple[str, Any]]:
    """The fields that differ, by path, with their values in `run`."""
    here, there = (one.computed() for one in (run, default))
    ranks = {name: rank for rank, name in enumerate(_FIRST)}
    found = (item for item in _changes(here, there) if item[0] not in _UNNAMED)
    return sorted(found, key=lambda item: ranks.get(item[0].partition(".")[0], len(ranks)))


def _changes(here: Mapping[str, Any], there: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in here.items():
        before = there.get(key) if isinstance(there, Mapping) else None
        if isinstance(value, Mapping):
            yield from _changes(value, before, f"{prefix}{key}.")
        elif value != before:
            yield prefix + key, value


def _text(path: str, value: Any) -> tuple[str, bool]:
    """A field in a name, `epochs30` or `model_resnet18`, and whether it is exact."""
    label = path.partition(".")[2] if path.partition(".")[0] in _SHORT else path
    parent, _, last = path.rpartition(".")
    if path == "model.weights" and value is not None:
        value = Path(value).stem
    if last in _KINDS:
        label = parent.removeprefix("algorithm.")
    if isinstance(value, float):
        written, exact = _number(value)
    else:
        plain = {True: "on", False: "off", None: "none"}
        written = plain[value] if value is None or isinstance(value, bool) else str(value)
        exact = re.fullmatch(r"[\w.*/-]{1,24}", written, re.ASCII) is not None
    apart = "" if written[:1].isdigit() else "_"
    return _cleaned(f"{label}{apart}{written[:24]}"), exact


def _number(value: float) -> tuple[str, bool]:
    """Four digits, or 255ths where those are exact: `8_255`."""
    text = f"{value:.4g}"
    if float(text) == value:
        return text, True
    levels = round(255 * value) if math.isfinite(value) else 0
    return (f"{levels}_255", True) if levels / 255 == value else (text, False)


def _cleaned(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_.-") or "run"
