"""Certificates of spectral norms: upper bounds and their proofs, for each class of linear maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidInputError
from .convolutions import Conv, ConvTranspose
from .linear_maps import Dense, LinearMap, Scale, WeightedMap, safe_sqrt
from .products import Product

__all__ = ["TangentBound", "norm_bound", "normalized", "unit_weight"]

_EPS = torch.finfo(torch.float64).eps
# Limits of maps that are turned into a dense matrix: its smaller side, and its number of entries.
_DENSE_SIDE, _DENSE_ENTRIES = 256, 2**20
# Complex numbers held at once while the maximum over the frequencies of a convolution is taken (32 MB).
_CHUNK = 2**21
# Limits of Gram matrices that are factorized: operations of one attempt (about a second of one core), and entries of
# the matrix that are held at once (128 MB).
_GRAM_OPERATIONS, _GRAM_ENTRIES = 2e10, 2**24
# Relative distances from the estimate at which a factorization is tried, and the most Lanczos steps for one.
_DELTAS, _LANCZOS_STEPS = (1e-6, 1e-5, 1e-4, 1e-3), 300


class TangentBound(NamedTuple):
    """An upper bound on a spectral norm, and a function whose gradient serves as that of the bound.

    Attributes:
        value: The bound.
        tangent: Linear map -> 0-dim tensor, about the norm, differentiable in the weight of the map.
    """

    value: float
    tangent: Callable[[Any], Tensor]


def norm_bound(linear_map: LinearMap) -> TangentBound:
    """The smallest upper bound on the spectral norm that is known for a map, in float64 and rounded outward.

    Schur's test holds for every map; dense maps, products, scalings and convolutions have sharper bounds
    (`lirpa_ext.domain.norms.spectral_norm_bound`).

    Args:
        linear_map: The map A.

    Returns:
        The bound; its tangent takes the scaled map of `unit_weight`.

    Raises:
        InvalidInputError: A has NaN or infinite entries.
    """
    # Tangents keep tensors for later autograd graphs, which cannot hold tensors made in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        unit, scale = unit_weight(linear_map)
        # Rounding: no row or column sum has more terms than the map has inputs and outputs.
        terms = math.prod(unit.input_shape) + math.prod(unit.output_shape)
        schur = TangentBound(float(unit.schur_bound()) * (1 + 2 * terms * _EPS), LinearMap.schur_bound)
        if not math.isfinite(schur.value):
            raise InvalidInputError(
                f"spectral_norm_bound: the {type(linear_map).__name__} of {tuple(linear_map.input_shape)} -> "
                f"{tuple(linear_map.output_shape)} has NaN or infinite entries, hence no norm."
            )
        value, tangent = min([schur, *_sharp(unit)], key=lambda certificate: certificate.value)
    return TangentBound(value and math.nextafter(value * scale, math.inf), tangent)


def unit_weight(linear_map: LinearMap) -> tuple[LinearMap, float]:
    """The map in float64, scaled by a power of 2 so that its largest weight lies in [1, 2).

    The scaling is exact, and squares of the scaled entries neither overflow nor lose anything by underflow.

    Args:
        linear_map: The map A.

    Returns:
        The scaled map, and the factor: A is the factor times the scaled map. The factor is 1 for maps without weight.
    """
    unit = linear_map.double()
    if not isinstance(unit, WeightedMap):
        return unit, 1.0
    peak = float(unit.weight.detach().abs().max())
    scale = math.ldexp(1.0, math.frexp(peak)[1] - 1) if 0 < peak < math.inf else 1.0
    return unit.with_weight(unit.weight / scale), scale


def normalized(x: Tensor) -> Tensor:
    """x / ||x||_2 over all entries, and 0 for 0; the largest entry is divided out first to keep squares in range."""
    peak = x.abs().max()
    x = x / torch.where(peak > 0, peak, 1.0)
    return x / torch.linalg.vector_norm(x).clamp_min(1.0)


@singledispatch
def _sharp(unit: LinearMap) -> list[TangentBound]:
    """Upper bounds on the norm that are specific to the class of the map, beside Schur's test."""
    return []


