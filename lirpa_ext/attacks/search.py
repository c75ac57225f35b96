"""Random search: an attack that needs no gradient, for models that hide theirs."""

from __future__ import annotations

import torch

from ..errors import InvalidInputError
from .base import Attack, Target


class RandomSearch(Attack):
    """Move a random share of the entries across the set, and keep what does not raise the margin.

    After M. Andriushchenko et al., Square attack: a query-efficient black-box adversarial attack via random search,
    ECCV 2020: the share shrinks as there. Entries are drawn one by one and not in squares, so that inputs may have any
    shape. A move that leaves the margin as it is is kept too, to get across plateaus.

    Args:
        steps: Evaluations, default 500.

    Raises:
        InvalidInputError: No step.
    """

    def __init__(self, steps: int = 500) -> None:
        if steps < 1:
            raise InvalidInputError(f"RandomSearch needs at least one step, got {steps}")
        self.steps = steps

    def run(self, target: Target) -> None:
        """Search from a random point of the border."""
        points = target.border(target.draw(torch.randn))
        margins = target.score(points)
        for step in range(self.steps - 1):
            moved = target.draw(torch.rand) < _share(step / self.steps)
            others = target.border(target.draw(torch.randn))
            trial = target.project(torch.where(moved, others, points))
            found = target.score(trial)
            kept = found <= margins  # False for NaN
            points = torch.where(kept.view_as(target.eps), trial, points)
            margins = torch.where(kept, found, margins)


def _share(progress: float) -> float:
    """Share of the entries that move, after that share of the steps: halved at the points that Square has."""
    times = [0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8]
    return 0.8 / 2 ** sum(progress > time for time in times)
