"""Commands of Ray that the README gives have the names and options that Ray's command line has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from ray.scripts.scripts import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "cluster" / "README.md").read_text()


def commands() -> list[tuple[str, ...]]:
    """Every `ray ...` of a shell block or within a line, without raytrain's command after `--`."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
    lines = re.findall(r"^(?:[A-Z_]+=\S+ )*(ray .*)$", blocks, re.MULTILINE)
    lines += re.findall(r"`(ray [^`]+)`", PAGE.replace(blocks, ""))
    found = (shlex.split(re.split(r" -- | > | && ", line)[0], comments=True) for line in lines)
    return list(dict.fromkeys(tuple(words) for words in found))


def test_commands_are_found() -> None:
    assert {words[1] for words in commands()} >= {"start", "stop", "up", "down", "job", "status"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_ray_has_them(words: tuple[str, ...]) -> None:
    command: click.Command = cli
    _, *rest = words
    while isinstance(command, click.Group) and rest:
        name, *rest = rest
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    known = {option for one in command.params for option in one.opts}
    given = {word.partition("=")[0] for word in rest if word.startswith("-")}
    assert given <= known
