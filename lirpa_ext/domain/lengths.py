"""Lengths of vectors and products of radii that neither overflow nor underflow on the way.

A square of 1e-30 is 0 in float32, and a radius that is 0 although something moves is a false bound; a square of 1e30
is infinite, and an infinite radius bounds nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["flat", "length", "stretched"]


def flat(values: Tensor) -> Tensor:
    """Values (B, ...) as (B, n); n is 1 for a scalar a sample."""
    return values.reshape(len(values), -1)


def length(values: Tensor, dim: int = -1, order: float = 2.0, keepdim: bool = False) -> Tensor:
    """The lp norm along an axis, right to rounding for entries of any size; its gradient at 0 is 0.

    Narrower types are summed in float64, whose range holds the squares of all of their numbers. Of float64 the largest
    entry is divided out first.

    Args:
        values: Of any floating-point type.
        dim: The axis.
        order: p, at least 1.
        keepdim: Keep the axis, with size 1.

    >>> length(torch.tensor([3e-30, 4e-30])), length(torch.tensor([3e30, 4e30]))
    (tensor(5.0000e-30), tensor(5.0000e+30))
    """
    if order == math.inf:
        return torch.linalg.vector_norm(values, order, dim, keepdim)
    if values.dtype != torch.float64:
        return torch.linalg.vector_norm(values, order, dim, keepdim, dtype=torch.float64).to(values.dtype)
    peak = values.detach().abs().amax(dim, keepdim=True)
    peak = torch.where((peak > 0) & (peak < math.inf), peak, 1.0)
    norm = torch.linalg.vector_norm(values / peak, order, dim, keepdim=True) * peak
    return norm if keepdim else norm.squeeze(dim)


def stretched(radius: Tensor, slope: Tensor) -> Tensor:
    """radius * slope, (B,), rounded outward at the ends of what numbers there are.

    0 only where one of them is 0: there a set is a point, or the function constant on it. What is no number is
    infinite, and a positive product that underflows is the smallest normal number.
    """
    still = (radius == 0) | (slope == 0)
    product = torch.where(still, 0.0, radius * slope)
    product = torch.where(product.isnan(), math.inf, product)
    return torch.maximum(product, torch.finfo(product.dtype).tiny * (~still).to(product.dtype))
