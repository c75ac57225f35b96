"""x^p for a number p, 1 / x and roots: the engines' relaxations hold for p = 2 and positive x at best.

0.3 takes the slope of 1 / sqrt(x) for that of sqrt(x), and relaxes 1 / x as if x were positive; 0.7 is wrong for x^4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import engine
from .activations import steepest
from .operators import CUSTOM_OPS
from .relaxations import BoundScalar
from .rules import register_rule
from .rules.elementwise import Elementwise


class BoundPower(BoundScalar):
    """x^p; NaN, which certifies nothing, where the box holds points at which that is no number."""

    monotone = False

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any, exponent: float) -> None:
        super().__init__(attr, inputs, output_index, options)
        whole, p = exponent == int(exponent), exponent
        self.exponent, self.whole = p, whole
        if whole and (p < 0 or p % 2):
            self.turns, self.rising = (0.0,), (p % 2 == 0, True)
        else:
            self.rising = (not 0 < p < 1,)

    def forward(self, x: Tensor, *exponent: Tensor) -> Tensor:
        return torch.pow(x, self.exponent)

    def derivative(self, x: Tensor) -> Tensor:
        return self.exponent * torch.pow(x, self.exponent - 1)

    def range_over(self, slope: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().range_over(slope, lower, upper)
        undefined = torch.zeros_like(lower, dtype=torch.bool) if self.whole else lower < 0
        if self.exponent < 0:
            undefined = undefined | ((lower <= 0) & (upper >= 0))
        return low.masked_fill(undefined, torch.nan), high.masked_fill(undefined, torch.nan)


def _reciprocal(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    return BoundPower(attr, inputs, output_index, options, -1.0)


def _pow(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    """The engine's square, whose lower line stays above 0; ours for any other number."""
    leaf = inputs[1]
    while leaf.inputs:
        leaf = leaf.inputs[0]
    value = None if type(leaf) is engine.BoundInput else engine.constant(inputs[1])
    if value is None or value.numel() != 1:
        raise NotImplementedError("a power whose exponent is not one constant number")
    if float(value) == 2.0:
        return engine.bound_ops.BoundPow(attr, inputs, output_index, options)
    return BoundPower(attr, inputs, output_index, options, float(value))


class BoundRoot(BoundPower, engine.bound_ops.BoundSqrt):  # type: ignore[misc,name-defined]
    """sqrt(x). 0.3 knows a layer normalization by the quotient by a BoundSqrt."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options, exponent=0.5)


for name in ("BoundPower", "BoundRoot"):
    register_rule(name, Elementwise(steepest, monotone=False))
CUSTOM_OPS |= {"onnx::Reciprocal": _reciprocal, "onnx::Pow": _pow}
if engine.IS_LEGACY:
    CUSTOM_OPS["onnx::Sqrt"] = BoundRoot
