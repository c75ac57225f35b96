"""Matrix products with a constant operand of any rank, on either side, as linear maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvalidInputError
from .linear_maps import WeightedMap, magnitude, safe_sqrt

__all__ = ["Product", "matrices"]


class Product(WeightedMap):
    """x -> W x, or x W, as in torch.matmul: the matrix of the map has one block W for each column of x, or row.

    Args:
        weight: W, without batch axis: a vector (n,), a matrix, or a stack of matrices, whose leading axes broadcast
            with those of one input.
        input_shape: Shape of one input: at least (n,) for x W, at least (n, m) for W x.
        left: Whether W stands on the left.

    Raises:
        InvalidInputError: The shapes do not fit, or W would reach the batch axis.

    >>> Product(torch.tensor([3.0, 4.0]), (2, 5), left=True).row_norms()
    tensor(5.)
    """

    def __init__(self, weight: Tensor, input_shape: Sequence[int], left: bool) -> None:
        self.weight, self.left = weight, left
        self.input_shape = torch.Size(input_shape)
        if not 1 <= weight.dim() <= max(2, len(input_shape)) or len(input_shape) < 1 + left:
            raise InvalidInputError(
                f"Product: a constant of shape {tuple(weight.shape)} and inputs of shape {tuple(input_shape)} have no "
                "product that leaves the batch axis alone."
            )
        self.output_shape = self._output_shape()

    @property
    def geometry(self) -> tuple[object, ...]:
        return *super().geometry, self.left

    def _output_shape(self) -> torch.Size:
        weight, shape = self.weight.shape, self.input_shape
        if self.left:
            shared, ends = (weight[-1], shape[-2]), (*weight[-2:-1], shape[-1])
        else:
            shared, ends = (weight[-2:][0], shape[-1]), (*shape[-2:-1], *(weight[-1:] if len(weight) > 1 else ()))
        if shared[0] != shared[1]:
            raise InvalidInputError(f"Product: {tuple(weight)} and {tuple(shape)} share no axis: {shared}.")
        return torch.Size((*torch.broadcast_shapes(weight[:-2], shape[:-2]), *ends))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.matmul(self.weight, x) if self.left else torch.matmul(x, self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return product_adjoint(self.weight, y, self.left).sum_to_size(len(y), *self.input_shape)

    def row_norms(self, exact: bool = True) -> Tensor:
        """Norms of the rows of W, or of its columns for x W, which broadcast to output_shape; exact in either case."""
        along = -1 if self.left or self.weight.dim() == 1 else -2
        peak = magnitude(self.weight, (along,))
        norms = peak * safe_sqrt((self.weight / peak).square().sum(along, keepdim=True))
        return norms.squeeze(0) if self.weight.dim() == 1 or len(self.output_shape) == 1 else norms

    def blocks(self) -> Tensor:
        """Matrices (k, rows, n) whose largest spectral norm is that of the map.

        Where several matrices of W are broadcast over one matrix of x, they act on the same values, and are stacked
        into one taller matrix.
        """
        stack = matrices(self.weight, self.left)
        lead = stack.dim() - 2
        own = self.input_shape[:-2][-lead:] if lead else ()
        shared = [axis for axis, size in enumerate(own) if size == 1]
        apart = [axis for axis in range(lead) if axis not in shared]
        stack = stack.permute(*apart, *shared, -2, -1)
        return stack.reshape(math.prod(stack.shape[: len(apart)]), -1, stack.shape[-1])


def matrices(weight: Tensor, left: bool) -> Tensor:
    """The constant operand as matrices that act on columns of n values.

    Args:
        weight: The constant, of at least one axis.
        left: Whether the constant stands on the left of the product.

    Returns:
        (..., rows, n).
    """
    if weight.dim() == 1:
        return weight.unsqueeze(0)
    return weight if left else weight.mT


def product_adjoint(weight: Tensor, rows: Tensor, left: bool) -> Tensor:
    """Coefficient rows of a product carried to those of its other operand, by the product with the transposed constant.

    Args:
        weight: The constant operand W.
        rows: Coefficients of the product, of its shape with any leading axes.
        left: Whether W stands on the left.

    Returns:
        Coefficients of the other operand; for broadcast operands the caller sums over the repeated axes.
    """
    if weight.dim() == 1:
        outer = rows.unsqueeze(-2 if left else -1)
        return weight.unsqueeze(-1) * outer if left else outer * weight
    return torch.matmul(weight.mT, rows) if left else torch.matmul(rows, weight.mT)
