"""The custom operators of the graph: their names, what they compute, and parametrized layers."""

from __future__ import annotations

import pytest
import torch
from soundness import assert_contains, assert_sound, extremes
from torch import nn
from torch.nn.utils import parametrizations

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine, worst_case_logits
from lirpa_ext.domain.ball_box import BallBox
from lirpa_ext.nodes.operators import BoundBallBoxLinear, BoundBallBoxRelu, BoundPowerIteration, relu_backward

EPS = 0.4


def ball(x, eps=EPS):
    return BoundedTensor(x, PerturbationLpNorm(eps, 2))


def nodes(graph, kind):
    return [node for node in graph._modules.values() if type(node).__name__ == kind]


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).double()


@pytest.fixture
def x():
    return torch.rand(2, 6, dtype=torch.float64)


# --- in the graph ------------------------------------------------------------------------------------------------


def test_they_are_in_the_graph_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = BoundedModule(model, torch.rand(1, 1, 4, 4))
    counts = {"BoundPerturbedInput": 1, "BoundBallBoxRelu": 2, "BoundBallBoxLinear": 2, "BoundPowerIteration": 3}
    for kind, count in counts.items():
        assert len(nodes(graph, kind)) == count, kind
    assert not nodes(graph, "BoundRelu")
    assert not nodes(graph, "BoundLinear")
    hung = {name for name in graph._modules if name.startswith("power_iteration/")}
    assert hung == {f"power_iteration/{name}.weight" for name in ("0", "3", "5")}


def test_users_custom_ops_come_on_top(x):
    class Mine(engine.BoundRelu):
        pass

    graph = BoundedModule(two_layers(), x, custom_ops={"onnx::Relu": Mine})
    assert len(nodes(graph, "Mine")) == 1
    bounds = graph.compute_bounds(x=(ball(x),), method="IBP")
    assert_sound(graph.source, x, PerturbationLpNorm(EPS, 2), bounds)
    bounds = graph.compute_bounds(x=(ball(x),), method="bcp")  # by the engine's interval rule
    assert_sound(graph.source, x, PerturbationLpNorm(EPS, 2), bounds)
    assert "Mine" in graph.last_result.fallbacks.values()


@pytest.mark.parametrize("how", ["custom_ops", "register_custom_op"])
def test_they_work_in_the_engines_own_class(x, how):
    """Without a ball or slopes they are the engine's own nodes."""
    model, given = two_layers(), {"onnx::Relu": BoundBallBoxRelu, "onnx::Gemm": BoundBallBoxLinear}
    theirs = engine.EngineBoundedModule(model, x, device="cpu")
    if how == "custom_ops":
        graph = engine.EngineBoundedModule(model, x, device="cpu", custom_ops=given)
    else:
        for op, kind in given.items():
            engine.register_custom_op(op, kind)
        try:
            graph = engine.EngineBoundedModule(model, x, device="cpu")
        finally:
            for op, kind in {"onnx::Relu": engine.BoundRelu, "onnx::Gemm": engine.BoundLinear}.items():
                engine.register_custom_op(op, kind)  # unregistering forgets the engine's own class, too
    assert len(nodes(graph, "BoundBallBoxRelu")) == 1
    assert len(nodes(graph, "BoundBallBoxLinear")) == 2
    engine.learn_relu(graph, BoundBallBoxRelu)
    perturbed = engine.BoundedTensor(x, engine.EnginePerturbationLpNorm(norm=2, eps=EPS))
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        expected = theirs.compute_bounds(x=(perturbed,), method=method)
        torch.testing.assert_close(graph.compute_bounds(x=(perturbed,), method=method), expected)
    again = engine.EngineBoundedModule(model, x, device="cpu")
    assert not nodes(again, "BoundBallBoxRelu")


# --- ball-box ReLU -----------------------------------------------------------------------------------------------


def _by_hand(model, x, slope, rows):
    """CROWN-IBP of a two-layer net with given lower slopes, in the l2 ball: (lower, upper) of rows @ f."""
    W, b, V, c = model[0].weight, model[0].bias, model[2].weight, model[2].bias
    center = x @ W.t() + b
    low, high = center - EPS * W.norm(dim=1), center + EPS * W.norm(dim=1)
    line = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low))).unsqueeze(1)
    shift = torch.where((low < 0) & (high > 0), -low * line.squeeze(1), 0.0).unsqueeze(1)
    slope = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, slope)).unsqueeze(1)

    def minimum(rows):
        a = rows @ V
        lam = torch.where(a >= 0, a * slope, a * line)
        constant = (a.clamp(max=0) * shift).sum(2) + rows @ c + lam @ b
        M = lam @ W
        return torch.einsum("bsn,bn->bs", M, x) - EPS * M.norm(dim=2) + constant

    return minimum(rows), -minimum(-rows)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, "random"])
