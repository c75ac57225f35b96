"""Activations that an engine cannot build, or bounds badly: each is its function, its derivative, and a rule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import engine
from .operators import CUSTOM_OPS
from .relaxations import BoundScalar
from .rules import register_rule
from .rules.elementwise import Elementwise


class BoundErf(BoundScalar):
    """The error function."""

    turns = (0.0,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 2 / math.sqrt(math.pi) * torch.exp(-x * x)


class BoundStableSoftplus(BoundScalar):
    """log(1 + exp(x)), which neither engine relaxes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class BoundConcaveLog(BoundScalar):
    """log(x), whose relaxation in auto_LiRPA 0.3 does not hold; NaN, which certifies nothing, where x may be 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / x


class BoundElu(BoundScalar):
    """scale * (x where x > 0, else alpha (exp(x / inner) - 1)): ELU, SELU and CELU."""

    turns = (0.0,)

    def __init__(
        self, attr: Any, inputs: Any, output_index: int, options: Any,
        alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(attr, inputs, output_index, options)
        self.leak, self.scale, self.inner = alpha, scale, inner  # `alpha` means slopes to the engine

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.where(x > 0, x, self.leak * torch.expm1(x.clamp(max=0) / self.inner))

    def derivative(self, x: Tensor) -> Tensor:
        return self.scale * torch.where(x > 0, 1.0, self.leak / self.inner * torch.exp(x.clamp(max=0) / self.inner))


class BoundPRelu(BoundScalar):
    """x where x > 0, else slope * x, the slope a constant of any shape that broadcasts."""

    turns = (0.0,)
    monotone = False  # the slope may be negative

    def forward(self, x: Tensor, slope: Tensor) -> Tensor:
        return torch.where(x > 0, x, slope * x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, engine.constant(self.inputs[1])).to(x)


class BoundHardSigmoid(BoundScalar):
    """clip(alpha x + beta, 0, 1)."""

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.factor, self.shift = attr.get("alpha", 0.2), attr.get("beta", 0.5)
        self.turns = (-self.shift / self.factor, (1 - self.shift) / self.factor)

    def forward(self, x: Tensor) -> Tensor:
        return (self.factor * x + self.shift).clamp(0, 1)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where((x > self.turns[0]) & (x < self.turns[1]), self.factor, 0.0).to(x)


class BoundHardSwish(BoundScalar):
    """x clip(x / 6 + 1/2, 0, 1)."""

    turns = (-3.0, 3.0)
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 3 + 0.5)).to(x)


class BoundClip(BoundScalar):
    """Clamp to constants, which auto_LiRPA 0.3 does not have."""

    @property
    def turns(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The ends."""
        low, high = (engine.constant(parent) for parent in self.inputs[1:])
        return low, high

    def forward(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return x.clamp(low, high)

    def derivative(self, x: Tensor) -> Tensor:
        low, high = self.turns
        return ((x > low) & (x < high)).to(x)


class BoundExactGelu(BoundScalar):
    """x Phi(x). Its slope rises between -sqrt 2 and sqrt 2 and falls outside."""

    turns = (-math.sqrt(2), math.sqrt(2))
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def derivative(self, x: Tensor) -> Tensor:
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


class BoundTanhGelu(BoundScalar):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), whose slope turns where that of GELU nearly does."""

    turns = (-1.4185040, 1.4185040)
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def derivative(self, x: Tensor) -> Tensor:
        root = math.sqrt(2 / math.pi)
        inner = torch.tanh(root * (x + 0.044715 * x**3))
        return 0.5 * (1 + inner) + 0.5 * x * (1 - inner**2) * root * (1 + 3 * 0.044715 * x**2)


def _elu(attr: Any, inputs: Any, output_index: int, options: Any) -> BoundElu:
    return BoundElu(attr, inputs, output_index, options, alpha=attr.get("alpha", 1.0))


def _celu(attr: Any, inputs: Any, output_index: int, options: Any) -> BoundElu:
    alpha = attr.get("alpha", 1.0)
    return BoundElu(attr, inputs, output_index, options, alpha=alpha, inner=alpha)


def _selu(attr: Any, inputs: Any, output_index: int, options: Any) -> BoundElu:
    alpha, gamma = attr.get("alpha", 1.6732632423543772), attr.get("gamma", 1.0507009873554805)
    return BoundElu(attr, inputs, output_index, options, alpha=alpha, scale=gamma)


def _gelu(attr: Any, inputs: Any, output_index: int, options: Any) -> BoundScalar:
    kind = BoundTanhGelu if attr.get("approximate", "none") in ("tanh", b"tanh") else BoundExactGelu
    return kind(attr, inputs, output_index, options)


def _steepest(node: BoundScalar, lower: Tensor, upper: Tensor) -> Tensor:
    """Largest |f'| over the box: f' is monotone between its turns, on both sides of which it is looked at."""
    slopes = [node.derivative(lower), node.derivative(upper)]
    for turn in node.turns:
        at = torch.as_tensor(turn).to(lower)
        inside = (lower <= at) & (upper >= at)
        beside = (
            torch.nextafter(at, torch.full_like(at, -torch.inf)),
            at,
            torch.nextafter(at, torch.full_like(at, torch.inf)),
        )
        slopes += [torch.where(inside, node.derivative(x.expand_as(lower)), slopes[0]) for x in beside]
    return torch.stack([slope.abs() for slope in slopes]).amax(0)


for kind in (BoundErf, BoundStableSoftplus, BoundConcaveLog, BoundElu, BoundPRelu, BoundHardSigmoid, BoundHardSwish,
             BoundExactGelu, BoundTanhGelu):  # fmt: skip
    register_rule(kind.__name__, Elementwise(_steepest, monotone=kind.monotone))
CUSTOM_OPS |= {
    "onnx::Erf": BoundErf, "onnx::Softplus": BoundStableSoftplus, "onnx::Elu": _elu, "onnx::Celu": _celu,
    "onnx::Selu": _selu, "onnx::PRelu": BoundPRelu, "onnx::HardSigmoid": BoundHardSigmoid,
    "onnx::HardSwish": BoundHardSwish, "onnx::Gelu": _gelu,
}  # fmt: skip
if engine.IS_LEGACY:
    CUSTOM_OPS |= {"onnx::Clip": BoundClip, "onnx::Log": BoundConcaveLog}
