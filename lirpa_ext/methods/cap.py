"""CAP's bound, Fast-Lin: parallel lines at every ReLU, for the boxes of the hidden layers too.

E. Wong, J. Z. Kolter, Provable defenses against adversarial examples via the convex outer adversarial polytope,
ICML 2018; L. Weng et al., Towards fast computation of certified robustness for ReLU networks, ICML 2018. Proof of
soundness: each hidden layer's box is a bound of `lirpa_ext.passes.slopes` on the boxes before it, which are sound.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import engine
from ..domain.ball_box import BallBox
from ..domain.batch_axis import merges_batch
from ..engine import Node
from ..errors import OptionError
from ..passes.intervals import propagate_intervals
from ..passes.slopes import ACTIVATIONS, SlopePass
from ..rules import Context
from .base import BoundResult, Problem, register_method, set_of
from .bcp import tightened
from .projections import Projections
from .slopes import box_by_rows, chord, random_source, slope_result, uniform


def cap(
    problem: Problem,
    *,
    outward: bool | None = None,
    projections: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> BoundResult:
    """Fast-Lin, the bound of CAP (Wong and Kolter 2018): both lines parallel, for the hidden layers' boxes too.

    Args:
        problem: What to bound.
        outward: As in `sparse_slope`.
        projections: Estimate the hidden layers' boxes by so many random projections (`lirpa_ext.methods.projections`;
            the source takes 50), for training: it costs as many forward passes, not a row for each neuron. The
            result is then no certificate. Default None: bounds.
        generator: Source of the projections; default torch's own.
        seed: Or the seed of a new one.

    Returns:
        As `sparse_slope`.
    """
    if projections is not None and (isinstance(projections, bool) or not projections >= 1):
        raise OptionError(f"projections must be a whole number from 1, the source takes 50, got {projections}")
    context = problem.context("bound", False if projections else outward)
    order = engine.ancestors_in_order(problem.final)
    activations = [node for node in order if type(node).__name__ in ACTIVATIONS and node.perturbed]
    # The boxes before the first activations are exact (but for a cut lp ball): nothing to gain there.
    names = frozenset(
        node.inputs[0].name
        for node in activations
        if any(other in activations for other in engine.ancestors_in_order(node.inputs[0]))
    )

    source = random_source(generator, seed)
    sums = Projections(problem.module, projections, lambda like: uniform(like, source)) if projections else None

    def refine(node: Node, states: dict[str, Any]) -> BallBox:
        if sums is not None:
            return sums.box(node, states)
        known = states[node.name]
        if merges_batch(node):  # rows are of whole samples
            return known
        chosen = _parallel(problem, tightened(states) if context.outward else states, context, node)
        lower, upper = box_by_rows(chosen, known.center)
        return BallBox(0.5 * (lower + upper), known.radius, lower, upper)

    states = propagate_intervals(problem.module, context, (refine, names))
    states = tightened(states) if context.outward else states
    return slope_result(problem, _parallel(problem, states, context))


def _parallel(problem: Problem, states: dict[str, Any], context: Context, final: Node | None = None) -> SlopePass:
    """The pass whose lower lines are parallel to the upper ones."""
    plain = SlopePass(problem.module, states, context, {}, final=final)
    return plain.with_slopes(
        {node.name: chord(set_of(plain.states[node.inputs[0].name]).box()) for node in plain.activations}
    )


register_method("cap", cap)