def test_explicit_slopes_are_those_of_crown_by_hand(x, value):
    """Bounds and gradients in the slopes and weights, against the formula."""
    model = two_layers()
    rows = torch.randn(2, 4, 3, dtype=torch.float64)
    slope = torch.rand(2, 20, dtype=torch.float64) if value == "random" else torch.full((2, 20), value).double()
    slope.requires_grad_()
    graph = BoundedModule(model, x)
    (relu,) = nodes(graph, "BoundBallBoxRelu")
    default = graph.compute_bounds(x=(ball(x),), C=rows, method="CROWN-IBP")
    relu.slope = slope
    bounds = graph.compute_bounds(x=(ball(x),), C=rows, method="CROWN-IBP")
    expected = _by_hand(model, x, slope, rows)
    torch.testing.assert_close(bounds, expected)
    assert not torch.allclose(bounds[0], default[0])
    inputs = [slope, *model.parameters()]
    got = torch.autograd.grad((bounds[1] - 2 * bounds[0]).sum(), inputs)
    wanted = torch.autograd.grad((expected[1] - 2 * expected[0]).sum(), inputs)
    torch.testing.assert_close(got, wanted)
    assert_sound(model, x, PerturbationLpNorm(EPS, 2), bounds, rows)
    relu.slope = None
    torch.testing.assert_close(graph.compute_bounds(x=(ball(x),), C=rows, method="CROWN-IBP"), default)


def test_relu_with_a_ball_is_tighter_in_the_engines_own_backward_pass():
    """`ball` on the node: CROWN through the engine, with the ball's help."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 3)).double()
    x = torch.rand(2, 6, dtype=torch.float64)
    graph = BoundedModule(model, x)
    (relu,) = nodes(graph, "BoundBallBoxRelu")
    found = extremes(model, x, PerturbationLpNorm(EPS, 2))
    without = graph.compute_bounds(x=(ball(x),), method="CROWN-IBP")
    weight = model[0].weight.detach()
    center = model[0](x).detach()
    radius = torch.full((2,), EPS * float(torch.linalg.matrix_norm(weight, 2)), dtype=torch.float64)
    reach = EPS * weight.norm(dim=1)
    relu.ball = BallBox(center, radius, center - reach, center + reach)
    bounds = graph.compute_bounds(x=(ball(x),), method="CROWN-IBP")
    assert_contains(bounds, found)
    assert (bounds[0] >= without[0] - 1e-9).all()
    assert (bounds[1] <= without[1] + 1e-9).all()
    assert (bounds[0] > without[0] + 1e-3).any()


def test_relu_backward_is_a_bound_at_points_of_its_set():
    """a.relu(v) >= lam.v + bias for v in ball INTERSECT box, for slopes of any kind."""
    center = torch.randn(3, 7, dtype=torch.float64)
    lower, upper = center - torch.rand_like(center), center + torch.rand_like(center)
    radius = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    rows = torch.randn(4, 3, 7, dtype=torch.float64)
    shift = nn.functional.normalize(torch.randn(2000, 3, 7, dtype=torch.float64), dim=-1) * radius.view(3, 1)
    points = torch.minimum(torch.maximum(center + shift, lower), upper)
    for slope in (None, torch.rand(3, 7, dtype=torch.float64), torch.rand(4, 3, 7, dtype=torch.float64)):
        lam, bias = relu_backward(rows, BallBox(center, radius, lower, upper), slope)
        assert lam.shape == rows.shape
        assert bias.shape == (4, 3)
        value = torch.einsum("sbn,kbn->ksb", rows, points.relu()) - torch.einsum("sbn,kbn->ksb", lam, points)
        assert (value >= bias - 1e-9).all()
        exact = (rows * center.relu()).sum(2) - (lam * center).sum(2)
        torch.testing.assert_close(bias[:, 0], exact[:, 0])  # radius 0


# --- ball-box linear layer ---------------------------------------------------------------------------------------


def test_linear_with_a_ball_is_tighter_and_sound():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 300), nn.ReLU(), nn.Linear(300, 3)).double()
    x = torch.rand(2, 60, dtype=torch.float64)
    graph = BoundedModule(model, x)
    last = graph.final_node()
    assert type(last).__name__ == "BoundBallBoxLinear"
    without = graph.compute_bounds(x=(ball(x),), method="IBP")
    norm = float(torch.linalg.matrix_norm(model[0].weight.detach(), 2))
    last.ball = BallBox(model[1](model[0](x)).detach(), torch.full((2,), EPS * norm, dtype=torch.float64))
    bounds = graph.compute_bounds(x=(ball(x),), method="IBP")
    assert_sound(model, x, PerturbationLpNorm(EPS, 2), bounds)
    assert (bounds[0] >= without[0] - 1e-12).all()
    assert (bounds[1] <= without[1] + 1e-12).all()
    assert (bounds[1] - bounds[0]).sum() < 0.9 * (without[1] - without[0]).sum()
    reach = model[2].weight.norm(dim=1) * EPS * norm
    assert (bounds[1] <= model(x) + reach + 1e-9).all()
    last.ball = None
    torch.testing.assert_close(graph.compute_bounds(x=(ball(x),), method="IBP"), without)


def test_linear_with_a_ball_is_exact_at_a_ball(x):
    """W x' + b over the ball around x reaches +- eps ||W_i||_2, from a box around the ball that is much larger."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), nn.Linear(6, 3)).double()
    graph = BoundedModule(model, x)
    last = graph.final_node()
    last.ball = BallBox(torch.tanh(x), torch.full((2,), 0.1, dtype=x.dtype))
    lower, upper = graph.compute_bounds(x=(ball(x, 5.0),), method="IBP")
    reach = 0.1 * model[1].weight.norm(dim=1)
    torch.testing.assert_close(lower, model(x) - reach)
    torch.testing.assert_close(upper, model(x) + reach)


