"""A complete run file: every field with its value, its meaning as a comment."""

from __future__ import annotations

import math
from typing import Any

import yaml

from raytrain.config.field_list import RunField, fields_of
from raytrain.config.run import RunConfig

_COMMENT = 34  # column of comments
_WIDTH = 130  # a comment that would end beyond it has a line of its own


def complete_run_file(run: RunConfig) -> str:
    """The YAML of a run with all its fields, which `raytrain train` reads as the same run.

    Fields of records that the run does not have are comments.
    """
    lines = ["# raytrain train FILE"]
    nested = True
    for field in fields_of(run):
        inner = "." in field.path
        if not inner and (nested or _is_group(field)):
            lines.append("")
        lines += _lines(field)
        nested = inner
    return "\n".join(lines) + "\n"


def _lines(field: RunField) -> list[str]:
    *parents, name = field.path.split(".")
    indent = "  " * len(parents)
    text = f"{name}:" if _is_group(field) else f"{name}: {_value(field)}"
    text = f"{indent}{text}" if field.there else f"# {indent}{text}"
    comment = f"# {_comment(field)}"
    if max(len(text) + 2, _COMMENT) + len(comment) <= _WIDTH:
        return [f"{text:<{_COMMENT - 2}}  {comment}"]
    return [text[: len(text) - len(text.lstrip())] + comment, text]


def _is_group(field: RunField) -> bool:
    """Whether its fields follow, and its own line has no value."""
    if not field.there:
        return field.record
    return field.record and field.value not in (None, {})


def _comment(field: RunField) -> str:
    """The meaning; of a value, what it may be and the default if it is another."""
    if _is_group(field):
        return field.description or "by name"
    default = f"default {field.shown(field.default)}" if field.changed else ""
    if field.required:
        default = "required"
    said = (field.description, field.values) if not field.selects else (field.values,)
    return "; ".join(filter(None, [*said, default]))


def _value(field: RunField) -> str:
    value = field.value
    if not field.there and field.required:
        return "..."
    if isinstance(value, float) and math.isfinite(value) and "/" in field.shown(value):
        return field.shown(value)
    return _plain(value)


class _OneLine(yaml.SafeDumper):
    """YAML without line breaks: text that has some is written with escapes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _text)


def _plain(value: Any) -> str:
    """The YAML of a plain value on one line."""
    text = yaml.dump(
        value, Dumper=_OneLine, default_flow_style=True, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("...\n").rstrip("\n")
