"""Reader of VNN-LIB 1.0, the format of verification properties. Numbers are read exactly, and boxes rounded outward.

A file declares inputs X_i and outputs Y_j, and asserts constraints on a counterexample: ``<=`` and ``>=`` of linear
terms, under any nesting of ``and`` and ``or``. The reader brings them into disjunctive normal form: a union of boxes of
inputs, and for each box a union of polytopes of unsafe outputs.

C. Barrett et al., The SMT-LIB Standard, 2017; S. Demarchi et al., Supporting Standardization of Neural Networks
Verification with VNN-LIB and CoCoNet, FoMLAS 2023.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engine.limits import Deadline, OutOfTime
from ..errors import DataError
from ..importer.reading import unpack
from .vnnlib_terms import Linear, Malformed, add, forms, is_float, linear, nearest, neighbours, number, show

_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})")
_IGNORED = frozenset({"set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"})
_MOST_VARIABLES = 2**20
_MOST_ATOMS = 2**22  # constraints after normalization
_MOST_ELEMENTS = 2**25  # numbers in all boxes, and in all rows


@dataclass(frozen=True, eq=False)
class Polytope:
    """A polytope of outputs, {y : rows @ y <= limits}.

    Attributes:
        rows: Coefficients, (R, outputs), float64 and exact: a row such as 0.1 Y_0 <= 1 is stored as Y_0 <= 10.
        limits: Right-hand sides, R exact fractions.
    """

    rows: np.ndarray
    limits: tuple[Fraction, ...]

    def contains(self, y: np.ndarray) -> bool:
        """Whether an output y, (outputs,), is in the polytope, in exact arithmetic; False if it is not finite."""
        if not np.isfinite(y).all():
            return False
        return all(
            sum((Fraction(float(row[j])) * Fraction(float(y[j])) for j in np.flatnonzero(row)), Fraction(0)) <= limit
            for row, limit in zip(self.rows, self.limits, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Case:
    """A box of inputs, and the outputs that are unsafe for them.

    Attributes:
        lower: Lower end of the box, (inputs,), float64, rounded down.
        upper: Upper end of the box, (inputs,), float64, rounded up.
        inner_lower: Lower end of the inner box, (inputs,), rounded up; every point of the inner box lies in the exact
            box. An input whose interval contains no float64 (fixed to 0.1) has the float64 nearest to its lower end as
            both ends.
        inner_upper: Upper end of the inner box, (inputs,), rounded down.
        unsafe: Polytopes whose union is the set of unsafe outputs.
    """

    lower: np.ndarray
    upper: np.ndarray
    inner_lower: np.ndarray
    inner_upper: np.ndarray
    unsafe: tuple[Polytope, ...]


@dataclass(frozen=True, eq=False)
class Specification:
    """A property of a network: no input of a case's box has an output in one of the case's polytopes.

    Attributes:
        inputs: Number of inputs X.
        outputs: Number of outputs Y.
        cases: Boxes with their unsafe outputs.
        vacuous: Number of disjuncts left out because their box is empty (a lower end above the upper end); the property
            holds on an empty box.
    """

    inputs: int
    outputs: int
    cases: tuple[Case, ...]
    vacuous: int


class _Bound(NamedTuple):
    """X_position >= value, or X_position <= value."""

    position: int
    is_lower: bool
    value: Fraction


class _Row(NamedTuple):
    """sum of coefficient * Y_index <= limit."""

    terms: tuple[tuple[int, Fraction], ...]
    limit: Fraction


_Atom = _Bound | _Row
_Disjunction = list[tuple[_Atom, ...]]  # a disjunction of conjunctions of atoms


def load_vnnlib(
    source: str | Path | bytes, max_bytes: int = 2**25, max_disjuncts: int = 2**16, timeout: float = 9.0
) -> Specification:
    """Read a VNN-LIB 1.0 property.

    Constants are read exactly. Boxes are rounded outward to float64, so that a verified property holds for the decimal
    numbers in the file. Every X needs a lower and an upper bound, and a constraint on inputs has one X. A constraint on
    outputs is linear: several Y, combined by +, - and by * and / with constants.

    Args:
        source: Path of a ``.vnnlib`` or ``.vnnlib.gz`` file; its bytes; or its text, which starts with "(" or ";".
        max_bytes: Largest allowed size, unpacked, default 32 MiB.
        max_disjuncts: Largest allowed number of disjuncts in normal form, default 65536; the number can be exponential
            in that of the assertions.
        timeout: Seconds of processor time, default 9, which suffice for a few MiB of text.

    Returns:
        The property.

    Raises:
        DataError: The file is missing, truncated, malformed, too large or not VNN-LIB 1.0; an input lacks a bound; a
            constraint mixes an input with other inputs or outputs; no assertion is about outputs; text follows
            ``(exit)``; or reading takes longer than `timeout`.

    Example:
        >>> text = '''(declare-const X_0 Real) (declare-const Y_0 Real)
        ... (assert (>= X_0 -1)) (assert (<= X_0 0.1)) (assert (<= Y_0 -2.5e-1))'''
        >>> case, = load_vnnlib(text).cases
        >>> case.lower, case.unsafe[0].rows, case.unsafe[0].limits
        (array([-1.]), array([[1.]]), (Fraction(-1, 4),))
    """
    text, where = _read(source, max_bytes)
    reader = _Reader(max_disjuncts, Deadline(time.thread_time() + timeout, time.thread_time))
    try:
        for offset, form in forms(text, where):
            try:
                reader.add(form)
            except Malformed as error:
                raise DataError(f"{where}, line {text.count(chr(10), 0, offset) + 1}: {error}") from error
        return reader.specification()
    except Malformed as error:
        raise DataError(f"{where}: {error}") from error
    except OutOfTime:
        raise DataError(
            f"{where} takes more than {timeout:g} s of processor time to read: give it more by timeout=, or split it"
        ) from None


def _read(source: str | Path | bytes, max_bytes: int) -> tuple[str, str]:
    """The text of a property, and its name for messages."""
    where = "the property"
    if isinstance(source, str) and source.lstrip().startswith(("(", ";")):
        source = source.encode()
    if isinstance(source, str | Path):
        path, where = Path(source), str(source)
        if os.path.exists(path) and not path.is_file():
            raise DataError(f"{where[:200]} cannot be read: it is no file")
        try:
            with path.open("rb") as file:
                source = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            raise DataError(f"{where[:200]} cannot be read: {error}") from error
    try:
        return unpack(source, max_bytes, where).decode(), where
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is no text, so no VNN-LIB: {error}") from error


class _Reader:
    """Collects the declarations and assertions of a file, and makes the property of them.

    Attributes:
        variables: Name -> kind ("X" or "Y") and number of each declared variable.
        counts: Kind -> number of declared variables.
        fixed: Constraints that hold in every disjunct.
        branches: Disjunctions of the assertions, one for each assertion with several disjuncts.
        ended: Whether ``(exit)`` was read.
    """

    def __init__(self, max_disjuncts: int, deadline: Deadline) -> None:
        self.max_disjuncts, self.tick = max_disjuncts, deadline.check
        self.ended = False
        self.variables: dict[str, tuple[str, int]] = {}
        self.counts = {"X": 0, "Y": 0}
        self.fixed: list[_Atom] = []
        self.branches: list[_Disjunction] = []

    def add(self, form: list[Any]) -> None:
        """Add a form of the file: a declaration, an assertion, or a command that is ignored."""
        self.tick()
        if self.ended:
            raise Malformed(f"{show(form)} comes after (exit), which ends the file")
        match form:
            case ["declare-const", str(name), "Real"] | ["declare-fun", str(name), [], "Real"]:
                self._declare(name)
            case ["assert", list(formula)]:
                terms = self._formula(formula)
                if len(terms) == 1:
                    self.fixed += terms[0]
                else:
                    self.branches.append(terms)
            case [str(command), *_] if command in _IGNORED:
                self.ended = command == "exit"
            case [str(command), *_] if command in ("vnnlib-version", "declare-network"):
                raise Malformed("this is VNN-LIB 2.0; version 1.0 is read")
            case _:
                raise Malformed(f"{show(form)} is neither (declare-const X_0 Real) nor an (assert ...)")

    def _declare(self, name: str) -> None:
        match = _VARIABLE.fullmatch(name)
        if match is None:
            raise Malformed(f"variables are called X_0, X_1, ..., Y_0, ...; got {name[:40]!r}")
        if name in self.variables:
            raise Malformed(f"{name} is declared twice")
        if len(self.variables) == _MOST_VARIABLES:
            raise Malformed(f"more than {_MOST_VARIABLES} variables")
        self.variables[name] = match[1], int(match[2])
        self.counts[match[1]] += 1

    def _variable(self, name: str) -> tuple[str, int]:
        if name not in self.variables:
            raise Malformed(f"{name[:40]!r} is not declared")
        return self.variables[name]

    def _bounds_one(self, name: str, word: str) -> bool:
        return name in self.variables and word not in self.variables

    # --- formulas --------------------------------------------------------------------------------------------

    def _formula(self, form: Any) -> _Disjunction:
        self.tick()
        match form:
            case ["and", *parts]:
                return self._conjunction(self._formula(part) for part in parts)
            case ["or", *parts]:
                terms: _Disjunction = []
                for part in parts:
                    terms += self._formula(part)
                    self._check_size(len(terms), 0)
                return terms
            case [("<=" | ">=") as relation, str(name), str(word)] if name[0] == "X" and word not in self.variables:
                return [(_Bound(self._variable(name)[1], relation == ">=", number(word)),)]  # fast path: most of a file
            case [("<=" | ">=") as relation, str(name), str(word)] if name[0] == "Y" and self._bounds_one(name, word):
                sign = 1 if relation == "<=" else -1  # fast path: most of a long disjunction
                return [(_Row(((self._variable(name)[1], Fraction(sign)),), sign * number(word)),)]
            case [("<=" | ">=") as relation, first, second, *more]:
                sides = [linear(side, self.variables, self.tick) for side in (first, second, *more)]
                sides = sides if relation == "<=" else sides[::-1]
                return self._conjunction(self._atom(add([(left, 1), (right, -1)])) for left, right in pairwise(sides))
        raise Malformed(f"{show(form)} is no constraint; those are <=, >=, and, or")

    def _conjunction(self, parts: Iterable[_Disjunction]) -> _Disjunction:
        fixed: list[_Atom] = []
        terms: _Disjunction = [()]
        for part in parts:
            if len(part) == 1:
                fixed += part[0]
                continue
            self._check_size(
                len(terms) * len(part), len(terms) * sum(map(len, part)) + len(part) * sum(map(len, terms))
            )
            self.tick()
            terms = [one + other for one in terms for other in part]
        self._check_size(len(terms), len(terms) * len(fixed))
        return [(*term, *fixed) for term in terms]

    def _check_size(self, disjuncts: int, atoms: int) -> None:
        if disjuncts > self.max_disjuncts or atoms > _MOST_ATOMS:
            raise Malformed(
                f"its disjunctive normal form has more than max_disjuncts={self.max_disjuncts} disjuncts or "
                f"{_MOST_ATOMS} constraints: split the property into several files"
            )

    def _atom(self, left: Linear) -> _Disjunction:
        """The constraint "linear form <= 0" as an atom; true or false if the form has no variable."""
        constant = left.pop("", Fraction(0))
        terms = [(*self.variables[name], value) for name, value in left.items() if value]
        if not terms:
            return [()] if constant <= 0 else []
        if all(kind == "Y" for kind, _, _ in terms):
            return [(_Row(tuple(sorted((index, value) for _, index, value in terms)), -constant),)]
        if len(terms) > 1:
            raise Malformed(
                f"a constraint on {', '.join(sorted(left)[:5])}: those on inputs must be boxes, one X and a constant"
            )
        ((_, index, value),) = terms
        return [(_Bound(index, value < 0, -constant / value),)]

    # --- normal form -----------------------------------------------------------------------------------------

    def specification(self) -> Specification:
        """The property that was read."""
        for kind, count in self.counts.items():
            if not count:
                raise Malformed(f"no {kind} is declared; is the file empty or truncated?")
            missing = [i for i in range(count) if f"{kind}_{i}" not in self.variables]
            if missing:
                raise Malformed(f"{kind}_{missing[0]} is not declared, but others above it are")
        base = _intersection(atom for atom in self.fixed if isinstance(atom, _Bound))
        rows = frozenset(atom for atom in self.fixed if isinstance(atom, _Row))
        terms = self._conjunction(self.branches)
        boxes: dict[frozenset[_Bound], list[frozenset[_Row]]] = {}
        for term in terms:
            self.tick()
            key = frozenset(atom for atom in term if isinstance(atom, _Bound))
            boxes.setdefault(key, []).append(rows.union(atom for atom in term if isinstance(atom, _Row)))
        most = max((len(polytope) for unsafe in boxes.values() for polytope in unsafe), default=0)
        if max(len(boxes) * self.counts["X"], len(terms) * most * self.counts["Y"]) > _MOST_ELEMENTS:
            raise Malformed(f"its boxes or rows have more than {_MOST_ELEMENTS} numbers: split it into several files")
        whole = np.array([[-math.inf], [math.inf]] * 2) * np.ones(self.counts["X"])
        _write(whole, base)
        known: dict[_Row, tuple[np.ndarray, Fraction]] = {}
        cases, vacuous = [], 0
        for key, unsafe in boxes.items():
            self.tick()
            own, ends = _intersection(key, base), whole.copy()
            _write(ends, own)
            unbounded = np.flatnonzero(np.isinf(ends).any(0))
            if len(unbounded):
                raise Malformed(f"X_{unbounded[0]} has no lower or no upper bound; is the file truncated?")
            polytopes = tuple(self._polytope(polytope, known) for polytope in dict.fromkeys(unsafe))
            if _is_empty(base) or _is_empty(own):
                vacuous += len(unsafe)
            else:
                cases.append(Case(ends[0], ends[1], ends[2], ends[3], polytopes))
        if not terms:
            raise Malformed("its assertions contradict each other whatever the variables are, so it says nothing")
        return Specification(self.counts["X"], self.counts["Y"], tuple(cases), vacuous)

    def _polytope(self, rows: frozenset[_Row], known: dict[_Row, tuple[np.ndarray, Fraction]]) -> Polytope:
        self.tick()
        if not rows:
            raise Malformed("a disjunct asserts nothing of the outputs Y; is the file truncated?")
        ordered = sorted(rows)
        for row in ordered:
            if row not in known:
                known[row] = self._dense(row)
        return Polytope(np.stack([known[row][0] for row in ordered]), tuple(known[row][1] for row in ordered))

    def _dense(self, row: _Row) -> tuple[np.ndarray, Fraction]:
        """Coefficients as exact float64 (denominators are cleared where needed), (outputs,), and the limit."""
        scale = 1
        if not all(is_float(value) for _, value in row.terms):
            scale = math.lcm(*(value.denominator for _, value in row.terms))
        dense = np.zeros(self.counts["Y"])
        for index, value in row.terms:
            if not is_float(value * scale):
                raise Malformed(f"the coefficient {float(value)!r} of Y_{index} has too many digits for float64")
            dense[index] = float(value * scale)
        return dense, row.limit * scale


_Box = dict[tuple[int, bool], Fraction]  # (index, is lower) -> end


def _intersection(bounds: Iterable[_Bound], base: _Box | None = None) -> _Box:
    """Intersect `bounds` with the box `base`; only the inputs in `bounds` are returned."""
    box: _Box = {}
    base = base or {}
    for index, is_lower, value in bounds:
        for end in ((index, True), (index, False)):
            if end in base:
                box.setdefault(end, base[end])
        old = box.get((index, is_lower), value)
        box[index, is_lower] = max(old, value) if is_lower else min(old, value)
    return box


def _is_empty(box: _Box) -> bool:
    return any(is_lower and value > box.get((index, False), value) for (index, is_lower), value in box.items())


def _write(ends: np.ndarray, box: _Box) -> None:
    """Put the box's ends into (lower, upper, inner lower, inner upper), (4, inputs)."""
    for (index, is_lower), value in box.items():
        down, up = neighbours(value)
        if is_lower:
            ends[0, index], ends[2, index] = down, up
        else:
            ends[1, index], ends[3, index] = up, down
    for index, is_lower in box:
        if is_lower and ends[2, index] > ends[3, index]:  # the interval contains no float64
            ends[2:, index] = nearest(box[index, True])
