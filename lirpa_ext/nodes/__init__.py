"""Nodes of the graph that are this package's own, or repaired ones of the engine's.

`operators` has the ball-box ReLU and linear nodes, the perturbed input and the power iteration; each further file has
a family of nodes. `CUSTOM_OPS` says which ONNX operation becomes which of them, `lirpa_ext.rules.RULES` how each is
bounded.
"""

from __future__ import annotations

from .activations import as_nodes
from .operators import BoundBallBoxLinear, BoundBallBoxRelu, BoundPerturbedInput, BoundPowerIteration
from .table import CUSTOM_OPS, register_activation, register_node

__all__ = [
    "CUSTOM_OPS",
    "BoundBallBoxLinear",
    "BoundBallBoxRelu",
    "BoundPerturbedInput",
    "BoundPowerIteration",
    "as_nodes",
    "register_activation",
    "register_node",
]
