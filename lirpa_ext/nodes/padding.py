"""Circular, reflecting and replicating paddings, as selections of elements along each axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedNodeError
from .repairs import BoundAffine, pad

# Name of a mode in ONNX -> name in torch.
MODES = {"wrap": "circular", "edge": "replicate", "reflect": "reflect"}


def repeated(x: Tensor, before: list[int], after: list[int], mode: str) -> Tensor:
    """Pad each axis of a tensor by values of the tensor itself.

    Args:
        x: The tensor.
        before: Number of elements to add at the start of each axis; a negative number removes elements.
        after: Number of elements to add at the end of each axis; a negative number removes elements.
        mode: "wrap" continues with the values from the other end, "edge" repeats the last value, "reflect" mirrors the
            values at the last one.
    """
    for axis, (first, last) in enumerate(zip(before, after, strict=True)):
        if first or last:
            size = x.shape[axis]
            places = torch.arange(-first, size + last, device=x.device)
            x = x.index_select(axis, _place(places, size, mode))
    return x


def _place(places: Tensor, size: int, mode: str) -> Tensor:
    if mode == "wrap":
        return places % size
    if mode == "edge":
        return places.clamp(0, size - 1)
    period = max(2 * (size - 1), 1)
    places = places % period
    return torch.minimum(places, period - places) if size > 1 else torch.zeros_like(places)


class BoundRepeatingPad(BoundAffine):
    """Padding by values of the input itself, in the modes of `repeated`."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.pad_mode = _mode(attr)
        if self.pad_mode not in MODES:
            raise UnsupportedNodeError(f"padding of mode {self.pad_mode!r}; known are constant, {', '.join(MODES)}")

    def forward(self, x: Tensor, pad: Tensor, *value: Any) -> Tensor:
        widths = [int(width) for width in pad]
        return repeated(x, widths[: x.dim()], widths[x.dim() :], self.pad_mode)


def _mode(attr: Any) -> str:
    mode = attr.get("mode", "constant")
    return mode.decode() if isinstance(mode, bytes) else mode


class CircularPad(torch.autograd.Function):
    """Torch's circular padding, recorded by the tracer as one ``Pad`` instead of slices and a concatenation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        return F.pad(x, widths, mode="circular")

    @staticmethod
    def symbolic(graph: Any, x: Any, widths: tuple[int, ...]) -> Any:
        dims = x.type().dim()
        ends = [[0] * dims, [0] * dims]  # torch lists pairs from the last axis on
        for place, width in enumerate(widths):
            ends[place % 2][dims - 1 - place // 2] = width
        pad = graph.op("Constant", value_t=torch.tensor(ends[0] + ends[1]))
        return graph.op("Pad", x, pad, mode_s="wrap")


def circular(input: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> Tensor:
    """`CircularPad` with the arguments of ``torch.nn.functional.pad``."""
    return CircularPad.apply(input, tuple(pad))


def _pad(attr: Any, inputs: Any, output_index: int, options: Any) -> Any:
    """Node of an ONNX Pad: `BoundRepeatingPad`, or that of `repairs.pad` for padding by a constant."""
    make = pad if _mode(attr) == "constant" else BoundRepeatingPad
    return make(attr, inputs, output_index, options)


OPS: dict[str, Any] = {"onnx::Pad": _pad}
