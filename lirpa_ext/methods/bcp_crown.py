"""The ball-box backward bound, "bcp-crown", and its optimized form, "bcp-alpha-crown".

CROWN's backward pass (H. Zhang et al., NeurIPS 2018) with boxes alone is loose for l2; here, the remainder of each
ReLU's relaxation is minimized over the ball and the box together. Soundness: see `lirpa_ext.passes.backward`; every
candidate below is a bound, so that the best of them is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.ball_box_min import relu_ball_box_min, relu_ball_box_value
from ..domain.lengths import flat
from ..domain.specifications import identity_rows
from ..engine import Node
from ..errors import OptionError
from ..passes.backward import BackwardPass, Part
from .base import BoundResult, Problem, register_method, set_of
from .bcp import last_step, tightened

_MOST_ELEMENTS = 2**20  # elements of a coefficient tensor: more rows are processed in parts, which also fit the caches


def bcp_crown(
    problem: Problem, *, norms: str = "bound", tighten: bool = True, outward: bool | None = None
) -> BoundResult:
    """Best of three bounds for each row: BCP, CROWN's slopes over ball and box, and rows that end at the last ReLU.

    Never looser than `bcp`; on networks of ReLUs and linear layers never looser than CROWN on the same boxes.

    Args:
        problem: The graph and the requested bounds.
        norms: As in `bcp`.
        tighten: As in `bcp`.
        outward: As in `bcp`.

    Returns:
        As `bcp`.
    """
    context = problem.context(norms, outward, tighten=tighten)
    states = problem.propagate(context, keep=True)
    if tighten:
        states = tightened(states)
    return problem.result(
        context, lambda C, sign: _best_of_fixed(problem, BackwardPass(problem.module, states, context), C, sign)
    )


def bcp_alpha_crown(
    problem: Problem,
    *,
    norms: str = "bound",
    tighten: bool = True,
    outward: bool | None = None,
    steps: int = 40,
    step_size: float = 0.2,
    early_stop: bool = True,
) -> BoundResult:
    """`bcp_crown`, then gradient ascent on the rows lam and multipliers mu of every ReLU; the best value is returned.

    Args:
        problem: The graph and the requested bounds.
        norms: As in `bcp`.
        tighten: As in `bcp`.
        outward: As in `bcp`.
        steps: Number of ascent steps (Adam), at least 0, default 40.
        step_size: Step size, default 0.2: relative to the mean size of the coefficients for lam, absolute for log mu.
        early_stop: Do not optimize rows with a positive bound, or whose clean value is not positive, so that no bound
            can be (default). False optimizes every row with all steps.

    Returns:
        As `bcp`.

    Raises:
        OptionError: `steps` is negative or `step_size` not positive; else as `bcp`.
    """
    if steps < 0 or not step_size > 0:
        raise OptionError(f"steps must be at least 0 and step_size positive, got {steps} and {step_size}")
    context = problem.context(norms, outward, tighten=tighten)
    states = problem.propagate(context, keep=True)
    if tighten:
        states = tightened(states)

    def minimum(C: Tensor | None, sign: int) -> Tensor:
        backward = BackwardPass(problem.module, states, context)
        bound = _best_of_fixed(problem, backward, C, sign)
        rows = _rows(problem, states, C, sign)
        best = flat(bound.detach()).clone()
        pending = torch.ones_like(best, dtype=torch.bool)
        if early_stop:
            clean = torch.einsum("bso,bo->bs", rows, flat(set_of(states[problem.final.name]).center))
            pending = (best <= 0) & (clean > 0)
        samples, which = pending.nonzero(as_tuple=True)
        if not len(samples):
            return bound
        budget = max(1, _MOST_ELEMENTS // _width(states))
        for sample, row in zip(samples.split(budget), which.split(budget), strict=True):
            # Each pending row becomes a sample of its own, so that no work is spent on other rows.
            some = backward.take(sample, all_coordinates=True)
            found = _ascend(some, rows[sample, row].unsqueeze(1), steps, step_size, early_stop)
            best[sample, row] = torch.maximum(best[sample, row], found)
        return best.view_as(bound)

    return problem.result(context, minimum)


def _rows(problem: Problem, states: dict[str, BallBox | Tensor], C: Tensor | None, sign: int) -> Tensor:
    """C, or without C the identity times sign, as rows of every sample: (B, S, outputs)."""
    output = set_of(states[problem.final.name]).center
    if C is None:
        C = identity_rows(output, sign)
    return C.expand(len(output), -1, -1)


def _width(states: dict[str, BallBox | Tensor]) -> int:
    """Number of elements a sample of the widest node."""
    return max(state.center[0].numel() for state in states.values() if isinstance(state, BallBox))


def _best_of_fixed(problem: Problem, backward: BackwardPass, C: Tensor | None, sign: int) -> Tensor:
    """Elementwise best of the three bounds that need no optimization."""
    bcp = last_step(problem, backward.states, C, sign, outward=backward.outward)
    rows = _rows(problem, backward.states, C, sign)
    chunk = max(1, _MOST_ELEMENTS // (_width(backward.states) * len(rows)))
    bounds = [torch.maximum(backward.bound(some, _crown), backward.bound(some, None)) for some in rows.split(chunk, 1)]
    return torch.maximum(bcp, torch.cat(bounds, dim=1).view_as(bcp))


def _crown(node: Node, a: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """lam = slope * a with CROWN's slopes: that of the upper line where a < 0, of the adaptive lower line elsewhere."""
    _, _, lower, upper = part.set
    line = upper / (upper - lower)
    slope = torch.where(a >= 0, (upper + lower > 0).to(upper).unsqueeze(1), line.unsqueeze(1))
    # Coordinates that only pad the index are not open: their exact slope is 0 or 1.
    slope = torch.where((lower < 0).unsqueeze(1), torch.where((upper > 0).unsqueeze(1), slope, 0.0), 1.0)
    lam = a * slope
    return lam, relu_ball_box_min(a, lam, *part.set)[0]


