"""Reading of YAML: literal text for text fields, no duplicate keys, the line of every key.

Keys are always text. A scalar in a text field is literal, even if YAML has another type for it (`no`,
`007`, `2026-11-27`); only an unquoted null is null. Elsewhere YAML's own types hold, except dates and
numbers in base 8 and 60, which stay text until the field is validated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from raytrain.config.fields import Keys
from raytrain.core.errors import RequestError

IsText = Callable[[Keys], bool]
"""Whether a scalar at a place of the document is text."""

Lines = Mapping[Keys, int]
"""Line of each key and list item of a file, from 1."""

_TAG = "tag:yaml.org,2002:"
_TEXT, _NULL = f"{_TAG}str", f"{_TAG}null"
_DATE, _MERGE = f"{_TAG}timestamp", f"{_TAG}merge"
# Types that YAML infers for a plain scalar, beside null.
_GUESSED = [f"{_TAG}{kind}" for kind in ("bool", "int", "float", "timestamp", "merge", "value")]


class Document(NamedTuple):
    """Content of a file, and its lines."""

    values: dict[str, Any]
    lines: Lines


def read_file(file: Path, is_text: IsText) -> Document:
    """Read the mapping in a YAML file; tags never construct objects.

    Raises:
        RequestError: naming the file, and the line where that is known.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        content, lines = _content(root, is_text, ())
    except FileNotFoundError:
        raise RequestError(f"{file}: no such file; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read as a text file ({error})") from None
    except _Twice as error:
        raise RequestError(f"{file}:{error.line}: {error}", error.path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise RequestError(f"{file}: not valid YAML{line} ({_problem(error)})") from None
    if content is None:
        return Document({}, lines)
    if not isinstance(content, dict):
        raise RequestError(f"{file}: expected a mapping of fields, found {type(content).__name__}")
    return Document(content, lines)


def read_value(text: str, is_text: IsText, path: Keys) -> Any:
    """Parse the YAML of a `key=value` word as the value at `path`.

    Raises:
        RequestError: if it is none, or not all of it is (the rest would be a comment).
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None or root.end_mark.index < len(text.rstrip()):
            raise yaml.YAMLError("what follows # would be a comment")
        return _content(root, is_text, path)[0]
    except _Twice as error:
        raise RequestError(str(error), error.path) from None
    except yaml.YAMLError as error:
        said = f"{'.'.join(path)}: the value {text!r} is not valid YAML ({_problem(error)})"
        raise RequestError(said, path) from None


class _Twice(Exception):
    """A key that a mapping has already."""

    def __init__(self, path: Keys, line: int) -> None:
        super().__init__(f"{'.'.join(path)}: given a second time")
        self.path, self.line = path, line


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or (str(error).splitlines() or ["not understood"])[0]


def _content(root: yaml.Node | None, is_text: IsText, path: Keys) -> tuple[Any, Lines]:
    if root is None:
        return None, {}
    reader = _YamlReader(is_text)
    return _Constructor().construct_document(reader.read(root, path)), reader.lines


class _Constructor(SafeConstructor):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):  # 0b_ looks like a number; !!bool x
            problem = f"{node.value!r} is no {node.tag.removeprefix(_TAG)}"
            raise ConstructorError(None, None, problem, node.start_mark) from None


class _YamlReader:
    """Copies the nodes of a document, those of text and of keys being tagged as text."""

    def __init__(self, is_text: IsText) -> None:
        self.lines: dict[Keys, int] = {}
        self._is_text = is_text
        self._open: list[yaml.Node] = []

    def read(self, node: yaml.Node, path: Keys) -> yaml.Node:
        if node in self._open:
            problem = "an alias inside of what it stands for"
            raise ConstructorError(None, None, problem, node.start_mark)
        self._open.append(node)
        if isinstance(node, yaml.ScalarNode):
            copy = _text(node) if self._is_text(path) or _is_surprise(node) else node
        elif isinstance(node, yaml.SequenceNode):
            copy = yaml.SequenceNode(node.tag, self._items(node, path), *_marks(node))
        else:
            copy = yaml.MappingNode(node.tag, self._pairs(node, path), *_marks(node))
        self._open.pop()
        return copy

    def _items(self, node: yaml.Node, path: Keys) -> list[yaml.Node]:
        items: list[yaml.Node] = []
        for number, item in enumerate(node.value):
            inner = (*path, str(number))
            self.lines[inner] = item.start_mark.line + 1
            items.append(self.read(item, inner))
        return items

    def _pairs(self, node: yaml.Node, path: Keys) -> list[tuple[yaml.Node, yaml.Node]]:
        keys: set[str] = set()
        pairs: list[tuple[yaml.Node, yaml.Node]] = []
        # Merged keys come first: own keys of the mapping replace them, and their lines.
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
            inner, line = (*path, str(key.value)), key.start_mark.line + 1
            if inner[-1] in keys:
                raise _Twice(inner, line)
            keys.add(inner[-1])
            if key.tag == _MERGE:
                pairs.append((key, self._merged(value, path)))
            else:
                self.lines[inner] = line
                pairs.append((_text(key, _NULL), self.read(value, inner)))
        return pairs

    def _merged(self, node: yaml.Node, path: Keys) -> yaml.Node:
        if not isinstance(node, yaml.SequenceNode):
            return self.read(node, path)
        several = [self.read(item, path) for item in node.value]
        return yaml.SequenceNode(node.tag, several, *_marks(node))


def _text(node: yaml.Node, *others: str) -> yaml.Node:
    """Return the scalar as text if YAML inferred its tag; as null only if that is in `others`."""
    if node.tag not in (*_GUESSED, *others):
        return node
    return yaml.ScalarNode(_TEXT, node.value, *_marks(node))


def _is_surprise(node: yaml.Node) -> bool:
    """Whether a scalar is a date, or a number in base 60 (1:30) or base 8 (010): rarely intended."""
    number = node.tag in (f"{_TAG}int", f"{_TAG}float")
    return node.tag == _DATE or (number and re.match(r"[-+]?0[0-9_]|.*:", node.value) is not None)


def _marks(node: yaml.Node) -> tuple[Any, Any]:
    return node.start_mark, node.end_mark
