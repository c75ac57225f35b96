"""What a rule is, and the table of rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.lengths import length
from ..domain.linear_maps import Conv, ConvTranspose, Dense, LinearMap
from ..domain.norms import NormCache, PowerIteration, key_of
from ..domain.products import Product
from ..domain.rounding import widened
from ..engine.limits import is_out_of_memory
from ..engine.positive_list import is_listed, is_ours, refusal
from ..errors import RegistrationError, UnsupportedNodeError

ITERABLE = (Dense, Conv, ConvTranspose, Product)  # maps whose norm training estimates by a power iteration

State = BallBox | Tensor  # the set of a perturbed node, or the value of a constant one


@dataclass
class Context:
    """What a propagation shares among its rules.

    Attributes:
        cache: Upper bounds on spectral norms, by the weight's name.
        power_iterations: Persistent power iterations, by the weight's name; new ones are added.
        estimate: Use the power iteration (training) in place of the bound. The result is then no certificate.
        power_steps: Power steps a call, in training mode.
        training: Whether the power iterations may move.
        ball_only: Propagate no boxes (the Lipschitz-margin baseline).
        tighten: Use row norms that know the zero padding, and rho <- min(rho, radius of the box) wherever the ball is
            about to be used.
        outward: Add what floating-point arithmetic may have lost (`lirpa_ext.domain.rounding`).
        fallbacks: Names and classes of the nodes that no rule knew; filled by the propagation.
        ended: Names of the nodes at which coefficient rows ended early, and why; filled by the backward pass.
        norms: The norm that each linear node was propagated with, by name; filled by the propagation.
        geometries: Of the linear maps of those names (`lirpa_ext.domain.norms.key_of`); filled by the propagation.
    """

    cache: NormCache
    power_iterations: dict[str, PowerIteration]
    estimate: bool = False
    power_steps: int = 1
    training: bool = False
    ball_only: bool = False
    tighten: bool = True
    outward: bool = False
    fallbacks: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    geometries: dict[str, object] = field(default_factory=dict)

    def norm(self, node: Any, linear_map: LinearMap) -> Tensor:
        """Spectral norm of a node's linear part: an upper bound, or in training the estimate."""
        name = key_of(weight_name(node), linear_map, self.geometries)
        if self.estimate and isinstance(linear_map, ITERABLE):
            iteration = self.power_iterations.get(name)
            if iteration is None or iteration.geometry != self.geometries[name]:
                iteration = self.power_iterations[name] = PowerIteration(linear_map)
            iteration.train(self.training)
            value = iteration(linear_map, self.power_steps).value
        else:
            value = self.cache.bound(name, linear_map).value
        self.norms[name] = value.detach()
        return value


