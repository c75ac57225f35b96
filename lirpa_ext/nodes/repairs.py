"""Linear nodes that the engine cannot build or bound, registered through its ``custom_ops``.

`BoundAffine` derives interval and backward bounds from the table of rules, so that its subclasses only write `forward`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import engine
from ..domain.ball_box import BallBox
from ..rules import RULES, State, adjoint_and_bias
from ..rules.linear import Affine
from ..rules.quotients import quotient_box


class BoundAffine(engine.Bound):  # type: ignore[misc]
    """Base class of nodes that are affine in their one perturbed input and have a rule in the table."""

    def interval_propagate(self, *v: Any) -> Any:
        """Interval bounds by the linear map and its absolute value, or by `forward` of both ends for monotone nodes."""
        inputs = self._inputs()
        rule = RULES[type(self).__name__]
        linear_map = rule.linear_map(self, inputs, 0) if isinstance(rule, Affine) else None
        constants = [interval[0] for interval in v[1:]]
        if linear_map is None:
            return self.forward(v[0][0], *constants), self.forward(v[0][1], *constants)
        center = self.forward((v[0][0] + v[0][1]) / 2, *constants)
        spread = linear_map.abs()((v[0][1] - v[0][0]) / 2)
        return center - spread, center + spread

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        if not all(A is None or isinstance(A, Tensor) for A in (last_lA, last_uA)):
            raise NotImplementedError(f"{type(self).__name__} has no backward bound in patches mode")
        return affine_backward(self, last_lA, last_uA)

    def _inputs(self) -> list[State]:
        return shapes_of_inputs(self)


def shapes_of_inputs(node: Any) -> list[State]:
    """Inputs of a node for its rule: values of constant inputs, and for perturbed ones sets that have only shapes."""
    inputs: list[State] = []
    for parent in node.inputs:
        if parent.perturbed:
            shape = parent.output_shape
            inputs.append(BallBox(torch.empty(shape, device="meta"), torch.empty(shape[:1], device="meta")))
        else:
            inputs.append(engine.constant(parent))
    return inputs


def affine_backward(node: Any, last_lA: Tensor | None, last_uA: Tensor | None) -> Any:
    """The engine's `bound_backward` of an affine node, with both sides by the adjoint of its rule.

    Args:
        node: The node.
        last_lA: Coefficient rows of the lower side, (S, B, ...), or None.
        last_uA: Coefficient rows of the upper side, (S, B, ...), or None.

    Returns:
        (lower rows, upper rows) for each input, lower bias and upper bias, (S, B) each or 0.
    """
    inputs = shapes_of_inputs(node)
    sides = []
    for rows in (last_lA, last_uA):
        sides.append(None if rows is None else adjoint_and_bias(node, inputs, rows))
    pairs = [tuple(None if side is None else side[0][i] for side in sides) for i in range(len(inputs))]
    bias = [0 if side is None else side[1] for side in sides]
    return pairs, bias[0], bias[1]


class BoundConv1d(BoundAffine):
    """A 1-D convolution, which auto_LiRPA 0.3 cannot build."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.stride, self.dilation, self.groups = attr["strides"], attr["dilations"], attr["group"]
        self.padding = attr["pads"][:1]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv1d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class BoundAnyConvTranspose(BoundAffine):
    """A transposed convolution (1-D to 3-D) with padding, dilation and groups, which the engine does not support."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.stride, self.dilation, self.groups = attr["strides"], attr["dilations"], attr["group"]
        self.padding = attr["pads"][: len(attr["pads"]) // 2]
        self.output_padding = attr.get("output_padding", [0] * len(self.padding))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(self.padding)]
        return function(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)


class BoundAnyPad(BoundAffine):
    """Padding by a constant in any number of axes; the engine's fails if the traced constant is a tensor."""

    def forward(self, x: Tensor, pad: Tensor, value: Any = 0.0) -> Tensor:
        half = len(pad) // 2
        widths = [int(width) for axis in reversed(range(half)) for width in (pad[axis], pad[axis + half])]
        filled = float(value) if not isinstance(value, Tensor) or value.numel() == 1 else 0.0  # an empty tensor means 0
        return F.pad(x, widths, value=filled)


class BoundTile(BoundAffine):
    """Repetition along axes, which auto_LiRPA 0.3 cannot build, and whose backward bounds are wrong in 0.7.1."""

    def forward(self, x: Tensor, repeats: Tensor) -> Tensor:
        return x.repeat(*(int(count) for count in repeats))


