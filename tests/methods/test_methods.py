"""Methods through compute_bounds: names, options, sides, shapes, batches, the registry, and bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from soundness import assert_sound
from torch import nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine
from lirpa_ext.errors import (
    InvalidInputError,
    OptionError,
    RegistrationError,
    TraceError,
    TrainModeError,
    UnknownMethodError,
)
from lirpa_ext.methods import METHODS, base, bcp, bcp_crown, register_method

OURS = ("lipschitz", "bcp", "bcp-crown", "bcp-alpha-crown")
LISTED = (*OURS, "IBP", "CROWN-IBP", "CROWN")


def ball(x, eps=0.3, norm=2, **data_range):
    return BoundedTensor(x, PerturbationLpNorm(eps, norm, **data_range))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()


def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    ).double()


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def x():
    return torch.rand(4, 5, dtype=torch.float64)


@pytest.fixture
def registry(monkeypatch):
    """A copy of the table, so that a test's methods go with it."""
    table = dict(METHODS)
    monkeypatch.setattr(base, "METHODS", table)
    return table


# --- names and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nonsense", "bcp_crown", "", "CROWN-optimised"])
def test_unknown_method_is_raised_before_any_work(model, x, name, monkeypatch):
    graph = BoundedModule(model, x)

    def work(*args, **kwargs):
        raise AssertionError("some work was done")

    monkeypatch.setattr(engine, "set_input", work)
    monkeypatch.setattr(graph.__class__, "_set_inputs", work)
    with pytest.raises(UnknownMethodError, match="unknown method") as caught:
        graph.compute_bounds(x=(ball(x),), method=name)
    for known in (*OURS, "crown", "alpha-crown", "ibp"):
        assert known in str(caught.value)


@pytest.mark.parametrize("method", OURS)
def test_unknown_option_is_raised_before_any_work(model, x, method, monkeypatch):
    graph = BoundedModule(model, x)
    monkeypatch.setattr(graph.__class__, "_set_inputs", lambda *_: pytest.fail("some work was done"))
    with pytest.raises(OptionError, match=f"'{method}' has no option 'stepz'; its options are .*norms"):
        graph.compute_bounds(x=(ball(x),), method=method, stepz=3)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bcp", {"norms": "exact"}), ("lipschitz", {"norms": True}), ("bcp-crown", {"norms": None}),
        ("bcp-alpha-crown", {"steps": -1}), ("bcp-alpha-crown", {"step_size": 0.0}),
        ("bcp-alpha-crown", {"step_size": -0.1}), ("bcp-alpha-crown", {"step_size": math.nan}),
        ("bcp", {"solver": "newton"}), ("bcp", {"max_steps": -2}),
    ],
)  # fmt: skip
def test_bad_option_values_are_ours_to_name(model, x, method, options):
    with pytest.raises((OptionError, InvalidInputError), match=next(iter(options)).split("_")[0]):
        BoundedModule(model, x).compute_bounds(x=(ball(x),), method=method, **options)


def test_options_go_by_name(model, x):
    with pytest.raises(OptionError, match="by name"):
        BoundedModule(model, x).compute_bounds((ball(x),), None, None, "bcp", True)


def test_method_names_ignore_case(model, x):
    graph = BoundedModule(model, x)
    lower = graph.compute_bounds(x=(ball(x),), method="bcp-crown")[0]
    assert torch.equal(graph.compute_bounds(x=(ball(x),), method="BCP-CROWN")[0], lower)


