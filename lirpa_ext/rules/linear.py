"""Linear maps: dense, convolutions, batch norm, scaling by a constant, average pools and reductions.

rho' = ||W||_2 rho; the box is interval arithmetic on the box, cut with (W z + b) -+ ||W_i||_2 rho
((3.2.6)-(3.2.8) of the source, erratum 1: intersected).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..linear_maps import Conv, ConvTranspose, Dense, LinearMap, NonNegative, Scale
from ..rounding import gamma, input_of_affine, output_of_affine, summands
from ..sets import BallBox, per_sample
from .base import Context, Rule, State, apply, only_perturbed, register_rule, weight_name
from .cut import Cut


class Affine(Rule):
    """Rule of a node that is affine in its one perturbed input.

    Args:
        linear_map: Builds the linear part from (node, inputs, index of the perturbed input); None where the
            node is not affine in that input, which then takes the engine's interval rule.
        by_channel: Whether its bias is one number for each channel.
        weight: Index of the input that multiplies the perturbed one and nothing else, if there is one.
    """

    alike = True

    def __init__(
        self,
        linear_map: Callable[[Any, Sequence[State], int], LinearMap | None],
        by_channel: bool = False,
        weight: int | None = None,
    ) -> None:
        self.linear_map = linear_map
        self.by_channel = by_channel
        self.weight = weight

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        index = only_perturbed(inputs)
        linear_map = None if index is None else self.linear_map(node, inputs, index)
        if index is None or linear_map is None:
            return None
        state = inputs[index]
        assert isinstance(state, BallBox)
        if len(center) != len(state.center) or linear_map.output_shape != center.shape[1:]:
            return None  # it mixes samples
        if context.tighten:
            state = state.tightened()
        norm, rows = context.norm(node, linear_map), linear_map.row_norms(exact=context.tighten)
        if not context.outward:
            return self._image(node, inputs, state, center, linear_map, norm, rows, context.ball_only)
        loss = gamma(center.dtype, summands(linear_map))
        wider = input_of_affine(state, loss)
        image = self._image(node, inputs, wider, center, linear_map, norm, rows, context.ball_only)
        return output_of_affine(image, state, rows, loss)

    @staticmethod
    def _image(
        node: Any,
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
            # Interval arithmetic on z -+ rho reaches ||W_i||_1 rho >= ||W_i||_2 rho: nothing to gain.
            reach = rows * per_sample(state.radius, center)
            return BallBox(center, radius, center - reach, center + reach)
        middle_of = 0.5 * (state.lower + state.upper)
        middle = apply(node, inputs, lambda _: middle_of)
        spread = linear_map.abs()(0.5 * (state.upper - state.lower))
        return BallBox(center, radius, *Cut.apply(middle, spread, center, rows, state.radius))

    def adjoint(self, node: Any, inputs: Sequence[State], rows: Tensor) -> list[Tensor | None] | None:
        index = only_perturbed(inputs)
        linear_map = None if index is None else self.linear_map(node, inputs, index)
        if linear_map is None or linear_map.output_shape != rows.shape[2:]:
            return None
        passed = linear_map.adjoint(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return [passed if i == index else None for i in range(len(inputs))]

    def adjoint_and_sums(
        self, node: Any, inputs: Sequence[State], rows: Tensor
    ) -> tuple[list[Tensor | None] | None, Tensor]:
        index = only_perturbed(inputs)
        linear_map = None if index is None else self.linear_map(node, inputs, index)
        if not isinstance(linear_map, Conv) or linear_map.output_shape != rows.shape[2:]:
            return super().adjoint_and_sums(node, inputs, rows)
        passed, sums = (part.unflatten(0, rows.shape[:2]) for part in linear_map.adjoint_and_sums(rows.flatten(0, 1)))
        return [passed if i == index else None for i in range(len(inputs))], sums


class Scaling(Affine):
    """x times a constant, or divided by one; the constant may differ by sample.

    Args:
        inverse: Divide.
    """

    homogeneous = True  # of a constant divided by the input there is no adjoint
    alike = False

    def __init__(self, inverse: bool) -> None:
        super().__init__(_scaling(inverse))
        self.inverse = inverse

    def adjoint(self, node: Any, inputs: Sequence[State], rows: Tensor) -> list[Tensor | None] | None:
        index = only_perturbed(inputs)
        if index is None or (self.inverse and index != 0):
            return None
        factor = inputs[1 - index]
        assert isinstance(factor, Tensor)
        scaled = rows / factor if self.inverse else rows * factor
        passed = sum_to(scaled, _shape(inputs[index]))
        return [passed if i == index else None for i in range(2)]


class Quotient(Scaling):
    """x / y: scaling where y is constant, else interval division, unbounded where y may be 0 (0.3 asserts there)."""

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        scaled = super().propagate(node, inputs, center, context)
        if scaled is not None:
            return scaled
        lower, upper = quotient_box(*(s.box() if isinstance(s, BallBox) else (s, s) for s in inputs))
        return BallBox.from_box(center, torch.minimum(lower, center), torch.maximum(upper, center))


def quotient_box(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Interval division, infinite where y may be 0."""
    corners = torch.stack(torch.broadcast_tensors(*(a / b for a in x for b in y)))
    signed = ((y[0] > 0) | (y[1] < 0)).expand_as(corners[0])
    return corners.amin(0).where(signed, -torch.inf), corners.amax(0).where(signed, torch.inf)


