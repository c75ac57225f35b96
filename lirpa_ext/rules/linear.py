"""Linear maps: dense, convolutions, batch norm, scaling by a constant, average pools and reductions.

The radius becomes ||W||_2 rho. The box is the intersection of interval arithmetic with (W z + b) -+ ||W_i||_2 rho
(Lee, 2021, (3.2.6)-(3.2.8)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import engine
from ..domain.ball_box import BallBox, per_sample
from ..domain.batch_axis import moves_samples
from ..domain.convolutions import Conv, ConvTranspose
from ..domain.lengths import flat
from ..domain.linear_maps import Dense, LinearMap, NonNegative, Scale, Selection
from ..domain.products import Product
from ..domain.rounding import gamma, input_of_affine, output_of_affine, sign_kept, summands
from ..engine import Node
from .base import AffineRule, Rows, State, apply, only_perturbed
from .context import Context, weight_name
from .cut import Cut


class Affine(AffineRule):
    """Rule of a node that is affine in its one perturbed input.

    Args:
        linear_map: (node, inputs, index of the perturbed input) -> linear part of the node; None if the node is not
            affine in that input, which leaves the node to interval arithmetic.
        by_channel: Whether the bias is one number for each channel. Default False.
        weight: Index of the input that only multiplies the perturbed one; None (default) if there is none.
    """

    alike = True

    def __init__(
        self,
        linear_map: Callable[[Node, Sequence[State], int], LinearMap | None],
        by_channel: bool = False,
        weight: int | None = None,
    ) -> None:
        self.linear_map = linear_map
        self.by_channel = by_channel
        self.weight = weight

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        index = only_perturbed(inputs)
        linear_map = None if index is None else self.linear_map(node, inputs, index)
        if index is None or linear_map is None:
            return None
        state = inputs[index]
        assert isinstance(state, BallBox)
        if len(center) != len(state.center) or linear_map.output_shape != center.shape[1:]:
            return None  # the node mixes samples
        if context.tighten:
            state = state.tightened()
        norm, rows = context.norm(node, linear_map), linear_map.row_norms(exact=context.tighten)
        loss = gamma(center.dtype, summands(linear_map)) if context.outward else 0.0
        wider = input_of_affine(state, loss) if context.outward else state
        image = self._image(node, inputs, wider, center, linear_map, norm, rows, context.ball_only)
        if context.outward:
            image = output_of_affine(image, state, rows, loss)
        if image.lower is None or state.lower is None:
            return image

        def at_zero() -> Tensor:
            return apply(node, inputs, lambda state: torch.zeros_like(state.center))

        lower = sign_kept(image.lower, state.lower, linear_map, at_zero, context.outward)
        return BallBox(center, image.radius, lower, image.upper)

    @staticmethod
    def _image(
        node: Node,
        inputs: Sequence[State],
        state: BallBox,
        center: Tensor,
        linear_map: LinearMap,
        norm: Tensor,
        rows: Tensor,
        ball_only: bool,
    ) -> BallBox:
        """Set of W v + b for v in `state`."""
        radius = norm * state.radius
        if ball_only:
            return BallBox(center, radius)
        if state.lower is None or state.upper is None:
            # Interval arithmetic on z -+ rho gives ||W_i||_1 rho >= ||W_i||_2 rho, which is no tighter.
            reach = rows * per_sample(state.radius, center)
            return BallBox(center, radius, center - reach, center + reach)
        middle_of = 0.5 * (state.lower + state.upper)
        middle = apply(node, inputs, lambda _: middle_of)
        spread = linear_map.abs()(0.5 * (state.upper - state.lower))
        return BallBox(center, radius, *Cut.apply(middle, spread, center, rows, state.radius))

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
        index = only_perturbed(inputs)
        linear_map = None if index is None else self.linear_map(node, inputs, index)
        if linear_map is None or linear_map.output_shape != rows.shape[2:]:
            return None
        passed = linear_map.adjoint(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return [passed if i == index else None for i in range(len(inputs))]

    def adjoint_and_sums(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows | None, Tensor]:
        index = only_perturbed(inputs)
        linear_map = None if index is None else self.linear_map(node, inputs, index)
        if not isinstance(linear_map, Conv) or linear_map.output_shape != rows.shape[2:]:
            return super().adjoint_and_sums(node, inputs, rows)
        passed, sums = (part.unflatten(0, rows.shape[:2]) for part in linear_map.adjoint_and_sums(rows.flatten(0, 1)))
        return [passed if i == index else None for i in range(len(inputs))], sums


class Own(NamedTuple):
    """The linear part of a node whose constant differs by sample.

    Attributes:
        norms: Upper bounds on the spectral norms, (B,).
        rows: l2 norms of the rows, of the shape of the output, (B, ...).
        spread: The linear map of absolute values, which maps half widths of boxes: (B, ...) -> (B, ...).
        terms: Number of products that each output sums.
    """

    norms: Tensor
    rows: Tensor
    spread: Callable[[Tensor], Tensor]
    terms: int


class TimesConstant(Affine):
    """Rule of a product with a constant, which may differ by sample.

    Args:
        linear_map: As in `Affine`, for a constant that is the same for every sample.
        own: (node, constant, set of the perturbed operand, index of this operand, clean value of the node) -> linear
            part for a constant that differs by sample; None declines.
    """

    homogeneous = True
    alike = False

    def __init__(
        self,
        linear_map: Callable[[Node, Sequence[State], int], LinearMap | None],
        own: Callable[[Node, Tensor, BallBox, int, Tensor], Own | None],
    ) -> None:
        super().__init__(linear_map)
        self.own = own

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        index = only_perturbed(inputs)
        if index is None:
            return None
        state, constant = inputs[index], inputs[1 - index]
        assert isinstance(state, BallBox) and isinstance(constant, Tensor)
        if not differs_by_sample(constant, state.center, center):
            return super().propagate(node, inputs, center, context)
        own = self.own(node, constant, state, index, center)
        if own is None:
            return None
        state = state.tightened() if context.tighten else state
        context.norms[node.name] = own.norms.detach().max()
        loss = gamma(center.dtype, own.terms) if context.outward else 0.0
        wider = input_of_affine(state, loss) if context.outward else state
        radius = own.norms * wider.radius
        image = BallBox(center, radius)
        if not context.ball_only:
            reach = own.rows * per_sample(wider.radius, center)
            lower, upper = center - reach, center + reach
            if wider.lower is not None and wider.upper is not None:
                middle = apply(node, inputs, lambda _: 0.5 * (wider.lower + wider.upper))  # type: ignore[operator]
                spread = own.spread(0.5 * (wider.upper - wider.lower))
                lower, upper = torch.maximum(lower, middle - spread), torch.minimum(upper, middle + spread)
            image = BallBox(center, radius, lower, upper)
        return output_of_affine(image, state, own.rows.amax(0), loss) if context.outward else image


def differs_by_sample(constant: Tensor, value: Tensor, center: Tensor) -> bool:
    """Whether a constant operand has a batch axis of more than one sample.

    Args:
        constant: The constant.
        value: Clean value of the other operand, (B, ...).
        center: Clean value of the result, (B, ...).
    """
    return constant.dim() == value.dim() == center.dim() and constant.shape[0] == len(value) > 1


class Scaling(TimesConstant):
    """Rule of x times a constant, or x divided by a constant, entry by entry; the constant may differ by sample.

    Args:
        inverse: Whether to divide.
    """

    def __init__(self, inverse: bool) -> None:
        super().__init__(_scaling(inverse), self._own_factor)
        self.inverse = inverse

    def _own_factor(self, node: Node, constant: Tensor, state: BallBox, index: int, center: Tensor) -> Own | None:
        if self.inverse and index != 0:
            return None
        factor = constant.to(center.dtype)
        factor = (1 / factor if self.inverse else factor).abs()
        copies = math.sqrt(center[0].numel() / state.center[0].numel())
        return Own(copies * flat(factor).amax(1), factor.expand_as(center), lambda half: half * factor, 1)

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
        index = only_perturbed(inputs)
        if index is None or (self.inverse and index != 0):
            return None
        state, factor = inputs[index], inputs[1 - index]
        assert isinstance(factor, Tensor) and isinstance(state, BallBox)
        if rows.dim() != state.center.dim() + 1 or rows.shape[1] != len(state.center):
            return None  # broadcasting moved the first axis
        scaled = rows / factor if self.inverse else rows * factor
        passed = sum_to(scaled, shape_of(state))
        return [passed if i == index else None for i in range(2)]


def shape_of(state: State) -> torch.Size:
    """Shape of one sample of a set, without the batch; shape of a constant."""
    return state.center.shape[1:] if isinstance(state, BallBox) else state.shape


def dense(node: Node, inputs: Sequence[State], index: int) -> LinearMap | None:
    """Linear part of a dense layer (ONNX Gemm); None if the weight is perturbed or the input transposed."""
    weight = inputs[1]
    if index != 0 or not isinstance(weight, Tensor) or node.transA:
        return None
    alpha = engine.weight_scale(node)
    weight = weight if node.transB else weight.t()
    return Dense(weight if alpha == 1.0 else weight * alpha, shape_of(inputs[0])[:-1])


def constant_product(node: Node, inputs: Sequence[State], index: int) -> LinearMap | None:
    """Linear part of a matrix product with a constant that is the same for every sample; None for other products."""
    weight, shape = inputs[1 - index], shape_of(inputs[index])
    if not isinstance(weight, Tensor):
        return None
    if index == 0 and weight.dim() == 2:
        return Dense(weight.t(), shape[:-1])
    if weight.dim() == len(shape) + 1 >= 3 and weight.shape[0] == 1:
        weight = weight[0]
    if not 1 <= weight.dim() <= max(2, len(shape)) or len(shape) < 1 + index:
        return None  # an axis of the constant is that of the batch
    return Product(weight, shape, left=index == 1)


def conv(node: Node, inputs: Sequence[State], index: int) -> LinearMap | None:
    """Linear part of a convolution with a constant weight; None if the weight is perturbed."""
    weight = inputs[1]
    if index != 0 or not isinstance(weight, Tensor):
        return None
    return Conv(weight, shape_of(inputs[0]), tuple(node.stride), tuple(node.padding), tuple(node.dilation), node.groups)


def conv_transpose(node: Node, inputs: Sequence[State], index: int) -> LinearMap | None:
    """Linear part of a transposed convolution with a constant weight; None if the weight is perturbed."""
    weight = inputs[1]
    if index != 0 or not isinstance(weight, Tensor):
        return None
    return ConvTranspose(
        weight,
        shape_of(inputs[0]),
        tuple(node.stride),
        tuple(node.padding),
        tuple(node.output_padding),
        tuple(node.dilation),
        node.groups,
    )


def batch_norm(node: Node, inputs: Sequence[State], index: int) -> LinearMap | None:
    """Linear part of a batch norm in eval mode, which scales by weight / sqrt(variance + eps); else None."""
    if index != 0 or node.training or not (node.use_mean and node.use_var and node.use_affine):
        return None
    _, weight, _, _, variance = inputs
    assert isinstance(weight, Tensor) and isinstance(variance, Tensor)
    shape = shape_of(inputs[0])
    factor = (weight / torch.sqrt(variance + node.eps)).view(-1, *[1] * (len(shape) - 1))
    return Scale(factor, shape)


def _scaling(inverse: bool) -> Callable[[Node, Sequence[State], int], LinearMap | None]:
    def scale(node: Node, inputs: Sequence[State], index: int) -> LinearMap | None:
        factor, shape = inputs[1 - index], shape_of(inputs[index])
        if inverse and index != 0:
            return None  # a constant divided by the input is not linear
        assert isinstance(factor, Tensor)
        factor = factor if factor.is_floating_point() else factor.to(_center(inputs[index]).dtype)
        if factor.dim() > len(shape):
            if factor.shape[0] != 1:
                return None  # one factor for each sample
            factor = factor[0]
        return Scale(1 / factor if inverse else factor, shape)

    return scale


def nonnegative(node: Node, inputs: Sequence[State], index: int) -> LinearMap | None:
    """The node's function as a linear map without negative entries; None if the node mixes samples."""
    center = _center(inputs[0])
    if index != 0 or (type(node).__name__ in _ALONG_AXES and moves_samples(node, center.dim())):
        return None

    def function(x: Tensor) -> Tensor:
        return node.forward(x, *inputs[1:])

    made = Selection if type(node).__name__ in _SELECTIONS else NonNegative
    return made(function, center.shape[1:], center.dtype, center.device)