# --- sides, rows, shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LISTED)
@pytest.mark.parametrize("make", [mlp, conv], ids=["mlp", "conv"])
def test_both_sides_are_sound_and_single_sides_equal_them(make, method):
    model = make()
    x = torch.rand(3, 5, dtype=torch.float64) if make is mlp else torch.rand(3, 1, 6, 6, dtype=torch.float64)
    C = torch.randn(3, 4, 3, dtype=torch.float64)
    graph = BoundedModule(model, x)
    for rows in (None, C):
        bounds = graph.compute_bounds(x=(ball(x),), C=rows, method=method)
        assert bounds[0].shape == bounds[1].shape == ((3, 3) if rows is None else (3, 4))
        assert_sound(model, x, PerturbationLpNorm(0.3, 2), bounds, rows)
        lower, nothing = graph.compute_bounds(x=(ball(x),), C=rows, method=method, bound_upper=False)
        assert nothing is None or method not in OURS
        torch.testing.assert_close(lower, bounds[0])
        nothing, upper = graph.compute_bounds(x=(ball(x),), C=rows, method=method, bound_lower=False)
        assert nothing is None or method not in OURS
        torch.testing.assert_close(upper, bounds[1])


@pytest.mark.parametrize(
    ("method", "solver", "where"),
    [
        ("lipschitz", "merged_min", bcp), ("bcp", "merged_min", bcp), ("bcp-crown", "last_step", bcp_crown),
        ("bcp-alpha-crown", "_best_of_fixed", bcp_crown),
    ],
)  # fmt: skip
def test_only_the_asked_side_is_solved(model, x, method, solver, where, monkeypatch):
    graph, calls, real = BoundedModule(model, x), [], getattr(where, solver)
    monkeypatch.setattr(where, solver, lambda *args, **options: calls.append(1) or real(*args, **options))
    for sides, solved in (({"bound_upper": False}, 1), ({"bound_lower": False}, 1), ({}, 2)):
        calls.clear()
        graph.compute_bounds(x=(ball(x),), method=method, **sides)
        assert len(calls) == solved, sides


@pytest.mark.parametrize("method", OURS)
def test_no_side_at_all_is_an_error(model, x, method):
    with pytest.raises(OptionError, match="at least one of"):
        BoundedModule(model, x).compute_bounds(x=(ball(x),), method=method, bound_lower=False, bound_upper=False)


@pytest.mark.parametrize("method", OURS)
def test_identity_rows_equal_no_rows(model, x, method):
    graph, eye = BoundedModule(model, x), torch.eye(3, dtype=x.dtype)
    options = {"early_stop": False, "steps": 3} if method == "bcp-alpha-crown" else {}
    plain = graph.compute_bounds(x=(ball(x),), method=method, **options)
    for C in (eye.expand(4, 3, 3), eye.unsqueeze(0)):
        rows = graph.compute_bounds(x=(ball(x),), C=C, method=method, **options)
        torch.testing.assert_close(rows, plain)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("shape", [(4, 2, 4), (3, 2, 3), (2, 3), (4, 3), (4, 2, 3, 1)], ids=str)
def test_rows_of_a_wrong_shape(model, x, method, shape):
    with pytest.raises(InvalidInputError, match=r"C has shape .* must be \(4, rows, 3\)"):
        BoundedModule(model, x).compute_bounds(x=(ball(x),), C=torch.ones(shape, dtype=x.dtype), method=method)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite(model, x, bad):
    C = torch.ones(4, 2, 3, dtype=x.dtype)
    C[1, 1, 1] = bad
    with pytest.raises(InvalidInputError, match="C has NaN or infinite"):
        BoundedModule(model, x).compute_bounds(x=(ball(x),), C=C, method="bcp")


def test_rows_of_another_dtype(model, x):
    with pytest.raises(InvalidInputError, match=r"C is torch\.float32"):
        BoundedModule(model, x).compute_bounds(x=(ball(x),), C=torch.ones(4, 2, 3), method="bcp")


@pytest.mark.parametrize("method", OURS)
def test_outputs_that_are_images_keep_their_shape(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, 1, 1)).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    bounds = BoundedModule(model, x).compute_bounds(x=(ball(x),), method=method)
    assert bounds[0].shape == bounds[1].shape == (2, 2, 4, 4)
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), bounds)


