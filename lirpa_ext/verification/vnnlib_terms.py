"""Parser of VNN-LIB's s-expressions, numbers and linear terms, in exact arithmetic."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator
from fractions import Fraction
from typing import Any

from ..errors import DataError

Linear = dict[str, Fraction]  # coefficients of variables, and "" for the constant

_TOKEN = re.compile(r";[^\n]*|[()]|[^\s();]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_DEEPEST = 64  # nested parentheses; the limit bounds the recursion over a form
_LONGEST = 400  # characters of a number
_MOST_BITS = 2**14  # of a constant that is computed


class Malformed(Exception):
    """A form is wrong; the reader adds the line and raises `DataError`."""


def forms(text: str, where: str) -> Iterator[tuple[int, list[Any]]]:
    """Split a text into its s-expressions.

    Args:
        text: Text of the file; comments begin with ";".
        where: Name of the file, for messages.

    Yields:
        Offset in the text, and the s-expression as a nested list of words.

    Raises:
        DataError: Parentheses do not match, or are nested too deeply.
    """
    stack: list[list[Any]] = []
    offset = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token[0] == ";":
            continue
        if token == "(" and len(stack) < _DEEPEST:
            offset = offset if stack else match.start()
            stack.append([])
        elif token == ")" and stack:
            form = stack.pop()
            if not stack:
                yield offset, form
            else:
                stack[-1].append(form)
        elif token in "()" or not stack:
            cause = f"more than {_DEEPEST} nested parentheses" if token == "(" else f"a stray {token[:40]!r}"
            raise DataError(f"{where}, line {text.count(chr(10), 0, match.start()) + 1}: {cause}")
        else:
            stack[-1].append(token)
    if stack:
        line = text.count("\n", 0, offset) + 1
        raise DataError(f"{where} is truncated: the parenthesis opened in line {line} is never closed")


def linear(form: Any, variables: Container[str], tick: Callable[[], None] = lambda: None) -> Linear:
    """Read a linear term.

    Args:
        form: The term, a word or a nested list of words.
        variables: Names of the declared variables.
        tick: Called for each part, to check the time; default nothing.

    Returns:
        Coefficient of each variable; "" is the key of the constant.

    Raises:
        Malformed: The term is not linear, or has an undeclared variable.
    """
    tick()
    match form:
        case str(name) if name in variables:
            return {name: Fraction(1)}
        case str(word):
            return {"": number(word)}
        case ["+", *parts] if parts:
            return add((linear(part, variables, tick), 1) for part in parts)
        case ["-", part]:
            return add([(linear(part, variables, tick), -1)])
        case ["-", first, *parts] if parts:
            return add((linear(part, variables, tick), -1 if i else 1) for i, part in enumerate((first, *parts)))
        case ["*" | "/", first, *parts] if parts:
            product = linear(first, variables, tick)
            for part in parts:
                product = _scaled(product, linear(part, variables, tick), form)
            return product
    raise Malformed(f"{show(form)} is no linear term; those are made by +, -, * and / with a constant")


@functools.lru_cache(2**14)
def number(word: str) -> Fraction:
    """Read a finite decimal number exactly.

    Raises:
        Malformed: The word is no such number, or is beyond the range of float64.
    """
    if len(word) > _LONGEST or not _NUMBER.fullmatch(word):
        raise Malformed(f"{word[:40]!r} is neither a declared variable nor a finite decimal number")
    value = Fraction(word)
    nearest(value)
    return value


def add(terms: Iterable[tuple[Linear, int]]) -> Linear:
    """Sum of linear terms, each multiplied by its sign, 1 or -1."""
    total: Linear = {}
    for term, sign in terms:
        for name, value in term.items():
            total[name] = _small(total.get(name, Fraction(0)) + sign * value)
    return total


def _scaled(left: Linear, right: Linear, form: list[Any]) -> Linear:
    """Product or quotient of two linear terms; one factor, or the divisor, must be constant, and the divisor not 0."""
    operator = form[0]
    if operator == "*" and not left.keys() - {""}:
        left, right = right, left
    constant = right.get("", Fraction(0))
    if right.keys() - {""} or (operator == "/" and not constant):
        raise Malformed(f"{show(form)} is not linear")
    return {name: _small(value * constant if operator == "*" else value / constant) for name, value in left.items()}


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise Malformed("a computed constant has too many digits")
    return value


def show(form: Any) -> str:
    """The start of a form as text, for messages."""
    if isinstance(form, str):
        return repr(form[:40])
    return (
        f"({' '.join(part[:20] if isinstance(part, str) else '(...)' for part in form[:4])}{' ...' * (len(form) > 4)})"
    )


def neighbours(value: Fraction) -> tuple[float, float]:
    """The largest float64 not above an exact number, and the smallest not below it."""
    close = nearest(value)
    numerator, denominator = close.as_integer_ratio()
    excess = numerator * value.denominator - value.numerator * denominator
    if excess > 0:
        return math.nextafter(close, -math.inf), close
    return close, math.nextafter(close, math.inf) if excess else close


def nearest(value: Fraction) -> float:
    """The float64 nearest to an exact number."""
    try:
        return value.numerator / value.denominator
    except OverflowError:
        raise Malformed("a number is beyond the range of float64") from None


def is_float(value: Fraction) -> bool:
    """Whether float64 holds the number exactly."""
    return Fraction(nearest(value)) == value
