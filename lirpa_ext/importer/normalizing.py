"""Rewrites of norms and of normalization layers (instance, layer, local response) into powers, sums and products."""

from __future__ import annotations

import numpy as np

from .graph import Graph, Node


def square(graph: Graph, x: str, output: str) -> Node:
    """Node for x^2 as a power; of a product x x the engine would not know that it is not negative."""
    return Node("Pow", [x, graph.add_constant(2.0, f"{output}/two", graph.types.get(x, np.float32))], [output])


def norm(graph: Graph, node: Node) -> list[Node]:
    """ReduceL1, ReduceL2 and ReduceSumSquare as sums of absolute values or squares, with a root for ReduceL2."""
    x, inner, total = node.inputs[0], graph.fresh(f"{node.output}/inner"), graph.fresh(f"{node.output}/sum")
    first = Node("Abs", [x], [inner]) if node.op == "ReduceL1" else square(graph, x, inner)
    attributes = {key: value for key, value in node.attributes.items() if key != "axes"}
    axes = node.inputs[1:2]
    if "axes" in node.attributes:
        axes = [graph.add_constant(node.get("axes"), f"{node.output}/axes", np.int64)]
    last = node.op == "ReduceL2"
    nodes = [first, Node("ReduceSum", [inner, *axes], [total] if last else node.outputs, attributes, node.name)]
    return [*nodes, Node("Sqrt", [total], node.outputs)] if last else nodes


def reduce_mean(graph: Graph, x: str, axes: list[int], output: str) -> Node:
    """Node for the mean over axes, which stay with size 1; since opset 18 the axes are an input, not an attribute."""
    if graph.opset < 18:
        return Node("ReduceMean", [x], [output], {"axes": axes, "keepdims": 1})
    return Node("ReduceMean", [x, graph.add_constant(axes, f"{output}/axes", np.int64)], [output], {"keepdims": 1})


def instance_norm(graph: Graph, node: Node) -> list[Node] | None:
    """InstanceNormalization, over the axes after the channels; None if its rank is below 3 or unknown."""
    rank = len(graph.shapes.get(node.inputs[0], ()))
    return _standardize(graph, node, list(range(2, rank)), (1, -1, *[1] * (rank - 2))) if rank > 2 else None


def layer_norm(graph: Graph, node: Node) -> list[Node] | None:
    """LayerNormalization, over the last axes; None if another output than the first is used, or for axis 0."""
    rank = len(graph.shapes.get(node.inputs[0], ()))
    if not rank or any(graph.users(name) for name in node.outputs[1:]):
        return None
    axis = node.get("axis", -1) % rank
    return _standardize(graph, node, list(range(axis, rank)), None) if axis else None


def _standardize(graph: Graph, node: Node, axes: list[int], shape: tuple[int, ...] | None) -> list[Node] | None:
    """(x - mean) / sqrt(variance + eps) * scale + bias over axes, with the quotient as a product with the reciprocal.

    auto_LiRPA 0.3 matches a quotient by a root heuristically, and can misread it.
    """
    x, scale, bias = node.inputs[0], graph.optional(node, 1), graph.optional(node, 2)
    if scale is None or (graph.has(node, 2) and bias is None):
        return None
    stems = ("mean", "centred", "squared", "variance", "more", "root", "inverse", "unit", "scaled")
    mean, centred, squared, variance, more, root, inverse, unit, scaled = (
        graph.fresh(f"{node.output}/{stem}") for stem in stems
    )
    bias = np.zeros_like(scale) if bias is None else bias
    eps, factor, shift = (
        graph.add_constant(value, f"{node.output}/{stem}", scale.dtype)
        for value, stem in (
            (node.get("epsilon", 1e-5), "eps"),
            (scale.reshape(shape or scale.shape), "factor"),
            (bias.reshape(shape or bias.shape), "shift"),
        )
    )
    return [
        reduce_mean(graph, x, axes, mean), Node("Sub", [x, mean], [centred]),
        square(graph, centred, squared), reduce_mean(graph, squared, axes, variance),
        Node("Add", [variance, eps], [more]), Node("Sqrt", [more], [root]), Node("Reciprocal", [root], [inverse]),
        Node("Mul", [centred, inverse], [unit]), Node("Mul", [unit, factor], [scaled]),
        Node("Add", [scaled, shift], node.outputs[:1], name=node.name),
    ]  # fmt: skip


def local_response(graph: Graph, node: Node) -> list[Node] | None:
    """LRN, x (bias + alpha / size * s)^-beta with s the sum of squares over `size` neighbouring channels."""
    x, shape, size = node.inputs[0], graph.shapes.get(node.inputs[0]), node.get("size")
    if not shape or len(shape) != 4:
        return None
    kind = graph.types.get(x, np.float32)
    offset = np.arange(shape[1]) - np.arange(shape[1])[:, None]
    near = (offset >= -((size - 1) // 2)) & (offset <= size // 2)
    weight = near[:, :, None, None] * (node.get("alpha", 1e-4) / size)
    squared, total, factor = (graph.fresh(f"{node.output}/{stem}") for stem in ("squared", "sum", "factor"))
    names = [
        graph.add_constant(value, f"{node.output}/{stem}", kind)
        for stem, value in (
            ("weight", weight), ("bias", np.full(shape[1], node.get("bias", 1.0))), ("beta", -node.get("beta", 0.75))
        )
    ]  # fmt: skip
    return [
        square(graph, x, squared), Node("Conv", [squared, *names[:2]], [total], {"kernel_shape": [1, 1]}),
        Node("Pow", [total, names[2]], [factor]), Node("Mul", [x, factor], node.outputs, name=node.name),
    ]  # fmt: skip


def unit_length(graph: Graph, node: Node) -> list[Node]:
    """LpNormalization, x divided by its l1 or l2 norm along an axis."""
    length = graph.fresh(f"{node.output}/length")
    axes = graph.add_constant([node.get("axis", -1)], f"{node.output}/axes", np.int64)
    norm = "ReduceL1" if node.get("p", 2) == 1 else "ReduceL2"
    attributes: dict[str, list[int]] = {} if graph.opset >= 18 else {"axes": [node.get("axis", -1)]}
    inputs = [node.inputs[0], axes] if graph.opset >= 18 else node.inputs[:1]
    return [Node(norm, inputs, [length], attributes), Node("Div", [node.inputs[0], length], node.outputs)]
