"""AutoAttack as an `Attack`; it needs the package pyautoattack."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..domain.lengths import flat
from ..errors import ConfigError, InvalidInputError
from .base import Attack, Target

_logger = logging.getLogger(__name__)

_NORMS = {2.0: "L2", math.inf: "Linf"}
_LEAST_CLASSES = {"standard": 4, "rand": 3}  # that the DLR losses of a version need
_LEAST_SIDE = 5  # Square divides the sides of images by five
_MOST_TARGETS = 9  # target classes of the targeted attacks, AutoAttack's default
# pyautoattack computes in float32. A point farther outside than this share of eps, or of the data range, is not due to
# rounding.
_ROUNDING = 1e-4


class AutoAttack(Attack):
    """AutoAttack in pyautoattack's implementation, in l2 and l-infinity balls within a data range.

    F. Croce and M. Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, ICML 2020. The points that it returns are projected into the set and scored like those of other attacks.

    Args:
        version: "standard" (default: APGD-CE, APGD-T, FAB-T, Square) for deterministic models, or "rand" (APGD-CE and
            APGD-DLR, each gradient averaged over 20 evaluations) for randomized models, of which each evaluation draws
            a network. Wrap "rand" in `EOT` for a score over several draws.
        batch_size: Samples at a time, default 250.

    Raises:
        ConfigError: pyautoattack is not installed.
        InvalidInputError: The version is unknown. When the attack is called: the norm is neither 2 nor inf, there is no
            data range, the model has too few classes, the attack is targeted, or "standard" is used on a randomized
            model or on inputs that are no images.
    """

    def __init__(self, version: str = "standard", batch_size: int = 250) -> None:
        if version not in _LEAST_CLASSES:
            raise InvalidInputError(f"version must be one of {', '.join(_LEAST_CLASSES)}; got {version!r}")
        if batch_size < 1:
            raise InvalidInputError(f"batch_size must be 1 or more, got {batch_size}")
        _pyautoattack()
        self.version, self.batch_size = version, batch_size

    def run(self, target: Target) -> None:
        """Run pyautoattack once for each eps of the batch, with the data range mapped to [0, 1]."""
        self._check(target)
        low, high = _ends(target)
        eps = target.eps.flatten()
        points = target.x.clone()
        for level in eps.unique().tolist():
            chosen = eps == level
            if level > 0:
                points[chosen] = self._points(target, chosen, level, low, high)
        self._note_outside(target, points, high - low)
        target.score(target.project(points))

    def _points(self, target: Target, chosen: Tensor, eps: float, low: float, high: float) -> Tensor:
        """Points of pyautoattack for the chosen samples (mask, (B,)), which share one eps."""
        x, y = target.x[chosen], target.y[chosen]
        view = _UnitCube(target, x, low, high - low)
        unit = ((x - low) / (high - low)).float()
        unit = unit if unit.dim() == 4 else unit.view(len(x), 1, 1, -1)  # pyautoattack takes only images
        tracing = sys.gettrace()  # pyautoattack switches it off
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices):  # pyautoattack seeds torch's generator
            seed = int(torch.randint(2**31, (), generator=target.generator, device=target.generator.device))
            attack = _pyautoattack().AutoAttack(
                view, norm=_NORMS[target.norm], eps=eps / (high - low), version=self.version, seed=seed,
                device=x.device,
            )  # fmt: skip
            wanted = min(_MOST_TARGETS, target.classes - 1)
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = wanted
            try:
                found, _ = attack.run_standard_evaluation(unit, y, batch_size=self.batch_size)
            finally:
                sys.settrace(tracing)
        # Entries that did not change are taken from x, without the rounding to float32.
        moved = (found != unit).view_as(x)
        return torch.where(moved, low + (high - low) * found.view_as(x).to(x), x)

    def _check(self, target: Target) -> None:
        if target.norm not in _NORMS:
            raise InvalidInputError(f"AutoAttack takes norm 2 and inf, got {target.norm:g}")
        if target.targets is not None:
            raise InvalidInputError("AutoAttack is untargeted; use PGD with targets")
        if target.randomized and self.version == "standard":
            raise InvalidInputError('the model is randomized: use AutoAttack("rand")')
        if self.version == "standard" and (target.x.dim() != 4 or min(target.x.shape[2:]) < _LEAST_SIDE):
            raise InvalidInputError(
                f"AutoAttack's Square takes images (B, C, H, W) of {_LEAST_SIDE} pixels a side at least, got "
                f'{tuple(target.x.shape)}; the other attacks, or AutoAttack("rand"), take any shape'
            )
        least = _LEAST_CLASSES[self.version]
        if target.classes < least:
            raise InvalidInputError(
                f"AutoAttack's {self.version!r} needs {least} classes, the model has {target.classes}"
            )

    @staticmethod
    def _note_outside(target: Target, points: Tensor, width: float) -> None:
        """Log a warning if points of pyautoattack are outside of the set by more than rounding; they are projected."""
        excess = flat(points - target.project(points)).abs().amax(1)
        far = excess > _ROUNDING * torch.clamp(target.eps.flatten(), max=width)
        if far.any():
            _logger.warning("pyautoattack left the set of %d samples, by up to %g", int(far.sum()), float(excess.max()))


class _UnitCube(nn.Module):
    """The attacked model as a function of float32 images in [0, 1]; a randomized model draws a network at each call."""

    def __init__(self, target: Target, x: Tensor, low: float, width: float) -> None:
        super().__init__()
        self.target, self.like, self.low, self.width = target, x, low, width

    def forward(self, unit: Tensor) -> Tensor:
        points = self.low + self.width * unit.to(self.like.dtype).view(-1, *self.like.shape[1:])
        return self.target.network()(points).float()


def _ends(target: Target) -> tuple[float, float]:
    ends = target.perturbation.range_lower, target.perturbation.range_upper
    low, high = (float(end) if end is not None and torch.as_tensor(end).numel() == 1 else math.nan for end in ends)
    if not low < high:
        raise InvalidInputError("AutoAttack works inside of a data range: give x_L and x_U, one number each")
    return low, high


def _pyautoattack() -> Any:
    try:
        return importlib.import_module("pyautoattack")
    except ImportError as error:
        raise ConfigError(
            f"AutoAttack needs pyautoattack, which cannot be imported ({error}): pip install pyautoattack"
        ) from error
