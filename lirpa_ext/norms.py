"""Spectral norms of linear maps: estimates (power iteration) and upper bounds, two types that do not mix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lirpa_ext.errors import InvalidInputError
from lirpa_ext.linear_maps import Conv, ConvTranspose, Dense, LinearMap, Scale, WeightedMap, safe_sqrt

__all__ = ["NormBound", "NormCache", "NormEstimate", "PowerIteration", "spectral_norm_bound"]

_EPS = torch.finfo(torch.float64).eps
# Maps up to this size are materialized: their smaller side, and their number of entries.
_DENSE_SIDE, _DENSE_ENTRIES = 256, 2**20
# Complex numbers held at once while the frequencies of a convolution are looked through (32 MB).
_CHUNK = 2**21


@dataclass(frozen=True, eq=False)
class NormEstimate:
    """A lower estimate of a spectral norm: never a certificate.

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

    The smaller of sqrt(||A||_1 ||A||_inf) and what is known of the kind of map: the exact norm of dense maps,
    scalings and small maps; for convolutions, transposed or not, the norm of a circulant map that contains A
    (Sedghi, Gupta and Long, "The singular values of convolutional layers", 2019, here with any stride).

    Args:
        linear_map: the map A.

    Returns:
        The bound, in the map's dtype and on its device. Its gradient is that of what attains it, mostly a
        singular value; of several equal ones, of one.

    Raises:
        InvalidInputError: the weight holds NaN or infinite values.

    >>> spectral_norm_bound(Dense(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))).value.round(decimals=5)
    tensor(4.)
    """
    return _norm_bound(_certify(linear_map), linear_map)


class NormCache:
    """Norm bounds by key, each valid while the map's geometry and the content of its weight stay.

    Contents are compared, not version counters, which changes through ``.data`` do not raise.

    >>> cache, weight = NormCache(), torch.eye(2)
    >>> first = cache.bound("layer", Dense(weight)).value
    >>> weight.data.mul_(2)
    tensor([[2., 0.],
            [0., 2.]])
    >>> bool(cache.bound("layer", Dense(weight)).value > first)
    True
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[WeightedMap, _Certificate]] = {}

    def bound(self, key: str, linear_map: LinearMap) -> NormBound:
        """`spectral_norm_bound`, remembered under ``key``; it carries a gradient on a hit, too.

        Args:
            key: name of the node.
            linear_map: its map; one without weight is bounded anew, which is cheap.

        Returns:
            The bound.

        Raises:
            InvalidInputError: the weight holds NaN or infinite values.
        """
        if not isinstance(linear_map, WeightedMap):
            return spectral_norm_bound(linear_map)
        known, certificate = self._entries.get(key, (None, None))
        if certificate is None or known is None or not _same(known, linear_map):
            certificate = _certify(linear_map)
            copy = linear_map.with_weight(linear_map.weight.detach().clone())
            self._entries[key] = copy, certificate
        return _norm_bound(certificate, linear_map)

    def clear(self) -> None:
        """Forget every bound."""
        self._entries.clear()


