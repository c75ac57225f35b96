"""The linear part of an affine node as an operator: apply, adjoint, absolute value and row norms."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInputError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Dense",
    "LinearMap",
    "NonNegative",
    "Scale",
    "Selection",
    "WeightedMap",
    "safe_sqrt",
]


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of ``x >= 0`` whose gradient at 0 is 0 (the plain one is infinite and turns into NaN)."""
    zero = x == 0  # not "x <= 0": NaN has to stay NaN
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def magnitude(x: Tensor, dims: tuple[int, ...]) -> Tensor:
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
        peak = magnitude(self.weight, (1,))
        return peak[:, 0] * safe_sqrt((self.weight / peak).square().sum(1))


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
