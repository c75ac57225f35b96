"""Softmax and log-softmax along an axis: radii by Lipschitz constants, boxes by the nodes' interval arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..domain.ball_box import BallBox
from ..domain.lengths import flat, length
from ..engine import Node
from .base import SetRule, State
from .context import Context


class Softmax(SetRule):
    """Rule of softmax along an axis.

    The Jacobian diag(p) - p p^T is symmetric, and the absolute values of its k-th row sum to 2 p_k (1 - p_k) <= 1/2.
    The largest of these sums on the box bounds its spectral norm.
    """

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        (state,) = inputs
        assert isinstance(state, BallBox)
        lower, upper = node.interval_propagate(state.box())
        nearest = torch.minimum(torch.maximum(lower, torch.full_like(lower, 0.5)), upper)
        slope = 2 * nearest * (1 - nearest)
        return BallBox(center, state.radius * flat(slope).amax(1), lower, upper)


class LogSoftmax(SetRule):
    """Rule of log-softmax along an axis of size n, with Jacobian I - 1 p^T.

    Its spectral norm equals that of the projection 1 p^T, sqrt(n) ||p||_2, for n > 1; it is bounded on the box.
    """

    def propagate(self, node: Node, inputs: Sequence[State], center: Tensor, context: Context) -> BallBox | None:
        (state,) = inputs
        assert isinstance(state, BallBox)
        lower, upper = node.interval_propagate(state.box())
        n = center.shape[node.axis]
        if n == 1:
            return BallBox(center, torch.zeros_like(state.radius), lower, upper)
        norm = length(upper.exp(), node.axis).clamp(max=1.0)
        return BallBox(center, state.radius * math.sqrt(n) * flat(norm).amax(1), lower, upper)
