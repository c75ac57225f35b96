"""BoundedModule: its calls, its state, the power iterations, lipschitz(), and the sizes it must bear."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from soundness import assert_sound
from torch import nn
from torch.overrides import TorchFunctionMode

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine, lipschitz
from lirpa_ext.engine import precision
from lirpa_ext.errors import InvalidInputError, OptionError

EPS = 0.3


def ball(x, eps=EPS):
    return BoundedTensor(x, PerturbationLpNorm(norm=2, eps=eps))


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def _two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).double()


@pytest.fixture
def model():
    return conv_net()


@pytest.fixture
def x():
    return torch.rand(2, 1, 6, 6, dtype=torch.float64)


class Products(TorchFunctionMode):
    """The settings that matrix products and convolutions are computed under."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("linear", "conv2d", "matmul", "__matmul__", "bmm", "addmm", "einsum", "conv_transpose2d"):
            self.seen |= set(precision.settings())
        return func(*args, **(kwargs or {}))


# --- the call ----------------------------------------------------------------------------------------------------


def test_the_two_calls_of_the_readme(model, x):
    C = torch.tensor([[[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]]], dtype=torch.float64).expand(2, 2, 3)
    given = BoundedModule(model, x).compute_bounds(x=(ball(x),), C=C, method="bcp")
    assert isinstance(given, tuple)
    assert [bound.shape for bound in given] == [(2, 2), (2, 2)]
    built = BoundedModule(model, ball(x)).compute_bounds(C=C, method="bcp")
    torch.testing.assert_close(built, given)
    assert_sound(model, x, PerturbationLpNorm(EPS, 2), given, C)


DYNAMIC = sorted(method for method in engine.ENGINE_METHODS if method.startswith("dynamic"))


@pytest.mark.parametrize("method", sorted(engine.ENGINE_METHODS - {"forward-optimized", *DYNAMIC}))
def test_the_engines_methods_still_work(x, method):
    model, x = _two_layers(), x[:, 0, 0]
    for norm in (2, float("inf")):
        perturbation = PerturbationLpNorm(0.1, norm)
        bounds = BoundedModule(model, x).compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
        assert_sound(model, x, perturbation, bounds)


@pytest.mark.skipif(engine.IS_LEGACY, reason="auto_LiRPA 0.3 does not have them")
@pytest.mark.parametrize("method", DYNAMIC)
def test_the_engines_dynamic_forward_methods_still_work(x, method):
    """For boxes, of which the engine's own class takes only those whose ends are given."""
    model, x = _two_layers(), x[:, 0, 0]
    for perturbation in (
        PerturbationLpNorm(x_L=x - 0.1, x_U=x + 0.2),
        PerturbationLpNorm(torch.tensor([0.1, 0.3])[: len(x)], float("inf"), x_L=0.0, x_U=1.0),
    ):
        bounds = BoundedModule(model, x).compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)
        assert_sound(model, x, perturbation, bounds)
    with pytest.raises(OptionError, match="l-inf sets only"):
        BoundedModule(model, x).compute_bounds(x=(ball(x),), method=method)


