"""Applying the table of rules: the set of a node, and coefficient rows carried back through the node."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.lengths import length
from ..domain.rounding import widened
from ..engine import Node
from ..errors import UnsupportedNodeError
from .base import AffineRule, Rows, State, apply, only_perturbed, propagate_interval
from .context import Context
from .table import RULES


def propagate_node(node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox:
    """Set of one node, by its rule, or by the engine's interval arithmetic if there is no rule or it declines.

    Args:
        node: The node.
        inputs: A `BallBox` for each perturbed input, the value for each constant one.
        center: Clean value of the node, (B, ...).
        context: Norms and switches; nodes without a rule are noted in its `fallbacks`.

    Returns:
        The set; with `outward`, enlarged to cover rounding.

    Raises:
        UnsupportedNodeError: The node's values are not floating-point numbers, or neither a rule nor the engine's
            interval arithmetic can bound it.
    """
    if not center.is_floating_point():
        raise UnsupportedNodeError(
            f"node {node.name!r} ({type(node).__name__}) turns the perturbed input into {center.dtype}; a ball needs "
            "real values. Remove the cast or comparison from the model."
        )
    rule = RULES.get(type(node).__name__)
    state = None
    if rule is not None:
        state = rule.propagate(node, inputs, center, context)
    if state is None:
        context.fallbacks[node.name] = type(node).__name__
        state = propagate_interval(node, inputs, center)
    if context.ball_only:
        state = BallBox(state.center, state.radius)
    if context.outward and (rule is None or not rule.exact):
        state = widened(state) if rule is None else rule.widened(node, state)
    return state


def adjoint_and_bias(node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows, Tensor] | None:
    """Carry coefficient rows back through an affine node.

    Args:
        node: The node.
        inputs: As in `SetRule.propagate`; of sets, only the shapes are read.
        rows: Rows of the node's output, (S, B, ...).

    Returns:
        Rows of each input, (S, B, ...) or None for constant ones, and the rows times the node's value at 0, (S, B);
        None if the node is not affine.
    """
    rule, sums = RULES.get(type(node).__name__), None
    if not isinstance(rule, AffineRule):
        return None
    if rule.by_channel:
        passed, sums = rule.adjoint_and_sums(node, inputs, rows)
    else:
        passed = rule.adjoint(node, inputs, rows)
    return None if passed is None else (passed, rows_times_constant(node, inputs, rows, sums))


def rows_times_constant(node: Node, inputs: Sequence[State], rows: Tensor, sums: Tensor | None = None) -> Tensor:
    """Coefficient rows times the value at 0 of an affine node, that is its bias.

    Args:
        node: The node, of a class with an `AffineRule`.
        inputs: As in `SetRule.propagate`.
        rows: Rows of the node's output, (S, B, ...).
        sums: Sums of the rows over positions, (S, B, C), if known, for rules `by_channel`.

    Returns:
        (S, B).
    """
    rule = RULES[type(node).__name__]
    assert isinstance(rule, AffineRule)
    if rule.homogeneous or all(isinstance(state, BallBox) for state in inputs):
        return rows.new_zeros(rows.shape[:2])
    if rule.alike:
        known = [s.detach() if i == rule.weight and isinstance(s, Tensor) else s for i, s in enumerate(inputs)]
        value = apply(node, known, lambda state: rows.new_zeros(1, *state.center.shape[1:]))
        if len(value) == 1:  # longer if a constant has a batch axis
            if sums is not None:
                return sums @ value.flatten(2)[0, :, 0]
            if rows.dim() == 5:  # channels last, in which convolutions keep their rows
                rows, value = rows.movedim(2, -1), value.movedim(1, -1)
            return rows.reshape(*rows.shape[:2], -1) @ value.flatten()  # reshape, as a sample may have no axis
    value = apply(node, inputs, lambda state: rows.new_zeros(state.center.shape))
    return (rows * value).reshape(*rows.shape[:2], -1).sum(2)


def frobenius(node: Node, inputs: Sequence[State]) -> Tensor | float:
    """Frobenius norm of an affine node's linear part, 0-dim; 1 for nodes whose rule has no linear map.

    Args:
        node: The node.
        inputs: As in `SetRule.propagate`.
    """
    linear_map = getattr(RULES.get(type(node).__name__), "linear_map", None)
    index = only_perturbed(inputs)
    found = None if linear_map is None or index is None else linear_map(node, inputs, index)
    return 1.0 if found is None else length(found.row_norms().expand(found.output_shape).reshape(-1)).detach()
