"""The ball-box domain: a ball and a box that both contain the value of a node."""

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

    The invariant of the domain: for every input in the perturbation set, the value of a node lies in its set. The box
    lies inside of center +- radius and contains the center. (Lee, Lee and Park, NeurIPS 2020.)

    Attributes:
        center: Clean value of the node, (B, ...).
        radius: l2 radius around the center, over all elements of a sample, (B,).
        lower: Lower corner of the box, (B, ...), or None for the box center +- radius.
        upper: Upper corner of the box, (B, ...), or None.
    """

    center: Tensor
    radius: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None

    @classmethod
    def from_input(cls, x: Tensor, perturbation: PerturbationLpNorm, ball_only: bool = False) -> BallBox:
        """The ball and the box that circumscribe a perturbation set.

        Args:
            x: Input, the center of the set, (B, ...).
            perturbation: The perturbation set.
            ball_only: Leave out the box. Default False.

        Returns:
            The set, without a box if the perturbation set is an l2 ball without a data range.
        """
        center, radius = x.as_subclass(torch.Tensor), perturbation.l2_radius(x)
        plain_ball = perturbation.norm == 2 and perturbation.range_lower is None and perturbation.range_upper is None
        if ball_only or plain_ball:
            return cls(center, radius)
        return cls(center, radius, *perturbation.box(center))

    @classmethod
    def from_box(cls, center: Tensor, lower: Tensor, upper: Tensor) -> BallBox:
        """A box and the ball around `center` that circumscribes the box: rho = ||max(u - z, z - l)||_2.

        Args:
            center: z, a point of the box, (B, ...).
            lower: l, (B, ...).
            upper: u, (B, ...).
        """
        return cls(center, box_radius(center, lower, upper), lower, upper)

    @classmethod
    def point(cls, value: Tensor) -> BallBox:
        """The set {value} for each sample, of radius 0; `value` has the shape (B, ...)."""
        return cls(value, value.new_zeros(len(value)), value, value)

    def box(self) -> tuple[Tensor, Tensor]:
        """Lower and upper corner of the box, (B, ...) each; those of center +- radius if no box is stored."""
        if self.lower is not None and self.upper is not None:
            return self.lower, self.upper
        radius = per_sample(self.radius, self.center)
        return self.center - radius, self.center + radius

    def tightened(self) -> BallBox:
        """The same set with rho <- min(rho, ||max(u - z, z - l)||_2), sound because the box lies in the second ball."""
        if self.lower is None or self.upper is None:
            return self
        radius = torch.minimum(self.radius, box_radius(self.center, self.lower, self.upper))
        return BallBox(self.center, radius, self.lower, self.upper)

    def take(self, index: Tensor) -> BallBox:
        """The sets of the samples with the indices `index`, (K,)."""
        if self.lower is None or self.upper is None:
            return BallBox(self.center[index], self.radius[index])
        return BallBox(self.center[index], self.radius[index], self.lower[index], self.upper[index])


def box_radius(center: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """l2 distance from `center` to the farthest corner of a box; its gradient is 0 where the distance is 0.

    Args:
        center: A point, (B, ...).
        lower: Lower corner, (B, ...).
        upper: Upper corner, (B, ...).

    Returns:
        (B,).
    """
    return _BoxRadius.apply(center, lower, upper)


class _BoxRadius(torch.autograd.Function):
    """`box_radius` as one autograd function: torch's own backward pass would move three times as much memory."""

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
        largest = torch.finfo(radius.dtype).max  # the quotient overflows for radii near the smallest number
        scale = torch.where(radius > 0, to_radius / radius, 0.0).clamp(-largest, largest)
        to_far = far * per_sample(scale, far)
        to_upper = to_far * above
        to_lower = to_upper - to_far
        return -(to_upper + to_lower), to_lower, to_upper


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) as a view (B, 1, ..., 1) that broadcasts with `like`, (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))
