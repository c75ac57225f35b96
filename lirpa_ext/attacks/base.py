"""What all attacks share: the set of each sample, projection into it, the score, and the best point so far."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..lengths import flat
from ..perturbation import PerturbationLpNorm
from ..randomized.sampling import is_randomized, sample
from ..specifications import check_labels, margins
from .losses import LOSSES, TARGETED_LOSSES


class Attacked(NamedTuple):
    """What an attack found.

    Attributes:
        inputs: The point of smallest margin of each sample, inside of its set, (B, ...).
        margins: Their margins, (B,); the attack succeeded where that is not positive. Of a targeted attack: how far the
            target stays below the largest logit, the target's own lead taken as negative.
    """

    inputs: Tensor
    margins: Tensor


class Target:
    """One batch under attack: the model, the set around each sample, and the best point found so far.

    Attributes:
        model: Classifier, (B, ...) -> (B, classes).
        x: Clean inputs, (B, ...).
        y: Labels, (B,).
        targets: Classes that a targeted attack wants instead, (B,), or None.
        perturbation: The set around each sample.
        eps: Radii, shaped to broadcast with `x`.
        norm: p of the ball, 1 < p <= inf.
        generator: Source of every random number.
        classes: Number of classes.
        randomized: Whether the model draws its network at random; each evaluation then draws one from the generator.
        keep: Which points count, "best" or "final" (`EOT`).
        best: The result so far; starts at the clean inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationLpNorm,
        generator: torch.Generator,
        targets: Tensor | None = None,
        keep: str | None = None,
    ) -> None:
        self.model, self.x, self.y, self.generator, self.targets = model, x, y, generator, targets
        self.perturbation = perturbation
        self.randomized = is_randomized(model)
        self.keep = keep or ("final" if self.randomized else "best")
        self.norm = perturbation.norm
        self.eps = perturbation.eps_of(x).view(-1, *[1] * (x.dim() - 1))
        self._lower, self._upper = perturbation.box(x)
        with torch.no_grad():
            logits = self.logits(x)
        self._check(logits)
        self.y, self.targets = y.long(), None if targets is None else targets.long()
        self.classes = logits.shape[1]
        clean = self.margins(logits)
        self.best = Attacked(x, clean if self.keep == "best" else torch.full_like(clean, math.inf))

    def network(self) -> nn.Module:
        """The network of one evaluation: a fresh draw of a randomized model, the model itself otherwise."""
        return sample(self.model, self.generator) if self.randomized else self.model

    def logits(self, points: Tensor) -> Tensor:
        """What decides the class of each point, (B, classes)."""
        return self.network()(points)

    def margins(self, logits: Tensor) -> Tensor:
        """The attacker's score of logits, (B,): not positive where it succeeded."""
        return margins(logits, self.y) if self.targets is None else -margins(logits, self.targets)

    def loss(self, name: str, logits: Tensor) -> Tensor:
        """The loss that the attacker climbs, (B,)."""
        if self.targets is None:
            return LOSSES[name](logits, self.y)
        return TARGETED_LOSSES[name](logits, self.y, self.targets)

    def gradient(self, points: Tensor, loss: str) -> Tensor:
        """Gradient of each sample's loss at `points`, which are scored on the way if all points count."""
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.network()(points)
            if not logits.requires_grad:
                raise InvalidInputError(
                    "the model's outputs have no gradient in its inputs: it detaches them, or is all steps. Attack it "
                    "without gradients, or judge it by bounds alone (attack_steps=0)"
                )
            (gradient,) = torch.autograd.grad(self.loss(loss, logits).sum(), points)
        if self.keep == "best":
            self.remember(points.detach(), logits.detach())
        return gradient

    def score(self, points: Tensor) -> None:
        """Remember those of the points that have the smallest margin so far."""
        with torch.no_grad():
            self.remember(points, self.logits(points))

    def remember(self, points: Tensor, logits: Tensor) -> None:
        """The same of points whose logits are known."""
        found = self.margins(logits)
        better = found < self.best.margins  # False for NaN
        self.best = Attacked(
            torch.where(better.view_as(self.eps), points, self.best.inputs),
            torch.where(better, found, self.best.margins),
        )

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
        depth = flat(self._draw(torch.rand))[:, 0].view_as(self.eps) ** (1 / self.x[0].numel())
        direction = self._draw(torch.randn)
        return self.project(self.x + self.eps * depth * direction / self.length(direction))

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of unit length in the ball's norm that climbs fastest; 0 where the gradient is."""
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        if self.norm == math.inf:
            return gradient.sign()
        peak = flat(gradient).abs().amax(1).view_as(self.eps).clamp(min=torch.finfo(gradient.dtype).tiny)
        direction = gradient.sign() * (gradient.abs() / peak) ** (1 / (self.norm - 1))
        return direction / self.length(direction).clamp(min=torch.finfo(gradient.dtype).tiny)

    def length(self, shift: Tensor) -> Tensor:
        """Length of each sample in the ball's norm, shaped to broadcast with `x`."""
        return torch.linalg.vector_norm(flat(shift), ord=self.norm, dim=1).view_as(self.eps)

    def _draw(self, draw: Callable[..., Tensor]) -> Tensor:
        device = self.generator.device
        return draw(self.x.shape, generator=self.generator, dtype=self.x.dtype, device=device).to(self.x.device)

    def _check(self, logits: Tensor) -> None:
        """Raise InvalidInputError unless the model is a classifier, and labels and targets are classes of it."""
        if not isinstance(logits, Tensor):
            raise InvalidInputError(
                f"a classifier returns a tensor (B, classes); this one returns a {type(logits).__name__}"
            )
        if logits.dim() != 2 or len(logits) != len(self.x):
            raise InvalidInputError(
                f"a classifier returns (B, classes); this one returns {tuple(logits.shape)} for {len(self.x)} samples"
            )
        if self.y.shape != (len(self.x),):
            raise InvalidInputError(f"labels are one number a sample, ({len(self.x)},), got {tuple(self.y.shape)}")
        check_labels(self.y, logits.shape[1])
        if self.targets is None:
            return
        check_labels(self.targets, logits.shape[1])
        if self.targets.shape != self.y.shape or (self.targets == self.y).any():
            raise InvalidInputError("targets are one class a sample, another one than its label")


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
        targets: Tensor | None = None,
    ) -> Attacked:
        """Attack a batch.

        Args:
            model: Classifier in eval mode, (B, ...) -> (B, classes). Of a randomized one each evaluation draws another
                network, from the generator.
            x: Clean inputs, (B, ...).
            y: Labels, (B,).
            perturbation: The set around each sample: norm, eps (one for all or (B,)), data range.
            generator: Source of every random number, default a new one of seed 0.
            targets: Classes to be predicted in place of the labels, (B,); default any other class will do.

        Returns:
            The best point of each sample, inside of its set, and its margin. The clean input is a candidate. Of a
            randomized model the ends of the attack's runs are the only ones (`EOT`, ``keep``), and the margin is that
            of the draw that scored it: evaluate it on others (`lirpa_ext.randomized.evaluate`).

        Raises:
            InvalidInputError: norm 1, `x` outside of the data range or not finite, labels or targets that are no
                class or of another number, no sample at all, a model that returns no tensor or has no gradient.
        """
        if perturbation.norm == 1:
            raise InvalidInputError(
                f"{type(self).__name__} attacks lp balls with p > 1 only, got p = 1; use norm=2 or norm=inf, "
                "or leave the attack out (attack_steps=0)"
            )
        if not len(x):
            raise InvalidInputError(f"there is no sample to attack: x is of shape {tuple(x.shape)}")
        perturbation.check(x)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        target = self.target(model, x.detach(), y, perturbation, generator, targets)
        self.run(target)
        return target.best

    def target(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationLpNorm,
        generator: torch.Generator,
        targets: Tensor | None,
    ) -> Target:
        """What `run` is given."""
        return Target(model, x, y, perturbation, generator, targets)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"
