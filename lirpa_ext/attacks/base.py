"""The base class of all attacks, and the batch under attack: sets, projection, scores, and best points so far."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..domain.lengths import flat
from ..domain.perturbation import PerturbationLpNorm
from ..domain.specifications import check_labels, margins
from ..engine.limits import is_out_of_memory
from ..errors import InvalidInputError, LirpaExtError
from ..module.tracing import check_mode
from ..randomized.sampling import is_randomized, sample
from .losses import LOSSES, TARGETED_LOSSES

_logger = logging.getLogger(__name__)

_INSIDE = 1 - 1e-12  # factor of the radius that makes up for rounding errors of a length in float64


class Attacked(NamedTuple):
    """Result of an attack on a batch.

    Attributes:
        inputs: Point of smallest margin of each sample, inside of its set, (B, ...).
        margins: Margin of each of these points, (B,); the attack succeeded where it is not positive. Of a targeted
            attack: largest logit of the other classes minus that of the target.
        masked: Where all gradients were 0 or not finite (gradient masking), bool, (B,). There the attack's failure is
            no evidence of robustness.
    """

    inputs: Tensor
    margins: Tensor
    masked: Tensor


class Target:
    """One batch under attack: the model, the set around each sample, and the best point found so far.

    `Attack` makes one and passes it to `Attack.run`.

    Attributes:
        model: Classifier, (B, ...) -> (B, classes).
        x: Clean inputs, (B, ...).
        y: Labels, (B,).
        targets: Classes that a targeted attack aims at, (B,), or None.
        perturbation: The set around each sample.
        eps: Radii, (B, 1, ...), which broadcast with `x`.
        norm: p of the ball, 1 < p <= inf.
        generator: Source of every random number.
        classes: Number of classes.
        randomized: Whether the model is randomized; each evaluation then draws a network from the generator.
        keep: Which points count: "best" for all, "final" for the ends of runs (see `EOT`).
        best: The result so far; at first the clean inputs.

    Raises:
        InvalidInputError: The model fails on x, its output is not (B, classes), or labels or targets are no classes.
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
        self._radius = self._exact_radius()
        self._lower, self._upper = self._inner_box()
        try:
            with torch.no_grad():
                logits = self.logits(x)
        except Exception as error:  # whatever a user's model raises
            if is_out_of_memory(error) or isinstance(error, LirpaExtError):
                raise
            raise InvalidInputError(
                f"the model fails on inputs of shape {tuple(x.shape)} in {x.dtype}: {type(error).__name__}: {error}. "
                "Check their shape and dtype, and that the model is in eval mode"
            ) from error
        self._check(logits)
        self.y, self.targets = y.long(), None if targets is None else targets.long()
        self.classes = logits.shape[1]
        clean = self.margins(logits)
        self._asked, self._answered = False, torch.zeros_like(clean, dtype=torch.bool)
        self.best = Attacked(x, clean if self.keep == "best" else torch.full_like(clean, math.inf), self.masked)

    def _exact_radius(self) -> Tensor:
        """Radii as they were given, in float64; rounded to the dtype of `x`, they may be larger."""
        exact = self.perturbation.eps_of(self.x.double()).view_as(self.eps)
        return torch.minimum(exact, self.eps.double())

    def _inner_box(self) -> tuple[Tensor, Tensor]:
        """Ends of the box of each sample in the dtype of `x`, rounded inward, but not beyond `x`."""
        x, ends = self.x.double(), []
        for end, sign in zip(self.perturbation.box(x), (1, -1), strict=True):
            outside = torch.zeros_like(end, dtype=torch.bool)
            if self.perturbation.radius is not None:
                ball = x - sign * self._radius
                # Rounding error of x - sign * radius (two-sum of Knuth).
                lost = (x - (ball + (x - ball))) + ((x - ball) - sign * self._radius)
                end = torch.maximum(sign * end, sign * ball) * sign
                outside = (end == ball) & (sign * lost > 0)
            own = end.to(self.x)
            outside = (outside & (own.double() == end)) | (sign * (end - own.double()) > 0)
            ends.append(torch.where(outside, torch.nextafter(own, self.x), own))
        return torch.minimum(ends[0], self.x), torch.maximum(ends[1], self.x)

    def network(self) -> nn.Module:
        """The network of one evaluation: a new draw of a randomized model, or the model itself."""
        return sample(self.model, self.generator) if self.randomized else self.model

    def logits(self, points: Tensor) -> Tensor:
        """Logits that decide the class of each point, (B, ...) -> (B, classes)."""
        return self.network()(points)

    def margins(self, logits: Tensor) -> Tensor:
        """Margin of each sample from its logits (B, classes), (B,); not positive where the attack succeeded."""
        return margins(logits, self.y) if self.targets is None else -margins(logits, self.targets)

    def loss(self, name: str, logits: Tensor) -> Tensor:
        """Loss that the attack maximizes, by name and from logits (B, classes); (B,)."""
        if self.targets is None:
            return LOSSES[name](logits, self.y)
        return TARGETED_LOSSES[name](logits, self.y, self.targets)

    def gradient(self, points: Tensor, loss: str) -> Tensor:
        """Gradient of each sample's loss at the points, (B, ...); they are scored too if all points count."""
        return self.value_and_gradient(points, loss)[1]

    def value_and_gradient(self, points: Tensor, loss: str) -> tuple[Tensor, Tensor]:
        """Loss of each sample, (B,), and its gradient at the points, (B, ...).

        The points are scored too if all points count.

        Args:
            points: Points of the sets, (B, ...).
            loss: Name of the loss, one of `LOSSES`, or of `TARGETED_LOSSES` if there are targets.
        """
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.network()(points)
            value = self.loss(loss, logits)
            gradient = self.differentiate(value, points)
        if self.keep == "best":
            self.remember(points.detach(), logits.detach())
        self.note(gradient)
        return value.detach(), gradient

    @staticmethod
    def differentiate(value: Tensor, points: Tensor) -> Tensor:
        """Gradient of the sum of the losses (B,) at the points (B, ...); 0 if the losses do not depend on them."""
        if not value.requires_grad:
            return torch.zeros_like(points)
        (gradient,) = torch.autograd.grad(value.sum(), points, allow_unused=True)
        return torch.zeros_like(points) if gradient is None else gradient

    def note(self, gradient: Tensor) -> None:
        """Record which samples have a gradient with a direction: an entry that is finite and not 0."""
        self._asked = True
        self._answered |= (flat(gradient).nan_to_num(0.0, 0.0, 0.0) != 0).any(1)

    @property
    def masked(self) -> Tensor:
        """Samples of which no gradient so far had a direction, bool, (B,); none before the first gradient."""
        return ~self._answered if self._asked else torch.zeros_like(self._answered)

    def score(self, points: Tensor) -> Tensor:
        """Evaluate points (B, ...), keep those with the smallest margin so far, and return all margins, (B,)."""
        with torch.no_grad():
            return self.remember(points, self.logits(points))

    def remember(self, points: Tensor, logits: Tensor) -> Tensor:
        """As `score`, for points (B, ...) whose logits (B, classes) are known."""
        found = self.margins(logits)
        better = found < self.best.margins  # False for NaN
        self.best = self.best._replace(
            inputs=torch.where(better.view_as(self.eps), points, self.best.inputs),
            margins=torch.where(better, found, self.best.margins),
        )
        return found

    def project(self, points: Tensor) -> Tensor:
        """Move points (B, ...) into their sets: clip them to the box and the data range, then scale into the ball.

        Box and ball are convex and contain `x`, so scaling towards `x` stays in the box. A result lies in its set
        exactly: distances are computed in float64, and points are rounded towards `x`. It is not always the nearest
        point of the set.
        """
        points = torch.minimum(torch.maximum(points, self._lower), self._upper)
        if self.norm == math.inf:
            return points
        center = self.x.double()
        shift = points.double() - center
        length = self.length(shift)
        radius = self._radius * _INSIDE
        scale = torch.where(length > radius, radius / length, torch.ones_like(length))
        wanted = center + scale * shift
        points = wanted.to(self.x)
        beyond = (points.double() - center).abs() > (scale * shift).abs()
        inner = torch.where(beyond, torch.nextafter(points, self.x), points)
        inner = torch.where((length > 0) & points.isfinite(), inner, points)
        return torch.minimum(torch.maximum(inner, self._lower), self._upper)

    def border(self, direction: Tensor) -> Tensor:
        """Points on the border of the ball in a direction (B, ...), projected; for norm inf, corners of the cube."""
        if self.norm == math.inf:
            return self.project(self.x + self.eps * direction.sign())
        length = self.length(direction).clamp(min=torch.finfo(direction.dtype).tiny)
        return self.project(self.x + self.eps * direction / length)

    def random_points(self) -> Tensor:
        """Points drawn at random from the ball (uniformly for p = 2 and inf), and projected."""
        if self.norm == math.inf:
            return self.project(self.x + self.eps * (2 * self.draw(torch.rand) - 1))
        depth = flat(self.draw(torch.rand))[:, 0].view_as(self.eps) ** (1 / self.x[0].numel())
        direction = self.draw(torch.randn)
        return self.project(self.x + self.eps * depth * direction / self.length(direction))

    def search(self, steps: int = 500) -> None:
        """Search at random, without gradients, from a random point of the border (see `RandomSearch`).

        Args:
            steps: Number of evaluations, default 500.
        """
        points = self.border(self.draw(torch.randn))
        margins = self.score(points)
        for step in range(steps - 1):
            moved = self.draw(torch.rand) < _share(step / steps)
            trial = self.project(torch.where(moved, self.border(self.draw(torch.randn)), points))
            found = self.score(trial)
            kept = found <= margins  # False for NaN
            points = torch.where(kept.view_as(self.eps), trial, points)
            margins = torch.where(kept, found, margins)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of steepest ascent, of unit length in the ball's norm, (B, ...); 0 where the gradient is 0."""
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        if self.norm == math.inf:
            return gradient.sign()
        peak = flat(gradient).abs().amax(1).view_as(self.eps).clamp(min=torch.finfo(gradient.dtype).tiny)
        direction = gradient.sign() * (gradient.abs() / peak) ** (1 / (self.norm - 1))
        return direction / self.length(direction).clamp(min=torch.finfo(gradient.dtype).tiny)

    def length(self, shift: Tensor) -> Tensor:
        """Length of each sample of shift (B, ...) in the ball's norm, (B, 1, ...)."""
        return torch.linalg.vector_norm(flat(shift), ord=self.norm, dim=1).view_as(self.eps)

    def draw(self, draw: Callable[..., Tensor]) -> Tensor:
        """Random numbers of the shape of `x`, from the generator; ``draw`` is torch.rand or torch.randn."""
        device = self.generator.device
        return draw(self.x.shape, generator=self.generator, dtype=self.x.dtype, device=device).to(self.x.device)

    def _check(self, logits: Tensor) -> None:
        """Raise InvalidInputError unless the model is a classifier, and labels and targets are its classes."""
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
    """An attack on a classifier, called on batches; a subclass implements `run`."""

    @abstractmethod
    def run(self, target: Target) -> None:
        """Search for points of small margin in the sets of a batch.

        Every point given to ``target.score`` is a candidate; with ``target.keep == "best"``, so is every point given to
        ``target.gradient``.

        Args:
            target: The batch under attack.
        """

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
            model: Classifier in eval mode, (B, ...) -> (B, classes). Each evaluation of a randomized model draws a
                network from the generator.
            x: Clean inputs, (B, ...).
            y: Labels, (B,).
            perturbation: The set around each sample: norm, eps (one for all or (B,)), data range.
            generator: Source of every random number, default a new one with seed 0.
            targets: Classes to be predicted in place of the labels, (B,); default none, any other class counts.

        Returns:
            The best point of each sample, inside of its set, and its margin. The clean input is a candidate. For a
            randomized model only the ends of the attack's runs are candidates (`EOT`, ``keep``), and the margin is that
            of the draw that scored it: evaluate it on others (`lirpa_ext.certification.robust_accuracy.evaluate`).
            Samples of which no gradient had a direction (``masked``) are also searched at random (`RandomSearch`), and
            a warning is logged.

        Raises:
            InvalidInputError: norm is 1, `x` is empty, not finite or outside of the data range, labels or targets are
                no classes, or the model does not return one tensor of logits.
            TrainModeError: A batch norm is in train mode: the output of a sample would depend on the others, and the
                attack would change the running statistics.
        """
        if perturbation.norm == 1:
            raise InvalidInputError(
                f"{type(self).__name__} attacks lp balls with p > 1 only, got p = 1; use norm=2 or norm=inf, "
                "or leave the attack out (attack=None)"
            )
        if not len(x):
            raise InvalidInputError(f"there is no sample to attack: x is of shape {tuple(x.shape)}")
        perturbation.check(x)
        check_mode(model)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        x = x.detach()
        target = self.target(model, x, y, perturbation, generator, targets)
        self.run(target)
        found = target.best._replace(masked=target.masked)
        stuck = found.masked & (found.margins > 0)
        if not bool(stuck.any()):
            return found
        _logger.warning(
            "%s had no gradient at %d of %d samples: all were 0 or not finite (gradient masking). They are searched at "
            "random, and what is not found there is no evidence of robustness",
            type(self).__name__, int(stuck.sum()), len(x),
        )  # fmt: skip
        # The whole batch is searched: the model's output for a sample may depend on the batch.
        rest = self.target(model, x, y, perturbation, generator, targets)
        rest.search()
        better = stuck & (rest.best.margins < found.margins)
        return Attacked(
            torch.where(better.view_as(target.eps), rest.best.inputs, found.inputs),
            torch.where(better, rest.best.margins, found.margins),
            found.masked,
        )

    def target(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationLpNorm,
        generator: torch.Generator,
        targets: Tensor | None,
    ) -> Target:
        """Make the batch under attack that `run` is given; the arguments are those of the call."""
        return Target(model, x, y, perturbation, generator, targets)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def _share(progress: float) -> float:
    """Share of the entries that change in a step of random search, after a share `progress` of the steps.

    The share is halved at the same times as in the Square attack.
    """
    times = [0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8]
    return 0.8 / 2 ** sum(progress > time for time in times)
