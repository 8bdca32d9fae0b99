"""Read search spaces from files; errors name the line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raytrain.config.documents import Lines, read_file
from raytrain.config.fields import Keys, is_text
from raytrain.config.request import override, parse_overrides, validated
from raytrain.config.run import RunConfig
from raytrain.core.types import RequestError
from raytrain.tuning.space.checks import check
from raytrain.tuning.space.search_space import SearchSpace

_OWN = ("search", "budget", "objective", "feasible", "study")  # no field of a run has these names


def read_space(file: Path, overrides: Iterable[str] = ()) -> SearchSpace:
    """A search space from YAML; `key=value` words change fields of its base run, or of `search`,
    `budget`, `objective`, `feasible` and `study`.

    Raises:
        RequestError: naming file and line (or the word), the path, and what was expected.
    """
    words = list(overrides)
    content, lines = read_file(file, _is_text)
    values = {"name": file.stem, **content}
    of_run, own = changes_of(words)
    base = values.get("base") or {}
    if isinstance(base, dict):  # anything else is for the validation to refuse
        values["base"] = override(base, of_run)
    values = override(values, own, SearchSpace)
    try:
        space = validated(SearchSpace, values)
        check(space)
    except RequestError as error:
        raise RequestError(
            f"{_place(file, lines, words, error.path)}: {error}", error.path
        ) from None
    return space


def changes_of(words: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `key=value` words change in the base run, and in the study itself.

    Raises:
        RequestError: naming the word or its key.
    """
    words = list(words)
    own = [word for word in words if word.partition("=")[0].split(".")[0] in _OWN]
    return (
        parse_overrides(word for word in words if word not in own),
        parse_overrides(own, SearchSpace),
    )


def _is_text(path: Keys) -> bool:
    """Whether a scalar at a place of the file is free text, as in a run."""
    if path[:1] == ("base",):
        return is_text(RunConfig, path[1:])
    if path[:1] == ("space",) and len(path) > 2:
        return _is_text_of(path[1], path[2:])
    return is_text(SearchSpace, path)


def _is_text_of(field: str, place: Keys) -> bool:
    """The same within what stands for a field of the run: its options are text where it is."""
    if place[0].isdigit():  # one of several dimensions of the field
        place = place[1:]
    match place:
        case ("branch", _, inner, *rest) if rest:
            return _is_text_of(inner, tuple(rest))
        case ("choice" | "also", _):
            return is_text(RunConfig, tuple(field.split(".")))
        case ("when", other, *_):
            return is_text(RunConfig, tuple(other.split(".")))
        case _:
            return is_text(SearchSpace, ("space", field, *place))


def _place(file: Path, lines: Lines, words: Iterable[str], path: tuple[str, ...]) -> str:
    """The word or the line that a complaint about `path` goes back to."""
    about = ".".join(path[1:] if path[:1] == ("base",) else path)
    for word in words:
        changed = word.partition("=")[0]
        if about == changed or about.startswith(f"{changed}.") or changed.startswith(f"{about}."):
            return word
    known = [path[:length] for length in range(len(path), 0, -1) if path[:length] in lines]
    return f"{file}:{lines[known[0]]}" if known else str(file)