@_sharp.register
def _(unit: Dense) -> list[TangentBound]:
    return [TangentBound(float(_upper(unit.weight)), lambda dense: _top_singular_value(dense.weight))]


@_sharp.register
def _(unit: Product) -> list[TangentBound]:
    uppers = _upper(unit.blocks())
    winner = int(uppers.argmax())
    return [TangentBound(float(uppers[winner]), lambda product: _top_singular_value(product.blocks()[winner]))]


@_sharp.register
def _(unit: Scale) -> list[TangentBound]:
    def norm(scale: Scale) -> Tensor:
        # A^T A is diagonal, with the sum of the squared factors of each input element.
        ones = torch.ones(1, *scale.input_shape, dtype=scale.dtype, device=scale.device)
        return safe_sqrt(scale.adjoint(scale(ones)).max())

    return [TangentBound(float(norm(unit)) * (1 + (4 + math.prod(unit.output_shape)) * _EPS), norm)]


@_sharp.register
def _(unit: Conv) -> list[TangentBound]:
    sides = math.prod(unit.input_shape), math.prod(unit.output_shape)
    if min(sides) <= _DENSE_SIDE and math.prod(sides) <= _DENSE_ENTRIES:
        return [TangentBound(float(_upper(_matrix(unit))), lambda conv: _top_singular_value(_matrix(conv)))]
    ring = _circulant(unit)
    return [ring, *_factorized(unit, ring.value)]


@_sharp.register
def _(unit: ConvTranspose) -> list[TangentBound]:
    return [_of_adjoint(certificate) for certificate in _sharp(unit.adjoint_conv())]


def _of_adjoint(conv: TangentBound) -> TangentBound:
    return TangentBound(conv.value, lambda transpose: conv.tangent(transpose.adjoint_conv()))


def _circulant(conv: Conv) -> TangentBound:
    """The norm of a circulant map that contains the zero-padded strided convolution.

    On a ring of N >= n + p positions per dimension (p: the padding of one side), a window that reaches beyond the
    data never reads data from the other end. Outputs whose windows start at n + p or later, which have no place on
    the ring, see only padding and are 0. So the matrix of the convolution is, but for rows of zeros, a submatrix of
    the ring's matrix, and its norm is at most as large. With N a multiple of the stride, splitting the input by
    position modulo the stride (polyphase) and a Fourier transform make the ring's matrix block-diagonal. Groups are
    further blocks: the norm is that of the largest block. (Sedghi, Gupta and Long, 2019, extended to strides.)
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
    return TangentBound(top + rounding, lambda m: _top_singular_value(_frequency_blocks(m, winner)[0, group]))


def _polyphase_waves(conv: Conv) -> Tensor:
    """Contribution of each kernel tap to each frequency and phase: (frequencies, phases, taps), complex.

    Weights are real, so that half of the frequencies of the last dimension suffice.
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
    """Diagonal blocks of the ring's matrix: (frequencies, groups, C_out / groups, phases * C_in / groups)."""
    kernels = conv.weight.unflatten(0, (conv.groups, -1)).flatten(3)
    return torch.einsum("frt,goit->fgori", waves, kernels.to(waves.dtype)).flatten(3)


