"""Random networks drawn by hypothesis: no point that is found leaves any method's bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from soundness import TOLERANCE, Extremes, assert_contains, extremes, generator
from torch import Tensor, nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm

BATCH = 2
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.5),
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class Block:
    """One step of a network: its kind, and the numbers that its kind needs (taken modulo what is possible)."""

    kind: str
    a: int
    b: int
    inner: tuple[Block, ...] = ()


class Join(nn.Module):
    """Two branches joined: sum, difference, concatenation, or product."""

    def __init__(self, branch: nn.Module, how: int) -> None:
        super().__init__()
        self.branch, self.how = branch, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.how == 2 or y.shape != x.shape:
            return torch.cat([x.flatten(1), y.flatten(1)], 1)
        return [x + y, y - x, x, x * y][self.how]


class Arithmetic(nn.Module):
    """x combined with a constant: per feature or per channel, or one number."""

    def __init__(self, channels: int, dims: int, which: int) -> None:
        super().__init__()
        self.which = which
        self.register_buffer("constant", torch.randn(1, channels, *[1] * (dims - 1)))

    def forward(self, x: Tensor) -> Tensor:
        if self.which == 0:
            return x + self.constant
        if self.which == 1:
            return self.constant - x
        if self.which == 2:
            return x * self.constant
        if self.which == 3:
            return x / (self.constant.abs() + 0.5)
        if self.which == 4:
            return -x
        return x * 0.5 - 0.25


class Move(nn.Module):
    """A slice, a transposition, a padding or a reshape."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        width = int(x.shape[1])  # a number, not a node of the graph
        if self.which == 0:
            return x[:, : max(1, width - 1)]
        if self.which == 1:
            return nn.functional.pad(x, (1, 0), value=0.3)
        if x.dim() == 2:
            return x[:, max(0, width - 2) :]
        if self.which == 2:
            return x.transpose(2, 3)
        return x.reshape(x.size(0), width, -1, 1)


def step(block: Block, shape: tuple[int, ...]) -> nn.Module:
    """The module of a block for inputs of that shape."""
    image, channels = len(shape) == 3, shape[0]
    if block.kind == "linear" and image:
        out, kernel = 1 + block.a % 3, 1 + block.b % 3
        groups = 2 if channels % 2 == 0 and block.a % 5 == 0 else 1
        stride, padding = 1 + block.b % 2, block.a % 2 + kernel // 2
        dilation = 2 if block.b % 5 == 4 and min(shape[1:]) + 2 * padding > 2 * kernel else 1
        return nn.Conv2d(channels, out * groups, kernel, stride, padding, dilation, groups, bias=block.a % 2 == 0)
    if block.kind == "linear":
        return nn.Linear(channels, 1 + block.a % 6, bias=block.b % 3 > 0)
    if block.kind == "norm":
        norm = (nn.BatchNorm2d if image else nn.BatchNorm1d)(channels)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.3, 2.0)
        nn.init.normal_(norm.weight)
        return norm
    if block.kind == "pool" and image and min(shape[1:]) >= 2:
        stride, padding = 1 + block.a % 2, block.b % 2
        pools = [nn.AvgPool2d(2, stride, padding), nn.MaxPool2d(2, stride, padding), nn.AdaptiveAvgPool2d(1)]
        return pools[(block.a + block.b) % 3]
    if block.kind == "arithmetic":
        return Arithmetic(channels, len(shape), block.a % 6)
    if block.kind == "move":
        return Move(block.a % 4)
    if block.kind == "join":
        return Join(chain(block.inner, shape)[0], block.a % 4)
    return list(ACTIVATIONS.values())[(block.a + block.b) % len(ACTIVATIONS)]()


