"""Fusion of activations that an exporter decomposed: GELU, SiLU, Mish and softplus become single nodes again."""

from __future__ import annotations

import numpy as np

from .graph import DOMAIN, Graph, Node


def fuse(graph: Graph) -> list[str]:
    """Replace every decomposed GELU, SiLU and Mish by one node, for any order of the factors; notes of the rewrites."""
    count: dict[str, int] = {}
    for node in graph.each():
        found = _match_gelu(graph, node) if node.op == "Erf" else _match_gate(graph, node) if node.op == "Mul" else None
        if found is not None:
            op, x, last = found
            graph.replace(last, [Node(op, [x], last.outputs, {}, last.name, DOMAIN)])
            pieces = f"{node.op} -> {op}" if node.op == "Erf" else f"{op} from its pieces"
            count[pieces] = count.get(pieces, 0) + 1
    graph.prune()
    return [f"{pieces} ({times} times)" if times > 1 else pieces for pieces, times in count.items()]


def _match_gate(graph: Graph, product: Node) -> tuple[str, str, Node] | None:
    """Match SiLU, x sigmoid(x), and Mish, x tanh(softplus(x)): (operation, x, last node), or None."""
    for x, gate in (product.inputs, product.inputs[::-1]):
        node = graph.producer(gate)
        if node is not None and node.op == "Sigmoid" and node.inputs == [x]:
            return "Silu", x, product
        inner = graph.producer(node.inputs[0]) if node is not None and node.op == "Tanh" else None
        if inner is not None and inner.op == "Softplus" and inner.inputs == [x]:
            return "Mish", x, product
    return None


def fuse_softplus(graph: Graph, node: Node) -> list[Node] | None:
    """Replace Where(x > threshold, x, softplus(x)), torch's softplus, by Softplus, for thresholds of at least 20.

    Above 20, the two differ by less than 2.1e-9.

    Args:
        graph: The graph.
        node: A Where without constant condition.

    Returns:
        The new node, or None if the node is something else.
    """
    condition, x, soft = node.inputs
    greater, softplus = graph.producer(condition), graph.producer(soft)
    if greater is None or greater.op != "Greater" or softplus is None or softplus.op != "Softplus":
        return None
    threshold = graph.constant(greater.inputs[1])
    if threshold is None or not (threshold >= 20).all() or {greater.inputs[0], softplus.inputs[0]} != {x}:
        return None
    return [Node("Softplus", [x], node.outputs, {}, softplus.name)]


def _match_gelu(graph: Graph, erf: Node) -> tuple[str, str, Node] | None:
    scale = graph.producer(erf.inputs[0])
    if scale is None or scale.op not in ("Div", "Mul"):
        return None
    x, factor = _with_constant(graph, scale)
    root = 2**0.5 if scale.op == "Div" else 0.5**0.5
    add = graph.only_user(erf.output)
    if factor is None or abs(factor - root) > 1e-5:
        return None
    if add is None or add.op != "Add" or _with_constant(graph, add)[1] != 1:
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
            return ("Gelu", x, first) if source == x and value == (0.5 if halved.op == "Mul" else 2) else None
    elif half != 0.5:
        return None
    second = graph.only_user(first.output)
    if second is None or second.op not in ("Mul", "Div"):
        return None
    if half is None and other == x:
        value = _with_constant(graph, second)[1]
        return ("Gelu", x, second) if value == (0.5 if second.op == "Mul" else 2) else None
    return ("Gelu", x, second) if half == 0.5 and second.op == "Mul" and x in second.inputs else None


def _with_constant(graph: Graph, node: Node) -> tuple[str, float | None]:
    """(other operand, value of the scalar constant operand) of a node; (first operand, None) if none is constant."""
    for index, name in enumerate(node.inputs):
        value = graph.constant(name)
        if value is not None and value.size == 1:
            return node.inputs[1 - index], float(np.asarray(value).reshape(()))
    return node.inputs[0], None
