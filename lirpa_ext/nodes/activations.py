"""Activations that the engine cannot build or bounds loosely: each class gives a function and its derivative.

Activations that the tracer would split into several operations (GELU, SiLU, Mish, hard-swish) are recorded as one node
while `as_nodes` is active.
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

from .. import engine
from ..domain.scalar_functions import FUNCTIONS, ScalarFunction
from .padding import circular
from .relaxations import BoundScalar


class BoundErf(BoundScalar):
    """The error function."""

    turns = (0.0,)
    rising = (True, False)
    least, most = -1.0, 1.0

    def value(self, x: Tensor) -> Tensor:
        return torch.erf(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 2 / math.sqrt(math.pi) * torch.exp(-x * x)


class Sigmoid(ScalarFunction):
    """1 / (1 + exp(-x)).

    The lines of both versions of the engine are unsound on boxes of width 1e-12; those of 0.7.1 are off by more than
    this width.
    """

    turns = (0.0,)
    rising = (True, False)
    least, most = 0.0, 1.0

    def value(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.sigmoid(-x)


class Tanh(Sigmoid):
    """tanh(x), whose derivative 1 - tanh(x)^2 is 4 s(2x) s(-2x) with s the sigmoid."""

    least, most = -1.0, 1.0

    def value(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)


class ArcTangent(Sigmoid):
    """atan(x)."""

    least, most = -math.pi / 2 * (1 + 1e-6), math.pi / 2 * (1 + 1e-6)  # beyond pi / 2 as rounded in float32

    def value(self, x: Tensor) -> Tensor:
        return torch.atan(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / (1 + x * x)


class BoundStableSoftplus(BoundScalar):
    """log(1 + exp(x)), which no version of the engine relaxes; for x above 20, torch's softplus returns x."""

    least = 0.0
    error = 2.1e-9  # log(1 + exp(-20))

    def value(self, x: Tensor) -> Tensor:
        return torch.logaddexp(x, torch.zeros_like(x))

    def derivative(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class BoundElu(BoundScalar):
    """ELU and SELU: scale * x where x > 0, else scale * alpha (exp(x) - 1).

    Args:
        attr, inputs, output_index, options: As for the engine's nodes.
        alpha: At least 0.
        scale: Factor of both branches, default 1.
    """

    turns = (0.0,)
    rising = (True, True)

    def __init__(
        self, attr: Any, inputs: Any, output_index: int, options: Any, alpha: float, scale: float = 1.0
    ) -> None:
        super().__init__(attr, inputs, output_index, options)
        if alpha < 0:
            raise NotImplementedError(f"ELU with a negative alpha, {alpha}")
        self.leak, self.scale = alpha, scale  # not `alpha`, which the engine reads as optimized slopes

    def value(self, x: Tensor) -> Tensor:
        return self.scale * torch.where(x > 0, x, self.leak * torch.expm1(x.clamp(max=0)))

    def derivative(self, x: Tensor) -> Tensor:
        return self.scale * torch.where(x > 0, 1.0, self.leak * torch.exp(x.clamp(max=0)))


class BoundPRelu(BoundScalar):
    """PReLU: x where x > 0, else slope * x, with a constant slope of any shape that broadcasts with x."""

    turns = (0.0,)
    rising = (True, True)
    monotone = False  # the slope may be negative

    def forward(self, x: Tensor, slope: Tensor) -> Tensor:  # type: ignore[override]
        return torch.where(x > 0, x, slope * x)

    def value(self, x: Tensor) -> Tensor:
        return self.forward(x, engine.constant(self.inputs[1]))

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, engine.constant(self.inputs[1])).to(x)


class BoundHardSigmoid(BoundScalar):
    """Hard sigmoid: clip(alpha x + beta, 0, 1)."""

    rising = (True, True, True)
    least, most = 0.0, 1.0

    def __init__(self, attr: Any, inputs: Any, output_index: int, options: Any) -> None:
        super().__init__(attr, inputs, output_index, options)
        self.factor, self.shift = attr.get("alpha", 0.2), attr.get("beta", 0.5)
        self.turns = (-self.shift / self.factor, (1 - self.shift) / self.factor)

    def value(self, x: Tensor) -> Tensor:
        return (self.factor * x + self.shift).clamp(0, 1)

    def noise(self, x: Tensor) -> float:
        return 4 * (1 + abs(self.shift))  # alpha x + beta cancels near 0

    def derivative(self, x: Tensor) -> Tensor:
        inside = (x > self.turns[0]) & (x < self.turns[1])
        return self.factor * inside.to(x)


class BoundHardSwish(BoundScalar):
    """Hard swish: x clip(x / 6 + 1/2, 0, 1)."""

    turns = (-3.0, 3.0)
    rising = (True, True, True)
    monotone = False
    least = -0.376

    def value(self, x: Tensor) -> Tensor:
        return F.hardswish(x)

    def derivative(self, x: Tensor) -> Tensor:
        return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 3 + 0.5)).to(x)


