"""Lowerings: exact rewrites of single nodes into nodes that onnx2torch and the engine handle correctly.

A rule takes the graph and a node. It returns the nodes that replace the node and compute its outputs, or None to leave
the node as it is. `LOWERINGS` is the table, operation -> rule; more rules are in `windows`, `shaping` and
`normalizing`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import OnnxError
from ..extensions import add
from . import normalizing, shaping, windows
from .graph import Graph, Node
from .merging import fuse_softplus
from .shaping import reshape

Lowering = Callable[[Graph, Node], "list[Node] | None"]
_FLOATS = (np.float32, np.float64)
_LARGE = 1e4  # with a constant a above this, a + relu(b - a) loses digits of b


def lower(graph: Graph) -> list[str]:
    """Apply the rule of each node's operation once, in place, and return notes of the rewrites.

    Raises:
        OnnxError: A node is malformed, or cannot be bounded.
    """
    done: dict[str, int] = {}
    for node in graph.each():
        rule = LOWERINGS.get(node.op)
        try:
            nodes = rule(graph, node) if rule else None
        except OnnxError:
            raise
        except (TypeError, ValueError, IndexError, KeyError, ZeroDivisionError) as error:
            raise OnnxError(
                f"{node} is malformed: {type(error).__name__}: {error}. Export the model again",
                node.op, node.name, graph.opset,
            ) from error  # fmt: skip
        if nodes is not None:
            graph.replace(node, nodes)
            made = ", ".join(dict.fromkeys(new.op for new in nodes)) or "nothing"
            done[f"{node.op} -> {made}"] = done.get(f"{node.op} -> {made}", 0) + 1
    graph.prune()
    return [f"{note} ({count} times)" if count > 1 else note for note, count in done.items()]


def _drop(graph: Graph, node: Node) -> list[Node]:
    """Remove a node whose output equals its first input."""
    graph.redirect(node.output, node.inputs[0])
    return []


def _dropout(graph: Graph, node: Node) -> list[Node]:
    """Dropout is removed: it is the identity in inference. It stays if something reads its mask."""
    training = graph.optional(node, 2)
    if graph.has(node, 2) and (training is None or training.any()):
        raise OnnxError(f"{node} is in training mode: export the model in eval mode", node.op, node.name, graph.opset)
    if len(node.outputs) > 1 and graph.users(node.outputs[1]):
        return None  # type: ignore[return-value]
    return _drop(graph, node)


def _cast(graph: Graph, node: Node) -> list[Node] | None:
    """Casts between floats, and of an integer input to float, are removed: they change values by rounding only."""
    source, target = graph.types.get(node.inputs[0]), graph.types.get(node.output)
    from_input = node.inputs[0] == graph.input and source is not None and source.kind in "ui"
    if target in _FLOATS and (source in _FLOATS or from_input):
        return _drop(graph, node)
    if source in _FLOATS and target is not None and target not in _FLOATS:
        raise OnnxError(
            f"{node} rounds to {target}, and between what it rounds to there are no bounds: export the model "
            "without it, in float32",
            node.op, node.name, graph.opset,
        )  # fmt: skip
    return None


def _transpose(graph: Graph, node: Node) -> list[Node] | None:
    perm = node.get("perm", [])
    if list(perm) == sorted(perm) and perm:
        return _drop(graph, node)
    before = graph.producer(node.inputs[0])
    if before is not None and before.op == "Transpose" and perm and before.get("perm"):
        return [Node("Transpose", before.inputs, node.outputs, {"perm": [before.get("perm")[p] for p in perm]})]
    return None


def _flatten(graph: Graph, node: Node) -> list[Node] | None:
    """Flatten as Reshape, since the engine is wrong for axes other than 1; axes before `axis` join the batch."""
    shape = graph.shapes.get(node.inputs[0])
    if shape is None:
        return None
    axis = node.get("axis", 1) % (len(shape) + 1) if shape else 0
    rest = int(np.prod(shape[axis:]))
    if axis == 1:
        return [reshape(graph, node.inputs[0], (rest,), node.outputs)]
    target = [-1, rest] if axis else [1, -1]
    shape_name = graph.add_constant(target, f"{node.output}/shape", np.int64)
    return [Node("Reshape", [node.inputs[0], shape_name], node.outputs)]


def _reshape(graph: Graph, node: Node) -> list[Node] | None:
    """A Reshape to the present shape is removed; flatten, softmax, reshape (old opsets) become one softmax."""
    x, shape = node.inputs[0], graph.shapes.get(node.output)
    target = graph.optional(node, 1)
    if shape is None or target is None:
        return None
    if graph.shapes.get(x) == shape and graph.shapes_of_two.get(x) == graph.shapes_of_two.get(node.output):
        return _drop(graph, node)
    softmax = graph.producer(x)
    if softmax is not None and softmax.op in ("Softmax", "LogSoftmax"):
        flat = graph.producer(softmax.inputs[0])
        if flat is not None and flat.op in ("Flatten", "Reshape") and graph.only_user(x) is node:
            source = graph.shapes.get(flat.inputs[0])
            if source == shape and graph.shapes[x] == (int(np.prod(shape[:-1])), shape[-1]):
                return [Node(softmax.op, flat.inputs[:1], node.outputs, {"axis": -1}, softmax.name)]
    return None


def _gemm(graph: Graph, node: Node) -> list[Node] | None:
    """Gemm as x W^T + b, with alpha, beta and transB folded into the weights."""
    x, weight = node.inputs[0], graph.optional(node, 1)
    if weight is None or node.get("transA", 0):
        return None
    bias = graph.optional(node, 2)
    if graph.has(node, 2) and (bias is None or bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1)):
        return None
    kind = weight.dtype.type
    plain = node.get("transB", 0) and node.get("alpha", 1.0) == 1 and node.get("beta", 1.0) == 1
    if plain and bias is not None and bias.shape == weight.shape[:1]:
        return None
    weight = (weight if node.get("transB", 0) else weight.T) * kind(node.get("alpha", 1.0))
    offset = np.zeros((), weight.dtype) if bias is None else bias.reshape(-1) * kind(node.get("beta", 1.0))
    return [dense(graph, node, x, weight, np.broadcast_to(offset, weight.shape[:1]))]


def dense(graph: Graph, node: Node, x: str, weight: np.ndarray, bias: np.ndarray) -> Node:
    """Gemm node for x W^T + b that computes the outputs of `node`.

    Args:
        graph: The graph, to which the constants are added.
        node: The node to replace.
        x: Name of the input, (B, in).
        weight: W, (out, in).
        bias: b, (out,).
    """
    weight_name = graph.add_constant(np.ascontiguousarray(weight), f"{node.output}/weight")
    bias_name = graph.add_constant(np.ascontiguousarray(bias), f"{node.output}/bias")
    return Node("Gemm", [x, weight_name, bias_name], node.outputs, {"transB": 1}, node.name)


def _matmul(graph: Graph, node: Node) -> list[Node] | None:
    """x W of a matrix x (B, in), with an Add of a constant after it, as one dense layer."""
    x, weight = node.inputs[0], graph.optional(node, 1)
    if weight is None or weight.ndim != 2 or len(graph.shapes.get(x, ())) != 2:
        return None
    add = graph.only_user(node.output)
    bias = next((graph.constants[name] for name in add.inputs if name in graph.constants), None) if add else None
    if add is not None and add.op == "Add" and bias is not None:
        squeezed = bias.reshape(bias.shape[-1:]) if bias.size == bias.shape[-1:].count(bias.size) * bias.size else bias
        if squeezed.ndim <= 1 and squeezed.size in (1, weight.shape[1]) and bias.ndim <= 2:
            graph.replace(add, [])
            outputs, node.outputs = add.outputs, [*add.outputs]
            return [
                dense(graph, Node("Gemm", [], outputs, name=node.name), x, weight.T,
                      np.broadcast_to(squeezed.reshape(-1), weight.shape[1:]))
            ]  # fmt: skip
    return [dense(graph, node, x, weight.T, np.zeros(weight.shape[1], weight.dtype))]


def _batch_norm(graph: Graph, node: Node) -> list[Node] | None:
    """BatchNormalization folded into the convolution or dense layer before it, or else as Mul and Add."""
    scale, offset, mean, variance = (graph.optional(node, i) for i in (1, 2, 3, 4))
    if scale is None or offset is None or mean is None or variance is None:
        return None
    if node.get("training_mode", 0):
        raise OnnxError(f"{node} is in training mode: export the model in eval mode", node.op, node.name, graph.opset)
    x = node.inputs[0]
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + node.get("epsilon", 1e-5))
    shift = offset - mean * factor
    before = graph.producer(x)
    weight = graph.optional(before, 1) if before and before.op in ("Conv", "Gemm") else None
    if before is not None and weight is not None and graph.only_user(x) is node:
        bias = graph.optional(before, 2)
        plain = before.op == "Conv" or (before.get("transB", 0) and before.get("alpha", 1.0) == 1)
        if plain and (bias is not None or not graph.has(before, 2)):
            folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
            moved = shift + (0 if bias is None else bias * factor * before.get("beta", 1.0))
            names = [graph.add_constant(value.astype(weight.dtype), f"{node.output}/{stem}")
                     for value, stem in ((folded, "weight"), (moved, "bias"))]  # fmt: skip
            attributes = {key: value for key, value in before.attributes.items() if key != "beta"}
            graph.replace(before, [])
            return [Node(before.op, [before.inputs[0], *names], node.outputs[:1], attributes, before.name)]
    shape = (1, -1, *[1] * (len(graph.shapes[x]) - 2))
    scaled = graph.fresh(f"{node.output}/scaled")
    names = [graph.add_constant(value.reshape(shape).astype(scale.dtype), f"{node.output}/{stem}")
             for value, stem in ((factor, "factor"), (shift, "shift"))]  # fmt: skip
    return [Node("Mul", [x, names[0]], [scaled]), Node("Add", [scaled, names[1]], node.outputs[:1], name=node.name)]


def _prelu(graph: Graph, node: Node) -> list[Node] | None:
    """PRelu as LeakyRelu if all slopes are equal and in [0, 1]; else as relu(x) - slope relu(-x)."""
    x, slope = node.inputs[0], graph.optional(node, 1)
    if slope is None:
        return None
    if slope.size and (slope == slope.flat[0]).all() and 0 <= slope.flat[0] <= 1:
        return [Node("LeakyRelu", [x], node.outputs, {"alpha": float(slope.flat[0])}, node.name)]
    names = [graph.fresh(f"{node.output}/{stem}") for stem in ("positive", "minus", "negative", "scaled")]
    positive, minus, negative, scaled = names
    return [
        Node("Relu", [x], [positive]), Node("Neg", [x], [minus]), Node("Relu", [minus], [negative]),
        Node("Mul", [negative, node.inputs[1]], [scaled]), Node("Sub", [positive, scaled], node.outputs),
    ]  # fmt: skip


def _celu(graph: Graph, node: Node) -> list[Node]:
    """Celu as alpha Elu(x / alpha)."""
    x, alpha = node.inputs[0], node.get("alpha", 1.0)
    scaled, inner = graph.fresh(f"{node.output}/scaled"), graph.fresh(f"{node.output}/elu")
    name = graph.add_constant(alpha, "alpha", graph.types.get(x, np.float32))
    return [
        Node("Div", [x, name], [scaled]), Node("Elu", [scaled], [inner], {"alpha": 1.0}, node.name),
        Node("Mul", [inner, name], node.outputs),
    ]  # fmt: skip


def _softsign(graph: Graph, node: Node) -> list[Node]:
    """Softsign as x / (1 + |x|)."""
    x = node.inputs[0]
    size, more = graph.fresh(f"{node.output}/size"), graph.fresh(f"{node.output}/more")
    one = graph.add_constant(1, "one", graph.types.get(x, np.float32))
    return [Node("Abs", [x], [size]), Node("Add", [size, one], [more]), Node("Div", [x, more], node.outputs)]


def _leaky_relu(graph: Graph, node: Node) -> list[Node] | None:
    """LeakyRelu with a slope outside of [0, 1], for which the engine's bounds are wrong, rewritten as PRelu."""
    alpha = node.get("alpha", 0.01)
    if 0 <= alpha <= 1:
        return None
    slope = graph.add_constant(alpha, f"{node.output}/slope", graph.types.get(node.inputs[0], np.float32))
    return _prelu(graph, Node("PRelu", [node.inputs[0], slope], node.outputs, name=node.name))


