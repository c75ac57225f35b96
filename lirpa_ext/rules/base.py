"""What a rule is: how the set of a node follows from those of its inputs, and how rows go back through it."""

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
Rows = list[Tensor | None]  # coefficient rows (S, B, ...) of each perturbed input of a node, None at the constant ones


class SetRule:
    """How the set of a node follows from the sets of its inputs. Subclasses write `propagate`.

    `propagate` must keep the invariant of `BallBox`: if every input's value lies in its set, the node's value
    lies in the returned one.

    Attributes:
        exact: Whether values and box are computed without rounding.
    """

    exact = False

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        """Set of a node, or None to leave it to the engine's interval rule.

        Args:
            node: The node.
            inputs: A `BallBox` for each perturbed input, the value for each constant one.
            center: The node's own clean value, (B, ...).
            context: Norms and switches of this propagation.
        """
        raise NotImplementedError

    def widened(self, node: Node, state: BallBox) -> BallBox:
        """The node's set, larger by what computing its values may lose; not asked of a rule that is `exact`."""
        return widened(state)


class AffineRule(SetRule):
    """A rule of a node that is affine in its perturbed inputs, so that rows go back through it exactly.

    Attributes:
        homogeneous: Whether the node maps 0 to 0 wherever `adjoint` applies.
        alike: Whether the node's value at 0 is the same for every sample.
        by_channel: Whether it is one number for each channel of an image.
        weight: Index of an input that does not count in the value at 0, and gets no gradient from it.
    """

    homogeneous = False
    alike = False
    by_channel = False
    weight: int | None = None

    def adjoint(self, node: Node, inputs: Sequence[State], rows: Tensor) -> Rows | None:
        """Coefficient rows of the inputs; None where the node is not affine after all.

        Args:
            node: The node.
            inputs: As in `propagate`; only the shapes of the sets are read.
            rows: Rows of the node's output, (S, B, ...).
        """
        raise NotImplementedError

    def adjoint_and_sums(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows | None, Tensor]:
        """`adjoint`, and the sums of the rows over positions, (S, B, C), for rules `by_channel`."""
        return self.adjoint(node, inputs, rows), rows.flatten(3).sum(3)


class RelaxedRule(SetRule):
    """A rule of a node with a linear relaxation, which carries rows back where the node is not affine."""

    def relax(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows, Tensor] | None:
        """Rows of the inputs, and the bias (S, B) of the inequality

            rows . node(x) >= passed rows . x + bias    for all x in the inputs' sets;

        None where the rule has none.
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
    """The node's own interval rule, and the ball that circumscribes its box.

    Raises:
        UnsupportedNodeError: The rule is the engine's, and not on the list of those that are known to hold.
    """
    intervals = [state.box() if isinstance(state, BallBox) else (state, state) for state in inputs]
    if is_ours(node, "interval_propagate"):
        lower, upper = node.interval_propagate(*intervals)
    elif is_listed(node, "interval"):
        try:
            lower, upper = node.interval_propagate(*intervals)
        except Exception as error:  # the engine raises whatever comes: asserts, NotImplementedError, KeyError
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
    """The node's function on one tensor picked from each perturbed input, constants as they are."""
    return node.forward(*[pick(state) if isinstance(state, BallBox) else state for state in inputs])