_SELECTIONS = frozenset({"BoundGather", "BoundTile", "BoundRepeatingPad"})
_ALONG_AXES = _SELECTIONS | {"BoundReduceMean", "BoundReduceSum", "BoundCumSum"}


def sum_to(rows: Tensor, shape: torch.Size) -> Tensor:
    """Sum coefficient rows (S, B, ...) over the axes along which broadcasting repeated an operand.

    Args:
        rows: Rows of the result, (S, B, ...).
        shape: Shape of one sample of the operand.

    Returns:
        (S, B, *shape).
    """
    extra = rows.dim() - 2 - len(shape)
    if extra:
        rows = rows.flatten(2, 1 + extra).sum(2)
    for dim, size in enumerate(shape):
        if size == 1 and rows.shape[dim + 2] != 1:
            rows = rows.sum(dim + 2, keepdim=True)
    return rows


def _center(state: State) -> Tensor:
    return state.center if isinstance(state, BallBox) else state


def power_iterable(node: Node) -> tuple[str, Any, Callable[[Tensor], LinearMap]] | None:
    """The weight and the linear map of a dense or convolutional node, for a power iteration on its norm.

    Args:
        node: A node of the graph.

    Returns:
        Name of the weight in the user's model, node of the weight, and a function from a weight to the linear map;
        None for other nodes, and for weights that are no parameters or buffers of the model.
    """
    build = {
        "BoundLinear": dense,
        "BoundBallBoxLinear": dense,
        "BoundMatMul": constant_product,
        "BoundMatMulByAdjoint": constant_product,
        "BoundConv": conv,
        "BoundConv1d": conv,
        "BoundConvTranspose": conv_transpose,
        "BoundAnyConvTranspose": conv_transpose,
    }.get(type(node).__name__)
    read = [i for i, parent in enumerate(node.inputs[:2]) if _reads_input(parent)] if build is not None else []
    if build is None or len(read) != 1:
        return None
    index = read[0]
    if weight_name(node, index) == node.name:
        return None
    shape = node.inputs[index].output_shape
    state = BallBox(torch.empty(shape, device="meta"), torch.empty(shape[:1], device="meta"))

    def built(weight: Tensor) -> LinearMap | None:
        return build(node, [state, weight] if index == 0 else [weight, state], index)

    if built(engine.constant(node.inputs[1 - index])) is None:
        return None

    def linear_map(weight: Tensor) -> LinearMap:
        made = built(weight)
        assert made is not None
        return made

    return weight_name(node, index), node.inputs[1 - index], linear_map


def _reads_input(node: Node) -> bool:
    """Whether a node depends on an input of the model, perturbed or not, rather than on weights and constants alone."""
    weights = (engine.BoundParams, engine.BoundBuffers)
    return any(
        isinstance(leaf, engine.BoundInput) and not isinstance(leaf, weights)
        for leaf in engine.ancestors_in_order(node)
    )
