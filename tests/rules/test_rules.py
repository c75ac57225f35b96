"""The contract of every rule: one table of small models, each op first in the graph and between other layers.

A model, a shape and the classes of nodes that must take the fallback: that is all that a new rule's test supplies.
The suite fails if a rule in the table of rules has no model here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from soundness import TOLERANCE, Extremes, assert_contains, extremes, generator, samples
from torch import Tensor, nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine
from lirpa_ext.domain.ball_box import BallBox
from lirpa_ext.domain.norms import NormCache
from lirpa_ext.errors import TraceError, UnsupportedNodeError
from lirpa_ext.passes.ball_box import propagate
from lirpa_ext.passes.intervals import propagate_intervals
from lirpa_ext.rules import RULES, Context
from lirpa_ext.rules.table import ONE_VERSION

BATCH = 2
LEGACY = engine.IS_LEGACY


class Op(nn.Module):
    """A function as a module, with parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


class Residual(nn.Module):
    """x + f(x), or another way to join them."""

    def __init__(self, branch: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch, self.join = branch, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.branch(x))


class _Exported(torch.autograd.Function):
    """An identity that the tracer records as the ONNX op of that name, which torch itself leaves out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def symbolic(graph: Any, x: Any, op: str) -> Any:
        return graph.op(op, x).setType(x.type())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None


@dataclass(frozen=True)
class Case:
    """A model and what is known of it.

    Attributes:
        build: Makes the op.
        shape: Shape of its input, without batch.
        fallbacks: Classes of nodes (without our suffixes) that must take the fallback, on this engine.
        inside: Also test it between other layers; False where its domain is not all of R^n.
        shift: Added to the input, for such a domain.
        ball: Whether the ball alone gives a bound (it does not where an interval must stay positive).
        ops: Operators of the engine to build with.
        slack: Allowance where the engine itself computes in float32 whatever the dtype.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fallbacks: tuple[str, ...] = ()
    inside: bool = True
    shift: float = 0.0
    ball: bool = True
    ops: dict[str, type] = field(default_factory=dict)
    slack: float = 0.0


