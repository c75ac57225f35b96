"""The batch axis: added to networks without one, and its size made free where an exporter fixed it."""

from __future__ import annotations

import math

import numpy as np

from ..errors import OnnxError
from .graph import Graph, Node
from .reference import probe

# Operations that act on each entry, independent of the axes; two perturbed inputs must have the same rank.
_NAMES = (
    "Abs Add Atan Cast Ceil Celu Clip Cos Div Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu "
    "Log Max Mean Min Mish Mul Neg Pow PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub "
    "Sum Swish Tan Tanh ThresholdedRelu"
)
_ELEMENTWISE = frozenset(_NAMES.split())


def lacks_batch_axis(shape: tuple[int | None, ...]) -> bool:
    """Whether an input of this shape is a single sample without batch axis: a vector, or a column."""
    return len(shape) < 2 or (len(shape) == 2 and shape[1] == 1 and (shape[0] or 0) > 1)


def free_batch(graph: Graph) -> bool:
    """Let a graph with a batch axis take batches of any size, if possible.

    A Reshape to a constant shape that starts with the fixed batch size is changed to keep the batch size of its input.
    Then the graph is run on batches of one, two and three samples.

    Args:
        graph: The graph, changed in place.

    Returns:
        Whether the graph takes any batch size; if not, its batch size is 1, and its nodes are as before.

    Raises:
        OnnxError: The fixed batch size is not 1, and the graph does not run on other sizes.
    """
    baked = graph.input_shape[0] or 1
    before = [list(node.inputs) for node in graph.nodes], graph.input_shape
    one = probe(graph, 1)
    for node in graph.nodes:
        if node.op == "Reshape":
            _free_reshape(graph, node, one, baked)
    graph.input_shape = (None, *graph.input_shape[1:])
    try:
        alone = probe(graph, 1)[graph.output]
        for batch in (2, 3):
            together = probe(graph, batch)[graph.output]
            if together.shape != (batch, *alone.shape[1:]):
                raise OnnxError("the output has another batch size than the input")
        return True
    except OnnxError:
        if baked != 1:
            raise
        for node, inputs in zip(graph.nodes, before[0], strict=True):
            node.inputs = inputs
        graph.input_shape = (1, *before[1][1:])
        return False


def _free_reshape(graph: Graph, node: Node, one: dict[str, np.ndarray], baked: int) -> None:
    target = graph.optional(node, 1)
    if target is None or target.size == 0 or node.inputs[0] in graph.constants or node.inputs[0] not in one:
        return
    shape = [int(size) for size in target]
    source = one[node.inputs[0]].shape
    if shape[0] == baked and source[:1] == (baked,):
        if 0 in shape[1:] and node.get("allowzero", 0):
            return
        shape[0] = 0  # the size of the input's axis 0
    elif shape[0] > 0 and shape[0] % baked == 0 and -1 not in shape and source[:1] == (baked,):
        shape[0] = -1  # the batch axis is merged with another one
    else:
        return
    node.attributes.pop("allowzero", None)
    node.inputs = [node.inputs[0], graph.add_constant(shape, f"{node.output}/shape", np.int64)]


def add_batch_axis(graph: Graph) -> None:
    """Rewrite a graph of a single sample, in place, so that it takes a batch along a new axis 0.

    Raises:
        OnnxError: It is not known how to rewrite an operation.
    """
    shapes = {name: value.shape for name, value in probe(graph, 1).items()}
    graph.input_shape = (None, *graph.input_shape)
    batched = {graph.input}
    for node in graph.each():
        if batched.isdisjoint(node.inputs):
            continue
        graph.replace(node, _with_batch(graph, node, batched, shapes))
        batched.update(node.outputs)


def add_output_axis(graph: Graph) -> None:
    """Reshape the output (B,) of a graph to (B, 1), in place, as the engine's backward bounds need it."""
    column = graph.fresh(f"{graph.output}/column")
    shape = graph.add_constant([-1, 1], f"{column}/shape", np.int64)
    graph.nodes.append(Node("Reshape", [graph.output, shape], [column]))
    graph.output = column


def _with_batch(graph: Graph, node: Node, batched: set[str], shapes: dict[str, tuple[int, ...]]) -> list[Node]:
    x = node.inputs[0]
    rank = len(shapes.get(x, ()))
    if node.op in _ELEMENTWISE:
        ranks = {len(shapes[name]) for name in node.inputs if name in batched}
        widest = max((graph.constants[name].ndim for name in node.inputs if name in graph.constants), default=0)
        if len(ranks) == 1 and widest <= min(ranks):
            return [node]
    elif node.op == "MatMul" and batched.isdisjoint(node.inputs[1:]) and (rank == 1 or len(shapes[node.output]) == 2):
        return [node]
    elif node.op == "MatMul" and x in graph.constants and graph.constants[x].ndim == 2:
        return _matmul_left(graph, node, len(shapes[node.inputs[1]]))
    elif node.op == "Gemm" and not batched.intersection(node.inputs[:1]) and x in graph.constants:
        return _gemm_left(graph, node, batched, shapes)
    elif node.op == "Reshape" and node.inputs[1] in graph.constants:
        size = shapes[node.output]
        node.inputs = [x, graph.add_constant([0, *size], f"{node.output}/shape", np.int64)]
        return [node]
    elif node.op == "Flatten":
        size = shapes[node.output]
        return [Node("Reshape", [x, graph.add_constant([0, *size], f"{node.output}/shape", np.int64)], node.outputs)]
    elif node.op == "Transpose":
        node.attributes["perm"] = [0, *(axis + 1 for axis in node.get("perm", range(rank)[::-1]))]
        return [node]
    elif node.op in ("Softmax", "LogSoftmax", "Concat") and all(name in batched for name in node.inputs):
        axis = node.get("axis", -1)
        node.attributes["axis"] = axis + (axis >= 0)
        return [node]
    elif node.op in ("Squeeze", "Unsqueeze") or node.op == "ReduceSum":
        axes = graph.optional(node, 1)
        if axes is not None:
            shifted = [int(axis) + (axis >= 0) for axis in axes]
            node.inputs = [x, graph.add_constant(shifted, f"{node.output}/axes", np.int64)]
            return [node]
    raise OnnxError(
        f"the input has no batch axis, and how {node} acts on a batch is not known: export the model with a batch "
        "axis in front",
        node.op, node.name, graph.opset,
    )  # fmt: skip


