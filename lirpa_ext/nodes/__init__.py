"""Nodes of the graph that are this package's own, or repaired ones of the engine's.

`operators` has the ball-box ReLU and linear nodes, the perturbed input and the power iteration; each further file has
a family of nodes. `CUSTOM_OPS` says which ONNX operation becomes which of them, `lirpa_ext.rules.RULES` how each is
bounded.
"""

from __future__ import annotations

from typing import Any

from .. import engine
from ..rules import check_table
from . import activations, matmul, operators, padding, powers, repairs, softmax, transcendental
from .activations import as_nodes
from .operators import BoundBallBoxLinear, BoundBallBoxRelu, BoundPerturbedInput, BoundPowerIteration

_FAMILIES = (operators, repairs, padding, matmul, powers, transcendental, softmax, activations)

CUSTOM_OPS: dict[str, Any] = {}
for _family in _FAMILIES:
    CUSTOM_OPS |= _family.OPS

check_table({*vars(engine.bound_ops), *(name for _family in _FAMILIES for name in vars(_family))})

__all__ = [
    "CUSTOM_OPS",
    "BoundBallBoxLinear",
    "BoundBallBoxRelu",
    "BoundPerturbedInput",
    "BoundPowerIteration",
    "as_nodes",
]
