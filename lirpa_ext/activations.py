"""Activations that an engine cannot build, or bounds badly: each is its function, its derivative, and a rule.

Those that the tracer would take apart (GELU, SiLU, Mish, hard-swish) are recorded as one node under `as_nodes`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import engine
from .operators import CUSTOM_OPS
from .relaxations import BoundScalar
from .rules import register_rule
from .rules.elementwise import Elementwise


class BoundErf(BoundScalar):
    """The error function."""

    turns = (0.0,)
    rising = (True, False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 2 / math.sqrt(math.pi) * torch.exp(-x * x)


class BoundStableSoftplus(BoundScalar):
    """log(1 + exp(x)), which neither engine relaxes; torch returns x itself beyond 20."""

    error = 2.1e-9  # log(1 + exp(-20))

    def forward(self, x: Tensor) -> Tensor:
        return torch.logaddexp(x, torch.zeros_like(x))

    def derivative(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class BoundConcaveLog(BoundScalar):
    """log(x), whose relaxation in auto_LiRPA 0.3 does not hold; NaN, which certifies nothing, where x may be 0."""

    rising = (False,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / x


class BoundElu(BoundScalar):
    """scale * (x where x > 0, else alpha (exp(x) - 1)): ELU and SELU."""

    turns = (0.0,)
    rising = (True, True)

    def __init__(
        self, attr: Any, inputs: Any, output_index: int, options: Any, alpha: float, scale: float = 1.0
    ) -> None:
        super().__init__(attr, inputs, output_index, options)
        if alpha < 0:
            raise NotImplementedError(f"ELU with a negative alpha, {alpha}")
        self.leak, self.scale = alpha, scale  # `alpha` means slopes to the engine

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.where(x > 0, x, self.leak * torch.expm1(x.clamp(max=0)))

    def derivative(self, x: Tensor) -> Tensor:
        return self.scale * torch.where(x > 0, 1.0, self.leak * torch.exp(x.clamp(max=0)))


class BoundPRelu(BoundScalar):
    """x where x > 0, else slope * x, the slope a constant of any shape that broadcasts."""

    turns = (0.0,)
    rising = (True, True)
    monotone = False  # the slope may be negative

    def forward(self, x: Tensor, slope: Tensor) -> Tensor:
        return torch.where(x > 0, x, slope * x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, engine.constant(self.inputs[1])).to(x)


class BoundHardSigmoid(BoundScalar):
    """clip(alpha x + beta, 0, 1)."""

    rising = (True, True, True)

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
    rising = (True, True, True)
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 3 + 0.5)).to(x)


class BoundClip(BoundScalar):
    """Clamp to constants, which auto_LiRPA 0.3 does not have."""

    rising = (True, True, True)

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
    rising = (False, True, False)
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def derivative(self, x: Tensor) -> Tensor:
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


class BoundTanhGelu(BoundScalar):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), whose slope turns where that of GELU nearly does."""

    turns = (-1.4185040, 1.4185040)
    rising = (False, True, False)
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def derivative(self, x: Tensor) -> Tensor:
        root = math.sqrt(2 / math.pi)
        inner = torch.tanh(root * (x + 0.044715 * x**3))
        return 0.5 * (1 + inner) + 0.5 * x * (1 - inner**2) * root * (1 + 3 * 0.044715 * x**2)


class BoundSilu(BoundScalar):
    """x sigmoid(x)."""

    turns = (-2.3993572805154, 2.3993572805154)
    rising = (False, True, False)
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def derivative(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return gate * (1 + x * (1 - gate))


class BoundMish(BoundScalar):
    """x tanh(softplus(x))."""

    turns = (-2.2563763963608, 1.4905711794854)
    rising = (False, True, False)
    monotone = False

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(x)

    def derivative(self, x: Tensor) -> Tensor:
        gate = torch.tanh(torch.logaddexp(x, torch.zeros_like(x)))
        return gate + x * (1 - gate**2) * torch.sigmoid(x)


def _elu(attr: Any, inputs: Any, output_index: int, options: Any) -> BoundElu:
    return BoundElu(attr, inputs, output_index, options, alpha=attr.get("alpha", 1.0))


def _selu(attr: Any, inputs: Any, output_index: int, options: Any) -> BoundElu:
    alpha, gamma = attr.get("alpha", 1.6732632423543772), attr.get("gamma", 1.0507009873554805)
    return BoundElu(attr, inputs, output_index, options, alpha=alpha, scale=gamma)


def steepest(node: BoundScalar, lower: Tensor, upper: Tensor) -> Tensor:
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


def _recorded(name: str, function: Callable[..., Tensor]) -> type[torch.autograd.Function]:
    """The function, which the tracer records as the node ``lirpa_ext::NAME``."""

    def forward(ctx: Any, x: Tensor, *constants: Tensor) -> Tensor:
        return function(x, *constants)

    def symbolic(graph: Any, x: Any, *constants: Any) -> Any:
        return graph.op(f"lirpa_ext::{name}", x, *constants).setType(x.type())

    methods = {"forward": staticmethod(forward), "symbolic": staticmethod(symbolic)}
    return type(name, (torch.autograd.Function,), methods)


_GELUS = {
    "none": _recorded("Gelu", F.gelu),
    "tanh": _recorded("TanhGelu", functools.partial(F.gelu, approximate="tanh")),
}
_PRELU = _recorded("PRelu", lambda x, slope: torch.where(x > 0, x, slope * x))
_RECORDED = {
    F.silu: _recorded("Silu", F.silu),
    F.mish: _recorded("Mish", F.mish),
    F.hardswish: _recorded("HardSwish", F.hardswish),
}


class as_nodes(TorchFunctionMode):
    """While a model is traced: one node for each of those functions, in place of what it is made of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.gelu:
            return _GELUS[kwargs.get("approximate", "none")].apply(args[0])
        if func in (F.prelu, torch.prelu):
            x, slope = args
            return _PRELU.apply(x, slope.view(-1, *[1] * (x.dim() - 2)) if x.dim() > 1 else slope)
        if func is F.celu:  # which the tracer turns into float32
            alpha = args[1] if len(args) > 1 else kwargs.get("alpha", 1.0)
            return alpha * F.elu(args[0] / alpha)
        if func in _RECORDED:
            return _RECORDED[func].apply(args[0])
        return func(*args, **kwargs)


for kind in (BoundErf, BoundStableSoftplus, BoundConcaveLog, BoundElu, BoundPRelu, BoundHardSigmoid, BoundHardSwish,
             BoundExactGelu, BoundTanhGelu, BoundSilu, BoundMish):  # fmt: skip
    register_rule(kind.__name__, Elementwise(steepest, monotone=kind.monotone and not kind.error))
CUSTOM_OPS |= {
    "onnx::Erf": BoundErf, "onnx::Softplus": BoundStableSoftplus, "onnx::Elu": _elu,
    "onnx::Selu": _selu, "lirpa_ext::PRelu": BoundPRelu, "onnx::HardSigmoid": BoundHardSigmoid,
    "lirpa_ext::HardSwish": BoundHardSwish, "lirpa_ext::Gelu": BoundExactGelu, "lirpa_ext::TanhGelu": BoundTanhGelu,
    "lirpa_ext::Silu": BoundSilu, "lirpa_ext::Mish": BoundMish,
}  # fmt: skip
if engine.IS_LEGACY:
    CUSTOM_OPS |= {"onnx::Clip": BoundClip, "onnx::Log": BoundConcaveLog}
