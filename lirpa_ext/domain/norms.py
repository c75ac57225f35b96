"""Spectral norms of linear maps: estimates (power iteration) and upper bounds, two types that do not mix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from .linear_maps import LinearMap, WeightedMap
from .norm_bounds import TangentBound, norm_bound, normalized, unit_weight

__all__ = ["NormBound", "NormCache", "NormEstimate", "PowerIteration", "key_of", "spectral_norm_bound"]


@dataclass(frozen=True, eq=False)
class NormEstimate:
    """A lower estimate of a spectral norm, which is never a found.

    Attributes:
        value: 0-dim, <= ||A||_2 up to rounding.
    """

    value: Tensor


@dataclass(frozen=True, eq=False)
class NormBound:
    """An upper bound of a spectral norm.

    Attributes:
        value: 0-dim, >= ||A||_2, rounded outward.
    """

    value: Tensor


def spectral_norm_bound(linear_map: LinearMap) -> NormBound:
    """A sound upper bound of ||A||_2, computed in float64 and rounded outward.

    The smaller of sqrt(||A||_1 ||A||_inf) and a bound for the class of the map: the exact norm of dense maps, scalings
    and small maps; for convolutions, transposed or not, the norm of a circulant map that contains A (Sedghi, Gupta and
    Long, "The singular values of convolutional layers", 2019, here with any stride), and where this is cheap the norm
    up to 1e-6, proved by a Cholesky factorization.

    Args:
        linear_map: the map A.

    Returns:
        The bound, 0-dim, in the map's dtype and on its device. Its gradient is that of the quantity that gives the
        bound, mostly the largest singular value; of several equal ones, one is taken.

    Raises:
        InvalidInputError: the weight holds NaN or infinite values.

    >>> from .linear_maps import Dense
    >>> spectral_norm_bound(Dense(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))).value.round(decimals=5)
    tensor(4.)
    """
    return _norm_bound(norm_bound(linear_map), linear_map)


def key_of(name: str, linear_map: LinearMap, known: dict[str, object]) -> str:
    """Key under which the norm of a map is kept: the name of its weight, made unique for each geometry.

    One weight may be used by maps of several sizes or strides, or as both W and its transpose, and each map has a norm
    of its own. The first geometry gets the name itself, others the name with the input's shape appended.

    Args:
        name: Name of the weight.
        linear_map: The map.
        known: Geometry by key, of the maps met so far; this map is added.

    Returns:
        The key.

    >>> from .linear_maps import Dense
    >>> known, weight = {}, torch.eye(3)
    >>> [key_of("w", Dense(weight, lead), known) for lead in ((), (5,), ())]
    ['w', 'w@5x3', 'w']
    """
    shape = "x".join(str(size) for size in linear_map.input_shape)
    key, geometry, count = name, _geometry(linear_map), 1
    while known.setdefault(key, geometry) != geometry:
        key, count = f"{name}@{shape}" if count == 1 else f"{name}@{shape}-{count}", count + 1
    return key


class NormCache:
    """Norm bounds by key, each valid while the geometry of the map and the values of its weight stay the same.

    The values are compared, not torch's version counters, which do not count changes through ``.data``.

    >>> from .linear_maps import Dense
    >>> cache, weight = NormCache(), torch.eye(2)
    >>> first = cache.bound("layer", Dense(weight)).value
    >>> weight.data.mul_(2)
    tensor([[2., 0.],
            [0., 2.]])
    >>> bool(cache.bound("layer", Dense(weight)).value > first)
    True
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[WeightedMap, TangentBound]] = {}

    def bound(self, key: str, linear_map: LinearMap) -> NormBound:
        """`spectral_norm_bound`, remembered under ``key``; a remembered bound has a gradient too.

        Args:
            key: name of the weight or node (`key_of`).
            linear_map: the map; maps without weight are bounded anew at each call, which is cheap.

        Returns:
            The bound, 0-dim.

        Raises:
            InvalidInputError: the weight holds NaN or infinite values.
        """
        if not isinstance(linear_map, WeightedMap):
            return spectral_norm_bound(linear_map)
        known, found = self._entries.get(key, (None, None))
        if found is None or known is None or not _same(known, linear_map):
            found = norm_bound(linear_map)
            copy = linear_map.with_weight(linear_map.weight.detach().clone())
            self._entries[key] = copy, found
        return _norm_bound(found, linear_map)

    def clear(self) -> None:
        """Forget every bound."""
        self._entries.clear()