class _Gram:
    """The Gram matrix A A^T or A^T A of a convolution, group by group, with entries in closed form.

    With taps t = (t_1, ..., t_d), A is the sum over t of W_t (x) S_t1 (x) ... (x) S_td, where S of a tap shifts
    positions. So A A^T is the sum over all pairs of taps of W_t W_t'^T (x) the 0-1 matrices S_t S_t'^T. Positions
    further apart than `reach` share no window: in blocks of `rows` positions of the first spatial dimension, the
    matrix is block-tridiagonal.
    """

    def __init__(self, conv: Conv, of_outputs: bool) -> None:
        self.conv, self.of_outputs = conv, of_outputs
        self.shape = conv.output_shape if of_outputs else conv.input_shape
        reach = (conv.extent[0] - 1) // (conv.stride[0] if of_outputs else 1)
        self.rows = min(max(1, reach), self.shape[1])
        self.side = math.prod(self.shape)
        block = self.side // self.shape[1] * self.rows // conv.groups
        taps, channels = math.prod(conv.kernel), self.shape[0] // conv.groups
        self.entries = conv.groups * (block**2 + (taps * channels) ** 2)
        self.operations = 3 * self.side * block**2 + 2 * self.entries * conv.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """The Gram matrix times x, (B, *shape)."""
        return self.conv(self.conv.adjoint(x)) if self.of_outputs else self.conv.adjoint(self.conv(x))

    @cached_property
    def _channels(self) -> Tensor:
        """Products W_t W_t'^T or W_t^T W_t' of all pairs of taps: (groups, *taps, *taps, channels, channels)."""
        kernels = self.conv.weight.unflatten(0, (self.conv.groups, -1)).flatten(3)
        pairs = torch.einsum("gocs,gpct->gstop" if self.of_outputs else "gocs,godt->gstcd", kernels, kernels)
        return pairs.unflatten(2, self.conv.kernel).unflatten(1, self.conv.kernel)

    @cached_property
    def _positions(self) -> list[Tensor]:
        """Products S_t S_t'^T or S_t^T S_t' of all pairs of taps, by spatial dimension: (kernel, kernel, n, n)."""
        pairs, conv = [], self.conv
        for dim, kernel in enumerate(conv.kernel):
            taps, outputs, inputs = (
                torch.arange(n, device=conv.device)
                for n in (kernel, conv.output_shape[1 + dim], conv.input_shape[1 + dim])
            )
            first = outputs * conv.stride[dim] - conv.padding[dim]
            moved = (conv.dilation[dim] * taps[:, None, None] + first[:, None] == inputs).double()
            pairs.append(torch.einsum("sox,tpx->stop" if self.of_outputs else "sxi,txj->stij", moved, moved))
        return pairs

    def block(self, first: int, second: int) -> Tensor:
        """Block of the matrix, for each group, between the blocks of rows that begin at ``first`` and ``second``."""
        here, there = (slice(start, start + self.rows) for start in (first, second))
        block, dims = self._channels, len(self._positions)
        for dim, positions in enumerate(self._positions):
            pairs = positions if dim else positions[:, :, here, there]
            block = torch.tensordot(block, pairs, dims=([1, 1 + dims - dim], [0, 1]))
        # (groups, channels, channels, then n and n of each dimension)
        block = block.permute(0, *range(1, block.dim(), 2), *range(2, block.dim(), 2))
        return block.flatten(2 + dims).flatten(1, 1 + dims)

    def at_most(self, s: float) -> bool:
        """Whether a Cholesky factorization of (s^2 - margin) I - G in floating point proves ||A||_2 <= s.

        If the factorization of a matrix H of side n runs to completion, then lambda_min(H) >= -g tr(H) with g about
        (n + 1) eps / 2, in whatever order sums are taken (Demmel, "On floating point errors in Cholesky", 1989; Rump,
        "Verification of positive definiteness", 2006); tr(H) <= n s^2. Each entry of G is a sum of at most
        t = inputs + outputs products of weights, with an error of at most t eps / 2 times the sum of their magnitudes,
        so that the error of G in norm is at most t eps / 2 times ||A||_1 ||A||_inf. The margin is twice the sum of
        both errors, plus 8 eps s^2 for the diagonal.

        The error model does not cover fast algorithms (Winograd, Strassen), which no float64 backend uses.
        """
        terms = math.prod(self.conv.input_shape) + math.prod(self.conv.output_shape)
        schur = float(self.conv.schur_bound())
        margin = _EPS * ((self.side * (self.side + 4) + 8) * s**2 + (terms + 4) * schur**2)
        factor = None
        for start in range(0, self.shape[1], self.rows):
            pivot = -self.block(start, start)
            pivot.diagonal(dim1=-2, dim2=-1).add_(s**2 - margin)
            if factor is not None:
                beside = torch.linalg.solve_triangular(factor, self.block(start - self.rows, start), upper=False)
                pivot -= beside.mT @ beside
            factor, info = torch.linalg.cholesky_ex(pivot)
            if bool(info.any()) or not bool(factor.isfinite().all()):
                return False
        return True

    def top(self) -> tuple[float, Tensor]:
        """Estimates, never certificates, of the largest eigenvalue and its unit eigenvector (1, *shape), by Lanczos."""
        steps = min(_LANCZOS_STEPS, self.side)
        start = torch.randn(self.side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        basis = start.new_zeros(steps + 1, self.side, device=self.conv.device)
        basis[0] = normalized(start)
        projected = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)
        for step in range(1, steps + 1):
            ahead, known = self(basis[step - 1].view(1, *self.shape)).flatten(), basis[:step]
            projected[step - 1, step - 1] = ahead @ basis[step - 1]
            for _ in range(2):  # twice, since rounding leaves a part after the first orthogonalization
                ahead = ahead - (known @ ahead) @ known
            rest = float(torch.linalg.vector_norm(ahead))
            last = step == steps or rest <= _EPS * float(projected.diagonal().max())
            if last or step % 20 == 0:
                eigen = torch.linalg.eigh(projected[:step, :step])
                top, ritz = float(eigen.eigenvalues[-1]), eigen.eigenvectors[:, -1]
                # The eigenvalue's error is this residual squared over the spectral gap, far below the first of _DELTAS.
                if last or rest * abs(float(ritz[-1])) <= 2e-6 * top:
                    break
            projected[step, step - 1] = projected[step - 1, step] = rest
            basis[step] = ahead / rest
        return top, normalized(ritz.to(known.device) @ known).view(1, *self.shape)


