"""Classes of nodes of the graph: this package's own, and repaired ones of the engine.

`operators` has the ball-box ReLU and linear nodes, the perturbed input and the power iteration; each other file has a
family of nodes. `CUSTOM_OPS` maps ONNX operations to classes of nodes, `lirpa_ext.rules.RULES` classes of nodes to the
rules that bound them.
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
