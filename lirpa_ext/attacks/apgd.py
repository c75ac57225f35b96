"""Auto-PGD: projected gradient descent that adapts its step size."""

from __future__ import annotations

import torch

from ..errors import InvalidInputError
from .base import Attack, Target
from .losses import in_turn

_MOMENTUM = 0.75  # weight of the new step; the previous step has the rest
_RISING = 0.75  # the step size is halved unless the loss rose in more than this share of the steps since the last check


class APGD(Attack):
    """Auto-PGD. The first step is 2 eps long; when the loss stops rising, the step is halved from the best point on.

    F. Croce and M. Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, ICML 2020. Several runs alternate between two losses, because one may have a gradient where the other has
    none.

    Args:
        steps: Steps of a run, default 40.
        restarts: Runs, each from a random point, default 1; each sample keeps its best point over all runs.
        loss: "cross-entropy", "margin" (the smallest z_y - z_j) or "dlr"; default the first two in turn.

    Raises:
        InvalidInputError: A number out of range, or an unknown loss.
    """

    def __init__(self, steps: int = 40, restarts: int = 1, loss: str | None = None) -> None:
        if steps < 1 or restarts < 1:
            raise InvalidInputError(f"APGD needs at least one step and one restart, got {steps} and {restarts}")
        in_turn(loss, restarts)
        self.steps, self.restarts, self.loss = steps, restarts, loss

    def run(self, target: Target) -> None:
        """Maximize the loss once for each restart."""
        for loss in in_turn(self.loss, self.restarts):
            self._climb(target, loss)

    def _climb(self, target: Target, loss: str) -> None:
        points = before = target.random_points()
        step = 2 * target.eps
        value, gradient = target.value_and_gradient(points, loss)
        best, best_points, best_gradient = value, points, gradient
        last_best, rises, halved = best, torch.zeros_like(best), torch.ones_like(best, dtype=torch.bool)
        checks = _checks(self.steps)
        since = 0
        for number in range(1, self.steps + 1):
            ahead = target.project(points + step * target.steepest(gradient))
            share = _MOMENTUM if number > 1 else 1.0
            moved = target.project(points + share * (ahead - points) + (1 - share) * (points - before))
            before, points = points, moved
            previous = value
            if number == self.steps:
                target.score(points)
                return
            value, gradient = target.value_and_gradient(points, loss)
            rises, since = rises + (value > previous), since + 1
            better = value > best
            best = torch.where(better, value, best)
            best_points, best_gradient = (
                torch.where(better.view_as(target.eps), new, old)
                for new, old in ((points, best_points), (gradient, best_gradient))
            )
            if number in checks:
                halved = (rises <= _RISING * since) | (~halved & (best <= last_best))
                last_best, rises, since = best, torch.zeros_like(best), 0
                again = halved.view_as(target.eps)
                step = torch.where(again, step / 2, step)
                points, gradient = torch.where(again, best_points, points), torch.where(again, best_gradient, gradient)


def _checks(steps: int) -> set[int]:
    """Steps after which the step size is checked: after 22% of the steps, then at intervals that shrink by 3% to 6%."""
    interval, found, at = max(int(0.22 * steps), 1), set(), 0
    while at <= steps:
        at += interval
        found.add(at)
        interval = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found
