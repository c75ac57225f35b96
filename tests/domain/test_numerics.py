"""Numbers at their limits: every scalar function against arithmetic of many digits, and what over- or underflows."""

from __future__ import annotations

import copy
import math

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import nn
from torch.nn import functional as F

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine, methods, register, unregister
from lirpa_ext.domain.ball_box import BallBox, box_radius
from lirpa_ext.domain.lengths import length, stretched
from lirpa_ext.domain.norms import NormCache
from lirpa_ext.domain.rounding import ULPS
from lirpa_ext.domain.scalar_functions import scalar_function
from lirpa_ext.passes import ball_box as propagation
from lirpa_ext.rules import RULES, Context, propagate_node

mpmath.mp.dps = 40
INF = math.inf
METHODS = ("lipschitz", "bcp", "bcp-crown")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def _softplus(x):
    return mpmath.log1p(mpmath.exp(x))


def _clip(x, low, high):
    return min(max(x, low), high)


def _gelu_tanh(x):
    return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpf(0.044715) * x**3)))


def _elu(x, alpha, scale=1.0):
    return scale * (x if x > 0 else alpha * mpmath.expm1(x))


SELU = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
# name: (torch's function, the function of a number, where it is a number)
FUNCTIONS = {
    "relu": (F.relu, lambda x: max(x, 0), (-INF, INF)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.125), lambda x: x if x > 0 else x / 8, (-INF, INF)),
    "prelu": (lambda x: F.prelu(x, x.new_tensor([-0.5])), lambda x: x if x > 0 else -x / 2, (-INF, INF)),
    "elu": (lambda x: F.elu(x, 2.5), lambda x: _elu(x, 2.5), (-INF, INF)),
    "selu": (F.selu, lambda x: _elu(x, *map(mpf, SELU)), (-INF, INF)),
    "celu": (lambda x: F.celu(x, 0.5), lambda x: x if x > 0 else mpmath.expm1(2 * x) / 2, (-INF, INF)),
    "gelu": (F.gelu, lambda x: x * mpmath.ncdf(x), (-INF, INF)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh, (-INF, INF)),
    "silu": (F.silu, lambda x: x * _sigmoid(x), (-INF, INF)),
    "mish": (F.mish, lambda x: x * mpmath.tanh(_softplus(x)), (-INF, INF)),
    "softplus": (F.softplus, _softplus, (-INF, INF)),
    "logsigmoid": (F.logsigmoid, lambda x: -_softplus(-x), (-INF, INF)),
    "softsign": (F.softsign, lambda x: x / (1 + abs(x)), (-INF, INF)),
    "hardsigmoid": (F.hardsigmoid, lambda x: _clip(x / 6 + mpf(1) / 2, 0, 1), (-INF, INF)),
    "hardswish": (F.hardswish, lambda x: x * _clip(x / 6 + mpf(1) / 2, 0, 1), (-INF, INF)),
    "hardtanh": (F.hardtanh, lambda x: _clip(x, -1, 1), (-INF, INF)),
    "hardtanh to infinity": (lambda x: F.hardtanh(x, -INF, 0.5), lambda x: min(x, 0.5), (-INF, INF)),
    "relu6": (F.relu6, lambda x: _clip(x, 0, 6), (-INF, INF)),
    "clamp": (lambda x: x.clamp(-0.25, 0.5), lambda x: _clip(x, -0.25, 0.5), (-INF, INF)),
    "clamp(min=)": (lambda x: x.clamp(min=-0.25), lambda x: max(x, -0.25), (-INF, INF)),
    "clamp(max=)": (lambda x: x.clamp(max=0.5), lambda x: min(x, 0.5), (-INF, INF)),
    "sigmoid": (torch.sigmoid, _sigmoid, (-INF, INF)),
    "tanh": (torch.tanh, mpmath.tanh, (-INF, INF)),
    "atan": (torch.atan, mpmath.atan, (-INF, INF)),
    "erf": (torch.erf, mpmath.erf, (-INF, INF)),
    "sin": (torch.sin, mpmath.sin, (-INF, INF)),
    "cos": (torch.cos, mpmath.cos, (-INF, INF)),
    "tan": (torch.tan, mpmath.tan, (-INF, INF)),
    "exp": (torch.exp, mpmath.exp, (-INF, INF)),
    "log": (torch.log, mpmath.log, (0, INF)),
    "log1p": (torch.log1p, mpmath.log1p, (-1, INF)),
    "log2": (torch.log2, lambda x: mpmath.log(x) / mpmath.log(2), (0, INF)),
    "sqrt": (torch.sqrt, mpmath.sqrt, (0, INF)),
    "reciprocal": (torch.reciprocal, lambda x: 1 / x, (0, INF)),
    "1 / x": (lambda x: 1 / x, lambda x: 1 / x, (-INF, 0)),
    "abs": (torch.abs, abs, (-INF, INF)),
    "x * x": (lambda x: x * x, lambda x: x * x, (-INF, INF)),
    "square": (torch.square, lambda x: x * x, (-INF, INF)),
    "x ** 1.5": (lambda x: x**1.5, lambda x: mpmath.power(x, 1.5), (0, INF)),
    "x ** 2": (lambda x: x**2, lambda x: x**2, (-INF, INF)),
    "x ** 3": (lambda x: x**3, lambda x: x**3, (-INF, INF)),
    "x ** 4": (lambda x: x**4, lambda x: x**4, (-INF, INF)),
    "x ** -2": (lambda x: x**-2, lambda x: x**-2, (0, INF)),
    "x ** -0.5": (lambda x: x**-0.5, lambda x: mpmath.power(x, -0.5), (0, INF)),
}
CENTERS = [-60.0, -8.0, -3.1, -2.0, -0.75, -0.3, -1e-5, 0.0, 1e-9, 0.2, 0.5, 1.0, 1.5707963, 2.4, 3.0, 7.5, 19.0, 70.0]
SIZES = [0.0, 1e-12, 1e-3, 1.0, 1e3]


