"""x^p for a number p, and |x|, as scalar functions with boxes and linear bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scalar_functions import ScalarFunction

_SHRINK = 0.99  # margin by which the tangent of an even power stays above 0 in spite of rounding


class Power(ScalarFunction):
    """x^p: defined for all x if p is a whole number, else for x >= 0; with a pole at 0 if p < 0.

    Args:
        exponent: p.
    """

    monotone = False

    def __init__(self, exponent: float) -> None:
        self.set_exponent(exponent)

    def set_exponent(self, exponent: float) -> None:
        """Set p, and the attributes of `ScalarFunction` that depend on p."""
        whole, p = exponent == int(exponent), exponent
        self.exponent, self.whole = p, whole
        if whole and (p < 0 or p % 2):
            self.turns, self.rising = (0.0,), (p % 2 == 0, True)
        else:
            self.rising = (not 0 < p < 1,)
        self.monotone = p > 0 and not (whole and p % 2 == 0)
        self.least = 0.0 if not whole or p % 2 == 0 else -math.inf
        self.lipschitz = p >= 1 or p == 0

    def value(self, x: Tensor) -> Tensor:
        return torch.pow(x, self.exponent)

    def derivative(self, x: Tensor) -> Tensor:
        return self.exponent * torch.pow(x, self.exponent - 1) if self.exponent else torch.zeros_like(x)

    def undefined(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        return None if self.whole else lower < 0

    def unbounded(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        return (lower <= 0) & (upper >= 0) if self.exponent < 0 else None

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """As in `ScalarFunction`; the line below an even power stays at or above 0, as a later root or log may need."""
        (k, low), above = super().lines(lower, upper)
        if not self.whole or self.exponent <= 0 or self.exponent % 2:
            return (k, low), above
        p = self.exponent
        nearest = torch.minimum(lower.clamp(min=0) + upper.clamp(max=0), upper)
        # The tangent at t is 0 at t (p - 1) / p: not negative on the interval if this lies between 0 and the interval.
        middle, furthest = lower + (upper - lower) / 2, nearest * (p / (p - 1) * _SHRINK)
        at = torch.where(middle.abs() > furthest.abs(), furthest, middle)
        slope, offset = self.derivative(at), (1 - p) * self.value(at)
        offset = offset - 8 * torch.finfo(low.dtype).eps * offset.abs()
        fine = slope.isfinite() & offset.isfinite() & ~low.isnan()
        return (torch.where(fine, slope, k), torch.where(fine, offset, low)), above


class Absolute(ScalarFunction):
    """|x|."""

    turns = (0.0,)
    rising = (True, True)
    monotone = False
    least = 0.0

    def value(self, x: Tensor) -> Tensor:
        return x.abs()

    def derivative(self, x: Tensor) -> Tensor:
        return x.sign()

    def box(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest |x| on [l, u], without outward rounding, as |x| is computed exactly."""
        nearest = torch.maximum(lower, -upper).clamp(min=0)
        return self._honest(nearest, torch.maximum(-lower, upper), lower, upper)

    def steepest(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.ones_like(upper)
