"""x / y with a perturbed divisor, in backward passes: x times the reciprocal of y, each with its own relaxation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..domain.ball_box import BallBox
from ..rules import State, register_rule
from ..rules.bilinear import mccormick
from ..rules.linear import Quotient, sum_to
from .powers import Power

_RECIPROCAL = Power(-1.0)


class RelaxedQuotient(Quotient):
    """The rule of `Quotient`, and rows through r = 1 / y: those of x r (McCormick), then those of r on the box of y.

    Where y may be 0 the lines of 1 / y are infinite, and so is the bound.
    """

    def relax(self, node: Any, inputs: Sequence[State], rows: Tensor) -> tuple[list[Tensor | None], Tensor] | None:
        x, y = inputs
        if not isinstance(y, BallBox) or node.inputs[0] is node.inputs[1]:
            return None
        lower, upper = y.box()
        if not bool(((lower > 0) | (upper < 0)).all()):
            return None
        to_x, bias = None, rows.new_zeros(())
        if isinstance(x, BallBox):
            reciprocal = BallBox.from_box(1 / y.center, *_RECIPROCAL.box(lower, upper))
            to_x, to_r, bias = mccormick(x, reciprocal, rows)
        else:
            to_r = sum_to(rows * x, y.center.shape[1:])
        to_y, rest = _RECIPROCAL.below(to_r, lower, upper)
        return [to_x, to_y], bias + rest


for name in ("BoundDiv", "BoundDivByAdjoint"):
    register_rule(name, RelaxedQuotient(inverse=True), overwrite=True)
