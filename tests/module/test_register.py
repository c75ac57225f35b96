"""register(): the methods on the engine's own BoundedModule; idempotent, and undone."""

from __future__ import annotations

import pytest
import torch
from soundness import assert_sound
from torch import nn

import lirpa_ext
from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine
from lirpa_ext.errors import InvalidInputError, OptionError, TraceError
from lirpa_ext.methods import METHODS, register_method

Engine = engine.EngineBoundedModule


@pytest.fixture
def plain():
    """The engine's own compute_bounds, before and after."""
    lirpa_ext.unregister()
    original = Engine.compute_bounds
    yield original
    lirpa_ext.unregister()
    assert Engine.compute_bounds is original


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


@pytest.fixture
def x():
    return torch.rand(2, 1, 6, 6)


def ball(x, eps=0.3):
    """As code that knows only the engine writes it."""
    return engine.BoundedTensor(x, engine.EnginePerturbationLpNorm(norm=2, eps=eps))


def test_idempotent_and_undone(plain):
    lirpa_ext.register()
    patched = Engine.compute_bounds
    assert patched is not plain
    lirpa_ext.register()
    assert Engine.compute_bounds is patched
    lirpa_ext.unregister()
    assert Engine.compute_bounds is plain
    lirpa_ext.unregister()
    assert Engine.compute_bounds is plain
    lirpa_ext.register()
    assert Engine.compute_bounds is not plain
    assert Engine.compute_bounds.__doc__ == plain.__doc__


def test_unknown_to_the_engine_without_it(plain, model, x):
    graph = Engine(model, x, device="cpu")
    with pytest.raises(Exception):  # noqa: B017  (a bare NotImplementedError or worse)
        graph.compute_bounds(x=(ball(x),), method="bcp")


@pytest.mark.parametrize("method", METHODS)
def test_same_bounds_as_our_class(plain, model, x, method):
    lirpa_ext.register()
    graph, C = Engine(model, x, device="cpu"), torch.randn(2, 4, 3)
    ours = BoundedModule(model, x)
    expected = ours.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(0.3, 2)),), C=C, method=method)
    bounds = graph.compute_bounds(x=(ball(x),), C=C, method=method)
    torch.testing.assert_close(bounds, expected, rtol=1e-4, atol=1e-5)
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), bounds, C)
    lower, upper = graph.compute_bounds(x=(ball(x),), C=C, method=method, bound_upper=False)
    assert upper is None
    torch.testing.assert_close(lower, bounds[0])
    positional = graph.compute_bounds((ball(x),), None, C, method)
    torch.testing.assert_close(positional, bounds)


def test_options_and_their_errors(plain, model, x):
    lirpa_ext.register()
    graph = Engine(model, x, device="cpu")
    loose = graph.compute_bounds(x=(ball(x),), method="bcp", tighten=False)
    tight = graph.compute_bounds(x=(ball(x),), method="bcp")
    assert (tight[0] >= loose[0] - 1e-6).all()
    with pytest.raises(OptionError, match="no option 'tight'"):
        graph.compute_bounds(x=(ball(x),), method="bcp", tight=True)
    with pytest.raises(OptionError, match="needs x"):
        graph.compute_bounds(method="bcp")
    with pytest.raises(InvalidInputError, match="NaN"):
        graph.compute_bounds(x=(ball(x * torch.nan),), method="bcp")


def test_per_sample_eps_and_range(plain, model, x):
    lirpa_ext.register()
    graph, eps = Engine(model, x, device="cpu"), torch.tensor([0.1, 0.6])
    perturbation = PerturbationLpNorm(eps, 2, x_L=0.0, x_U=1.0)
    bounds = graph.compute_bounds(x=(BoundedTensor(x, perturbation),), method="bcp")
    assert_sound(model, x, perturbation, bounds)
    assert (bounds[1] - bounds[0])[0].max() < (bounds[1] - bounds[0])[1].min()


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
def test_the_engines_own_methods_stay(plain, model, x, method):
    expected = Engine(model, x, device="cpu").compute_bounds(x=(ball(x),), method=method)
    lirpa_ext.register()
    bounds = Engine(model, x, device="cpu").compute_bounds(x=(ball(x),), method=method)
    torch.testing.assert_close(bounds, expected)