def _clip(graph: Graph, node: Node) -> list[Node] | None:
    """Clip without ends is removed, and with one constant end it becomes Relu or a Clip with both ends.

    The missing end is set to the largest float. A Clip with both ends stays.
    """
    x, kind = node.inputs[0], graph.types.get(node.inputs[0], np.dtype(np.float32))
    if not graph.has(node, 1) and not graph.has(node, 2):
        return _drop(graph, node)
    if graph.has(node, 1) and graph.has(node, 2):
        return None
    index, limit = (1, np.inf) if graph.has(node, 1) else (2, -np.inf)
    end = graph.optional(node, index)
    if end is None or kind.kind != "f":
        return None
    other = graph.add_constant(np.finfo(kind).max * np.sign(limit), f"{node.output}/end", kind)
    if end == 0 and index == 1:
        return [Node("Relu", [x], node.outputs, name=node.name)]
    ends = [node.inputs[index], other] if index == 1 else [other, node.inputs[index]]
    return [Node("Clip", [x, *ends], node.outputs, name=node.name)]


def _div(graph: Graph, node: Node) -> list[Node] | None:
    """x / y with computed y as x (1 / y), because the bounds of auto_LiRPA 0.3 on a quotient are wrong."""
    x, y = node.inputs
    if y in graph.constants or graph.types.get(y) not in _FLOATS:
        return None
    inverse = graph.fresh(f"{node.output}/inverse")
    return [Node("Reciprocal", [y], [inverse]), Node("Mul", [x, inverse], node.outputs, name=node.name)]


