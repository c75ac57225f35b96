"""The engine's list: its rows were earned, a graph that it does not cover goes another way, and wrong rows are noticed."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from soundness import assert_contains, assert_sound, extremes
from torch import nn

import lirpa_ext
from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine
from lirpa_ext.engine import positive_list as engine_list
from lirpa_ext.engine.configuration import configuration, kind
from lirpa_ext.errors import OptionError, SoundnessError, UnsupportedNodeError

sys.path.insert(0, str(Path(__file__).parent))

from catalogue import Apply, catalogue
from contract import observe, quiet
from make_list import judged

CASES = catalogue()
METHODS = ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN")


def listed() -> dict[str, dict[str, frozenset[str]]]:
    """The rows of the engine at hand."""
    return engine_list.engine_list().get(engine.engine_version(), {})


def check(numbers: list[int]) -> None:
    """Assert that no row of the list is violated by these cases of the catalogue."""
    observations = [found for number in numbers for found in observe(CASES[number], number)]
    for (family, name, row), wrong in judged(observations).items():
        if row in listed().get(family, {}).get(name, ()):
            assert not wrong or wrong.startswith("error"), f"{family} {name} [{row}]: {wrong}"


@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_listed_bounds_hold(first):
    """A share of the suite; all of it is `make_list.py`, and the next test."""
    check(list(range(first * 17, len(CASES), 68)))


@pytest.mark.reproduction
@pytest.mark.parametrize("first", range(0, len(CASES), 10))
def test_all_listed_bounds_hold(first):
    check(list(range(first, min(first + 10, len(CASES)))))


def test_the_engine_at_hand_has_a_list():
    if engine.engine_version() not in ("0.3", "0.7.1"):
        pytest.skip("of another version nothing is known")
    assert set(listed()) == set(engine_list.FAMILIES)
    assert "p c c, vector" in listed()["backward"]["BoundLinear"]
    assert "p, square map, matrix" in listed()["backward"]["BoundRelu"]


def test_rows_are_of_nodes_that_exist():
    for families in engine_list.engine_list().values():
        for kinds in families.values():
            assert all(name.startswith("Bound") and rows for name, rows in kinds.items())


# --- what the engine gets wrong, by version: a network, its input, and the rows that would let the engine bound it -----


def _oblong():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, 1, 1), nn.Tanh(), nn.Conv2d(2, 2, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    )
    return net, torch.randn(2, 1, 5, 6)


def _pool():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(3, 2), nn.Flatten(), nn.Linear(9, 3))
    return net, torch.randn(2, 1, 7, 7)


class _Scaled(nn.Module):
    """A product of two parameters is added."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.a, self.b = nn.Parameter(torch.tensor([3.0, -2.0, 0.5])), nn.Parameter(torch.tensor([0.1, 0.1, 0.1]))

    def forward(self, x):
        return self.last(torch.relu(self.first(x) + self.a * self.b))


def _dilated():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    return net, torch.randn(3, 2, 6, 6)


WRONG = {
    "maps that are not square": (_oblong, ("0.3", "0.7.1"), 0.01),
    "dilated convolutions": (_dilated, ("0.3", "0.7.1"), 0.01),
    "average pools that overlap": (_pool, ("0.3",), 0.01),
}


def everything(graph, x, perturbation):
    """A list that has every node of a graph, in whatever configuration."""
    engine.set_input(graph, BoundedTensor(x, perturbation))
    rows: dict[str, dict[str, set[str]]] = {family: {} for family in engine_list.FAMILIES}
    for node in engine.ancestors_in_order(graph.final_node()):
        for kinds in rows.values():
            for mode in ("", "patches", "matrix"):
                kinds.setdefault(kind(node), set()).add(configuration(node, mode))
    frozen = {f: {name: frozenset(found) for name, found in kinds.items()} for f, kinds in rows.items()}
    return {engine.engine_version(): frozen}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("norm", [2, math.inf])
def test_without_the_repair_the_bound_is_violated(name, norm, monkeypatch):
    """With the rows that are missing, the engine bounds these networks; then no guard may be what holds it back."""
    make, versions, eps = WRONG[name]
    if engine.engine_version() not in versions:
        pytest.skip(f"{engine.engine_version()} has not got this wrong")
    torch.manual_seed(0)
    net, x = make()
    net, x = net.double().eval(), x.double()
    ball = PerturbationLpNorm(norm=norm, eps=eps)
    graph = BoundedModule(net, x)
    bounds = graph.compute_bounds(x=(BoundedTensor(x, ball),), method="CROWN")
    found = extremes(net, x, ball, steps=10)
    assert_contains(bounds, found)
    rows = everything(graph, x, ball)
    monkeypatch.setattr(engine_list, "engine_list", lambda: rows)
    graph = BoundedModule(net, x)
    with quiet(), pytest.raises((AssertionError, SoundnessError), match=r"violated|defect"):
        assert_contains(graph.compute_bounds(x=(BoundedTensor(x, ball),), method="CROWN"), found)


