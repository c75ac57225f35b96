"""Nodes that move, copy, join or choose values, and constants of any shape: sound on every norm, batch and method."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from soundness import assert_contains, extremes
from torch import Tensor, nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine, lipschitz
from lirpa_ext.domain.ball_box import BallBox
from lirpa_ext.domain.batch_axis import merges_batch
from lirpa_ext.domain.linear_maps import Selection
from lirpa_ext.domain.norms import spectral_norm_bound
from lirpa_ext.domain.products import Product
from lirpa_ext.errors import LirpaExtError, UnsupportedNodeError
from lirpa_ext.nodes.padding import repeated
from lirpa_ext.rules.structure import max_pool_factor

F64 = torch.float64

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lipschitz", {}),
    ("bcp", {"tighten": False}),
    ("bcp-alpha-crown", {"steps": 1, "early_stop": False}),  # at least bcp-crown, of which it is the best, and bcp
    ("slope:ibp", {}),
    ("slope:random", {"seed": 0, "intermediate": "bcp"}),
    ("cap", {}),
)


class Op(nn.Module):
    """A function as a module, with parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


class Inside(nn.Module):
    """The op between other layers."""

    def __init__(self, op: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        first, last = shape[0], shape[-1]
        self.before = nn.Conv2d(first, first, 3, padding=1) if len(shape) == 3 else nn.Linear(last, last)
        self.op = op
        with torch.no_grad():
            outputs = op(torch.rand(2, *shape)).reshape(2, -1).shape[1]
        self.after = nn.Sequential(nn.Linear(outputs, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.op(2 * self.before(x).relu()).reshape(x.shape[0], -1))


def op(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return functools.partial(Op, function, *shapes)


def batch_norm(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A batch norm with statistics and weights of its own."""

    def build() -> nn.Module:
        norm = make()
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.2, 3.0)
            if norm.affine:
                norm.weight.normal_()
                norm.bias.normal_()
        return norm.eval()

    return build


V, M, IMAGE = (6,), (3, 4), (2, 5, 6)
MASK = torch.tensor([True, False, True, True, False, True])

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # constants on either side
    "matrix-x": (op(lambda x, w: w @ x, (2, 3)), M),
    "vector-x": (op(lambda x, w: w @ x, (3,)), M),
    "x-vector": (op(lambda x, w: x @ w, (4,)), M),
    "vector-x-vector": (op(lambda x, w: x @ w, (6,)), V),
    "x-heads": (op(lambda x, w: x @ w, (3, 4, 2)), (3, 2, 4)),
    "heads-x": (op(lambda x, w: w @ x, (3, 5, 2)), (3, 2, 4)),
    "x-for-all-heads": (op(lambda x, w: x @ w, (3, 4, 2)), (1, 2, 4)),
    "matrix-of-batch-1-x": (op(lambda x, w: w @ x, (1, 2, 3)), M),
    "x-matrix-of-batch-1": (op(lambda x, w: x @ w, (1, 4, 2)), M),
    "matrix-stack": (op(lambda x, w: w @ x, (5, 2)), (3, 2, 4)),
    "vector-stack": (op(lambda x, w: w @ x, (2,)), (3, 2, 4)),
    "both-sides": (op(lambda x, w, v: (w @ x) @ v, (2, 3), (4, 2)), M),
    "scaled-weights": (op(lambda x, w, b: F.linear(x, w * 0.3, b * 0.3), (4, 6), (4,)), V),
    # copies
    "expand": (op(lambda x: x.unsqueeze(2).expand(-1, -1, 3)), V),
    "expand-axis-of-one": (op(lambda x: x.expand(x.size(0), 5, 4)), (1, 4)),
    "concat-twice": (op(lambda x: torch.cat([x, x], 1)), V),
    "gather-repeated": (op(lambda x: x[:, torch.tensor([2, 0, 2, 2])]), V),
    "repeat": (op(lambda x: x.repeat(1, 2, 3)), M),
    # choices
    "slice-negative": (op(lambda x: x[:, -4:-1]), V),
    "flip-features": (op(lambda x: x.flip(1)), V),
    "split": (op(lambda x: x.split([1, 2, 3], 1)[1]), V),
    "unbind": (op(lambda x: torch.stack(x.unbind(1)[::-1], 1)), M),
    "amax": (op(lambda x: x.amax(1)), V),
    "amax-keepdim": (op(lambda x: x.amax(-1, keepdim=True)), M),
    "mask": (op(lambda x: x * MASK), V),
    "max-pool-padded": (lambda: nn.MaxPool2d(3, stride=2, padding=1), IMAGE),
    "max-pool-oblong": (lambda: nn.MaxPool2d((2, 3), stride=(1, 2)), IMAGE),
    # sums
    "sum-of-axes": (op(lambda x: x.sum((1, 2))), M),
    "sum-keepdim": (op(lambda x: x.sum((1, 2), keepdim=True)), M),
    "number-of-each-sample": (op(lambda x: x.sum(1) * 2.0 + 1), V),
    "cumsum": (op(lambda x: x.cumsum(1)), M),
    "average-pool-padded": (lambda: nn.AvgPool2d(3, stride=2, padding=1), IMAGE),
    "average-pool-oblong": (lambda: nn.AvgPool2d((2, 3), stride=(1, 2)), IMAGE),
    # convolutions
    "transposed-output-padding": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), IMAGE),
    "transposed-long-output-padding": (
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, dilation=3, output_padding=2),
        (2, 3, 4),
    ),
    "transposed-oblong": (lambda: nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), IMAGE),
    "conv-circular": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular", stride=2), IMAGE),
    "conv-reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv-replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), IMAGE),
    "conv1d-circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6)),
    "pad-reflect": (lambda: nn.ReflectionPad2d((1, 2, 0, 1)), IMAGE),
    "pad-replicate": (lambda: nn.ReplicationPad2d((1, 2, 0, 3)), IMAGE),
    "pad-circular": (lambda: nn.CircularPad2d((1, 2, 0, 1)), IMAGE),
    "pad-cut": (op(lambda x: F.pad(x, (-1, 2), value=0.3)), V),
    # batch norm
    "batch-norm": (batch_norm(lambda: nn.BatchNorm2d(2)), IMAGE),
    "batch-norm-plain": (batch_norm(lambda: nn.BatchNorm2d(2, affine=False)), IMAGE),
    # a merged batch axis
    "tokens-view": (op(lambda x, w: F.linear(x.view(x.shape[0] * 2, 3), w).relu().view(x.shape[0], 8), (4, 3)), V),
    "tokens-reshape": (op(lambda x, w: F.linear(x.reshape(-1, 4), w).relu().reshape(-1, 6), (2, 4)), M),
    "tokens-conv": (op(lambda x, w: F.conv2d(x.reshape(-1, 1, 5, 6), w).relu().flatten(1).reshape(len(x), -1),
                       (2, 1, 3, 3)), IMAGE),
    "tokens-softmax": (op(lambda x: x.reshape(-1, 4).softmax(1).reshape(-1, 3, 4)), M),
    "tokens-left": (op(lambda x, w: (x.reshape(-1, 2, 2) @ w).relu().reshape(-1, 12), (2, 2)), M),
    "tokens-twice": (op(lambda x: (x.reshape(-1, 2).relu() + 1).reshape(-1, 4).relu().reshape(-1, 12)), M),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A perturbation set and a batch; eps differs by sample, and is 0 for the last one."""

    norm: float
    batch: int

    def perturbation(self) -> PerturbationLpNorm:
        eps = {1: 0.6, 2: 0.4, 3: 0.3, math.inf: 0.1}[self.norm]
        return PerturbationLpNorm(norm=self.norm, eps=torch.tensor([eps, eps / 4, 0.0], dtype=F64)[: self.batch])


SETTINGS = (Setting(2, 3), Setting(math.inf, 3), Setting(1, 1), Setting(3, 1))


def model_of(name: str, inside: bool) -> tuple[nn.Module, tuple[int, ...]]:
    build, shape = CASES[name]
    torch.manual_seed(len(name))
    return (Inside(build(), shape) if inside else build()).double().eval(), shape


@pytest.mark.parametrize("inside", [False, True], ids=["first", "inside"])
@pytest.mark.parametrize("name", CASES)
def test_every_method_is_sound_or_refuses(name, inside):
    model, shape = model_of(name, inside)
    graph = None
    for turn, setting in enumerate(SETTINGS if inside else SETTINGS[:2]):
        x = torch.rand(setting.batch, *shape, dtype=F64, generator=torch.Generator().manual_seed(turn))
        graph = graph or BoundedModule(model, x)
        perturbation = setting.perturbation()
        found = extremes(model, x, perturbation, count=16, steps=2)
        for method, options in METHODS:
            bounds = graph.compute_bounds(x=(BoundedTensor(x, perturbation),), method=method, **options)
            assert bounds[0].shape == model(x).shape, method
            assert all(torch.isfinite(side).all() for side in bounds), method
            assert_contains(bounds, found, f"({method} {options}, {setting})")
            if setting.batch == 3:  # one set for each sample: the last one's is a point
                torch.testing.assert_close(bounds[0][2], model(x)[2], rtol=1e-6, atol=1e-6)
    assert not graph.last_result.fallbacks


def test_a_batch_on_another_axis_is_refused_by_every_method():
    model, x = op(lambda x: x.unsqueeze(0).squeeze(0))(), torch.rand(3, 5, dtype=F64)
    graph = BoundedModule(model, x)
    for method, options in METHODS:
        with pytest.raises(UnsupportedNodeError, match="moves the batch to another axis"):
            graph.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(0.1, 2)),), method=method, **options)


# --- constants on either side ------------------------------------------------------------------------------------


def matrix_of(linear_map: Any) -> Tensor:
    """A as a matrix, (outputs, inputs)."""
    eye = torch.eye(math.prod(linear_map.input_shape), dtype=F64)
    return linear_map(eye.view(-1, *linear_map.input_shape)).reshape(len(eye), -1).t()


PRODUCTS = [
    ((3,), (3, 4), True), ((4,), (3, 4), False), ((6,), (6,), False), ((2, 3), (3, 4), True), ((2, 3), (5, 3, 4), True),
    ((5, 2, 3), (5, 3, 4), True), ((5, 4, 2), (5, 3, 4), False), ((5, 4, 2), (1, 3, 4), False),
    ((5, 2, 3), (1, 3, 4), True), ((1, 2, 3), (5, 3, 4), True), ((2, 1, 4, 2), (1, 5, 3, 4), False),
    ((5, 4, 2), (2, 5, 3, 4), False), ((6, 2), (6,), False),
]  # fmt: skip


@pytest.mark.parametrize("weight, shape, left", PRODUCTS)
def test_product_against_its_matrix(weight, shape, left):
    product = Product(torch.randn(weight, dtype=F64), shape, left)
    matrix = matrix_of(product)
    assert product.output_shape == product(torch.zeros(2, *shape, dtype=F64)).shape[1:]
    y = torch.randn(3, *product.output_shape, dtype=F64)
    torch.testing.assert_close(product.adjoint(y).reshape(3, -1), y.reshape(3, -1) @ matrix)
    torch.testing.assert_close(matrix_of(product.abs()), matrix.abs())
    rows = product.row_norms().expand(product.output_shape).reshape(-1)
    torch.testing.assert_close(rows, torch.linalg.vector_norm(matrix, dim=1))
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    bound = float(spectral_norm_bound(product).value)
    assert exact <= bound <= exact * (1 + 1e-9)


@pytest.mark.parametrize("shape, left", [((2, 3), True), ((4, 2), False), ((3,), True), ((4,), False)])
@pytest.mark.parametrize("method", ["bcp", "bcp-crown", "slope:ibp", "slope:crown"])
def test_width_of_a_product_is_the_exact_one(shape, left, method):
    """One matrix after an l2 ball: eps times the norm of its row (of its column, on the right)."""
    weight = torch.randn(shape, dtype=F64)
    model = Op((lambda x, w: w @ x) if left else (lambda x, w: x @ w), shape).double()
    model.weights[0].data = weight
    x = torch.rand(2, 3, 4, dtype=F64)
    given = (BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.2)),)
    lower, upper = BoundedModule(model, x).compute_bounds(x=given, method=method)
    along = -1 if left or weight.dim() == 1 else 0
    sizes = torch.linalg.vector_norm(weight, dim=along)
    expected = sizes.unsqueeze(-1) if left and weight.dim() == 2 else sizes
    torch.testing.assert_close(upper - lower, 0.4 * expected.expand_as(lower), rtol=1e-9, atol=1e-9)


