"""Nodes of our own with linear relaxations: lines and boxes against dense sampling, softmax against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine
from lirpa_ext.domain.specifications import margin_rows
from lirpa_ext.nodes.activations import BoundClip, BoundScalar
from lirpa_ext.nodes.softmax import BoundStableLogSoftmax, BoundStableSoftmax, chords, log_softmax_box, others

FUNCTIONS = {
    "erf": torch.erf,
    "softplus": F.softplus,
    "elu": F.elu,
    "elu-steep": lambda x: F.elu(x, 2.5),
    "selu": F.selu,
    "prelu": lambda x: F.prelu(x, torch.tensor([-0.5], dtype=x.dtype)),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
}


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def scalar_node(name, dtype):
    graph = BoundedModule(Apply(FUNCTIONS[name]), torch.zeros(1, 3, dtype=dtype))
    (node,) = (node for node in engine.ancestors_in_order(graph.final_node()) if isinstance(node, BoundScalar))
    return node


def intervals(dtype):
    """Of every width from 0 to 40, around every place where a function bends."""
    generator = torch.Generator().manual_seed(0)
    lower = 8 * torch.randn(600, generator=generator, dtype=dtype)
    width = 10 ** (torch.rand(600, generator=generator, dtype=dtype) * 8 - 6.4)
    bends = torch.tensor([-3.0, -2.4, -math.sqrt(2), -0.75, 0.0, math.sqrt(2), 2.4, 3.0], dtype=dtype)
    lower = torch.cat([lower, bends, bends - 1e-3, bends - 1, lower[:20]])
    width = torch.cat([width, torch.full((24,), 2e-3, dtype=dtype), torch.zeros(20, dtype=dtype)])
    return lower, lower + width


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lines_and_boxes_hold(name, dtype):
    node, (lower, upper) = scalar_node(name, dtype), intervals(dtype)
    (k, low), (m, high) = node.lines(lower, upper)
    box = node.interval_propagate((lower, upper))
    x = lower + (upper - lower) * torch.linspace(0, 1, 4001, dtype=dtype)[:, None]
    x = torch.cat([x, torch.linspace(-4, 4, 801, dtype=dtype)[:, None].expand(-1, len(lower))])
    x = torch.minimum(torch.maximum(x, lower), upper)
    y = FUNCTIONS[name](x)
    exact = FUNCTIONS[name](x.double())
    rounding = torch.finfo(dtype).eps * (1 + x.abs() + y.abs() + k.abs() * x.abs() + m.abs() * x.abs()) * 4
    assert (exact >= (k * x + low).double() - rounding).all()
    assert (exact <= (m * x + high).double() + rounding).all()
    assert (exact >= box[0].double() - rounding).all() and (exact <= box[1].double() + rounding).all()
    # Neither is loose: the box is the function's range and the lines touch it, up to the samples' distance, and in
    # float32 to 32 units in the last place of numbers up to 80.
    close = 2e-4 if dtype == torch.float64 else 1e-3
    for gap in (y.amin(0) - box[0], box[1] - y.amax(0), (y - k * x - low).amin(0), (m * x + high - y).amin(0)):
        torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=close)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lines_are_differentiable(name):
    node = scalar_node(name, torch.float64)
    lower = torch.tensor([-1.3, 0.2, -2.7, -0.4], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor([0.9, 1.7, -0.6, 2.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: torch.stack(sum(node.lines(a, b), ())), (lower, upper), eps=1e-6)


def test_clip_is_relaxed_on_the_engine_that_has_none():
    if not engine.IS_LEGACY:
        pytest.skip("0.7 has its own")
    graph = BoundedModule(nn.Hardtanh(-0.5, 1.0), torch.zeros(1, 3))
    (node,) = (node for node in engine.ancestors_in_order(graph.final_node()) if isinstance(node, BoundClip))
    (k, low), (m, high) = node.lines(torch.tensor([[-2.0, 0.0, -3.0]]), torch.tensor([[2.0, 0.5, -1.0]]))
    x = torch.linspace(-2, 2, 101)
    assert (k[0, 0] * x + low[0, 0] <= x.clamp(-0.5, 1) + 1e-6).all()
    assert (m[0, 0] * x + high[0, 0] >= x.clamp(-0.5, 1) - 1e-6).all()
    assert (k[0, 1], m[0, 1]) == (1, 1) and (k[0, 2], m[0, 2]) == (0, 0)


# --- softmax ---------------------------------------------------------------------------------------------------------


def boxes(scale, n=5, count=40):
    generator = torch.Generator().manual_seed(1)
    center = scale * torch.randn(count, n, generator=generator, dtype=torch.float64)
    width = scale * torch.rand(count, n, generator=generator, dtype=torch.float64)
    return center - width, center + width


def points(lower, upper):
    """Corners and random points, (P, B, n)."""
    n = lower.shape[1]
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=lower.dtype)] * n)
    inside = torch.rand(200, n, generator=torch.Generator().manual_seed(2), dtype=lower.dtype)
    return lower + (upper - lower) * torch.cat([corners, inside])[:, None]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 2000.0])
def test_boxes_of_log_softmax_are_attained(scale):
    lower, upper = boxes(scale)
    low, high = log_softmax_box(lower, upper)
    values = torch.log_softmax(points(lower, upper), -1)
    torch.testing.assert_close(values.amin(0), low, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values.amax(0), high, rtol=1e-9, atol=1e-12)


def test_the_sum_over_the_others():
    x = torch.tensor([[1.0, -800.0, 3.0, 700.0]], dtype=torch.float64)
    expected = [torch.logsumexp(torch.cat([x[0, :i], x[0, i + 1 :]]), 0) for i in range(4)]
    torch.testing.assert_close(others(x)[0], torch.stack(expected))
    assert others(x[:, :1]).item() == -math.inf


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 30.0, 2000.0])
@pytest.mark.parametrize("kind", [BoundStableSoftmax, BoundStableLogSoftmax])
def test_rows_through_softmax_hold(kind, scale):
    lower, upper = boxes(scale)
    node = kind({"axis": -1}, [], 0, {})
    rows = torch.randn(7, len(lower), 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    passed, bias = node.below(rows, lower, upper)
    x = points(lower, upper)
    least = torch.einsum("sbn,pbn->psb", rows, node.forward(x)).amin(0)
    bound = torch.einsum("sbn,pbn->psb", passed, x).amin(0) + bias
    assert torch.isfinite(bound).all()
    assert (bound <= least + 1e-10 * (1 + scale)).all()
    if scale <= 1e-3:  # the box is nearly a point
        torch.testing.assert_close(bound, least, rtol=0, atol=20 * scale)


def test_chords_lie_above():
    lower, upper = boxes(3.0)
    slope, offset, shift = chords(lower, upper)
    x = points(lower, upper)
    assert (slope * x + offset >= torch.exp(x - shift) - 1e-12).all()


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN", "bcp", "bcp-crown"])
def test_margins_do_not_see_a_log_softmax(method):
    """z_y - z_j is the same of logits and of their log-softmax; of interval arithmetic that cannot be asked."""
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    x, labels = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.3))
    rows = margin_rows(labels, 4, torch.float64)
    bounds = [
        BoundedModule(model, x).compute_bounds(x=(ball,), C=rows, method=method)
        for model in (logits, nn.Sequential(logits, nn.LogSoftmax(1)))
    ]
    for plain, behind in zip(*bounds, strict=True):
        if method == "IBP":
            assert torch.isfinite(behind).all()
        else:
            torch.testing.assert_close(behind, plain, rtol=1e-9, atol=1e-9)


def test_a_softmax_of_enormous_logits_has_finite_bounds():
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1))
    model[0].weight.data *= 1e4
    x = torch.randn(2, 3)
    for norm in (2, math.inf):
        for method in ("IBP", "bcp", "bcp-crown", "CROWN"):
            ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=1.0))
            lower, upper = BoundedModule(model, x).compute_bounds(x=(ball,), method=method)
            assert torch.isfinite(lower).all() and torch.isfinite(upper).all(), method
            assert (lower <= model(x)).all() and (upper >= model(x)).all()


# --- quotients -------------------------------------------------------------------------------------------------------


class Quotient(nn.Module):
    """a(x) / d(b(x)) of two linear maps."""

    def __init__(self, divisor):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.divisor = nn.Linear(4, 3), nn.Linear(4, 3), divisor

    def forward(self, x):
        return self.a(x) / self.divisor(self.b(x))


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN", "bcp", "bcp-crown"])
@pytest.mark.parametrize("kind", ["positive", "negative", "either"])
def test_bounds_of_quotients_hold(kind, method):
    """0.3's own interval rule does not; its backward one does for positive divisors, and others are refused."""
    divisors = {"positive": lambda b: b**2 + 0.3, "negative": lambda b: -1 - b.abs(), "either": lambda b: b}
    model, x = Quotient(divisors[kind]).double(), torch.randn(2, 4, dtype=torch.float64)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.3))
    try:
        lower, upper = BoundedModule(model, x).compute_bounds(x=(ball,), method=method)
    except (NotImplementedError, AssertionError):
        assert kind != "positive" and method in ("IBP", "CROWN-IBP", "CROWN")
        return
    step = 0.3 * (2 * torch.rand(4000, 2, 4, dtype=torch.float64) - 1)
    step[::2] = 0.3 * step[::2].sign()
    y = model(x + step)
    assert not ((y < lower - 1e-9) | (y > upper + 1e-9)).any()
    assert kind == "either" or (torch.isfinite(lower).all() and torch.isfinite(upper).all())