def test_many_outputs_go_without_an_identity():
    """Above 1,024 outputs the box of the output is returned; it is sound, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1100)).double()
    x = torch.rand(2, 5, dtype=torch.float64)
    bounds = BoundedModule(model, x).compute_bounds(x=(ball(x),), method="bcp")
    assert bounds[0].shape == (2, 1100)
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), bounds, steps=0)


@pytest.mark.parametrize("method", LISTED)
def test_radius_zero_is_the_forward_pass(model, x, method):
    lower, upper = BoundedModule(model, x).compute_bounds(x=(ball(x, 0.0),), method=method)
    torch.testing.assert_close(lower, model(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(upper, model(x), rtol=0, atol=1e-9)


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LISTED)
def test_eps_per_sample_equals_a_loop(model, x, method):
    """Up to the search: IBP reads the ball for one eps only, the ascent steps by the mean over the batch."""
    eps = torch.tensor([0.0, 0.1, 0.4, 1.3], dtype=torch.float64)
    graph = BoundedModule(model, x)
    options = {"steps": 0} if method == "bcp-alpha-crown" else {}
    together = graph.compute_bounds(x=(ball(x, eps),), method=method, **options)
    for i in range(4):
        alone = graph.compute_bounds(x=(ball(x[i : i + 1], float(eps[i])),), method=method, **options)
        if method in ("IBP", "CROWN-IBP"):
            assert (together[0][i] <= alone[0] + 1e-9).all()
            assert (together[1][i] >= alone[1] - 1e-9).all()
            continue
        for side in range(2):
            torch.testing.assert_close(together[side][i : i + 1], alone[side], rtol=1e-6, atol=1e-9)
    assert_sound(model, x, PerturbationLpNorm(eps, 2), together)


class Viewed(nn.Module):
    """The reshape whose batch size auto_LiRPA 0.3 fixes when it traces."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, 1, 1), nn.Linear(48, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).view(x.size(0), -1))


@pytest.mark.parametrize("method", LISTED)
def test_changing_batch_sizes_equal_fresh_modules(method):
    torch.manual_seed(0)
    model, images = Viewed().double(), torch.rand(5, 1, 4, 4, dtype=torch.float64)
    graph = BoundedModule(model, images[:2])
    for size in (2, 5, 1, 2):
        some = images[:size]
        C = torch.randn(size, 2, 3, dtype=torch.float64)
        bounds = graph.compute_bounds(x=(ball(some),), C=C, method=method)
        fresh = BoundedModule(model, some).compute_bounds(x=(ball(some),), C=C, method=method)
        torch.testing.assert_close(bounds, fresh, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(graph(some), model(some))


@pytest.mark.parametrize("method", LISTED)
def test_no_input_means_the_last_one_or_that_of_the_build(model, x, method):
    graph = BoundedModule(model, ball(x))
    built = graph.compute_bounds(method=method)
    torch.testing.assert_close(built, graph.compute_bounds(x=(ball(x),), method=method))
    other = ball(x[:2] + 1, 0.7)
    last = graph.compute_bounds(x=(other,), method=method)
    torch.testing.assert_close(graph.compute_bounds(x=None, method=method), last)
    assert not torch.allclose(built[0][:2], last[0])


def test_no_perturbed_input_is_an_error(model, x):
    graph = BoundedModule(model, x)
    for inputs in (None, (x,)):
        with pytest.raises(InvalidInputError, match="no input is perturbed"):
            graph.compute_bounds(x=inputs, method="bcp")


@pytest.mark.parametrize("method", LISTED)
def test_a_new_weight_is_seen_without_a_new_graph(model, x, method):
    graph = BoundedModule(model, x)
    before = graph.compute_bounds(x=(ball(x),), method=method)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
        model[4].bias.add_(1)
        model[2].weight.data = torch.randn_like(model[2].weight)
    after = graph.compute_bounds(method=method)
    torch.testing.assert_close(after, BoundedModule(model, x).compute_bounds(x=(ball(x),), method=method))
    assert not torch.allclose(before[0], after[0])
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), after)


