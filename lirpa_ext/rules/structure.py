"""Rules of operations that move, copy, join, add or select values: reshapes, slices, pads, concatenations, sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.batch_axis import acts_on_axes, moves_samples, regrouped, regroups_samples
from ..domain.lengths import length
from ..domain.rounding import gamma
from ..engine import Node
from ..errors import UnsupportedNodeError
from .base import AffineRule, Rows, State, apply, only_perturbed
from .context import Context
from .linear import sum_to


class Monotone(AffineRule):
    """Rule of a node whose every output is a non-decreasing function of its one perturbed input, sample by sample.

    The corners of the box are the function's values at the corners of the input's box. The radius is multiplied by
    `factor`, the Lipschitz constant of the node.

    Args:
        factor: (node, set of the input, clean value of the node) -> Lipschitz constant; None declines.
        back: (node, clean value of the input, rows (S, B, ...)) -> rows of the input, for nodes that are affine in the
            input; None, as value or result, declines.
        homogeneous: Whether the node maps 0 to 0. Default True.
    """

    exact = True

    def __init__(
        self,
        factor: Callable[[Node, BallBox, Tensor], float | None],
        back: Callable[[Node, Tensor, Tensor], Tensor | None] | None = None,
        homogeneous: bool = True,
    ) -> None:
        self.factor = factor
        self.back = back
        self.homogeneous = homogeneous

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        index = only_perturbed(inputs)
        if index is None:
            return None
        state = inputs[index]
        assert isinstance(state, BallBox)
        radius = self.radius(node, state, center, context)
        if radius is None:
            return None
        if state.lower is None or state.upper is None:
            return BallBox(center, radius)
        lower, upper = (apply(node, inputs, pick) for pick in (_lower, _upper))
        return BallBox(center, radius, lower, upper)

    def radius(self, node: Node, state: BallBox, center: Tensor, context: Context) -> Tensor | None:
        """Radius of the node's ball, (B,), or None to decline.

        Args:
            node: The node.
            state: Set of the input.
            center: Clean value of the node, (B, ...).
            context: Switches of the propagation.
        """
        factor = self.factor(node, state, center)
        if factor is None or len(center) != len(state.center):
            return None
        return state.radius if factor == 1 else state.radius * factor

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
        index = only_perturbed(inputs)
        if index is None or self.back is None:
            return None
        passed = self.back(node, inputs[index].center, rows)  # type: ignore[union-attr]
        return None if passed is None else [passed if i == index else None for i in range(len(inputs))]


class Reshape(Monotone):
    """Rule of a reshape, which keeps the order of all elements; balls are joined or split if it regroups the batch."""

    def __init__(self) -> None:
        super().__init__(one, _reshape_back)

    def radius(self, node: Node, state: BallBox, center: Tensor, context: Context) -> Tensor | None:
        radius = regrouped(state.radius, len(center))
        if radius is not None and context.outward and len(radius) < len(state.radius):
            radius = radius * (1 + gamma(radius.dtype, len(state.radius)))  # rounding of the sum of squares
        return radius


class Cast(Monotone):
    """Rule of a cast to a floating-point type no narrower than that of the model's input, which keeps all values.

    `propagate` raises UnsupportedNodeError for a narrower type, whose rounding exceeds that of the model's arithmetic.
    """

    def __init__(self) -> None:
        super().__init__(one, same)

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        dtype = _precision_of_input(node)
        if torch.finfo(center.dtype).eps > torch.finfo(dtype).eps:
            raise UnsupportedNodeError(
                f"node {node.name!r} ({type(node).__name__}) rounds the perturbed {dtype} input to {center.dtype}, "
                "which no bound here counts. Remove the cast from the model, or give the model and its input that type."
            )
        return super().propagate(node, inputs, center, context)


def _precision_of_input(node: Node) -> torch.dtype:
    while not isinstance(node, engine.BoundInput):
        node = next(parent for parent in node.inputs if parent.perturbed)
    return node.value.dtype


class Sum(AffineRule):
    """Rule of a + b or a - b: radii add up (Lee, 2021, (B.2.4)), boxes follow interval arithmetic, constants shift.

    Args:
        sign: Sign of the second operand, +1 or -1.
    """

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox:
        sets = [state for state in inputs if isinstance(state, BallBox)]
        (low_a, high_a), (low_b, high_b) = (box_of(state) for state in inputs)
        if self.sign < 0:
            low_b, high_b = -high_b, -low_b
        if any(state.center.dim() < center.dim() or len(state.center) != len(center) for state in sets):
            return BallBox.from_box(center, low_a + low_b, high_a + high_b)  # broadcasting moved the first axis
        radius = sum(state.radius * copies(state, center) for state in sets)
        assert isinstance(radius, Tensor)
        if all(state.lower is None for state in sets):
            return BallBox(center, radius)
        return BallBox(center, radius, low_a + low_b, high_a + high_b)

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
        sets = [state for state in inputs if isinstance(state, BallBox)]
        if any(state.center.dim() < rows.dim() - 1 or len(state.center) != rows.shape[1] for state in sets):
            return None
        signs = (1, self.sign)
        return [
            sign * sum_to(rows, state.center.shape[1:]) if isinstance(state, BallBox) else None
            for sign, state in zip(signs, inputs, strict=True)
        ]


class Negation(AffineRule):
    """Rule of -a."""

    exact = True

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox:
        (state,) = inputs
        assert isinstance(state, BallBox)
        if state.lower is None or state.upper is None:
            return BallBox(center, state.radius)
        return BallBox(center, state.radius, -state.upper, -state.lower)

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows:
        return [-rows]


class Concat(AffineRule):
    """Rule of a concatenation: rho^2 is the sum of the operands' rho^2, the box the concatenation of their boxes."""

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        states = [state for state in inputs if isinstance(state, BallBox)]
        if len(center) != len(states[0].center):
            return None  # concatenates along the batch
        radius = length(torch.stack([state.radius for state in states]), 0)
        if all(state.lower is None for state in states):
            return BallBox(center, radius)
        lower, upper = (apply(node, inputs, pick) for pick in (_lower, _upper))
        return BallBox(center, radius, lower, upper)

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
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


