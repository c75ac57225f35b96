"""Ops that move, copy, join or choose values: reshapes, slices, concat, add, sub, max pools."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..sets import BallBox
from .base import Context, Rule, State, apply, only_perturbed, register_rule
from .linear import sum_to


class Monotone(Rule):
    """Rule of a node whose every output is a non-decreasing function of its one perturbed input.

    The box goes through the function. The ball grows by `factor`, the Lipschitz constant of the node.

    Args:
        factor: (node, state of the input, clean value of the node) -> Lipschitz constant; None declines.
        back: (node, shape of the input without batch, rows (S, B, ...)) -> rows of the input, where the node is
            linear or affine in it.
        homogeneous: The node maps 0 to 0.
    """

    exact = True

    def __init__(
        self,
        factor: Callable[[Any, BallBox, Tensor], float | None],
        back: Callable[[Any, torch.Size, Tensor], Tensor | None] | None = None,
        homogeneous: bool = True,
    ) -> None:
        self.factor = factor
        self.back = back
        self.homogeneous = homogeneous

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        index = only_perturbed(inputs)
        if index is None:
            return None
        state = inputs[index]
        assert isinstance(state, BallBox)
        factor = self.factor(node, state, center)
        if factor is None or len(center) != len(state.center):
            return None
        radius = state.radius if factor == 1 else state.radius * factor
        if state.lower is None or state.upper is None:
            return BallBox(center, radius)
        lower, upper = (apply(node, inputs, pick) for pick in (_lower, _upper))
        return BallBox(center, radius, lower, upper)

    def adjoint(self, node: Any, inputs: Sequence[State], rows: Tensor) -> list[Tensor | None] | None:
        index = only_perturbed(inputs)
        if index is None or self.back is None:
            return None
        passed = self.back(node, inputs[index].center.shape[1:], rows)  # type: ignore[union-attr]
        return None if passed is None else [passed if i == index else None for i in range(len(inputs))]


class Sum(Rule):
    """a + b or a - b: radii add (B.2.4), boxes by interval arithmetic; constants only shift.

    Args:
        sign: +1 or -1, of the second operand.
    """

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox:
        radius: Tensor | float = 0.0
        for state in inputs:
            if isinstance(state, BallBox):
                radius = radius + state.radius * _copies(state, center)
        assert isinstance(radius, Tensor)
        if all(state.lower is None for state in inputs if isinstance(state, BallBox)):
            return BallBox(center, radius)
        (low_a, high_a), (low_b, high_b) = (
            state.box() if isinstance(state, BallBox) else (state, state) for state in inputs
        )
        if self.sign < 0:
            low_b, high_b = -high_b, -low_b
        return BallBox(center, radius, low_a + low_b, high_a + high_b)

    def adjoint(self, node: Any, inputs: Sequence[State], rows: Tensor) -> list[Tensor | None]:
        signs = (1, self.sign)
        return [
            sign * sum_to(rows, state.center.shape[1:]) if isinstance(state, BallBox) else None
            for sign, state in zip(signs, inputs, strict=True)
        ]


class Negation(Rule):
    """-a."""

    exact = True

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox:
        (state,) = inputs
        assert isinstance(state, BallBox)
        if state.lower is None or state.upper is None:
            return BallBox(center, state.radius)
        return BallBox(center, state.radius, -state.upper, -state.lower)

    def adjoint(self, node: Any, inputs: Sequence[State], rows: Tensor) -> list[Tensor | None]:
        return [-rows]


class Concat(Rule):
    """Concatenation: rho^2 is the sum of the squares; the box is the concatenation of the boxes."""

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        states = [state for state in inputs if isinstance(state, BallBox)]
        if len(center) != len(states[0].center):
            return None  # along the batch
        radius = torch.stack([state.radius for state in states]).norm(dim=0)
        if all(state.lower is None for state in states):
            return BallBox(center, radius)
        lower, upper = (apply(node, inputs, pick) for pick in (_lower, _upper))
        return BallBox(center, radius, lower, upper)

    def adjoint(self, node: Any, inputs: Sequence[State], rows: Tensor) -> list[Tensor | None] | None:
        axis = node.axis if node.axis >= 0 else node.axis + rows.dim() - 1
        if axis == 0:
            return None
        sizes = [(s.center if isinstance(s, BallBox) else s).shape[axis] for s in inputs]
        parts = rows.split(sizes, dim=axis + 1)
        return [part if isinstance(s, BallBox) else None for part, s in zip(parts, inputs, strict=True)]


def _lower(state: BallBox) -> Tensor:
    return state.box()[0]


def _upper(state: BallBox) -> Tensor:
    return state.box()[1]


def _copies(state: BallBox, center: Tensor) -> float:
    """Root of how often broadcasting repeats each element: the norm of the copying map."""
    return math.sqrt(center[0].numel() / state.center[0].numel())


def _one(node: Any, state: BallBox, center: Tensor) -> float:
    return 1.0


def _expand(node: Any, state: BallBox, center: Tensor) -> float | None:
    return _copies(state, center) if len(center) == len(state.center) else None


def _transpose(node: Any, state: BallBox, center: Tensor) -> float | None:
    return 1.0 if node.perm[0] == 0 else None  # else it moves the batch


def _pad(node: Any, state: BallBox, center: Tensor) -> float | None:
    mode = node.attr.get("mode", "constant")
    return 1.0 if mode in ("constant", b"constant") else None  # reflect and the like repeat elements


def _max_pool(node: Any, state: BallBox, center: Tensor) -> float:
    """Each input enters at most prod ceil(k / s) windows; max over a window is 1-Lipschitz in it."""
    return math.sqrt(math.prod(math.ceil(k / s) for k, s in zip(node.kernel_size, node.stride, strict=True)))


def _reshape_back(node: Any, shape: torch.Size, rows: Tensor) -> Tensor:
    return rows.reshape(*rows.shape[:2], *shape)


def _transpose_back(node: Any, shape: torch.Size, rows: Tensor) -> Tensor | None:
    if node.perm[0] != 0:
        return None
    inverse = [node.perm.index(axis) for axis in range(len(node.perm))]
    return rows.permute(0, *(axis + 1 for axis in inverse))


def _expand_back(node: Any, shape: torch.Size, rows: Tensor) -> Tensor:
    return sum_to(rows, shape)


def _same(node: Any, shape: torch.Size, rows: Tensor) -> Tensor:
    return rows


def _select_back(node: Any, shape: torch.Size, rows: Tensor) -> Tensor:
    """Adjoint of a selection, by autograd on one sample: the positions that the node picks."""
    constants = [engine.constant(parent) for parent in node.inputs[1:]]
    positions = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device=rows.device).view(1, *shape)
    filled = node.forward(torch.zeros_like(positions), *constants)  # a pad's value
    picked = (node.forward(positions, *constants) - filled).flatten().round().long()  # 0 at a pad
    out = rows.new_zeros(*rows.shape[:2], math.prod(shape) + 1)
    out = out.index_add(2, picked, rows.flatten(2))
    return out[..., 1:].reshape(*rows.shape[:2], *shape)


for name in ("BoundReshape", "BoundFlatten", "BoundATenUnflatten", "BoundSqueeze", "BoundUnsqueeze"):
    register_rule(name, Monotone(_one, _reshape_back))
for name in ("BoundIdentity", "BoundDropout", "BoundCast", "BoundPerturbedInput"):
    register_rule(name, Monotone(_one, _same))
for name in ("BoundSlice", "BoundSplit"):
    register_rule(name, Monotone(_one, _select_back))
for name in ("BoundReduceMax", "BoundReduceMin"):
    register_rule(name, Monotone(_one))
register_rule("BoundTranspose", Monotone(_transpose, _transpose_back))
register_rule("BoundExpand", Monotone(_expand, _expand_back))
register_rule("BoundPad", Monotone(_pad, _select_back, homogeneous=False))
register_rule("BoundMaxPool", Monotone(_max_pool))
register_rule("BoundAdd", Sum(+1))
register_rule("BoundSub", Sum(-1))
register_rule("BoundNeg", Negation())
register_rule("BoundConcat", Concat())
