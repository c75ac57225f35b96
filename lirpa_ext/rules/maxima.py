"""Max pools of any windows, and maxima and minima along axes, with a linear relaxation.

Lower bound: a maximum is at least each of its entries; the entry whose interval has the largest middle is taken. Upper
bound: the largest upper end, a constant. Where the box determines which entry is the largest, the maximum equals it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..domain.ball_box import BallBox
from ..domain.lengths import flat
from ..engine import Node
from .base import RelaxedRule, Rows, State, only_perturbed
from .structure import Monotone


class Maximum(Monotone, RelaxedRule):
    """Rule of a node whose outputs are maxima (or minima) over windows of its input.

    Args:
        factor: As in `Monotone`.
        windows: (node, shape of the input without batch) -> flat positions of the entries of each output's window,
            (outputs, K), -1 where a window has fewer than K; None declines.
        sign: 1 for maxima (default), -1 for minima.
    """

    def __init__(self, factor: Any, windows: Any, sign: int = 1) -> None:
        super().__init__(factor)
        self.windows = windows
        self.sign = sign

    def relax(self, node: Node, inputs: Sequence[State], rows: Tensor) -> tuple[Rows, Tensor] | None:
        index = only_perturbed(inputs)
        if index is None:
            return None
        state = inputs[index]
        assert isinstance(state, BallBox)
        positions = self.windows(node, state.center.shape[1:])
        if positions is None or len(positions) != rows[0, 0].numel():
            return None
        positions = positions.to(rows.device)
        lower, upper = (flat(end) for end in state.box())
        if self.sign < 0:
            lower, upper, rows = -upper, -lower, -rows
        passed, bias = _relaxed(lower, upper, rows.reshape(*rows.shape[:2], -1), positions)
        passed = self.sign * passed.view(*rows.shape[:2], *state.center.shape[1:])
        return [passed if i == index else None for i in range(len(inputs))], bias


def _relaxed(lower: Tensor, upper: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Relaxation on the box: rows (S, B, outputs) of the maxima at `positions` -> rows (S, B, n) of v, bias (S, B)."""
    outside, kept = positions < 0, positions.clamp(min=0)
    low, high = (end[:, kept].masked_fill(outside, -torch.inf) for end in (lower, upper))
    chosen = (low + high).argmax(2, keepdim=True)
    others = high.scatter(2, chosen, -torch.inf).amax(2)
    known = others <= low.gather(2, chosen).squeeze(2)  # then the chosen entry is the largest for every v in the box
    target = kept.expand(len(low), -1, -1).gather(2, chosen).squeeze(2).expand(rows.shape)
    share = torch.where((rows >= 0) | known, rows, 0.0)
    rest = rows - share
    bias = torch.where(rest == 0, 0.0, rest * high.amax(2)).sum(2)
    return rows.new_zeros(*rows.shape[:2], lower.shape[1]).scatter_add(2, target, share), bias


def pool_windows(node: Node, shape: torch.Size) -> Tensor | None:
    """Windows of a 2-D max pool.

    Args:
        node: The max pool.
        shape: Shape of one input, (C, H, W).

    Returns:
        Flat positions in the input of each output's window, (outputs, K), -1 at padding; None for other pools.
    """
    if len(shape) != 3 or len(node.kernel_size) != 2:
        return None
    channels, height, width = shape
    places = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    dilation = getattr(node, "dilation", None) or 1
    windows = F.unfold(places, tuple(node.kernel_size), dilation, tuple(node.padding), tuple(node.stride))
    windows = windows[0].t().round().long() - 1  # shape: (positions, K), -1 at the padding
    offset = (torch.arange(channels) * height * width).view(-1, 1, 1)
    return torch.where(windows < 0, windows, windows + offset).flatten(0, 1)


def axis_windows(node: Node, shape: torch.Size) -> Tensor | None:
    """Windows of a maximum or minimum along axes.

    Args:
        node: The reduction.
        shape: Shape of one input, without batch.

    Returns:
        Flat positions in the input of each output's window, (outputs, K); None if samples are reduced.
    """
    if node.axis is None:
        return None  # reduces all axes, the batch included
    axes = node.axis if isinstance(node.axis, (list, tuple)) else [node.axis]
    axes = [axis % (len(shape) + 1) - 1 for axis in axes]
    if any(axis < 0 for axis in axes):
        return None  # reduces the batch
    places = torch.arange(shape.numel()).view(shape)
    rest = [axis for axis in range(len(shape)) if axis not in axes]
    return places.permute(*rest, *axes).reshape(-1, torch.Size([shape[axis] for axis in axes]).numel())
