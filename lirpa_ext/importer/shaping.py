"""Rewrites of nodes that move, select or copy entries: reshapes, slices, gathers, tiles; and of maxima over axes."""

from __future__ import annotations

import numpy as np

from . import windows
from .graph import Graph, Node

_FLOATS = (np.float32, np.float64)
_MOST_COPIES = 64  # an Expand or Tile with more copies is left as it is


def reshape(graph: Graph, x: str, sample: tuple[int, ...], outputs: list[str]) -> Node:
    """Node that reshapes x to (batch, *sample)."""
    return Node("Reshape", [x, graph.add_constant([0, *sample], f"{outputs[0]}/shape", np.int64)], outputs)


def as_reshape(graph: Graph, node: Node) -> list[Node] | None:
    """Squeeze and Unsqueeze of axes behind the batch axis as Reshape; None for other axes."""
    out, two = graph.shapes.get(node.output), graph.shapes_of_two.get(node.output)
    source, before = graph.shapes.get(node.inputs[0]), graph.shapes_of_two.get(node.inputs[0])
    if not (out and two and source and before) or (out[0], two[0]) != (source[0], before[0]) or out[1:] != two[1:]:
        return None
    return [reshape(graph, node.inputs[0], out[1:], node.outputs)]


def reduce_max(graph: Graph, node: Node) -> list[Node] | None:
    """ReduceMax as a MaxPool over whole rows, because CROWN has bounds for MaxPool only; None along the batch axis."""
    x, shape, out = node.inputs[0], graph.shapes.get(node.inputs[0]), graph.shapes.get(node.output)
    axes = graph.optional(node, 1) if graph.has(node, 1) else node.get("axes")
    if not shape or out is None or axes is None or not len(axes):
        return None
    reduced = sorted(int(axis) % len(shape) for axis in axes)
    kept = [axis for axis in range(1, len(shape)) if axis not in reduced]
    if 0 in reduced or graph.types.get(x) not in _FLOATS:
        return None
    turned, rows, pooled = (graph.fresh(f"{node.output}/{stem}") for stem in ("turned", "rows", "pooled"))
    places = int(np.prod([shape[axis] for axis in reduced]))
    count = int(np.prod([shape[axis] for axis in kept]))
    return [
        Node("Transpose", [x], [turned], {"perm": [0, *kept, *reduced]}),
        reshape(graph, turned, (1, count, places), [rows]),
        Node("MaxPool", [rows], [pooled], {"kernel_shape": [1, places], "strides": [1, places]}, node.name),
        reshape(graph, pooled, out[1:], node.outputs),
    ]


def gather(graph: Graph, node: Node) -> list[Node] | None:
    """Gather at constant indices behind the batch axis, with a vector of indices that are not negative."""
    shape, out, index = graph.shapes.get(node.inputs[0]), graph.shapes.get(node.output), graph.optional(node, 1)
    if not shape or out is None or index is None:
        return None
    axis = node.get("axis", 0) % len(shape)
    if not axis or (index.ndim == 1 and (index >= 0).all()) or (index.ndim == 0 and index >= 0):
        return None
    places = graph.add_constant(index.reshape(-1) % shape[axis], f"{node.output}/places", np.int64)
    row = node.output if index.ndim == 1 else graph.fresh(f"{node.output}/row")
    taken = Node("Gather", [node.inputs[0], places], [row], {"axis": axis}, node.name)
    return [taken] if index.ndim == 1 else [taken, reshape(graph, row, out[1:], node.outputs)]


def strided_slice(graph: Graph, node: Node) -> list[Node] | None:
    """Slice with steps other than 1 as a Gather along each axis, which all supported engines bound."""
    starts, ends, steps = (graph.optional(node, index) for index in (1, 2, 4))
    shape = graph.shapes.get(node.inputs[0])
    if shape is None or starts is None or ends is None or steps is None or (steps == 1).all():
        return None
    axes = graph.optional(node, 3) if graph.has(node, 3) else np.arange(len(starts))
    if axes is None or not (axes % len(shape)).all():
        return None
    nodes, x = [], node.inputs[0]
    for axis, *bounds in zip((axes % len(shape)).tolist(), starts.tolist(), ends.tolist(), steps.tolist(), strict=True):
        places = graph.add_constant(np.arange(shape[axis])[slice(*bounds)], f"{node.output}/places", np.int64)
        nodes.append(Node("Gather", [x, places], [graph.fresh(f"{node.output}/{axis}")], {"axis": axis}, node.name))
        x = nodes[-1].output
    nodes[-1].outputs = node.outputs
    return nodes


def repeat(graph: Graph, node: Node) -> list[Node] | None:
    """Tile and Expand along axes behind the batch axis as concatenations of copies."""
    x, shape, out = node.inputs[0], graph.shapes.get(node.inputs[0]), graph.shapes.get(node.output)
    two = graph.shapes_of_two.get(node.output), graph.shapes_of_two.get(x)
    if not shape or out is None or len(shape) != len(out) or shape[0] != out[0] or not two[0] or not two[1]:
        return None
    if two[0][0] != two[1][0] or np.prod(out) > _MOST_COPIES * np.prod(shape):
        return None
    nodes = []
    for axis, (size, larger) in enumerate(zip(shape, out, strict=True)):
        if size != larger:
            nodes.append(Node("Concat", [x] * (larger // size), [graph.fresh(f"{node.output}/{axis}")], {"axis": axis}))
            x = nodes[-1].output
    if not nodes:
        return [Node("Identity", node.inputs[:1], node.outputs, name=node.name)]
    nodes[-1].outputs = node.outputs
    return nodes


def split(graph: Graph, node: Node) -> list[Node] | None:
    """Split as slices, so that each node has one output."""
    axis, size = node.get("axis", 0), [graph.shapes.get(name, ()) for name in node.outputs]
    if not all(size):
        return None
    ends = np.cumsum([shape[axis] for shape in size]).tolist()
    return [
        windows.slice_node(graph, node.inputs[0], axis, start, end, output)
        for start, end, output in zip([0, *ends], ends, node.outputs, strict=False)
    ]


def depth_to_space(graph: Graph, node: Node) -> list[Node] | None:
    """DepthToSpace and SpaceToDepth as Reshape, Transpose and Reshape."""
    shape = graph.shapes.get(node.inputs[0])
    if shape is None or len(shape) != 4:
        return None
    s, (_, c, h, w) = node.get("blocksize"), shape
    if node.op == "SpaceToDepth":
        split, perm, last = (c, h // s, s, w // s, s), [0, 3, 5, 1, 2, 4], (c * s * s, h // s, w // s)
    elif node.get("mode", "DCR") == "DCR":
        split, perm, last = (s, s, c // s**2, h, w), [0, 3, 4, 1, 5, 2], (c // s**2, h * s, w * s)
    else:
        split, perm, last = (c // s**2, s, s, h, w), [0, 1, 4, 2, 5, 3], (c // s**2, h * s, w * s)
    parts, turned = graph.fresh(f"{node.output}/parts"), graph.fresh(f"{node.output}/turned")
    return [
        reshape(graph, node.inputs[0], split, [parts]), Node("Transpose", [parts], [turned], {"perm": perm}),
        reshape(graph, turned, last, node.outputs),
    ]  # fmt: skip
