"""The first axis of a node's value: the samples, or several parts of each sample.

``x.view(B * T, F)`` merges the batch with another axis, so that a layer sees each of a sample's T parts as a sample of
its own, and a later ``view`` splits them again. A set then has one ball and one box for each part, in the order of the
samples: part n belongs to sample n // T. Coefficient rows have the same first axis, and the biases that a backward
pass collects are summed over the parts of a sample (`of_samples`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..errors import UnsupportedNodeError
from .ball_box import BallBox
from .lengths import length


def batch_size(node: Any) -> int:
    """Number of samples of the perturbed input that a perturbed node depends on, for the input that the graph holds."""
    while not isinstance(node, engine.BoundInput):
        node = next(parent for parent in node.inputs if parent.perturbed and not engine.is_shape(parent))
    return node.value.shape[0]


def merges_batch(node: Any) -> bool:
    """Whether the first axis of a perturbed node is not just the batch, which may be merged, moved or dropped."""
    return len(node.output_shape) == 0 or node.output_shape[0] != batch_size(node)


def regroups_samples(node: Any) -> bool:
    """Whether the first axes of a reshape's input and output both hold whole samples, or parts of each, in order.

    A reshape keeps the order of all elements, so this holds if the first axes of its input and output are multiples
    of the batch size.

    Args:
        node: A reshape, flatten, squeeze or unsqueeze node.
    """
    first, before = node.output_shape[:1], node.inputs[0].output_shape[:1]
    batch = 1 if first == before else batch_size(node)
    return all(len(axis) > 0 and axis[0] % batch == 0 for axis in (first, before))


def acts_on_axes(node: Any, dims: int) -> frozenset[int]:
    """Axes of its first input that a slice, split, gather, reduction, sum, pad or tile acts along.

    Args:
        node: The node.
        dims: Number of axes of its first input, with the batch.

    Returns:
        Axes, each from 0 to dims - 1.
    """
    return _axes(node, dims)[0]


def moves_samples(node: Any, dims: int) -> bool:
    """Whether a node as in `acts_on_axes` acts along the first axis, that of the samples, and may change their order.

    False for a slice of step 1, which the tracer writes along the batch for ``x[:, 1:]``: whether such a slice drops
    samples shows in the length of its value.

    Args:
        node: The node.
        dims: Number of axes of its first input, with the batch.
    """
    axes, keeps_order = _axes(node, dims)
    return 0 in axes and not keeps_order


def _axes(node: Any, dims: int) -> tuple[frozenset[int], bool]:
    """The axes of `acts_on_axes`, and whether the node keeps the order along each; read once from its constants."""
    known = node.__dict__.get("_acts_on_axes")
    if known is None:
        known = _read_axes(node, dims)
        object.__setattr__(node, "_acts_on_axes", known)
    return known


def _read_axes(node: Any, dims: int) -> tuple[frozenset[int], bool]:
    name = type(node).__name__
    constants = [engine.constant(parent) for parent in node.inputs[1:]]
    if name in ("BoundPad", "BoundAnyPad", "BoundRepeatingPad", "BoundTile"):
        widths = constants[0].flatten().tolist()
        if name == "BoundTile":
            new = len(widths) - dims  # number of axes that the node adds before the first one
            return frozenset([0] if new > 0 else [i for i, times in enumerate(widths) if times != 1]), False
        return frozenset(i for i in range(dims) if widths[i] or widths[i + dims]), False
    if name == "BoundSlice":
        axes = constants[2] if len(constants) > 2 else node.axes
        return _nonnegative(axes, dims), len(constants) < 4 or int(constants[3]) == 1
    axes = node.axis
    if axes is None and name.startswith("BoundReduce"):
        axes = list(range(dims))
    return _nonnegative(axes, dims), False


def _nonnegative(axes: Any, dims: int) -> frozenset[int]:
    return frozenset(int(axis) % dims for axis in torch.as_tensor(axes).flatten().tolist())


def regrouped(radius: Tensor, parts: int) -> Tensor | None:
    """Radii after a reshape that splits each ball into several parts, or joins consecutive balls.

    A part of a ball lies in a ball of the same radius. Several balls together lie in one whose squared radius is the
    sum of theirs.

    Args:
        radius: Radii before, (K,).
        parts: Number of balls after.

    Returns:
        (parts,); None if neither number divides the other.
    """
    known = len(radius)
    if parts == known:
        return radius
    if known and parts % known == 0:
        return radius.repeat_interleave(parts // known)
    return length(radius.view(parts, -1), 1) if parts and known % parts == 0 else None


def of_samples(values: Tensor, batch: int) -> Tensor:
    """Values (S, B * T) of the parts of each sample, summed over the T parts: (S, B)."""
    return values if values.shape[1] == batch else values.unflatten(1, (batch, -1)).sum(2)


def of_whole_samples(state: BallBox, batch: int) -> BallBox | None:
    """The ball of all parts of each sample together, with a center (B, n); None if the parts are not whole samples."""
    radius = regrouped(state.radius, batch)
    return None if radius is None or len(state.radius) < batch else BallBox(state.center.reshape(batch, -1), radius)


def positions(index: Tensor, length: int, batch: int) -> Tensor:
    """Indices of all parts of some samples along a first axis that holds T parts of each.

    Args:
        index: Samples, (K,).
        length: Length of the first axis, B * T.
        batch: B.

    Returns:
        (K * T,), in order; empty if `length` is not a multiple of `batch`.
    """
    parts = 0 if length % batch else length // batch
    return index if parts == 1 else (index.unsqueeze(1) * parts + torch.arange(parts, device=index.device)).flatten()


def check_has_batch(node: Any) -> None:
    """Raise UnsupportedNodeError for a perturbed node whose first axis does not consist of whole samples or parts."""
    if node.__dict__.get("_has_batch"):
        return
    if len(node.output_shape) == 0:
        raise UnsupportedNodeError(
            f"node {node.name!r} ({type(node).__name__}) gives one number for the whole batch; bounds are of samples. "
            "Keep the first axis, e.g. by x.flatten(1).sum(1)."
        )
    if node.output_shape[0] % batch_size(node):
        raise UnsupportedNodeError(
            f"node {node.name!r} ({type(node).__name__}) moves the batch to another axis: its value has the shape "
            f"{tuple(node.output_shape)} for {batch_size(node)} samples; bounds are of samples. Keep the first axis."
        )
    object.__setattr__(node, "_has_batch", True)


def check_is_batch(node: Any, value: Tensor, batch: int) -> None:
    """Raise UnsupportedNodeError unless the first axis of the node to bound is that of the batch.

    Args:
        node: The node, mostly the graph's output.
        value: Its clean value.
        batch: Number of samples.
    """
    if value.dim() == 0 or len(value) != batch:
        raise UnsupportedNodeError(
            f"the output, node {node.name!r} ({type(node).__name__}), has shape {tuple(value.shape)} for a batch of "
            f"{batch}: its first axis is not the batch's. Split the axes that the model merged before it returns, e.g. "
            "by view(x.shape[0], -1); a layer on the last axis, as nn.Linear is, takes (B, T, F) as it is."
        )
