"""Activations: the box through the function, rho' = L rho with L the Lipschitz constant on the box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..sets import BallBox, flat
from .base import Context, Rule, State, only_perturbed, propagate_interval, register_rule


class Elementwise(Rule):
    """Rule of a node that applies one function to each element.

    ||f(v) - f(z)||_2 <= max_i L_i ||v - z||_2 with L_i a bound on |f'| over [l_i, u_i].

    Args:
        slope: Bound on |f'| over [l, u], elementwise: (node, l, u) -> tensor of that shape.
        monotone: f does not decrease, so the box is (f(l), f(u)); else the engine's interval rule gives it.
        exact: f is computed without rounding, and its slopes are 0 or 1.
    """

    def __init__(
        self, slope: Callable[[Any, Tensor, Tensor], Tensor], monotone: bool = True, exact: bool = False
    ) -> None:
        self.slope = slope
        self.monotone = monotone
        self.exact = exact

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        if only_perturbed(inputs) != 0 or center.shape != inputs[0].center.shape:  # type: ignore[union-attr]
            return None
        state = inputs[0]
        assert isinstance(state, BallBox)
        lower, upper = state.box()
        radius = state.radius * flat(self.slope(node, lower, upper)).amax(1)
        if context.ball_only:
            return BallBox(center, radius)
        if self.monotone:
            constants = inputs[1:]
            return BallBox(center, radius, node.forward(lower, *constants), node.forward(upper, *constants))
        box = propagate_interval(node, inputs, center)
        return BallBox(center, radius, box.lower, box.upper)


def _nearest_to_zero(lower: Tensor, upper: Tensor) -> Tensor:
    """Point of [l, u] where |x| is least: there the slope of tanh, sigmoid and atan is largest."""
    return torch.minimum(lower.clamp(min=0) + upper.clamp(max=0), upper)


def _relu(node: Any, lower: Tensor, upper: Tensor) -> Tensor:
    """1 where the box reaches above 0, else the slope below 0 (0 for a plain ReLU)."""
    leak = engine.slope_below_zero(node)
    return torch.where(upper > 0, max(1.0, leak), leak).to(upper)


def _clip(node: Any, lower: Tensor, upper: Tensor) -> Tensor:
    """1 where the box meets the open interval between the ends, else 0."""
    low, high = (engine.constant(parent) for parent in node.inputs[1:])
    return ((upper > low) & (lower < high)).to(upper)


def _sigmoid(node: Any, lower: Tensor, upper: Tensor) -> Tensor:
    value = torch.sigmoid(_nearest_to_zero(lower, upper))
    return value * (1 - value)


def _tanh(node: Any, lower: Tensor, upper: Tensor) -> Tensor:
    return 1 - torch.tanh(_nearest_to_zero(lower, upper)) ** 2


def _atan(node: Any, lower: Tensor, upper: Tensor) -> Tensor:
    return 1 / (1 + _nearest_to_zero(lower, upper) ** 2)


def _ones(node: Any, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.ones_like(upper)


register_rule("BoundRelu", Elementwise(_relu, exact=True))
register_rule("BoundBallBoxRelu", Elementwise(_relu, exact=True))
register_rule("BoundLeakyRelu", Elementwise(_relu))
register_rule("BoundSigmoid", Elementwise(_sigmoid))
register_rule("BoundTanh", Elementwise(_tanh))
register_rule("BoundAtan", Elementwise(_atan))
register_rule("BoundExp", Elementwise(lambda node, lower, upper: torch.exp(upper)))
register_rule("BoundHardTanh", Elementwise(_clip, exact=True))
register_rule("BoundClip", Elementwise(_clip, exact=True))
register_rule("BoundAbs", Elementwise(_ones, monotone=False))
register_rule("BoundSin", Elementwise(_ones, monotone=False))
register_rule("BoundCos", Elementwise(_ones, monotone=False))
