"""Search spaces from files: what is wrong is told with its line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from raytrain.request import override, parse_overrides, read_yaml, validated
from raytrain.spaces.space import SearchSpace
from raytrain.types import RequestError

_OWN = ("search", "budget", "objective", "feasible", "study")  # no field of a run has these names

Lines = Mapping[tuple[str, ...], int]
"""Where each key of a file is, from 1."""


def read_space(file: Path, overrides: Iterable[str] = ()) -> SearchSpace:
    """A search space from YAML; `key=value` words change fields of its base run, or of `search`,
    `budget`, `objective`, `feasible` and `study`.

    Raises:
        RequestError: naming file and line (or the word), the path, and what was expected.
    """
    words = list(overrides)
    values = {"name": file.stem, **read_yaml(file)}
    lines = _lines(file)
    changes = parse_overrides(words)
    own = {path: value for path, value in changes.items() if path.split(".")[0] in _OWN}
    base = values.get("base") or {}
    if isinstance(base, dict):  # anything else is for the validation to refuse
        of_run = {path: value for path, value in changes.items() if path not in own}
        values["base"] = override(base, of_run)
    values = override(values, own)
    try:
        space = validated(SearchSpace, values)
        space.check()
    except RequestError as error:
        raise RequestError(
            f"{_place(file, lines, words, error.path)}: {error}", error.path
        ) from None
    return space


def _place(file: Path, lines: Lines, words: Iterable[str], path: tuple[str, ...]) -> str:
    """The word or the line that a complaint about `path` goes back to."""
    about = ".".join(path[1:] if path[:1] == ("base",) else path)
    for word in words:
        changed = word.partition("=")[0]
        if about == changed or about.startswith(f"{changed}.") or changed.startswith(f"{about}."):
            return word
    known = [path[:length] for length in range(len(path), 0, -1) if path[:length] in lines]
    return f"{file}:{lines[known[0]]}" if known else str(file)


def _lines(file: Path) -> Lines:
    """The line of every key and list item of a YAML file.

    Raises:
        RequestError: if a key is given twice.
    """
    found: dict[tuple[str, ...], int] = {}
    seen: set[int] = (
        set()
    )  # a node that is written once and meant again is told by its first place
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    waiting: list[tuple[Any, tuple[str, ...]]] = [(root, ())]
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for key, line, value in _children(node):
            inner = (*path, key)
            if inner in found and isinstance(node, yaml.MappingNode):
                raise RequestError(f"{file}:{line}: {'.'.join(inner)}: given a second time", inner)
            found[inner] = line
            waiting.append((value, inner))
    return found


def _children(node: Any) -> list[tuple[str, int, Any]]:
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value), key.start_mark.line + 1, value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(str(n), one.start_mark.line + 1, one) for n, one in enumerate(node.value)]
    return []