# --- ordinary networks that the engine gets wrong are bounded, by all methods ------------------------------------------


class _Relative(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self.net(x) - self.net(torch.zeros_like(x))


def _head(*layers, shape):
    body = nn.Sequential(*layers)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(body(torch.zeros(1, *shape)).numel(), 3))


ORDINARY = {
    "oblong maps": (lambda: _head(nn.Conv2d(1, 2, 3, 1, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1), nn.ReLU(), shape=(1, 5, 6)), (1, 5, 6)),
    "oblong kernels": (lambda: _head(nn.Conv2d(1, 2, (3, 1), (2, 1), (0, 1)), nn.ReLU(), shape=(1, 6, 6)), (1, 6, 6)),
    "average pool 2, 1": (lambda: _head(nn.Conv2d(1, 1, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2, 1), shape=(1, 6, 6)), (1, 6, 6)),
    "average pool 3, 2, 1": (lambda: _head(nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.ReLU(), shape=(2, 5, 7)), (2, 5, 7)),
    "average pool 2, 3": (lambda: _head(nn.AvgPool2d(2, 3), nn.Conv2d(1, 2, 2), nn.ReLU(), shape=(1, 9, 9)), (1, 9, 9)),
    "overlapping max pool": (lambda: _head(nn.Conv2d(1, 2, 3, 1, 1), nn.MaxPool2d(3, 2, 1), shape=(1, 6, 6)), (1, 6, 6)),
    "max pool 2, 1": (lambda: _head(nn.MaxPool2d(2, 1), nn.Conv2d(1, 2, 2), nn.ReLU(), shape=(1, 5, 4)), (1, 5, 4)),
    "products of constants": (_Scaled, (4,)),
    "repeat": (lambda: Apply(lambda x, f, g: g(torch.relu(f(x)).repeat(1, 2)), nn.Linear(3, 4), nn.Linear(8, 2)), (3,)),
    "repeat of images": (lambda: _head(nn.Conv2d(1, 2, 3), Apply(lambda x: x.repeat(1, 2, 1, 2)), nn.ReLU(), shape=(1, 4, 4)), (1, 4, 4)),
    "a batch from Shape": (_Relative, (2,)),
    "one number a sample": (lambda: Apply(lambda x: x[:, 0] * x[:, 2]), (3,)),
    "a squeezed head": (lambda: Apply(lambda x, f: f(x).squeeze(-1), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))), (3,)),
    "only reshapes": (nn.Flatten, (2, 2)),
    "nothing at all": (nn.Identity, (3,)),
    "padding": (lambda: _head(nn.ConstantPad2d((1, 0, 2, 1), 0.5), nn.Conv2d(1, 2, 3), nn.ReLU(), shape=(1, 4, 4)), (1, 4, 4)),
    "transposed convolution": (lambda: _head(nn.ConvTranspose2d(1, 2, 3, 2, 1, 1), nn.ReLU(), shape=(1, 3, 4)), (1, 3, 4)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, eps=0.1), nn.ReLU(), nn.Linear(4, 2)), (3,)),
    "outputs of rank 3": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3, 3)),
    "rows without a last bias": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)), (3,)),
    "scaled weights": (lambda: Apply(lambda x, f, w: torch.relu(nn.functional.linear(f(x), w * 0.3)), nn.Linear(3, 4), torch.randn(2, 4)), (3,)),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_networks_are_bounded_by_all_methods(name, batch):
    make, shape = ORDINARY[name]
    torch.manual_seed(1)
    net = make().double().eval()
    x = torch.rand(batch, *shape, dtype=torch.float64) - 0.3
    graph = BoundedModule(net, x)
    each = torch.linspace(0.05, 0.3, batch, dtype=torch.float64)
    for perturbation in (PerturbationLpNorm(0.3, 2), PerturbationLpNorm(each, math.inf)):
        found = extremes(net, x, perturbation, count=30, steps=5)
        for method in (*METHODS, "lipschitz", "bcp", "bcp-crown", "slope:crown", "slope:ibp"):
            with quiet():
                bounds = graph.compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
            assert bounds[0].shape == net(x).shape, method
            assert_contains(bounds, found, f"({name}, {method}, {perturbation})")


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_network_that_does_not_end_in_a_dense_layer(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    x, C = torch.rand(2, 3).double(), torch.randn(2, 3, 4).double()
    ball = PerturbationLpNorm(0.2, 2)
    with quiet():
        bounds = BoundedModule(net, x).compute_bounds(x=(BoundedTensor(x, ball),), C=C, method=method)
    assert_sound(net, x, ball, bounds, C)


# --- refusals, options and what stays on the graph ---------------------------------------------------------------------


def test_a_forward_method_is_refused_where_the_list_ends():
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))
    x = torch.rand(2, 3)
    with pytest.raises(UnsupportedNodeError) as refusal:
        BoundedModule(net, x).compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(0.1, 2)),), method="forward")
    for said in ("BoundSilu", "'forward'", engine.engine_version(), "not known to hold", "bcp-crown"):
        assert said in str(refusal.value)