def test_default_method_is_the_engines(model, x):
    graph = BoundedModule(model, x)
    torch.testing.assert_close(
        graph.compute_bounds(x=(ball(x),)), graph.compute_bounds(x=(ball(x),), method="backward")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_have_the_inputs_dtype(dtype):
    model, x = conv_net().to(dtype), torch.rand(2, 1, 6, 6, dtype=dtype)
    graph = BoundedModule(model, x)
    for method in ("lipschitz", "bcp", "bcp-crown", "bcp-alpha-crown", "IBP", "CROWN"):
        bounds = graph.compute_bounds(x=(ball(x),), method=method)
        assert bounds[0].dtype == bounds[1].dtype == dtype
        assert_sound(model, x, PerturbationLpNorm(EPS, 2), bounds)
    assert torch.get_default_dtype() == torch.float32


class Picked(nn.Module):
    """Entries picked by an index for each sample: no rule of ours."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.gather(self.first(x), 1, torch.zeros_like(x).long()))


def test_which_nodes_took_the_fallback_is_visible(model, x):
    points, product = torch.rand(2, 4, dtype=torch.float64), Picked().double()
    graph = BoundedModule(product, points)
    assert graph.last_result is None
    bounds = graph.compute_bounds(x=(ball(points, 0.1),), method="bcp")
    ((name, kind),) = graph.last_result.fallbacks.items()
    assert kind == "BoundGatherElements"
    assert type(graph._modules[name]).__name__ == kind
    assert_sound(product, points, PerturbationLpNorm(0.1, 2), bounds)
    plain = BoundedModule(model, x)
    plain.compute_bounds(x=(ball(x),), method="bcp")
    assert plain.last_result.fallbacks == {}


def test_train_and_eval_are_the_models(model, x):
    graph = BoundedModule(model, x)
    assert graph.train() is graph
    assert model.training
    assert graph.eval() is graph
    assert not model.training


def test_parameters_are_the_models_own(model, x):
    graph = BoundedModule(model, x)
    own = dict(model.named_parameters())
    assert dict(graph.named_parameters()).keys() == own.keys()
    assert all(parameter is own[name] for name, parameter in graph.named_parameters())
    assert len(list(graph.parameters())) == len(own)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("method", ["bcp", "IBP"])
def test_logits_of_before_can_go_backward_after_a_build_and_a_retrace(model, x, mode, method):
    """As in a training loop whose last batch is smaller."""
    model.train(mode)
    logits = model(x)
    graph = BoundedModule(model, x)
    logits.sum().backward()
    for batch in (x, x[:1]):
        logits = model(batch)
        lower, _ = graph.compute_bounds(x=(ball(batch),), method=method)
        (logits.sum() + lower.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["lipschitz", "bcp", "bcp-crown", "slope:ibp", "IBP", "CROWN"])
def test_products_keep_their_precision(method, tensor_cores):
    """10 bits of the factors are left of 23, which no bound may count on."""
    model, x, before = conv_net().float(), torch.rand(2, 1, 6, 6), precision.settings()
    graph = BoundedModule(model, x)
    with Products() as during:
        graph.compute_bounds(x=(ball(x),), method=method)
    assert during.seen == {precision.FULL}
    assert precision.settings() == before
    with Products() as after:
        model(x)
    assert after.seen - during.seen


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps, lambda graph: torch.save(graph, io.BytesIO())])
def test_no_copy_and_no_pickle(model, x, how):
    with pytest.raises(TypeError, match="cannot be copied or pickled: save the torch model"):
        how(BoundedModule(model, x))


# --- power iterations and state ----------------------------------------------------------------------------------


def vectors(graph):
    return {name: iteration.u.clone() for name, iteration in graph.power_iterations.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["lipschitz", "bcp", "bcp-crown"])
def test_estimates_are_the_same_in_two_calls(model, x, method):
    graph = BoundedModule(model.eval(), x)
    before = vectors(graph)
    assert set(before) == {"0.weight", "3.weight", "5.weight"}
    first = graph.compute_bounds(x=(ball(x),), method=method, norms="estimate")
    torch.testing.assert_close(
        graph.compute_bounds(x=(ball(x),), method=method, norms="estimate"), first, rtol=0, atol=0
    )
    assert same(vectors(graph), before)
    other = BoundedModule(conv_net().eval(), x).compute_bounds(x=(ball(x),), method=method, norms="estimate")
    torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_iterations_move_in_training_mode_only(model, x):
    graph = BoundedModule(model.train(), x)
    before = vectors(graph)
    graph.compute_bounds(x=(ball(x),), method="bcp", norms="bound")
    assert same(vectors(graph), before), "certification moved the iteration"
    graph.compute_bounds(x=(ball(x),), method="IBP")
    graph(x)
    assert same(vectors(graph), before)
    widths, real = [], torch.linalg.matrix_norm(model[3].weight, 2)
    for _ in range(500):
        lower, upper = graph.compute_bounds(x=(ball(x),), method="lipschitz", norms="estimate")
        widths.append(float((upper - lower).detach().sum()))
    after = vectors(graph)
    assert not any(torch.equal(after[name], before[name]) for name in ("0.weight", "3.weight"))
    assert widths[0] < widths[-1], "the estimate grows towards the norm"
    torch.testing.assert_close((model[3].weight @ after["3.weight"][0]).norm(), real, rtol=1e-3, atol=0)
    graph.eval()
    graph.compute_bounds(x=(ball(x),), method="lipschitz", norms="estimate")
    assert same(vectors(graph), after)


def test_estimates_are_below_bounds(model, x):
    """The estimate's bound is tighter, as its norms are smaller: no certificate; the default is the bound."""
    graph = BoundedModule(model, x)
    for method in ("lipschitz", "bcp"):
        bound = graph.compute_bounds(x=(ball(x),), method=method, norms="bound")
        estimate = graph.compute_bounds(x=(ball(x),), method=method, norms="estimate")
        default = graph.compute_bounds(x=(ball(x),), method=method)
        torch.testing.assert_close(default, bound, rtol=0, atol=0)
        assert (estimate[0] >= bound[0] - 1e-12).all()
        assert (estimate[0] > bound[0] + 1e-6).any()


def test_state_is_saved_and_restored(model, x):
    graph = BoundedModule(model.train(), x)
    for _ in range(3):
        graph.compute_bounds(x=(ball(x),), method="bcp", norms="estimate")
    state = graph.state_dict()
    assert set(state) == set(model.state_dict()) | {f"power_iteration.{n}.weight.u" for n in ("0", "3", "5")}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.manual_seed(7)
    fresh = conv_net()
    with torch.no_grad():
        fresh[0].weight.normal_()
    other = BoundedModule(fresh.eval(), x)
    assert not same(vectors(other), vectors(graph))
    other.load_state_dict(torch.load(file))
    assert same(vectors(other), vectors(graph))
    graph.eval()
    expected = graph.compute_bounds(x=(ball(x),), method="bcp", norms="estimate")
    actual = other.compute_bounds(x=(ball(x),), method="bcp", norms="estimate")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_saved_state_does_not_follow_the_training(model, x):
    """As in torch the entries are the tensors themselves; what was saved to a file stays."""
    graph = BoundedModule(model.train(), x)
    file = io.BytesIO()
    torch.save(graph.state_dict(), file)
    before = vectors(graph)
    graph.compute_bounds(x=(ball(x),), method="bcp", norms="estimate")
    assert not same(vectors(graph), before)
    file.seek(0)
    graph.load_state_dict(torch.load(file))
    assert same(vectors(graph), before)


def test_state_of_the_model_alone_loads(model, x):
    graph = BoundedModule(model, x)
    before = vectors(graph)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    graph.load_state_dict(other)
    assert torch.equal(model[3].weight, other["3.weight"])
    assert same(vectors(graph), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        graph.load_state_dict({"0.weight": other["0.weight"]})
    graph.load_state_dict({"0.weight": other["0.weight"] + 1}, strict=False)
    assert torch.equal(model[0].weight, other["0.weight"] + 1)


def test_state_survives_another_batch_size(model, x):
    graph = BoundedModule(model.train(), x)
    graph.compute_bounds(x=(ball(x),), method="bcp", norms="estimate")
    before = vectors(graph)
    graph.eval()
    graph.compute_bounds(x=(ball(x[:1]),), method="bcp", norms="estimate")
    assert same(vectors(graph), before)


def test_start_does_not_depend_on_the_global_generator(x):
    torch.manual_seed(1)
    one = vectors(BoundedModule(conv_net(), x))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert same(vectors(BoundedModule(conv_net(), x)), one)
    graph = BoundedModule(conv_net(), x)
    torch.set_rng_state(state)
    graph.compute_bounds(x=(ball(x),), method="bcp", norms="estimate")
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers were used up"


# --- lipschitz() -------------------------------------------------------------------------------------------------


def test_lipschitz_report(model, x, capsys):
    report = lipschitz(model, x)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert [layer.name for layer in report.layers] == ["0.weight", "3.weight", "5.weight"]
    columns = printed.splitlines()[0].split()
    assert columns == ["layer", "estimate", "bound", "ratio"]
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in printed.splitlines()[1:]}
    product = 1.0
    for layer in report.layers:
        weight = dict(model.named_parameters())[layer.name].detach()
        if weight.dim() == 4:
            images = torch.eye(36, dtype=weight.dtype).view(36, 1, 6, 6)
            weight = nn.functional.conv2d(images, weight, stride=2, padding=1).flatten(1)
        true = float(torch.linalg.matrix_norm(weight, 2))
        assert layer.estimate <= true * (1 + 1e-9) <= layer.bound * (1 + 1e-9)
        assert layer.estimate >= 0.999 * true
        assert layer.bound <= 1.0001 * true
        assert layer.ratio == layer.bound / layer.estimate >= 1
        assert rows[layer.name] == pytest.approx([layer.estimate, layer.bound, layer.ratio], rel=1e-3)
        product *= layer.bound
    assert report.product == pytest.approx(product)
    assert report.estimate <= report.product
    ratio = report.product / report.estimate
    assert rows["product"] == pytest.approx([report.estimate, report.product, ratio], rel=1e-3)


def test_lipschitz_product_bounds_the_network(model, x, capsys):
    report = lipschitz(model, x, verbose=False)
    assert capsys.readouterr().out == ""
    lower, upper = BoundedModule(model, x).compute_bounds(x=(ball(x, 0.1),), method="lipschitz")
    assert ((upper - lower) / 2 <= 0.1 * report.product * (1 + 1e-9)).all()
    directions = 0.1 * nn.functional.normalize(torch.randn(2, 36, dtype=x.dtype), dim=1).view_as(x)
    assert ((model(x + directions) - model(x)).norm(dim=1) <= 0.1 * report.product).all()


def test_lipschitz_leaves_the_model_alone(model, x):
    model.train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lipschitz(model, x, verbose=False)
    assert model.training
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lipschitz_of_zeros():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    report = lipschitz(model, torch.rand(1, 3), verbose=False)
    assert report.layers[0].bound == report.product == 0
    assert report.layers[0].ratio == 1


def test_lipschitz_of_nan_weights(model, x):
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(InvalidInputError, match="NaN"):
        lipschitz(model, x, verbose=False)


# --- sizes -------------------------------------------------------------------------------------------------------


def peak_gib(code):
    """Peak resident memory of a Python process that runs the code."""
    root = Path(__file__).resolve().parents[2]
    code = textwrap.dedent(code) + (
        "\nimport resource, sys\n"
        "unit = 2**30 if sys.platform == 'darwin' else 2**20\n"
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split("PEAK")[1])


@pytest.mark.slow
def test_200_classes_at_batch_128_stay_under_4_gib():
    """199 rows, 4,096 features: the (128, 199, 4096) rows alone are 398 MiB, and many times that in autograd."""
    peak = peak_gib("""
        import torch
        from torch import nn
        from lirpa_ext import BoundedModule, worst_case_logits, certified_loss
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 200)).train()
        x, y = torch.rand(128, 64), torch.arange(128) % 200
        graph = BoundedModule(model, x)
        worst = worst_case_logits(graph, x, y, 0.1, method="bcp", norms="estimate")
        assert worst.shape == (128, 200)
        certified_loss(model(x), worst, y, 0.5).backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())
    """)
    assert peak < 4, f"{peak:.2f} GiB"


@pytest.mark.slow
def test_wrn_on_64x64_stays_under_4_gib():
    """A WRN-16-4 (batch norm, residual adds, average pool) at batch 16, certification with bcp."""
    peak = peak_gib("""
        import torch
        from torch import nn
        from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm
        torch.manual_seed(0)
        torch.set_num_threads(1)

        class Block(nn.Module):
            def __init__(self, inside, out, stride):
                super().__init__()
                self.bn1, self.bn2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(out)
                self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
                self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
                self.skip = None if inside == out and stride == 1 else nn.Conv2d(inside, out, 1, stride, bias=False)
            def forward(self, x):
                y = torch.relu(self.bn1(x))
                z = self.conv2(torch.relu(self.bn2(self.conv1(y))))
                return z + (x if self.skip is None else self.skip(y))

        layers, width = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)], 16
        for out, stride in ((64, 1), (128, 2), (256, 2)):
            for i in range(2):
                layers.append(Block(width, out, stride if i == 0 else 1))
                width = out
        layers += [nn.BatchNorm2d(256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 200)]
        model, x = nn.Sequential(*layers).eval(), torch.rand(16, 3, 64, 64)
        C = torch.randn(16, 199, 200)
        with torch.no_grad():
            graph = BoundedModule(model, x)
            ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1))
            lower, upper = graph.compute_bounds(x=(ball,), C=C, method="bcp")
            clean = torch.einsum("bso,bo->bs", C, model(x))
        assert torch.isfinite(lower).all() and (lower <= clean).all() and (clean <= upper).all()
        assert not graph.last_result.fallbacks, graph.last_result.fallbacks
    """)
    assert peak < 4, f"{peak:.2f} GiB"