class BoundSlice(engine.bound_ops.BoundSlice):  # type: ignore[misc, name-defined]
    """A slice that keeps its ends: the engine adds the axis length to a negative end in place, at every call."""

    def forward(self, x: Any, *ends: Any) -> Any:
        return super().forward(x, *(end.clone() if isinstance(end, Tensor) else end for end in ends))


class BoundFill(engine.bound_ops.BoundConstantOfShape):  # type: ignore[misc, name-defined]
    """A constant of a given shape; its interval in auto_LiRPA 0.3 has one axis only."""

    def interval_propagate(self, *v: Any) -> Any:
        value = self.forward(v[0][0])
        return value, value


def _conv(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    """Node of an ONNX Conv: the engine's, or on 0.3 `BoundConv1d` for a 1-D convolution of symmetric padding."""
    pads = attr["pads"]
    if engine.IS_LEGACY and len(attr["kernel_shape"]) == 1 and pads[0] == pads[1]:
        return BoundConv1d(attr, inputs, output_index, options)
    return engine.BoundConv(attr, inputs, output_index, options)


def _conv_transpose(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    """Node of an ONNX ConvTranspose: the engine's if it supports the attributes, else `BoundAnyConvTranspose`."""
    pads = attr["pads"]
    plain = not any(pads) and len(pads) == 4 and set(attr["dilations"]) == {1} and attr["group"] == 1
    if plain and not any(attr.get("output_padding", [])) and len(set(attr["strides"])) == 1:
        return engine.bound_ops.BoundConvTranspose(attr, inputs, output_index, options)
    return BoundAnyConvTranspose(attr, inputs, output_index, options)


def pad(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    """Node of an ONNX Pad: `BoundAnyPad` for padding by a constant, the engine's for other modes.

    Args:
        attr, inputs, output_index, options: As for the engine's nodes.
    """
    if attr.get("mode", "constant") not in ("constant", b"constant"):
        return engine.bound_ops.BoundPad(attr, inputs, output_index, options)
    return BoundAnyPad(attr, inputs, output_index, options)


def _by_adjoint(base: type) -> type:
    """Subclass of 0.3's add, sub, mul or div node with this package's backward bound if one operand is constant.

    The backward bound of 0.3 fails if the constant has a batch axis of length 1, as in a per-channel normalization.
    """

    def bound_backward(self: Any, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        one = sum(parent.perturbed for parent in self.inputs) == 1
        if one and all(A is None or isinstance(A, Tensor) for A in (last_lA, last_uA)):
            rows = last_lA if last_lA is not None else last_uA
            if adjoint_and_bias(self, shapes_of_inputs(self), rows) is not None:
                return affine_backward(self, last_lA, last_uA)
        return base.bound_backward(self, last_lA, last_uA, *x, **kwargs)  # type: ignore[attr-defined]

    return type(f"{base.__name__}ByAdjoint", (base,), {"bound_backward": bound_backward})


def _quotient(base: Any) -> type:
    """Subclass of 0.3's division node with correct values and intervals, which refuses unsound backward bounds.

    Division by a BoundSqrt in 0.3 computes a layer normalization without eps, its interval arithmetic is wrong, and its
    backward bound holds only for positive divisors.
    """

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        self.x, self.y = x, y
        return x / y

    def interval_propagate(self: Any, *v: Any) -> Any:
        return quotient_box((v[0][0], v[0][1]), (v[1][0], v[1][1]))

    def bound_backward(self: Any, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> Any:
        if x[1].perturbed and not (x[1].lower > 0).all():
            raise NotImplementedError("a quotient whose divisor may be 0 or negative has no backward bound here")
        return base.bound_backward(self, last_lA, last_uA, *x, **kwargs)

    functions = {"forward": forward, "interval_propagate": interval_propagate, "bound_backward": bound_backward}
    return type(base.__name__, (base,), functions)


OPS: dict[str, Any] = {
    "onnx::Conv": _conv, "onnx::ConvTranspose": _conv_transpose, "onnx::Pad": pad, "onnx::Tile": BoundTile,
    "onnx::Slice": BoundSlice,
}  # fmt: skip
if engine.IS_LEGACY:
    OPS["onnx::ConstantOfShape"] = BoundFill
    for op in ("Add", "Sub", "Mul", "Div"):
        OPS[f"onnx::{op}"] = _by_adjoint(getattr(engine.bound_ops, f"Bound{op}"))
    OPS["onnx::Div"] = _quotient(OPS["onnx::Div"])
