"""Interval bound propagation (IBP): boxes alone, by two passes through each layer, differentiable in the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.batch_axis import batch_size, check_has_batch, check_is_batch
from ..domain.convolutions import Conv, ConvTranspose
from ..domain.lengths import length
from ..domain.linear_maps import Dense, LinearMap
from ..domain.rounding import gamma, sign_kept, summands
from ..engine import Node
from ..rules import RULES, Context, State, propagate_node
from ..rules.base import apply, only_perturbed
from ..rules.elementwise import Elementwise
from ..rules.linear import Affine
from .ball_box import input_set

Refine = Callable[[Any, dict[str, State]], "BallBox"]


class _SumAndDifference(torch.autograd.Function):
    """scale (a + b) and scale (b - a): from ends of a box to middle and half width (scale 1/2), and back (scale 1).

    One autograd function, since torch's own backward pass of the two operations would move twice as much memory.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.scale = scale
        return _scaled(a + b, scale), _scaled(b - a, scale)

    @staticmethod
    def backward(ctx: Any, to_sum: Tensor, to_difference: Tensor) -> Any:  # type: ignore[override]
        return (
            _scaled(to_sum - to_difference, ctx.scale),
            _scaled(to_sum + to_difference, ctx.scale),
            None,
        )


def _scaled(values: Tensor, scale: float) -> Tensor:
    return values if scale == 1 else values * scale if values.requires_grad else values.mul_(scale)


def propagate_intervals(
    module: nn.Module, context: Context, refine: tuple[Refine, frozenset[str]] | None = None
) -> dict[str, State]:
    """Boxes of all nodes by interval arithmetic, intersected at the first layer with the image of an lp ball.

    Sound: a monotone function maps a box into the box of its values at the ends; an affine function W v + b maps it
    into W m + b -+ |W| h, with m the middle and h the half width; every other node takes its own rule. For lp balls,
    |W_i (v - x)| <= ||W_i||_2 rho also bounds the output of the first layer.

    Args:
        module: A graph, after `engine.set_input`.
        context: Norms (for nodes before the first layer) and switches; `outward` rounds outward.
        refine: (function, names): at the nodes of these names, function(node, sets so far) replaces the set. Default
            None.

    Returns:
        Set of each perturbed node, value of each constant one, by node name. The center of a set is some point of the
        box and its radius infinite; only before the first layer of an lp ball, center and radius are those of the ball.

    Raises:
        UnsupportedNodeError: Neither a rule nor the engine can bound a node.
        InvalidInputError: A weight is perturbed.
    """
    states: dict[str, State] = {}
    balls: set[str] = set()  # nodes whose ball is kept, since it is not implied by their box
    for node in engine.ancestors_in_order(module.final_node()):  # type: ignore[operator]
        if not node.perturbed or engine.is_shape(node):
            states[node.name] = module.get_forward_value(node)  # type: ignore[operator]
            continue
        if isinstance(node, engine.BoundInput):
            state = input_set(node, context)
            if node.perturbation.norm != torch.inf:
                balls.add(node.name)
        else:
            check_has_batch(node)
            inputs = [states[parent.name] for parent in node.inputs]
            state, keeps_ball = _step(node, inputs, any(p.name in balls for p in node.inputs), context)
            if keeps_ball:
                balls.add(node.name)
        if node.name not in balls:
            lower, upper = state.box()
            state = BallBox(state.center, lower.new_full((len(lower),), torch.inf), lower, upper)
        states[node.name] = state
        if refine is not None and node.name in refine[1]:
            states[node.name] = refine[0](node, states)
    final = module.final_node()  # type: ignore[operator]
    output = states[final.name]
    if isinstance(output, BallBox):
        check_is_batch(final, output.center, batch_size(final))
    return states


def _step(node: Node, inputs: list[State], ball: bool, context: Context) -> tuple[BallBox, bool]:
    """Set of a node, and whether its ball is to be kept."""
    rule = RULES.get(type(node).__name__)
    index = only_perturbed(inputs)
    if index is not None and isinstance(rule, Affine):
        linear_map = rule.linear_map(node, inputs, index)
        if linear_map is not None and (not ball or isinstance(linear_map, (Dense, Conv, ConvTranspose))):
            state = inputs[index]
            assert isinstance(state, BallBox)
            lower, upper = state.box()
            (middle_of, half), loss = _SumAndDifference.apply(lower, upper, 0.5), 0.0
            if context.outward:  # |W x - fl(W x)| <= loss |W| |x|, and the bias errs no more (domain.rounding)
                loss = gamma(lower.dtype, summands(linear_map))
                half = half + loss * torch.maximum(lower.abs(), upper.abs())
            middle, spread = apply(node, inputs, lambda _: middle_of), linear_map.abs()(half)
            if linear_map.output_shape == middle.shape[1:] and len(middle) == len(lower):  # else the node mixes samples
                upper, lower = _SumAndDifference.apply(spread, middle, 1.0)
                if ball:
                    lower, upper = _cut(lower, upper, apply(node, inputs, _center), linear_map, state, loss)
                if context.outward:
                    slack = 2 * loss * torch.maximum(lower.abs(), upper.abs())
                    lower, upper = lower - slack, upper + slack

                def at_zero() -> Tensor:
                    return apply(node, inputs, lambda state: torch.zeros_like(state.center))

                lower = sign_kept(lower, state.box()[0], linear_map, at_zero, context.outward)
                return BallBox(middle, lower.new_zeros(len(lower)), lower, upper), False
    if index == 0 and not ball and isinstance(rule, Elementwise) and rule.monotone:
        lower, upper = (node.forward(end, *inputs[1:]) for end in inputs[0].box())  # type: ignore[union-attr]
        state = BallBox(lower, lower.new_zeros(len(lower)), lower, upper)
        return (rule.widened(node, state) if context.outward and not rule.exact else state), False
    state = propagate_node(node, inputs, apply(node, inputs, _center), context)
    return state, ball and only_perturbed(inputs) is not None


def _center(state: BallBox) -> Tensor:
    return state.center


def _cut(
    lower: Tensor, upper: Tensor, center: Tensor, linear_map: LinearMap, state: BallBox, loss: float
) -> tuple[Tensor, Tensor]:
    """The box intersected with the image of the ball, whose radius is enlarged to cover rounding in the products."""
    radius = state.radius
    if loss:
        radius = radius + loss * (length(state.center.flatten(1)) + radius)
    reach = radius.view(-1, *[1] * (center.dim() - 1)) * linear_map.row_norms()
    return torch.maximum(lower, center - reach), torch.minimum(upper, center + reach)