def centers(domain, dtype):
    """Inside of the domain, (B, 1)."""
    x = torch.tensor(CENTERS, dtype=dtype)
    return x[(x > domain[0]) & (x < domain[1])].unsqueeze(1)


def points(center, eps):
    """Points of center -+ eps, exactly, close to both ends and in between."""
    shares = [-1, -1 + mpf(10) ** -6, -0.7, -0.3, 0, 0.4, 0.8, 1 - mpf(10) ** -6, 1]
    return [mpf(center) + mpf(eps) * share for share in shares]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_at_every_size(name, dtype):
    """Bounds of ball, of box and of lines hold for the function itself, outward rounding to the last digit."""
    function, exact, domain = FUNCTIONS[name]
    x = centers(domain, dtype)
    graph = BoundedModule(Apply(function), x)
    for eps in SIZES:
        eps = float(torch.tensor(eps, dtype=dtype))
        truth, defined = [], []
        for (center,) in x.tolist():
            some = points(center, eps)
            defined.append(domain[0] <= some[0] and some[-1] <= domain[1])
            truth.append([exact(point) for point in some if domain[0] < point < domain[1]])
        ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=eps))
        for method in METHODS:
            for outward in (True, False) if eps > 1e-6 else (True,):
                lower, upper = graph.compute_bounds(x=(ball,), method=method, outward=outward)
                for i, (center,) in enumerate(x.tolist()):
                    low, high, values = lower[i].item(), upper[i].item(), truth[i]
                    where = f"{method}, {outward=}, {center} -+ {eps}: [{low!r}, {high!r}], values {values[::4]}"
                    assert not (math.isnan(low) or math.isnan(high)), where
                    if not defined[i]:
                        assert low == -INF or high == INF, where
                    slack = 0 if outward else 64 * torch.finfo(dtype).eps * _sensitivity(values, points(center, eps))
                    assert low <= min(values) + slack, where
                    assert high >= max(values) - slack, where
                    if eps == 0:
                        assert max(high - values[4], values[4] - low) <= 1e3 * torch.finfo(dtype).eps * (
                            1 + abs(values[4])
                        )


