"""A network as lines of a program: from the same text come the module that is bounded and what is printed of it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import weights

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """One step of a forward.

    Attributes:
        kind: What the step is, for statistics and for the grouping of findings.
        code: Expression, with ``{0}``, ``{1}`` for the values that it reads, ``self.m3`` for what `Network.made` has.
        inputs: Numbers of those values.
        shape: Of its value for one sample.
        linear: Whether it is a sum of products with weights, whose rounding depends on the absolute values.
        mixes: Whether a sample's value depends on the other samples.
    """

    kind: str
    code: str
    inputs: tuple[int, ...]
    shape: Shape
    linear: bool = False
    mixes: bool = False


@dataclass(frozen=True)
class Network:
    """Lines of a forward. Value 0 is the input, value k what line k - 1 computes.

    Attributes:
        shape: Of one sample of the input.
        lines: The steps, in order.
        output: Number of the value that is returned.
        made: Name of a weight or module -> the statement of ``__init__`` that makes it.
    """

    shape: Shape
    lines: tuple[Line, ...]
    output: int
    made: Mapping[str, str]

    def shape_of(self, value: int) -> Shape:
        """Shape of a value for one sample."""
        return self.shape if value == 0 else self.lines[value - 1].shape

    def live(self) -> list[int]:
        """Numbers of the values that the output depends on, without the input, in order."""
        needed = {self.output}
        for value in range(len(self.lines), 0, -1):
            if value in needed:
                needed |= set(self.lines[value - 1].inputs)
        return sorted(needed - {0})

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the live lines, each once, sorted."""
        return tuple(sorted({self.lines[value - 1].kind for value in self.live()}))

    @property
    def mixes(self) -> bool:
        """Whether samples read each other."""
        return any(self.lines[value - 1].mixes for value in self.live())

    def code(self, value: int) -> str:
        """Expression of a value in the names of the others."""
        line = self.lines[value - 1]
        return line.code.format(*(name(number) for number in line.inputs))

    def source(self) -> str:
        """Text of the class ``Net``, and of the functions that make its weights."""
        body = [f"{name(value)} = {self.code(value)}" for value in self.live()]
        used = {made for line in body for made in re.findall(r"self\.(m\d+)", line)}
        init = [statement for made, statement in self.made.items() if made in used]
        text = "class Net(nn.Module):\n"
        if init:
            text += "    def __init__(self):\n        super().__init__()\n"
            text += "".join(f"        {statement}\n" for statement in init) + "\n"
        text += "    def forward(self, x):\n"
        return text + "".join(f"        {line}\n" for line in [*body, f"return {name(self.output)}"])

    def values(self, model: nn.Module, x: Tensor) -> dict[int, Tensor]:
        """Every live value at x, by its number."""
        found = {0: x}
        for value in self.live():
            found[value] = evaluate(self.code(value), model, found)
        return found

    def skipping(self, value: int, by: int) -> Network:
        """The network that reads value `by` wherever this one reads `value`."""

        def moved(number: int) -> int:
            return by if number == value else number

        lines = tuple(replace(line, inputs=tuple(map(moved, line.inputs))) for line in self.lines)
        return replace(self, lines=lines, output=moved(self.output))

    def starting(self, value: int) -> Network | None:
        """The network whose input is that value; None if something after it reads what comes before it."""
        after = [number for number in self.live() if number > value]
        reads = {number for later in after for number in self.lines[later - 1].inputs} | {self.output}
        if any(number < value for number in reads):
            return None
        lines = tuple(
            replace(line, inputs=tuple(number - value for number in line.inputs)) for line in self.lines[value:]
        )
        return replace(self, shape=self.shape_of(value), lines=lines, output=self.output - value)


def name(value: int) -> str:
    """Name of a value in the program."""
    return f"v{value}" if value else "x"


_compiled: dict[str, CodeType] = {}


def evaluate(code: str, model: Any, found: Mapping[int, Tensor]) -> Tensor:
    """Value of an expression of the program, given the values that it reads."""
    if code not in _compiled:
        if len(_compiled) > 10_000:
            _compiled.clear()
        _compiled[code] = compile(code, "<line>", "eval")
    scope = {name(number): tensor for number, tensor in found.items()}
    return eval(_compiled[code], {"torch": torch, "nn": nn, "F": F, "self": model, **scope})


def helpers(text: str) -> str:
    """Source of those functions of `weights` that a program calls."""
    called = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    if "filled" in called:
        called.add("numbers")
    functions = [getattr(weights, each) for each in ("numbers", "filled") if each in called]
    return "".join(f"{inspect.getsource(function)}\n\n" for function in functions)