@pytest.mark.parametrize("norms", ["bound", "estimate"])
@pytest.mark.parametrize("method", ["lipschitz", "bcp", "bcp-crown"])
@pytest.mark.parametrize("make", [mlp, conv], ids=["mlp", "conv"])
def test_every_parameter_gets_its_gradient(make, method, norms):
    """Against a central difference along a random direction; bcp-crown's multipliers are not quite the best."""
    model = make()
    x = torch.rand(2, *((5,) if make is mlp else (1, 6, 6)), dtype=torch.float64)
    graph = BoundedModule(model, x)
    rows = torch.randn(2, 4, 3, dtype=torch.float64)
    for iteration in graph.power_iterations.values():
        iteration.u.normal_()
    graph.eval()
    if norms == "estimate":  # at the singular vector the estimate's gradient is that of the norm
        for node in graph._modules.values():
            if hasattr(node, "build_map"):
                node.iteration.converge(node.build_map(node.inputs[0].live.detach()), 1e-14, 20000)

    def total():
        lower, upper = graph.compute_bounds(x=(ball(x, 0.2),), C=rows, method=method, norms=norms)
        return (upper - lower).sum() + lower.square().sum()

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(total(), parameters)
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in gradients)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            values.append(total())
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=sign * step)
    rtol = 2e-2 if "crown" in method else 2e-4
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=rtol, atol=1e-4)


# --- how the methods compare -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [2, math.inf, 3.0], ids=str)
@pytest.mark.parametrize("make", [mlp, conv], ids=["mlp", "conv"])
def test_order_of_the_methods(make, norm):
    """bcp is no looser than lipschitz, bcp-crown than bcp, bcp-alpha-crown than bcp-crown."""
    model = make()
    x = torch.rand(3, *((5,) if make is mlp else (1, 6, 6)), dtype=torch.float64)
    graph, eps = BoundedModule(model, x), 0.3 if norm == 2 else 0.05
    rows = torch.randn(3, 5, 3, dtype=torch.float64)
    results = {}
    for method in OURS:
        results[method] = graph.compute_bounds(x=(ball(x, eps, norm),), C=rows, method=method)
        assert_sound(model, x, PerturbationLpNorm(eps, norm), results[method], rows)
    for looser, tighter in itertools.pairwise(OURS):
        assert (results[tighter][0] >= results[looser][0] - 1e-9).all(), (looser, tighter)
        assert (results[tighter][1] <= results[looser][1] + 1e-9).all(), (looser, tighter)
    assert (results["bcp-crown"][0] > results["bcp"][0] + 1e-6).any()


class Shortcut(nn.Module):
    """A residual block of the inner layer."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return (x + self.inner(x)).relu()


RELU_NETWORKS = {
    "dense": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(36, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 3)),
    ),
    "convolutions": lambda: nn.Sequential(
        *(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(4, 3)),
    ),
    "residual": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), Shortcut(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))),
        *(Shortcut(nn.Linear(20, 20)), nn.Linear(20, 3)),
    ),
}


@pytest.mark.parametrize("norm", [2, math.inf, 1], ids=str)
@pytest.mark.parametrize("name", RELU_NETWORKS)
def test_bcp_crown_is_no_looser_than_crown_on_the_same_boxes(name, norm):
    """The engine's CROWN, given BCP's boxes of the ReLUs' inputs as intermediate bounds."""
    torch.manual_seed(0)
    model = RELU_NETWORKS[name]().double().eval()
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    graph, rows = BoundedModule(model, x), torch.randn(4, 5, 3, dtype=torch.float64)
    eps = 0.02 if norm == math.inf else 0.3
    boxes = {}

    def remember(problem):
        states = problem.propagate(problem.context(), keep=True)
        for node in engine.ancestors_in_order(problem.final):
            if type(node).__name__ == "BoundBallBoxRelu":
                boxes[node.inputs[0].name] = states[node.inputs[0].name].box()
        return problem.both_sides(lambda C, sign: torch.full((4, 5), -math.inf))

    METHODS["remember"] = remember
    try:
        graph.compute_bounds(x=(ball(x, eps, norm),), C=rows, method="remember")
    finally:
        del METHODS["remember"]
    assert len(boxes) >= 2
    given = {"intermediate_layer_bounds" if engine.IS_LEGACY else "interm_bounds": boxes}
    crown = graph.compute_bounds(x=(ball(x, eps, norm),), C=rows, method="CROWN", **given)
    ours = graph.compute_bounds(x=(ball(x, eps, norm),), C=rows, method="bcp-crown")
    assert (ours[0] >= crown[0] - 1e-9).all()
    assert (ours[1] <= crown[1] + 1e-9).all()
    assert norm == math.inf or (ours[0] > crown[0] + 1e-6).any()


