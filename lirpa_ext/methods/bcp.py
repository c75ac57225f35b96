"""Box constraint propagation (BCP), and the Lipschitz-margin baseline (LMT), its ball-only case.

S. Lee, J. Lee, S. Park, Lipschitz-certifiable training with a tight outer bound, NeurIPS 2020; LMT is
Y. Tsuzuku et al., NeurIPS 2018. Proof of soundness: every rule keeps the node's value inside of its ball and
box, and the last step returns the minimum of the specification over both, or less (weak duality).
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

# Above this many outputs, bounds without C come from the output's own box: C would be the identity.
_LARGEST_IDENTITY = 1024


class LastLayer(NamedTuple):
    """A dense last layer, and the set that its input is known to lie in.

    Attributes:
        set: Ball and box of v, (B, n).
        weight: W of the logits W v + b, (classes, n).
        bias: b, (classes,), or None.
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
    """Bounds from a ball and a box propagated together.

    Args:
        problem: What to bound.
        norms: "bound" (default): sound upper bounds on the layers' spectral norms. "estimate": the persistent
            power iteration, cheap and differentiable, for training; the result is then no certificate.
        tighten: Use what the source does not: row norms that know the zero padding, and balls no larger than
            their box. False reproduces the source's bound.
        outward: Outward rounding of what floating-point arithmetic may lose. Default: in float64, with "bound".
        solver: Of the last step, "exact" or "iterative" (Algorithm 1 of the source; looser if stopped early).
        max_steps: Steps of the solver, default until it has converged.

    Returns:
        Lower and upper bounds, (B, S), or of the output's shape without C.
    """
    context = problem.context(norms, outward, tighten=tighten)
    states = problem.propagate(context)
    if tighten:
        states = tightened(states)
    return problem.result(
        context, lambda C, sign: last_step(problem, states, C, sign, solver, max_steps, context.outward)
    )


def lipschitz(problem: Problem, *, norms: str = "bound", outward: bool | None = None) -> BoundResult:
    """Bounds from the ball alone: a product of the layers' Lipschitz constants (LMT).

    Args:
        problem: What to bound.
        norms: As in `bcp`.
        outward: As in `bcp`.

    Returns:
        As `bcp`.
    """
    context = problem.context(norms, outward, ball_only=True, tighten=False)
    states = problem.propagate(context)
    return problem.result(context, lambda C, sign: last_step(problem, states, C, sign, outward=context.outward))


def tightened(states: dict[str, BallBox | Tensor]) -> dict[str, BallBox | Tensor]:
    """The same sets, with balls no larger than their boxes."""
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
    """min of the rows of C (of sign * identity without C) over the outer bound (3.2.11), C merged with W.

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
        # ||C W|| <= sum_j |C_j| ||W_j||; the bias and the sums of C W itself err within the same margin
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
    """The last layer, if the output is a dense layer of one perturbed vector."""
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
