"""Nodes of x^p for a number p, 1 / x and roots, with sound relaxations; the engine's hold for few p and positive x.

0.3 uses the slope of 1 / sqrt(x) for sqrt(x), and relaxes 1 / x as if x were positive; 0.7 is wrong for x^4.
"""

from __future__ import annotations

from typing import Any

from .. import engine
from ..domain.powers import Absolute, Power
from ..domain.scalar_functions import FUNCTIONS
from .relaxations import BoundScalar


class BoundPower(Power, BoundScalar):
    """Node of x^p, with p the argument `exponent`."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any, exponent: float) -> None:
        BoundScalar.__init__(self, attr, inputs, output_index, options)
        self.set_exponent(exponent)


class BoundRoot(BoundPower, engine.bound_ops.BoundSqrt):  # type: ignore[misc,name-defined]
    """Node of sqrt(x), a subclass of BoundSqrt because 0.3 recognizes a layer normalization by a division by it."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options, exponent=0.5)


def _reciprocal(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    return BoundPower(attr, inputs, output_index, options, -1.0)


def _pow(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    leaf = inputs[1]
    while leaf.inputs:
        leaf = leaf.inputs[0]
    value = None if type(leaf) is engine.BoundInput else engine.constant(inputs[1])
    if value is None or value.numel() != 1:
        raise NotImplementedError("a power whose exponent is not one constant number")
    return BoundPower(attr, inputs, output_index, options, float(value))


def _of_engine(node: Any) -> Power:
    return Power(float(engine.constant(node.inputs[1])))


FUNCTIONS |= {
    "BoundPow": _of_engine,
    "BoundSqr": lambda node: Power(2.0),
    "BoundSqrt": lambda node: Power(0.5),
    "BoundReciprocal": lambda node: Power(-1.0),
    "BoundAbs": lambda node: Absolute(),
}
OPS: dict[str, Any] = {"onnx::Reciprocal": _reciprocal, "onnx::Pow": _pow, "onnx::Sqrt": BoundRoot}