def test_no_steps_of_ascent(model, x):
    graph = BoundedModule(model, x)
    fixed = graph.compute_bounds(x=(ball(x),), method="bcp-crown")
    none = graph.compute_bounds(x=(ball(x),), method="bcp-alpha-crown", steps=0, early_stop=False)
    some = graph.compute_bounds(x=(ball(x),), method="bcp-alpha-crown", steps=30, early_stop=False)
    assert (none[0] >= fixed[0] - 1e-12).all()
    assert (some[0] >= none[0] - 1e-12).all()
    assert (some[0] > none[0] + 1e-6).any()
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), some)


def test_early_stop_leaves_decided_rows_alone(model, x, monkeypatch):
    """Rows already positive, and rows whose clean value is not, equal bcp-crown's; the others are ascended."""
    graph = BoundedModule(model, x)
    rows = torch.randn(4, 40, 3, dtype=torch.float64)
    rows = rows - 0.3 * rows.mean()
    clean = torch.einsum("bso,bo->bs", rows, model(x))
    fixed = graph.compute_bounds(x=(ball(x, 0.4),), C=rows, method="bcp-crown", bound_upper=False)[0]
    taken, real = [], bcp_crown._ascend
    monkeypatch.setattr(bcp_crown, "_ascend", lambda *args: taken.append(len(args[1])) or real(*args))
    early = graph.compute_bounds(x=(ball(x, 0.4),), C=rows, method="bcp-alpha-crown", bound_upper=False)[0]
    undecided = (fixed <= 0) & (clean > 0)
    assert 0 < int(undecided.sum()) < undecided.numel()
    assert sum(taken) == int(undecided.sum())
    assert torch.equal(early[~undecided], fixed[~undecided])
    assert (early[undecided] > fixed[undecided] + 1e-9).any()
    full = graph.compute_bounds(
        x=(ball(x, 0.4),), C=rows, method="bcp-alpha-crown", bound_upper=False, early_stop=False
    )[0]
    assert ((full > 0) == (early > 0)).all()
    assert (full > early + 1e-9).any()


def test_solver_options_reach_the_last_step(model, x):
    """Stopped early the iterative solver is looser than the exact one, and at convergence equal."""
    graph, rows = BoundedModule(model, x), torch.randn(4, 6, 3, dtype=torch.float64)

    def lower(**options):
        return graph.compute_bounds(x=(ball(x, 0.5),), C=rows, method="bcp", bound_upper=False, **options)[0]

    exact = lower()
    torch.testing.assert_close(lower(solver="exact"), exact, rtol=0, atol=0)
    torch.testing.assert_close(lower(solver="iterative"), exact)
    for solver in ("exact", "iterative"):
        stopped = lower(solver=solver, max_steps=0)
        assert (stopped <= exact + 1e-12).all()
        assert (stopped < exact - 1e-6).any(), solver
        assert_sound(model, x, PerturbationLpNorm(0.5, 2), (stopped, None), rows)


