"""Rewrites of convolutions, pools, pads and resizes, without features that the engine ignores (dilation, ceil_mode)."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np

from .graph import Graph, Node

_NOT_NEGATIVE = ("Relu", "Sigmoid", "Abs", "Softplus", "Exp", "Softmax")


def _per_axis(node: Node, kernel: list[int], shape: tuple[int, ...]) -> tuple[list[int], list[int], list[list[int]]]:
    """Strides, dilations and (begin, end) pads for each spatial axis, with ``auto_pad`` resolved."""
    axes = len(kernel)
    strides, dilations = node.get("strides", [1] * axes), node.get("dilations", [1] * axes)
    auto = node.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, k, s, d in zip(shape[2:], kernel, strides, dilations, strict=True):
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads.append([total // 2, total - total // 2] if auto == "SAME_UPPER" else [total - total // 2, total // 2])
    elif auto == "VALID":
        pads = [[0, 0] for _ in kernel]
    else:
        flat = node.get("pads", [0] * 2 * axes)
        pads = [[flat[axis], flat[axis + axes]] for axis in range(axes)]
    return list(strides), list(dilations), pads


def _flat(pads: list[list[int]]) -> list[int]:
    return [begin for begin, _ in pads] + [end for _, end in pads]


def _zero_pad(graph: Graph, x: str, pads: list[list[int]], output: str) -> Node:
    name = graph.add_constant(_flat([[0, 0], [0, 0], *pads]), f"{output}/pads", np.int64)
    return Node("Pad", [x, name], [output])


def slice_node(graph: Graph, x: str, axis: int, start: int, end: int, output: str) -> Node:
    """Slice node for x[start:end] along an axis, named by its output."""
    names = [graph.add_constant([value], f"{output}/{stem}", np.int64)
             for value, stem in ((start, "start"), (end, "end"), (axis, "axis"))]  # fmt: skip
    return Node("Slice", [x, *names], [output])


def convolution(graph: Graph, node: Node) -> list[Node] | None:
    """Conv over its whole input as a dense layer; uneven padding as a separate Pad node."""
    x, weight, bias = node.inputs[0], graph.optional(node, 1), graph.optional(node, 2)
    shape, out = graph.shapes.get(x), graph.shapes.get(node.output)
    if weight is None or shape is None or out is None or (graph.has(node, 2) and bias is None):
        return None
    kernel = list(weight.shape[2:])
    strides, dilations, pads = _per_axis(node, kernel, shape)
    whole = kernel == list(shape[2:]) and not any(map(any, pads))
    if whole and node.get("group", 1) == 1 and set(dilations) == {1}:
        flat, dense, rows = graph.fresh(f"{node.output}/flat"), graph.fresh(f"{node.output}/dense"), len(weight)
        zeros = np.zeros(rows, weight.dtype)
        names = [
            graph.add_constant(weight.reshape(rows, -1), f"{node.output}/weight"),
            graph.add_constant(zeros if bias is None else bias, f"{node.output}/bias"),
        ]
        return [
            _to_sample(graph, x, (weight[0].size,), flat),
            Node("Gemm", [flat, *names], [dense], {"transB": 1}, node.name),
            _to_sample(graph, dense, out[1:], node.output),
        ]
    uneven = any(begin != end for begin, end in pads)
    if not uneven and node.get("auto_pad", "NOTSET") == "NOTSET":
        return None
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": node.get("group", 1)}
    if not uneven:
        return [Node("Conv", node.inputs, node.outputs, attributes | {"pads": _flat(pads)}, node.name)]
    padded = graph.fresh(f"{node.output}/padded")
    return [
        _zero_pad(graph, x, pads, padded),
        Node("Conv", [padded, *node.inputs[1:]], node.outputs, attributes, node.name),
    ]


def _to_sample(graph: Graph, x: str, sample: tuple[int, ...], output: str) -> Node:
    return Node("Reshape", [x, graph.add_constant([0, *sample], f"{output}/shape", np.int64)], [output])


def _end_pads(
    shape: tuple[int, ...], out: tuple[int, ...], kernel: list[int], strides: list[int], dilations: list[int],
    pads: list[list[int]],
) -> list[list[int]]:  # fmt: skip
    """Pads with which complete windows give the size of the output; with ceil_mode, windows exceed the input."""
    return [
        [begin, max((o - 1) * s + (k - 1) * d + 1 - size - begin, 0)]
        for size, o, k, s, d, (begin, _) in zip(shape[2:], out[2:], kernel, strides, dilations, pads, strict=True)
    ]


def average_pool(graph: Graph, node: Node) -> list[Node] | None:
    """AveragePool with uneven or excluded pads, dilation or ceil_mode, as a summing convolution divided by counts."""
    x = node.inputs[0]
    shape, out = graph.shapes.get(x), graph.shapes.get(node.output)
    if shape is None or out is None:
        return None
    kernel = list(node.get("kernel_shape"))
    if len(kernel) == 1:
        return _in_two_dimensions(graph, node, shape, out)
    strides, dilations, pads = _per_axis(node, kernel, shape)
    needed = _end_pads(shape, out, kernel, strides, dilations, pads)
    include = bool(node.get("count_include_pad", 0))
    even = all(begin == end for begin, end in pads) and not node.get("ceil_mode", 0)
    if even and set(dilations) == {1} and (include or not any(map(any, pads))):
        attributes = {"kernel_shape": kernel, "strides": strides, "pads": _flat(pads), "count_include_pad": 1}
        same = node.get("auto_pad", "NOTSET") == "NOTSET" and not node.get("ceil_mode", 0) and include
        return None if same else [Node("AveragePool", [x], node.outputs, attributes, node.name)]
    counts = []
    for size, o, k, s, d, (begin, end) in zip(shape[2:], out[2:], kernel, strides, dilations, pads, strict=True):
        seen = np.arange(o)[:, None] * s - begin + np.arange(k) * d
        low, high = (-begin, size + end) if include else (0, size)
        counts.append(((seen >= low) & (seen < high)).sum(1))
    kind = graph.types.get(x, np.dtype(np.float32))
    share = (1 / reduce(np.multiply.outer, counts)).astype(kind)[None, None]
    padded, total = graph.fresh(f"{node.output}/padded"), graph.fresh(f"{node.output}/sum")
    ones = graph.add_constant(np.ones((shape[1], 1, *kernel)), f"{node.output}/ones", kind)
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": shape[1]}
    return [
        _zero_pad(graph, x, needed, padded),
        Node("Conv", [padded, ones], [total], attributes, node.name),
        Node("Mul", [total, graph.add_constant(share, f"{node.output}/share")], node.outputs),
    ]


def max_pool(graph: Graph, node: Node) -> list[Node] | None:
    """MaxPool with other than even pads, or with ceil_mode or dilation, in terms of a plain MaxPool.

    Pads repeat the border, which does not change a maximum, or are zeros behind a function that is not negative.
    Dilated windows are gathered by a convolution.
    """
    x = node.inputs[0]
    shape, out = graph.shapes.get(x), graph.shapes.get(node.output)
    if shape is None or out is None or (len(node.outputs) > 1 and graph.users(node.outputs[1])):
        return None
    kernel = list(node.get("kernel_shape"))
    if len(kernel) == 1:
        return _in_two_dimensions(graph, node, shape, out)
    strides, dilations, pads = _per_axis(node, kernel, shape)
    needed = _end_pads(shape, out, kernel, strides, dilations, pads)
    even = all(begin == end for begin, end in pads) and all(2 * p[0] <= k for p, k in zip(pads, kernel, strict=True))
    exact = not node.get("ceil_mode", 0) or needed == pads
    dilated = set(dilations) != {1}
    if even and exact and not dilated:
        attributes = {"kernel_shape": kernel, "strides": strides, "pads": _flat(pads)}
        same = node.get("auto_pad", "NOTSET") == "NOTSET" and not node.get("ceil_mode", 0) and len(node.outputs) == 1
        return None if same else [Node("MaxPool", [x], node.outputs[:1], attributes, node.name)]
    nodes: list[Node] = []
    if any(map(any, needed)):
        padded = graph.fresh(f"{node.output}/padded")
        before = graph.producer(x)
        if before is not None and before.op in _NOT_NEGATIVE:
            nodes.append(_zero_pad(graph, x, needed, padded))
        elif not dilated:
            nodes += _repeat_border(graph, x, shape, needed, padded)
        else:
            return None
        x = padded
    if not dilated:
        return [*nodes, Node("MaxPool", [x], node.outputs[:1], {"kernel_shape": kernel, "strides": strides}, node.name)]
    return [*nodes, *_gather_windows(graph, node, x, shape[1], out, kernel, strides, dilations)]


def _in_two_dimensions(graph: Graph, node: Node, shape: tuple[int, ...], out: tuple[int, ...]) -> list[Node]:
    """A pool along one axis as a pool along the last of two axes, because not every engine bounds the former."""
    wide, pooled = graph.fresh(f"{node.output}/wide"), graph.fresh(f"{node.output}/pooled")
    one = {"kernel_shape": [1], "strides": [1], "dilations": [1]}
    attributes = {
        key: [*one[key], *value] if key in one else [0, value[0], 0, value[1]] if key == "pads" else value
        for key, value in node.attributes.items()
    }
    return [
        _to_sample(graph, node.inputs[0], (shape[1], 1, shape[2]), wide),
        Node(node.op, [wide], [pooled], attributes, node.name),
        _to_sample(graph, pooled, out[1:], node.output),
    ]


def pad(graph: Graph, node: Node) -> list[Node] | None:
    """Pad with reflected, repeated or wrapped borders, or with negative pads, as concatenated slices."""
    x, amounts = node.inputs[0], graph.optional(node, 1)
    shape, mode = graph.shapes.get(x), node.get("mode", "constant")
    if amounts is None or shape is None or graph.has(node, 3):
        return None
    begins, ends = amounts.reshape(2, -1)
    if mode == "constant" and (amounts >= 0).all():
        return None
    nodes: list[Node] = []
    for axis, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        if not begin and not end:
            continue
        size = shape[axis]
        indices = {"reflect": _reflected, "edge": _repeated, "wrap": _wrapped}.get(mode, _cropped)(size, begin, end)
        if axis == 0 or indices is None:
            return None
        pieces = [graph.fresh(f"{node.output}/piece") for _ in indices]
        nodes += [slice_node(graph, x, axis, i, j, piece) for (i, j), piece in zip(indices, pieces, strict=True)]
        x = graph.fresh(f"{node.output}/{axis}")
        nodes.append(Node("Concat", pieces, [x], {"axis": axis}))
    if not nodes:
        return None
    nodes[-1].outputs = node.outputs
    return nodes


def _reflected(size: int, begin: int, end: int) -> list[tuple[int, int]]:
    before = [(i, i + 1) for i in range(begin, 0, -1)]
    return [*before, (0, size), *((i, i + 1) for i in range(size - 2, size - 2 - end, -1))]


def _repeated(size: int, begin: int, end: int) -> list[tuple[int, int]]:
    return [*[(0, 1)] * begin, (0, size), *[(size - 1, size)] * end]


def _wrapped(size: int, begin: int, end: int) -> list[tuple[int, int]]:
    return [*[(size - begin, size)] * (begin > 0), (0, size), *[(0, end)] * (end > 0)]


def _cropped(size: int, begin: int, end: int) -> list[tuple[int, int]] | None:
    return [(-begin, size + end)] if begin <= 0 and end <= 0 else None


def _repeat_border(graph: Graph, x: str, shape: tuple[int, ...], pads: list[list[int]], output: str) -> list[Node]:
    """Pad by repeating the border. It keeps maxima: every window that reaches into the pads contains the border too."""
    nodes: list[Node] = []
    moved = [axis for axis, pair in enumerate(pads, 2) if any(pair)]
    for axis in moved:
        begin, end = pads[axis - 2]
        result = output if axis == moved[-1] else graph.fresh(f"{output}/{axis}")
        first, last = graph.fresh(f"{output}/first"), graph.fresh(f"{output}/last")
        if begin:
            nodes.append(slice_node(graph, x, axis, 0, 1, first))
        if end:
            nodes.append(slice_node(graph, x, axis, shape[axis] - 1, shape[axis], last))
        nodes.append(Node("Concat", [*[first] * begin, x, *[last] * end], [result], {"axis": axis}))
        x = result
    return nodes


def _gather_windows(
    graph: Graph, node: Node, x: str, channels: int, out: tuple[int, ...], kernel: list[int], strides: list[int],
    dilations: list[int],
) -> list[Node]:  # fmt: skip
    """Dilated MaxPool: a convolution copies each place of a window to a channel, then a MaxPool over these channels."""
    places = math.prod(kernel)
    copies = np.tile(np.eye(places).reshape(places, 1, *kernel), (channels, *[1] * (len(kernel) + 1)))
    weight = graph.add_constant(copies, f"{node.output}/copies", graph.types.get(node.inputs[0], np.float32))
    stems = ("gathered", "windows", "largest")
    gathered, windows, largest = (graph.fresh(f"{node.output}/{stem}") for stem in stems)
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": channels}
    area = math.prod(out[2:])
    return [
        Node("Conv", [x, weight], [gathered], attributes),
        _to_sample(graph, gathered, (channels, places, area), windows),
        Node("MaxPool", [windows], [largest], {"kernel_shape": [places, 1], "strides": [places, 1]}, node.name),
        _to_sample(graph, largest, out[1:], node.output),
    ]


def global_max_pool(graph: Graph, node: Node) -> list[Node] | None:
    """GlobalMaxPool as a MaxPool with a single window."""
    shape = graph.shapes.get(node.inputs[0])
    if shape is None:
        return None
    size = list(shape[2:])
    return [Node("MaxPool", node.inputs, node.outputs, {"kernel_shape": size, "strides": size}, node.name)]


def resize(graph: Graph, node: Node) -> list[Node] | None:
    """Resize and Upsample to the nearest neighbour by an integer factor, as a transposed convolution with ones."""
    x = node.inputs[0]
    shape, out = graph.shapes.get(x), graph.shapes.get(node.output)
    if shape is None or out is None or node.get("mode", "nearest") != "nearest" or len(shape) < 3:
        return None
    if shape[:2] != out[:2] or any(large % small for small, large in zip(shape, out, strict=True)):
        return None
    factor = [large // small for small, large in zip(shape[2:], out[2:], strict=True)]
    ones = graph.add_constant(np.ones((shape[1], 1, *factor)), f"{node.output}/ones", graph.types.get(x, np.float32))
    attributes = {"kernel_shape": factor, "strides": factor, "group": shape[1]}
    return [Node("ConvTranspose", [x, ones], node.outputs, attributes, node.name)]