class Joined(nn.Module):
    """A layer, then the product with an input that is not perturbed: a matrix or a mask of each sample."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.join = nn.Linear(4, 4), join

    def forward(self, x: Tensor, own: Tensor) -> Tensor:
        return self.join(self.layer(x), own).relu().flatten(1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "join, own",
    [(lambda y, a: a @ y, (2, 3)), (lambda y, a: y @ a, (4, 2)), (torch.mul, (3, 4)), (torch.mul, (3, 1)),
     (torch.div, (1, 4))],
    ids=["left", "right", "mask", "rows", "divided"],
)  # fmt: skip
def test_constants_of_each_sample_multiply_their_own(join, own, batch):
    model = Joined(join).double()
    x, constant = torch.rand(batch, 3, 4, dtype=F64), torch.randn(batch, *own, dtype=F64) + 0.1
    for norm in (2, math.inf):
        perturbation = PerturbationLpNorm(norm=norm, eps=torch.tensor([0.3, 0.1, 0.0], dtype=F64)[:batch])
        graph = BoundedModule(model, (x, constant))

        def on_points(points: Tensor) -> Tensor:
            return model(points, constant.repeat(len(points) // batch, *[1] * len(own)))

        found = extremes(on_points, x, perturbation, count=20, steps=0)
        for method, options in METHODS:
            bounds = graph.compute_bounds(x=(BoundedTensor(x, perturbation), constant), method=method, **options)
            assert_contains(bounds, found, f"({method}, l{norm})")
        assert not graph.last_result.fallbacks


# --- the batch axis ----------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A head shared by tokens, on the last axis or with the batch axis merged into the tokens'."""

    def __init__(self, merge: bool) -> None:
        super().__init__()
        self.first, self.head, self.last, self.merge = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(8, 2), merge

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = y.view(x.shape[0] * 2, 4) if self.merge else y.view(x.shape[0], 2, 4)
        return self.last(self.head(y).relu().view(x.shape[0], 8))


