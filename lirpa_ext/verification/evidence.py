"""What is known of a case of a property: the bounds that methods claim, and the points that could refute them."""

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
    """What a method says of a case.

    Attributes:
        method: Its name, or "split".
        sources: The methods, in lower case, whose bounds it rests on.
        lower: Lower bounds of the goal's rows, (U,); -inf where it says nothing.
        margin: Lower bound of the case's margin, where it says that alone; -inf otherwise.
    """

    method: str
    sources: frozenset[str]
    lower: np.ndarray
    margin: float = -math.inf


class Evidence:
    """Claims about a case, and values of the network at points of its box.

    Attributes:
        goal: What is to be shown.
        claims: Of methods that were not caught with a wrong bound, in their order.
        lower: The best bounds of the goal's rows, of all claims together, (U,).
        margin: The case's margin: what the claims say, or what a point has if that is less.
        method: The method that was needed last to make the margin positive, or "".
        least: Least value of each row at a point of the box so far, (U,); NaN once a value was not finite.
        worst: Least margin of such a point; one that is not positive is unsafe.
        noise: What rounding errors scale with (`guard.noise`), of the points looked at so far.
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
        """Take the outputs (P, outputs) of points of the box, in float64; gives the margin of each, (P,).

        A margin that is not positive says that the point is unsafe, as far as float64 can tell.
        """
        values = self.goal.values(outputs)
        self.least = np.minimum(self.least, values.min(0))  # NaN stays
        margins = self.goal.margins(values).min(-1)
        margins = np.where(np.isnan(values).any(-1), -np.inf, margins)
        self.worst = min(self.worst, float(margins.min()))
        self.margin = min(self.margin, self.worst)
        return margins

    def claim(self, method: str, index: np.ndarray, lower: np.ndarray) -> None:
        """Take a method's bounds (S,) of the rows of some indices (S,)."""
        every = np.full(len(self.goal.rows), -np.inf)
        every[index] = lower
        self._add(Claim(method, frozenset({method.lower()}), every))

    def claim_margin(self, margin: float, method: str) -> None:
        """Take the margin of a branch and bound, by a method, that started from the bounds so far."""
        sources = frozenset({method.lower()}).union(*(claim.sources for claim in self.claims))
        self._add(Claim("split", sources, np.full(len(self.goal.rows), -np.inf), margin))

    def drop(self, method: str) -> None:
        """Forget what rests on bounds of a method."""
        self.claims = [claim for claim in self.claims if method.lower() not in claim.sources]
        self._weigh()

    def refuted(self, lower: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Which bounds (..., U) are above values of the same rows by more than rounding."""
        bounds = torch.from_numpy(np.asarray(lower)).to(self.dtype)
        slack = guard.slack(torch.tensor(self.noise), torch.from_numpy(self._weights), bounds).double().numpy()
        return (lower > -np.inf) & ~(lower <= values + np.where(np.isfinite(lower), slack, 0))

    def refutations(self, where: str) -> dict[str, str]:
        """The methods with a bound that a point refutes, and what is to be said of that bound."""
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
        """What all claims together say."""
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
    """The function, whose outputs at points of the case's box become evidence."""

    def looked(points: Tensor) -> Tensor:
        outputs = function(points)
        evidence.see(outputs.detach())
        return outputs

    return looked