def _sensitivity(values, where):
    """Size of values, and of what a relative change of the points does to them."""
    pairs = list(zip(zip(values, where, strict=False), zip(values[1:], where[1:], strict=False), strict=False))
    steepest = max((abs(b[0] - a[0]) / abs(b[1] - a[1]) for a, b in pairs if a[1] != b[1]), default=0)
    return 1 + max(abs(value) for value in values) + steepest * max(abs(point) for point in where)


# --- the functions of torch ------------------------------------------------------------------------------------------


def spread(dtype, positive):
    """Numbers of all sizes, and those where functions are hard."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=generator, dtype=dtype)
    x = x * 10 ** (8 * torch.rand(400, generator=generator, dtype=dtype) - 5)
    hard = [
        0.0,
        math.pi,
        -math.pi,
        math.pi / 2,
        100 * math.pi,
        1e-30,
        -1e-30,
        88,
        -87,
        -103,
        -700,
        700,
        1e5,
        -8.3,
        19.9,
    ]
    x = torch.cat([x, x.new_tensor(hard), torch.linspace(-9, 9, 101, dtype=dtype)])
    return x.abs() + 1e-30 if positive else x


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", [
    "exp", "tanh", "sigmoid", "erf", "gelu", "gelu tanh", "softplus", "silu", "mish", "atan", "sin", "cos", "tan",
    "log", "sqrt", "elu", "selu", "hardsigmoid", "hardswish", "x ** 1.5", "x ** -0.5", "x ** 3", "x ** 4", "reciprocal",
])  # fmt: skip
def test_torch_computes_functions_to_a_few_units_in_the_last_place(name, dtype):
    """What outward rounding takes for granted: `ULPS`, and what a function says it loses besides."""
    function, exact, domain = FUNCTIONS[name]
    x, eps, tiny = spread(dtype, domain[0] == 0), torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    known = scalar_function(BoundedModule(Apply(function), x[:1, None].abs()).final_node())
    value = torch.logaddexp(x, torch.zeros_like(x)) if name == "softplus" else function(x)
    extra = torch.zeros_like(x) if known is None else eps * known.noise(x) + torch.zeros_like(x)
    for point, computed, more in zip(x.tolist(), value.tolist(), extra.tolist(), strict=True):
        truth = exact(mpf(point))
        if math.isfinite(computed):
            assert abs(mpf(computed) - truth) <= ULPS * eps * abs(truth) + more + tiny, (point, computed, truth)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - {"tan", "log1p", "log2", "celu", "softsign", "logsigmoid"}))
def test_nan_and_infinity_in_a_box_bound_nothing(name, dtype):
    """No finite box, slope or line of an interval with a NaN; of an infinite one, only what f's range allows."""
    function, exact, domain = FUNCTIONS[name]
    inside = 0.75 if domain[1] > 0 else -0.75
    node = BoundedModule(Apply(function), torch.full((1, 1), inside, dtype=dtype)).final_node()
    rule, center = RULES[type(node).__name__], torch.full((1, 3), inside, dtype=dtype)
    constants = [engine.constant(parent) for parent in node.inputs[1:]]
    value = node.forward(center, *constants)
    context = Context(NormCache(), {}, outward=True)
    far = [(math.nan, 1.0), (-1.0, math.nan), (math.nan, math.nan), (-INF, INF), (-INF, 1.0), (-1.0, INF)]
    for low, high in far:
        lower, upper = torch.full_like(center, low), torch.full_like(center, high)
        for radius in (center.new_full((1,), 0.5), center.new_full((1,), math.nan), center.new_full((1,), INF)):
            state = propagate_node(node, [BallBox(center, radius, lower, upper), *constants], value, context)
            broken = math.isnan(low), math.isnan(high)
            for was, ends in zip(broken, (state.lower, state.upper), strict=True):
                assert not (was and ends.isfinite().any()), (low, high)
            if radius.isfinite().all():  # of the ball the function may know more than of the box
                near = [exact(mpf(inside + move)) - exact(mpf(inside)) for move in (-0.25, -0.1, 0.1, 0.25)]
                assert not state.radius.item() < max(map(abs, near)), (low, high)
            elif any(broken):
                assert not state.radius.isfinite().any()
            for point in (-50.0, -1.0, 0.5, 1.0, 50.0):
                if low <= point <= high and domain[0] < point < domain[1] and not state.lower.isnan().any():
                    assert state.lower[0, 1].item() <= exact(mpf(point)) <= state.upper[0, 1].item(), (low, high, point)
        if not (state.lower.isnan().any() or rule.function(node) is None):
            (k, b), (m, c) = rule.function(node).lines(lower, upper)
            assert not (k.isnan() | b.isnan() | m.isnan() | c.isnan()).any(), (low, high)


