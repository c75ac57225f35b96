r"""Loss fusion: an upper bound of the cross entropy itself, with one row in place of one for each other class.

With t_m = z_m - z_y the cross entropy is ``log(1 + sum_m exp t_m)``. On a box [l, u] of t, exp is below its chord, so
for every admissible input

    CE <= log(1 + sum_m (exp u_m + k_m (t_m - u_m))),   k_m = (exp u_m - exp l_m) / (u_m - l_m) >= 0,

and sum_m k_m t_m is one row of the network's output, whose upper bound goes in. At each corner of the box this is the
cross entropy itself; the bound is never above that of the box, CE(u). The idea is K. Xu et al.'s (Automatic
perturbation analysis, NeurIPS 2020), who put the logarithm's tangent in place of the logarithm, which is looser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domain.rounding import gamma
from ..nodes.softmax import chord_ratio
from .slopes import SlopePass


@dataclass(frozen=True)
class Chords:
    """The chords of exp on a box of the margins, in units of exp(peak) so that nothing overflows.

    Attributes:
        upper: u, (B, classes - 1).
        value: exp(u - peak), likewise.
        slope: k exp(-peak), likewise.
        peak: max(0, u_1, u_2, ...), without gradient, (B, 1).
    """

    upper: Tensor
    value: Tensor
    slope: Tensor
    peak: Tensor

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor) -> Chords:
        """On the box of t: lower and upper corner, (B, classes - 1)."""
        peak = upper.detach().amax(1, keepdim=True).clamp(min=0)
        value, width = (upper - peak).exp(), upper - lower
        return cls(upper, value, value * chord_ratio(width), peak)

    def detach(self) -> Chords:
        """Without gradients."""
        return Chords(*(part.detach() for part in (self.upper, self.value, self.slope, self.peak)))

    def rows(self, margins: Tensor) -> Tensor:
        """The one row whose lower bound is asked, (B, 1, classes), of rows z_y - z_m (B, classes - 1, classes)."""
        return self.slope.unsqueeze(1) @ margins


def chords_of_margins(boxes: SlopePass, margins: Tensor) -> Chords:
    """Chords on the box that interval arithmetic gives, the last layer merged.

    Args:
        boxes: A pass on the boxes of the hidden layers.
        margins: Rows z_y - z_m, (B, classes - 1, classes).
    """
    level = boxes.with_slopes(None)
    lower, upper = level.lower(-margins), -level.lower(margins)
    return Chords.of(torch.minimum(lower, upper), upper)


def cross_entropy_bound(chosen: SlopePass, chords: Chords, margins: Tensor) -> Tensor:
    """Upper bound of the cross entropy of every admissible input, (B,), differentiable in the weights.

    Args:
        chosen: The pass, with its slopes.
        chords: `chords_of_margins`.
        margins: Rows z_y - z_m, (B, classes - 1, classes).
    """
    row = -chosen.lower(chords.rows(margins))
    of_box = (chords.slope * chords.upper).sum(1, keepdim=True)
    floor = (-chords.peak).exp()
    total = floor + (chords.value - chords.slope * chords.upper).sum(1, keepdim=True) + torch.minimum(row, of_box)
    # What the sum cancels to may be lost altogether, and the logarithm of nothing is no bound at any precision.
    size = floor + (chords.value + (chords.slope * chords.upper).abs()).sum(1, keepdim=True) + row.abs()
    total = total + gamma(total.dtype, margins.shape[1]) * size
    return (chords.peak + torch.maximum(total, floor).log()).squeeze(1)
