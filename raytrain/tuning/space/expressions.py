"""Arithmetic in a search space: `$reach * threat.eps / algorithm.steps`, `algorithm.steps <= 8`.

Text is parsed into Python's syntax tree, and every node that is allowed is turned into a closure of
our own: nothing is executed by Python, and nodes outside the tables here are refused.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Callable[[str], Any]
"""What a name stands for; raises `Absent` where there is no such field."""

Numeric = float | int
_Code = Callable[[Values], Any]

_LONGEST, _DEEPEST = 1000, 40  # characters, nested operations
_BITS = 1024  # of an integer power: what a float can hold
_DOLLAR = "_"  # no field begins with it: `$reach` is read as `_.reach`
_DOLLARS = re.compile(r"""('[^']*'|"[^"]*")|\$([A-Za-z]\w*)""")
_WORDS = {"true": True, "false": False, "null": None}


class Absent(LookupError):
    """A name that the configuration at hand has no field for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Expression:
    """A parsed expression: its text, the names in it, and its value given theirs."""

    text: str
    names: frozenset[str]
    _code: _Code
    _margin: _Code | None

    def value(self, values: Values) -> Any:
        """The value.

        Raises:
            ValueError: if it has none (division by zero, a string in a sum).
            Absent: if it needs a name that this configuration does not have.
        """
        return self._run(self._code, values)

    def excess(self, values: Values) -> float:
        """By how much the condition is broken: b - a for `a >= b`; at most 0 where it holds."""
        if self._margin is not None:
            return self._run(self._margin, values)
        return -1.0 if self.value(values) else 1.0

    def _run(self, code: _Code, values: Values) -> Any:
        try:
            result = code(values)
        except (ZeroDivisionError, OverflowError, ValueError) as error:
            raise ValueError(f"{self.text!r} has no value: {error}") from None
        if isinstance(result, float) and not math.isfinite(result):
            raise ValueError(f"{self.text!r} has no value: it is {result}")
        return result


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """Read an expression.

    Raises:
        ValueError: naming what is not understood or not allowed.

    >>> values = {"$reach": 2, "threat.eps": 0.1, "algorithm.steps": 4}.__getitem__
    >>> parse("$reach * threat.eps / algorithm.steps").value(values)
    0.05
    >>> sorted(parse("algorithm.steps <= 8 or algorithm.name == 'pgd'").names)
    ['algorithm.name', 'algorithm.steps']
    >>> parse("algorithm.steps <= 3").excess(values)
    1.0
    >>> parse("open('file')")
    Traceback (most recent call last):
    ValueError: "open('file')": "open('file')" (Call) is not allowed; expected numbers, ...
    """
    if len(text) > _LONGEST:
        raise ValueError(f"expected at most {_LONGEST} characters, found {len(text)}")
    spelled = _DOLLARS.sub(lambda m: m[1] or f"{_DOLLAR}.{m[2]}", text.replace("\n", " ").strip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Python's style, of no concern here
            tree = ast.parse(spelled, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        problem = getattr(error, "msg", None) or "too deep"
        raise ValueError(f"{text!r} is not an expression ({problem})") from None
    reader = _Reader(text)
    code, margin = reader.whole(tree)
    return Expression(text, frozenset(reader.names), code, margin)


def _power(base: Numeric, exponent: Numeric) -> Numeric:
    """base ** exponent, but never an integer of more than 1024 bits, nor a complex number."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if abs(base) > 1 and exponent * (abs(base).bit_length() - 1) >= _BITS:
            raise ValueError("the power is too large")
    elif base < 0 and exponent != int(exponent):
        raise ValueError("the power of a negative number is not a number")
    return base**exponent


def _round(value: Numeric, digits: Any = 0) -> Numeric:
    if not isinstance(digits, int) or abs(digits) > 30:
        raise ValueError("round takes at most 30 digits")
    return round(value, digits) if digits else round(value)


_ARITHMETIC: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_ORDER: Mapping[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_LIKENESS: Mapping[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda one, several: one in several,
    ast.NotIn: lambda one, several: one not in several,
}
_FUNCTIONS: Mapping[str, tuple[Callable[..., Any], int, int]] = {  # with how many arguments
    "min": (lambda *several: min(several), 1, 100),
    "max": (lambda *several: max(several), 1, 100),
    "abs": (abs, 1, 1),
    "round": (_round, 1, 2),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 2),
    "exp": (math.exp, 1, 1),
}


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {value!r}")
    return value