def test_tighten_makes_bounds_no_looser():
    model, x = conv(), torch.rand(3, 1, 6, 6, dtype=torch.float64)
    graph = BoundedModule(model, x)
    loose = graph.compute_bounds(x=(ball(x),), method="bcp", tighten=False)
    tight = graph.compute_bounds(x=(ball(x),), method="bcp", tighten=True)
    assert (tight[0] >= loose[0] - 1e-12).all()
    assert (tight[0] > loose[0] + 1e-9).any()
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), tight)


# --- the registry ------------------------------------------------------------------------------------------------


def _clean_value(problem, *, slack: float = 1.0):
    final = problem.propagate(problem.context())[problem.final.name]
    return (final.center - slack if problem.lower else None), (final.center + slack if problem.upper else None)


def test_a_users_method_is_run(model, x, registry):
    register_method("user", _clean_value)
    graph = BoundedModule(model, x)
    lower, upper = graph.compute_bounds(x=(ball(x),), method="user")
    torch.testing.assert_close((lower, upper), (model(x) - 1, model(x) + 1))
    lower, upper = graph.compute_bounds(x=(ball(x),), method="User", slack=2.0, bound_upper=False)
    torch.testing.assert_close(lower, model(x) - 2)
    assert upper is None
    with pytest.raises(OptionError, match="'user' has no option 'slak'; its options are slack"):
        graph.compute_bounds(x=(ball(x),), method="user", slak=2.0)
    with pytest.raises(UnknownMethodError, match=r"known are .*user"):
        graph.compute_bounds(x=(ball(x),), method="nobody")


def test_a_name_is_taken_once(registry):
    register_method("user", _clean_value)
    with pytest.raises(RegistrationError, match="exists already; pass overwrite=True"):
        register_method("user", _clean_value)
    with pytest.raises(RegistrationError, match="'bcp' exists already"):
        register_method("bcp", _clean_value)
    register_method("user", test_a_name_is_taken_once, overwrite=True)
    assert registry["user"] is test_a_name_is_taken_once


@pytest.mark.parametrize("name", sorted(engine.ENGINE_METHODS))
def test_the_engines_names_are_refused(registry, name):
    with pytest.raises(RegistrationError, match="is a method of the engine"):
        register_method(name, _clean_value, overwrite=True)


def test_names_are_lower_case(registry):
    with pytest.raises(RegistrationError, match="lower case"):
        register_method("User", _clean_value)


# --- two inputs --------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, a, b):
        return self.last(torch.relu(self.left(a) + self.right(b)))


class Joined(nn.Module):
    """The same as a function of one vector, for the search."""

    def __init__(self, model, b=None):
        super().__init__()
        self.model, self.b = model, b

    def forward(self, x):
        if self.b is None:
            return self.model(x[:, :4], x[:, 4:])
        return self.model(x, self.b.repeat(len(x) // len(self.b), 1))


@pytest.mark.parametrize("method", LISTED)
def test_two_inputs_one_perturbed(method):
    torch.manual_seed(0)
    model = TwoInputs().double()
    a, b = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64)
    graph = BoundedModule(model, (a, b))
    bounds = graph.compute_bounds(x=(ball(a, 0.4), b), method=method)
    assert_sound(Joined(model, b), a, PerturbationLpNorm(0.4, 2), bounds, steps=0)
    both = graph.compute_bounds(x=(ball(a, 0.4), ball(b, 0.2)), method=method)
    assert (both[0] < bounds[0] - 1e-6).any()
    assert (both[0] <= bounds[0] + 1e-9).all()


@pytest.mark.parametrize("method", LISTED)
def test_two_inputs_both_perturbed(method):
    """Each moves in a ball of its own: points of the two are drawn apart."""
    torch.manual_seed(0)
    model = TwoInputs().double()
    a, b = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64)
    graph = BoundedModule(model, (a, b))
    lower, upper = graph.compute_bounds(x=(ball(a, 0.4), ball(b, 0.2)), method=method)
    directions = torch.randn(4000, 3, 7, dtype=torch.float64)
    moved_a = a + 0.4 * nn.functional.normalize(directions[..., :4], dim=-1)
    moved_b = b + 0.2 * nn.functional.normalize(directions[..., 4:], dim=-1)
    values = model(moved_a.flatten(0, 1), moved_b.flatten(0, 1)).view(4000, 3, 2)
    assert (values >= lower - 1e-9).all()
    assert (values <= upper + 1e-9).all()


