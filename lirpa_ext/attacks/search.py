"""Random search: an attack that needs no gradient, for models that hide theirs."""

from __future__ import annotations

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
        target.search(self.steps)