def _pow(graph: Graph, node: Node) -> list[Node] | None:
    """Pow with exponent 1 is removed; an exponent of another data type is cast to that of the base."""
    exponent, kind = graph.optional(node, 1), graph.types.get(node.inputs[0])
    if exponent is None or kind not in _FLOATS:
        return None
    if exponent.size == 1 and exponent == 1 and exponent.ndim <= len(graph.shapes.get(node.inputs[0], ())):
        return _drop(graph, node)
    if exponent.dtype == kind:
        return None
    return [Node("Pow", [node.inputs[0], graph.add_constant(exponent, "exponent", kind)], node.outputs, name=node.name)]


def _thresholded_relu(graph: Graph, node: Node) -> list[Node] | None:
    return [Node("Relu", node.inputs, node.outputs)] if node.get("alpha", 1.0) == 0 else None


def _variadic(pair: str) -> Lowering:
    """Rule for an operation of many inputs: a chain of operations `pair` of two inputs each."""

    def rule(graph: Graph, node: Node) -> list[Node] | None:
        if len(node.inputs) == 1:
            return _drop(graph, node)
        if len(node.inputs) == 2 and pair == node.op:
            return None
        nodes, left = [], node.inputs[0]
        for index, right in enumerate(node.inputs[1:], 1):
            output = node.output if index == len(node.inputs) - 1 else graph.fresh(f"{node.output}/{index}")
            nodes.append(Node(pair, [left, right], [output]))
            left = output
        return nodes

    return rule