def _factorized(conv: Conv, ceiling: float) -> list[TangentBound]:
    """The norm up to 1e-6, or up to a later one of `_DELTAS`, if a Gram matrix of the map is cheap to factorize."""
    gram = min((_Gram(conv, True), _Gram(conv, False)), key=lambda candidate: candidate.operations)
    if gram.operations > _GRAM_OPERATIONS or gram.entries > _GRAM_ENTRIES:
        return []
    square, top = gram.top()
    right = normalized(conv.adjoint(top)) if gram.of_outputs else top
    left = normalized(conv(right))
    for delta in _DELTAS:
        s = math.sqrt(max(square, 0.0)) * (1 + delta)
        if not 0 < s < ceiling:
            break
        if gram.at_most(s):
            return [TangentBound(s, lambda m: (left * m(right)).sum())]
    return []


def _matrix(linear_map: LinearMap) -> Tensor:
    """The matrix of A, or of A^T if that takes fewer applications of the map."""
    inputs, outputs = math.prod(linear_map.input_shape), math.prod(linear_map.output_shape)
    basis = torch.eye(min(inputs, outputs), dtype=linear_map.dtype, device=linear_map.device)
    if inputs <= outputs:
        return linear_map(basis.view(-1, *linear_map.input_shape)).flatten(1)
    return linear_map.adjoint(basis.view(-1, *linear_map.output_shape)).flatten(1)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mH


def _upper(matrix: Tensor) -> Tensor:
    """Upper bound of the largest singular value of each matrix (..., m, n), by the smaller Gram matrix.

    Forming G = M M^H has an error of about (m + n) eps tr(G), its eigenvalues one of a small multiple of m eps ||G||.
    The margin of 8 (m + n) eps tr(G) is a heuristic, many times larger than both.
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
        right = normalized(wide.mH @ left)
    return (left.conj() @ (wide @ right)).real
