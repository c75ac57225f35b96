"""The ball-box domain: what is known of a node's value, as a ball and a box that both contain it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lengths import flat, length
from .perturbation import PerturbationLpNorm


@dataclass(frozen=True)
class BallBox:
    """The set {v : ||v - center||_2 <= radius, lower <= v <= upper}, one for each sample.

    For every admissible input a node's value lies in its set (DESIGN: the invariant of the domain). The box
    always lies inside of center +- radius and contains the center.

    Attributes:
        center: Clean value of the node, (B, ...).
        radius: l2 radius around it over all of a sample's elements, (B,).
        lower: Lower corner of the box, (B, ...), or None where the box is no more than center +- radius.
        upper: Upper corner, likewise.
    """

    center: Tensor
    radius: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None

    @classmethod
    def from_input(cls, x: Tensor, perturbation: PerturbationLpNorm, ball_only: bool = False) -> BallBox:
        """The ball and the box that circumscribe a perturbation set around the input `x`."""
        center, radius = x.as_subclass(torch.Tensor), perturbation.l2_radius(x)
        plain_ball = perturbation.norm == 2 and perturbation.range_lower is None and perturbation.range_upper is None
        if ball_only or plain_ball:
            return cls(center, radius)
        return cls(center, radius, *perturbation.box(center))

    @classmethod
    def from_box(cls, center: Tensor, lower: Tensor, upper: Tensor) -> BallBox:
        """A box and the ball around `center` that circumscribes it: rho = ||max(u - z, z - l)||_2."""
        return cls(center, box_radius(center, lower, upper), lower, upper)

    @classmethod
    def point(cls, value: Tensor) -> BallBox:
        """A set of one point for each sample."""
        return cls(value, value.new_zeros(len(value)), value, value)

    def box(self) -> tuple[Tensor, Tensor]:
        """Both corners, also where the box is only the ball's."""
        if self.lower is not None and self.upper is not None:
            return self.lower, self.upper
        radius = per_sample(self.radius, self.center)
        return self.center - radius, self.center + radius

    def tightened(self) -> BallBox:
        """The same set with rho <- min(rho, ||max(u - z, z - l)||_2); sound, the value lies in the box too."""
        if self.lower is None or self.upper is None:
            return self
        radius = torch.minimum(self.radius, box_radius(self.center, self.lower, self.upper))
        return BallBox(self.center, radius, self.lower, self.upper)

    def take(self, index: Tensor) -> BallBox:
        """The sets of some samples of the batch."""
        if self.lower is None or self.upper is None:
            return BallBox(self.center[index], self.radius[index])
        return BallBox(self.center[index], self.radius[index], self.lower[index], self.upper[index])


def box_radius(center: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Distance (B,) from `center` to the farthest corner of a box, with a gradient of 0 where that is 0."""
    return _BoxRadius.apply(center, lower, upper)


class _BoxRadius(torch.autograd.Function):
    """As one function: in autograd's own graph the backward pass moves three times as much memory."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        far, below = upper - center, center - lower
        above = far >= below
        far = torch.maximum(far, below, out=far)
        radius = length(flat(far), 1)
        ctx.save_for_backward(far, above, radius)
        return radius

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_radius: Tensor) -> Any:
        far, above, radius = ctx.saved_tensors
        largest = torch.finfo(radius.dtype).max  # of a radius near the smallest number, the quotient overflows
        scale = torch.where(radius > 0, to_radius / radius, 0.0).clamp(-largest, largest)
        to_far = far * per_sample(scale, far)
        to_upper = to_far * above
        to_lower = to_upper - to_far
        return -(to_upper + to_lower), to_lower, to_upper


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View (B,) values so that they broadcast along the batch of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
