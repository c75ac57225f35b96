"""A network while it is drawn, and the table of operations that it is drawn from."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .program import Line, Network, Shape, evaluate
from .weights import filled, numbers

_LARGEST = 80  # elements of a sample's value
_SCOPE = {"nn": nn, "torch": torch, "filled": filled, "numbers": numbers}


class Rejected(Exception):
    """What was drawn does not fit: try another."""


class Growing:
    """Lines drawn so far, with their values at a few samples, so that every shape is known and every value finite.

    Args:
        rng: Source of every choice.
        shape: Of one sample of the input.
        x: The samples, (B, ...), float64.
    """

    def __init__(self, rng: random.Random, shape: Shape, x: Tensor) -> None:
        self.rng, self.shape = rng, shape
        self.lines: list[Line] = []
        self.found: dict[int, Tensor] = {0: x}
        self.made: dict[str, str] = {}
        self.holder = SimpleNamespace()

    def shape_of(self, value: int) -> Shape:
        return tuple(self.found[value].shape[1:])

    def pick(self) -> int:
        """A value to go on from: mostly the last one."""
        last = len(self.lines)
        return last if self.rng.random() < 0.85 else self.rng.randint(0, last)

    def like(self, value: int) -> int | None:
        """Another value of the same shape, if there is one."""
        same = [other for other in self.found if other != value and self.shape_of(other) == self.shape_of(value)]
        return self.rng.choice(same) if same else None

    def seed(self) -> int:
        return self.rng.randint(0, 9999)

    def how(self) -> Any:
        """What kind of numbers a weight has: mostly ordinary ones."""
        if self.rng.random() < 0.75:
            return 1.0
        return self.rng.choice(["orthogonal", "dominant", "integer", "zero", 30.0, 1e3, 1e6, 1e-3, 1e-30, 1e30])

    def make(self, expression: str) -> str:
        """Name of a module or tensor that ``__init__`` makes, ``self.m3``."""
        name = f"m{len(self.made)}"
        made = eval(expression, dict(_SCOPE))
        if isinstance(made, nn.Module):
            made.eval().double()
        if isinstance(made, Tensor) and not isinstance(made, nn.Parameter):
            self.made[name] = f'self.register_buffer("{name}", {expression})'
            made = made.double() if made.is_floating_point() else made
        else:
            self.made[name] = f"self.{name} = {expression}"
            made = nn.Parameter(made.data.double()) if isinstance(made, nn.Parameter) else made
        setattr(self.holder, name, made)
        return f"self.{name}"

    def layer(self, expression: str, how: Any = None) -> str:
        """A module with weights of its own."""
        return self.make(f"filled({expression}, {self.seed()}, {self.how() if how is None else how!r})")

    def constant(self, shape: Shape, how: Any = None, parameter: bool | None = None) -> str:
        """A buffer or parameter of that shape."""
        text = f"numbers({shape!r}, {self.seed()}, {self.how() if how is None else how!r})"
        parameter = self.rng.random() < 0.5 if parameter is None else parameter
        return self.make(f"nn.Parameter({text})" if parameter else text)

    def add(self, kind: str, code: str, *inputs: int, linear: bool = False, mixes: bool = False) -> int:
        """A line, and the number of its value.

        Raises:
            Rejected: Its value is not finite, too large, has no batch axis, or torch refuses it.
        """
        text = code.format(*(f"v{number}" if number else "x" for number in inputs))
        try:
            with torch.no_grad():
                value = evaluate(text, self.holder, self.found)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise Rejected(f"{text}: {error}") from error
        batch = len(self.found[0])
        fits = value.dim() > 0 and len(value) == batch and value[0].numel() <= _LARGEST and value[0].numel() > 0
        if not fits or not value.is_floating_point() or not torch.isfinite(value).all():
            raise Rejected(f"{text}: {tuple(value.shape)}")
        self.lines.append(Line(kind, code, inputs, tuple(value.shape[1:]), linear, mixes))
        self.found[len(self.lines)] = value
        return len(self.lines)

    def network(self) -> Network:
        return Network(self.shape, tuple(self.lines), len(self.lines), dict(self.made))


Draw = Callable[[Growing, int], Any]


class Operation(NamedTuple):
    """A way to go on: draws one or a few lines from a value; raises Rejected, or draws none, where it does not fit."""

    draw: Draw
    weight: float


OPERATIONS: dict[str, Operation] = {}


def operation(weight: float = 1.0) -> Callable[[Draw], Draw]:
    """Put a function into the table, under its own name; operations are drawn in proportion to their weights."""

    def put(draw: Draw) -> Draw:
        assert draw.__name__ not in OPERATIONS, f"{draw.__name__} is there already"
        OPERATIONS[draw.__name__] = Operation(draw, weight)
        return draw

    return put


def grow(growing: Growing, name: str) -> None:
    """Draw that operation's lines; leaves the network as it was where they do not fit."""
    lines, made = len(growing.lines), dict(growing.made)
    try:
        OPERATIONS[name].draw(growing, growing.pick())
    except Rejected:
        del growing.lines[lines:]
        for value in [value for value in growing.found if value > lines]:
            del growing.found[value]
        growing.made = made