class PowerIteration(nn.Module):
    """Persistent power iteration: the vector u survives between calls and in the state dict.

    Args:
        linear_map: a map of the geometry that will be iterated on.
        generator: source of the start. Default: one of its own, of fixed seed; never the global one.

    >>> dense = Dense(torch.diag(torch.tensor([3.0, 1.0])))
    >>> PowerIteration(dense).converge(dense).value.round(decimals=4)
    tensor(3.)
    """

    u: Tensor

    def __init__(self, linear_map: LinearMap, generator: torch.Generator | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        start = torch.randn(
            1, *linear_map.input_shape, dtype=torch.float64, generator=generator, device=generator.device
        )
        self.register_buffer("u", _unit(start).to(linear_map.device, linear_map.dtype))

    def forward(self, linear_map: LinearMap, steps: int) -> NormEstimate:
        """||A u|| for the unit vector u, a lower estimate of ||A||_2.

        Args:
            linear_map: the map A.
            steps: power steps u <- A^T A u / ||A^T A u|| to take first; in eval mode none is taken.

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
            The estimate, as `forward` gives it: still a lower one.

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
        return NormEstimate((_unit(image.detach()) * image).sum())

    @torch.no_grad()
    def _step(self, linear_map: LinearMap, steps: int) -> None:
        u = self._direction(linear_map)
        for _ in range(steps):
            ahead = _unit(linear_map.adjoint(_unit(linear_map(u))))
            # There is no direction to follow where A u is 0, and NaN weights must not spoil u for good.
            u = torch.where(ahead.any() & ahead.isfinite().all(), ahead, u)
        self.u.copy_(u)

    def _direction(self, linear_map: LinearMap) -> Tensor:
        """u for this map; a copy, since graphs keep it and later calls overwrite the buffer."""
        if self.u.shape[1:] != linear_map.input_shape:
            raise InvalidInputError(
                f"PowerIteration: made for inputs of shape {tuple(self.u.shape[1:])}, got a map of inputs of "
                f"shape {tuple(linear_map.input_shape)}. Make a new PowerIteration for it."
            )
        return self.u.to(linear_map.device, linear_map.dtype, copy=True)


class _Certificate(NamedTuple):
    """An upper bound and a function of the map that has the gradient which the bound should have."""

    value: float
    tangent: Callable[[Any], Tensor]


def _certify(linear_map: LinearMap) -> _Certificate:
    # What tangents keep serves in later graphs, also when the bound was first asked for in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        unit, scale = _unit_weight(linear_map)
        # Rounding: no row or column sum has more terms than the map has inputs and outputs.
        terms = math.prod(unit.input_shape) + math.prod(unit.output_shape)
        schur = _Certificate(float(unit.schur_bound()) * (1 + 2 * terms * _EPS), LinearMap.schur_bound)
        if not math.isfinite(schur.value):
            raise InvalidInputError(
                f"spectral_norm_bound: the {type(linear_map).__name__} of {tuple(linear_map.input_shape)} -> "
                f"{tuple(linear_map.output_shape)} has NaN or infinite entries, hence no norm."
            )
        value, tangent = min([schur, *_sharp(unit)], key=lambda certificate: certificate.value)
    return _Certificate(value and math.nextafter(value * scale, math.inf), tangent)


def _norm_bound(certificate: _Certificate, linear_map: LinearMap) -> NormBound:
    exact = torch.tensor(certificate.value, dtype=torch.float64, device=linear_map.device)
    value = exact.to(linear_map.dtype)
    if value < exact:
        value = value.nextafter(torch.full_like(value, math.inf))
    weight = linear_map.weight
    if torch.is_grad_enabled() and weight is not None and weight.requires_grad:
        unit, scale = _unit_weight(linear_map)
        singular_value = (certificate.tangent(unit) * scale).to(value.dtype)
        value = value + (singular_value - singular_value.detach())
    return NormBound(value)


def _unit_weight(linear_map: LinearMap) -> tuple[LinearMap, float]:
    """The map in float64 with its largest weight in [1, 2), and the factor, a power of 2, that was taken out.

    Taking it out is exact, and squares of the entries then neither overflow nor underflow to any effect.
    """
    unit = linear_map.double()
    if not isinstance(unit, WeightedMap):
        return unit, 1.0
    peak = float(unit.weight.detach().abs().max())
    scale = math.ldexp(1.0, math.frexp(peak)[1] - 1) if 0 < peak < math.inf else 1.0
    return unit.with_weight(unit.weight / scale), scale


def _same(known: WeightedMap, other: WeightedMap) -> bool:
    return (
        known.geometry == other.geometry
        and (known.dtype, known.device) == (other.dtype, other.device)
        and torch.equal(known.weight, other.weight)
    )


def _unit(x: Tensor) -> Tensor:
    """x / ||x||, and 0 for 0; the largest entry is divided out first, so that squares do not underflow."""
    peak = x.abs().max()
    x = x / torch.where(peak > 0, peak, 1.0)
    return x / torch.linalg.vector_norm(x).clamp_min(1.0)


@singledispatch
def _sharp(unit: LinearMap) -> list[_Certificate]:
    """What the kind of map tells about its norm beside Schur's test."""
    return []


@_sharp.register
def _(unit: Dense) -> list[_Certificate]:
    return [_Certificate(float(_upper(unit.weight)), lambda dense: _top_singular_value(dense.weight))]


@_sharp.register
def _(unit: Scale) -> list[_Certificate]:
    def norm(scale: Scale) -> Tensor:
        # A^T A is diagonal: the squares of the factors that each input element meets, summed.
        ones = torch.ones(1, *scale.input_shape, dtype=scale.dtype, device=scale.device)
        return safe_sqrt(scale.adjoint(scale(ones)).max())

    return [_Certificate(float(norm(unit)) * (1 + (4 + math.prod(unit.output_shape)) * _EPS), norm)]


@_sharp.register
def _(unit: Conv) -> list[_Certificate]:
    sides = math.prod(unit.input_shape), math.prod(unit.output_shape)
    if min(sides) <= _DENSE_SIDE and math.prod(sides) <= _DENSE_ENTRIES:
        return [_Certificate(float(_upper(_matrix(unit))), lambda conv: _top_singular_value(_matrix(conv)))]
    return [_circulant(unit)]


@_sharp.register
def _(unit: ConvTranspose) -> list[_Certificate]:
    (conv,) = _sharp(unit.adjoint_conv())
    return [_Certificate(conv.value, lambda transpose: conv.tangent(transpose.adjoint_conv()))]


def _circulant(conv: Conv) -> _Certificate:
    """The norm of a circulant map that contains the zero-padded strided convolution.

    On a ring of N >= n + p positions per dimension (p: the padding of one side), what a window reads beyond
    the data is never data from the other end. Outputs that the ring has no place for start at n + p or later,
    see only padding and are 0. So the matrix of the convolution is, but for rows of zeros, a submatrix of the
    ring's, and its norm at most as large. With N a multiple of the stride, splitting the input by position
    modulo the stride (polyphase) and a Fourier transform make the ring's matrix block-diagonal. Groups are
    further blocks: the norm is that of the largest.
    """
    waves = _polyphase_waves(conv)
    block_size = math.prod(conv.weight.shape[:2]) * waves.shape[1]
    top, winner, group = -1.0, waves[:1], 0
    for chunk in waves.split(max(1, _CHUNK // block_size)):
        uppers = _upper(_frequency_blocks(conv, chunk))  # (frequencies, groups)
        position, candidate = divmod(int(uppers.argmax()), conv.groups)
        if float(uppers.max()) > top:
            top, winner, group = float(uppers.max()), chunk[position : position + 1].clone(), candidate
    taps = waves.shape[2]
    rounding = (taps + 8) * math.sqrt(taps) * _EPS * float(torch.linalg.vector_norm(conv.weight))
    return _Certificate(top + rounding, lambda m: _top_singular_value(_frequency_blocks(m, winner)[0, group]))


def _polyphase_waves(conv: Conv) -> Tensor:
    """What each tap contributes to each frequency and phase: (frequencies, phases, taps), complex.

    Weights are real, so half of the frequencies of the last dimension stand for the other half.
    """
    waves = torch.ones(1, 1, 1, dtype=torch.complex128, device=conv.device)
    for dim, step in enumerate(conv.stride):
        length = -(-(conv.input_shape[dim + 1] + conv.padding[dim]) // step)
        last = dim == len(conv.stride) - 1
        frequency = torch.arange(length // 2 + 1 if last else length, device=conv.device)
        tap = conv.dilation[dim] * torch.arange(conv.kernel[dim], device=conv.device)
        angle = 2 * math.pi / length * (frequency[:, None] * (tap // step) % length).double()
        in_phase = tap % step == torch.arange(step, device=conv.device)[:, None]
        waves = torch.kron(waves, torch.polar(torch.ones_like(angle), angle)[:, None] * in_phase)
    return waves


def _frequency_blocks(conv: Conv, waves: Tensor) -> Tensor:
    """(frequencies, groups, C_out / groups, phases * C_in / groups)."""
    kernels = conv.weight.unflatten(0, (conv.groups, -1)).flatten(3)
    return torch.einsum("frt,goit->fgori", waves, kernels.to(waves.dtype)).flatten(3)


def _matrix(linear_map: LinearMap) -> Tensor:
    """A, or A^T where that takes fewer applications."""
    inputs, outputs = math.prod(linear_map.input_shape), math.prod(linear_map.output_shape)
    basis = torch.eye(min(inputs, outputs), dtype=linear_map.dtype, device=linear_map.device)
    if inputs <= outputs:
        return linear_map(basis.view(-1, *linear_map.input_shape)).flatten(1)
    return linear_map.adjoint(basis.view(-1, *linear_map.output_shape)).flatten(1)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mH


def _upper(matrix: Tensor) -> Tensor:
    """Upper bound of the largest singular value of each matrix (..., m, n), by the smaller Gram matrix.

    Forming G = M M^H errs by (m + n) eps tr(G) or so, its eigenvalues by a small multiple of m eps ||G||. The
    margin of 8 (m + n) eps tr(G) is a heuristic that holds both many times over.
    """
    wide = _wide(matrix)
    gram = wide @ wide.mH
    margin = 8 * sum(matrix.shape[-2:]) * _EPS * gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    return (torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0) + margin).sqrt()


def _top_singular_value(matrix: Tensor) -> Tensor:
    """sigma = Re(u^H M v), the top singular vectors held fixed: its gradient Re(u v^H) is that of sigma."""
    wide = _wide(matrix)
    with torch.no_grad():
        left = torch.linalg.eigh(wide @ wide.mH).eigenvectors[:, -1]
        right = _unit(wide.mH @ left)
    return (left.conj() @ (wide @ right)).real
