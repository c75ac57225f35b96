"""Schedules of eps, of the weights in the loss, and of the learning rate. Nothing here needs torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import ConfigError

__all__ = ["Decay", "Ramp", "Schedule", "Values", "number"]


def number(value: float | str, name: str) -> float:
    """Read a number, a fraction such as ``8/255``, or ``inf``.

    Args:
        value: The number or text.
        name: Name of the setting, for the error message.

    Raises:
        ConfigError: The value is none of these.

    Example:
        >>> number("1/4", "model.eps")
        0.25
    """
    try:
        above, slash, below = str(value).partition("/")
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{name} must be a number or a fraction such as 8/255, got {value!r}") from error


@dataclass
class Ramp:
    """A value that is `start` during warm-up, changes linearly with every step of the ramp, and is `end` after it.

    Args:
        start: Value during warm-up.
        end: Value at the last step of the ramp, and from then on.
    """

    start: float
    end: float

    def at(self, step: int, warmup: int, ramp: int) -> float:
        """Value at a step.

        Args:
            step: Number of the step, counted from 0 over the whole training.
            warmup: Number of steps before the ramp.
            ramp: Number of steps of the ramp. At its k-th step, the value is start + (end - start) k / ramp.

        Returns:
            A number between `start` and `end`, both included; rounding never takes it beyond.

        Example:
            >>> [Ramp(0.0, 0.3).at(step, warmup=1, ramp=3) for step in range(5)]
            [0.0, 0.09999999999999999, 0.19999999999999998, 0.3, 0.3]
        """
        if step < warmup:
            return self.start
        if step + 1 >= warmup + ramp:
            return self.end
        value = self.start + (self.end - self.start) * ((step + 1 - warmup) / ramp)
        return min(max(value, min(self.start, self.end)), max(self.start, self.end))


@dataclass(frozen=True)
class Values:
    """Radius and weights of the loss at one step; equations of Lee (2021).

    Attributes:
        eps: Radius, in units of the raw input.
        kappa: Weight of the natural loss, in [0, 1]; 1 - lambda in (3.2.13).
        beta: Weight of the method's bound against that of IBP, in [0, 1].
        graddiv: Weight of the GradDiv regularizer, lambda in (2.2.20), 0 or more.
    """

    eps: float
    kappa: float
    beta: float
    graddiv: float = 0.0


@dataclass
class Schedule:
    """Warm-up at the start values, then a ramp to the end values; lengths are in epochs, values change every step.

    Args:
        warmup: Epochs at the start values, default 0; fractions are allowed.
        ramp: Epochs from the start values to the end values, default 0; fractions are allowed.
        eps_start: eps before the ramp, default 0: natural training.
        kappa: Weight of the natural loss before and after the ramp, default from 1 to 0.
        beta: Weight of the method's bound against that of IBP, default from 1 to 1: the method alone.
        graddiv: Weight of the GradDiv regularizer of a randomized network, default from 0 to 0: none.
        graddiv_ramp: Epochs of warm-up and ramp of the GradDiv weight, default those of eps.
    """

    warmup: float = 0.0
    ramp: float = 0.0
    eps_start: float = 0.0
    kappa: list[float] = field(default_factory=lambda: [1.0, 0.0])
    beta: list[float] = field(default_factory=lambda: [1.0, 1.0])
    graddiv: list[float] = field(default_factory=lambda: [0.0, 0.0])
    graddiv_ramp: list[float] | None = None

    def check(self, eps: float, epochs: float | None) -> None:
        """Raise ConfigError unless all values are in range and the ramp ends before the training does.

        Args:
            eps: eps at the end of the ramp.
            epochs: Epochs of the whole training; None if the number is not known.
        """
        own = self.graddiv_ramp or []
        if self.graddiv_ramp is not None and len(own) != 2:
            raise ConfigError(f"schedule.graddiv_ramp is [warm-up, ramp] in epochs, got {own}")
        for name, value in (("warmup", self.warmup), ("ramp", self.ramp), *(("graddiv_ramp", part) for part in own)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"schedule.{name} is a number of epochs, 0 or more, got {value}")
        for name, pair in (("kappa", self.kappa), ("beta", self.beta)):
            if len(pair) != 2 or not all(0 <= value <= 1 for value in pair):
                raise ConfigError(f"schedule.{name} is [before, after the ramp], both in [0, 1], got {pair}")
        if len(self.graddiv) != 2 or not all(0 <= value < math.inf for value in self.graddiv):
            raise ConfigError(f"schedule.graddiv is [before, after the ramp], both 0 or more, got {self.graddiv}")
        if not 0 <= self.eps_start <= eps:
            raise ConfigError(f"schedule.eps_start must lie between 0 and eps = {eps:g}, got {self.eps_start}")
        for warmup, ramp in self._epochs:
            if epochs is not None and warmup + ramp >= epochs:
                raise ConfigError(
                    f"the ramp ends after {warmup:g} + {ramp:g} epochs of warm-up and ramp, and training after "
                    f"{epochs:g}: no epoch at the end values is left to choose a checkpoint from. Raise "
                    "trainer.max_epochs, or shorten schedule.warmup, schedule.ramp and schedule.graddiv_ramp"
                )

    @property
    def _epochs(self) -> list[list[float]]:
        """[warm-up, ramp] in epochs: first of eps, kappa and beta, then of the GradDiv weight."""
        return [[self.warmup, self.ramp], self.graddiv_ramp or [self.warmup, self.ramp]]

    def _spans(self, per_epoch: int) -> list[tuple[int, int]]:
        """(warm-up, ramp) in steps: first of eps, kappa and beta, then of the GradDiv weight."""
        return [
            (start := round(warmup * per_epoch), round((warmup + ramp) * per_epoch) - start)
            for warmup, ramp in self._epochs
        ]

    def steps(self, per_epoch: int) -> int:
        """Number of steps until every value is at its end, for a number of steps in an epoch."""
        return max(warmup + ramp for warmup, ramp in self._spans(per_epoch))

    def at(self, step: int, per_epoch: int, eps: float) -> Values:
        """Radius and weights at a step.

        Args:
            step: Number of the step, counted from 0.
            per_epoch: Number of steps in an epoch.
            eps: eps at the end of the ramp.
        """
        span, graddiv_span = self._spans(per_epoch)
        return Values(
            Ramp(self.eps_start, eps).at(step, *span),
            Ramp(*self.kappa).at(step, *span),
            Ramp(*self.beta).at(step, *span),
            Ramp(*self.graddiv).at(step, *graddiv_span),
        )

    def done(self, steps: int, per_epoch: int) -> bool:
        """Whether the last of `steps` steps was at the end values, with `per_epoch` steps in an epoch."""
        return steps >= max(1, self.steps(per_epoch))


@dataclass
class Decay:
    """Decay of the learning rate, which is multiplied by `gamma` at certain epochs (Lee, 2021, Tables B.1 and C.1.2).

    Args:
        milestones: Epochs at which the rate is multiplied, default none.
        every: Epochs between two further multiplications, default 0: no further ones.
        after: Epoch from which `every` counts, default 0: the first of them is at epoch ``after + every``.
        gamma: Factor, in (0, 1], default 0.1.

    Example:
        >>> [Decay(milestones=[1, 3], gamma=0.5).factor(epoch) for epoch in range(4)]
        [1.0, 0.5, 0.5, 0.25]
    """

    milestones: list[int] = field(default_factory=list)
    every: int = 0
    after: int = 0
    gamma: float = 0.1

    def check(self) -> None:
        """Raise ConfigError for a gamma outside of (0, 1], or epochs below 0."""
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"decay.gamma must lie in (0, 1], got {self.gamma}")
        if min([*self.milestones, self.every, self.after]) < 0:
            raise ConfigError(f"decay has an epoch below 0: {self}")

    def factor(self, epoch: int) -> float:
        """Learning rate during an epoch, counted from 0, as a fraction of the initial one."""
        passed = sum(epoch >= milestone for milestone in self.milestones)
        if self.every and epoch > self.after:
            passed += (epoch - self.after) // self.every
        return float(self.gamma**passed)
