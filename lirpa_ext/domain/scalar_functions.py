"""Functions of one variable on intervals: boxes, slopes, and lines on either side.

On an interval [l, u] everything follows from f and its derivative: the box, the steepest slope, and a line on either
side, of slope k, the chord's or that in the middle, whichever is better. f(x) - kx is least and largest at l, at u, at
a kink, or where f' = k; f' is monotone between the points that a class lists, so that each gap holds one such place at
most, found by bisection.
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
_ULPS = 32  # that f(x) - kx may lose in floating point


class ScalarFunction:
    """A function f of one variable, applied to each entry of a tensor.

    What is no number or has no bound stays so: where f is not defined on all of an interval, its box and lines there
    are NaN, at a pole they are infinite, and the slope is NaN or infinite.

    Attributes:
        turns: Where f' turns from rising to falling or jumps, ascending: numbers, or tensors that broadcast.
        rising: Whether f' rises (or stands still) before the first turn, between each two, and after the last.
        monotone: f does not decrease.
        least: No value of f is below, and none of torch's.
        most: Nor above.
        error: How far torch's function may be from f, besides a few units in the last place of f(x).
        lipschitz: f has a bounded slope on every bounded interval.
    """

    turns: tuple[Any, ...] = ()
    rising: tuple[Any, ...] = (True,)
    monotone = True
    least = -math.inf
    most = math.inf
    error = 0.0
    lipschitz = True

    def value(self, x: Tensor) -> Tensor:
        """f."""
        raise NotImplementedError

    def derivative(self, x: Tensor) -> Tensor:
        """f'; either side's at a jump."""
        raise NotImplementedError

    def noise(self, x: Tensor) -> Tensor | float:
        """What torch's f loses by cancellation, in units of the machine epsilon: an absolute error, as `error` is."""
        return 0.0

    def undefined(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Where f is no number at a point of [l, u]; None for a function that always is one."""
        return None

    def unbounded(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Where f has a pole in [l, u]; None for a function without poles."""
        return None

    @property
    def has_gaps(self) -> bool:
        """Whether there are points at which f is no finite number."""
        zero = torch.zeros(())
        return self.undefined(zero, zero) is not None or self.unbounded(zero, zero) is not None

    def pieces(self, lower: Tensor, upper: Tensor) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Points l = t_0 <= ... <= t_n = u between which f' is monotone, and whether it rises there."""
        turns = [torch.as_tensor(turn, dtype=lower.dtype, device=lower.device) for turn in self.turns]
        between = [torch.minimum(torch.maximum(lower, turn), upper) for turn in turns]
        return [lower, *between, upper], self.rising

    def box(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value on [l, u]."""
        if self.monotone:
            low, high = (self.value(end) for end in (lower, upper))
            low, high = low - self._loss(lower), high + self._loss(upper)
        else:
            low, high = self.range_over(torch.zeros_like(lower), lower, upper)
            # an infinite end leaves f's own range; that of a NaN is put back below
            low = torch.where(low.isnan(), self.least, low)
            high = torch.where(high.isnan(), self.most, high)
        if self.least > -math.inf or self.most < math.inf:
            low, high = low.clamp(self.least, self.most), high.clamp(self.least, self.most)
        return self._honest(low, high, lower, upper)

    def steepest(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Largest |f'| on [l, u]: f' is monotone between its turns, on both sides of which it is looked at."""
        slopes = [self.derivative(lower), self.derivative(upper)]
        for turn in self.turns:
            at = torch.as_tensor(turn, dtype=lower.dtype, device=lower.device)
            inside = (lower <= at) & (upper >= at)
            beside = (at.nextafter(torch.full_like(at, -math.inf)), at, at.nextafter(torch.full_like(at, math.inf)))
            slopes += [torch.where(inside, self.derivative(x.expand_as(lower)), slopes[0]) for x in beside]
        steepest = torch.stack([slope.abs() for slope in slopes]).amax(0)
        for nowhere in (self.undefined(lower, upper), self.unbounded(lower, upper)):
            steepest = steepest if nowhere is None else steepest.masked_fill(nowhere, math.inf)
        return steepest.masked_fill(lower.isnan() | upper.isnan(), math.nan)  # derivatives by cases have none

    def below(self, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """rows.f(x) >= (new rows).x + bias for all x in the box, as `BoundRelaxed.below`."""
        (k, low), (m, high) = self.lines(lower, upper)
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        if self.lipschitz:
            bias = positive * low + negative * high
        else:  # an infinite offset costs nothing where the row is 0
            bias = torch.where(rows == 0, 0.0, torch.where(rows > 0, positive * low, negative * high))
        return positive * k + negative * m, bias.reshape(*rows.shape[:2], -1).sum(2)

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(k, b) with f(x) >= kx + b, and (m, c) with f(x) <= mx + c, over [l, u]; differentiable in l and u."""
        middle = lower + (upper - lower) / 2
        chord, tangent = self.slopes(lower, middle, upper)
        low, high = self.range_over(chord, lower, upper)
        other_low, other_high = self.range_over(tangent, lower, upper)
        # The better line of a side is the one that is closer to f in the middle, so that it cuts off less.
        below = tangent * middle + other_low > chord * middle + low
        above = tangent * middle + other_high < chord * middle + high
        k, low = torch.where(below, tangent, chord), torch.where(below, other_low, low)
        m, high = torch.where(above, tangent, chord), torch.where(above, other_high, high)
        # Where a slope or a value overflows, or has a pole, a level line is left.
        floor, roof = self._level(lower, upper)
        steep_below, steep_above = ~(k.isfinite() & low.isfinite()), ~(m.isfinite() & high.isfinite())
        k, low = k.masked_fill(steep_below, 0.0), torch.where(steep_below, floor, low)
        m, high = m.masked_fill(steep_above, 0.0), torch.where(steep_above, roof, high)
        low, high = self._honest(low, high, lower, upper)
        return (k, low), (m, high)

    def slopes(self, lower: Tensor, middle: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes to try for the lines: of the chord, and of the tangent in the middle."""
        narrow = upper - lower < 1e-6 * (1 + lower.abs())
        tangent = self.derivative(middle)
        chord = (self.value(upper) - self.value(lower)) / torch.where(narrow, 1.0, upper - lower)
        return torch.where(narrow | ~chord.isfinite(), tangent, chord), tangent

    def range_over(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value of f(x) - kx over [l, u], rounded outward."""
        points, gap = self._stationary(slope, lower, upper)
        values = torch.stack([self.value(x) - slope * x for x in (lower, upper, *points)])
        size = slope.abs() * torch.maximum(lower.abs(), upper.abs()) + values.abs().amax(0)
        slack = gap + _ULPS * torch.finfo(size.dtype).eps * size
        slack = (slack + torch.maximum(self._loss(lower), self._loss(upper))).detach()
        # A point that was found next to an end stands still where the end moves: in doubt the end gives the gradient.
        ends, inner = values[:2], values[2:]
        low, high, least, most = ends.amin(0), ends.amax(0), inner.amin(0), inner.amax(0)
        low = torch.where(least < low - slack, least, low - slack)
        high = torch.where(most > high + slack, most, high + slack)
        return low - slack, high + slack

    def _stationary(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[list[Tensor], Tensor]:
        """Points of [l, u] near every place where f' = k, jumps included, and how far off a value there may be."""
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
                # Inside of the bracket f(x) - kx moves by its width times the largest |f' - k| at most.
                steep = torch.maximum((self.derivative(a) - slope).abs(), (self.derivative(b) - slope).abs())
                gap = torch.maximum(gap, torch.where(b > a, (b - a) * steep, 0.0))
        return points, gap

    def _loss(self, x: Tensor) -> Tensor:
        """`error` and `noise` together, as an absolute error at x."""
        return torch.as_tensor(self.error + torch.finfo(x.dtype).eps * self.noise(x), dtype=x.dtype, device=x.device)

    def _level(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Level lines below and above f on [l, u], without a search."""
        if not self.monotone:
            return torch.full_like(lower, self.least), torch.full_like(upper, self.most)
        slack = _ULPS * torch.finfo(lower.dtype).eps
        low, high = self.value(lower), self.value(upper)
        return low - slack * low.abs() - self._loss(lower), high + slack * high.abs() + self._loss(upper)

    def _honest(self, low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """All of f's range where it has a pole in [l, u], NaN where it is not defined on all of it or an end is NaN."""
        poles, nowhere = self.unbounded(lower, upper), self.undefined(lower, upper)
        if poles is not None:
            low, high = low.masked_fill(poles, self.least), high.masked_fill(poles, self.most)
        lost = lower.isnan() | upper.isnan()
        lost = lost if nowhere is None else lost | nowhere
        return low.masked_fill(lost, math.nan), high.masked_fill(lost, math.nan)


def check_function(function: ScalarFunction) -> None:
    """Compare a function with what it says of itself at 12,001 points of [-30, 30]: derivative, turns, order, range.

    Raises:
        RegistrationError: A point refutes it.
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
    """What is wrong between two points, at the second."""
    return torch.cat([wrong.new_zeros(1), wrong])


# Functions of the engine's own nodes, by the class's exact name: node -> function.
FUNCTIONS: dict[str, Callable[[Any], ScalarFunction]] = {}


def scalar_function(node: Any) -> ScalarFunction | None:
    """The function that a node applies to each entry, or None where there is none that is known here."""
    if isinstance(node, ScalarFunction):
        return node
    find = FUNCTIONS.get(type(node).__name__)
    return None if find is None else find(node)
