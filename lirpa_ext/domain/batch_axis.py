"""The first axis of a node's value: the samples, or several parts of each of them.

`x.view(B * T, F)` merges the batch with another axis, so that a layer sees each of a sample's T parts as a sample of
its own, and a later `view` splits them again. A set then has one ball and one box for each part, in the order of the
samples: part n belongs to sample n // T. Coefficient rows are treated alike, and what they leave behind is summed over
the parts of a sample (`of_samples`).
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
    """Number of samples of the perturbed input that a node depends on, in the graph as it was last run."""
    while not isinstance(node, engine.BoundInput):
        node = next(parent for parent in node.inputs if parent.perturbed and not engine.is_shape(parent))
    return node.value.shape[0]


def merges_batch(node: Any) -> bool:
    """Whether a perturbed node's first axis is not the batch's alone: merged with another one, moved, or dropped."""
    return len(node.output_shape) == 0 or node.output_shape[0] != batch_size(node)


def regroups_samples(node: Any) -> bool:
    """Whether both a reshaping node and its input hold whole samples in order, as merging and splitting the batch do.

    A reshape keeps the order of all elements, so it does where both first axes are multiples of the batch.
    """
    first, before = node.output_shape[:1], node.inputs[0].output_shape[:1]
    batch = 1 if first == before else batch_size(node)
    return all(len(axis) > 0 and axis[0] % batch == 0 for axis in (first, before))


def acts_on_axes(node: Any, dims: int) -> frozenset[int]:
    """Axes of its first input, of `dims` axes, that a slice, split, gather, reduction, sum, pad or tile acts along."""
    return _axes(node, dims)[0]


def moves_samples(node: Any, dims: int) -> bool:
    """Whether such a node acts along the first axis, where samples are, and does not keep them as they are there.

    A slice of all samples, as the tracer writes it for `x[:, 1:]`, keeps them; one that takes fewer of them is told by
    the length of its value.
    """
    axes, keeps_order = _axes(node, dims)
    return 0 in axes and not keeps_order


def _axes(node: Any, dims: int) -> tuple[frozenset[int], bool]:
    """The axes, and whether the order along each of them is kept; read once from a node's constants."""
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
            new = len(widths) - dims  # axes that it puts before the first one
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
    """Radii of the same values in `parts` balls instead of len(radius); None where no ball is a group of others.

    A part of a ball lies in a ball of the same radius; of several together the squares add up.
    """
    known = len(radius)
    if parts == known:
        return radius
    if known and parts % known == 0:
        return radius.repeat_interleave(parts // known)
    return length(radius.view(parts, -1), 1) if parts and known % parts == 0 else None


def of_samples(values: Tensor, batch: int) -> Tensor:
    """Values (S, B T) of the parts of each sample, summed to those of the samples, (S, B)."""
    return values if values.shape[1] == batch else values.unflatten(1, (batch, -1)).sum(2)


def of_whole_samples(state: BallBox, batch: int) -> BallBox | None:
    """The ball (B, n) of all parts of each sample together; None where the parts are no whole samples."""
    radius = regrouped(state.radius, batch)
    return None if radius is None or len(state.radius) < batch else BallBox(state.center.reshape(batch, -1), radius)


def positions(index: Tensor, length: int, batch: int) -> Tensor:
    """Indices along a first axis of `length` = B T of the parts of some samples, in order; none if it is not theirs."""
    parts = 0 if length % batch else length // batch
    return index if parts == 1 else (index.unsqueeze(1) * parts + torch.arange(parts, device=index.device)).flatten()


def check_has_batch(node: Any) -> None:
    """Raise UnsupportedNodeError for a perturbed node whose first axis is not one of whole samples."""
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
    """Raise UnsupportedNodeError unless the first axis of the bounded node, the graph's output, is the batch's."""
    if value.dim() == 0 or len(value) != batch:
        raise UnsupportedNodeError(
            f"the output, node {node.name!r} ({type(node).__name__}), has shape {tuple(value.shape)} for a batch of "
            f"{batch}: its first axis is not the batch's. Split the axes that the model merged before it returns, e.g. "
            "by view(x.shape[0], -1); a layer on the last axis, as nn.Linear is, takes (B, T, F) as it is."
        )
