"""Convolutions and transposed convolutions as linear operators: apply, adjoint, absolute value and row norms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError
from .linear_maps import WeightedMap, magnitude, safe_sqrt

if TYPE_CHECKING:
    pass

__all__ = ["Conv", "ConvTranspose"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _Convolution(WeightedMap):
    """Base class of Conv and ConvTranspose: their geometry and row norms."""

    def __init__(
        self,
        weight: Tensor,
        input_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        dims = weight.dim() - 2
        if dims not in _CONV or len(input_shape) != dims + 1 or weight.shape[0] % groups:
            raise InvalidInputError(
                f"{type(self).__name__}: weight {tuple(weight.shape)}, inputs {tuple(input_shape)} and "
                f"{groups} groups do not make a 1-D, 2-D or 3-D convolution of inputs (channels, *spatial)."
            )
        self.weight = weight
        self.input_shape = torch.Size(input_shape)
        self.kernel = tuple(weight.shape[2:])
        self.stride = _per_dim(stride, dims)
        self.padding = _per_dim(padding, dims)
        self.dilation = _per_dim(dilation, dims)
        self.groups = groups
        self.extent = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
        kernels = self._kernels()
        self.output_shape = torch.Size((kernels.shape[0], *self._output_sizes()))
        channels = kernels.shape[1] * groups
        if self.input_shape[0] != channels or min(self.output_shape) < 1:
            raise InvalidInputError(
                f"{type(self).__name__}: weight {tuple(weight.shape)} takes {channels} channels, and makes "
                f"the output {tuple(self.output_shape)} of the input {tuple(self.input_shape)}."
            )

    @property
    def geometry(self) -> tuple[object, ...]:
        return *super().geometry, self.stride, self.padding, self.dilation, self.groups

    @abstractmethod
    def _kernels(self) -> Tensor:
        """The weight as (C_out, fan_in, *kernel)."""

    @abstractmethod
    def _output_sizes(self) -> list[int]:
        """The spatial part of output_shape."""

    @abstractmethod
    def _one_channel(self, kernels: Tensor) -> _Convolution:
        """The same convolution of one channel, with kernels (C_out, 1, *kernel)."""

    def row_norms(self, exact: bool = True) -> Tensor:
        """The root of the convolution of ones with W^2: rows at the border count only the weights inside of the input.

        Returns:
            (C_out, *spatial); if not exact the norms of whole kernels, which are upper bounds, (C_out, 1, ...).
        """
        kernels = self._kernels()
        peak = magnitude(kernels, tuple(range(1, kernels.dim())))
        # All input channels are ones: the squares are summed over them before the convolution, which is faster.
        power = (kernels / peak).square().sum(1, keepdim=True)
        peak = peak[:, 0]
        if not exact:
            return peak * safe_sqrt(power.flatten(1).sum(1).view_as(peak))
        one_channel = self._one_channel(power)
        return peak * safe_sqrt(one_channel(one_channel._ones(one_channel.input_shape))[0])


class _ConvAdjoint(torch.autograd.Function):
    """A^T y for a convolution A, and the sums of y over positions, (B, C_out).

    Times a bias, the sums are <y, bias>; computed here, their gradient takes no tensor of its own. The gradients of
    A^T y use A itself, as <g, A^T y> = <A g, y>: torch's weight gradient of a transposed convolution takes ten times
    as long on the CPU. For one input channel, a matrix product and the sum of its patches take half the time of the
    transposed convolution.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, unreached: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, weight)
        ctx.geometry = stride, padding, dilation, groups
        if weight.dim() == 4 and weight.shape[1] == groups == 1:
            sizes = tuple(
                (n - 1) * s - 2 * p + d * (k - 1) + 1 + extra
                for n, s, p, d, k, extra in zip(
                    y.shape[2:], stride, padding, dilation, weight.shape[2:], unreached, strict=True
                )
            )
            patches = weight.flatten(1).t() @ y.flatten(2)  # shape: (B, kernel, positions)
            passed = F.fold(patches, sizes, weight.shape[2:], dilation, padding, stride)
        else:
            transpose = _CONV_TRANSPOSE[weight.dim() - 2]
            passed = transpose(y, weight, None, stride, padding, unreached, groups, dilation)
        return passed, y.flatten(2).sum(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, to_sums: Tensor | None) -> Any:  # type: ignore[override]
        y, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        to_y = to_weight = None
        if ctx.needs_input_grad[0]:
            spread = None if to_sums is None else to_sums.view(*to_sums.shape, *[1] * len(stride))
            if gradient is None:
                to_y = None if spread is None else spread.expand_as(y)
            else:
                to_y = _CONV[weight.dim() - 2](gradient, weight, None, *ctx.geometry)
                to_y = to_y if spread is None else to_y.add_(spread)
        if ctx.needs_input_grad[1] and gradient is not None:
            args = (y, gradient, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)
            to_weight = torch.ops.aten.convolution_backward(*args, [False, True, False])[1]
        return to_y, to_weight, None, None, None, None, None


