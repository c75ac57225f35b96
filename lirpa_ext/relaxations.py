"""Linear relaxation of nonlinear nodes: a base for any node, and one for functions of each entry.

A function of one variable is relaxed by a line on either side over [l, u], of slope k, the chord's or that in the
middle, whichever is better. f(x) - kx is least and largest at l, at u, at a kink, or where f' = k; f' is monotone
between the points that a class lists, so that each gap holds one such place at most, found by bisection.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from . import engine

_BISECTIONS = {torch.float64: 48, torch.float32: 22}
_ULPS = 32  # that f(x) - kx may lose in floating point


class BoundRelaxed(engine.Bound):  # type: ignore[misc]
    """Base of a node of one perturbed input with a linear relaxation, for one side: `below`."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.requires_input_bounds = [0]

    def below(self, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """rows.f(x) >= (new rows).x + bias for all x in the box: (S, B, ...) and (S, B).

        Args:
            rows: Coefficients of the node's output, (S, B, ...).
            lower: Lower end of the input's box, (B, ...).
            upper: Upper end.
        """
        raise NotImplementedError

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        if not all(A is None or isinstance(A, Tensor) for A in (last_lA, last_uA)):
            raise NotImplementedError(f"{type(self).__name__} has no backward bound in patches mode")
        box = x[0].lower, x[0].upper
        lower: Any = (None, 0) if last_lA is None else self.below(last_lA, *box)
        upper: Any = (None, 0)
        if last_uA is not None:  # max of a.f is -min of -a.f
            rows, bias = self.below(-last_uA, *box)
            upper = -rows, -bias
        rest = [(None, None)] * (len(self.inputs) - 1)
        return [(lower[0], upper[0]), *rest], lower[1], upper[1]


class BoundScalar(BoundRelaxed):
    """Base of a function of each entry; `forward` and `derivative` say which.

    Attributes:
        turns: Where f' turns from rising to falling or jumps, ascending: numbers, or tensors that broadcast.
        rising: Whether f' rises (or stands still) before the first turn, between each two, and after the last.
        monotone: f does not decrease.
        error: How far torch's function may be from the f that these describe.
    """

    turns: tuple[Any, ...] = ()
    rising: tuple[bool, ...] = (True,)
    monotone = True
    error = 0.0

    def derivative(self, x: Tensor) -> Tensor:
        """f'; either side's at a jump."""
        raise NotImplementedError

    def value(self, x: Tensor) -> Tensor:
        """`forward` with the node's constants."""
        return self.forward(x, *[engine.constant(parent) for parent in self.inputs[1:]])

    def interval_propagate(self, *v: Any) -> Any:
        lower, upper = v[0]
        if self.monotone:
            return self.value(lower) - self.error, self.value(upper) + self.error
        return self.range_over(torch.zeros_like(lower), lower, upper)

    def below(self, rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        (k, low), (m, high) = self.lines(lower, upper)
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        bias = positive * low + negative * high
        return positive * k + negative * m, bias.reshape(*rows.shape[:2], -1).sum(2)

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(k, b) with f(x) >= kx + b, and (m, c) with f(x) <= mx + c, over [l, u]; differentiable in l and u."""
        middle = lower + (upper - lower) / 2
        narrow = upper - lower < 1e-6 * (1 + lower.abs())
        tangent = self.derivative(middle)
        chord = (self.value(upper) - self.value(lower)) / torch.where(narrow, 1.0, upper - lower)
        chord = torch.where(narrow, tangent, chord)
        low, high = self.range_over(chord, lower, upper)
        other_low, other_high = self.range_over(tangent, lower, upper)
        # The better line of a side is the one that is closer to f in the middle, so that it cuts off less.
        below = tangent * middle + other_low > chord * middle + low
        above = tangent * middle + other_high < chord * middle + high
        return (
            (torch.where(below, tangent, chord), torch.where(below, other_low, low)),
            (torch.where(above, tangent, chord), torch.where(above, other_high, high)),
        )

    def range_over(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest value of f(x) - kx over [l, u], rounded outward."""
        points, gap = self._stationary(slope, lower, upper)
        values = torch.stack([self.value(x) - slope * x for x in (lower, upper, *points)])
        size = slope.abs() * torch.maximum(lower.abs(), upper.abs()) + values.abs().amax(0)
        slack = (gap + _ULPS * torch.finfo(size.dtype).eps * size + self.error).detach()
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
            turns = [torch.as_tensor(turn).to(slope) for turn in self.turns]
            ends = [lower, *(torch.minimum(torch.maximum(lower, turn), upper) for turn in turns), upper]
            points = ends[1:-1]
            for (a, b), rising in zip(itertools.pairwise(ends), self.rising, strict=True):
                for _ in range(_BISECTIONS.get(slope.dtype, 22)):
                    middle = a + (b - a) / 2
                    left = (self.derivative(middle) > slope) == rising
                    a, b = torch.where(left, a, middle), torch.where(left, middle, b)
                points += [a, b]
                # Inside of the bracket f(x) - kx moves by its width times the largest |f' - k| at most.
                steep = torch.maximum((self.derivative(a) - slope).abs(), (self.derivative(b) - slope).abs())
                gap = torch.maximum(gap, torch.where(b > a, (b - a) * steep, 0.0))
        return points, gap