# --- bad input ---------------------------------------------------------------------------------------------------


class Hinge(nn.Module):
    def forward(self, x):
        return (2 * x - 1).relu() + x.abs()


@pytest.mark.parametrize("norm", [1, 2, 3, math.inf], ids=str)
def test_inputs_of_one_number_a_sample(norm):
    """Inputs of shape (B,), without an axis of features, by every method; the identity among the networks."""
    x = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    for model in (nn.Identity(), Hinge()):
        graph = BoundedModule(model, x)
        for method in (*LISTED, "alpha-CROWN", "slope:ibp", "slope:crown", "cap"):
            bounds = graph.compute_bounds(x=(ball(x, 0.1, norm),), method=method)
            assert bounds[0].shape == bounds[1].shape == (3,)
            for share in (-1, -0.5, 0, 0.5, 1):
                value = model(x + 0.1 * share)
                assert (bounds[0] <= value + 1e-9).all() and (bounds[1] >= value - 1e-9).all(), (model, method)


class Without(nn.Module):
    """A part of the input that has no entries, here and there."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function", [lambda x: x.roll(1, 1), lambda x: torch.cat([x[:, 1:].relu(), x], 1)], ids=["roll", "slice"]
)
def test_nodes_without_entries_are_refused(function):
    with pytest.raises(TraceError, match="has no entries"):
        BoundedModule(Without(function), torch.zeros(2, 1))


@pytest.mark.parametrize("method", ["bcp", "CROWN"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_images_that_are_not_finite(model, x, method, bad):
    graph = BoundedModule(model, x)
    x[2, 1] = bad
    for inputs in (ball(x), ball(x, x_L=0.0, x_U=1.0)):
        with pytest.raises(InvalidInputError, match="NaN or infinite"):
            graph.compute_bounds(x=(inputs,), method=method)
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        BoundedModule(model, x)


@pytest.mark.parametrize("method", ["bcp", "IBP", "CROWN"])
@pytest.mark.parametrize("norm", [2, math.inf])
def test_image_outside_of_the_data_range(model, x, method, norm):
    x[1, 3] = 1.25
    with pytest.raises(InvalidInputError, match=r"leaves the data range: it spans .*1\.25"):
        BoundedModule(model, x).compute_bounds(x=(ball(x, norm=norm, x_L=0.0, x_U=1.0),), method=method)


@pytest.mark.parametrize("method", ["bcp", "CROWN"])
def test_another_dtype_than_the_models(model, x, method):
    with pytest.raises(InvalidInputError, match=r"torch.float32, the model torch.float64"):
        BoundedModule(model, x.float())
    with pytest.raises(InvalidInputError, match=r"torch.float32, the model torch.float64"):
        BoundedModule(model, x).compute_bounds(x=(ball(x.float()),), method=method)


@pytest.mark.parametrize("method", ["bcp", "CROWN"])
@pytest.mark.parametrize("eps", [torch.rand(3), torch.rand(5)], ids=["3", "5"])
def test_eps_of_another_batch(model, x, method, eps):
    with pytest.raises(InvalidInputError, match=rf"eps has {len(eps)} entries for a batch of 4"):
        BoundedModule(model, x).compute_bounds(x=(ball(x, eps.double()),), method=method)


def test_empty_batch(model, x):
    with pytest.raises(InvalidInputError, match="at least one sample"):
        BoundedModule(model, x[:0])
    with pytest.raises(InvalidInputError, match="at least one sample"):
        BoundedModule(model, x).compute_bounds(x=(ball(x[:0]),), method="bcp")


@pytest.mark.parametrize("bad", [None, [], "x", ([1.0],), torch.tensor(1.0)], ids=repr)
def test_what_is_no_input(model, bad):
    with pytest.raises(InvalidInputError, match="x must"):
        BoundedModule(model, bad)


def test_other_perturbations_are_named(model, x):
    other = engine.compatibility._perturbations.PerturbationL0Norm(1)
    with pytest.raises(InvalidInputError, match="PerturbationL0Norm is not an lp ball"):
        BoundedModule(model, x).compute_bounds(x=(BoundedTensor(x, other),), method="bcp")


def _batch_norm_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).double()


def test_batch_norm_in_train_mode():
    model, x = _batch_norm_net().train(), torch.rand(2, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(TrainModeError, match=r"batch norm '1' is in train mode.*model.eval\(\)"):
        BoundedModule(model, x)
    graph = BoundedModule(model.eval(), x)
    graph.train()
    for method in ("bcp", "IBP", "CROWN"):
        with pytest.raises(TrainModeError):
            graph.compute_bounds(x=(ball(x),), method=method)
    graph.eval()
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), graph.compute_bounds(x=(ball(x),), method="bcp"))


def test_batch_norm_without_running_statistics():
    model = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 2)).double().eval()
    with pytest.raises(TrainModeError):
        BoundedModule(model, torch.rand(3, 5, dtype=torch.float64))


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x.norm(dim=1, keepdim=True).expand_as(x)


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x.unsqueeze(1) * x.unsqueeze(2))


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x * 2, x + 1


class Raises(nn.Module):
    def forward(self, x):
        raise KeyError("a bug of the user's")


@pytest.mark.parametrize("broken", [Unsupported, TwoOutputs, Raises])
def test_what_the_engine_cannot_trace(broken, x):
    with pytest.raises(TraceError, match=rf"cannot build a graph of {broken.__name__}.*: .*traceable"):
        BoundedModule(broken(), x)


def test_control_flow_on_the_data_is_refused(x):
    """A trace keeps the branch of the example input: what it bounds is another function."""
    with pytest.raises(TraceError):
        graph = BoundedModule(Branching(), x)
        graph.compute_bounds(x=(ball(-x),), method="bcp")


POOLS = {
    "ceil_mode of max": nn.MaxPool2d(3, 2, ceil_mode=True),
    "dilation of max": nn.MaxPool2d(2, 1, dilation=2),
    "ceil_mode of average": nn.AvgPool2d(3, 2, ceil_mode=True),
    "count_include_pad": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_that_the_engine_misreads_are_refused_or_right(name):
    """It drops attributes without a word: either it is found out, or the graph computes the same function."""
    torch.manual_seed(0)
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    pool = nn.Sequential(nn.Conv2d(1, 2, 1), POOLS[name], nn.Flatten()).double().eval()
    model = nn.Sequential(pool, nn.Linear(pool(x).shape[1], 3).double()).eval()
    try:
        graph = BoundedModule(model, x)
    except TraceError as error:
        assert any(word in str(error) for word in ("computes something else", "cannot build a graph"))
        return
    assert_sound(model, x, PerturbationLpNorm(0.3, 2), graph.compute_bounds(x=(ball(x),), method="bcp"))


def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    """The check itself: an engine whose average pool forgets count_include_pad."""
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(9, 3)).double().eval()
    right = engine.bound_ops.BoundFlatten.forward
    monkeypatch.setattr(engine.bound_ops.BoundFlatten, "forward", lambda self, x: 1.001 * right(self, x))
    with pytest.raises(TraceError, match=r"computes something else than the model .*ceil_mode.*count_include_pad"):
        BoundedModule(model, x)