def test_a_merged_batch_axis_bounds_what_the_last_axis_does():
    merged, plain = Head(True).double(), Head(False).double()
    plain.load_state_dict(merged.state_dict())
    x = torch.rand(3, 4, dtype=F64)
    for norm in (2, math.inf):
        given = (BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=0.3)),)
        for method in ("slope:ibp", "slope:crown", "bcp-crown"):
            (low, high), (other_low, other_high) = (
                BoundedModule(model, x).compute_bounds(x=given, method=method) for model in (merged, plain)
            )
            if method.startswith("slope") and norm == math.inf:  # boxes alone: the same network, the same bounds
                torch.testing.assert_close(low, other_low, rtol=1e-9, atol=1e-9)
            assert ((high - low) <= 1.5 * (other_high - other_low)).all(), (norm, method)


def test_merged_axes_are_told():
    graph = BoundedModule(Head(True), torch.rand(3, 4))
    graph.compute_bounds(x=(BoundedTensor(torch.rand(3, 4), PerturbationLpNorm(norm=2, eps=0.1)),), method="bcp")
    order = [node for node in engine.ancestors_in_order(graph.final_node()) if node.perturbed]
    merged = [node for node in order if merges_batch(node)]
    assert merged and all(node.output_shape[0] == 6 for node in merged)
    assert not merges_batch(graph.final_node()) and not merges_batch(order[0])


