"""How to add a rule, here one for the logarithm in place of the package's own.

A rule maps the sets of a node's inputs to a set that contains the node's value. That of `LogRule` is proven in its
docstring, registered in one line, and checked below by sampling.

    python examples/custom_rule.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_ext.domain.ball_box import BallBox
from lirpa_ext.engine import Node
from lirpa_ext.rules import RULES, Context, SetRule, State, register_rule


class LogRule(SetRule):
    """log increases, hence the box; on [l, u] its slope is at most 1 / l, hence the radius rho / min l."""

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        (state,) = inputs
        lower, upper = state.box()
        if (lower <= 0).any():
            return None  # declined: the node's own interval arithmetic answers, or refuses
        radius = state.radius / lower.flatten(1).amin(1)
        return BallBox(center, radius, torch.log(lower), torch.log(upper)).tightened()


class LogUnits(nn.Module):
    """Two dense layers with log(1 + relu(v)) between them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.log(1 + torch.relu(self.hidden(x))))


def main() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model, x, eps = LogUnits(), torch.rand(2, 64), 0.2
    bounded = BoundedModule(model, BoundedTensor(x, PerturbationLpNorm(norm=2, eps=eps)))

    lower, upper = bounded.compute_bounds(method="bcp")
    print(f"the package's rule: mean width {float((upper - lower).mean()):.3f}")

    own = RULES["BoundLogarithm"]
    register_rule("BoundLogarithm", LogRule(), overwrite=True)  # a class without a rule needs no overwrite
    try:
        lower, upper = bounded.compute_bounds(method="bcp")
        print(
            f"this rule: mean width {float((upper - lower).mean()):.3f}; "
            f"nodes without one: {bounded.last_result.fallbacks}"
        )
    finally:
        register_rule("BoundLogarithm", own, overwrite=True)  # only so that this example leaves the table as it was

    # Sound? No sample of the ball may leave the bounds.
    directions = nn.functional.normalize(torch.randn(5000, *x.shape), dim=-1)
    outputs = model(x + eps * directions)
    assert (lower - 1e-5 <= outputs).all() and (outputs <= upper + 1e-5).all()
    print(f"none of {len(outputs)} sampled outputs leaves the bounds")


if __name__ == "__main__":
    main()