class Clamp(ScalarFunction):
    """min(max(x, low), high).

    Args:
        low: Lower end, may be -inf.
        high: Upper end, may be inf.
    """

    rising = (True, True, True)

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.ends = low, high

    @classmethod
    def of(cls, node: Any) -> Clamp:
        """The function of a clamp node, of the engine or of this package, whose ends are its inputs."""
        low, high = (engine.constant(parent) for parent in node.inputs[1:])
        return cls(_end(low, -math.inf), _end(high, math.inf))

    @property
    def turns(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Both ends, ascending."""
        low, high = self.ends
        return torch.minimum(low, high), high

    def value(self, x: Tensor) -> Tensor:
        low, high = self.ends
        return x.clamp(low.to(x), high.to(x))

    def derivative(self, x: Tensor) -> Tensor:
        low, high = self.ends
        return ((x > low) & (x < high)).to(x)

    def steepest(self, lower: Tensor, upper: Tensor) -> Tensor:
        """1 where [l, u] meets the open interval between the ends, or is NaN; else 0."""
        low, high = self.ends
        return (~((upper <= low) | (lower >= high) | (low >= high))).to(upper)


class BoundClip(BoundScalar):
    """Clamp to constant ends, each of which may be missing or infinite; 0.3 has no such node, that of 0.7 gives NaN."""

    def forward(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:  # type: ignore[override]
        return Clamp(_end(low, -math.inf), _end(high, math.inf)).value(x)

    def pieces(self, lower: Tensor, upper: Tensor) -> Any:
        return Clamp.of(self).pieces(lower, upper)

    def value(self, x: Tensor) -> Tensor:
        return Clamp.of(self).value(x)

    def derivative(self, x: Tensor) -> Tensor:
        return Clamp.of(self).derivative(x)

    def steepest(self, lower: Tensor, upper: Tensor) -> Tensor:
        return Clamp.of(self).steepest(lower, upper)


def _end(value: Any, default: float) -> Tensor:
    """An end of a clamp; in ONNX a missing end is None, or a tensor without entries."""
    missing = value is None or (isinstance(value, Tensor) and value.numel() == 0)
    return torch.tensor(default) if missing else torch.as_tensor(value)


class BoundExactGelu(BoundScalar):
    """GELU: x Phi(x), with Phi the standard normal distribution function; f' rises on [-sqrt 2, sqrt 2] alone."""

    turns = (-math.sqrt(2), math.sqrt(2))
    rising = (False, True, False)
    monotone = False
    least = -0.17

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def noise(self, x: Tensor) -> Tensor:
        return 4 * x.clamp(-10, 0).abs()  # 1 + erf cancels for x < 0, and is 0 below -10 in any type

    def derivative(self, x: Tensor) -> Tensor:
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


class BoundTanhGelu(BoundScalar):
    """GELU by tanh: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); f' turns near +-sqrt 2, where that of GELU does."""

    turns = (-1.4185040087908, 1.4185040087908)
    rising = (False, True, False)
    monotone = False
    least = -0.1701

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def noise(self, x: Tensor) -> Tensor:
        return 4 * x.clamp(-10, 0).abs()

    def derivative(self, x: Tensor) -> Tensor:
        root, x = math.sqrt(2 / math.pi), x.clamp(-100, 100)  # f' is 0 or 1 beyond 100 in any type
        inner = torch.tanh(root * (x + 0.044715 * x**3))
        return 0.5 * (1 + inner) + 0.5 * x * (1 - inner**2) * root * (1 + 3 * 0.044715 * x**2)


class BoundSilu(BoundScalar):
    """SiLU: x sigmoid(x)."""

    turns = (-2.3993572805154, 2.3993572805154)
    rising = (False, True, False)
    monotone = False
    least = -0.2785

    def value(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def derivative(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return gate * (1 + x * (1 - gate))


class BoundMish(BoundScalar):
    """Mish: x tanh(softplus(x))."""

    turns = (-2.2563763963608, 1.4905711794854)
    rising = (False, True, False)
    monotone = False
    least = -0.3089

    def value(self, x: Tensor) -> Tensor:
        return F.mish(x)

    def derivative(self, x: Tensor) -> Tensor:
        gate = torch.tanh(torch.logaddexp(x, torch.zeros_like(x)))
        return gate + x * (1 - gate**2) * torch.sigmoid(x)


def _elu(attr: Any, inputs: Any, output_index: int, options: Any) -> BoundElu:
    return BoundElu(attr, inputs, output_index, options, alpha=attr.get("alpha", 1.0))


def _selu(attr: Any, inputs: Any, output_index: int, options: Any) -> BoundElu:
    alpha, gamma = attr.get("alpha", 1.6732632423543772), attr.get("gamma", 1.0507009873554805)
    return BoundElu(attr, inputs, output_index, options, alpha=alpha, scale=gamma)


def recorded(name: str, function: Callable[..., Tensor]) -> type[torch.autograd.Function]:
    """An autograd function that computes `function`, and that the tracer records as one node.

    Args:
        name: Name of the node; the ONNX operation is ``lirpa_ext::NAME``.
        function: (input, further constants) -> output.

    Returns:
        The autograd function's class, to be called by ``apply``.
    """

    def forward(ctx: Any, x: Tensor, *constants: Tensor) -> Tensor:
        return function(x, *constants)

    def symbolic(graph: Any, x: Any, *constants: Any) -> Any:
        return graph.op(f"lirpa_ext::{name}", x, *constants).setType(x.type())

    methods = {"forward": staticmethod(forward), "symbolic": staticmethod(symbolic)}
    return type(name, (torch.autograd.Function,), methods)


_GELUS = {
    "none": recorded("Gelu", F.gelu),
    "tanh": recorded("TanhGelu", functools.partial(F.gelu, approximate="tanh")),
}
_PRELU = recorded("PRelu", lambda x, slope: torch.where(x > 0, x, slope * x))
_RECORDED = {
    F.silu: recorded("Silu", F.silu),
    F.mish: recorded("Mish", F.mish),
    F.hardswish: recorded("HardSwish", F.hardswish),
}


_PRODUCTS = {torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply, torch.Tensor.__mul__}
_SQUARES = {torch.square, torch.Tensor.square}


_CLAMPS = frozenset(
    getattr(place, name) for place in (torch, Tensor) for name in ("clamp", "clip", "clamp_min", "clamp_max")
)
_CLAMP = recorded("Clamp", lambda x, low, high: x.clamp(low, high))


def _clamped(func: Any, x: Tensor, *ends: Any, **named: Any) -> Tensor:
    """A clamp whose ends have the dtype of `x`; the tracer would turn numbers into float32."""
    name = "max" if func in (torch.clamp_max, Tensor.clamp_max) else "min"
    named |= dict(zip((name, "max"), ends, strict=False))

    def end(name: str, missing: float) -> Tensor:
        value = named.get(name)
        value = missing if value is None else value
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=x.dtype, device=x.device)

    return _CLAMP.apply(x, end("min", -math.inf), end("max", math.inf))


class as_nodes(TorchFunctionMode):
    """Context for tracing a model, in which certain torch functions are recorded as other operations.

    Activations such as GELU become one node in place of several; x * x becomes x^2, and some other functions become
    equivalent ones that the tracer or the engine handles correctly.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.gelu:
            return _GELUS[kwargs.get("approximate", "none")].apply(args[0])
        if func in (F.prelu, torch.prelu):
            x, slope = args
            return _PRELU.apply(x, slope.view(-1, *[1] * (x.dim() - 2)) if x.dim() > 1 else slope)
        if func in _PRODUCTS and len(args) == 2 and args[0] is args[1]:
            return args[0] ** 2  # interval arithmetic would treat two equal factors as independent
        if func in _SQUARES:
            return args[0] ** 2
        if func is F.logsigmoid:  # the tracer would take the logarithm of a sigmoid, which may be rounded to 0
            return -F.softplus(-args[0])
        if func is F.celu:  # the tracer would turn celu into float32
            alpha = args[1] if len(args) > 1 else kwargs.get("alpha", 1.0)
            return alpha * F.elu(args[0] / alpha)
        if func in _CLAMPS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return _clamped(func, *args, **kwargs)
        if func is F.pad and "circular" in (*args[2:3], kwargs.get("mode")):
            return circular(*args, **kwargs)
        if func in _RECORDED:
            return _RECORDED[func].apply(args[0])
        return func(*args, **kwargs)


FUNCTIONS |= {"BoundHardTanh": Clamp.of, "BoundClip": Clamp.of}
for engines, own in (("BoundSigmoid", Sigmoid()), ("BoundTanh", Tanh()), ("BoundAtan", ArcTangent())):
    FUNCTIONS[engines] = lambda node, own=own: own  # type: ignore[misc]
OPS: dict[str, Any] = {
    "onnx::Erf": BoundErf, "onnx::Softplus": BoundStableSoftplus, "onnx::Elu": _elu,
    "onnx::Selu": _selu, "lirpa_ext::PRelu": BoundPRelu, "onnx::HardSigmoid": BoundHardSigmoid,
    "lirpa_ext::HardSwish": BoundHardSwish, "lirpa_ext::Gelu": BoundExactGelu, "lirpa_ext::TanhGelu": BoundTanhGelu,
    "lirpa_ext::Silu": BoundSilu, "lirpa_ext::Mish": BoundMish, "onnx::Clip": BoundClip, "lirpa_ext::Clamp": BoundClip,
}  # fmt: skip
