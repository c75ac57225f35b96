"""Random search: an attack without gradients, for models that mask theirs."""

from __future__ import annotations

from ..errors import InvalidInputError
from .base import Attack, Target


class RandomSearch(Attack):
    """Random search: change a random share of the entries, and keep the change if the margin does not rise.

    Based on M. Andriushchenko et al., Square attack: a query-efficient black-box adversarial attack via random search,
    ECCV 2020; the share shrinks at the same times. Entries are drawn singly and not in squares, so that inputs may have
    any shape. A change that leaves the margin equal is kept too, in order to cross plateaus.

    Args:
        steps: Number of evaluations, default 500.

    Raises:
        InvalidInputError: `steps` is below 1.
    """

    def __init__(self, steps: int = 500) -> None:
        if steps < 1:
            raise InvalidInputError(f"RandomSearch needs at least one step, got {steps}")
        self.steps = steps

    def run(self, target: Target) -> None:
        """Search from a random point of the border."""
        target.search(self.steps)
