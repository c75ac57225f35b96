"""Maximum and minimum of two operands, entry by entry, with a linear relaxation.

max(x, y) = y + relu(x - y), and min(x, y) = -max(-x, -y): the two lines of the ReLU on the box of x - y relax the
maximum. |max(x, y) - max(x', y')|^2 <= |x - x'|^2 + |y - y'|^2, so that the squares of the radii add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.lengths import length
from ..domain.rounding import gamma
from ..engine import Node
from .base import RelaxedRule, Rows, State
from .context import Context
from .structure import box_of, copies


class Larger(RelaxedRule):
    """Rule of the maximum, or the minimum, of two operands, entry by entry.

    Args:
        sign: 1 for the maximum (default), -1 for the minimum.
    """

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        if len(inputs) != 2:
            return None
        sets = [state for state in inputs if isinstance(state, BallBox)]
        (low_x, high_x), (low_y, high_y) = (box_of(state) for state in inputs)
        choose = torch.maximum if self.sign > 0 else torch.minimum
        if any(state.center.dim() < center.dim() or len(state.center) != len(center) for state in sets):
            return BallBox.from_box(center, choose(low_x, low_y), choose(high_x, high_y))
        radius = length(torch.stack([state.radius * copies(state, center) for state in sets], 1), 1)
        if all(state.lower is None for state in sets):
            return BallBox(center, radius)
        return BallBox(center, radius, choose(low_x, low_y), choose(high_x, high_y))

    def relax(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows, Tensor] | None:
        sets = [state for state in inputs if isinstance(state, BallBox)]
        if len(inputs) != 2 or any(state.center.shape != rows.shape[1:] for state in sets):
            return None
        boxes = [box_of(state) for state in inputs]
        if self.sign < 0:
            boxes, rows = [(-high, -low) for low, high in boxes], -rows
        (low_x, high_x), (low_y, high_y) = boxes
        loss = gamma(rows.dtype, 4) * (low_x.abs() + high_x.abs() + low_y.abs() + high_y.abs()).nan_to_num(0.0)
        low, high = low_x - high_y - loss, high_x - low_y + loss  # of x - y
        below, above = low.clamp(max=0), high.clamp(min=0)
        chord = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, above / (above - below)))
        finite = below.isfinite() & above.isfinite()
        chord = torch.where(finite, chord, (low >= 0).to(chord))
        offset = torch.where(finite, -chord * below, torch.where(low >= 0, 0.0, above))  # the chord's value at 0
        slope = torch.where(rows >= 0, (low + high > 0).to(rows), chord)
        bias = flat_sum(torch.where(rows < 0, rows * offset, 0.0))
        passed: list[Tensor | None] = []
        for state, own in zip(inputs, (rows * slope, rows * (1 - slope)), strict=True):
            if isinstance(state, BallBox):
                passed.append(self.sign * own)
            else:
                passed.append(None)
                bias = bias + flat_sum(self.sign * own * state)
        return passed, bias


def flat_sum(rows: Tensor) -> Tensor:
    """Sums of rows (S, B, ...) over a sample's entries, (S, B)."""
    return rows.reshape(*rows.shape[:2], -1).sum(2)
