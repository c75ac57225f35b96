"""Conversion of a graph in normal form to a torch module, by onnx2torch with a few converters of our own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import nn

from ..errors import DataError, OnnxError
from .graph import DOMAIN, Graph, Node
from .torchvision_repair import torchvision_or_placeholder


def convert(graph: Graph) -> torch.fx.GraphModule:
    """Convert a graph in opset 17 to a torch module, in eval mode and without gradients of its parameters.

    Raises:
        OnnxError: onnx2torch does not know an operation, or cannot convert a node.
    """
    onnx2torch = import_onnx2torch()
    from onnx2torch.node_converters.registry import get_converter

    for node in graph.each():
        _fix_slice(graph, node)
        try:
            get_converter(node.op, graph.opset if not node.domain else 1, node.domain)
        except NotImplementedError as error:
            raise OnnxError(
                f"{node} has no counterpart in torch that is known here (opset {graph.opset}): export the model "
                "without it, or register a converter with onnx2torch.node_converters.registry.add_converter",
                node.op, node.name, graph.opset,
            ) from error  # fmt: skip
    try:
        return onnx2torch.convert(_with_shapes(graph)).eval().requires_grad_(False)
    except Exception as error:  # onnx2torch has no exception of its own
        culprit = _culprit(graph)
        raise OnnxError(
            f"onnx2torch cannot convert {culprit or 'the network'} (opset {graph.opset}): {type(error).__name__}: "
            f"{str(error)[:300]}. Export the model without it",
            culprit.op if culprit else "", culprit.name if culprit else "", graph.opset,
        ) from error  # fmt: skip


def _with_shapes(graph: Graph) -> onnx.ModelProto:
    """The model with the shapes of its tensors, which onnx cannot infer behind operations of our own domain."""
    model = graph.to_model()
    for name in {name for node in graph.nodes for name in node.outputs} - {"", graph.output}:
        shape, kind = graph.shapes.get(name), graph.types.get(name)
        if shape is not None and kind is not None:
            two = graph.shapes_of_two.get(name, shape)
            sizes = [size if size == other else None for size, other in zip(shape, two, strict=True)]
            element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
            model.graph.value_info.append(helper.make_tensor_value_info(name, element, sizes))
    return model


def _fix_slice(graph: Graph, node: Node) -> None:
    """Move a Slice with constant ends to our own domain, to be converted to our `Slice`.

    onnx2torch indexes with a list of slices, whose meaning torch has announced to change.
    """
    values = [graph.optional(node, index) for index in range(1, 5)]
    given = [graph.has(node, index) for index in range(1, 5)]
    known = all(value is not None for value, there in zip(values, given, strict=True) if there)
    if node.op != "Slice" or node.domain or not known or values[0] is None or values[1] is None:
        return
    count = len(values[0])
    axes = range(count) if values[2] is None else values[2].tolist()
    steps = [1] * count if values[3] is None else values[3].tolist()
    if min(steps, default=1) < 1:
        return
    node.inputs, node.domain = node.inputs[:1], DOMAIN
    node.attributes = {"axes": [*axes], "starts": values[0].tolist(), "ends": values[1].tolist(), "steps": steps}


class Slice(nn.Module):
    """x[start:end:step] along some axes.

    Args:
        axes: The axes.
        starts: Start along each axis.
        ends: End along each axis.
        steps: Step along each axis, positive.
    """

    def __init__(self, axes: list[int], starts: list[int], ends: list[int], steps: list[int]) -> None:
        super().__init__()
        self.slices = {axis: slice(*ends) for axis, *ends in zip(axes, starts, ends, steps, strict=True)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The slice of x."""
        index = [slice(None)] * x.dim()
        for axis, chosen in self.slices.items():
            index[axis] = chosen
        return x[tuple(index)]


def _culprit(graph: Graph) -> Node | None:
    """The first node that onnx2torch cannot convert on its own; None if there is none."""
    from onnx2torch.node_converters.registry import get_converter
    from onnx2torch.onnx_graph import OnnxGraph

    model = OnnxGraph(_with_shapes(graph).graph)
    for (_, onnx_node), node in zip(model.nodes.items(), graph.nodes, strict=True):
        try:
            get_converter(node.op, graph.opset if not node.domain else 1, node.domain)(onnx_node, model)
        except Exception:  # onnx2torch has no exception of its own
            return node
    return None


def import_onnx2torch() -> Any:
    """Import onnx2torch, and register our converters with it.

    Returns:
        The module onnx2torch.

    Raises:
        DataError: onnx2torch is not installed.
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

    def gelu(node: Any) -> nn.Module:
        return nn.GELU(approximate=node.attributes.get("approximate", "none"))

    def cut(node: Any) -> nn.Module:
        return Slice(**{name: list(value) for name, value in node.attributes.items()})

    modules = {"Slice": cut, "Gelu": gelu, "Silu": lambda node: nn.SiLU(), "Mish": lambda node: nn.Mish()}
    for op, build in modules.items():
        if OperationDescription(DOMAIN, op, 1) in _CONVERTER_REGISTRY:
            continue

        def converter(node: Any, graph: Any, build: Any = build) -> Any:
            return OperationConverterResult(build(node), onnx_mapping_from_node(node))

        add_converter(op, 1, DOMAIN)(converter)