def test_our_class_is_not_changed_by_it(plain, model, x):
    bounded = BoundedTensor(x, PerturbationLpNorm(0.3, 2))
    expected = BoundedModule(model, x).compute_bounds(x=(bounded,), method="bcp")
    lirpa_ext.register()
    graph = BoundedModule(model, x)
    for method in ("bcp", "CROWN"):
        bounds = graph.compute_bounds(x=(bounded,), method=method)
        assert_sound(model, x, PerturbationLpNorm(0.3, 2), bounds)
    torch.testing.assert_close(graph.compute_bounds(x=(bounded,), method="bcp"), expected)


def test_a_users_method_works_there_too(plain, model, x):
    register_method("register-test", lambda problem: (problem.C, None))
    try:
        lirpa_ext.register()
        C = torch.randn(2, 1, 3)
        lower, upper = Engine(model, x, device="cpu").compute_bounds(x=(ball(x),), C=C, method="register-test")
        assert lower is C
        assert upper is None
    finally:
        del METHODS["register-test"]


def test_graph_built_before_registering(plain, model, x):
    graph = Engine(model, x, device="cpu")
    graph.compute_bounds(x=(ball(x),), method="IBP")
    lirpa_ext.register()
    bounds = graph.compute_bounds(x=(ball(x),), method="bcp")
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), bounds)
    again = graph.compute_bounds(x=(ball(x),), method="IBP")
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), again)


def test_normalization_first_is_sound_there_for_our_methods(plain):
    """The engine's hole is in its intervals; the ball-box methods do not use those of the input."""

    class Normalize(nn.Module):
        def forward(self, x):
            return (x - 0.3) / 0.25

    torch.manual_seed(0)
    model, x = nn.Sequential(Normalize(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(2, 6)
    lirpa_ext.register()
    graph = Engine(model, x, device="cpu")
    for method in METHODS:
        bounds = graph.compute_bounds(x=(ball(x, 0.5),), method=method)
        assert_sound(model, x, PerturbationLpNorm(0.5, 2), bounds)


@pytest.mark.parametrize("method", ["bcp", "slope:crown"])
@pytest.mark.parametrize("pool", [nn.AvgPool2d, nn.MaxPool2d], ids=["average", "maximum"])
def test_a_graph_that_lost_an_option_of_a_layer_is_refused(plain, pool, method):
    """The engine drops ceil_mode, or refuses it when it builds the graph."""
    lirpa_ext.register()
    x = torch.rand(2, 1, 5, 5)
    try:
        graph = Engine(nn.Sequential(pool(2, 2, ceil_mode=True), nn.Flatten()), x)
    except Exception:
        pytest.skip("this engine refuses it itself")
    with pytest.raises(TraceError, match=r"outputs of shape \(2, 4\), and the model of \(2, 9\)"):
        graph.compute_bounds(x=(ball(x),), method=method)


POOLS = {
    "a border that is not counted": nn.AvgPool2d(2, 1, (0, 1), count_include_pad=False),
    "a divisor": nn.AvgPool2d(2, divisor_override=3),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("method", ["bcp", "bcp-crown", "slope:crown"])
def test_a_graph_that_is_not_its_model_is_refused(plain, name, method):
    """The engine drops options of layers that leave the shape as it is, or refuses them when it builds the graph."""
    lirpa_ext.register()
    x = torch.rand(2, 1, 4, 4)
    try:
        graph = Engine(nn.Sequential(POOLS[name], nn.Flatten()).eval(), x)
    except Exception:
        pytest.skip("this engine refuses it itself")
    found, model = None, nn.Sequential(POOLS[name], nn.Flatten()).eval()
    try:
        found = graph.compute_bounds(x=(ball(x),), method=method)
    except TraceError as error:
        assert "computes something else than the model" in str(error)
    if found is not None:
        assert_sound(model, x, PerturbationLpNorm(0.3, 2), found)


def test_a_graph_built_while_registered_is_the_engines(plain, model, x):
    lirpa_ext.register()
    graph = Engine(model, x)
    lirpa_ext.unregister()
    assert "__init__" in vars(Engine) and Engine.__init__.__qualname__ == "BoundedModule.__init__"
    torch.testing.assert_close(graph(x), model(x))