def box_of(state: State) -> tuple[Tensor, Tensor]:
    """Lower and upper corner of a set's box; for a constant, both are the constant."""
    return state.box() if isinstance(state, BallBox) else (state, state)


def copies(state: BallBox, center: Tensor) -> float:
    """Spectral norm of the map that broadcasts an operand: the root of the number of copies of each element.

    Args:
        state: Set of the operand.
        center: Clean value of the result, (B, ...).
    """
    return math.sqrt(center[0].numel() / state.center[0].numel())


def one(node: Node, state: BallBox, center: Tensor) -> float:
    """Lipschitz constant 1, of nodes that only move values."""
    return 1.0


def expand(node: Node, state: BallBox, center: Tensor) -> float | None:
    """Lipschitz constant of an expand: the root of the number of copies of each element; None if axes are added."""
    return copies(state, center) if center.dim() == state.center.dim() else None  # else it may move the batch


def transpose(node: Node, state: BallBox, center: Tensor) -> float | None:
    """Lipschitz constant 1 of a permutation of axes; None if it moves the batch."""
    return 1.0 if node.perm[0] == 0 else None


def along_features(node: Node, state: BallBox, center: Tensor) -> float | None:
    """Lipschitz constant 1 of a selection or reduction along the axes of a sample; None if it acts along the batch."""
    return None if moves_samples(node, state.center.dim()) else 1.0


def pad(node: Node, state: BallBox, center: Tensor) -> float | None:
    """Lipschitz constant 1 of padding by a constant; None for other modes, or if it pads the batch."""
    constant = node.attr.get("mode", "constant") in ("constant", b"constant")
    return along_features(node, state, center) if constant else None


def max_pool_factor(node: Node, state: BallBox, center: Tensor) -> float:
    """Lipschitz constant of a max pool: the root of the largest number of windows that contain one input.

    The maximum over a window is 1-Lipschitz in the window. A window that starts at j s contains j s + t d for t < k,
    with stride s and dilation d. For one input, these t differ by multiples of s / gcd(s, d), so that there are at
    most ceil(k gcd(s, d) / s) of them.
    """
    dilation = getattr(node, "dilation", None) or [1] * len(node.kernel_size)
    dilation = [dilation] * len(node.kernel_size) if isinstance(dilation, int) else dilation
    sizes = zip(node.kernel_size, node.stride, dilation, strict=True)
    return math.sqrt(math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in sizes))


def _reshape_back(node: Node, center: Tensor, rows: Tensor) -> Tensor | None:
    if not regroups_samples(node):
        return None
    return rows.reshape(len(rows), *center.shape)


def transpose_back(node: Node, center: Tensor, rows: Tensor) -> Tensor | None:
    """Rows (S, B, ...) through the inverse permutation of axes; None if the node moves the batch."""
    if node.perm[0] != 0:
        return None
    inverse = [node.perm.index(axis) for axis in range(len(node.perm))]
    return rows.permute(0, *(axis + 1 for axis in inverse))


def expand_back(node: Node, center: Tensor, rows: Tensor) -> Tensor | None:
    """Rows (S, B, ...) of an expand, summed over the copies of each element; None if axes are added."""
    return sum_to(rows, center.shape[1:]) if rows.dim() == center.dim() + 1 and rows.shape[1] == len(center) else None


def same(node: Node, center: Tensor, rows: Tensor) -> Tensor:
    """Rows as they are, for nodes that are the identity."""
    return rows


def select_back(node: Node, center: Tensor, rows: Tensor) -> Tensor | None:
    """Rows (S, B, ...) of a slice, split or pad, added up at the positions that the node selects.

    The positions are found by applying the node to a tensor of position numbers.

    Args:
        node: The node.
        center: Clean value of the input, (B, ...).
        rows: Rows of the node's output, (S, B, ...).

    Returns:
        Rows of the input, (S, B, ...); None if the node may drop or move samples.
    """
    if rows.shape[1] != len(center) or moves_samples(node, center.dim()):
        return None
    if 0 in acts_on_axes(node, center.dim()):
        return rows  # all samples, in their order
    shape = center.shape[1:]
    constants = [engine.constant(parent) for parent in node.inputs[1:]]
    positions = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64, device=rows.device).view(1, *shape)
    filled = node.forward(torch.zeros_like(positions), *constants)  # the value of a pad
    picked = (node.forward(positions, *constants) - filled).flatten().round().long()  # 0 at a pad
    out = rows.new_zeros(*rows.shape[:2], math.prod(shape) + 1)
    out = out.index_add(2, picked, rows.flatten(2))
    return out[..., 1:].reshape(*rows.shape[:2], *shape)
