"""Conversion of opsets: a graph of any opset from 7 on becomes an equivalent graph of opset 17."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import version_converter

from ..errors import OnnxError
from .graph import DOMAIN, IR_VERSION, OPSET, Graph, Node
from .reading import opset_of

# Operations whose versions after opset 17 add only data types, or options whose default is the old meaning.
_NAMES = (
    "Acos Acosh Asin Asinh Atan Atanh AveragePool Cast Constant ConstantOfShape Conv ConvTranspose Cos Cosh "
    "DepthToSpace Dropout Einsum Elu Equal Flatten GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish Identity "
    "InstanceNormalization IsInf IsNaN LpNormalization MaxPool Mod Round ScatterElements ScatterND "
    "Selu Shape Sin Sinh Size Softplus Softsign SpaceToDepth Squeeze Tan ThresholdedRelu TopK Transpose "
    "Unsqueeze Celu Range OneHot Reshape Resize"
)
_SAME = frozenset(_NAMES.split())


def upgrade(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a model of an older opset to opset 17; any other model is returned as it is.

    Raises:
        OnnxError: onnx's version converter fails.
    """
    if opset_of(model) >= OPSET:
        return model
    model.ir_version = max(model.ir_version, IR_VERSION)  # before 4 every weight had to be listed as an input
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # onnx raises RuntimeError and others
        raise OnnxError(
            f"onnx cannot lift the network from opset {opset_of(model)} to {OPSET}: {str(error).strip()[:300]}. "
            "Export it with a newer exporter",
            opset=opset_of(model),
        ) from error


def downgrade(graph: Graph) -> list[str]:
    """Convert a graph of a later opset to opset 17, in place, and return notes of the rewrites.

    Raises:
        OnnxError: An operation cannot be expressed in opset 17.
    """
    opset = graph.opset
    if opset <= OPSET:
        return []
    for node in graph.each():
        since = onnx.defs.get_schema(node.op, max_inclusive_version=opset).since_version
        if since <= OPSET:
            continue
        rule = _DOWN.get(node.op, _reduce if node.op.startswith("Reduce") else None)
        nodes = [node] if node.op in _SAME and rule is None else rule(graph, node) if rule else None
        if nodes is None:
            raise OnnxError(
                f"{node} of opset {opset} cannot be said in opset {OPSET}: export the model with opset {OPSET}",
                node.op, node.name, opset,
            )  # fmt: skip
        graph.replace(node, nodes)
    graph.opset = OPSET
    return [f"opset {opset} -> {OPSET}"]


def _reduce(graph: Graph, node: Node) -> list[Node] | None:
    """Reductions: since opset 18 the axes are an input, in opset 17 an attribute (except for ReduceSum)."""
    axes = graph.optional(node, 1)
    if graph.has(node, 1) and axes is None:
        return None
    if axes is None or not axes.size:
        if node.attributes.pop("noop_with_empty_axes", 0):
            return [Node("Identity", node.inputs[:1], node.outputs, name=node.name)]
    else:
        node.attributes["axes"] = axes.tolist()
    node.attributes.pop("noop_with_empty_axes", None)
    node.inputs = node.inputs[:1]
    return [node]


def _split(graph: Graph, node: Node) -> list[Node] | None:
    """Split without ``num_outputs``, which is new in opset 18; without sizes opset 17 splits evenly."""
    node.attributes.pop("num_outputs", None)
    return [node]


def _pad(graph: Graph, node: Node) -> list[Node] | None:
    """Pad with pads for all axes in place of the input ``axes``, which is new in opset 18; others get no padding."""
    if graph.has(node, 3):
        axes, pads, rank = graph.optional(node, 3), graph.optional(node, 1), len(graph.shapes.get(node.inputs[0], ()))
        if axes is None or pads is None or not rank:
            return None
        full = np.zeros((2, rank), np.int64)
        full[:, axes] = pads.reshape(2, -1)
        node.inputs = [node.inputs[0], graph.add_constant(full.reshape(-1), "pads"), *node.inputs[2:3]]
    return [node]


def _ours(graph: Graph, node: Node) -> list[Node] | None:
    """Gelu (opset 20) and Mish (opset 18) in our own domain, for `converters`."""
    return [Node(node.op, node.inputs, node.outputs, node.attributes, node.name, DOMAIN)]


def _swish(graph: Graph, node: Node) -> list[Node] | None:
    """Swish (opset 24) as x sigmoid(alpha x)."""
    x, scaled, gate = node.inputs[0], graph.fresh(f"{node.output}/scaled"), graph.fresh(f"{node.output}/gate")
    alpha = graph.add_constant(node.get("alpha", 1.0), "alpha", graph.types.get(x, np.float32))
    return [Node("Mul", [x, alpha], [scaled]), Node("Sigmoid", [scaled], [gate]), Node("Mul", [x, gate], node.outputs)]


_DOWN: dict[str, Callable[[Graph, Node], list[Node] | None]] = {
    "Split": _split,
    "Pad": _pad,
    "Gelu": _ours,
    "Mish": _ours,
    "Swish": _swish,
}