def _extreme(graph: Graph, node: Node) -> list[Node] | None:
    """Max as a + relu(b - a), which every supported engine relaxes, and Min as a - relu(a - b)."""
    if len(node.inputs) != 2:
        return _variadic(node.op)(graph, node)
    a, b = node.inputs if graph.constant(node.inputs[0]) is not None else node.inputs[::-1]
    values = [graph.constant(name) for name in (a, b)]
    if any(value is not None and not (np.abs(value) < _LARGE).all() for value in values):
        return _limit(graph, node, a, b, values[0])
    gap, part = graph.fresh(f"{node.output}/gap"), graph.fresh(f"{node.output}/part")
    ends, last = ([b, a], "Add") if node.op == "Max" else ([a, b], "Sub")
    return [
        Node("Sub", ends, [gap]), Node("Relu", [gap], [part]), Node(last, [a, part], node.outputs, name=node.name),
    ]  # fmt: skip


def _limit(graph: Graph, node: Node, end: str, x: str, value: np.ndarray | None) -> list[Node] | None:
    """Max or Min with a large constant as Clip, since a difference with the constant would lose digits of x."""
    if value is None or value.size != 1:
        return None
    kind = graph.types.get(x, np.dtype(np.float32))
    most = np.finfo(kind).max
    ends = (value, most) if node.op == "Max" else (-most, value)
    names = [graph.add_constant(np.clip(end, -most, most).reshape(()), f"{node.output}/end", kind) for end in ends]
    return [Node("Clip", [x, *names], node.outputs, name=node.name)]


