"""The goal of verifying a case, as rows to bound from below, and the lower bounds of these rows."""

from __future__ import annotations

import contextlib
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from ..domain.perturbation import PerturbationLpNorm
from ..engine import OPTIMIZED_METHODS, BoundedTensor
from ..errors import InvalidInputError
from ..module.bounded_module import BoundedModule
from .vnnlib import Case
from .vnnlib_terms import neighbours

_ROUNDING = 64  # units in the last place subtracted from a bound for the rounding of the last steps
_MOST_ROWS = 1024  # rows bounded in one pass


class Goal:
    """The distinct rows of a case's polytopes, and the polytopes in terms of them.

    A polytope {y : rows @ y <= limits} is out of reach if the minimum of one of its rows is above the row's limit.

    Args:
        case: The case.

    Attributes:
        rows: Distinct rows, (U, outputs).
        members: For each of the D polytopes, the indices of its rows.
        limits: For each polytope, the limits of its rows, rounded up.
    """

    def __init__(self, case: Case) -> None:
        self.rows, inverse = np.unique(np.concatenate([p.rows for p in case.unsafe]), axis=0, return_inverse=True)
        ends = list(accumulate(len(p.limits) for p in case.unsafe))
        self.members = np.split(inverse.reshape(-1), ends[:-1])
        self.limits = [np.array([neighbours(limit)[1] for limit in p.limits]) for p in case.unsafe]

    def margins(self, lower: np.ndarray) -> np.ndarray:
        """Margin of each polytope: the maximum over its rows of (lower bound of a.y) - b.

        Args:
            lower: Lower bounds of the rows, (..., U).

        Returns:
            Margins, (..., D); a polytope with positive margin is out of reach.
        """
        return np.stack(
            [(lower[..., rows] - limit).max(-1) for rows, limit in zip(self.members, self.limits, strict=True)], -1
        )

    def values(self, outputs: Tensor) -> np.ndarray:
        """Values of the rows at outputs (..., outputs), float64, (..., U); NaN where an output is not finite."""
        y = outputs.numpy()
        finite = np.isfinite(y).all(-1, keepdims=True)
        return np.where(finite, np.where(finite, y, 0.0) @ self.rows.T, np.nan)

    def name(self, row: int) -> str:
        """A row as text, such as ``Y_0 -2*Y_1``, for messages."""
        terms = [(value, f"Y_{i}") for i, value in enumerate(self.rows[row].tolist()) if value]
        if len(terms) > 4:
            return f"a row of {len(terms)} outputs"
        words = [
            ("-" if value < 0 else "+") + (name if abs(value) == 1 else f"{abs(value):g}*{name}")
            for value, name in terms
        ]
        return " ".join(words).removeprefix("+") or "0"

    def open_rows(self, lower: np.ndarray) -> np.ndarray:
        """Indices of the rows of all polytopes that lower bounds (U,) do not show to be out of reach."""
        margins = self.margins(lower)
        return np.unique(
            np.concatenate([rows for rows, margin in zip(self.members, margins, strict=True) if not margin > 0])
        )

    def weakest(self, lower: np.ndarray) -> np.ndarray:
        """The decisive row of each of B boxes.

        It is the row of largest margin of the polytope of least margin: the polytope is out of reach as soon as the
        row's bound is above its limit.

        Args:
            lower: Lower bounds of the rows, (B, U).

        Returns:
            Indices of rows, (B,).
        """
        polytope = self.margins(lower).argmin(-1)
        return np.array(
            [
                self.members[d][(one[self.members[d]] - self.limits[d]).argmax()]
                for one, d in zip(lower, polytope, strict=True)
            ]
        )


class Bounder:
    """Lower bounds of rows times outputs over boxes of inputs.

    Args:
        network: Function ``(B, *input_shape)`` -> (B, outputs), in `dtype`.
        input_shape: Shape of one sample.
        dtype: torch.float64 or torch.float32.
        batched: Whether the network takes several samples at once.
    """

    def __init__(self, network: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype, batched: bool) -> None:
        self.network, self.input_shape, self.dtype, self.batched = network, input_shape, dtype, batched
        self._graphs: dict[int, BoundedModule] = {}

    def lower(self, method: str, lower: np.ndarray, upper: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Lower bounds of rows @ f(x) over boxes.

        A few units in the last place of the largest term are subtracted for the rounding of the last steps; the
        rounding inside of the network is left to the method.

        Args:
            method: A method of `BoundedModule.compute_bounds`.
            lower: Lower ends of the boxes, (B, inputs).
            upper: Upper ends of the boxes, (B, inputs).
            rows: Rows, (S, outputs), float64.

        Returns:
            Lower bounds, (B, S), float64; -inf where the bound is not finite.

        Raises:
            InvalidInputError: float32 does not represent a coefficient of a row.
        """
        batch = len(lower)
        if not self.batched and batch > 1:
            return np.concatenate([self.lower(method, lower[i, None], upper[i, None], rows) for i in range(batch)])
        size = 1 << (batch - 1).bit_length()  # a graph is for one batch size, so sizes are rounded up to powers of 2
        index = np.minimum(np.arange(size), batch - 1)
        x_L, x_U = self._outward(lower[index]), self._outward(upper[index], up=True)
        center = torch.minimum(torch.maximum(x_L + (x_U - x_L) / 2, x_L), x_U)
        x = BoundedTensor(center, PerturbationLpNorm(x_L=x_L, x_U=x_U))
        C = torch.from_numpy(rows).to(self.dtype)
        if not torch.equal(C.double(), torch.from_numpy(rows)):
            raise InvalidInputError("the property has coefficients that float32 does not hold; use float64")
        try:
            if size not in self._graphs:
                self._graphs[size] = BoundedModule(self.network, center)
            found = [self._bound(self._graphs[size], method, x, part) for part in C.split(_MOST_ROWS)]
            with torch.no_grad():
                scale = self.network(center).abs() @ C.abs().T
        except BaseException:
            self._graphs.pop(size, None)  # a graph that failed half-way may hold anything
            raise
        bound = torch.cat(found, dim=1)
        slack = _ROUNDING * torch.finfo(self.dtype).eps * (scale + bound.abs())
        result = (bound - slack).double().numpy()[:batch]
        return np.where(np.isfinite(result), result, -np.inf)

    def _bound(self, graph: BoundedModule, method: str, x: Tensor, rows: Tensor) -> Tensor:
        optimized = method.lower() in OPTIMIZED_METHODS
        with contextlib.nullcontext() if optimized else torch.no_grad():
            bound, _ = graph.compute_bounds(
                x=(x,), C=rows.expand(len(x), -1, -1).contiguous(), method=method, bound_upper=False
            )
        return bound.detach()

    def _outward(self, ends: np.ndarray, up: bool = False) -> Tensor:
        """Ends (B, inputs) of boxes in the network's dtype and shape, rounded down, or up if `up`."""
        exact = torch.from_numpy(ends)
        cast = exact.to(self.dtype)
        away = torch.full_like(cast, torch.inf if up else -torch.inf)
        inside = cast.double() < exact if up else cast.double() > exact
        return torch.where(inside, torch.nextafter(cast, away), cast).view(-1, *self.input_shape)