def _op(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return functools.partial(Op, function, *shapes)


def _norm(module: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A batch norm whose statistics are not those of its start."""

    def build() -> nn.Module:
        norm = module()
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.2, 3.0)
            if norm.affine:
                norm.weight.normal_()
                norm.bias.normal_()
        return norm.eval()

    return build


class Slopes(nn.PReLU):
    """A slope for each channel."""

    def __init__(self, *slopes: float) -> None:
        super().__init__(len(slopes))
        self.weight.data = torch.tensor(slopes)


V, M, IMAGE, IMAGE_3 = (6,), (3, 4), (2, 5, 5), (3, 2, 2)  # a vector, a sequence (T, n), images
CHANNEL = torch.tensor([0.5, -1.5]).view(1, 2, 1, 1)
PART = torch.linalg.qr(torch.arange(16.0).view(4, 4) + 3 * torch.eye(4)).Q

CASES: dict[str, Case] = {
    # dense
    "dense": Case(lambda: nn.Linear(6, 4), V),
    "dense-without-bias": Case(lambda: nn.Linear(6, 4, bias=False), V),
    "dense-of-sequence": Case(lambda: nn.Linear(4, 5), M),
    "dense-engine": Case(lambda: nn.Linear(6, 4), V, ops={"onnx::Gemm": engine.BoundLinear}),
    "matmul-constant": Case(_op(lambda x: x @ PART.to(x)), (4,)),
    "matmul-parameter": Case(_op(lambda x, w: x @ w, (4, 5)), M),
    "matmul-from-left": Case(_op(lambda x, w: w @ x, (2, 3)), M),
    "matmul-engine": Case(_op(lambda x, w: x @ w, (4, 5)), M, ops={"onnx::MatMul": engine.bound_ops.BoundMatMul}),
    "vector-from-left": Case(_op(lambda x, w: w @ x, (3,)), M),
    "matmul-of-branches": Case(_op(lambda x: x @ x.transpose(1, 2)), M),
    # convolutions
    "conv": Case(lambda: nn.Conv2d(2, 3, 3), IMAGE),
    "conv-stride": Case(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), IMAGE),
    "conv-strides": Case(lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), IMAGE),
    "conv-dilation": Case(lambda: nn.Conv2d(2, 3, 2, dilation=2, padding=2), IMAGE),
    "conv-groups": Case(lambda: nn.Conv2d(2, 4, 3, groups=2, padding=1, bias=False), IMAGE),
    "conv-1x1": Case(lambda: nn.Conv2d(2, 3, 1), IMAGE),
    "conv1d": Case(lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "conv1d-all": Case(lambda: nn.Conv1d(4, 4, 3, stride=2, padding=2, dilation=2, groups=2), (4, 7)),
    "conv-transpose": Case(lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 3, 3)),
    "conv-transpose-padding": Case(
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 3, 3)
    ),
    "conv-transpose-groups": Case(lambda: nn.ConvTranspose2d(4, 2, 3, groups=2, dilation=2, bias=False), (4, 3, 3)),
    "conv1d-transpose": Case(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), (2, 5)),
    # batch norm
    "batch-norm": Case(_norm(lambda: nn.BatchNorm2d(2)), IMAGE),
    "batch-norm-1d": Case(_norm(lambda: nn.BatchNorm1d(6)), V),
    "batch-norm-sequence": Case(_norm(lambda: nn.BatchNorm1d(3)), M),
    "batch-norm-plain": Case(_norm(lambda: nn.BatchNorm2d(2, affine=False)), IMAGE),
    # activations
    "relu": Case(nn.ReLU, V),
    "relu-engine": Case(nn.ReLU, V, ops={"onnx::Relu": engine.BoundRelu}),
    "leaky-relu": Case(lambda: nn.LeakyReLU(0.2), V),
    "sigmoid": Case(nn.Sigmoid, V),
    "tanh": Case(nn.Tanh, V),
    "atan": Case(_op(torch.atan), V),
    "hardtanh": Case(lambda: nn.Hardtanh(-0.3, 0.6), V),
    "relu6": Case(nn.ReLU6, V),
    "relu6-saturated": Case(lambda: nn.Sequential(Op(lambda x: x * 12.0), nn.ReLU6()), V),
    "silu": Case(nn.SiLU, V),
    "silu-wide": Case(lambda: nn.Sequential(Op(lambda x: x * 9.0), nn.SiLU()), V),
    "mish": Case(nn.Mish, V),
    "gelu": Case(nn.GELU, V),
    "gelu-wide": Case(lambda: nn.Sequential(Op(lambda x: x * 5.0), nn.GELU()), V),
    "gelu-tanh": Case(lambda: nn.GELU("tanh"), V),
    "elu": Case(nn.ELU, V),
    "elu-steep": Case(lambda: nn.ELU(2.5), V),
    "selu": Case(nn.SELU, V),
    "celu": Case(lambda: nn.CELU(0.5), V),
    "erf": Case(_op(torch.erf), V),
    "prelu": Case(lambda: Slopes(0.25, -0.5, 1.5), IMAGE_3),
    "prelu-vector": Case(nn.PReLU, V),
    "hardsigmoid": Case(lambda: nn.Sequential(Op(lambda x: x * 9.0), nn.Hardsigmoid()), V),
    "hardswish": Case(lambda: nn.Sequential(Op(lambda x: x * 9.0), nn.Hardswish()), V),
    "softplus": Case(nn.Softplus, V),
    "softplus-beta": Case(lambda: nn.Softplus(beta=3.0), V),
    "softmax": Case(lambda: nn.Softmax(1), V),
    "softmax-first-axis": Case(lambda: nn.Softmax(1), M),
    "softmax-of-one": Case(lambda: nn.Softmax(1), (1, 4)),
    "log-softmax": Case(lambda: nn.LogSoftmax(1), V),
    "log-softmax-first-axis": Case(lambda: nn.LogSoftmax(1), M),
    "log-softmax-of-one": Case(lambda: nn.LogSoftmax(1), (1, 4)),
    "exp": Case(_op(torch.exp), V),
    "abs": Case(_op(torch.abs), V),
    "sin": Case(_op(torch.sin), V),
    "cos": Case(_op(torch.cos), V),
    "log": Case(_op(torch.log), V, inside=False, shift=2.0),
    "sqrt": Case(_op(torch.sqrt), V, inside=False, shift=2.0),
    "tan": Case(_op(lambda x: torch.tan(0.2 * torch.tanh(x))), V),
    "square": Case(_op(lambda x: x**2), V),
    "reciprocal": Case(_op(lambda x: 1 / x), V, (), inside=False, shift=2.0, slack=1e-6),
    "quotient": Case(_op(lambda x: (x + 1) / (x**2 + 0.5)), V, ball=False),
    "quotient-negative": Case(_op(lambda x: x / (-1.5 - x**2)), V, ball=False),
    # pools
    "average-pool": Case(lambda: nn.AvgPool2d(2), (2, 4, 4)),
    "average-pool-overlap": Case(lambda: nn.AvgPool2d(3, stride=1), IMAGE),
    "average-pool-padded": Case(lambda: nn.AvgPool2d(3, stride=2, padding=1), IMAGE),
    "max-pool": Case(lambda: nn.MaxPool2d(2), (2, 4, 4)),
    "max-pool-overlap": Case(lambda: nn.MaxPool2d(3, stride=1), IMAGE),
    "max-pool-padded": Case(lambda: nn.MaxPool2d(3, stride=2, padding=1), IMAGE),
    "global-average-pool": Case(lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive-average-pool": Case(lambda: nn.AdaptiveAvgPool2d(2), (2, 4, 4)),
    "adaptive-max-pool": Case(lambda: nn.AdaptiveMaxPool2d(2), (2, 4, 4)),
    "global-max-pool": Case(lambda: nn.AdaptiveMaxPool2d(1), IMAGE),
    # arithmetic
    "add-scalar": Case(_op(lambda x: x + 1.5), V),
    "add-channels": Case(_op(lambda x: x + CHANNEL.to(x)), IMAGE),
    "add-parameter": Case(_op(lambda x, b: b + x, (6,)), V),
    "add-broadcast": Case(_op(lambda x, b: x + b, (3, 6)), (1, 6)),
    "sub-scalar": Case(_op(lambda x: x - 0.5), V),
    "sub-channels": Case(_op(lambda x: x - CHANNEL.to(x)), IMAGE),
    "const-minus-x": Case(_op(lambda x: 1.0 - x), V),
    "const-minus-x-broadcast": Case(_op(lambda x, b: b - x, (3, 6)), (1, 6)),
    "mul-scalar": Case(_op(lambda x: x * -2.5), V),
    "mul-channels": Case(_op(lambda x: x * CHANNEL.to(x)), IMAGE),
    "mul-parameter": Case(_op(lambda x, w: w * x, (6,)), V),
    "mul-broadcast": Case(_op(lambda x, w: x * w, (3, 6)), (1, 6)),
    "mul-zero": Case(_op(lambda x: x * 0.0), V),
    "div-scalar": Case(_op(lambda x: x / -0.4), V),
    "div-channels": Case(_op(lambda x: x / CHANNEL.to(x)), IMAGE),
    "normalization": Case(_op(lambda x: (x - CHANNEL.to(x)) / (CHANNEL.to(x) + 2)), IMAGE),
    "x-plus-x": Case(_op(lambda x: x + x), V),
    "x-minus-x": Case(_op(lambda x: x - x), V),
    "residual": Case(lambda: Residual(nn.Linear(6, 6), torch.add), V),
    "residual-conv": Case(lambda: Residual(nn.Conv2d(2, 2, 3, padding=1), torch.add), IMAGE),
    "residual-sub": Case(lambda: Residual(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.sub), V),
    "residual-broadcast": Case(lambda: Residual(nn.Linear(6, 1), torch.add), V),
    "branches-multiplied": Case(lambda: Residual(nn.Linear(6, 6), torch.mul), V),
    "squeeze-excite": Case(
        lambda: Residual(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Sigmoid()), torch.mul),
        IMAGE,
    ),
    "neg": Case(_op(torch.neg), V),
    # joining
    "concat": Case(lambda: Residual(nn.Linear(6, 3), lambda a, b: torch.cat([a, b, a], 1)), V),
    "concat-channels": Case(lambda: Residual(nn.Conv2d(2, 3, 1), lambda a, b: torch.cat([b, a], 1)), IMAGE),
    "concat-last-axis": Case(lambda: Residual(nn.ReLU(), lambda a, b: torch.cat([a, b], -1)), M),
    "concat-constant": Case(_op(lambda x, c: torch.cat([x, c.expand(x.size(0), 2)], 1), (1, 2)), V),
    "stack": Case(_op(lambda x: torch.stack([x, 2 * x], 1)), V),
    # moving
    "flatten": Case(nn.Flatten, IMAGE),
    "flatten-inner": Case(_op(lambda x: x.flatten(2)), (2, 3, 2)),
    "size-arithmetic": Case(_op(lambda x: x[:, x.shape[1] - 2 :]), V),
    "reshape": Case(_op(lambda x: x.reshape(-1, 2, 3)), V),
    "view": Case(_op(lambda x: x.view(x.size(0), -1)), IMAGE),
    "transpose": Case(_op(lambda x: x.transpose(1, 2)), M),
    "permute": Case(_op(lambda x: x.permute(0, 3, 1, 2)), (2, 3, 4)),
    "squeeze": Case(_op(lambda x: x.squeeze(2)), (3, 1)),
    "unsqueeze": Case(_op(lambda x: x.unsqueeze(1)), V),
    "expand": Case(_op(lambda x: x.unsqueeze(1).expand(-1, 3, -1)), V),
    "tile": Case(_op(lambda x: x.repeat(1, 3)), V),
    "pad": Case(lambda: nn.ConstantPad2d((1, 0, 2, 1), 0.7), (2, 3, 3)),
    "pad-zero": Case(lambda: nn.ZeroPad2d(1), (2, 3, 3)),
    "pad-reflect": Case(lambda: nn.ReflectionPad2d((1, 2, 0, 1)), (2, 3, 3)),
    "pad-replicate": Case(lambda: nn.ReplicationPad2d(2), (2, 3, 3)),
    "pad-circular": Case(lambda: nn.CircularPad2d(1), (2, 3, 3)),
    "pad-vector": Case(_op(lambda x: F.pad(x, (1, 2), value=-0.5)), V),
    "slice": Case(_op(lambda x: x[:, 1:4]), V),
    "slice-image": Case(_op(lambda x: x[:, :, 1:-1, :3]), IMAGE),
    "slice-negative": Case(_op(lambda x: x[..., -3:]), V),
    "split": Case(_op(lambda x: torch.cat([a * (i + 1.0) for i, a in enumerate(x.split(2, 1))], 1)), V),
    "gather": Case(_op(lambda x: x[:, torch.tensor([2, 0, 2])]), V),
    "gather-one": Case(_op(lambda x: x[:, 1]), M),
    "cast": Case(_op(lambda x: x.double().to(x.dtype)), V),
    "identity": Case(_op(lambda x: _Exported.apply(x, "Identity")), V),
    "dropout-layer": Case(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), V),
    "input-itself": Case(nn.Identity, V),
    # reductions
    "mean": Case(_op(lambda x: x.mean((2, 3))), IMAGE),
    "mean-keepdim": Case(_op(lambda x: x.mean(1, keepdim=True)), M),
    "sum": Case(_op(lambda x: x.sum(2)), M),
    "sum-keepdim": Case(_op(lambda x: x.sum(1, keepdim=True)), M),
    "cumsum": Case(_op(lambda x: x.cumsum(1)), V),
    "max": Case(_op(lambda x: x.amax(2)), M),
    "max-keepdim": Case(_op(lambda x: x.amax(1, keepdim=True)), M),
    "min": Case(_op(lambda x: x.amin(2)), M),
    # several
    "layer-norm": Case(lambda: nn.LayerNorm(6), V, ball=False, slack=1e-6),
    "attention": Case(_op(lambda x, w: (x @ w @ x.transpose(1, 2)).sigmoid() @ x, (4, 4)), M),
}
if not LEGACY:
    CASES |= {
        "maximum-of-two": Case(_op(lambda x, w: torch.maximum(2 * x, x.flip(1) * w), (6,)), V),
        "minimum-of-two": Case(_op(lambda x, w: torch.minimum(x - w, x.flip(1)), (6,)), V),
        "maximum-of-constant": Case(_op(lambda x, w: torch.maximum(w, x), (6,)), V),
        "minimum-of-rows": Case(_op(lambda x: torch.minimum(x[:, :1], x[:, 1:])), M),
        "maximum-of-ties": Case(_op(lambda x: torch.maximum(x, x.cumsum(1))), V),
    }
if LEGACY:
    for _name, _symbol in (("add-scalar", "Add"), ("sub-scalar", "Sub"), ("mul-scalar", "Mul"), ("div-scalar", "Div")):
        CASES[f"{_name}-engine"] = Case(
            CASES[_name].build, V, ops={f"onnx::{_symbol}": getattr(engine.bound_ops, f"Bound{_symbol}")}
        )

# What this engine cannot build, and what nobody can: no model, no rule to test.
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "leaky-relu-negative": lambda: nn.LeakyReLU(-0.5),
    "leaky-relu-steep": lambda: nn.LeakyReLU(1.7),
    "slice-step": _op(lambda x: x[..., ::2]),
    "max-pool-ceil": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "max-pool-dilation": lambda: nn.MaxPool2d(2, dilation=2),
    "average-pool-ceil": lambda: nn.AvgPool2d(3, stride=3, ceil_mode=True),
    "average-pool-without-padding": lambda: nn.AvgPool2d(3, padding=1, count_include_pad=False),
    "instance-norm": lambda: nn.InstanceNorm2d(2, affine=True),
}
NOT_ON_THIS_ENGINE = {"min", "cast"} if LEGACY else set()

# Rules without a model: nodes that do not exist on this engine, or that today's torch never gives it.
EXEMPT = (
    {
        "BoundDropout": "dropout is the identity before the engine sees it",
        "BoundATenUnflatten": "written by the exporters of older torch alone",
        **dict.fromkeys(("BoundMax", "BoundMin") if LEGACY else (), "auto_LiRPA 0.3 does not build them"),
        "BoundPad": "takes the value as a number, which today's torch does not write; BoundAnyPad replaces it",
    }
    | dict.fromkeys(
        ("BoundCos", "BoundExp", "BoundLog", "BoundPow", "BoundSin", "BoundSqr", "BoundSqrt", "BoundTan"),
        "of the engine's own class alone, after register()",
    )
    | (
        dict.fromkeys(("BoundHardTanh", "BoundReciprocal", "BoundReduceMin"), "0.7 only")
        if LEGACY
        else dict.fromkeys(("BoundConv1d", "BoundDiv", "BoundDivByAdjoint", "BoundHardTanh"), "0.3 only, or replaced")
    )
)

MODELS = {
    (f"{name}-inside" if inside else name): (name, inside)
    for name, case in CASES.items()
    for inside in ([False, True] if case.inside else [False])
    if name not in NOT_ON_THIS_ENGINE
}


@dataclass(frozen=True)
class Setting:
    """A perturbation set: every pair of norm, dtype, kind of eps and data range occurs."""

    norm: float
    dtype: torch.dtype
    per_sample: bool
    ranged: bool
    rows: bool

    def perturbation(self, shift: float, scale: float = 1.0) -> PerturbationLpNorm:
        eps: Any = scale * {1: 0.6, 2: 0.4, 3: 0.3, math.inf: 0.1}[self.norm]
        if self.per_sample:
            eps = torch.tensor([eps, eps / 4], dtype=self.dtype)
        ends = {"x_L": shift, "x_U": torch.tensor(shift + 1.0, dtype=self.dtype)} if self.ranged else {}
        return PerturbationLpNorm(norm=self.norm, eps=eps, **ends)


SETTINGS = [
    Setting(2, torch.float64, False, False, False),
    Setting(2, torch.float64, True, True, True),
    Setting(2, torch.float32, True, False, False),
    Setting(math.inf, torch.float64, True, True, False),
    Setting(math.inf, torch.float64, False, False, False),
    Setting(math.inf, torch.float32, False, True, True),
    Setting(1, torch.float64, False, True, False),
    Setting(1, torch.float32, True, False, True),
    Setting(3, torch.float64, True, False, False),
    Setting(3, torch.float32, False, True, False),
]


def settings_of(name: str) -> list[Setting]:
    """l2 and l-inf in float64 for every model, and by turns one more: all of them for each family of rules."""
    turn = list(MODELS).index(name)
    return [SETTINGS[0], SETTINGS[4], _OTHERS[turn % len(_OTHERS)]]


_OTHERS = [setting for i, setting in enumerate(SETTINGS) if i not in (0, 4)]


class Inside(nn.Module):
    """The op between other layers, so that its input is a set that the graph made, and rows reach it from behind."""

    def __init__(self, op: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        last = shape[-1]
        self.before = nn.Conv2d(shape[0], shape[0], 3, padding=1) if len(shape) == 3 else nn.Linear(last, last)
        self.first, self.op = nn.ReLU(), op
        with torch.no_grad():
            outputs = op(self.before(torch.rand(BATCH, *shape))).flatten(1).shape[1]
        self.after = nn.Sequential(nn.Flatten(), nn.Linear(outputs, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.op(self.first(2 * self.before(x))))


def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of that name, the same at each call."""
    case, inside = CASES[MODELS[name][0]], MODELS[name][1]
    torch.manual_seed(len(name))
    op = case.build()
    return (Inside(op, case.shape) if inside else op).to(dtype).eval()


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    case = CASES[MODELS[name][0]]
    x = torch.rand(BATCH, *case.shape, generator=generator(1), dtype=torch.float64)
    return (x + case.shift).to(dtype)


@functools.cache
def bounded(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, BoundedModule]:
    """The model and its graph."""
    model = model_of(name, dtype)
    return model, BoundedModule(model, inputs_of(name, dtype), custom_ops=CASES[MODELS[name][0]].ops)


def rows_of(setting: Setting, outputs: int) -> Tensor | None:
    return torch.randn(BATCH, 3, outputs, generator=generator(2), dtype=setting.dtype) if setting.rows else None


def widened(found: Extremes, slack: float) -> Extremes:
    return Extremes(found.smallest + slack, found.largest - slack, found.scale)


def assert_no_looser(bounds: Any, others: Any, slack: float, what: str) -> None:
    """Elementwise, up to rounding."""
    (lower, upper), (other_lower, other_upper) = bounds, others
    excess = torch.maximum(other_lower - lower, upper - other_upper).detach().max()
    assert excess <= slack, f"{what}: looser by {float(excess):.3g}"


# What is known to fail, until it is mended: (test, model) -> why.
KNOWN: dict[tuple[str, str], str] = {}
if LEGACY:
    KNOWN |= {("sets", name): "0.3 marks shapes as perturbed" for name in ("flatten-inner", "flatten-inner-inside")}


def marked(test: str, names: Any) -> list[Any]:
    """Names as parameters of a test, those that are known to fail marked so."""
    return [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=KNOWN[test, name]))
        if (test, name) in KNOWN
        else name
        for name in names
    ]


