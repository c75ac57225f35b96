"""From a graph in normal form to a torch module, by onnx2torch and the converters that it lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import DataError, OnnxError
from ..torchvision_repair import torchvision_or_placeholder
from .graph import Graph, Node


def convert(graph: Graph) -> torch.fx.GraphModule:
    """The torch module of a graph in opset 17.

    Raises:
        OnnxError: An op that onnx2torch does not know, or a form of it.
    """
    onnx2torch = import_onnx2torch()
    from onnx2torch.node_converters.registry import get_converter

    for node in graph.nodes:
        try:
            get_converter(node.op, graph.opset if not node.domain else 1, node.domain)
        except NotImplementedError as error:
            raise OnnxError(
                f"{node} has no counterpart in torch that is known here (opset {graph.opset}): export the model "
                "without it, or register a converter with onnx2torch.node_converters.registry.add_converter",
                node.op, node.name, graph.opset,
            ) from error  # fmt: skip
    try:
        return onnx2torch.convert(graph.to_model()).eval().requires_grad_(False)
    except Exception as error:  # onnx2torch has no exception of its own
        node = _culprit(graph, error)
        raise OnnxError(
            f"onnx2torch cannot convert {node or 'the network'} (opset {graph.opset}): {type(error).__name__}: "
            f"{str(error)[:300]}. Export the model without it",
            node.op if node else "", node.name if node else "", graph.opset,
        ) from error  # fmt: skip


def _culprit(graph: Graph, error: Exception) -> Node | None:
    """The first node that fails to convert by itself."""
    from onnx2torch.node_converters.registry import get_converter
    from onnx2torch.onnx_graph import OnnxGraph

    model = OnnxGraph(graph.to_model().graph)
    for (_, onnx_node), node in zip(model.nodes.items(), graph.nodes, strict=True):
        try:
            get_converter(node.op, graph.opset if not node.domain else 1, node.domain)(onnx_node, model)
        except Exception:  # the one we look for
            return node
    return None


def import_onnx2torch() -> Any:
    """onnx2torch, with our converters registered.

    Raises:
        DataError: It is not installed.
    """
    try:
        with torchvision_or_placeholder():
            import onnx2torch
    except ImportError as error:
        raise DataError(f"ONNX files need onnx2torch ({error}): pip install --no-deps onnx2torch") from error
    _register()
    return onnx2torch


def _register() -> None:
    from onnx2torch.node_converters.registry import _CONVERTER_REGISTRY, OperationDescription, add_converter
    from onnx2torch.utils.common import OperationConverterResult, onnx_mapping_from_node

    if OperationDescription("lirpa_ext", "Gelu", 1) in _CONVERTER_REGISTRY:
        return

    @add_converter("Gelu", 1, "lirpa_ext")
    def _(node: Any, graph: Any) -> Any:
        module = nn.GELU(approximate=node.attributes.get("approximate", "none"))
        return OperationConverterResult(module, onnx_mapping_from_node(node))


def fuse_gelu(graph: Graph) -> list[str]:
    """x/2 (1 + erf(x / sqrt 2)), however its products are ordered, becomes one node; Gelu of opset 20 as well."""
    count = 0
    for node in list(graph.nodes):
        if node.op == "Gelu":
            graph.replace(node, [Node("Gelu", node.inputs, node.outputs, node.attributes, node.name, "lirpa_ext")])
        elif node.op == "Erf":
            found = _match_gelu(graph, node)
            if found is not None:
                x, last = found
                graph.replace(last, [Node("Gelu", [x], last.outputs, {}, last.name, "lirpa_ext")])
                count += 1
    graph.prune()
    return [f"{count} Erf -> Gelu"] if count else []


def _match_gelu(graph: Graph, erf: Node) -> tuple[str, Node] | None:
    scale = graph.producer(erf.inputs[0])
    if scale is None or scale.op not in ("Div", "Mul"):
        return None
    x, factor = _with_constant(graph, scale)
    root = 2**0.5 if scale.op == "Div" else 0.5**0.5
    add = graph.only_user(erf.output)
    if (
        factor is None
        or abs(factor - root) > 1e-5
        or add is None
        or add.op != "Add"
        or _with_constant(graph, add)[1] != 1
    ):
        return None
    first = graph.only_user(add.output)
    if first is None or first.op != "Mul":
        return None
    other, half = _with_constant(graph, first)
    if half is None:
        other = next((name for name in first.inputs if name != add.output), add.output)
        halved = graph.producer(other)
        if halved is not None and halved.op in ("Mul", "Div") and other != x:
            source, value = _with_constant(graph, halved)
            return (x, first) if source == x and value == (0.5 if halved.op == "Mul" else 2) else None
    elif half != 0.5:
        return None
    second = graph.only_user(first.output)
    if second is None or second.op not in ("Mul", "Div"):
        return None
    if half is None and other == x:
        value = _with_constant(graph, second)[1]
        return (x, second) if value == (0.5 if second.op == "Mul" else 2) else None
    return (x, second) if half == 0.5 and second.op == "Mul" and x in second.inputs else None


def _with_constant(graph: Graph, node: Node) -> tuple[str, float | None]:
    """The other operand, and the value of the scalar constant operand."""
    for index, name in enumerate(node.inputs):
        value = graph.constant(name)
        if value is not None and value.size == 1:
            return node.inputs[1 - index], float(np.asarray(value).reshape(()))
    return node.inputs[0], None
