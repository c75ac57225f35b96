"""Attacks: points of a perturbation set that a classifier gets wrong, as an upper bound on its robustness.

The base class checks, projects, scores and remembers the best point of each sample; an attack writes `run`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import InvalidInputError
from .perturbation import PerturbationLpNorm
from .specifications import check_labels, margins

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "margin": lambda logits, y: -margins(logits, y),
    "cross-entropy": lambda logits, y: functional.cross_entropy(logits, y, reduction="none"),
}


class Attacked(NamedTuple):
    """What an attack found.

    Attributes:
        inputs: The point of smallest margin of each sample, inside of its set, (B, ...).
        margins: Their margins, (B,); the attack succeeded where that is not positive.
    """

    inputs: Tensor
    margins: Tensor


class Target:
    """One batch under attack: the model, the set around each sample, and the best point found so far.

    Attributes:
        model: Classifier, (B, ...) -> (B, classes).
        x: Clean inputs, (B, ...).
        y: Labels, (B,).
        eps: Radii, shaped to broadcast with `x`.
        norm: p of the ball, 1 < p <= inf.
        generator: Source of every random number.
        best: The result so far; starts at the clean inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationLpNorm,
        generator: torch.Generator,
    ) -> None:
        self.model, self.x, self.y, self.generator = model, x, y, generator
        self.norm = perturbation.norm
        self.eps = perturbation.eps_of(x).view(-1, *[1] * (x.dim() - 1))
        self._lower, self._upper = perturbation.box(x)
        with torch.no_grad():
            self.best = Attacked(x, margins(model(x), y))

    def project(self, points: Tensor) -> Tensor:
        """The points, cut to the box (inside of the data range) and then drawn towards `x` into the ball.

        `x` lies in both and both are convex, so the second step stays inside of the first one's box.
        """
        points = torch.minimum(torch.maximum(points, self._lower), self._upper)
        if self.norm == math.inf:
            return points
        shift = points - self.x
        length = self.length(shift)
        scale = torch.where(length > self.eps, self.eps / length, torch.ones_like(length))
        points = self.x + scale * shift
        return torch.minimum(torch.maximum(points, self._lower), self._upper)  # against rounding

    def random_points(self) -> Tensor:
        """Points drawn at random from the ball (uniformly for p = 2 and inf), and projected."""
        if self.norm == math.inf:
            return self.project(self.x + self.eps * (2 * self._draw(torch.rand) - 1))
        depth = self._draw(torch.rand).flatten(1)[:, 0].view_as(self.eps) ** (1 / self.x[0].numel())
        direction = self._draw(torch.randn)
        return self.project(self.x + self.eps * depth * direction / self.length(direction))

    def gradient(self, points: Tensor, loss: str) -> Tensor:
        """Gradient of each sample's loss at `points`, which are scored on the way."""
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.model(points)
            (gradient,) = torch.autograd.grad(LOSSES[loss](logits, self.y).sum(), points)
        self._remember(points.detach(), logits.detach())
        return gradient

    def score(self, points: Tensor) -> None:
        """Remember those of the points that have the smallest margin so far."""
        with torch.no_grad():
            self._remember(points, self.model(points))

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of unit length in the ball's norm that climbs fastest; 0 where the gradient is."""
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        if self.norm == math.inf:
            return gradient.sign()
        peak = gradient.flatten(1).abs().amax(1).view_as(self.eps).clamp(min=torch.finfo(gradient.dtype).tiny)
        direction = gradient.sign() * (gradient.abs() / peak) ** (1 / (self.norm - 1))
        return direction / self.length(direction).clamp(min=torch.finfo(gradient.dtype).tiny)

    def length(self, shift: Tensor) -> Tensor:
        """Length of each sample in the ball's norm, shaped to broadcast with `x`."""
        return torch.linalg.vector_norm(shift.flatten(1), ord=self.norm, dim=1).view_as(self.eps)

    def _remember(self, points: Tensor, logits: Tensor) -> None:
        found = margins(logits, self.y)
        better = found < self.best.margins  # False for NaN
        self.best = Attacked(
            torch.where(better.view_as(self.eps), points, self.best.inputs),
            torch.where(better, found, self.best.margins),
        )

    def _draw(self, draw: Callable[..., Tensor]) -> Tensor:
        device = self.generator.device
        return draw(self.x.shape, generator=self.generator, dtype=self.x.dtype, device=device).to(self.x.device)


class Attack(ABC):
    """An attack on a classifier; a subclass writes `run`."""

    @abstractmethod
    def run(self, target: Target) -> None:
        """Search for points of small margin: each one given to `target.gradient` or `target.score` counts."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationLpNorm,
        generator: torch.Generator | None = None,
    ) -> Attacked:
        """Attack a batch.

        Args:
            model: Classifier in eval mode, (B, ...) -> (B, classes).
            x: Clean inputs, (B, ...).
            y: Labels, (B,).
            perturbation: The set around each sample: norm, eps (one for all or (B,)), data range.
            generator: Source of every random number, default a new one of seed 0.

        Returns:
            The best point of each sample, inside of its set, and its margin. The clean input is a candidate.

        Raises:
            InvalidInputError: norm 1, `x` outside of the data range or not finite, labels that are no class.
        """
        if perturbation.norm == 1:
            raise InvalidInputError(
                f"{type(self).__name__} attacks lp balls with p > 1 only, got p = 1; use norm=2 or norm=inf, "
                "or leave the attack out (attack_steps=0)"
            )
        perturbation.check(x)
        with torch.no_grad():
            check_labels(y, self._classes(model, x[:1]))
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        target = Target(model, x.detach(), y.long(), perturbation, generator)
        self.run(target)
        return target.best

    @staticmethod
    def _classes(model: nn.Module, x: Tensor) -> int:
        logits = model(x)
        if logits.dim() != 2:
            raise InvalidInputError(f"a classifier returns (B, classes); this one returns {tuple(logits.shape)}")
        return logits.shape[1]


class PGD(Attack):
    """Projected gradient descent: x <- project(x + step * steepest direction), from a random point.

    A. Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018.

    Args:
        steps: Steps of a run, default 40.
        restarts: Runs, default 1; each sample keeps its best point over all of them.
        step_size: Length of a step as a fraction of eps, default 2.5 / steps.
        loss: "margin" (default: the smallest of z_y - z_j) or "cross-entropy".
        random_start: Start at a random point, default; else at the clean input.

    Raises:
        InvalidInputError: A number that is not positive, or an unknown loss.
    """

    def __init__(
        self,
        steps: int = 40,
        restarts: int = 1,
        step_size: float | None = None,
        loss: str = "margin",
        random_start: bool = True,
    ) -> None:
        if steps < 1 or restarts < 1:
            raise InvalidInputError(f"PGD needs at least one step and one restart, got {steps} and {restarts}")
        if step_size is not None and not 0 < step_size < math.inf:
            raise InvalidInputError(f"step_size is a positive fraction of eps, got {step_size}")
        if loss not in LOSSES:
            raise InvalidInputError(f"unknown loss {loss!r}; known are {', '.join(LOSSES)}")
        self.steps, self.restarts, self.loss, self.random_start = steps, restarts, loss, random_start
        self.step_size = 2.5 / steps if step_size is None else step_size

    def run(self, target: Target) -> None:
        """Climb the loss from each start."""
        for _ in range(self.restarts):
            points = target.random_points() if self.random_start else target.x
            for _ in range(self.steps):
                direction = target.steepest(target.gradient(points, self.loss))
                points = target.project(points + self.step_size * target.eps * direction)
            target.score(points)
