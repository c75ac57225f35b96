"""The optimizer of a configuration, and its learning rate over the epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..errors import ConfigError
from .schedules import Decay

__all__ = ["Optimizer", "change_rate"]


@dataclass
class Optimizer:
    """Optimizer and learning rate of a training.

    Args:
        name: "adam" or "sgd", default "adam".
        lr: Initial learning rate, default 1e-3.
        momentum: Momentum of "sgd", default 0.
        weight_decay: Factor of the l2 penalty on the weights, default 0.
        decay: Epochs at which the learning rate falls, default none.
        std_factor: Factor of the learning rate of Adv-BNN's log standard deviations, default 1. In a short training
            they hardly change with a factor of 1.
    """

    name: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: Decay = field(default_factory=Decay)
    std_factor: float = 1.0

    def check(self) -> None:
        """Raise ConfigError for an unknown optimizer, or numbers out of range."""
        if self.name not in ("adam", "sgd"):
            raise ConfigError(f"unknown optimizer {self.name!r}: known are adam and sgd")
        if not 0 < self.lr < math.inf or self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise ConfigError("optimizer.lr must be positive, weight_decay 0 or more, momentum in [0, 1)")
        if not 0 < self.std_factor < math.inf:
            raise ConfigError(f"optimizer.std_factor must be positive, got {self.std_factor}")
        self.decay.check()

    def make(self, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Make the optimizer of a model's parameters, and the scheduler of its learning rate, stepped every epoch."""
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        named = dict(model.named_parameters())
        apart = [name for name in named if self.std_factor != 1 and "log_std." in name]
        groups: list[dict[str, Any]] = [{"params": [named[name] for name in named if name not in apart]}]
        if apart:
            groups.append({"params": [named[name] for name in apart], "lr": self.std_factor * self.lr})
        made: torch.optim.Optimizer
        if self.name == "adam":
            made = torch.optim.Adam(groups, **options)
        else:
            made = torch.optim.SGD(groups, momentum=self.momentum, **options)
        return made, LambdaLR(made, self.decay.factor)


def change_rate(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, lr: float) -> bool:
    """Change the initial learning rate of a running training; decay and the ratios between groups stay.

    Args:
        optimizer: The optimizer, changed in place.
        scheduler: Scheduler of the optimizer, changed in place.
        lr: New initial learning rate of the first group.

    Returns:
        Whether the rate was another one before.
    """
    before = scheduler.base_lrs[0]
    if before == lr:
        return False
    for group, base in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] *= lr / before
        group["initial_lr"] = base * lr / before
    scheduler.base_lrs = [lr, *(base * lr / before for base in scheduler.base_lrs[1:])]
    return True
