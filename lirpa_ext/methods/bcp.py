"""Box constraint propagation (BCP), and Lipschitz-margin training (LMT), which propagates the ball alone.

S. Lee, J. Lee, S. Park, Lipschitz-certifiable training with a tight outer bound, NeurIPS 2020; Y. Tsuzuku et al.,
Lipschitz-margin training, NeurIPS 2018. Proof of soundness: by every rule, a node's value stays inside of its ball and
box, and the last step returns a lower bound on the minimum of the specification over their intersection.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.ball_box_min import ball_box_min, merged_min
from ..domain.lengths import flat, length
from ..domain.linear_maps import Dense
from ..domain.rounding import gamma, row_slack
from ..domain.specifications import identity_rows
from ..rules import RULES
from ..rules.linear import Affine
from .base import BoundResult, Problem, register_method, set_of

# For more outputs, bounds without C are taken from the output's box, since C would be a large identity.
_LARGEST_IDENTITY = 1024


class LastLayer(NamedTuple):
    """A dense last layer W v + b, and a set that contains its input v.

    Attributes:
        set: Ball and box of v, with a center (B, n).
        weight: W, (outputs, n).
        bias: b, (outputs,), or None.
    """

    set: BallBox
    weight: Tensor
    bias: Tensor | None


def bcp(
    problem: Problem,
    *,
    norms: str = "bound",
    tighten: bool = True,
    outward: bool | None = None,
    solver: str = "exact",
    max_steps: int | None = None,
) -> BoundResult:
    """Box constraint propagation: bounds from a ball and a box that are propagated together.

    Args:
        problem: The graph and the requested bounds.
        norms: "bound" (default): sound upper bounds on the layers' spectral norms. "estimate": the persistent
            power iteration, cheap and differentiable, for training; the result is then no certificate.
        tighten: Use row norms that take account of zero padding, and balls no larger than their box (default). False
            gives the bound of Lee (2021).
        outward: Enlarge sets to cover floating-point errors. Default: in float64, with "bound"
            (`Problem.context`).
        solver: Solver of the last step, "exact" (default) or "iterative" (Algorithm 1 of Lee, 2021; looser if stopped
            early).
        max_steps: Steps of the solver; None (default) runs to convergence.

    Returns:
        Lower and upper bounds, (B, S), or of the output's shape without C.

    Raises:
        OptionError: `norms` is unknown.
        InvalidInputError: `solver` is unknown, or `max_steps` negative.
        UnsupportedNodeError: A node cannot be bound.
    """
    context = problem.context(norms, outward, tighten=tighten)
    states = problem.propagate(context)
    if tighten:
        states = tightened(states)
    return problem.result(
        context, lambda C, sign: last_step(problem, states, C, sign, solver, max_steps, context.outward)
    )


def lipschitz(problem: Problem, *, norms: str = "bound", outward: bool | None = None) -> BoundResult:
    """Bounds from the ball alone: a product of the layers' Lipschitz constants (Tsuzuku et al., 2018).

    Args:
        problem: The graph and the requested bounds.
        norms: As in `bcp`.
        outward: As in `bcp`.

    Returns:
        As `bcp`.
    """
    context = problem.context(norms, outward, ball_only=True, tighten=False)
    states = problem.propagate(context)
    return problem.result(context, lambda C, sign: last_step(problem, states, C, sign, outward=context.outward))


def tightened(states: dict[str, BallBox | Tensor]) -> dict[str, BallBox | Tensor]:
    """The same sets with rho <- min(rho, radius of the box), by node name (`BallBox.tightened`)."""
    return {name: state.tightened() if isinstance(state, BallBox) else state for name, state in states.items()}


def last_step(
    problem: Problem,
    states: dict[str, BallBox | Tensor],
    C: Tensor | None,
    sign: int,
    solver: str = "exact",
    max_steps: int | None = None,
    outward: bool = False,
) -> Tensor:
    """Minimum of C f over the ball and box of the last layer's input, C merged with the weight (Lee, 2021, (3.2.11)).

    Args:
        problem: The graph and the requested bounds.
        states: Sets of the final node and of its inputs.
        C: Specification rows, (B or 1, S, outputs); None for sign times the identity.
        sign: 1, or -1 for upper bounds; read only without C.
        solver: As in `bcp`.
        max_steps: As in `bcp`.
        outward: Subtract bounds on floating-point errors. Default False.

    Returns:
        (B, S), or the output's shape without C.
    """
    final = problem.final
    output = set_of(states[final.name])
    shape = output.center.shape if C is None else (len(output.center), C.shape[1])
    if C is None:
        outputs = output.center[0].numel()
        if outputs > _LARGEST_IDENTITY:
            lower, upper = output.box()
            return lower if sign > 0 else -upper
        C = identity_rows(output.center, sign)
    merged = dense_last_layer(problem, states)
    if merged is None:
        bound = ball_box_min(C, *_flat(output), solver=solver, max_steps=max_steps)
        slack = row_slack(C, output, C.shape[2]) if outward else 0.0
    else:
        state, weight, bias = merged
        bound = merged_min(C, weight, *_flat(state), solver=solver, max_steps=max_steps)
        if bias is not None:
            bound = bound + C @ bias
        # ||C W|| <= sum_j |C_j| ||W_j||; the factor 4 also covers rounding in C W itself
        sizes = length(weight, keepdim=True)
        slack = 4 * row_slack(C.abs() @ sizes, state, weight.numel()) if outward else 0.0
        if bias is not None and outward:
            slack = slack + gamma(C.dtype, weight.shape[0]) * (C.abs() @ bias.abs())
    bound = bound - slack
    return bound.reshape(shape)


def _flat(state: BallBox) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    lower = None if state.lower is None else flat(state.lower)
    upper = None if state.upper is None else flat(state.upper)
    return flat(state.center), state.radius, lower, upper


def dense_last_layer(problem: Problem, states: dict[str, BallBox | Tensor]) -> LastLayer | None:
    """The last layer, with the set of its input; None if the final node is not a dense layer of one perturbed vector.

    Args:
        problem: The graph and the requested bounds.
        states: Sets of the final node and of its inputs.
    """
    final = problem.final
    state, *constants = (states[parent.name] for parent in final.inputs)
    rule = RULES.get(type(final).__name__)
    if not isinstance(rule, Affine) or not isinstance(state, BallBox) or state.center.dim() != 2:
        return None
    tensors = [value for value in constants if isinstance(value, Tensor)]
    linear_map = rule.linear_map(final, [state, *tensors], 0) if len(tensors) == len(constants) else None
    if not isinstance(linear_map, Dense):
        return None
    bias = tensors[1] * engine.bias_scale(final) if len(tensors) > 1 else None
    return LastLayer(state, linear_map.weight, bias)


register_method("bcp", bcp)
register_method("lipschitz", lipschitz)
