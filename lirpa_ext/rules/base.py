"""Base classes of rules: the set of a node from the sets of its inputs, and coefficient rows back through the node."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.rounding import widened
from ..engine import Node
from ..engine.limits import is_out_of_memory
from ..engine.positive_list import is_listed, is_ours, refusal
from .context import Context

State = BallBox | Tensor  # the set of a perturbed node, or the value of a constant one
Rows = list[Tensor | None]  # coefficient rows (S, B, ...) for each perturbed input of a node, None for constant ones


class SetRule:
    """A rule that computes the set of a node from the sets of its inputs. Subclasses write `propagate`.

    `propagate` must keep the invariant of `BallBox`: if the value of every input lies in its set, the value of the
    node lies in the returned set.

    Attributes:
        exact: Whether the node's values and box are computed without rounding. Default False.
    """

    exact = False

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        """Set of a node.

        Args:
            node: The node.
            inputs: A `BallBox` for each perturbed input, the value for each constant one.
            center: The node's own clean value, (B, ...).
            context: Norms and switches of this propagation.

        Returns:
            The set, or None to leave the node to the engine's interval arithmetic.
        """
        raise NotImplementedError

    def widened(self, node: Node, state: BallBox) -> BallBox:
        """The node's set, enlarged to cover rounding in its values; not called for rules that are `exact`."""
        return widened(state)


class AffineRule(SetRule):
    """A rule for nodes that are affine in their perturbed inputs, so that coefficient rows pass through exactly.

    Subclasses write `propagate` and `adjoint`.

    Attributes:
        homogeneous: Whether the node maps 0 to 0 wherever `adjoint` applies. Default False.
        alike: Whether the node's value at 0 is the same for every sample. Default False.
        by_channel: Whether the node's value at 0 is one number for each channel of an image. Default False.
        weight: Index of an input, such as a weight, that the node's value at 0 does not depend on; None (default) if
            there is none.
    """

    homogeneous = False
    alike = False
    by_channel = False
    weight: int | None = None

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
        """Coefficient rows of the inputs, by the transposed linear part.

        Args:
            node: The node.
            inputs: As in `propagate`; of sets, only the shapes are read.
            rows: Rows of the node's output, (S, B, ...).

        Returns:
            Rows of each input, (S, B, ...), None for constant ones; None alone if this node is not affine.
        """
        raise NotImplementedError

    def adjoint_and_sums(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows | None, Tensor]:
        """`adjoint`, and the sums of the rows over positions, (S, B, C); only for rules `by_channel`."""
        return self.adjoint(node, inputs, rows), rows.flatten(3).sum(3)


class RelaxedRule(SetRule):
    """A rule for nodes with a linear relaxation, which carries coefficient rows back where the node is not affine."""

    def relax(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows, Tensor] | None:
        """Rows and bias with rows . node(x) >= (returned rows) . x + bias for all x in the inputs' sets.

        Args:
            node: The node.
            inputs: As in `SetRule.propagate`.
            rows: Rows of the node's output, (S, B, ...).

        Returns:
            Rows of each input, (S, B, ...), None for constant ones, and the bias, (S, B); None alone if the rule has no
            relaxation for this node.
        """
        raise NotImplementedError


class Rule(AffineRule, RelaxedRule):
    """Deprecated: a `SetRule`, an `AffineRule` or a `RelaxedRule`."""

    def __init_subclass__(cls, **options: Any) -> None:
        warnings.warn("Rule is SetRule, AffineRule or RelaxedRule now", DeprecationWarning, stacklevel=2)

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
        """None: not affine."""
        return None

    def relax(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows, Tensor] | None:
        """None: no relaxation."""
        return None


def propagate_interval(node: Node, inputs: Sequence[State], center: Tensor) -> BallBox:
    """Set of a node by its own interval arithmetic, `interval_propagate`, and the ball that circumscribes the box.

    Args:
        node: The node.
        inputs: As in `SetRule.propagate`.
        center: Clean value of the node, (B, ...).

    Raises:
        UnsupportedNodeError: The interval arithmetic is the engine's, and fails or is not on the list of those known
            to hold.
    """
    intervals = [state.box() if isinstance(state, BallBox) else (state, state) for state in inputs]
    if is_ours(node, "interval_propagate"):
        lower, upper = node.interval_propagate(*intervals)
    elif is_listed(node, "interval"):
        try:
            lower, upper = node.interval_propagate(*intervals)
        except Exception as error:  # the engine raises exceptions of any class: AssertionError, KeyError, ...
            if is_out_of_memory(error):
                raise
            reason = f"the engine's interval arithmetic fails on it ({type(error).__name__}: {error})"
            raise refusal(node, "interval", "interval arithmetic", reason) from error
    else:
        raise refusal(node, "interval", "interval arithmetic", "it has no rule in lirpa_ext")
    return BallBox.from_box(center, torch.minimum(lower, center), torch.maximum(upper, center))


def only_perturbed(inputs: Sequence[State]) -> int | None:
    """Index of the perturbed input if there is exactly one, else None."""
    perturbed = [index for index, state in enumerate(inputs) if isinstance(state, BallBox)]
    return perturbed[0] if len(perturbed) == 1 else None


def apply(node: Node, inputs: Sequence[State], pick: Callable[[BallBox], Tensor]) -> Tensor:
    """The node's function of one tensor from each perturbed input's set; constant inputs are taken as they are.

    Args:
        node: The node.
        inputs: As in `SetRule.propagate`.
        pick: Set -> the tensor to take for it, such as its center.
    """
    return node.forward(*[pick(state) if isinstance(state, BallBox) else state for state in inputs])
