"""x / y with a perturbed divisor: interval division, and in backward passes x times the reciprocal of y."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.powers import Power
from ..engine import Node
from .base import RelaxedRule, Rows, State
from .bilinear import mccormick
from .context import Context
from .linear import Scaling, sum_to

_RECIPROCAL = Power(-1.0)


class Quotient(Scaling, RelaxedRule):
    """Rule of x / y, entry by entry: a scaling if y is constant, else interval division, unbounded where y may be 0.

    The relaxation is that of the product x r (McCormick), and then that of r = 1 / y on the box of y. If some y may be
    0, there is no relaxation.
    """

    def __init__(self) -> None:
        super().__init__(inverse=True)

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        scaled = super().propagate(node, inputs, center, context)
        if scaled is not None:
            return scaled
        lower, upper = quotient_box(*(s.box() if isinstance(s, BallBox) else (s, s) for s in inputs))
        return BallBox.from_box(center, torch.minimum(lower, center), torch.maximum(upper, center))

    def relax(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows, Tensor] | None:
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


def quotient_box(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Box of x / y over two boxes: infinite where y may be 0, NaN where an end is NaN.

    Args:
        x: Lower and upper corner of the numerator's box.
        y: Lower and upper corner of the divisor's box, which broadcast with those of x.
    """
    signed = (y[0] > 0) | (y[1] < 0)
    divisors = [end.where(signed | end.isnan(), 1.0) for end in y]  # 1 keeps NaN of 1 / 0 out of gradients
    corners = torch.stack(torch.broadcast_tensors(*(a / b for a in x for b in divisors)))
    known = signed.expand_as(corners[0]) | corners.isnan().any(0)
    return corners.amin(0).where(known, -torch.inf), corners.amax(0).where(known, torch.inf)
