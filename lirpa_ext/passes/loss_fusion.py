r"""Loss fusion: an upper bound of the cross entropy itself, with one coefficient row instead of one per other class.

With t_m = z_m - z_y the cross entropy is ``log(1 + sum_m exp t_m)``. On a box [l, u] of t, exp lies below its chord, so
that for every input in the perturbation set

    CE <= log(1 + sum_m (exp u_m + k_m (t_m - u_m))),   k_m = (exp u_m - exp l_m) / (u_m - l_m) >= 0,

where sum_m k_m t_m is one row of the network's output, for which its upper bound is taken. The right side equals the
cross entropy at each corner of the box, and the bound never exceeds that of the box, CE(u). The idea is due to K. Xu
et al. (Automatic perturbation analysis, NeurIPS 2020), who replace the logarithm by its tangent, which is looser.
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
        value: exp(u - peak), (B, classes - 1).
        slope: k exp(-peak), (B, classes - 1).
        peak: max(0, u_1, u_2, ...), without gradient, (B, 1).
    """

    upper: Tensor
    value: Tensor
    slope: Tensor
    peak: Tensor

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor) -> Chords:
        """The chords on a box of t.

        Args:
            lower: l, (B, classes - 1).
            upper: u, (B, classes - 1).
        """
        peak = upper.detach().amax(1, keepdim=True).clamp(min=0)
        value, width = (upper - peak).exp(), upper - lower
        return cls(upper, value, value * chord_ratio(width), peak)

    def detach(self) -> Chords:
        """The same chords without gradients."""
        return Chords(*(part.detach() for part in (self.upper, self.value, self.slope, self.peak)))

    def rows(self, margins: Tensor) -> Tensor:
        """The row -sum_m k_m t_m of the outputs z, in units of exp(peak).

        Args:
            margins: Rows z_y - z_m, (B, classes - 1, classes).

        Returns:
            (B, 1, classes).
        """
        return self.slope.unsqueeze(1) @ margins


def chords_of_margins(boxes: SlopePass, margins: Tensor) -> Chords:
    """Chords on the box of t by interval arithmetic, with the last layer merged into the rows.

    Args:
        boxes: A pass with the boxes of the hidden layers.
        margins: Rows z_y - z_m, (B, classes - 1, classes).
    """
    level = boxes.with_slopes(None)
    lower, upper = level.lower(-margins), -level.lower(margins)
    return Chords.of(torch.minimum(lower, upper), upper)


def cross_entropy_bound(chosen: SlopePass, chords: Chords, margins: Tensor) -> Tensor:
    """Upper bound of the cross entropy over all inputs in the perturbation set, differentiable in the weights.

    Args:
        chosen: The pass, with its slopes.
        chords: Chords on a box of t, by `chords_of_margins`.
        margins: Rows z_y - z_m, (B, classes - 1, classes).

    Returns:
        (B,), in nats.
    """
    row = -chosen.lower(chords.rows(margins))
    of_box = (chords.slope * chords.upper).sum(1, keepdim=True)
    floor = (-chords.peak).exp()
    total = floor + (chords.value - chords.slope * chords.upper).sum(1, keepdim=True) + torch.minimum(row, of_box)
    # The sum may cancel to less than its rounding errors, so that its logarithm would be no bound: these are added.
    size = floor + (chords.value + (chords.slope * chords.upper).abs()).sum(1, keepdim=True) + row.abs()
    total = total + gamma(total.dtype, margins.shape[1]) * size
    return (chords.peak + torch.maximum(total, floor).log()).squeeze(1)
