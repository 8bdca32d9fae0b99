"""A document is what was written: no key twice, no alias of itself, every key with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytrain.config.documents import Lines, read_file, read_value
from raytrain.config.fields import Keys
from raytrain.core.errors import RequestError


def is_text(path: Keys) -> bool:
    return path[-1:] == ("text",)


def read(tmp_path: Path, text: str) -> tuple[dict[str, Any], Lines]:
    file = tmp_path / "it.yaml"
    file.write_text(text, encoding="utf-8")
    return read_file(file, is_text)


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(RequestError) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path / 'it.yaml'}")


def test_an_alias_is_text_where_text_is_wanted_and_a_number_where_not(tmp_path: Path) -> None:
    values, _ = read(tmp_path, "a: {text: &n 12, number: *n}\nb: &no no\ntext: *no\n")
    assert values == {"a": {"text": "12", "number": 12}, "b": False, "text": "no"}


def test_a_merged_mapping_gives_its_keys_and_their_lines_unless_they_are_there(
    tmp_path: Path,
) -> None:
    text = "a: &a\n  x: 1\n  text: no\nb:\n  x: 2\n  <<: *a\nc:\n  <<: [*a, {x: 3, y: 4}]\n"
    values, lines = read(tmp_path, text)
    assert values["b"] == {"x": 2, "text": "no"}
    assert values["c"] == {"x": 1, "text": "no", "y": 4}
    assert (lines["b", "x"], lines["b", "text"], lines["c", "x"]) == (5, 3, 8)


def test_the_line_of_every_key_and_item_is_known(tmp_path: Path) -> None:
    _, lines = read(tmp_path, "a:\n  b: [1,\n    2]\n# nothing\nc: {d: 1}\n")
    assert lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "b", "0"): 2,
        ("a", "b", "1"): 3,
        ("c",): 5,
        ("c", "d"): 5,
    }


def test_keys_are_text(tmp_path: Path) -> None:
    values, _ = read(tmp_path, "{no: 1, 007: 2, 2026-11-27: 3, null: 4, 1.0: 5, =: 6}")
    assert values == {"no": 1, "007": 2, "2026-11-27": 3, "null": 4, "1.0": 5, "=": 6}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 3\nseed: 1\nepochs: 3\n", ":3: epochs: given a second time"),
        ("a:\n  b: {c: 1,\n    c: 2}\n", ":3: a.b.c: given a second time"),
        ("a: [{b: 1}, {b: 1, b: 2}]\n", ":1: a.1.b: given a second time"),
        ("1: x\n'1': y\n", ":2: 1: given a second time"),
        ("a: &a {b: *a}\n", ": not valid YAML in line 1 (an alias inside of what it stands for)"),
        (
            "a: &a [1, [*a]]\n",
            ": not valid YAML in line 1 (an alias inside of what it stands for)",
        ),
        ("a: *b\n", ": not valid YAML in line 1 (found undefined alias 'b')"),
        ("a: 1\nb: 0x_\n", ": not valid YAML in line 2 ('0x_' is no int)"),
        ("a: !!bool maybe\n", ": not valid YAML in line 1 ('maybe' is no bool)"),
        ("text: !mine x\n", ": not valid YAML in line 1 (could not determine a constructor"),
        ("text: !!python/name:os.getpid\n", ": not valid YAML in line 1 (could not determine"),
        ("? [a]\n: 1\n", ": not valid YAML in line 1 (found unhashable key)"),
        ("a: 1\n---\nb: 2\n", ": not valid YAML in line 2 (but found another document)"),
        ("- 1\n", ": expected a mapping of fields, found list"),
        ("2026-11-27\n", ": expected a mapping of fields, found str"),
    ],
)
def test_what_is_no_document_is_answered_with_its_line(
    text: str, said: str, tmp_path: Path
) -> None:
    assert complaint(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("007", "007"),
        ("010", "010"),
        ("-010", "-010"),
        ("0", 0),
        ("0.5", 0.5),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2026-11-27", "2026-11-27"),
        ("2026-13-45", "2026-13-45"),
        ("[1, {a: no}]", [1, {"a": False}]),
        (" '7' ", "7"),
        ("null", None),
    ],
)
def test_a_value_that_is_no_text_is_yaml_without_its_surprises(text: str, value: Any) -> None:
    assert read_value(text, is_text, ("x",)) == value


@pytest.mark.parametrize("text", ["3 # three", "# three", "[1] #", "a # b", "{a: 1} # b"])
def test_a_comment_is_no_part_of_a_value(text: str) -> None:
    with pytest.raises(RequestError, match=r"^x\.y: the value .* is not valid YAML .*comment"):
        read_value(text, is_text, ("x", "y"))