def _reduce_min(graph: Graph, node: Node) -> list[Node]:
    """ReduceMin as -max(-x)."""
    minus, largest = graph.fresh(f"{node.output}/minus"), graph.fresh(f"{node.output}/largest")
    return [
        Node("Neg", node.inputs[:1], [minus]),
        Node("ReduceMax", [minus, *node.inputs[1:]], [largest], node.attributes, node.name),
        Node("Neg", [largest], node.outputs),
    ]


def _mean(graph: Graph, node: Node) -> list[Node]:
    total = graph.fresh(f"{node.output}/sum")
    share = graph.add_constant(1 / len(node.inputs), "share", graph.types.get(node.inputs[0], np.float32))
    return [Node("Sum", node.inputs, [total]), Node("Mul", [total, share], node.outputs)]


def _where(graph: Graph, node: Node) -> list[Node] | None:
    """Where with a constant condition as a sum of products with masks; else torch's softplus, if it is that."""
    chosen = graph.optional(node, 0)
    if chosen is None:
        return fuse_softplus(graph, node)
    kind, terms, nodes = graph.types.get(node.output), [], []
    if kind not in _FLOATS:
        return None
    for name, mask in zip(node.inputs[1:], (chosen, ~chosen), strict=True):
        value = graph.constant(name)
        if value is not None:
            terms.append(graph.add_constant(np.where(mask, value, 0), f"{node.output}/constant", kind))
            continue
        part = graph.fresh(f"{node.output}/part")
        nodes.append(Node("Mul", [name, graph.add_constant(mask, f"{node.output}/mask", kind)], [part]))
        terms.append(part)
    return [*nodes, Node("Add", terms, node.outputs, name=node.name)]


LOWERINGS: dict[str, Lowering] = {
    "AveragePool": windows.average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Celu": _celu,
    "Clip": _clip,
    "Conv": windows.convolution,
    "DepthToSpace": shaping.depth_to_space,
    "Div": _div,
    "Dropout": _dropout,
    "Expand": shaping.repeat,
    "Flatten": _flatten,
    "Gather": shaping.gather,
    "Gemm": _gemm,
    "GlobalMaxPool": windows.global_max_pool,
    "Identity": _drop,
    "InstanceNormalization": normalizing.instance_norm,
    "LRN": normalizing.local_response,
    "LayerNormalization": normalizing.layer_norm,
    "LeakyRelu": _leaky_relu,
    "LpNormalization": normalizing.unit_length,
    "MatMul": _matmul,
    "Max": _extreme,
    "MaxPool": windows.max_pool,
    "Mean": _mean,
    "Min": _extreme,
    "PRelu": _prelu,
    "Pad": windows.pad,
    "Pow": _pow,
    "ReduceL1": normalizing.norm,
    "ReduceL2": normalizing.norm,
    "ReduceMax": shaping.reduce_max,
    "ReduceMin": _reduce_min,
    "ReduceSumSquare": normalizing.norm,
    "Reshape": _reshape,
    "Resize": windows.resize,
    "Slice": shaping.strided_slice,
    "Softsign": _softsign,
    "SpaceToDepth": shaping.depth_to_space,
    "Split": shaping.split,
    "Squeeze": shaping.as_reshape,
    "Sum": _variadic("Add"),
    "ThresholdedRelu": _thresholded_relu,
    "Tile": shaping.repeat,
    "Transpose": _transpose,
    "Unsqueeze": shaping.as_reshape,
    "Upsample": windows.resize,
    "Where": _where,
}


def register_lowering(op: str, lowering: Lowering, overwrite: bool = False) -> None:
    """Add a lowering: a rewrite of an ONNX operation into operations that the importer knows.

    Args:
        op: Type of the operation, such as ``Celu``.
        lowering: Function (graph, node) -> nodes that replace the node and compute its outputs, or None to leave it.
        overwrite: Whether to replace the lowering of the operation, default False.

    Raises:
        RegistrationError: The operation has a lowering already.
    """
    add(LOWERINGS, "lowering of", op, lowering, overwrite)