# --- what over- or underflows ----------------------------------------------------------------------------------------


def mlp(scales):
    """A network whose weights have these sizes, with biases to match, and what its outputs are multiplied by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    size = 1.0
    with torch.no_grad():
        for layer, scale in zip(model[::2], scales, strict=True):
            size *= scale
            layer.weight.mul_(scale)
            layer.bias.mul_(size)
    return model, size


@pytest.mark.parametrize("norm", [1, 2, 3, INF])
@pytest.mark.parametrize(
    "scales", [(1e-30, 1e30, 1), (1e30, 1e-30, 1), (1e-30, 1, 1), (1e30, 1, 1), (1, 1, 1e-30)], ids=str
)
def test_bounds_scale_with_the_weights(scales, norm):
    """Weights of 1e-30 and 1e30 in float32: bounds are those of the plain network, multiplied; gradients are finite."""
    plain, scaled = mlp((1, 1, 1)), mlp(scales)
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=0.1))
    graphs = [BoundedModule(model, x) for model, _ in (plain, scaled)]
    for method, options in [
        ("lipschitz", {}), ("lipschitz", {"norms": "estimate"}), ("bcp", {}), ("bcp", {"norms": "estimate"}),
        ("bcp", {"tighten": False}), ("bcp", {"outward": True}), ("bcp-crown", {}), ("slope:ibp", {}),
        ("slope:crown", {}),
    ]:  # fmt: skip
        bounds = []
        for graph, (model, size) in zip(graphs, (plain, scaled), strict=True):
            lower, upper = graph.compute_bounds(x=(ball,), method=method, **options)
            if upper.requires_grad:
                gradients = torch.autograd.grad((upper - lower).sum(), list(model.parameters()), allow_unused=True)
                assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None), (
                    method,
                    options,
                )
            bounds.append(torch.stack([lower, upper]).detach() / size)
        width = (bounds[0][1] - bounds[0][0]).mean().item()
        torch.testing.assert_close(bounds[1], bounds[0], rtol=1e-4, atol=1e-4 * width, msg=str((method, options)))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_lengths_neither_overflow_nor_underflow(size):
    for dtype, scale in ((torch.float32, size), (torch.float64, size**8)):
        x = (scale * torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=dtype)).requires_grad_()
        norm = length(x, 1)
        torch.testing.assert_close(norm.detach() / scale, torch.tensor([5.0, 0.0], dtype=dtype))
        torch.testing.assert_close(
            torch.autograd.grad(norm.sum(), x)[0], torch.tensor([[0.6, -0.8], [0, 0]], dtype=dtype)
        )
        far = box_radius(torch.zeros_like(x), x.detach() - scale, x.detach() + scale)
        torch.testing.assert_close(far / scale, torch.tensor([41**0.5, 2**0.5], dtype=dtype))
    for order in (1, 1.5, 3, INF):
        torch.testing.assert_close(length(size * torch.ones(8), order=order) / size, torch.tensor(8 ** (1 / order)))


def test_a_positive_radius_stays_positive():
    radius, slope = torch.tensor([1e-30, 0.0, 1e-30, 1.0, INF]), torch.tensor([1e-30, INF, 0.0, math.nan, 0.0])
    tiny = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(stretched(radius, slope), torch.tensor([tiny, 0.0, 0.0, INF, 0.0]))
    for dtype in DTYPES.values():
        x = torch.full((1, 2), 200.0, dtype=dtype)
        for function in (torch.sigmoid, torch.tanh, lambda x: torch.exp(-9 * x)):
            ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1))
            lower, upper = BoundedModule(Apply(function), x).compute_bounds(x=(ball,), method="lipschitz")
            assert (upper > lower).all() or function(x[0, 0]) != 0
            radius = propagate(BoundedModule(Apply(function), x), ball)
            assert (radius > 0).all()


def propagate(graph, ball):
    """Radius of the output's ball."""
    engine.set_input(graph, ball)
    context = Context(NormCache(), {}, ball_only=True)
    states = propagation.propagate(graph, context)
    engine.free_graphs(graph)
    return states[graph.final_node().name].radius


