"""How to add a bound method: here the better, row by row, of the Lipschitz bound and of interval arithmetic.

A method is a function of a `Problem` (graph, specification rows, sides asked for); its keyword-only arguments are
its options. `problem.propagate` runs the rules over the graph; `last_step` ends it with the minimum of the rows.

    python examples/custom_method.py
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.domain.ball_box import BallBox
from lirpa_ext.methods import METHODS, BoundResult, Problem, register_method
from lirpa_ext.methods.bcp import last_step
from lirpa_ext.rules import State


def best_of_two(problem: Problem, *, norms: str = "bound") -> BoundResult:
    """Elementwise best of the ball alone and of the box alone: both are bounds, so the larger lower one is."""
    context = problem.context(norms, tighten=False)
    ball = problem.propagate(problem.context(norms, ball_only=True, tighten=False))
    both = problem.propagate(context)
    box = {name: _without_ball(state) for name, state in both.items()}

    def minimum(C: Tensor | None, sign: int) -> Tensor:
        return torch.maximum(last_step(problem, ball, C, sign), last_step(problem, box, C, sign))

    return problem.result(context, minimum)


def _without_ball(state: State) -> State:
    """The box, in a ball that does not constrain."""
    if not isinstance(state, BallBox):
        return state
    return dataclasses.replace(BallBox(state.center, state.radius, *state.box()), radius=state.radius + torch.inf)


def main() -> None:
    register_method("best-of-two", best_of_two, overwrite=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    x, eps = torch.rand(4, 8), 0.05
    bounded = BoundedModule(model, BoundedTensor(x, PerturbationLpNorm(norm=2, eps=eps)))
    widths = {}
    for method in ("lipschitz", "best-of-two", "bcp"):
        lower, upper = bounded.compute_bounds(method=method)
        widths[method] = float((upper - lower).mean())
        print(f"{method:<12} mean width {widths[method]:.3f}")
        # Sound? No sample of the ball may leave the bounds.
        directions = nn.functional.normalize(torch.randn(5000, *x.shape), dim=-1)
        outputs = model(x + eps * directions)
        assert (lower - 1e-5 <= outputs).all() and (outputs <= upper + 1e-5).all()
    assert widths["bcp"] <= widths["best-of-two"] <= widths["lipschitz"]
    del METHODS["best-of-two"]  # only so that this example leaves the table as it was


if __name__ == "__main__":
    main()