@pytest.mark.parametrize("method", [method for method, _ in METHODS])
def test_an_output_without_batch_axis_is_refused(method):
    model = Op(lambda x, w: F.linear(x.reshape(-1, 4), w).relu(), (2, 4))
    x = torch.rand(2, 3, 4)
    with pytest.raises(LirpaExtError, match="batch"):
        graph = BoundedModule(model, x)
        graph.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1)),), method=method)


@pytest.mark.parametrize("method", ["bcp", "bcp-crown", "slope:crown"])
def test_bounds_of_merged_axes_have_gradients(method):
    model = Head(True).double()
    x = torch.rand(3, 4, dtype=F64)
    given = (BoundedTensor(x, PerturbationLpNorm(norm=2, eps=torch.tensor([0.2, 0.1, 0.0], dtype=F64))),)
    lower, _ = BoundedModule(model, x).compute_bounds(x=given, method=method)
    for gradient in torch.autograd.grad(lower.sum(), list(model.parameters())):
        assert gradient.isfinite().all() and gradient.count_nonzero() > 0


# --- paddings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, name", [("wrap", "circular"), ("edge", "replicate"), ("reflect", "reflect")])
@pytest.mark.parametrize("widths", [(1, 2, 0, 1), (2, 0, 3, 3), (-1, 2, 1, -2)])
def test_paddings_are_torchs_and_their_norm_is_exact(mode, name, widths):
    x = torch.randn(2, 3, 4, 5, dtype=F64)
    before, after = [0, 0, widths[2], widths[0]], [0, 0, widths[3], widths[1]]
    if name != "circular" or min(widths) >= 0:
        torch.testing.assert_close(repeated(x, before, after, mode), F.pad(x, widths, mode=name))
    padding = Selection(lambda y: repeated(y, before, after, mode), x.shape[1:], F64)
    matrix = matrix_of(padding)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert exact <= float(spectral_norm_bound(padding).value) * (1 + 1e-12) <= exact * (1 + 1e-9)
    rows = padding.row_norms().expand(padding.output_shape).reshape(-1)
    torch.testing.assert_close(rows, torch.linalg.vector_norm(matrix, dim=1))


