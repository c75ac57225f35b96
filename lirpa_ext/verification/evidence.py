"""Evidence about a case of a property: bounds claimed by methods, and values at points that could refute them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..module import guard
from .goals import Goal
from .vnnlib import Case


@dataclass(frozen=True, eq=False)
class Claim:
    """Bounds on a case by one method.

    Attributes:
        method: Name of the method, or "split" for branch and bound.
        sources: Names, in lower case, of all methods whose bounds the claim uses.
        lower: Lower bounds of the goal's rows, (U,); -inf for a row without bound.
        margin: Lower bound of the case's margin, for a claim of "split"; -inf otherwise.
    """

    method: str
    sources: frozenset[str]
    lower: np.ndarray
    margin: float = -math.inf


class Evidence:
    """Claims about a case, and values of the network at points of its box.

    Args:
        case: The case.
        dtype: torch dtype in which the bounds are computed.

    Attributes:
        goal: The rows of the case's polytopes.
        claims: Claims of methods that no point has refuted, in the order in which they were made.
        lower: Best lower bounds of the goal's rows over all claims, (U,).
        margin: Margin of the case: the lower bound by the claims, or the least margin of a point if that is smaller.
        method: Method whose claim made the margin positive, or "".
        least: Least value of each row at the points so far, (U,); NaN once a value was not finite.
        worst: Least margin of the points so far; a point without positive margin is unsafe.
        noise: Scale of the rounding errors (`guard.noise`) at the points so far.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.goal, self.dtype = Goal(case), dtype
        self.claims: list[Claim] = []
        self.margin = -math.inf
        rows = len(self.goal.rows)
        self.least, self.worst, self.noise = np.full(rows, np.inf), math.inf, 0.0
        self._weights = np.abs(self.goal.rows).sum(1)
        self._weigh()

    @property
    def finite(self) -> bool:
        """Whether the network gave a finite output at every point."""
        return not np.isnan(self.least).any()

    def see(self, outputs: Tensor) -> np.ndarray:
        """Add the network's outputs at points of the box.

        Args:
            outputs: Outputs at P points, (P, outputs), float64.

        Returns:
            Margin of each point, (P,); a point without positive margin is unsafe, up to rounding in float64.
        """
        values = self.goal.values(outputs)
        self.least = np.minimum(self.least, values.min(0))  # NaN stays
        margins = self.goal.margins(values).min(-1)
        margins = np.where(np.isnan(values).any(-1), -np.inf, margins)
        self.worst = min(self.worst, float(margins.min()))
        self.margin = min(self.margin, self.worst)
        return margins

    def claim(self, method: str, index: np.ndarray, lower: np.ndarray) -> None:
        """Add the bounds of a method on some rows.

        Args:
            method: Name of the method.
            index: Indices of rows of the goal, (S,).
            lower: Lower bounds of these rows, (S,).
        """
        every = np.full(len(self.goal.rows), -np.inf)
        every[index] = lower
        self._add(Claim(method, frozenset({method.lower()}), every))

    def claim_margin(self, margin: float, method: str) -> None:
        """Add the margin of a branch and bound by a method; it started from all claims so far, and rests on them."""
        sources = frozenset({method.lower()}).union(*(claim.sources for claim in self.claims))
        self._add(Claim("split", sources, np.full(len(self.goal.rows), -np.inf), margin))

    def drop(self, method: str) -> None:
        """Remove all claims that use bounds of a method."""
        self.claims = [claim for claim in self.claims if method.lower() not in claim.sources]
        self._weigh()

    def refuted(self, lower: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Which lower bounds of the rows, (..., U), are above values of the rows, (..., U), by more than rounding."""
        bounds = torch.from_numpy(np.asarray(lower)).to(self.dtype)
        slack = guard.slack(torch.tensor(self.noise), torch.from_numpy(self._weights), bounds).double().numpy()
        return (lower > -np.inf) & ~(lower <= values + np.where(np.isfinite(lower), slack, 0))

    def refutations(self, where: str) -> dict[str, str]:
        """Method -> message, for every method with a bound that a point refutes; `where` names the case."""
        found: dict[str, str] = {}
        if not self.finite:
            return found
        for claim in self.claims:
            wrong = np.flatnonzero(self.refuted(claim.lower, self.least))
            if len(wrong):
                row = wrong[(claim.lower - self.least)[wrong].argmax()]
                found[claim.method] = guard.refuted(
                    claim.method, f"row {self.goal.name(row)}", where, claim.lower[row], self.least[row]
                )
        return found

    def _add(self, claim: Claim) -> None:
        self.claims.append(claim)
        self._weigh()

    def _weigh(self) -> None:
        """Combine all claims: set `lower`, `margin` and `method`."""
        self.lower = np.full(len(self.goal.rows), -np.inf)
        self.margin, self.method = -math.inf, ""
        for claim in self.claims:
            self.lower = np.maximum(self.lower, claim.lower)
            margin = max(float(self.goal.margins(self.lower).min()), claim.margin, self.margin)
            if margin > 0 >= self.margin:
                self.method = claim.method
            self.margin = margin
        self.margin = min(self.margin, self.worst)


def looking(evidence: Evidence, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a network so that its outputs at points of the case's box are added to the evidence.

    Args:
        evidence: Evidence about the case.
        function: The network in float64, (P, inputs) -> (P, outputs).
    """

    def looked(points: Tensor) -> Tensor:
        outputs = function(points)
        evidence.see(outputs.detach())
        return outputs

    return looked