def chain(blocks: tuple[Block, ...], shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """The blocks one after the other, each made for the shape that reaches it."""
    modules: list[nn.Module] = []
    for block in blocks:
        module = step(block, shape).eval()
        with torch.no_grad():
            shape = tuple(module(torch.zeros(1, *shape)).shape[1:])
        modules.append(module)
    return nn.Sequential(*modules), shape


KINDS = ["linear", "linear", "activation", "activation", "norm", "pool", "arithmetic", "move", "join"]
# The same networks on every run, in bounded time: a failing one is printed as it is, not made smaller.
DRAWN = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
numbers = st.integers(0, 9)
leaves = st.builds(Block, st.sampled_from(KINDS[:-1]), numbers, numbers)
joins = st.builds(Block, st.just("join"), numbers, numbers, st.lists(leaves, min_size=1, max_size=3).map(tuple))
networks = st.lists(st.one_of(leaves, leaves, joins), min_size=2, max_size=6).map(tuple)


def build(blocks: tuple[Block, ...], shape: tuple[int, ...], head: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    body, out = chain(blocks, shape)
    size = math.prod(out)
    tail = [nn.Flatten(), nn.Linear(size, 3)] if head or size > 12 else []
    return nn.Sequential(body, *tail).eval()


def check(graph: BoundedModule, method: str, x: Tensor, found: Extremes, **options: Any) -> tuple[Tensor, Tensor]:
    lower, upper = graph.compute_bounds(x=(x,), method=method, **options)
    assert torch.isfinite(lower).all() and torch.isfinite(upper).all(), method
    assert_contains((lower, upper), found, f"({method})")
    return lower, upper


@pytest.mark.slow
@DRAWN
@given(
    blocks=networks,
    shape=st.sampled_from([(4,), (5,), (1, 4, 4), (2, 5, 3)]),
    head=st.booleans(),
    norm=st.sampled_from([2.0, 2.0, math.inf, 1.0, 3.0]),
    eps=st.sampled_from([0.01, 0.1, 0.5]),
    ranged=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_random_network(blocks, shape, head, norm, eps, ranged, dtype, seed):
    model = build(blocks, shape, head, seed).to(dtype)
    note(str(model))
    x = torch.rand(BATCH, *shape, generator=generator(seed), dtype=dtype)
    ends = {"x_L": 0.0, "x_U": 1.0} if ranged else {}
    perturbation = PerturbationLpNorm(norm=norm, eps=eps * torch.tensor([1.0, 0.5], dtype=dtype), **ends)
    found = extremes(model, x, perturbation, count=20, steps=2, seed=seed)
    slack = TOLERANCE[dtype] * found.scale
    graph, bounded = BoundedModule(model, x), BoundedTensor(x, perturbation)
    ball = check(graph, "lipschitz", bounded, found)
    both = check(graph, "bcp", bounded, found)
    back = check(graph, "bcp-crown", bounded, found)
    assert (both[0] >= ball[0] - slack).all() and (both[1] <= ball[1] + slack).all(), "bcp looser than lipschitz"
    assert (back[0] >= both[0] - slack).all() and (back[1] <= both[1] + slack).all(), "bcp-crown looser than bcp"
    for method in ("slope:ibp", "slope:crown", "cap"):
        check(graph, method, bounded, found)
    check(graph, "slope:random", bounded, found, seed=seed)


ENGINE_RUNS: dict[str, list[str]] = {"IBP": [], "CROWN-IBP": [], "CROWN": []}


@pytest.mark.slow
@pytest.mark.parametrize("method", ENGINE_RUNS)
def test_engine_on_random_networks_in_l2(method):
    """The engine's own methods through our class, where they do not raise: the hole for l2 is closed."""

    @settings(DRAWN, max_examples=40)
    @given(networks, st.sampled_from([(4,), (5,), (1, 4, 4), (2, 5, 3)]), st.booleans(), st.integers(0, 1000))
    def run(blocks, shape, ranged, seed):
        model = build(blocks, shape, True, seed).double()
        note(str(model))
        x = torch.rand(BATCH, *shape, generator=generator(seed), dtype=torch.float64)
        ends = {"x_L": 0.0, "x_U": 1.0} if ranged else {}
        perturbation = PerturbationLpNorm(norm=2, eps=0.3 if seed % 2 else torch.tensor([0.3, 0.1]), **ends)
        found = extremes(model, x, perturbation, count=20, steps=2, seed=seed)
        graph = BoundedModule(model, x)
        try:
            bounds = graph.compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
        except Exception as error:  # the engine raises whatever comes: no bound, so none that is wrong
            ENGINE_RUNS[method].append(type(error).__name__)
            return
        ENGINE_RUNS[method].append("bounded")
        assert_contains(bounds, found, f"({method})")

    run()
    outcomes = ENGINE_RUNS[method]
    assert outcomes.count("bounded") >= len(outcomes) // 2, f"{method} bounded few networks: {outcomes}"