# --- edges of domains ------------------------------------------------------------------------------------------------


class Difference(nn.Module):
    """The distance of f(x) and f(0), as verifiers of physics-informed networks write it."""

    def __init__(self, distance):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.distance = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)), distance

    def forward(self, x):
        return self.distance(self.net(x) - self.net(torch.zeros_like(x)))


class Positive(nn.Module):
    """Square, then weights that are not negative, then a root: divisive normalization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)
        self.outer.weight.data.abs_()
        self.outer.bias.data.zero_()

    def forward(self, x):
        return torch.sqrt(self.outer(self.inner(x) ** 2))


ROOTS = {
    "sum of squares": lambda: Difference(lambda d: d.pow(2).sum(1, keepdim=True).sqrt()),
    "sum of products": lambda: Difference(lambda d: (d * d).sum(1, keepdim=True).sqrt()),
    "mean of squares": lambda: Difference(lambda d: torch.sqrt(torch.square(d).mean(1, keepdim=True))),
    "fourth power": lambda: Difference(lambda d: (d**4).sum(1, keepdim=True) ** 0.25),
    "sum of absolute values": lambda: Difference(lambda d: d.abs().sum(1, keepdim=True) ** 0.5),
    "sum of relus": lambda: Difference(lambda d: d.relu().sum(1, keepdim=True).sqrt()),
    "sum of exponentials": lambda: Difference(lambda d: torch.sqrt((40 * d - 40).exp().sum(1, keepdim=True))),
    "softmax": lambda: Difference(lambda d: torch.sqrt((80 * d).softmax(1))),
    "sigmoid": lambda: Difference(lambda d: torch.sqrt(1 - (80 * d).sigmoid())),
    "positive weights": lambda: nn.Sequential(nn.Linear(2, 4), Positive()),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", ROOTS)
def test_what_cannot_be_negative_has_a_root(kind, dtype):
    """Outward rounding leaves sums of squares, and whatever has a least value, inside of the root's domain."""
    model = ROOTS[kind]().to(dtype)
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(3, 2, generator=generator, dtype=dtype) + 0.3
    shift = 2 * torch.rand(500, 3, 2, generator=generator, dtype=dtype) - 1
    graph = BoundedModule(model, x)
    for norm, eps in ((INF, 0.05), (INF, 0.8), (2, 0.8)):
        steps = shift if norm == INF else shift / math.sqrt(2)
        y = model((x + eps * steps).flatten(0, 1)).unflatten(0, (500, 3)).detach()
        ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps))
        for method in ("bcp", "bcp-crown", "slope:crown"):
            for outward in (True, False) if eps > 0.1 else (True,):
                lower, upper = graph.compute_bounds(x=(ball,), method=method, outward=outward)
                assert lower.isfinite().all() and upper.isfinite().all(), (method, norm, eps, outward)
                slack = 1e-5 if dtype == torch.float32 else 1e-10
                assert (y >= lower - slack).all() and (y <= upper + slack).all(), (method, norm, eps, outward)