def _ascend(backward: BackwardPass, rows: Tensor, steps: int, step_size: float, early_stop: bool) -> Tensor:
    """Best bound (R,) found by ascent for R rows (R, 1, outputs), each a sample of its own."""
    lam: dict[str, Tensor] = {}
    log_mu: dict[str, Tensor] = {}

    def search(node: Node, a: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """The current lam (at first a times the ReLU's slope at the center), with the best multiplier for it."""
        passed = lam.get(node.name, a * (part.set[0] > 0).unsqueeze(1))
        bias, log_mu[node.name] = relu_ball_box_min(a, passed, *part.set)
        lam[node.name] = passed
        return passed, bias

    def evaluate(node: Node, a: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        passed = lam[node.name]
        return passed, relu_ball_box_value(a, passed, *part.set, log_mu[node.name].exp())

    with torch.no_grad():
        best = backward.bound(rows, search).squeeze(1)
    if not lam or not steps:
        return best
    for table in (lam, log_mu):
        table.update({name: value.detach().clone().requires_grad_() for name, value in table.items()})
    tiny = torch.finfo(rows.dtype).tiny
    sizes = {name: value.detach().abs().mean().clamp(min=tiny).item() for name, value in lam.items()}
    groups = [{"params": [value], "lr": step_size * sizes[name]} for name, value in lam.items()]
    optimizer = torch.optim.Adam([*groups, {"params": [*log_mu.values()], "lr": step_size}])
    for _ in range(steps):
        with torch.enable_grad():
            value = backward.bound(rows, evaluate).squeeze(1)
            loss = -value.sum()
        gradients = torch.autograd.grad(loss, [*lam.values(), *log_mu.values()])
        for parameter, gradient in zip([*lam.values(), *log_mu.values()], gradients, strict=True):
            parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # no step where the gradient overflows
        best = torch.fmax(best, value.detach())  # NaN is no bound
        if early_stop and (best > 0).all():
            return best
        optimizer.step()
    with torch.no_grad():
        return torch.fmax(best, backward.bound(rows, search).squeeze(1))


register_method("bcp-crown", bcp_crown)
register_method("bcp-alpha-crown", bcp_alpha_crown)