class Rule:
    """How the set of a node follows from the sets of its inputs. Subclasses write `propagate`.

    `propagate` must keep the invariant of `BallBox`: if every input's value lies in its set, the node's value
    lies in the returned one.
    """

    def propagate(self, node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        """Set of a node, or None to leave it to the engine's interval rule.

        Args:
            node: The engine's node.
            inputs: A `BallBox` for each perturbed input, the value for each constant one.
            center: The node's own clean value, (B, ...).
            context: Norms and switches of this propagation.
        """
        raise NotImplementedError

    def widened(self, node: Any, state: BallBox) -> BallBox:
        """The node's set, larger by what computing its values may lose; not asked of a rule that is `exact`."""
        return widened(state)

    exact = False  # whether values and box are computed without rounding
    homogeneous = False  # whether the node maps 0 to 0 wherever `adjoint` applies
    alike = False  # whether the node's value at 0 is the same for every sample,
    by_channel = False  # and, of an image, at every position
    weight: int | None = None  # index of an input that does not count in the value at 0, and gets no gradient from it

    def adjoint(self, node: Any, inputs: Sequence[State], rows: Tensor) -> list[Tensor | None] | None:
        """Coefficient rows of the inputs, if the node is affine in its perturbed inputs; else None.

        Args:
            node: The engine's node.
            inputs: As in `propagate`; only the shapes of the sets are read.
            rows: Rows of the node's output, (S, B, ...).

        Returns:
            Rows (S, B, ...) of each perturbed input, None at the constant ones.
        """
        return None

    def adjoint_and_sums(
        self, node: Any, inputs: Sequence[State], rows: Tensor
    ) -> tuple[list[Tensor | None] | None, Tensor]:
        """`adjoint`, and the sums of the rows over positions, (S, B, C), for rules `by_channel`."""
        return self.adjoint(node, inputs, rows), rows.flatten(3).sum(3)

    def relax(self, node: Any, inputs: Sequence[State], rows: Tensor) -> tuple[list[Tensor | None], Tensor] | None:
        """Linear relaxation of a node that is not affine: what `adjoint` gives, and the bias (S, B) of the inequality

            rows . node(x) >= passed rows . x + bias    for all x in the inputs' sets;

        None where the rule has none.
        """
        return None


RULES: dict[str, Rule] = {}


def register_rule(node_class: str, rule: Rule, overwrite: bool = False) -> None:
    """Add a rule for a class of the engine's nodes, by its exact name (inheritance there lies).

    Args:
        node_class: Class name of the node, e.g. ``"BoundRelu"``.
        rule: The rule.
        overwrite: Replace a rule that exists.

    Raises:
        RegistrationError: There is a rule for that class already.
    """
    if not isinstance(rule, Rule):
        raise RegistrationError(f"rule for {node_class} is {rule!r}, not an instance of lirpa_ext.rules.Rule")
    if node_class in RULES and not overwrite:
        raise RegistrationError(f"{node_class} has a rule already ({RULES[node_class]!r}); pass overwrite=True")
    RULES[node_class] = rule


def propagate_node(node: Any, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox:
    """Set of one node: by its rule, or by the engine's interval arithmetic where there is none or it declines."""
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


def propagate_interval(node: Any, inputs: Sequence[State], center: Tensor) -> BallBox:
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


def adjoint_and_bias(node: Any, inputs: Sequence[State], rows: Tensor) -> tuple[list[Tensor | None], Tensor] | None:
    """Rows of an affine node's inputs, and rows times its value at 0, (S, B); None where the node is not affine."""
    rule, sums = RULES.get(type(node).__name__), None
    if rule is None:
        return None
    if rule.by_channel:
        passed, sums = rule.adjoint_and_sums(node, inputs, rows)
    else:
        passed = rule.adjoint(node, inputs, rows)
    return None if passed is None else (passed, rows_times_constant(node, inputs, rows, sums))


def rows_times_constant(node: Any, inputs: Sequence[State], rows: Tensor, sums: Tensor | None = None) -> Tensor:
    """Rows (S, B, ...) times an affine node's value at 0, (S, B).

    Args:
        node: The node, of a class with a rule.
        inputs: As in `Rule.propagate`.
        rows: Rows of its output.
        sums: Theirs over positions, (S, B, C), of a rule `by_channel`.
    """
    rule = RULES[type(node).__name__]
    if rule.homogeneous or all(isinstance(state, BallBox) for state in inputs):  # type: ignore[union-attr]
        return rows.new_zeros(rows.shape[:2])
    if rule.alike:
        known = [s.detach() if i == rule.weight else s for i, s in enumerate(inputs)]  # type: ignore[union-attr]
        value = apply(node, known, lambda state: rows.new_zeros(1, *state.center.shape[1:]))
        if len(value) == 1:  # else a constant has a batch axis
            if sums is not None:
                return sums @ value.flatten(2)[0, :, 0]
            if rows.dim() == 5:  # channels last, in which convolutions keep their rows
                rows, value = rows.movedim(2, -1), value.movedim(1, -1)
            return rows.reshape(*rows.shape[:2], -1) @ value.flatten()  # of one number a sample too
    value = apply(node, inputs, lambda state: rows.new_zeros(state.center.shape))
    return (rows * value).reshape(*rows.shape[:2], -1).sum(2)


def frobenius(node: Any, inputs: Sequence[State]) -> Tensor | float:
    """Frobenius norm of an affine node's linear part; 1 for nodes that only move values."""
    linear_map = getattr(RULES.get(type(node).__name__), "linear_map", None)
    index = only_perturbed(inputs)
    found = None if linear_map is None or index is None else linear_map(node, inputs, index)
    return 1.0 if found is None else length(found.row_norms().expand(found.output_shape).reshape(-1)).detach()


def weight_name(node: Any, index: int | None = None) -> str:
    """Name under which a node's norm is kept: its weight's name in the user's model, else its own.

    Args:
        node: A linear node.
        index: Of its data among its inputs; None for the perturbed ones.
    """
    data = [parent.perturbed if index is None else i == index for i, parent in enumerate(node.inputs)]
    weights = [parent for parent, is_data in zip(node.inputs, data, strict=True) if not is_data]
    while weights:  # a weight may come through a transpose
        parent = weights.pop(0)
        if isinstance(parent, (engine.BoundParams, engine.BoundBuffers)):
            return parent.ori_name
        weights += parent.inputs
    return node.name


def only_perturbed(inputs: Sequence[State]) -> int | None:
    """Index of the perturbed input if there is exactly one, else None."""
    perturbed = [index for index, state in enumerate(inputs) if isinstance(state, BallBox)]
    return perturbed[0] if len(perturbed) == 1 else None


def apply(node: Any, inputs: Sequence[State], pick: Callable[[BallBox], Tensor]) -> Tensor:
    """The node's function on one tensor picked from each perturbed input, constants as they are."""
    return node.forward(*[pick(state) if isinstance(state, BallBox) else state for state in inputs])