class PowerIteration(nn.Module):
    """Persistent power iteration for spectral norms: its vector u is kept between calls and in the state dict.

    Args:
        linear_map: a map of the geometry that will be iterated on.
        generator: source of the random start. Default: a new generator with a fixed seed.

    Attributes:
        u: unit vector, (1, ...), of the shape of one input.

    >>> from .linear_maps import Dense
    >>> dense = Dense(torch.diag(torch.tensor([3.0, 1.0])))
    >>> PowerIteration(dense).converge(dense).value.round(decimals=4)
    tensor(3.)
    """

    u: Tensor

    def __init__(self, linear_map: LinearMap, generator: torch.Generator | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.geometry = _geometry(linear_map)
        start = torch.randn(
            1, *linear_map.input_shape, dtype=torch.float64, generator=generator, device=generator.device
        )
        self.register_buffer("u", normalized(start).to(linear_map.device, linear_map.dtype))

    def forward(self, linear_map: LinearMap, steps: int) -> NormEstimate:
        """||A u|| for the unit vector u, a lower estimate of ||A||_2.

        Args:
            linear_map: the map A.
            steps: number of power steps u <- A^T A u / ||A^T A u|| to take first; in eval mode none is taken.

        Returns:
            The estimate. Its gradient is that of v^T A u with u and v = A u / ||A u|| held fixed.

        Raises:
            InvalidInputError: the map's input shape is not that of u.
        """
        if self.training:
            self._step(linear_map, steps)
        return self._estimate(linear_map)

    def converge(self, linear_map: LinearMap, tol: float = 1e-6, max_steps: int = 1000) -> NormEstimate:
        """Iterate, in either mode, until a step changes the estimate by no more than ``tol``, relatively.

        Args:
            linear_map: the map A.
            tol: relative change at which to stop. Default 1e-6.
            max_steps: most steps to take. Default 1000.

        Returns:
            The estimate, as `forward` returns it: still a lower estimate.

        Raises:
            InvalidInputError: the map's input shape is not that of u.
        """
        previous = -math.inf
        for _ in range(max_steps):
            self._step(linear_map, 1)
            current = float(self._estimate(linear_map).value.detach())
            if abs(current - previous) <= tol * current:
                break
            previous = current
        return self._estimate(linear_map)

    def _estimate(self, linear_map: LinearMap) -> NormEstimate:
        image = linear_map(self._direction(linear_map))
        return NormEstimate((normalized(image.detach()) * image).sum())

    @torch.no_grad()
    def _step(self, linear_map: LinearMap, steps: int) -> None:
        u = self._direction(linear_map)
        for _ in range(steps):
            ahead = normalized(linear_map.adjoint(normalized(linear_map(u))))
            # u stays as it is where A u = 0, which gives no direction, and for NaN weights, which would make u NaN.
            u = torch.where(ahead.any() & ahead.isfinite().all(), ahead, u)
        self.u.copy_(u)

    def _direction(self, linear_map: LinearMap) -> Tensor:
        """u in the map's dtype and on its device, as a copy: graphs keep u, and later calls overwrite the buffer."""
        if self.u.shape[1:] != linear_map.input_shape:
            raise InvalidInputError(
                f"PowerIteration: made for inputs of shape {tuple(self.u.shape[1:])}, got a map of inputs of "
                f"shape {tuple(linear_map.input_shape)}. Make a new PowerIteration for it."
            )
        return self.u.to(linear_map.device, linear_map.dtype, copy=True)


def _geometry(linear_map: LinearMap) -> object:
    """Everything that defines a map except for the values of its weight; strides tell a weight from its transpose."""
    if not isinstance(linear_map, WeightedMap):
        return linear_map.input_shape
    return *linear_map.geometry, linear_map.weight.stride()


def _norm_bound(found: TangentBound, linear_map: LinearMap) -> NormBound:
    exact = torch.tensor(found.value, dtype=torch.float64, device=linear_map.device)
    value = exact.to(linear_map.dtype)
    if value < exact:
        value = value.nextafter(torch.full_like(value, math.inf))
    weight = linear_map.weight
    if torch.is_grad_enabled() and weight is not None and weight.requires_grad:
        unit, scale = unit_weight(linear_map)
        singular_value = (found.tangent(unit) * scale).to(value.dtype)
        value = value + (singular_value - singular_value.detach())
    return NormBound(value)


def _same(known: WeightedMap, other: WeightedMap) -> bool:
    return (
        known.geometry == other.geometry
        and (known.dtype, known.device) == (other.dtype, other.device)
        and torch.equal(known.weight, other.weight)
    )
