"""Softmax and log-softmax: exact boxes, balls, and linear bounds by log-sum-exp, none of which overflows.

Each entry is log p_k = x_k - LSE(x). Over a box LSE(x) lies above its tangent, for it is convex, and LSE(x) <= log S(x)
with S the sum of the chords of exp, affine in x (D. Wei et al., Convex bounds on the softmax function, AISTATS 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .relaxations import BoundRelaxed


def others(x: Tensor) -> Tensor:
    """log of the sum over all other entries of the last axis of exp(x), for each entry; -inf where there is none."""
    left, right = (torch.logcumsumexp(part, -1) for part in (x, x.flip(-1)))
    nothing = torch.full_like(x[..., :1], -torch.inf)
    return torch.logaddexp(torch.cat([nothing, left[..., :-1]], -1), torch.cat([right[..., :-1].flip(-1), nothing], -1))


def log_softmax_box(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest log p_k = -log(1 + exp(LSE of the others - x_k)) over a box, along the last axis."""
    return -F.softplus(others(upper) - lower), -F.softplus(others(lower) - upper)


class BoundStableLogSoftmax(BoundRelaxed):
    """log p = x - LSE(x); rows that sum to 0, such as margins, pass through exactly."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.axis = attr["axis"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(x, self.axis)

    def interval_propagate(self, *v: Any) -> Any:
        lower, upper = log_softmax_box(*(end.movedim(self.axis, -1) for end in v[0]))
        return lower.movedim(-1, self.axis), upper.movedim(-1, self.axis)

    def below(self, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """a.log p = a.x - (sum of a) LSE(x), and LSE between its tangent and log S's."""
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

    Never more than that but for rounding, so that a line of this slope through (u, e^u) is above exp on the interval.
    """
    wide = width > 1e-6  # below that it is its first two terms, up to 1e-13
    return torch.where(wide, -torch.expm1(-width) / torch.where(wide, width, 1.0), 1 - width / 2)


def chords(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope and offset of the chord of exp(x - shift) on [l, u], above it; shift is the largest u of the last axis."""
    shift = upper.amax(-1, keepdim=True).detach()
    low, high = lower - shift, upper - shift
    width = high - low
    slope = torch.exp(high) * chord_ratio(width)
    return slope, torch.exp(high) - slope * high - slope * shift, shift


class BoundStableSoftmax(BoundStableLogSoftmax):
    """p = exp(log p). Below: exp(x_k - shift) / S(x) is convex; above: the chord of exp at log p, which is concave."""

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
