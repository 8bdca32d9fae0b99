"""Expressions are Python's arithmetic on numbers, and nothing else of Python."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.tuning.space.expressions import Absent, parse

FIELDS = {"algorithm.steps": 5, "threat.eps": 0.1, "$reach": 2.5, "algorithm.name": "pgd"}

Number = int | float
Case = tuple[str, Callable[[], Any]]  # an expression, and what Python makes of it


def of(name: str) -> Any:
    if name not in FIELDS:
        raise Absent(name)
    return FIELDS[name]


def value(text: str) -> Any:
    return parse(text).value(of)


# --- the arithmetic is Python's ---------------------------------------------------------------

BINARY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}
COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
CALLS = {"abs": abs, "floor": math.floor, "ceil": math.ceil, "round": round}


def leaves() -> st.SearchStrategy[Case]:
    whole = st.integers(0, 1000).map(lambda n: (str(n), lambda: n))
    real = st.floats(0, 1e6, allow_subnormal=False).map(lambda x: (repr(x), lambda: x))
    names = st.sampled_from([name for name in FIELDS if name != "algorithm.name"])
    return whole | real | names.map(lambda name: (name, lambda: FIELDS[name]))


def larger(inner: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    def binary(case: tuple[str, Case, Case]) -> Case:
        sign, (left, a), (right, b) = case
        return f"({left} {sign} {right})", lambda: BINARY[sign](a(), b())

    def minus(case: Case) -> Case:
        return f"(-{case[0]})", lambda: -case[1]()

    def call(case: tuple[str, Case]) -> Case:
        name, (text, a) = case
        return f"{name}({text})", lambda: CALLS[name](a())

    def extreme(case: tuple[str, Case, Case]) -> Case:
        name, (left, a), (right, b) = case
        chosen = min if name == "min" else max
        return f"{name}({left}, {right})", lambda: chosen(a(), b())

    def either(case: tuple[str, Case, Case, Case, Case]) -> Case:
        sign, (left, a), (right, b), (then, c), (other, d) = case
        return (
            f"({then} if {left} {sign} {right} else {other})",
            lambda: c() if COMPARE[sign](a(), b()) else d(),
        )

    return (
        st.tuples(st.sampled_from(list(BINARY)), inner, inner).map(binary)
        | inner.map(minus)
        | st.tuples(st.sampled_from(list(CALLS)), inner).map(call)
        | st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(extreme)
        | st.tuples(st.sampled_from(list(COMPARE)), inner, inner, inner, inner).map(either)
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(leaves(), larger, max_leaves=12))
def test_arithmetic_is_pythons(case: Case) -> None:
    text, python = case
    if len(text) > 1000:
        return
    try:
        expected = python()
    except (ZeroDivisionError, OverflowError, ValueError):
        expected = None
    if expected is None or not math.isfinite(expected):
        with pytest.raises(ValueError, match="has no value"):
            value(text)
    else:
        found = value(text)
        assert found == expected and type(found) is type(expected)


@given(st.integers(-50, 50), st.integers(-20, 20), st.integers(-20, 20))
def test_operators_bind_as_in_python(a: int, b: int, c: int) -> None:
    assert value(f"{a} + {b} * {c} - -{abs(a)}") == a + b * c + abs(a)
    assert value(f"2 ** -1 ** 2 * {c}") == 0.5 * c
    assert value(f"-2 ** 2 + {a}") == a - 4
    assert value(f"{a} < {b} <= {c}") == (a < b <= c)
    assert value(f"{a} < {b} or {b} < {c} and not {a} == {c}") == (a < b or (b < c and a != c))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8/255", 8 / 255),
        ("$reach * threat.eps / algorithm.steps", 2.5 * 0.1 / 5),
        ("algorithm.name == 'natural' or algorithm.steps <= 8", True),
        ('algorithm.name in ["pgd", "trades"]', True),
        ("algorithm.name not in ('pgd', 'trades')", False),
        ("null == null", True),
        ("true and not false", True),
        ("sqrt(16) + log(exp(2)) + log(8, 2)", 4.0 + 2.0 + 3.0),
        ("round(3.14159, 2)", 3.14),
        ("'$reach' == '$reach'", True),  # within quotes a dollar is a dollar
        ("  1 +\n 2 ", 3),
        ("2 ** 10", 1024),
        ("2 ** 0.5", 2**0.5),
        ("(-8) ** 3", -512),
    ],
)
def test_expressions_have_the_values_of_a_search_space(text: str, expected: Any) -> None:
    assert value(text) == expected


def test_the_names_of_an_expression_are_its_paths() -> None:
    names = parse("$reach * threat.eps if algorithm.name == 'a.b' else min(epochs, 3)").names
    assert names == {"$reach", "threat.eps", "algorithm.name", "epochs"}


def test_what_decides_early_needs_no_other_names() -> None:
    assert value("algorithm.name == 'pgd' or algorithm.beta > 3") is True
    assert value("algorithm.name == 'mart' and algorithm.beta > 3") is False
    assert value("1 if algorithm.name == 'pgd' else algorithm.beta") == 1
    with pytest.raises(Absent) as caught:
        value("algorithm.name == 'mart' or algorithm.beta > 3")
    assert caught.value.name == "algorithm.beta"


# --- how much is missing ----------------------------------------------------------------------


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(-9, 9))
def test_a_comparison_is_broken_by_the_difference_of_its_sides(a: int, b: int, c: int) -> None:
    def excess(text: str) -> float:
        return parse(text).excess(of)

    assert excess(f"{a} >= {b}") == b - a
    assert excess(f"{a} <= {b}") == a - b
    assert excess(f"{a} <= {b} <= {c}") == max(a - b, b - c)
    for sign, holds in COMPARE.items():
        assert (excess(f"{a} {sign} {b}") <= 0) == holds(a, b)
    assert (excess(f"{a} < {b} or {b} < {c}") <= 0) == (a < b or b < c)
    assert excess(f"not {a} < {b}") in (-1.0, 1.0)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "__import__('os')",
        "eval('1')",
        "print(1)",
        "algorithm.steps.__class__",
        "(1).real",
        "'a'.upper()",
        "algorithm.copy()",
        "lambda: 1",
        "(lambda x: x)(1)",
        "[x for x in [1]]",
        "[1, 2]",
        "{1: 2}",
        "{1, 2}",
        "algorithm[0]",
        "(x := 3)",
        "f'{1}'",
        "1j",
        "b'a'",
        "...",
        "~1",
        "1 << 900",
        "1 & 1",
        "1 | 2",
        "1 @ 2",
        "1 is 1",
        "'a' in 'abc'",
        "1 == [1]",
        "min(*[1, 2])",
        "min()",
        "round(1, ndigits=2)",
        "abs(1, 2)",
        "1; 2",
        "a = 1",
        "",
        "1 +",
        "$",
        "$1",
        "1e999",
        "(" * 300 + "1" + ")" * 300,
        "-" * 900 + "1",
        "1+" * 90 + "1",
        "1" * 1001,
        "\0",
        "await x",
        "yield",
    ],
)
def test_everything_else_is_refused_when_it_is_read(text: str) -> None:
    if text == "algorithm.steps.__class__":  # a name like any other, that no configuration has
        with pytest.raises(Absent):
            value(text)
        return
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "9 ** 9 ** 9",
        "10 ** 1000000000",
        "(-10) ** 1000000000",
        "2.0 ** 5000",
        "round(5, -1000000000)",
        "round(5, 0.5)",
        "(-1) ** 0.5",
        "(-1.5) ** 1.5",
        "1 / 0",
        "0 ** -1",
        "1 % 0",
        "sqrt(-1)",
        "log(0)",
        "exp(1000)",
        "floor(1e308 * 10)",
        "1e308 * 10",
        "'a' * 1000000000",
        "'a' + 'b'",
        "'%d' % 3",
        "-'a'",
        "'a' < 'b'",
        "null + 1",
        "min('a', 1)",
        "algorithm.name * 2",
    ],
)
def test_what_has_no_value_is_answered_and_never_computed_at_length(text: str) -> None:
    with pytest.raises(ValueError, match="has no value"):
        value(text)


@pytest.mark.parametrize("base", [2, 3, 10, -7])
def test_integer_powers_are_bounded_just_beyond_what_a_float_holds(base: int) -> None:
    assert value(f"({base}) ** 100") == base**100
    with pytest.raises(ValueError, match="too large"):
        value(f"({base}) ** 1100")


def test_a_complaint_shows_the_expression_and_the_part_that_is_not_allowed() -> None:
    with pytest.raises(ValueError) as caught:
        parse("$reach + open('x')")
    assert "$reach + open('x')" in str(caught.value) and "sqrt" in str(caught.value)
    assert "\n" not in str(caught.value)
