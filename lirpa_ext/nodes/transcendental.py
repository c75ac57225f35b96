"""exp, log, sin, cos and tan as scalar functions and as nodes: most of the engine's relaxations are not sound.

Its relaxations of sin and cos are wrong by 1e-6 in auto_LiRPA 0.3 and by 1e-3 in 0.7; it cuts log off at 1e-12.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..domain.scalar_functions import FUNCTIONS, ScalarFunction
from .relaxations import BoundScalar


class Exponential(ScalarFunction):
    """exp(x)."""

    least = 0.0

    def value(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.exp(x)


class Logarithm(ScalarFunction):
    """log(x), defined for x >= 0 and -inf at 0."""

    rising = (False,)
    lipschitz = False

    def value(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / x

    def undefined(self, lower: Tensor, upper: Tensor) -> Tensor:
        return lower < 0


class Wave(ScalarFunction):
    """Base class of sin and cos.

    On an interval of a period or more, and for x so large that rounding x is no small angle, the box is [-1, 1] and the
    lines have slope 0.

    Attributes:
        phase: f' turns at phase + j pi for all whole numbers j.
        falls: Whether f' falls after the turns of even j, and rises after those of odd j; else the reverse.
    """

    monotone = False
    least, most = -1.0, 1.0
    phase = 0.0
    falls = True

    def slopes(self, lower: Tensor, middle: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        wide = self._wide(lower, upper)
        chord, tangent = super().slopes(lower, middle, upper)
        return torch.where(wide, 0.0, chord), torch.where(wide, 0.0, tangent)

    def steepest(self, lower: Tensor, upper: Tensor) -> Tensor:
        ends = torch.maximum(self.derivative(lower).abs(), self.derivative(upper).abs())
        angle = _angle(lower, upper)
        turn = self.phase + math.pi * torch.ceil((lower - angle - self.phase) / math.pi)
        return torch.where(self._wide(lower, upper) | (turn <= upper + angle), 1.0, ends)

    def range_over(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().range_over(slope, lower, upper)
        wide = self._wide(lower, upper)
        rest = torch.where(slope == 0, 0.0, torch.maximum(slope * lower, slope * upper))
        slack = 8 * torch.finfo(low.dtype).eps * rest.abs()
        other = torch.where(slope == 0, 0.0, torch.minimum(slope * lower, slope * upper))
        return torch.where(wide, -1 - rest - slack, low), torch.where(wide, 1 - other + slack, high)

    def pieces(self, lower: Tensor, upper: Tensor) -> tuple[list[Tensor], tuple[Any, ...]]:
        first = torch.ceil((lower - self.phase) / math.pi)
        odd = torch.remainder(first, 2) == 1
        turns = [self.phase + math.pi * (first + j) for j in range(3)]
        between = [torch.minimum(torch.maximum(lower, turn), upper) for turn in turns]
        rises = odd == self.falls
        return [lower, *between, upper], (~rises, rises, ~rises, rises)

    def noise(self, x: Tensor) -> Tensor:
        """Turns of f' are known only up to the rounding of x, which changes f by about the square of this angle."""
        return _angle(x, x) ** 2 / torch.finfo(x.dtype).eps

    @staticmethod
    def _wide(lower: Tensor, upper: Tensor) -> Tensor:
        return (upper - lower >= 6.28) | (_angle(lower, upper) > 1e-3)


class Sine(Wave):
    """sin(x)."""

    def value(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.cos(x)


class Cosine(Wave):
    """cos(x), whose derivative -sin(x) rises after pi / 2."""

    phase = math.pi / 2
    falls = False

    def value(self, x: Tensor) -> Tensor:
        return torch.cos(x)

    def derivative(self, x: Tensor) -> Tensor:
        return -torch.sin(x)


class Tangent(ScalarFunction):
    """tan(x), with poles at pi / 2 + j pi; between two poles the derivative first falls, then rises."""

    rising = (False, True)
    lipschitz = False

    def value(self, x: Tensor) -> Tensor:
        return torch.tan(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 1 + torch.tan(x) ** 2

    def pieces(self, lower: Tensor, upper: Tensor) -> tuple[list[Tensor], tuple[Any, ...]]:
        return [lower, self._turn(lower, upper), upper], self.rising

    def steepest(self, lower: Tensor, upper: Tensor) -> Tensor:
        slope = torch.maximum(self.derivative(lower), self.derivative(upper))
        return slope.masked_fill(self.unbounded(lower, upper), math.inf)

    def unbounded(self, lower: Tensor, upper: Tensor) -> Tensor:
        angle = _angle(lower, upper)
        pole = math.pi / 2 + math.pi * torch.ceil((lower - angle - math.pi / 2) / math.pi)
        return (pole <= upper + angle) | (angle > 1e-3)

    @staticmethod
    def _turn(lower: Tensor, upper: Tensor) -> Tensor:
        turn = math.pi * torch.round((lower + (upper - lower) / 2) / math.pi)
        return torch.minimum(torch.maximum(lower, turn), upper)


def _angle(lower: Tensor, upper: Tensor) -> Tensor:
    """Bound on the error of multiples of pi near the interval in floating point."""
    return 8 * torch.finfo(lower.dtype).eps * torch.maximum(lower.abs(), upper.abs())


class BoundExponential(Exponential, BoundScalar):
    """Node of exp(x)."""


class BoundLogarithm(Logarithm, BoundScalar):
    """Node of log(x)."""


class BoundSine(Sine, BoundScalar):
    """Node of sin(x)."""


class BoundCosine(Cosine, BoundScalar):
    """Node of cos(x)."""


class BoundTangent(Tangent, BoundScalar):
    """Node of tan(x)."""


def _unless_fused(name: str, ours: type[BoundScalar]) -> Any:
    """Constructor of this package's node, or of the engine's under its loss fusion, which needs its own exp and log."""

    def make(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
        kind = getattr(engine.bound_ops, name) if (options or {}).get("loss_fusion") else ours
        return kind(attr, inputs, output_index, options)

    return make


for theirs, function in {
    "BoundExp": Exponential(), "BoundLog": Logarithm(), "BoundSin": Sine(), "BoundCos": Cosine(), "BoundTan": Tangent(),
}.items():  # fmt: skip
    FUNCTIONS[theirs] = lambda node, function=function: function  # type: ignore[misc]
OPS: dict[str, Any] = {
    "onnx::Exp": _unless_fused("BoundExp", BoundExponential), "onnx::Log": _unless_fused("BoundLog", BoundLogarithm),
    "onnx::Sin": BoundSine, "onnx::Cos": BoundCosine, "onnx::Tan": BoundTangent,
}  # fmt: skip