UNDEFINED = {
    "log": torch.log, "log1p": torch.log1p, "log2": torch.log2, "sqrt": torch.sqrt, "rsqrt": lambda y: 1 / y.sqrt(),
    "reciprocal": torch.reciprocal, "1 / y": lambda y: 1 / y, "y / (1 - y)": lambda y: y / (1 - y),
    "y ** 0.5": lambda y: y**0.5, "y ** 1.5": lambda y: y**1.5, "y ** -2": lambda y: y**-2,
    "y ** -1.5": lambda y: y**-1.5,
    "log sigmoid": lambda y: torch.log(torch.sigmoid(9 * y - 9) + 1e-6), "tan": lambda y: torch.tan(2 * y),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", UNDEFINED)
def test_a_ball_that_leaves_the_domain_bounds_nothing(name, dtype):
    """f is defined on (0, 1) alone, where sigmoids lie; a ball is larger than that, and then says nothing."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 3).to(dtype), nn.Linear(3, 2).to(dtype)
    model = nn.Sequential(first, nn.Sigmoid(), Apply(UNDEFINED[name]), last).eval()  # in training NaN stays NaN
    x = torch.randn(2, 4, dtype=dtype)
    graph = BoundedModule(model, x)
    for eps in (1e-3, 0.3, 8.0):
        step = torch.randn(800, 2, 4, dtype=dtype)
        step = eps * step / step.norm(dim=2, keepdim=True)
        y = torch.stack([model(x + s) for s in step]).detach()
        ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=eps))
        for method in METHODS:
            for outward in (True, False):
                lower, upper = graph.compute_bounds(x=(ball,), method=method, outward=outward)
                assert not (lower.isnan() | upper.isnan()).any()
                slack = 1e-4 * (1 + y.abs().amax(0)) if dtype == torch.float32 else 1e-9
                assert ((y >= lower - slack) & (y <= upper + slack)).all(), (method, eps, outward)
                if method == "lipschitz" and eps == 8.0 and name not in ("log sigmoid",):
                    assert (lower == -INF).all() and (upper == INF).all()


# --- settings of the caller ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("registered", [False, True])
def test_outward_follows_the_input_not_the_default_type(registered, dtype, default, monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype), torch.rand(2, 3, dtype=dtype)
    ball, asked = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1)), []
    original = methods.base.Problem.propagate

    def noting(self, context, *args):
        asked.append(context.outward)
        return original(self, context, *args)

    monkeypatch.setattr(methods.base.Problem, "propagate", noting)
    before = torch.get_default_dtype()
    if registered:
        register()
    try:
        torch.set_default_dtype(dtype)  # 0.3 builds graphs in no other type
        graph = (engine.EngineBoundedModule if registered else BoundedModule)(model, x)
        torch.set_default_dtype(default)
        lower, upper = graph.compute_bounds(x=(ball,), method="bcp")
    finally:
        torch.set_default_dtype(before)
        if registered:
            unregister()
    assert asked == [dtype == torch.float64]
    assert lower.dtype == upper.dtype == dtype


@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
@pytest.mark.parametrize("norm", [2, INF])
def test_bounds_in_inference_mode(norm, inside):
    """Built, asked, or given inputs in inference mode: the same bounds, and gradients afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    x, labels = torch.rand(2, 4), torch.tensor([0, 1])
    plain = BoundedModule(model, x)
    for method in ("lipschitz", "bcp", "bcp-crown", "bcp-alpha-crown", "sparse-slope", "slope:crown", "slope:ibp",
                   "slope:random", "IBP", "CROWN-IBP", "CROWN", "alpha-CROWN"):  # fmt: skip
        options = {"labels": labels, "seed": 0} if method == "sparse-slope" else {}
        options = {"seed": 0} if method == "slope:random" else options
        eps = torch.tensor([0.05, 0.02])
        expected = plain.compute_bounds(
            x=(BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps)),), method=method, **options
        )
        with torch.inference_mode():
            given, some, C = (
                (x.clone(), eps.clone(), torch.eye(3).expand(2, 3, 3).clone()) if inside else (x, eps, None)
            )
            graph = BoundedModule(model, given)
            ball = BoundedTensor(given, PerturbationLpNorm(norm=norm, eps=some))
            bounds = graph.compute_bounds(x=(ball,), C=C, method=method, **options)
        if C is None:
            for one, other in zip(bounds, expected, strict=True):
                torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)
        lower, upper = graph.compute_bounds(x=(ball,), method="bcp")  # with a gradient, outside
        (upper - lower).sum().backward()
        assert model[0].weight.grad.isfinite().all()