# --- lipschitz ---------------------------------------------------------------------------------------------------


def steep_batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    norm.running_var.fill_(0.01)
    return norm.eval()


class After(nn.Module):
    """A layer and a function of it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


MAP = (1, 4, 4)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {  # whether it is a chain
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), steep_batch_norm(), nn.ReLU()), MAP, True),
    "circular": (lambda: nn.Conv2d(1, 2, 3, padding=2, padding_mode="circular"), MAP, True),
    "reflect": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), MAP, True),
    "replicate": (lambda: nn.Conv2d(1, 2, 3, padding=2, padding_mode="replicate"), MAP, True),
    "scale": (lambda: After(lambda y: 3 * y.relu()), (4,), True),
    "residual": (lambda: After(lambda y: y + 2 * y.relu()), (4,), False),
    "concat": (lambda: After(lambda y: torch.cat([y, y], 1)), (4,), False),
    "gelu": (lambda: After(F.gelu), (4,), True),
    "log-softmax": (lambda: After(lambda y: y.log_softmax(1)), (4,), True),
    "overlapping pool": (lambda: nn.MaxPool2d(3, 1), MAP, True),
    "left": (lambda: Op(lambda x, w: w @ x, (2, 4)), (4, 4), True),
    "merged": (lambda: After(lambda y: y.view(-1, 2).relu().view(-1, 4)), (4,), True),
    "exp": (lambda: After(torch.exp), (4,), True),
    "product": (lambda: After(lambda y: y * y.relu()), (4,), False),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_lipschitz_product_bounds_the_model(name):
    build, shape, chain = NETWORKS[name]
    model = build().double()
    report = lipschitz(model, torch.rand(2, *shape, dtype=F64), verbose=False)
    steepest = 0.0
    for _ in range(20):
        point = 3 * torch.randn(1, *shape, dtype=F64)
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x).flatten(), point).flatten(1)
        steepest = max(steepest, float(torch.linalg.matrix_norm(jacobian, 2)))
    assert steepest <= report.product * (1 + 1e-9)
    assert report.chain == chain
    if chain and math.isfinite(report.product):
        assert report.product == pytest.approx(math.prod(layer.bound for layer in report.layers))
    if name in ("exp", "product"):
        assert math.isinf(report.product) and math.isinf(report.layers[-1].bound)
    else:
        assert report.product <= 4 * steepest  # and no absurd one


class TwoSizes(nn.Module):
    """One convolution on maps of two sizes, one dense layer on rows and on their sum, and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv(x)
        second = self.conv(F.avg_pool2d(first, 2))
        rows = self.dense(x[:, 0])
        return second.flatten(1)[:, :4] + self.dense(rows.sum(1)) + rows[:, 0] @ self.dense.weight


