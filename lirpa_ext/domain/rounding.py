"""Outward rounding: balls and boxes are enlarged by bounds on the errors of floating-point arithmetic.

Error model: a sum of k products in any order has an error of at most gamma_k |a|.|b| with gamma_k = k u / (1 - k u),
u half the machine epsilon (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). This covers blocked and fused
sums, but not Winograd or Strassen algorithms. Elementary functions are assumed to be correct to `ULPS` units in the
last place. All constants are doubled, to cover the rounding of the enlargements themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ball_box import BallBox
from .convolutions import Conv, ConvTranspose
from .lengths import flat, length
from .linear_maps import Dense, LinearMap, NonNegative, Scale

ULPS = 8


def gamma(dtype: torch.dtype, terms: int) -> float:
    """Relative error bound 2 gamma_k of sums of `terms` products and a few more operations, in `dtype`."""
    loss = (terms + ULPS) * torch.finfo(dtype).eps / 2
    return 2 * loss / (1 - loss)


def summands(linear_map: LinearMap) -> int:
    """Largest number of products that an output of the map sums."""
    weight = linear_map.weight
    if isinstance(linear_map, (Dense, Conv)) and weight is not None:
        return weight[0].numel()
    if isinstance(linear_map, ConvTranspose) and weight is not None:
        return weight.shape[0] * weight[0, 0].numel()
    return ULPS if isinstance(linear_map, Scale) else linear_map.input_shape.numel()


def widened(state: BallBox, ulps: int = ULPS) -> BallBox:
    """The set of a node, enlarged by an error of `ulps` units in the last place of its values.

    Args:
        state: The set, for exact arithmetic.
        ulps: Error in units in the last place, default `ULPS`.
    """
    loss = gamma(state.center.dtype, ulps)
    radius = state.radius * (1 + loss) + loss * length(flat(state.center), 1)
    if state.lower is None or state.upper is None:
        return BallBox(state.center, radius)
    lower, upper = state.lower - loss * state.lower.abs(), state.upper + loss * state.upper.abs()
    return BallBox(state.center, radius, lower, upper)


def outward_box(state: BallBox) -> tuple[Tensor, Tensor]:
    """Corners of a set's box, (B, ...) each; those of a ball alone rounded outward, since z - rho may round to z."""
    lower, upper = state.box()
    if state.lower is not None:
        return lower, upper
    loss = torch.finfo(lower.dtype).eps
    return lower - loss * lower.abs(), upper + loss * upper.abs()


def input_of_affine(state: BallBox, loss: float) -> BallBox:
    """The set of an affine node's input, enlarged to cover rounding in its products: |W x - fl(W x)| <= loss |W| |x|.

    On the box, an additional half width loss |x| becomes loss |W| |x| in the output; on the ball, an additional
    radius loss ||x|| becomes loss ||W_i|| ||x||, which suffices by Cauchy-Schwarz.

    Args:
        state: The input's set.
        loss: Relative error of the products (`gamma`).
    """
    size = length(flat(state.center), 1) + state.radius
    radius = state.radius + loss * size
    if state.lower is None or state.upper is None:
        return BallBox(state.center, radius)
    slack = loss * torch.maximum(state.lower.abs(), state.upper.abs())
    return BallBox(state.center, radius, state.lower - slack, state.upper + slack)


def output_of_affine(image: BallBox, before: BallBox, rows: Tensor, loss: float) -> BallBox:
    """The set of an affine node's output, enlarged to cover rounding when the bias is added and the center computed.

    Since |b| <= |W x + b| + |W| |x|, and `input_of_affine` covers the second term, the bias adds loss |W x + b|. The
    center, as a vector, has an error of at most loss (||A||_F ||x|| + ||W x + b||).

    Args:
        image: Set of the output, of the input's set as enlarged by `input_of_affine`.
        before: Set of the input, not enlarged.
        rows: l2 norms of the rows of W, which broadcast to one output.
        loss: Relative error of the products (`gamma`).
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
    """Lower ends of an affine node, raised to its value at 0 where none of the summed products can be negative.

    Outward rounding thus keeps sums of squares, and means of non-negative values, non-negative, so that a following
    root is defined.

    Args:
        lower: Lower ends of the output's box, (B, ...).
        before: Lower ends of the input's box, (B, ...).
        linear_map: The node's linear part.
        at_zero: Returns the node's value at 0, that is its bias, broadcastable to the output.
        outward: Whether to do this for maps with weights, too, which waits for the device.

    Returns:
        (B, ...).
    """
    weight = linear_map.weight
    if not isinstance(linear_map, NonNegative) and (not outward or weight is None or bool((weight < 0).any())):
        return lower
    with torch.no_grad():
        none_negative = linear_map.abs()((-before).clamp(min=0)) == 0
    return torch.where(none_negative, torch.maximum(lower, at_zero()), lower)


def row_slack(rows: Tensor, state: BallBox, terms: int) -> Tensor:
    """Error bound of the products of coefficient rows a with values of a set: 2 gamma_k ||a|| (||z|| + rho).

    Args:
        rows: a, (B, S, n).
        state: Set with center z, (B, ...) of n elements a sample, and radius rho.
        terms: Number k of summed products.

    Returns:
        (B, S).
    """
    size = length(flat(state.center), 1) + state.radius
    return gamma(rows.dtype, terms) * length(rows) * size.unsqueeze(1)