@pytest.mark.skipif(engine.IS_LEGACY, reason="auto_LiRPA 0.3 does not build maxima of two")
@pytest.mark.parametrize("width", [0.0, 1e-12, 1e-9, 1e-3])
def test_the_larger_of_two_that_are_equal(width):
    """Where both are the same number, or nearly, the engine's lines of a maximum hold nothing."""
    x = torch.tensor([[0.5], [1.0], [-3.0], [0.0]], dtype=torch.float64)
    for function in (lambda x: torch.maximum(x.cumsum(1), x), lambda x: torch.minimum(2 * x, x + x)):
        model = Apply(function)
        ball = BoundedTensor(x, PerturbationLpNorm(norm=INF, x_L=x - width, x_U=x + width))
        graph = BoundedModule(model, x)
        for method in ("bcp", "bcp-crown", "slope:crown", "CROWN", "alpha-CROWN"):
            lower, upper = graph.compute_bounds(x=(ball,), method=method)
            for point in (x - width, x, x + width):
                assert (lower <= model(point) + 1e-14).all() and (upper >= model(point) - 1e-14).all(), method
            assert (upper - lower <= 8 * width + 1e-12).all(), method


# --- rounding near a pole ---

NEAR = {
    "reciprocal": lambda v: torch.reciprocal(v),
    "quotient": lambda v: (1 + v.square()) / v,
    "log": lambda v: torch.log(v),
    "root": lambda v: torch.sqrt(v),
    "power": lambda v: v**-0.5,
}


class NearPole(nn.Module):
    """Functions with a pole, or an end of their domain, next to the value at 0, which large terms are added to."""

    def __init__(self, function):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.linear, self.function = nn.Linear(4, 64), function
        self.linear.weight.data = torch.rand(64, 4, generator=draw)
        self.linear.bias.data = 0.02 * torch.rand(64, generator=draw) - 0.1 * self.linear.weight.data.sum(1) + 1e-3

    def forward(self, x):
        return self.function(self.linear(x.square() + 0.1))


@pytest.mark.parametrize("method", ["IBP", "CROWN", "CROWN-IBP", "bcp", "bcp-crown", "cap", "slope:crown", "lipschitz"])
@pytest.mark.parametrize("name", NEAR)
def test_rounding_in_float32_moves_no_box_past_a_pole(name, method):
    net, x = NearPole(NEAR[name]), torch.zeros(1, 4)
    ball = BoundedTensor(x, PerturbationLpNorm(1000.0, math.inf))
    lower, upper = BoundedModule(net, x).compute_bounds(x=(ball,), method=method)
    value = copy.deepcopy(net).double()(x.double())
    assert value.isfinite().all()
    assert not (lower.double() > value + 1e-6 * value.abs()).any()  # a NaN says nothing
    assert not (upper.double() < value - 1e-6 * value.abs()).any()
