"""Fast-Lin, the bound of CAP: parallel lines at every ReLU, also for the boxes of the hidden layers.

E. Wong, J. Z. Kolter, Provable defenses against adversarial examples via the convex outer adversarial polytope,
ICML 2018; L. Weng et al., Towards fast computation of certified robustness for ReLU networks, ICML 2018. Proof of
soundness: the box of each hidden layer is a bound by `lirpa_ext.passes.slopes` on the boxes before it, which are sound.
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
    """Fast-Lin, the bound of CAP (Wong and Kolter, 2018): parallel lines, also for the boxes of the hidden layers.

    Args:
        problem: The graph and the requested bounds.
        outward: As in `bcp`.
        projections: Number of random projections that estimate the boxes of the hidden layers
            (`lirpa_ext.methods.projections`), for training, at the cost of as many forward passes instead of a row for
            each neuron; Lee (2021) uses 50. The result is then no certificate. Default None: sound boxes.
        generator: Source of the projections; default torch's global generator.
        seed: Seed of a new generator, in place of `generator`.

    Returns:
        Lower and upper bounds, (B, S), or of the output's shape without C.

    Raises:
        OptionError: `projections` is not a whole number from 1, or both `generator` and `seed` are given.
    """
    if projections is not None and (isinstance(projections, bool) or not projections >= 1):
        raise OptionError(f"projections must be a whole number from 1, Lee (2021) takes 50, got {projections}")
    context = problem.context("bound", False if projections else outward)
    order = engine.ancestors_in_order(problem.final)
    activations = [node for node in order if type(node).__name__ in ACTIVATIONS and node.perturbed]
    # Before the first activations, boxes are exact (except for lp balls cut to a range) and need no refinement.
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
        if merges_batch(node):  # rows need whole samples along the first axis
            return known
        chosen = _parallel(problem, tightened(states) if context.outward else states, context, node)
        lower, upper = box_by_rows(chosen, known.center)
        return BallBox(0.5 * (lower + upper), known.radius, lower, upper)

    states = propagate_intervals(problem.module, context, (refine, names))
    states = tightened(states) if context.outward else states
    return slope_result(problem, _parallel(problem, states, context))


def _parallel(problem: Problem, states: dict[str, Any], context: Context, final: Node | None = None) -> SlopePass:
    """The pass whose lower lines are parallel to the upper lines."""
    plain = SlopePass(problem.module, states, context, {}, final=final)
    return plain.with_slopes(
        {node.name: chord(set_of(plain.states[node.inputs[0].name]).box()) for node in plain.activations}
    )


register_method("cap", cap)
