"""Box constraint propagation (BCP), and the Lipschitz-margin baseline (LMT), its ball-only case.

S. Lee, J. Lee, S. Park, Lipschitz-certifiable training with a tight outer bound, NeurIPS 2020; LMT is
Y. Tsuzuku et al., NeurIPS 2018. Proof of soundness: every rule keeps the node's value inside of its ball and
box, and the last step returns the minimum of the specification over both, or less (weak duality).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sets import BallBox, flat
from ..support import ball_box_min, merged_min
from .base import Bounds, Problem, register_method, set_of

# Above this many outputs, bounds without C come from the output's own box: C would be the identity.
_LARGEST_IDENTITY = 1024


def bcp(
    problem: Problem,
    *,
    norms: str = "bound",
    tighten: bool = True,
    solver: str = "exact",
    max_steps: int | None = None,
) -> Bounds:
    """Bounds from a ball and a box propagated together.

    Args:
        problem: What to bound.
        norms: "bound" (default): sound upper bounds on the layers' spectral norms. "estimate": the persistent
            power iteration, cheap and differentiable, for training; the result is then no certificate.
        tighten: Use what the source does not: row norms that know the zero padding, and balls no larger than
            their box. False reproduces the source's bound.
        solver: Of the last step, "exact" or "iterative" (Algorithm 1 of the source; no bound if stopped early).
        max_steps: Steps of the solver, default until it has converged.

    Returns:
        Lower and upper bounds, (B, S), or of the output's shape without C.
    """
    context = problem.context(norms, tighten=tighten)
    states = problem.propagate(context)
    return problem.both_sides(lambda C, sign: last_step(problem, states, C, sign, solver=solver, max_steps=max_steps))


def lipschitz(problem: Problem, *, norms: str = "bound") -> Bounds:
    """Bounds from the ball alone: a product of the layers' Lipschitz constants (LMT).

    Args:
        problem: What to bound.
        norms: As in `bcp`.

    Returns:
        As `bcp`.
    """
    states = problem.propagate(problem.context(norms, ball_only=True, tighten=False))
    return problem.both_sides(lambda C, sign: last_step(problem, states, C, sign))


def last_step(
    problem: Problem,
    states: dict[str, BallBox | Tensor],
    C: Tensor | None,
    sign: int,
    solver: str = "exact",
    max_steps: int | None = None,
) -> Tensor:
    """min of the rows of C (of sign * identity without C) over the outer bound (3.2.11), C merged with W.

    Returns:
        (B, S), or the output's shape without C.
    """
    final = problem.final
    output = set_of(states[final.name])
    options = {"solver": solver, "max_steps": max_steps}
    shape = output.center.shape if C is None else (len(output.center), C.shape[1])
    if C is None:
        outputs = output.center[0].numel()
        if outputs > _LARGEST_IDENTITY:
            lower, upper = output.box()
            return lower if sign > 0 else -upper
        C = sign * torch.eye(outputs, dtype=output.center.dtype, device=output.center.device).unsqueeze(0)
    merged = _dense_last_layer(problem, states)
    if merged is None:
        bound = ball_box_min(C, *_flat(output), **options)
    else:
        state, weight, bias = merged
        bound = merged_min(C, weight, *_flat(state), **options)
        if bias is not None:
            bound = bound + C @ bias
    return bound.reshape(shape)


def _flat(state: BallBox) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    lower = None if state.lower is None else flat(state.lower)
    upper = None if state.upper is None else flat(state.upper)
    return flat(state.center), state.radius, lower, upper


def _dense_last_layer(
    problem: Problem, states: dict[str, BallBox | Tensor]
) -> tuple[BallBox, Tensor, Tensor | None] | None:
    """(set of the input, W, b) if the output is a dense layer of one perturbed vector."""
    final = problem.final
    if type(final).__name__ not in ("BoundLinear", "BoundBallBoxLinear") or getattr(final, "transA", 0):
        return None
    state, weight, *rest = (states[parent.name] for parent in final.inputs)
    if not isinstance(state, BallBox) or state.center.dim() != 2 or not isinstance(weight, Tensor):
        return None
    if any(isinstance(bias, BallBox) for bias in rest):
        return None
    alpha = getattr(final, "alpha_linear", getattr(final, "alpha", 1.0))
    beta = getattr(final, "beta_linear", getattr(final, "beta", 1.0))
    weight = (weight if final.transB else weight.t()) * alpha
    return state, weight, rest[0] * beta if rest else None  # type: ignore[operator]


register_method("bcp", bcp)
register_method("lipschitz", lipschitz)