def test_a_weight_used_at_two_sizes_has_a_norm_for_each():
    model, x = TwoSizes().double(), torch.rand(2, 1, 8, 4, dtype=F64)
    graph = BoundedModule(model, x)
    names = set(graph.power_iterations)
    assert {"conv.weight", "conv.weight@1x4x2", "dense.weight"} <= names and len(names) == 5
    assert {f"power_iteration.{name}.u" for name in names} <= set(graph.state_dict())
    given = (BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1)),)
    graph.train()
    for _ in range(300):
        graph.compute_bounds(x=given, method="lipschitz", norms="estimate")
    assert set(graph.power_iterations) == names
    found = graph.last_result.norms
    graph.compute_bounds(x=given, method="lipschitz")
    for name in names:
        assert float(found[name]) == pytest.approx(float(graph.last_result.norms[name]), rel=1e-3), name
    other = BoundedModule(TwoSizes().double(), x)
    other.load_state_dict(graph.state_dict())
    assert all(torch.equal(other.power_iterations[n].u, graph.power_iterations[n].u) for n in names)
    layers = {layer.name for layer in lipschitz(model, x, verbose=False).layers}
    assert names <= layers


# --- one rule each -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cast_that_rounds_is_refused(dtype):
    x = torch.rand(2, 6, dtype=F64)
    with pytest.raises(LirpaExtError):
        graph = BoundedModule(Op(lambda y: y.to(dtype).to(F64) * 2), x)
        with pytest.raises(UnsupportedNodeError, match=r"BoundCast.*rounds") as error:
            graph.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1)),), method="bcp")
        raise error.value


@pytest.mark.parametrize("kernel", range(1, 6))
@pytest.mark.parametrize("stride", range(1, 5))
@pytest.mark.parametrize("dilation", range(1, 5))
def test_max_pool_counts_the_windows_of_an_input(kernel, stride, dilation):
    starts = range(0, 60, stride)
    counts = [sum((i - start) % dilation == 0 and 0 <= (i - start) // dilation < kernel for start in starts)
              for i in range(30)]  # fmt: skip

    node = SimpleNamespace(kernel_size=[kernel], stride=[stride], dilation=[dilation])
    state = BallBox(torch.zeros(1, 1, 30), torch.zeros(1))
    factor = max_pool_factor(node, state, state.center)
    assert factor**2 == pytest.approx(max(counts[20:]))
