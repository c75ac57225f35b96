"""Linear nodes that the engine cannot build or bound, through its `custom_ops`: their forward, and our rule.

`BoundAffine` derives interval and backward bounds from the rule table, so that a node here is its forward only.
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
    """Base of a node that is affine in its one perturbed input and has a rule in the table."""

    def interval_propagate(self, *v: Any) -> Any:
        """Center and half width through the linear map and its absolute value, or a monotone forward."""
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
    """Inputs of a node for its rule: values of the constant ones, sets of the right shape for the perturbed."""
    inputs: list[State] = []
    for parent in node.inputs:
        if parent.perturbed:
            shape = parent.output_shape
            inputs.append(BallBox(torch.empty(shape, device="meta"), torch.empty(shape[:1], device="meta")))
        else:
            inputs.append(engine.constant(parent))
    return inputs


def affine_backward(node: Any, last_lA: Tensor | None, last_uA: Tensor | None) -> Any:
    """The engine's `bound_backward` for an affine node: both sides through the adjoint of its rule."""
    inputs = shapes_of_inputs(node)
    sides = []
    for rows in (last_lA, last_uA):
        sides.append(None if rows is None else adjoint_and_bias(node, inputs, rows))
    pairs = [tuple(None if side is None else side[0][i] for side in sides) for i in range(len(inputs))]
    bias = [0 if side is None else side[1] for side in sides]
    return pairs, bias[0], bias[1]


class BoundConv1d(BoundAffine):
    """1-D convolution, which auto_LiRPA 0.3 does not build."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.stride, self.dilation, self.groups = attr["strides"], attr["dilations"], attr["group"]
        self.padding = attr["pads"][:1]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv1d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class BoundAnyConvTranspose(BoundAffine):
    """Transposed 2-D convolution with the padding, dilation and groups that the engine does not take."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.stride, self.dilation, self.groups = attr["strides"], attr["dilations"], attr["group"]
        self.padding = attr["pads"][: len(attr["pads"]) // 2]
        self.output_padding = attr.get("output_padding", [0] * len(self.padding))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(self.padding)]
        return function(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)


class BoundAnyPad(BoundAffine):
    """Constant padding of any dimension; the engine's fails on today's traces, whose value is a tensor."""

    def forward(self, x: Tensor, pad: Tensor, value: Any = 0.0) -> Tensor:
        half = len(pad) // 2
        widths = [int(width) for axis in reversed(range(half)) for width in (pad[axis], pad[axis + half])]
        filled = float(value) if not isinstance(value, Tensor) or value.numel() == 1 else 0.0  # empty: the default
        return F.pad(x, widths, value=filled)


class BoundTile(BoundAffine):
    """Repetition along axes, which auto_LiRPA 0.3 does not build, and 0.7.1 carries rows back through wrongly."""

    def forward(self, x: Tensor, repeats: Tensor) -> Tensor:
        return x.repeat(*(int(count) for count in repeats))


class BoundSlice(engine.bound_ops.BoundSlice):  # type: ignore[misc, name-defined]
    """A slice; the engine adds the length to a negative end in place, and with that moves it at every call."""

    def forward(self, x: Any, *ends: Any) -> Any:
        return super().forward(x, *(end.clone() if isinstance(end, Tensor) else end for end in ends))


class BoundFill(engine.bound_ops.BoundConstantOfShape):  # type: ignore[misc, name-defined]
    """A constant of some shape, whose interval in auto_LiRPA 0.3 is of one axis only."""

    def interval_propagate(self, *v: Any) -> Any:
        value = self.forward(v[0][0])
        return value, value


def _conv(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    """The engine's convolution where it can; the symmetric 1-D one here."""
    pads = attr["pads"]
    if engine.IS_LEGACY and len(attr["kernel_shape"]) == 1 and pads[0] == pads[1]:
        return BoundConv1d(attr, inputs, output_index, options)
    return engine.BoundConv(attr, inputs, output_index, options)


def _conv_transpose(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    """The engine's transposed convolution where it takes the attributes; else ours."""
    pads = attr["pads"]
    plain = not any(pads) and len(pads) == 4 and set(attr["dilations"]) == {1} and attr["group"] == 1
    if plain and not any(attr.get("output_padding", [])) and len(set(attr["strides"])) == 1:
        return engine.bound_ops.BoundConvTranspose(attr, inputs, output_index, options)
    return BoundAnyConvTranspose(attr, inputs, output_index, options)


def pad(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    if attr.get("mode", "constant") not in ("constant", b"constant"):
        return engine.bound_ops.BoundPad(attr, inputs, output_index, options)
    return BoundAnyPad(attr, inputs, output_index, options)


def _by_adjoint(base: type) -> type:
    """0.3's add, sub, mul or div, with our backward bound where one operand is constant.

    Its own fails if the constant has a batch dimension of 1, as per-channel normalization does.
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
    """0.3's division: by a BoundSqrt it computes a layer normalization without eps, its interval rule is wrong, and its
    backward bound holds for positive divisors."""

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
