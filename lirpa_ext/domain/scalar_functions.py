"""Functions of one variable on intervals: boxes, slopes, and linear lower and upper bounds.

On an interval [l, u] everything follows from f and its derivative: the box, the steepest slope, and a line on either
side. The slope k of a line is that of the chord or of the tangent in the middle, whichever gives the better line.
f(x) - kx attains its minimum and maximum at l, at u, at a kink, or where f' = k. A class lists the points between
which f' is monotone, so that f' = k at one point at most between two of them, found by bisection.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import RegistrationError

_BISECTIONS = {torch.float64: 48, torch.float32: 22}
_ULPS = 32  # error bound of f(x) - kx in floating point, in units in the last place


class ScalarFunction:
    """A function f of one variable, applied to each entry of a tensor. Subclasses write `value` and `derivative`.

    Where f is not defined on all of an interval, box and lines are NaN; where f has a pole in the interval, they are
    infinite. The slope is then NaN or infinite.

    Attributes:
        turns: Points at which f' changes between rising and falling, or jumps, ascending: numbers, or tensors that
            broadcast. Default none.
        rising: Whether f' does not decrease before the first turn, between each two turns, and after the last.
        monotone: Whether f does not decrease. Default True.
        least: Lower bound on all values of f, as computed by torch. Default -inf.
        most: Upper bound on all values of f, as computed by torch. Default inf.
        error: Bound on the absolute error of torch's f, besides a few units in the last place of f(x). Default 0.
        lipschitz: Whether f has a bounded slope on every bounded interval. Default True.
    """

    turns: tuple[Any, ...] = ()
    rising: tuple[Any, ...] = (True,)
    monotone = True
    least = -math.inf
    most = math.inf
    error = 0.0
    lipschitz = True

    def value(self, x: Tensor) -> Tensor:
        """f(x), entry by entry."""
        raise NotImplementedError

    def derivative(self, x: Tensor) -> Tensor:
        """f'(x), entry by entry; at a jump of f', the limit from either side."""
        raise NotImplementedError

    def noise(self, x: Tensor) -> Tensor | float:
        """Bound on the absolute error of torch's f at x by cancellation, in units of the machine epsilon."""
        return 0.0

    def undefined(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Where f is not defined at some point of [l, u], bool; None for a function that is defined everywhere."""
        return None

    def unbounded(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Where f has a pole in [l, u], bool; None for a function without poles."""
        return None

    @property
    def has_gaps(self) -> bool:
        """Whether there are points at which f is not defined or has a pole."""
        zero = torch.zeros(())
        return self.undefined(zero, zero) is not None or self.unbounded(zero, zero) is not None

    def pieces(self, lower: Tensor, upper: Tensor) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Points l = t_0 <= ... <= t_n = u between which f' is monotone, and whether f' rises between each two."""
        turns = [torch.as_tensor(turn, dtype=lower.dtype, device=lower.device) for turn in self.turns]
        between = [torch.minimum(torch.maximum(lower, turn), upper) for turn in turns]
        return [lower, *between, upper], self.rising

    def box(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds on the values of f on [l, u], rounded outward for functions that are not monotone.

        Args:
            lower: l, (B, ...).
            upper: u, (B, ...).

        Returns:
            Lower and upper bounds, (B, ...) each.
        """
        if self.monotone:
            low, high = (self.value(end) for end in (lower, upper))
            low, high = low - self._loss(lower), high + self._loss(upper)
        else:
            low, high = self.range_over(torch.zeros_like(lower), lower, upper)
            # NaN of an infinite end gives way to f's whole range; `_honest` restores that of a NaN end
            low = torch.where(low.isnan(), self.least, low)
            high = torch.where(high.isnan(), self.most, high)
        if self.least > -math.inf or self.most < math.inf:
            low, high = low.clamp(self.least, self.most), high.clamp(self.least, self.most)
        return self._honest(low, high, lower, upper)

    def steepest(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Largest |f'| on [l, u], found at l, at u, and on both sides of each turn, as f' is monotone between these.

        Args:
            lower: l, (B, ...).
            upper: u, (B, ...).

        Returns:
            (B, ...); infinite or NaN where f is not defined or has a pole.
        """
        slopes = [self.derivative(lower), self.derivative(upper)]
        for turn in self.turns:
            at = torch.as_tensor(turn, dtype=lower.dtype, device=lower.device)
            inside = (lower <= at) & (upper >= at)
            beside = (at.nextafter(torch.full_like(at, -math.inf)), at, at.nextafter(torch.full_like(at, math.inf)))
            slopes += [torch.where(inside, self.derivative(x.expand_as(lower)), slopes[0]) for x in beside]
        steepest = torch.stack([slope.abs() for slope in slopes]).amax(0)
        for nowhere in (self.undefined(lower, upper), self.unbounded(lower, upper)):
            steepest = steepest if nowhere is None else steepest.masked_fill(nowhere, math.inf)
        return steepest.masked_fill(lower.isnan() | upper.isnan(), math.nan)  # torch.where in derivatives may drop NaN

    def below(self, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Carry coefficient rows back: rows.f(x) >= (new rows).x + bias for all x in the box.

        Args:
            rows: Coefficients of f(x), (S, B, ...).
            lower: Lower corner of the box, (B, ...).
            upper: Upper corner, (B, ...).

        Returns:
            New rows, (S, B, ...), and bias, (S, B).
        """
        (k, low), (m, high) = self.lines(lower, upper)
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        if self.lipschitz:
            bias = positive * low + negative * high
        else:  # 0 times an infinite offset is 0, not NaN
            bias = torch.where(rows == 0, 0.0, torch.where(rows > 0, positive * low, negative * high))
        return positive * k + negative * m, bias.reshape(*rows.shape[:2], -1).sum(2)

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Linear bounds over [l, u], differentiable in l and u.

        Args:
            lower: l, (B, ...).
            upper: u, (B, ...).

        Returns:
            (k, b) with f(x) >= kx + b, and (m, c) with f(x) <= mx + c, each of shape (B, ...).
        """
        middle = lower + (upper - lower) / 2
        chord, tangent = self.slopes(lower, middle, upper)
        low, high = self.range_over(chord, lower, upper)
        other_low, other_high = self.range_over(tangent, lower, upper)
        # Of two lines on a side, the one closer to f in the middle encloses less area.
        below = tangent * middle + other_low > chord * middle + low
        above = tangent * middle + other_high < chord * middle + high
        k, low = torch.where(below, tangent, chord), torch.where(below, other_low, low)
        m, high = torch.where(above, tangent, chord), torch.where(above, other_high, high)
        # Where a slope or an offset is not finite, a line of slope 0 takes its place.
        floor, roof = self._level(lower, upper)
        steep_below, steep_above = ~(k.isfinite() & low.isfinite()), ~(m.isfinite() & high.isfinite())
        k, low = k.masked_fill(steep_below, 0.0), torch.where(steep_below, floor, low)
        m, high = m.masked_fill(steep_above, 0.0), torch.where(steep_above, roof, high)
        low, high = self._honest(low, high, lower, upper)
        return (k, low), (m, high)

    def slopes(self, lower: Tensor, middle: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates for the slopes of the lines: the slope of the chord, and f' in the middle, (B, ...) each."""
        narrow = upper - lower < 1e-6 * (1 + lower.abs())
        tangent = self.derivative(middle)
        chord = (self.value(upper) - self.value(lower)) / torch.where(narrow, 1.0, upper - lower)
        return torch.where(narrow | ~chord.isfinite(), tangent, chord), tangent

    def range_over(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value of f(x) - kx over [l, u], rounded outward.

        Args:
            slope: k, (B, ...).
            lower: l, (B, ...).
            upper: u, (B, ...).

        Returns:
            Lower and upper bound, (B, ...) each.
        """
        points, gap = self._stationary(slope, lower, upper)
        values = torch.stack([self.value(x) - slope * x for x in (lower, upper, *points)])
        size = slope.abs() * torch.maximum(lower.abs(), upper.abs()) + values.abs().amax(0)
        slack = gap + _ULPS * torch.finfo(size.dtype).eps * size
        slack = (slack + torch.maximum(self._loss(lower), self._loss(upper))).detach()
        # A stationary point found next to an end carries no gradient of the end: within rounding, the end is taken.
        ends, inner = values[:2], values[2:]
        low, high, least, most = ends.amin(0), ends.amax(0), inner.amin(0), inner.amax(0)
        low = torch.where(least < low - slack, least, low - slack)
        high = torch.where(most > high + slack, most, high + slack)
        return low - slack, high + slack

    def _stationary(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[list[Tensor], Tensor]:
        """Points of [l, u] near every x with f'(x) = k, jumps included, and a bound on the change of f(x) - kx to x."""
        gap = torch.zeros_like(slope)
        with torch.no_grad():
            ends, rises = self.pieces(lower, upper)
            points = ends[1:-1]
            for (a, b), rising in zip(itertools.pairwise(ends), rises, strict=True):
                for _ in range(_BISECTIONS.get(slope.dtype, 22)):
                    middle = a + (b - a) / 2
                    left = (self.derivative(middle) > slope) == rising
                    a, b = torch.where(left, a, middle), torch.where(left, middle, b)
                points += [a, b]
                # Inside of the bracket f(x) - kx changes by at most the width times the largest |f' - k|.
                steep = torch.maximum((self.derivative(a) - slope).abs(), (self.derivative(b) - slope).abs())
                gap = torch.maximum(gap, torch.where(b > a, (b - a) * steep, 0.0))
        return points, gap

    def _loss(self, x: Tensor) -> Tensor:
        """Sum of `error` and `noise`, as an absolute error at x."""
        return torch.as_tensor(self.error + torch.finfo(x.dtype).eps * self.noise(x), dtype=x.dtype, device=x.device)

    def _level(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets of lines of slope 0 below and above f on [l, u], without a search."""
        if not self.monotone:
            return torch.full_like(lower, self.least), torch.full_like(upper, self.most)
        slack = _ULPS * torch.finfo(lower.dtype).eps
        low, high = self.value(lower), self.value(upper)
        return low - slack * low.abs() - self._loss(lower), high + slack * high.abs() + self._loss(upper)

    def _honest(self, low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds with f's whole range where f has a pole in [l, u], and NaN where f is not defined or an end is NaN."""
        poles, nowhere = self.unbounded(lower, upper), self.undefined(lower, upper)
        if poles is not None:
            low, high = low.masked_fill(poles, self.least), high.masked_fill(poles, self.most)
        lost = lower.isnan() | upper.isnan()
        lost = lost if nowhere is None else lost | nowhere
        return low.masked_fill(lost, math.nan), high.masked_fill(lost, math.nan)


def check_function(function: ScalarFunction) -> None:
    """Check derivative, turns, monotonicity and range of a function at 12,001 points of [-30, 30].

    Args:
        function: The function.

    Raises:
        RegistrationError: The function disagrees with its attributes at one of the points.
    """
    x = torch.linspace(-30, 30, 12_001, dtype=torch.float64)
    turns = torch.tensor([float(turn) for turn in function.turns], dtype=torch.float64)
    x = x[((x.unsqueeze(1) - turns).abs() > 1e-9).all(1)].requires_grad_()
    with torch.enable_grad():
        value = function.value(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    x, value, slope = x.detach(), value.detach(), function.derivative(x.detach())
    known = value.isfinite() & gradient.isfinite()
    size = 1 + gradient.abs()
    piece = torch.bucketize(x, turns)
    together = (piece[1:] == piece[:-1]) & known[1:] & known[:-1]
    rising = torch.tensor([bool(rises) for rises in function.rising])[piece[1:]]
    step = torch.where(rising, slope.diff(), -slope.diff())
    for what, wrong in {
        "its derivative": known & ((slope - gradient).abs() > 1e-6 * size),
        "where its derivative turns (`turns`, `rising`)": _behind(together & (step < -1e-9 * size[1:])),
        "that it never falls (`monotone`)": _behind(together & (value.diff() < -1e-12)) & function.monotone,
        "its range (`least`, `most`)": known & ((value < function.least) | (value > function.most)),
    }.items():
        if wrong.any():
            at = int(wrong.nonzero()[0, 0])
            raise RegistrationError(
                f"{type(function).__name__} is wrong about {what}: at {float(x[at]):g} it is {float(value[at]):g}, "
                f"its derivative {float(slope[at]):g}, and by autograd {float(gradient[at]):g}"
            )


def _behind(wrong: Tensor) -> Tensor:
    """A mask of intervals between points as a mask of points: each interval marks its right end."""
    return torch.cat([wrong.new_zeros(1), wrong])


# Scalar functions of the engine's own nodes: exact name of the class -> (node -> function).
FUNCTIONS: dict[str, Callable[[Any], ScalarFunction]] = {}


def scalar_function(node: Any) -> ScalarFunction | None:
    """The scalar function that a node applies to each entry; None for other nodes, and for unknown functions."""
    if isinstance(node, ScalarFunction):
        return node
    find = FUNCTIONS.get(type(node).__name__)
    return None if find is None else find(node)
