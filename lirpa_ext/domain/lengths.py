"""Lengths of vectors and products of radii that neither overflow nor underflow on the way.

The square of 1e-30 is 0 in float32, and a radius of 0 for a value that can change is unsound; the square of 1e30 is
infinite, and an infinite radius bounds nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["flat", "length", "stretched"]


def flat(values: Tensor) -> Tensor:
    """Values (B, ...) as (B, n); n is 1 for values (B,)."""
    return values.reshape(len(values), -1)


def length(values: Tensor, dim: int = -1, order: float = 2.0, keepdim: bool = False) -> Tensor:
    """The lp norm along an axis, correct up to rounding for entries of any size; its gradient at 0 is 0.

    Types narrower than float64 are summed in float64, whose range holds the squares of all of their numbers. In
    float64, the largest entry is divided out first.

    Args:
        values: Tensor of any floating-point type.
        dim: The axis, default the last.
        order: p, at least 1, default 2.
        keepdim: Keep the axis, with size 1. Default False.

    Returns:
        The norms, in the type of `values` and its shape without the axis.

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
    """radius * slope, rounded outward where the product over- or underflows or is NaN.

    The result is 0 only where a factor is 0, that is where the set is a point or the function is constant on it. NaN
    becomes infinite, and a positive product that underflows becomes the smallest normal number.

    Args:
        radius: Radii of balls, (B,).
        slope: Lipschitz constants, (B,).

    Returns:
        (B,).
    """
    still = (radius == 0) | (slope == 0)
    product = torch.where(still, 0.0, radius * slope)
    product = torch.where(product.isnan(), math.inf, product)
    return torch.maximum(product, torch.finfo(product.dtype).tiny * (~still).to(product.dtype))
