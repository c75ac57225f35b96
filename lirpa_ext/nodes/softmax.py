"""Softmax and log-softmax: exact boxes, and linear bounds by log-sum-exp (LSE), none of which overflows.

Each entry is log p_k = x_k - LSE(x). LSE is convex, so that it lies above its tangents. Over a box, LSE(x) <= log S(x)
with S the sum of the chords of exp, affine in x (D. Wei et al., Convex bounds on the softmax function, AISTATS 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .relaxations import BoundRelaxed


def others(x: Tensor) -> Tensor:
    """For each entry, the log-sum-exp of all other entries along the last axis; -inf if there are none."""
    left, right = (torch.logcumsumexp(part, -1) for part in (x, x.flip(-1)))
    nothing = torch.full_like(x[..., :1], -torch.inf)
    return torch.logaddexp(torch.cat([nothing, left[..., :-1]], -1), torch.cat([right[..., :-1].flip(-1), nothing], -1))


def log_softmax_box(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest log p_k over a box, along the last axis: log p_k = -log(1 + exp(LSE of the others - x_k)).

    Args:
        lower: Lower corner of the box.
        upper: Upper corner of the box.

    Returns:
        Least and largest values, of the shape of `lower`.
    """
    return -F.softplus(others(upper) - lower), -F.softplus(others(lower) - upper)


class BoundStableLogSoftmax(BoundRelaxed):
    """Node of log p = x - LSE(x) along an axis; rows that sum to 0, such as those of margins, pass through exactly."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.axis = attr["axis"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(x, self.axis)

    def interval_propagate(self, *v: Any) -> Any:
        lower, upper = log_softmax_box(*(end.movedim(self.axis, -1) for end in v[0]))
        return lower.movedim(-1, self.axis), upper.movedim(-1, self.axis)

    def below(self, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """a.log p = a.x - (sum of a) LSE(x), with LSE between the tangents of LSE and log S at the box's center."""
        axis = self.axis % lower.dim()
        rows, lower, upper = rows.movedim(axis + 1, -1), lower.movedim(axis, -1), upper.movedim(axis, -1)
        center = (lower + upper) / 2
        total = rows.sum(-1, keepdim=True)
        weight, low = torch.softmax(center, -1), torch.logsumexp(center, -1, keepdim=True)
        low = low - (weight * center).sum(-1, keepdim=True)
        slope, offset, shift = chords(lower, upper)
        sums = (slope * center + offset).sum(-1, keepdim=True)
        above = slope / sums
        high = shift + torch.log(sums) - (above * center).sum(-1, keepdim=True)
        passed = rows - torch.where(total > 0, total * above, total * weight)
        bias = -torch.where(total > 0, total * high, total * low)
        return passed.movedim(-1, axis + 1), bias.reshape(*rows.shape[:2], -1).sum(2)


def chord_ratio(width: Tensor) -> Tensor:
    """(1 - e^-w) / w: the slope of the chord of exp over [u - w, u] in units of e^u, without cancellation.

    The result is at most the exact slope, up to rounding, so that a line of this slope through (u, e^u) lies above exp
    on the interval.

    Args:
        width: w, at least 0.
    """
    wide = width > 1e-6  # for smaller w, the first two terms of the series are right up to 1e-13
    return torch.where(wide, -torch.expm1(-width) / torch.where(wide, width, 1.0), 1 - width / 2)


def chords(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chords of exp(x - shift) on [l, u], which lie above it, with shift the largest u along the last axis.

    Args:
        lower: l.
        upper: u.

    Returns:
        Slopes and offsets, of the shape of u, and the shift, of length 1 along the last axis.
    """
    shift = upper.amax(-1, keepdim=True).detach()
    low, high = lower - shift, upper - shift
    width = high - low
    slope = torch.exp(high) * chord_ratio(width)
    return slope, torch.exp(high) - slope * high - slope * shift, shift


class BoundStableSoftmax(BoundStableLogSoftmax):
    """Node of the softmax p = exp(log p) along an axis.

    Lower bound: the tangent of exp(x_k - shift) / S(x), which is convex and at most p_k. Upper bound: the chord of exp
    on the interval of log p_k, with log p_k, which is concave, below its tangent.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, self.axis)

    def interval_propagate(self, *v: Any) -> Any:
        lower, upper = super().interval_propagate(*v)
        return lower.exp(), upper.exp()

    def below(self, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        axis = self.axis % lower.dim()
        rows, lower, upper = rows.movedim(axis + 1, -1), lower.movedim(axis, -1), upper.movedim(axis, -1)
        center = (lower + upper) / 2
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        # Below, the tangent at the center: p_k >= q_k + q_k (x_k - c_k) - q_k / S (slope . (x - c)).
        slope, offset, shift = chords(lower, upper)
        sums = (slope * center + offset).sum(-1, keepdim=True)
        q = torch.exp(center - shift) / sums
        passed = positive * q - (positive * q).sum(-1, keepdim=True) * slope / sums
        bias = positive * q
        # Above: p_k <= p + chord (log p_k - log p), and log p_k below its tangent at the center.
        least, most = log_softmax_box(lower, upper)
        width = most - least
        chord = torch.exp(most) * chord_ratio(width)
        weight, middle = torch.softmax(center, -1), torch.log_softmax(center, -1)
        share = negative * chord
        passed = passed + share - share.sum(-1, keepdim=True) * weight
        bias = bias + negative * (torch.exp(most) + chord * (middle - most))
        bias = bias - passed * center
        return passed.movedim(-1, axis + 1), bias.reshape(*rows.shape[:2], -1).sum(2)


OPS: dict[str, Any] = {"onnx::Softmax": BoundStableSoftmax, "onnx::LogSoftmax": BoundStableLogSoftmax}