def _matmul_left(graph: Graph, node: Node, rank: int) -> list[Node]:
    """W x of a vector x becomes x W^T of a batch; W X of a matrix X becomes (X^T W^T)^T."""
    weight, x = node.inputs
    transposed = graph.add_constant(graph.constants[weight].T, f"{weight}/transposed")
    if rank == 1:
        return [Node("MatMul", [x, transposed], node.outputs, name=node.name)]
    turned, product = graph.fresh(f"{node.output}/turned"), graph.fresh(f"{node.output}/product")
    return [
        Node("Transpose", [x], [turned], {"perm": [0, 2, 1]}),
        Node("MatMul", [turned, transposed], [product], name=node.name),
        Node("Transpose", [product], node.outputs, {"perm": [0, 2, 1]}),
    ]


def _gemm_left(graph: Graph, node: Node, batched: set[str], shapes: dict[str, tuple[int, ...]]) -> list[Node]:
    """Gemm(W, X, b) with constant W becomes MatMul and Add."""
    weight = graph.constants[node.inputs[0]]
    weight = (weight.T if node.get("transA", 0) else weight) * weight.dtype.type(node.get("alpha", 1.0))
    bias = graph.optional(node, 2)
    if node.get("transB", 0) or (graph.has(node, 2) and bias is None) or len(shapes[node.inputs[1]]) != 2:
        raise OnnxError(f"the input has no batch axis, and {node} multiplies it from the right", node.op, node.name)
    product = graph.fresh(f"{node.output}/product")
    name = graph.add_constant(weight, f"{node.inputs[0]}/scaled")
    nodes = _matmul_left(graph, Node("MatMul", [name, node.inputs[1]], [product], name=node.name), 2)
    scaled = np.zeros((), weight.dtype) if bias is None else bias * weight.dtype.type(node.get("beta", 1.0))
    bias_name = graph.add_constant(scaled, f"{node.output}/bias")
    return [*nodes, Node("Add", [product, bias_name], node.outputs, name=node.name)]


def fold_shapes(graph: Graph) -> list[str]:
    """Replace tensors that do not depend on the input's values by constants, and sizes that follow the batch by -1.

    Every tensor is computed for a batch of one and, if the graph takes any batch size, for a batch of two. A tensor
    that is the same in both, and that is not computed from the input's values, is a constant.

    Args:
        graph: The graph, changed in place; its `shapes`, `shapes_of_two` and `types` are set.

    Returns:
        Notes of the rewrites.
    """
    values = probe(graph, 1)
    graph.shapes = {name: value.shape for name, value in values.items()}
    graph.types = {name: value.dtype for name, value in values.items()}
    for name, value in graph.constants.items():
        graph.shapes[name], graph.types[name] = value.shape, value.dtype
    more = probe(graph, 2) if graph.input_shape[0] is None else values
    graph.shapes_of_two = {name: value.shape for name, value in more.items()}
    # Only Shape and Size depend on the shape of the input alone; other nodes behind the input depend on its values.
    depends = {graph.input}
    folded = 0
    for node in graph.each():
        if node.op in ("Shape", "Size") or depends.isdisjoint(node.inputs):
            if node.op.startswith("Random") or any(name not in values for name in node.outputs if name):
                depends.update(node.outputs)
                continue
            if all(np.array_equal(values[name], more[name]) for name in node.outputs if name):
                graph.constants.update({name: values[name] for name in node.outputs if name})
                graph.replace(node, [])
                folded += 1
        else:
            depends.update(node.outputs)
    for node in graph.nodes:
        if node.op == "Reshape" and node.inputs[1] not in graph.constants and node.inputs[1] not in depends:
            one, two = values[node.inputs[1]], more[node.inputs[1]]
            free = np.flatnonzero(one != two)
            if len(free) == 1 and -1 not in one and math.prod(one.tolist()):
                size = np.where(one != two, -1, one)
                node.inputs = [node.inputs[0], graph.add_constant(size, f"{node.output}/shape", np.int64)]
                node.attributes.pop("allowzero", None)
                folded += 1
    graph.prune()
    return [f"{folded} nodes that compute shapes or constants folded"] if folded else []
