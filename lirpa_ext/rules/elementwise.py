"""Activations: the box is that of the function's values, the radius L rho with L the Lipschitz constant on the box."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..domain.ball_box import BallBox, box_radius
from ..domain.lengths import flat, length, stretched
from ..domain.rounding import ULPS, outward_box, widened
from ..domain.scalar_functions import ScalarFunction, scalar_function
from ..engine import Node
from .base import SetRule, State, only_perturbed, propagate_interval
from .context import Context


class Elementwise(SetRule):
    """Rule of a node that applies one function to each element.

    ||f(v) - f(z)||_2 <= max_i L_i ||v - z||_2 with L_i a bound on |f'| over [l_i, u_i]. Where |f'| is not bounded, or f
    not defined on all of the box, the radius is infinite, or that of the box of f's values if this box is finite.

    Args:
        slope: Bound on |f'| over [l, u]: (node, l, u) -> tensor of the shape of l; NaN or infinite where there is none.
        monotone: Whether f does not decrease, so that the box is (f(l), f(u)); else the node's interval arithmetic
            gives the box. Default True.
        exact: Whether f is computed without rounding, and its slopes are 0 or 1. Default False.
        span: Ends of f's range, beyond which outward rounding does not go. Default no ends.
    """

    def __init__(
        self,
        slope: Callable[[Node, Tensor, Tensor], Tensor],
        monotone: bool = True,
        exact: bool = False,
        span: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        self.slope = slope
        self.monotone = monotone
        self.exact = exact
        self.span = span
        self.function: Callable[[Any], ScalarFunction | None] = _unknown

    @classmethod
    def of_function(cls, exact: bool = False) -> Elementwise:
        """The rule of nodes with a `scalar_function`, from which box, slope and range are taken.

        Args:
            exact: As in the constructor.
        """
        rule = cls(steepest, monotone=False, exact=exact)
        rule.function = scalar_function
        return rule

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        if only_perturbed(inputs) != 0 or center.shape != inputs[0].center.shape:  # type: ignore[union-attr]
            return None
        state, function = inputs[0], self.function(node)
        assert isinstance(state, BallBox)
        lower, upper = outward_box(state) if context.outward else state.box()
        slope = flat(self.slope(node, lower, upper)).amax(1)
        if self.exact:
            radius = state.radius * slope
        else:  # a slope of 0 may have underflowed
            radius = stretched(state.radius, slope.clamp(min=torch.finfo(slope.dtype).tiny))
        if context.outward and function is not None:
            radius = radius + _noise(function, state.center)
        if context.ball_only:
            return BallBox(center, radius)
        if function is None and self.monotone:
            constants = inputs[1:]
            return BallBox(center, radius, node.forward(lower, *constants), node.forward(upper, *constants))
        if function is None:
            box = propagate_interval(node, inputs, center)
            return BallBox(center, radius, box.lower, box.upper)
        low, high = function.box(lower, upper)
        low, high = torch.minimum(low, center), torch.maximum(high, center)
        if not function.lipschitz:
            radius = torch.where(radius.isfinite(), radius, box_radius(center, low, high))
        return BallBox(center, radius, low, high)

    def widened(self, node: Node, state: BallBox) -> BallBox:
        """The node's set, enlarged to cover rounding in f, but inside of f's range."""
        state, function = widened(state), self.function(node)
        least, most = self.span if function is None else (function.least, function.most)
        if state.lower is None or state.upper is None or (least, most) == (-math.inf, math.inf):
            return state
        lower, upper = state.lower.clamp(least, most), state.upper.clamp(least, most)
        if least == 0:  # positive values may underflow to 0
            upper = upper.clamp(min=torch.finfo(upper.dtype).tiny)
        lower, upper = torch.minimum(lower, state.center), torch.maximum(upper, state.center)
        return BallBox(state.center, state.radius, lower, upper)


def _noise(function: ScalarFunction, center: Tensor) -> Tensor | float:
    """l2 norm of the error of the center by cancellation in the function, (B,)."""
    loss = function.noise(center)
    if not isinstance(loss, Tensor):
        if not loss:
            return 0.0
        loss = torch.full_like(center, loss)
    return ULPS * torch.finfo(center.dtype).eps * length(flat(loss), 1)


def _unknown(node: Node) -> None:
    return None


def steepest(node: Node, lower: Tensor, upper: Tensor) -> Tensor:
    """Largest |f'| on [l, u] of the node's scalar function, (B, ...)."""
    function = scalar_function(node)
    assert function is not None
    return function.steepest(lower, upper)


def _nearest_to_zero(lower: Tensor, upper: Tensor) -> Tensor:
    """Point of [l, u] with the smallest |x|, where the slopes of tanh, sigmoid and atan are largest."""
    return torch.minimum(lower.clamp(min=0) + upper.clamp(max=0), upper)


def relu(node: Node, lower: Tensor, upper: Tensor) -> Tensor:
    """Largest slope of a ReLU or LeakyReLU on [l, u]: 1 where u > 0 or u is NaN, else the slope below 0."""
    leak = engine.slope_below_zero(node)
    dead = upper <= 0
    return torch.where(dead, torch.full_like(upper, leak), max(1.0, leak)) if leak else (~dead).to(upper)


def sigmoid(node: Node, lower: Tensor, upper: Tensor) -> Tensor:
    """Largest slope of the sigmoid s on [l, u], s(x) s(-x) at the point nearest to 0.

    s(x) (1 - s(x)) would be 0 from x = 37 on, in float32 from 17.
    """
    nearest = _nearest_to_zero(lower, upper)
    return torch.sigmoid(nearest) * torch.sigmoid(-nearest)


def tanh(node: Node, lower: Tensor, upper: Tensor) -> Tensor:
    """Largest slope of tanh on [l, u], 1 - tanh(x)^2 = 4 s(2x) s(-2x) at the point nearest to 0."""
    nearest = 2 * _nearest_to_zero(lower, upper)
    return 4 * torch.sigmoid(nearest) * torch.sigmoid(-nearest)


def atan(node: Node, lower: Tensor, upper: Tensor) -> Tensor:
    """Largest slope of atan on [l, u], 1 / (1 + x^2) at the point nearest to 0."""
    return 1 / (1 + _nearest_to_zero(lower, upper) ** 2)