class Conv(_Convolution):
    """Convolution (1-D to 3-D) with symmetric zero padding, without bias.

    Args:
        weight: (C_out, C_in / groups, *kernel).
        input_shape: (C_in, *spatial).
        stride, padding, dilation: an int, or one per spatial dimension. Defaults 1, 0, 1.
        groups: number of channel groups. Default 1.

    Raises:
        InvalidInputError: shapes that do not fit, or an empty output.

    >>> Conv(torch.ones(1, 1, 3), (1, 4), padding=1).row_norms().square().round()
    tensor([[2., 3., 3., 2.]])
    """

    def __call__(self, x: Tensor) -> Tensor:
        conv = _CONV[len(self.kernel)]
        return conv(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.adjoint_and_sums(y)[0]

    def adjoint_and_sums(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """A^T y, (B, *input_shape), and the sums of y over positions, (B, C_out).

        Args:
            y: (B, *output_shape).
        """
        # Inputs at the end that no window reaches get zeros.
        unreached = tuple(reach % s for reach, s in zip(self._reaches(), self.stride, strict=True))
        return _ConvAdjoint.apply(y, self.weight, self.stride, self.padding, self.dilation, self.groups, unreached)

    def _kernels(self) -> Tensor:
        return self.weight

    def _reaches(self) -> list[int]:
        """Number of positions by which the kernel can move along each dimension."""
        sizes = zip(self.input_shape[1:], self.padding, self.extent, strict=True)
        return [n + 2 * p - extent for n, p, extent in sizes]

    def _output_sizes(self) -> list[int]:
        return [reach // s + 1 for reach, s in zip(self._reaches(), self.stride, strict=True)]

    def _one_channel(self, kernels: Tensor) -> Conv:
        return Conv(kernels, (1, *self.input_shape[1:]), self.stride, self.padding, self.dilation)


class ConvTranspose(_Convolution):
    """Transposed convolution (1-D to 3-D) without bias: the adjoint of a convolution.

    Args:
        weight: (C_in, C_out / groups, *kernel).
        input_shape: (C_in, *spatial).
        stride, padding, dilation, groups: As for `Conv`.
        output_padding: Elements added at the end of each spatial dimension: an int, or one per dimension. Default 0.

    Raises:
        InvalidInputError: As for `Conv`.

    >>> ConvTranspose(torch.ones(1, 1, 3), (1, 2), stride=2)(torch.ones(1, 1, 2))
    tensor([[[1., 1., 2., 1., 1.]]])
    """

    def __init__(
        self,
        weight: Tensor,
        input_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        self.output_padding = _per_dim(output_padding, weight.dim() - 2)
        super().__init__(weight, input_shape, stride, padding, dilation, groups)

    @property
    def geometry(self) -> tuple[object, ...]:
        return *super().geometry, self.output_padding

    def __call__(self, x: Tensor) -> Tensor:
        transpose = _CONV_TRANSPOSE[len(self.kernel)]
        args = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return transpose(x, self.weight, None, *args)

    def adjoint(self, y: Tensor) -> Tensor:
        # Where output_padding >= stride, the convolution has further outputs that are no inputs of this map.
        return self.adjoint_conv()(y)[(..., *map(slice, self.input_shape[1:]))]  # type: ignore[index]

    def adjoint_conv(self) -> Conv:
        """The convolution whose adjoint, restricted to input_shape, is this map; its norm is at least this map's."""
        return Conv(self.weight, self.output_shape, self.stride, self.padding, self.dilation, self.groups)

    def _kernels(self) -> Tensor:
        grouped = self.weight.unflatten(0, (self.groups, -1))  # (groups, fan_in, C_out / groups, *kernel)
        return grouped.transpose(1, 2).flatten(0, 1)

    def _output_sizes(self) -> list[int]:
        reaches = [(n - 1) * s for n, s in zip(self.input_shape[1:], self.stride, strict=True)]
        edges = zip(reaches, self.extent, self.padding, self.output_padding, strict=True)
        return [reach + extent - 2 * p + extra for reach, extent, p, extra in edges]

    def _one_channel(self, kernels: Tensor) -> ConvTranspose:
        args = (self.stride, self.padding, self.output_padding, self.dilation)
        return ConvTranspose(kernels.transpose(0, 1), (1, *self.input_shape[1:]), *args)


def _per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise InvalidInputError(f"convolution: expected {dims} values, one per dimension, got {values}.")
    return values