class Reciprocal(Rule):
    """1 / y, into which 0.7 turns a quotient: |f'| is at most 1 / min y^2; unbounded where y may be 0."""

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        (state,) = inputs
        assert isinstance(state, BallBox)
        low, high = state.box()
        lower, upper = quotient_box((torch.ones_like(low),) * 2, (low, high))
        slope = torch.where((low > 0) | (high < 0), 1 / torch.minimum(low**2, high**2), torch.inf)
        return BallBox(center, state.radius * slope.flatten(1).amax(1), lower, upper)


def _shape(state: State) -> torch.Size:
    return state.center.shape[1:] if isinstance(state, BallBox) else state.shape


def _dense(node: Any, inputs: Sequence[State], index: int) -> LinearMap | None:
    weight = inputs[1]
    if index != 0 or not isinstance(weight, Tensor) or node.transA:
        return None
    alpha = engine.weight_scale(node)
    weight = weight if node.transB else weight.t()
    return Dense(weight if alpha == 1.0 else weight * alpha, _shape(inputs[0])[:-1])


def _matmul(node: Any, inputs: Sequence[State], index: int) -> LinearMap | None:
    weight = inputs[1 - index]
    if not isinstance(weight, Tensor) or weight.dim() != 2 or index != 0:
        return None
    return Dense(weight.t(), _shape(inputs[0])[:-1])


def _conv(node: Any, inputs: Sequence[State], index: int) -> LinearMap | None:
    weight = inputs[1]
    if index != 0 or not isinstance(weight, Tensor):
        return None
    return Conv(weight, _shape(inputs[0]), tuple(node.stride), tuple(node.padding), tuple(node.dilation), node.groups)


def _conv_transpose(node: Any, inputs: Sequence[State], index: int) -> LinearMap | None:
    weight = inputs[1]
    if index != 0 or not isinstance(weight, Tensor):
        return None
    return ConvTranspose(
        weight,
        _shape(inputs[0]),
        tuple(node.stride),
        tuple(node.padding),
        tuple(node.output_padding),
        tuple(node.dilation),
        node.groups,
    )


def _batch_norm(node: Any, inputs: Sequence[State], index: int) -> LinearMap | None:
    if index != 0 or node.training or not (node.use_mean and node.use_var and node.use_affine):
        return None
    _, weight, _, _, variance = inputs
    assert isinstance(weight, Tensor) and isinstance(variance, Tensor)
    shape = _shape(inputs[0])
    factor = (weight / torch.sqrt(variance + node.eps)).view(-1, *[1] * (len(shape) - 1))
    return Scale(factor, shape)