# --- power iteration node ----------------------------------------------------------------------------------------


def test_power_iteration_node_gives_the_estimate(x):
    model = two_layers()
    graph = BoundedModule(model, x)
    for node, layer in zip(nodes(graph, "BoundPowerIteration"), (model[0], model[2]), strict=True):
        assert isinstance(node, BoundPowerIteration)
        (weight,) = node.inputs
        assert weight.ori_name in node.name
        iteration = graph.power_iterations[weight.ori_name]
        assert node.iteration is iteration
        first = node.forward(layer.weight)
        assert torch.equal(first, node.forward(layer.weight)), "forward moved the iteration"
        u = iteration.u[0]
        torch.testing.assert_close(first, (layer.weight @ u).norm())
        true = torch.linalg.matrix_norm(layer.weight, 2)
        assert first <= true + 1e-12
        iteration.converge(node.build_map(layer.weight.detach()), 1e-12, 5000)
        torch.testing.assert_close(node.forward(layer.weight), true)
        (gradient,) = torch.autograd.grad(node.forward(layer.weight), layer.weight)
        left, _, right = torch.linalg.svd(layer.weight.detach())
        torch.testing.assert_close(gradient, torch.outer(left[:, 0], right[0]), rtol=1e-4, atol=1e-4)


# --- parametrized layers -----------------------------------------------------------------------------------------


def spectral():
    torch.manual_seed(0)
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(1, 4, 3, 2, 1)), nn.ReLU(), nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(36, 8)), nn.ReLU(), nn.Linear(8, 3),
    ).double()  # fmt: skip


def weighted():
    torch.manual_seed(0)
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(1, 4, 3, 2, 1)), nn.ReLU(), nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(36, 8)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 3)),
    ).double()  # fmt: skip


PARAMETRIZED = pytest.mark.parametrize("make", [spectral, weighted])


@PARAMETRIZED
@pytest.mark.parametrize("method", ["lipschitz", "bcp", "bcp-crown", "bcp-alpha-crown", "IBP", "CROWN-IBP", "CROWN"])
def test_parametrized_layers_are_bounded_soundly(make, method):
    model, x = make().eval(), torch.rand(2, 1, 6, 6, dtype=torch.float64)
    graph = BoundedModule(model, x)
    assert torch.nn.utils.parametrize.is_parametrized(model[0]), "the user's model was changed"
    torch.testing.assert_close(graph(x), model(x))
    bounds = graph.compute_bounds(x=(ball(x),), method=method)
    assert_sound(model, x, PerturbationLpNorm(EPS, 2), bounds)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    bounds = graph.compute_bounds(x=(ball(x),), method=method)
    assert_sound(model, x, PerturbationLpNorm(EPS, 2), bounds)
    fresh = BoundedModule(model, x).compute_bounds(x=(ball(x),), method=method)
    torch.testing.assert_close(bounds, fresh)


@PARAMETRIZED
@pytest.mark.parametrize(("method", "norms"), [("bcp", "estimate"), ("bcp", "bound"), ("bcp-crown", "estimate")])
def test_parametrized_layers_are_trained(make, method, norms):
    """Every original parameter gets a gradient, and a few steps reduce the loss."""
    model, x, y = make().train(), torch.rand(8, 1, 6, 6, dtype=torch.float64), torch.arange(8) % 3
    graph = BoundedModule(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, start = [], {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(12):
        worst = worst_case_logits(graph, x, y, 0.1, method=method, norms=norms)
        loss = nn.functional.cross_entropy(worst, y)
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()
    assert losses[-1] < losses[0] - 0.005, losses
    moved = {name: not torch.equal(parameter, start[name]) for name, parameter in model.named_parameters()}
    assert all(moved.values()), moved
    model.eval()
    bounds = graph.compute_bounds(x=(ball(x, 0.1),), method="bcp")
    assert_sound(model, x, PerturbationLpNorm(0.1, 2), bounds)


@PARAMETRIZED
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_building_leaves_buffers_of_parametrizations(make, training):
    """spectral_norm's own power iteration moves whenever its weight is read in training mode; not by us."""
    model, x = make().train(training), torch.rand(2, 1, 6, 6, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = BoundedModule(model, x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} after building"
    graph.compute_bounds(x=(ball(x),), method="bcp")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} after a call"
