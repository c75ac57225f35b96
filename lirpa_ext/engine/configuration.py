"""The configuration of a node: a short text of the properties on which the soundness of the engine's bounds depends.

Whether a bound of the engine holds depends on more than the class of the node: which operands are perturbed, whether a
constant has a batch axis, whether height and width of a map agree, whether the windows of a pool overlap. Two nodes of
the same kind and the same configuration share one row of the list (`lirpa_ext.engine.positive_list`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import engine

# Classes of this package that, without a ball or slopes, compute the bounds of the engine's class they derive from.
_UNCHANGED = {"BoundBallBoxRelu": "BoundRelu", "BoundBallBoxLinear": "BoundLinear"}


def kind(node: Any) -> str:
    """Class name of a node for the positive list: classes of ours that bound as the engine's do count as the engine's.

    Args:
        node: A node of a graph.

    Returns:
        Name of the engine's class, e.g. ``"BoundRelu"``, or of the node's own class.
    """
    name = type(node).__name__.removesuffix("ByAdjoint")
    return _UNCHANGED.get(name, name)


def configuration(node: Any, mode: str = "") -> str:
    """Operands, shape and attributes of a node, e.g. ``"p c c, square map, patches"``.

    Args:
        node: A node of a graph, after `engine.set_input`, which marks the perturbed nodes.
        mode: Form of the engine's coefficients of images in its backward pass, "patches" or "matrix"; "" (default) for
            families of bounds without a backward pass.

    Returns:
        Parts separated by commas. First the operands: "p" is perturbed, "c" constant, "b" a constant with one value for
        each sample. Then the shape of the output, and attributes of the node's kind, such as overlapping windows.
    """
    parts = [_operands(node), _shape(node.output_shape)]
    parts += [mode] if len(node.output_shape) == 4 else []
    extra = _ATTRIBUTES.get(kind(node))
    if extra is not None:
        parts += extra(node)
    return ", ".join(part for part in parts if part)


def _operands(node: Any) -> str:
    aligned = engine.aligned_constants(node)
    rank = len(node.output_shape)

    def letter(parent: Any) -> str:
        if parent.perturbed:
            return "p"
        shape = tuple(getattr(parent, "output_shape", None) or ())
        return "b" if parent in aligned and len(shape) == rank > 0 and shape[0] != 1 else "c"

    letters = " ".join(letter(parent) for parent in node.inputs)
    return letters + " twice" if len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] else letters


def _shape(shape: Sequence[int]) -> str:
    if len(shape) == 4:
        return "square map" if shape[2] == shape[3] else "oblong map"
    return {2: "vector", 3: "sequence"}.get(len(shape), f"rank {len(shape)}")


def _geometry(node: Any, *pairs: Sequence[int]) -> list[str]:
    """["oblong window"] unless the input's map is square and each pair, such as a stride, holds one number twice."""
    before = node.inputs[0].output_shape
    if len(before) != 4:
        return [f"{len(before) - 2}-D"]
    return _if(before[2] != before[3] or any(len(set(pair)) > 1 for pair in pairs), "oblong window")


def _rest(node: Any, kernel: Sequence[int], padding: Sequence[int]) -> list[str]:
    """Whether the last window ends before the padded map does, so that a rest of the map is not read."""
    dilation = getattr(node, "dilation", [1] * len(kernel))
    sizes = zip(node.inputs[0].output_shape[2:], kernel, node.stride, padding, dilation, strict=False)
    return _if(any((n + 2 * p - d * (k - 1) - 1) % s for n, k, s, p, d in sizes), "leaves a rest")


def _conv(node: Any) -> list[str]:
    parts = _geometry(node, node.stride, node.padding, node.dilation, node.inputs[1].output_shape[2:])
    return [*parts, *_if(max(node.dilation) > 1, "dilated"), *_if(node.groups != 1, "groups"),
            *_rest(node, node.inputs[1].output_shape[2:], node.padding)]  # fmt: skip


def _transposed(node: Any) -> list[str]:
    return [*_geometry(node, node.stride, node.padding), *_if(node.groups != 1, "groups")]


def _pool(node: Any) -> list[str]:
    padding = node.padding if isinstance(node.padding, (list, tuple)) else [node.padding]
    tiles = list(node.kernel_size) == list(node.stride)
    return [*_geometry(node, node.kernel_size, node.stride, padding), *_if(not tiles, "stride is not kernel"),
            *_if(any(padding), "padded"), *_rest(node, node.kernel_size, padding)]  # fmt: skip


def _axis(node: Any) -> list[str]:
    return [f"axis {node.axis % max(len(node.output_shape), 1)}"]


def _moves(node: Any) -> list[str]:
    before, after = node.inputs[0].output_shape, node.output_shape
    same = len(before) > 0 and len(after) > 0 and before[0] == after[0]
    return [f"from {_shape(before)}", *_if(not same, "moves the batch")]


def _linear(node: Any) -> list[str]:
    plain = not node.transA and engine.weight_scale(node) == 1 and engine.bias_scale(node) == 1
    return _if(not plain, "transposed or scaled")


def _permutes(node: Any) -> list[str]:
    return _if(node.perm[0] != 0, "moves the batch")


def _if(condition: bool, text: str) -> list[str]:
    return [text] if condition else []


_ATTRIBUTES: dict[str, Callable[[Any], list[str]]] = {
    "BoundAveragePool": _pool,
    "BoundConcat": _axis,
    "BoundConv": _conv,
    "BoundConvTranspose": _transposed,
    "BoundFlatten": _moves,
    "BoundGather": _axis,
    "BoundGatherElements": _axis,
    "BoundLinear": _linear,
    "BoundMaxPool": _pool,
    "BoundReshape": _moves,
    "BoundSqueeze": _moves,
    "BoundTranspose": _permutes,
    "BoundUnsqueeze": _moves,
}
