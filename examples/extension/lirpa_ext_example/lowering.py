"""An ONNX lowering: Shrink with bias = lambd, which is relu(x - lambd) - relu(-x - lambd)."""

import numpy as np

from lirpa_ext.importer import register_lowering
from lirpa_ext.importer.graph import Node


def soft_shrink(graph, node):
    """Two ReLUs."""
    size, (x,) = node.get("lambd", 0.5), node.inputs
    if node.get("bias", 0.0) != size:
        return None
    limit, shifted, minus, other, above, below = (graph.fresh(f"{node.output}/{k}") for k in range(6))
    limit = graph.add_constant(np.array(size), limit, np.float32)
    return [
        Node("Sub", [x, limit], [shifted]), Node("Neg", [x], [minus]), Node("Sub", [minus, limit], [other]),
        Node("Relu", [shifted], [above]), Node("Relu", [other], [below]), Node("Sub", [above, below], node.outputs),
    ]  # fmt: skip


register_lowering("Shrink", soft_shrink)