@pytest.mark.parametrize("name", marked("bounds", MODELS))
def test_rule_is_sound_and_methods_are_ordered(name):
    for setting in settings_of(name):
        model, graph = bounded(name, setting.dtype)
        case, x = CASES[MODELS[name][0]], inputs_of(name, setting.dtype)
        perturbation = setting.perturbation(case.shift)
        C = rows_of(setting, model(x)[0].numel())
        found = extremes(model, x, perturbation, C, count=25, steps=3)
        found = widened(found, case.slack)
        slack = TOLERANCE[setting.dtype] * found.scale + case.slack
        given = (BoundedTensor(x, perturbation),)
        bounds = {}
        for method, options in (
            ("lipschitz", {}),
            ("bcp", {}),
            ("bcp", {"tighten": False}),
            ("bcp-crown", {}),
            ("bcp-alpha-crown", {"steps": 2, "early_stop": False}),
        ):
            if "steps" in options and setting != SETTINGS[0]:
                continue
            if method == "lipschitz" and not case.ball:
                continue
            result = graph.compute_bounds(x=given, C=C, method=method, **options)
            assert all(torch.isfinite(side).all() for side in result), (method, options, setting)
            assert_contains(result, found, f"({method} {options}, {setting})")
            bounds[(method, *options)] = result
        if case.ball:
            assert_no_looser(bounds[("bcp",)], bounds[("lipschitz",)], slack, f"bcp and lipschitz, {setting}")
        assert_no_looser(bounds[("bcp-crown",)], bounds[("bcp",)], slack, f"bcp-crown and bcp, {setting}")
        if setting.norm == math.inf:
            try:
                ibp = graph.compute_bounds(x=given, C=C, method="IBP")
            except Exception:  # the engine's, which raises whatever comes
                continue
            assert_contains(ibp, found, f"(IBP, {setting})")
            # IBP merges C and the layers that come last, which bcp does not: compare with plain interval arithmetic
            plain = graph.compute_bounds(x=given, method="bcp")
            engine.set_input(graph, *given)
            with torch.no_grad():
                box = propagate_intervals(graph, Context(NormCache(), {}))[graph.final_node().name].box()
            assert_no_looser(plain, box, slack, f"bcp and IBP, {setting}")