def _scaling(inverse: bool) -> Callable[[Any, Sequence[State], int], LinearMap | None]:
    def scale(node: Any, inputs: Sequence[State], index: int) -> LinearMap | None:
        factor, shape = inputs[1 - index], _shape(inputs[index])
        if inverse and index != 0:
            return None  # a constant divided by the input is not linear
        assert isinstance(factor, Tensor)
        factor = factor if factor.is_floating_point() else factor.to(torch.get_default_dtype())
        if factor.dim() > len(shape):
            if factor.shape[0] != 1:
                return None  # one factor for each sample
            factor = factor[0]
        return Scale(1 / factor if inverse else factor, shape)

    return scale


def _nonnegative(node: Any, inputs: Sequence[State], index: int) -> LinearMap | None:
    """The node itself, where its linear part has no negative entry and it maps 0 to 0, sample by sample."""
    if index != 0:
        return None
    center = _center(inputs[0])
    if type(node).__name__ == "BoundGather" and node.axis % center.dim() == 0:
        return None  # along the first axis, where samples are

    def function(x: Tensor) -> Tensor:
        return node.forward(x, *inputs[1:])

    return NonNegative(function, center.shape[1:], center.dtype, center.device)


def sum_to(rows: Tensor, shape: torch.Size) -> Tensor:
    """Undo broadcasting: sum rows (S, B, ...) over what was repeated."""
    extra = rows.dim() - 2 - len(shape)
    if extra:
        rows = rows.flatten(2, 1 + extra).sum(2)
    for dim, size in enumerate(shape):
        if size == 1 and rows.shape[dim + 2] != 1:
            rows = rows.sum(dim + 2, keepdim=True)
    return rows


def _center(state: State) -> Tensor:
    return state.center if isinstance(state, BallBox) else state


def power_iterable(node: Any) -> tuple[str, Any, Callable[[Tensor], LinearMap]] | None:
    """(name, weight node, weight -> linear map) of a dense or convolutional node with a weight of the model."""
    build = {
        "BoundLinear": _dense,
        "BoundBallBoxLinear": _dense,
        "BoundMatMul": _matmul,
        "BoundConv": _conv,
        "BoundConv1d": _conv,
        "BoundConvTranspose": _conv_transpose,
        "BoundAnyConvTranspose": _conv_transpose,
    }.get(type(node).__name__)
    if build is None or node.inputs[1].perturbed or weight_name(node) == node.name:
        return None
    shape = node.inputs[0].output_shape
    state = BallBox(torch.empty(shape, device="meta"), torch.empty(shape[:1], device="meta"))
    if build(node, [state, engine.constant(node.inputs[1])], 0) is None:
        return None

    def linear_map(weight: Tensor) -> LinearMap:
        made = build(node, [state, weight], 0)
        assert made is not None
        return made

    return weight_name(node), node.inputs[1], linear_map


register_rule("BoundLinear", Affine(_dense, weight=1))
register_rule("BoundBallBoxLinear", Affine(_dense, weight=1))
register_rule("BoundMatMul", Affine(_matmul))
register_rule("BoundConv", Affine(_conv, by_channel=True, weight=1))
register_rule("BoundConvTranspose", Affine(_conv_transpose, by_channel=True, weight=1))
register_rule("BoundBatchNormalization", Affine(_batch_norm))
register_rule("BoundMul", Scaling(inverse=False))
register_rule("BoundDiv", Quotient(inverse=True))
register_rule("BoundReciprocal", Reciprocal())
for name in (
    "BoundAveragePool",
    "BoundGlobalAveragePool",
    "BoundReduceMean",
    "BoundReduceSum",
    "BoundCumSum",
    "BoundGather",
    "BoundTile",
):
    register_rule(name, Affine(_nonnegative))
