"""The engine's methods by this package's own operators, for graphs on which the engine's bounds are not known to hold.

IBP, CROWN-IBP, CROWN (H. Zhang et al., Efficient neural network robustness certification with general activation
functions, NeurIPS 2018) and alpha-CROWN (K. Xu et al., Fast and complete, ICLR 2021). Slopes of alpha-CROWN are
optimized only in the pass from the output. Proof of soundness: every box is a bound by `lirpa_ext.passes.slopes` on
sound boxes, where every choice of slopes in [0, 1] is sound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.specifications import identity_rows
from ..engine import Node
from ..errors import OptionError
from ..passes.intervals import propagate_intervals
from ..passes.slopes import SlopePass
from ..rules import RULES, AffineRule, State
from .base import FAMILIES, BoundResult, Problem, context_result, set_of
from .bcp import tightened
from .slopes import adaptive, box_by_rows, slope_ibp, slope_result

_ELEMENTS_AT_ONCE = 2**21  # of one coefficient tensor while slopes are optimized


class Request(NamedTuple):
    """A call of one of the engine's methods.

    Attributes:
        name: Name of the method, the same for all of its synonyms.
        family: Family of the engine's bounds that the method uses (`lirpa_ext.engine.positive_list.FAMILIES`).
    """

    name: str
    family: str


_NAMES = {
    "ibp": Request("IBP", "interval"),
    "ibp+backward": Request("CROWN-IBP", "backward"),
    "ibp+crown": Request("CROWN-IBP", "backward"),
    "crown-ibp": Request("CROWN-IBP", "backward"),
    "crown": Request("CROWN", "backward"),
    "backward": Request("CROWN", "backward"),
    "crown-optimized": Request("alpha-CROWN", "backward"),
    "alpha-crown": Request("alpha-CROWN", "backward"),
}


def request(method: str | None, options: dict[str, Any]) -> Request:
    """The engine's method that a call requests, by the method's name and the engine's flags ``IBP`` and ``forward``.

    Args:
        method: Name of the method, in any case; None if the flags alone choose it.
        options: The engine's further arguments.

    Raises:
        OptionError: There is neither a method nor one of the flags.
    """
    flags = {name: bool(options.get(name)) for name in ("IBP", "forward")}
    if flags["forward"]:
        return Request(method or "forward", "forward")
    if method is None:
        if not flags["IBP"]:
            raise OptionError("method=None needs IBP=True")
        return _NAMES["ibp"]
    known = _NAMES.get(method.lower(), Request(method, "forward"))
    return _NAMES["crown-ibp"] if flags["IBP"] and known.name == "CROWN" else known


def ibp(problem: Problem) -> BoundResult:
    """Interval bound propagation, with the last layer merged into C."""
    return slope_ibp(problem)


def crown_ibp(problem: Problem) -> BoundResult:
    """CROWN-IBP: one backward pass on the boxes of IBP."""
    return FAMILIES["slope"].find("crown")(problem)


def crown(problem: Problem) -> BoundResult:
    """CROWN: backward passes from the hidden layers for their boxes, then one from the output."""
    context = problem.context()
    states = _refined(problem, context)
    plain = SlopePass(problem.module, states, context, {}, final=problem.final)
    return slope_result(problem, plain.with_slopes(_adaptive_slopes(plain)))


def alpha_crown(problem: Problem) -> BoundResult:
    """alpha-CROWN: `crown`, then gradient ascent on the slopes of each row; the best value is returned.

    Number and size of steps are those of the engine's option ``optimize_bound_args`` (``iteration``, ``lr_alpha``).
    """
    context = problem.context()
    options = getattr(problem.module, "bound_opts", {}).get("optimize_bound_args", {})
    steps, rate = int(options.get("iteration", 20)), float(options.get("lr_alpha", 0.5))
    with torch.no_grad():
        states = _refined(problem, context)
        plain = SlopePass(problem.module, states, context, {}, final=problem.final)
        fixed = slope_result(problem, plain.with_slopes(_adaptive_slopes(plain)))
    if not plain.activations:
        return fixed
    output = set_of(states[problem.final.name]).center
    sides: list[Tensor | None] = []
    for bound, sign in zip(fixed.sides, (1, -1), strict=True):
        if bound is None:
            sides.append(None)
            continue
        rows = problem.C
        if rows is None:
            rows = identity_rows(output)
        found = _ascend_all(plain, sign * rows.expand(len(output), -1, -1), steps, rate)
        sides.append(sign * torch.fmax(sign * bound, found.view_as(bound)))
    return context_result(context, sides[0], sides[1])


SUBSTITUTES: dict[str, Callable[[Problem], BoundResult]] = {
    "IBP": ibp,
    "CROWN-IBP": crown_ibp,
    "CROWN": crown,
    "alpha-CROWN": alpha_crown,
}


def _refined(problem: Problem, context: Any) -> dict[str, State]:
    """Boxes of all nodes by interval arithmetic, intersected before nonlinear nodes with those of a backward pass."""
    order = engine.ancestors_in_order(problem.final)
    names = frozenset(
        parent.name
        for node in order
        if node.perturbed and not isinstance(node, engine.BoundInput) and not _is_affine(node, problem.module)
        for parent in node.inputs
        if parent.perturbed and _gains(parent)
    )

    def refine(node: Node, states: dict[str, State]) -> BallBox:
        known = set_of(states[node.name])
        before = tightened(states) if context.outward else states
        plain = SlopePass(problem.module, before, context, {}, final=node)
        chosen = plain.with_slopes(_adaptive_slopes(plain))
        (lower, upper), (least, most) = box_by_rows(chosen, known.center), known.box()
        lower, upper = torch.fmax(lower, least), torch.fmin(upper, most)  # both hold, and NaN is no bound
        return BallBox(0.5 * (lower + upper), known.radius, lower, upper)

    states = propagate_intervals(problem.module, context, (refine, names))
    return tightened(states) if context.outward else states


def _is_affine(node: Node, module: Any) -> bool:
    """Whether coefficient rows pass through the node exactly, so that the box of its input is not needed."""
    rule = RULES.get(type(node).__name__)
    if not isinstance(rule, AffineRule):
        return False
    device = getattr(module, "device", "cpu")
    inputs: list[State] = [
        BallBox.point(torch.zeros(parent.output_shape, device=device)) if parent.perturbed else engine.constant(parent)
        for parent in node.inputs
    ]
    return rule.adjoint(node, inputs, torch.zeros(1, *node.output_shape, device=device)) is not None


def _gains(node: Node) -> bool:
    """Whether a backward pass from the node may be tighter than interval arithmetic, as after more than one layer."""
    before = [other for other in engine.ancestors_in_order(node) if other.perturbed]
    return len(before) > 3


def _adaptive_slopes(plain: SlopePass) -> dict[str, Tensor]:
    return {node.name: adaptive(set_of(plain.states[node.inputs[0].name]).box()) for node in plain.activations}


def _ascend_all(plain: SlopePass, rows: Tensor, steps: int, rate: float) -> Tensor:
    """Best lower bounds (B, S) of rows (B, S, outputs), each row with slopes of its own."""
    batch, count = rows.shape[:2]
    width = max(state.center[0].numel() for state in plain.states.values() if isinstance(state, BallBox))
    index = torch.arange(batch, device=rows.device).repeat_interleave(count)
    size = max(1, _ELEMENTS_AT_ONCE // width)
    pieces = zip(index.split(size), rows.flatten(0, 1).unsqueeze(1).split(size), strict=True)
    found = [_ascend(_repeated(plain, which), some, steps, rate) for which, some in pieces]
    return torch.cat(found).view(batch, count)


def _repeated(plain: SlopePass, index: Tensor) -> SlopePass:
    """The pass for the samples with the indices `index`, (K,), which may repeat."""
    some = plain.take(index)
    return SlopePass(some.module, some.states, some.context, {}, some.perturbations, some.final)


def _ascend(some: SlopePass, rows: Tensor, steps: int, rate: float) -> Tensor:
    """Best lower bound (R,) of one row (R, 1, outputs) for each sample, by projected ascent on the slopes."""
    slopes = {name: value.clone().requires_grad_() for name, value in _adaptive_slopes(some).items()}
    optimizer = torch.optim.Adam(slopes.values(), lr=rate, maximize=True)
    best = rows.new_full((len(rows),), -torch.inf)
    for step in range(steps + 1):
        with torch.enable_grad():
            value = some.with_slopes(slopes).bound(rows).squeeze(1)
            total = value.sum()
        best = torch.fmax(best, value.detach())
        if step == steps or not value.requires_grad:
            break
        gradients = torch.autograd.grad(total, list(slopes.values()), allow_unused=True)
        for slope, gradient in zip(slopes.values(), gradients, strict=True):
            slope.grad = torch.zeros_like(slope) if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
        with torch.no_grad():
            for slope in slopes.values():
                slope.clamp_(0, 1)
        for group in optimizer.param_groups:
            group["lr"] *= 0.98
    return best
