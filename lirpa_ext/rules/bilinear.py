"""The product of two perturbed tensors, entry by entry: its set, and its linear relaxation (McCormick, 1976)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.lengths import flat
from ..engine import Node
from .base import RelaxedRule, Rows, State
from .context import Context
from .linear import Scaling, sum_to
from .structure import copies


class Multiplication(Scaling, RelaxedRule):
    """Rule of x y, entry by entry: a scaling if one operand is constant, else a product of two sets."""

    def __init__(self) -> None:
        super().__init__(inverse=False)

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        x, y = inputs
        if isinstance(x, BallBox) and isinstance(y, BallBox):
            whole = len(x.center) == len(y.center) == len(center)
            return product_set(x, y, center, node.inputs[0] is node.inputs[1]) if whole else None
        return super().propagate(node, inputs, center, context)

    def relax(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows, Tensor] | None:
        x, y = inputs
        if not isinstance(x, BallBox) or not isinstance(y, BallBox):
            return None
        to_x, to_y, bias = mccormick(x, y, rows)
        return [to_x, to_y], bias


def product_box(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Box of x y over two boxes, whose extremes lie at corners; 0 times an infinite end is 0.

    Args:
        x: Lower and upper corner of the first box.
        y: Lower and upper corner of the second box, which broadcast with those of the first.
    """
    corners = torch.stack(torch.broadcast_tensors(*(_times(a, b) for a in x for b in y)))
    return corners.amin(0), corners.amax(0)


def square_box(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Box of x^2 over a box, given as lower and upper corner."""
    lower, upper = x
    nearest = torch.minimum(lower.clamp(min=0) + upper.clamp(max=0), upper)
    return nearest.square(), torch.maximum(lower.square(), upper.square())


def product_set(x: BallBox, y: BallBox, center: Tensor, same: bool) -> BallBox:
    """Set of x y, or of x^2 if both operands are the same node.

    x y - x0 y0 = x (y - y0) + y0 (x - x0), so that the radius is at most max |x| rho_y + max |y0| rho_x, with rho
    multiplied by the norm of the copying map for an operand that is broadcast; and at most the radius of the box.

    Args:
        x: Set of the first operand.
        y: Set of the second operand.
        center: Clean value of the product, (B, ...).
        same: Whether both operands are the same node.
    """
    lower, upper = square_box(x.box()) if same else product_box(x.box(), y.box())
    largest = torch.maximum(*(end.abs() for end in x.box()))
    by_ball = _reach(largest, y.radius * copies(y, center)) + _reach(y.center.abs(), x.radius * copies(x, center))
    box = BallBox.from_box(center, torch.minimum(lower, center), torch.maximum(upper, center))
    return BallBox(center, torch.fmin(by_ball, box.radius), box.lower, box.upper)


def mccormick(x: BallBox, y: BallBox, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and bias with a.(x y) >= rows_x.x + rows_y.y + bias on the boxes of x and y, for the rows a of x y.

    (x - lx)(y - ly) >= 0 and (x - ux)(y - uy) >= 0 give two planes below x y; (x - lx)(y - uy) <= 0 and
    (x - ux)(y - ly) <= 0 give two planes above. The two planes of a side agree in the middle of the box. Their mean is
    taken: it has the same slopes below and above, and changes smoothly with the box.

    Args:
        x: Set of the first operand, finite.
        y: Set of the second operand, finite.
        rows: Coefficients of the product, (S, B, ...).

    Returns:
        Rows of x and of y, (S, B, ...) each, and the bias, (S, B).
    """
    (lx, ux), (ly, uy) = x.box(), y.box()
    to_x, to_y = rows * ((ly + uy) / 2), rows * ((lx + ux) / 2)
    below, above = (lx * ly + ux * uy) / 2, (lx * uy + ux * ly) / 2
    bias = -(rows.clamp(min=0) * below + rows.clamp(max=0) * above)
    total = bias.reshape(*rows.shape[:2], -1).sum(2)
    return sum_to(to_x, x.center.shape[1:]), sum_to(to_y, y.center.shape[1:]), total


def _times(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _reach(size: Tensor, radius: Tensor) -> Tensor:
    largest = flat(size).amax(1)
    return torch.where(radius == 0, 0.0, largest * radius)
