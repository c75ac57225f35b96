"""Attacks that follow the gradient of a loss: one step (FGSM, FGM) or many (PGD)."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

from ..domain.lengths import flat
from ..errors import InvalidInputError
from .base import Attack, Target
from .losses import in_turn


class PGD(Attack):
    """Projected gradient descent: x <- project(x + step * steepest direction), from a random point.

    A. Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018. With `momentum`, the
    direction is that of a running sum of the gradients, each divided by its l1 norm (MI-FGSM; Y. Dong et al., Boosting
    adversarial attacks with momentum, CVPR 2018). Against a randomized network, where each step takes another draw, the
    sum averages over draws at no further cost.

    Args:
        steps: Steps of a run, default 40.
        restarts: Runs, default 1; each sample keeps its best point over all runs.
        step_size: Length of a step as a fraction of eps, default 2.5 / steps.
        loss: "cross-entropy", "margin" (the smallest z_y - z_j) or "dlr"; default the first two in turn.
        random_start: Whether to start at a random point of the ball, default True; else at the clean input.
        momentum: Factor of the previous sum of gradients, 0 or more; default 0, each step uses its own gradient only.

    Raises:
        InvalidInputError: A number is out of range, or the loss is unknown.
    """

    def __init__(
        self,
        steps: int = 40,
        restarts: int = 1,
        step_size: float | None = None,
        loss: str | None = None,
        random_start: bool = True,
        momentum: float = 0.0,
    ) -> None:
        if steps < 1 or restarts < 1:
            raise InvalidInputError(f"PGD needs at least one step and one restart, got {steps} and {restarts}")
        if step_size is not None and not 0 < step_size < math.inf:
            raise InvalidInputError(f"step_size is a positive fraction of eps, got {step_size}")
        if not 0 <= momentum < math.inf:
            raise InvalidInputError(f"momentum must be 0 or more, got {momentum}")
        in_turn(loss, restarts)
        self.steps, self.restarts, self.loss, self.random_start = steps, restarts, loss, random_start
        self.momentum = momentum
        self.step_size = 2.5 / steps if step_size is None else step_size

    def run(self, target: Target) -> None:
        """Maximize the loss once for each restart."""
        for loss in in_turn(self.loss, self.restarts):
            points = target.random_points() if self.random_start else target.x
            total = torch.zeros_like(target.x)
            for _ in range(self.steps):
                gradient = target.gradient(points, loss)
                if self.momentum:
                    shares = normalize(flat(gradient), p=1.0, eps=torch.finfo(gradient.dtype).tiny)
                    gradient = total = self.momentum * total + shares.view_as(gradient)
                direction = target.steepest(gradient)
                points = target.project(points + self.step_size * target.eps * direction)
            target.score(points)


class FGSM(PGD):
    """Fast gradient (sign) method: one step of length eps from the clean input in the direction of steepest ascent.

    I. Goodfellow et al., Explaining and harnessing adversarial examples, ICLR 2015; (2.1.3) of Lee (2021). In an
    l-infinity ball the direction is the sign of the gradient; in an l2 ball it is the normalized gradient (FGM).

    Args:
        loss: "cross-entropy" (default), "margin" or "dlr".

    Raises:
        InvalidInputError: An unknown loss.
    """

    def __init__(self, loss: str = "cross-entropy") -> None:
        super().__init__(steps=1, step_size=1.0, loss=loss, random_start=False)


FGM = FGSM  # they differ in the norm of the set only
