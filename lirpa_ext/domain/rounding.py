"""Outward rounding: what floating-point arithmetic may have lost is added to balls and boxes.

Model: any order of summation of k products errs by at most gamma_k |a|.|b|, gamma_k = k u / (1 - k u), with u half
the machine epsilon (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). It covers blocked and fused sums,
not Winograd or Strassen ones. Elementary functions are taken to be right to `ULPS` units in the last place. All
constants are doubled, so that the rounding of these few terms themselves is covered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ball_box import BallBox
from .lengths import flat, length
from .linear_maps import Conv, ConvTranspose, Dense, LinearMap, NonNegative, Scale

ULPS = 8


def gamma(dtype: torch.dtype, terms: int) -> float:
    """2 gamma_k for sums of `terms` products and a few more operations."""
    loss = (terms + ULPS) * torch.finfo(dtype).eps / 2
    return 2 * loss / (1 - loss)


def summands(linear_map: LinearMap) -> int:
    """How many products each output of the map sums at most."""
    weight = linear_map.weight
    if isinstance(linear_map, (Dense, Conv)) and weight is not None:
        return weight[0].numel()
    if isinstance(linear_map, ConvTranspose) and weight is not None:
        return weight.shape[0] * weight[0, 0].numel()
    return ULPS if isinstance(linear_map, Scale) else linear_map.input_shape.numel()


def widened(state: BallBox, ulps: int = ULPS) -> BallBox:
    """The set of a node whose values are right to `ulps` units in the last place."""
    loss = gamma(state.center.dtype, ulps)
    radius = state.radius * (1 + loss) + loss * length(flat(state.center), 1)
    if state.lower is None or state.upper is None:
        return BallBox(state.center, radius)
    lower, upper = state.lower - loss * state.lower.abs(), state.upper + loss * state.upper.abs()
    return BallBox(state.center, radius, lower, upper)


def outward_box(state: BallBox) -> tuple[Tensor, Tensor]:
    """Both corners of a set; those of a ball rounded outward, for z - rho may round to z."""
    lower, upper = state.box()
    if state.lower is not None:
        return lower, upper
    loss = torch.finfo(lower.dtype).eps
    return lower - loss * lower.abs(), upper + loss * upper.abs()


def input_of_affine(state: BallBox, loss: float) -> BallBox:
    """The input's set, larger by what the products with it may lose: |W x - fl(W x)| <= loss |W| |x|.

    On the box, loss |W| |x| is what an additional half width loss |x| becomes; on the ball, by Cauchy-Schwarz,
    loss ||W_i|| ||x|| is what an additional radius loss ||x|| becomes.
    """
    size = length(flat(state.center), 1) + state.radius
    radius = state.radius + loss * size
    if state.lower is None or state.upper is None:
        return BallBox(state.center, radius)
    slack = loss * torch.maximum(state.lower.abs(), state.upper.abs())
    return BallBox(state.center, radius, state.lower - slack, state.upper + slack)


def output_of_affine(image: BallBox, before: BallBox, rows: Tensor, loss: float) -> BallBox:
    """The output's set, larger by what adding the bias and forming the center may lose.

    The bias is the output less the product, so |b| <= |W x + b| + |W| |x|, of which the second term is in the
    input's set already. The center's own error, as a vector, is at most loss (||A||_F ||x|| + ||W x + b||).
    """
    frobenius = length(rows.expand(image.center.shape[1:]).reshape(-1))
    size = length(flat(before.center), 1)
    radius = image.radius + loss * (2 * frobenius * size + length(flat(image.center), 1))
    if image.lower is None or image.upper is None:
        return BallBox(image.center, radius)
    slack = 2 * loss * torch.maximum(image.lower.abs(), image.upper.abs())
    return BallBox(image.center, radius, image.lower - slack, image.upper + slack)


def sign_kept(
    lower: Tensor, before: Tensor, linear_map: LinearMap, at_zero: Callable[[], Tensor], outward: bool
) -> Tensor:
    """Lower ends of an affine node, not below its value at 0 where none of the summed products can be negative.

    So sums of squares and means of what is not negative stay so, and have a root, whatever rounding lost.

    Args:
        lower: Lower ends of the output's box, (B, ...).
        before: Those of the input's, (B, ...).
        linear_map: The node's linear part.
        at_zero: Gives the node's value at 0, that is its bias, broadcastable to the output.
        outward: Whether maps with weights are looked at, too: that waits for the device.
    """
    weight = linear_map.weight
    if not isinstance(linear_map, NonNegative) and (not outward or weight is None or bool((weight < 0).any())):
        return lower
    with torch.no_grad():
        none_negative = linear_map.abs()((-before).clamp(min=0)) == 0
    return torch.where(none_negative, torch.maximum(lower, at_zero()), lower)


def row_slack(rows: Tensor, state: BallBox, terms: int) -> Tensor:
    """What sums of rows (B, S, n) with values of a set may lose: 2 gamma ||a|| (||z|| + rho), (B, S)."""
    size = length(flat(state.center), 1) + state.radius
    return gamma(rows.dtype, terms) * length(rows) * size.unsqueeze(1)