@pytest.mark.parametrize("name", marked("zero", MODELS))
def test_zero_radius_gives_the_forward_value(name):
    model, graph = bounded(name)
    x = inputs_of(name)
    value = model(x)
    for norm, method in ((2, "lipschitz"), (2, "bcp-crown"), (math.inf, "bcp")):
        if method == "lipschitz" and not CASES[MODELS[name][0]].ball:
            continue
        given = (BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=0.0)),)
        for side in graph.compute_bounds(x=given, method=method):
            # the engine's own interval rules of some ops add up to 1e-5 on either side
            tolerance = 1e-5 if graph.last_result.fallbacks or "sin" in name or "cos" in name else 1e-9
            torch.testing.assert_close(side, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", marked("sets", MODELS))
def test_every_node_stays_in_its_set(name):
    """The invariant of the domain: for sampled inputs the value of every node lies in its ball and in its box."""
    case = CASES[MODELS[name][0]]
    for setting in (SETTINGS[1], SETTINGS[4]):
        _, graph = bounded(name)
        x = inputs_of(name)
        perturbation = setting.perturbation(case.shift)
        for tighten in (True, False) if setting.norm == 2 else (True,):
            states = node_sets(graph, x, perturbation, tighten)
            for point in samples(x, perturbation, 8, generator(3)):
                for node, value in node_values(graph, point).items():
                    assert_inside(node, value, states[node], setting, case.slack)


def node_sets(graph: BoundedModule, x: Tensor, perturbation: PerturbationLpNorm, tighten: bool) -> dict[str, Any]:
    graph.compute_bounds(x=(BoundedTensor(x, perturbation),), method="bcp")  # sets the input, checks it
    engine.set_input(graph, BoundedTensor(x, perturbation))
    with torch.no_grad():
        states = propagate(graph, Context(NormCache(), {}, tighten=tighten), keep=True)
    return {node: state for node, state in states.items() if isinstance(state, BallBox)}


def node_values(graph: BoundedModule, point: Tensor) -> dict[str, Tensor]:
    """Value of each node at a point, from the engine's own forward."""
    engine.set_input(graph, BoundedTensor(point, PerturbationLpNorm(norm=2, eps=0.0)))
    order = engine.ancestors_in_order(graph.final_node())
    with torch.no_grad():
        return {node.name: graph.get_forward_value(node) for node in order if node.perturbed}


def assert_inside(node: str, value: Tensor, state: BallBox, setting: Setting, slack: float) -> None:
    scale = slack + TOLERANCE[value.dtype] * max(1.0, float(state.center.abs().max()))
    shift = value - state.center
    distance = shift.reshape(len(value), -1).norm(dim=1)
    assert (distance <= state.radius + scale).all(), f"{node} leaves its ball: {distance} > {state.radius}, {setting}"
    lower, upper = state.box()
    assert (value >= lower - scale).all() and (value <= upper + scale).all(), f"{node} leaves its box, {setting}"
    assert (lower <= state.center + scale).all() and (state.center <= upper + scale).all(), f"{node}: box off center"


@pytest.mark.parametrize("name", marked("fallbacks", [name for name in MODELS if not name.endswith("-inside")]))
def test_fallbacks_are_visible(name):
    _, graph = bounded(name)
    graph.compute_bounds(x=(BoundedTensor(inputs_of(name), PerturbationLpNorm(norm=2, eps=0.1)),), method="bcp")
    classes = {node.removesuffix("ByAdjoint") for node in graph.last_result.fallbacks.values()}
    expected = set(CASES[MODELS[name][0]].fallbacks)
    assert classes >= expected if len(graph.last_result.fallbacks) > 1 else classes == expected
    assert all(type(graph[node]).__name__ == kind for node, kind in graph.last_result.fallbacks.items())


def test_every_rule_has_a_model():
    met: set[str] = set()
    for name in MODELS:
        _, graph = bounded(name)
        met |= {type(node).__name__ for node in engine.ancestors_in_order(graph.final_node())}
    others = {kind for kind in ONE_VERSION if kind.endswith("ByAdjoint") and not engine.IS_LEGACY}  # repairs of 0.3
    missing = set(RULES) - met - set(EXEMPT) - others
    assert not missing, f"no model in CASES makes a node of {sorted(missing)}"
    assert not set(EXEMPT) & met, f"no longer exempt: {sorted(set(EXEMPT) & met)}"
    assert set(EXEMPT) <= set(RULES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_build_is_refused(name):
    with pytest.raises(TraceError):
        BoundedModule(REFUSED[name]().eval(), torch.rand(BATCH, 2, 5, 5) - 0.5)


@pytest.mark.parametrize("name", sorted(NOT_ON_THIS_ENGINE))
def test_what_only_the_other_engine_builds_is_refused(name):
    case = CASES[name]
    with pytest.raises(TraceError):
        BoundedModule(case.build().double().eval(), torch.rand(BATCH, *case.shape, dtype=torch.float64) - 0.5)


class TwoInputs(nn.Module):
    """A network of a perturbed input and of another one, which is not: a constant for each sample."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], joined: int) -> None:
        super().__init__()
        self.before, self.join, self.after = nn.Linear(4, 5), join, nn.Linear(joined, 3)

    def forward(self, x: Tensor, constant: Tensor) -> Tensor:
        return self.after(self.join(self.before(x), constant).relu())


JOINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "add": (torch.add, 5),
    "sub": (lambda v, a: a - v, 5),
    "mul": (torch.mul, 5),
    "concat": (lambda v, a: torch.cat([a, v], 1), 10),
}


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("method", ["lipschitz", "bcp", "bcp-crown", "bcp-alpha-crown"])
def test_constants_of_each_sample(join, method):
    """Whatever a method does with samples, each one keeps its own constants."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = TwoInputs(*JOINS[join]).double()
        x, constant = torch.rand(3, 4).double(), 3 * torch.randn(3, 5).double()
        perturbation = PerturbationLpNorm(norm=2, eps=0.5)

        def on_points(points, model=model, constant=constant):
            return model(points, constant.repeat(len(points) // 3, 1))

        options = {"steps": 2} if method == "bcp-alpha-crown" else {}
        graph = BoundedModule(model, (x, constant))
        bounds = graph.compute_bounds(x=(BoundedTensor(x, perturbation), constant), method=method, **options)
        assert_contains(bounds, extremes(on_points, x, perturbation, count=20, steps=0))


@pytest.mark.parametrize(
    "name",
    ["dense-inside", "conv-stride-inside", "conv-groups-inside", "conv-transpose-inside", "conv1d-inside",
     "batch-norm-inside", "residual-conv-inside", "max-pool-overlap-inside", "average-pool-overlap-inside",
     "sigmoid-inside", "softplus-inside", "concat-inside", "branches-multiplied-inside"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["lipschitz", "bcp", "bcp-crown"])
def test_gradient_of_the_training_bound(name, method):
    """Directional derivative in all parameters against central differences, in float64."""
    if method == "bcp-crown" and "max-pool" in name:
        pytest.skip("the engine's relaxation of max pooling is not differentiable in its bounds")
    model = model_of(name)
    x = inputs_of(name)
    graph = BoundedModule(model, x)
    given = (BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1)),)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction = [torch.randn(p.shape, generator=generator(i), dtype=p.dtype) for i, p in enumerate(parameters)]

    def bound() -> Tensor:
        lower, upper = graph.compute_bounds(x=given, method=method, norms="estimate")
        return (lower - 0.7 * upper).sum()

    gradients = torch.autograd.grad(bound(), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    step, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=sign * step)
            ends.append(bound())
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.sub_(way, alpha=sign * step)
    torch.testing.assert_close(slope.detach(), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-4)


def test_a_stack_on_the_first_axis_is_no_layer_of_samples():
    """Axis 0 of packed attention is not the batch's: picking from it is no linear map of each sample."""
    model = Op(lambda x: torch.stack([x, 2 * x], 0)[1] + 1.0)
    x = torch.rand(1, 3)
    with pytest.raises(UnsupportedNodeError, match="axis 0"):
        BoundedModule(model, x).compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1)),), method="bcp")