def test_an_option_of_the_engine_is_refused_where_its_list_ends():
    net, x = _oblong()
    graph = BoundedModule(nn.Sequential(net, nn.SiLU()), x)
    ball = BoundedTensor(x, PerturbationLpNorm(0.1, 2))
    with pytest.raises(UnsupportedNodeError, match="return_A"):
        graph.compute_bounds(x=(ball,), method="CROWN", return_A=True, needed_A_dict={"/x": ["/y"]})
    with pytest.raises(OptionError, match="no option 'tighten'"):
        graph.compute_bounds(x=(ball,), method="CROWN", tighten=True)


def test_one_method_leaves_nothing_behind_for_the_next():
    """alpha-CROWN's slopes stayed on 0.3's nodes, and made what came after fail."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.rand(3, 4).double()
    ball, C = BoundedTensor(x, PerturbationLpNorm(0.2, 2)), torch.randn(3, 4, 3).double()
    graph = BoundedModule(net, x)
    calls = [(method, rows) for method in ("alpha-CROWN", "forward", "CROWN", "IBP", "CROWN-IBP") for rows in (C, None)]
    with quiet():
        for method, rows in [*calls, *calls[::-1]]:
            bounds = graph.compute_bounds(x=(ball,), C=rows, method=method)
            fresh = BoundedModule(net, x).compute_bounds(x=(ball,), C=rows, method=method)
            for found, expected in zip(bounds, fresh, strict=True):
                torch.testing.assert_close(found.detach(), expected.detach())


def test_a_user_class_is_the_users_promise():
    class Mine(engine.BoundRelu):
        pass

    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.rand(2, 4)
    graph = BoundedModule(net, x, custom_ops={"onnx::Relu": Mine})
    ball = PerturbationLpNorm(0.1, 2)
    assert_sound(net, x, ball, graph.compute_bounds(x=(BoundedTensor(x, ball),), method="IBP"))


def test_register_refuses_what_the_list_does_not_cover():
    """The engine's own class cannot be repaired from outside: its methods run on covered graphs, and refuse the rest."""
    torch.manual_seed(0)
    lirpa_ext.register()
    try:
        dense = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        x = torch.rand(2, 4)
        ball = engine.BoundedTensor(x, engine.EnginePerturbationLpNorm(norm=2, eps=0.2))
        graph = engine.EngineBoundedModule(dense, x, device="cpu")
        for method in METHODS:
            with quiet():
                bounds = graph.compute_bounds(x=(ball,), method=method)
            assert_sound(dense, x, PerturbationLpNorm(0.2, 2), bounds)
        shifted = engine.EngineBoundedModule(nn.Sequential(Apply(lambda x: -x), dense), x, device="cpu")
        with pytest.raises(UnsupportedNodeError, match="BoundNeg"):
            shifted.compute_bounds(x=(ball,), method="CROWN")
        net, images = _oblong()
        oblong = engine.EngineBoundedModule(net, images, device="cpu")
        box = engine.BoundedTensor(images, engine.EnginePerturbationLpNorm(norm=2, eps=0.01))
        with pytest.raises(UnsupportedNodeError, match="oblong"):
            oblong.compute_bounds(x=(box,), method="CROWN")
    finally:
        lirpa_ext.unregister()


def test_the_document_is_up_to_date():
    path = Path(__file__).parents[2] / "docs" / "support_table.py"
    spec = importlib.util.spec_from_file_location("support_table", path)
    module = importlib.util.module_from_spec(spec)
    with contextlib.suppress(FileNotFoundError):
        spec.loader.exec_module(module)
        assert module.PATH.read_text(encoding="utf-8") == module.support_table()
