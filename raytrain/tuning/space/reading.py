"""Read search spaces from files; errors name the line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from raytrain.config.documents import Lines, read_file
from raytrain.config.fields import Keys, is_text
from raytrain.config.request import Overrides, override, parse_overrides, validated
from raytrain.config.run import RunConfig
from raytrain.core.errors import RequestError
from raytrain.tuning.space.checks import check
from raytrain.tuning.space.search_space import SearchSpace

_OWN = ("search", "budget", "objective", "feasible", "study")  # no field of a run has these names


def read_space(file: Path, overrides: Overrides = ()) -> SearchSpace:
    """A search space from YAML; `overrides` change fields of its base run, or of `search`, `budget`,
    `objective`, `feasible` and `study`.

    Raises:
        RequestError: naming file and line (or the word), the path, and what was expected.
    """
    content, lines = read_file(file, _is_text)
    return _made(content, file.stem, overrides, lambda path: _line(file, lines, path))


def changed_space(
    space: SearchSpace | Mapping[str, Any], overrides: Overrides = ()
) -> SearchSpace:
    """A search space from a record or a mapping, with changes as in `read_space`.

    Raises:
        RequestError: naming the path, and what was expected.
    """
    if isinstance(space, SearchSpace):
        shown = space.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        space = {"name": space.name, **shown}
    return _made(space, "space", overrides, lambda path: "")


def changes_of(overrides: Overrides) -> tuple[dict[str, Any], dict[str, Any]]:
    """What words or a mapping change in the base run, and in the study itself.

    Raises:
        RequestError: naming the word or its key.
    """
    changes = changes_in(overrides)
    own = {path: value for path, value in changes.items() if path.split(".")[0] in _OWN}
    return {path: value for path, value in changes.items() if path not in own}, own


def changes_in(overrides: Overrides) -> Mapping[str, Any]:
    """What words or a mapping change, by dotted path of the base run or of the study.

    Raises:
        RequestError: naming the word or its key.
    """
    if isinstance(overrides, Mapping):
        return overrides
    words = _words(overrides)
    own = [word for word in words if word.partition("=")[0].split(".")[0] in _OWN]
    of_run = parse_overrides(word for word in words if word not in own)
    return {**of_run, **parse_overrides(own, SearchSpace)}


def _words(overrides: Iterable[str]) -> list[str]:
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _made(
    content: Mapping[str, Any],
    name: str,
    overrides: Overrides,
    place: Callable[[tuple[str, ...]], str],
) -> SearchSpace:
    """The space of these fields; an error begins with the word it is about, or else the `place`."""
    overrides = overrides if isinstance(overrides, Mapping) else _words(overrides)
    values = {"name": name, **content}
    of_run, own = changes_of(overrides)
    base = values.get("base") or {}
    if isinstance(base, Mapping):  # anything else is for the validation to refuse
        dotted = {path: value for path, value in base.items() if "." in str(path)}
        nested = {path: value for path, value in base.items() if path not in dotted}
        values["base"] = override(override(nested, dotted), of_run)
    values = override(values, own, SearchSpace)
    try:
        space = validated(SearchSpace, values)
        check(space)
    except RequestError as error:
        word = _word(overrides, error.path)
        where = place(error.path) if word is None else word
        raise RequestError(f"{where}: {error}" if where else str(error), error.path) from None
    return space


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


def _word(overrides: Overrides, path: tuple[str, ...]) -> str | None:
    """The word that a complaint about `path` goes back to; empty for a change that is no word."""
    about = ".".join(path[1:] if path[:1] == ("base",) else path)
    for word in overrides:
        changed = word.partition("=")[0]
        if about == changed or about.startswith(f"{changed}.") or changed.startswith(f"{about}."):
            return "" if isinstance(overrides, Mapping) else word
    return None


def _line(file: Path, lines: Lines, path: tuple[str, ...]) -> str:
    """The line of the file that a complaint about `path` goes back to."""
    known = [path[:length] for length in range(len(path), 0, -1) if path[:length] in lines]
    return f"{file}:{lines[known[0]]}" if known else str(file)