class _Reader:
    """From syntax tree to closures."""

    def __init__(self, text: str) -> None:
        self.names: set[str] = set()
        self._text, self._depth = text, 0

    def whole(self, tree: ast.expr) -> tuple[_Code, _Code | None]:
        """The code of an expression and, for a comparison of size, that of its excess."""
        code = self.code(tree)
        if isinstance(tree, ast.Compare) and all(type(op) in _ORDER for op in tree.ops):
            return code, self._margin(tree)
        return code, None

    def code(self, node: ast.expr) -> _Code:
        read = _NODES.get(type(node))
        if read is None:
            raise self._refused(node)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"{self._text!r} is nested too deeply")
        code = read(self, node)
        self._depth -= 1
        return code

    def constant(self, node: ast.Constant) -> _Code:
        value = node.value
        if value is not None and not isinstance(value, bool | int | float | str):
            raise self._refused(node)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{self._text!r}: a number is too large")
        return lambda values: value

    def name(self, node: ast.Name) -> _Code:
        if node.id in _WORDS:
            word = _WORDS[node.id]
            return lambda values: word
        return self._called(node.id)

    def path(self, node: ast.Attribute) -> _Code:
        parts: list[str] = []
        here: ast.expr = node
        while isinstance(here, ast.Attribute):
            parts.append(here.attr)
            here = here.value
        if not isinstance(here, ast.Name):
            raise self._refused(node)
        name = ".".join([here.id, *reversed(parts)])
        return self._called(f"${parts[0]}" if name == f"{_DOLLAR}.{parts[0]}" else name)

    def unary(self, node: ast.UnaryOp) -> _Code:
        code = self.code(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda values: not code(values)
        if isinstance(node.op, ast.Invert):
            raise self._refused(node)
        if isinstance(node.op, ast.USub):
            return lambda values: -_number(code(values))
        return lambda values: +_number(code(values))

    def binary(self, node: ast.BinOp) -> _Code:
        if type(node.op) not in _ARITHMETIC:
            raise self._refused(node)
        combine = _ARITHMETIC[type(node.op)]
        left, right = self.code(node.left), self.code(node.right)
        return lambda values: combine(_number(left(values)), _number(right(values)))

    def boolean(self, node: ast.BoolOp) -> _Code:
        codes = [self.code(one) for one in node.values]
        ends_at = isinstance(node.op, ast.Or)  # the truth that decides at once

        def first_that_decides(values: Values) -> Any:
            result = None
            for code in codes:
                result = code(values)
                if bool(result) == ends_at:
                    break
            return result

        return first_that_decides

    def comparison(self, node: ast.Compare) -> _Code:
        first, *others = [self._operand(one) for one in [node.left, *node.comparators]]
        kinds = [type(op) for op in node.ops]
        for kind, side in zip(kinds, node.comparators, strict=True):
            if kind not in _ORDER and kind not in _LIKENESS:
                raise self._refused(node)
            if isinstance(side, ast.List | ast.Tuple) != (kind in (ast.In, ast.NotIn)):
                raise ValueError(f"{self._text!r}: `in` is followed by a list, and only `in` is")

        def holds(values: Values) -> bool:
            left = first(values)
            for kind, code in zip(kinds, others, strict=True):
                right = code(values)
                if not _compare(kind, left, right):
                    return False
                left = right
            return True

        return holds

    def either(self, node: ast.IfExp) -> _Code:
        test, then, other = self.code(node.test), self.code(node.body), self.code(node.orelse)
        return lambda values: then(values) if test(values) else other(values)

    def call(self, node: ast.Call) -> _Code:
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS or node.keywords:
            raise self._refused(node)
        function, fewest, most = _FUNCTIONS[node.func.id]
        if not fewest <= len(node.args) <= most:
            raise ValueError(f"{self._text!r}: {node.func.id} takes {fewest} to {most} numbers")
        codes = [self.code(one) for one in node.args]
        return lambda values: function(*(_number(code(values)) for code in codes))

    def _operand(self, node: ast.expr) -> _Code:
        if not isinstance(node, ast.List | ast.Tuple):
            return self.code(node)
        codes = [self.code(one) for one in node.elts]
        return lambda values: [code(values) for code in codes]

    def _called(self, name: str) -> _Code:
        self.names.add(name)
        return lambda values: values(name)

    def _margin(self, tree: ast.Compare) -> _Code:
        codes = [self.code(one) for one in [tree.left, *tree.comparators]]
        kinds = [type(op) for op in tree.ops]

        def excess(values: Values) -> float:
            sides = [_number(code(values)) for code in codes]
            pairs = zip(kinds, sides, sides[1:], strict=False)
            return float(max(_excess(kind, left, right) for kind, left, right in pairs))

        return excess

    def _refused(self, node: ast.expr) -> ValueError:
        part = ast.unparse(node).replace(f"{_DOLLAR}.", "$")[:60]
        return ValueError(
            f"{self._text!r}: {part!r} ({type(node).__name__}) is not allowed; expected numbers, "
            f"'strings', paths, comparisons, and/or/not, if/else and {', '.join(_FUNCTIONS)}"
        )


def _compare(kind: type[ast.AST], left: Any, right: Any) -> bool:
    if kind in _ORDER:
        return _ORDER[kind](_number(left), _number(right))
    return bool(_LIKENESS[kind](left, right))


def _excess(kind: type[ast.AST], left: Numeric, right: Numeric) -> Numeric:
    amount = right - left if kind in (ast.Gt, ast.GtE) else left - right
    if amount == 0 and kind in (ast.Gt, ast.Lt):
        return sys.float_info.min  # equality breaks a strict condition, by as little as there is
    return amount


_NODES: Mapping[type[ast.AST], Callable[[_Reader, Any], _Code]] = {
    ast.Constant: _Reader.constant,
    ast.Name: _Reader.name,
    ast.Attribute: _Reader.path,
    ast.UnaryOp: _Reader.unary,
    ast.BinOp: _Reader.binary,
    ast.BoolOp: _Reader.boolean,
    ast.Compare: _Reader.comparison,
    ast.IfExp: _Reader.either,
    ast.Call: _Reader.call,
}
