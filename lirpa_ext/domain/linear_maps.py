"""The linear part of an affine node as an operator: apply, adjoint, absolute value and row norms."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lirpa_ext.errors import InvalidInputError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Conv",
    "ConvTranspose",
    "Dense",
    "LinearMap",
    "NonNegative",
    "Scale",
    "Selection",
    "WeightedMap",
    "safe_sqrt",
]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of ``x >= 0`` whose gradient at 0 is 0 (the plain one is infinite and turns into NaN)."""
    zero = x == 0  # not "x <= 0": NaN has to stay NaN
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def _peak(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Largest magnitude over ``dims`` (kept), or 1; divided out, it keeps squares from underflowing."""
    peak = x.detach().abs().amax(dims, keepdim=True)
    return torch.where(peak > 0, peak, 1.0)


class LinearMap(ABC):
    """A linear map A between tensors without batch dimension, applied to batches.

    Attributes:
        input_shape: Shape of one input, without batch.
        output_shape: Shape of one output, without batch.
        weight: Tensor that holds the entries of A; None if A has no parameters.
    """

    input_shape: torch.Size
    output_shape: torch.Size
    weight: Tensor | None = None

    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor of the dtype and device that the map acts in."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that the map computes with."""
        return self._like().dtype

    @property
    def device(self) -> torch.device:
        """Device that the map computes on."""
        return self._like().device

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x. x: (B, *input_shape); returns (B, *output_shape)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y. y: (B, *output_shape); returns (B, *input_shape)."""

    @abstractmethod
    def abs(self) -> LinearMap:
        """The map |A|, entry by entry, differentiable in the weight."""

    @abstractmethod
    def double(self) -> LinearMap:
        """The same map in float64."""

    @abstractmethod
    def row_norms(self, exact: bool = True) -> Tensor:
        """The l2 norm of each row of A, up to rounding in the map's type; gradients at zero rows are 0.

        Args:
            exact: False allows cheaper upper bounds, fewer than one for each row. Default True.

        Returns:
            A tensor without batch dimension that broadcasts to output_shape.
        """

    def schur_bound(self) -> Tensor:
        """sqrt(||A||_1 ||A||_inf) >= ||A||_2 (Schur's test), 0-dim, from |A| and |A|^T applied to ones."""
        magnitude = self.abs()
        row_sums = magnitude(self._ones(self.input_shape))
        column_sums = magnitude.adjoint(self._ones(self.output_shape))
        # Two roots rather than the root of the product, which could overflow.
        return safe_sqrt(column_sums.max()) * safe_sqrt(row_sums.max())

    def _ones(self, shape: torch.Size) -> Tensor:
        return torch.ones(1, *shape, dtype=self.dtype, device=self.device)


class WeightedMap(LinearMap):
    """A map whose matrix has entries 0 or of ``weight``; for f(0) = 0, f(A) entry by entry is the map of f(weight)."""

    weight: Tensor

    def _like(self) -> Tensor:
        return self.weight

    @property
    def geometry(self) -> tuple[object, ...]:
        """Everything that defines the map except for the values of its weight; comparable by ==."""
        return type(self), self.input_shape, self.output_shape, self.weight.shape

    def with_weight(self, weight: Tensor) -> Self:
        """A map of the same geometry with another weight of the same shape."""
        other = copy.copy(self)
        other.weight = weight
        return other

    def abs(self) -> Self:
        return self.with_weight(self.weight.abs())

    def double(self) -> Self:
        return self.with_weight(self.weight.double())


class Dense(WeightedMap):
    """x -> x W^T on the last dimension; block-diagonal, hence of the same norm, over leading dimensions.

    Args:
        weight: (out, in).
        lead_shape: dimensions between the batch and the last one. Default none.

    >>> Dense(torch.tensor([[3.0, 4.0]])).row_norms()
    tensor([5.])
    """

    def __init__(self, weight: Tensor, lead_shape: Sequence[int] = ()) -> None:
        if weight.dim() != 2:
            raise InvalidInputError(f"Dense: the weight must be (out, in), got shape {tuple(weight.shape)}.")
        self.weight = weight
        self.input_shape = torch.Size((*lead_shape, weight.shape[1]))
        self.output_shape = torch.Size((*lead_shape, weight.shape[0]))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return F.linear(y, self.weight.t())

    def row_norms(self, exact: bool = True) -> Tensor:
        """Norms of the rows of the weight, (out,); exact in either case."""
        peak = _peak(self.weight, (1,))
        return peak[:, 0] * safe_sqrt((self.weight / peak).square().sum(1))


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
        peak = _peak(kernels, tuple(range(1, kernels.dim())))
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


class Scale(WeightedMap):
    """x -> factor * x, element by element; a factor with more elements than the input repeats the input.

    Args:
        factor: tensor without batch dimension that broadcasts with input_shape.
        input_shape: shape of one input.

    >>> Scale(torch.ones(3, 1, 1), (1, 2, 2)).output_shape
    torch.Size([3, 2, 2])
    """

    def __init__(self, factor: Tensor, input_shape: Sequence[int]) -> None:
        self.weight = factor
        self.input_shape = torch.Size(input_shape)
        self.output_shape = torch.broadcast_shapes(self.input_shape, factor.shape)
        self._padded = (1,) * (len(self.output_shape) - len(self.input_shape)) + tuple(self.input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self._padded) * self.weight

    def adjoint(self, y: Tensor) -> Tensor:
        return (y * self.weight).sum_to_size(len(y), *self._padded).reshape(len(y), *self.input_shape)

    def row_norms(self, exact: bool = True) -> Tensor:
        """|factor|, which broadcasts to output_shape; exact in either case."""
        return self.weight.abs()


class NonNegative(LinearMap):
    """A linear map with entries >= 0, given as a function: average pools, means, sums, pads, gathers, expands.

    Args:
        fn: (B, *input_shape) -> (B, *output_shape), linear, sample by sample, in the dtype of its argument
            (norm bounds call it in float64). The caller must know that no entry is negative; this is not checked.
        input_shape: shape of one input, without batch.
        dtype, device: of the values. Defaults: torch's default type, the CPU.

    Raises:
        InvalidInputError: fn does not map 0 to 0.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        input_shape: Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.fn = fn
        self.input_shape = torch.Size(input_shape)
        self._zero = torch.zeros(1, *input_shape, dtype=dtype, device=device)
        with torch.no_grad():
            at_zero = fn(self._zero)
        if at_zero.count_nonzero() > 0:
            raise InvalidInputError("NonNegative: fn is not linear, it maps 0 to values other than 0.")
        self.output_shape = at_zero.shape[1:]

    def _like(self) -> Tensor:
        return self._zero

    def __call__(self, x: Tensor) -> Tensor:
        return self.fn(x)

    def adjoint(self, y: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled() and y.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(len(y), *self.input_shape, dtype=y.dtype, device=y.device, requires_grad=True)
            return torch.autograd.grad(self.fn(x), x, y, create_graph=differentiable)[0]

    def abs(self) -> NonNegative:
        return self

    def double(self) -> NonNegative:
        return NonNegative(self.fn, self.input_shape, torch.float64, self.device)

    def row_norms(self, exact: bool = True) -> Tensor:
        """The map's Schur bound, 0-dim, an upper bound on the norm of every row; the same in either case."""
        return self.double().schur_bound().to(self.dtype)


class Selection(NonNegative):
    """A map each of whose outputs is one of the inputs, or 0: gathers, tiles, pads.

    Args:
        fn, input_shape, dtype, device: As for `NonNegative`.

    Raises:
        InvalidInputError: As for `NonNegative`.
    """

    def row_norms(self, exact: bool = True) -> Tensor:
        """1, 0-dim: each row has at most one entry, which is 1."""
        return torch.ones((), dtype=self.dtype, device=self.device)

    def double(self) -> Selection:
        return Selection(self.fn, self.input_shape, torch.float64, self.device)


def _per_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise InvalidInputError(f"convolution: expected {dims} values, one per dimension, got {values}.")
    return values
