"""`certify` and `verify` meet wrong bounds, full memory, the end of their time, raising attacks; swallow nothing."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from soundness import box_of, length, radii
from torch import nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine, errors, load_vnnlib, verify
from lirpa_ext.attacks import APGD, Attack
from lirpa_ext.certification.certifier import Certifier
from lirpa_ext.certification.certify import certify
from lirpa_ext.engine.limits import Deadline, OutOfTime, is_out_of_memory
from lirpa_ext.methods import METHODS, register_method
from lirpa_ext.methods.clean_value import rounding
from lirpa_ext.module import guard
from lirpa_ext.verification import verifier
from lirpa_ext.verification.goals import Bounder

BATCH, CLASSES = 5, 4


@pytest.fixture
def method():
    """Register a method for one test: `method(function)` gives its name."""
    names = []

    def add(function):
        name = f"planted-{len(names)}"
        register_method(name, function)
        names.append(name)
        return name

    yield add
    for name in names:
        del METHODS[name]


@pytest.fixture
def blind(monkeypatch):
    """Look at no corners: what is then certified shows that the tests below can fail."""
    monkeypatch.setattr(guard, "extremes", lambda values, x, *_, **__: iter([x]))


def linear():
    """A classifier whose bounds by "bcp-crown" are exact, and data that it classifies right at small eps."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, CLASSES)).double()
    x = torch.randn(BATCH, 6, dtype=torch.float64)
    return model, (x, model(x).argmax(1))


def eps_of(problem) -> float:
    return float(problem.module._inputs[0].ptb.eps_of(problem.module._inputs[0]).max())


def changed(change):
    """The method "bcp-crown" with its lower bounds changed: `change(lower, problem)`, lower (B, S)."""

    def function(problem):
        lower, upper = METHODS["bcp-crown"](problem)
        return change(lower.clone(), problem), upper

    return function


def inside(lower, _):
    return lower + 1e-3


def inside_in_one_row(lower, _):
    """Of a row that is not the least."""
    most = lower.argmax(1, keepdim=True)
    return lower.scatter_add(1, most, torch.full_like(most, 1, dtype=lower.dtype) * 1e-3)


def half_the_radius(lower, problem):
    x = problem.module._inputs[0]
    clean = torch.einsum("bso,bo->bs", problem.C, problem.module.source(x.as_subclass(torch.Tensor)))
    return (lower + clean) / 2


def run(model, data, eps, **options):
    defaults = {"attack": None, "progress": False, "radius": False, "batch_size": BATCH}
    return certify(model, data, eps, **(defaults | options))


def statuses(report):
    return [[level["status"] for level in record["levels"]] for record in report.records]


def says_defect(text, name):
    assert all(part in text for part in (repr(name), "defect of the method", "row", "at a point of the set")), text


# --- the points ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("ranged", [False, True])
def test_points_lie_in_the_set_and_are_the_least_of_a_ball(norm, ranged):
    x = torch.rand(3, 2, 4, dtype=torch.float64)
    perturbation = PerturbationLpNorm(torch.tensor([0.0, 0.3, 2.0]), norm, *((0.0, 1.0) if ranged else ()))
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
    rows = torch.arange(3).expand(3, -1)
    points = list(guard.extremes(model, x, perturbation, rows, seed=0))
    assert len(points) > 3
    lower, upper = box_of(x, perturbation)
    for point in points:
        assert ((lower <= point) & (point <= upper)).all()
        assert (length(point - x, norm) <= radii(x, perturbation) * (1 + 1e-12)).all()
    if not ranged:
        least = torch.stack([model(point) for point in points]).amin(0)
        dual = {1.0: math.inf, math.inf: 1.0}.get(norm) or norm / (norm - 1)
        width = torch.linalg.vector_norm(model[1].weight, ord=dual, dim=1) * perturbation.radius.unsqueeze(1)
        torch.testing.assert_close(least, model(x) - width)


def test_noise_is_rounding_and_no_more():
    """About the outputs' size for an ordinary network; a thousand times that for one that cancels large numbers."""
    x = torch.rand(4, 8, dtype=torch.float64)
    plain = nn.Linear(8, 3).double()

    def cancelling(x):
        return (plain(x) + 1e6) - 1e6

    def noise(function):
        return guard.noise(function, lambda x: function(x.float().double()) if function is plain else
                           (plain(x).float() + 1e6) - 1e6, x)  # fmt: skip

    size = plain(x).abs().amax(1)
    assert (noise(plain) >= size).all() and (noise(plain) < 100 * (1 + size)).all()
    assert (noise(cancelling) > 1e4).all()
    for broken in (lambda x: plain(x) * math.nan, lambda x: 1 / 0):  # half of the digits where nothing can be measured
        slack = guard.slack(guard.noise(plain, broken, x), 1.0, torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(slack, (1 + size) * 2.0**-26)


class Saturated(nn.Module):
    """Values of a million in the set, of which the last activation shows nothing."""

    def forward(self, x):
        return nn.functional.elu(1.5 - 0.35 * nn.functional.elu(-3425.7 * x), 0.5)


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "bcp"])
def test_rounding_of_large_values_inside_is_no_defect(method):
    x = torch.tensor([[0.2085, 0.1688, 0.4394, 0.4283]])
    module = BoundedModule(Saturated(), x)
    bounds = module.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(1000.0, math.inf)),), method=method)
    assert all(bound.isfinite().all() for bound in bounds)


class Reshaped(nn.Module):
    def forward(self, x):
        y = x.view(x.size(0), -1)
        return y.reshape(x.shape[0], x.size(1), -1).flatten(1).tanh() + torch.zeros_like(y)


def test_rounding_is_measured_through_shapes():
    x = torch.rand(3, 2, 4)
    module = BoundedModule(Reshaped(), x)
    module.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(0.1)),), method="bcp")
    clean = Reshaped()(x)
    moved = rounding(module, clean)
    assert (moved > 0).any() and (moved < 1e-5).all()


class OfTheBatch(nn.Module):
    """On 0.3 the constant has the batch of the example; the relaxation of tanh is the engine's or ours."""

    def __init__(self):
        super().__init__()
        self.linear, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.linear(x).relu()
        return self.out((y - torch.full_like(y, 0.3)).abs())


@pytest.mark.parametrize("first", ["bcp-alpha-crown", "alpha-CROWN", "slope:crown"])
def test_a_method_leaves_the_constants_of_the_graph_alone(first):
    torch.manual_seed(0)
    model, x = OfTheBatch().double().eval(), torch.randn(2, 3, dtype=torch.float64)
    ball = (BoundedTensor(x, PerturbationLpNorm(3.0, math.inf)),)
    used, fresh = BoundedModule(model, x), BoundedModule(model, x)
    before = {
        node: node.value.clone() for node in used._modules.values() if isinstance(node, engine.bound_ops.BoundConstant)
    }
    used.compute_bounds(x=ball, method=first)
    assert all(torch.equal(node.value, value) for node, value in before.items())
    for method in ("slope:crown", "cap", "bcp-crown", "CROWN"):
        for bound, expected in zip(*(m.compute_bounds(x=ball, method=method) for m in (used, fresh)), strict=True):
            torch.testing.assert_close(bound, expected, rtol=1e-12, atol=1e-12)


# --- certify: wrong bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("change", [inside, inside_in_one_row, half_the_radius], ids=lambda change: change.__name__)
def test_certify_finds_bounds_that_only_corners_refute(method, change, norm):
    model, data = linear()
    name = method(changed(change))
    report = run(model, data, [0.01, 0.02], norm=norm, method=name, radius=True)
    assert statuses(report) == [["error"] * 2] * BATCH
    for index, record in enumerate(report.records):
        says_defect(record["levels"][0]["message"], name)
        assert f"sample {index} " in record["levels"][0]["message"]
        assert record["radius"] is None and record["levels"][1]["verified_margin"] is None
    (row, _) = report.summary()
    assert (row["verified"], row["error"]) == (0, BATCH)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("change", [inside, half_the_radius], ids=lambda change: change.__name__)
def test_without_corners_those_bounds_would_pass(method, change):
    model, data = linear()
    report = run(model, data, [0.01, 0.02], method=method(changed(change)))
    assert statuses(report) == [["certified"] * 2] * BATCH


def test_certify_names_the_one_sample(method):
    model, data = linear()
    marked = data[0][3]

    def change(lower, problem):
        hit = (problem.module._inputs[0] == marked).all(1)
        return lower + 1e-3 * hit.as_subclass(torch.Tensor).unsqueeze(1)

    report = run(model, data, 0.01, method=method(changed(change)), radius=True)
    assert statuses(report) == [["certified"]] * 3 + [["error"]] + [["certified"]]
    assert report.records[3]["radius"] is None and report.records[2]["radius"] > 0.01


@pytest.mark.usefixtures("blind")
def test_points_that_the_attack_passed_count_not_only_its_best(method):
    """The model has a step beside the path; the attack looks there, and ends at the clean input."""

    class Dip(nn.Module):
        def forward(self, x):
            dip = 0.5 * torch.relu(1 - 20 * (x[:, :1] - 0.05).abs())
            return torch.cat([1 - dip, 0 * x[:, :1], 0.9 * dip - 1], 1)

    class Passing(Attack):
        def run(self, target):
            for shift in (0.0, 0.05, 0.1):
                target.score(target.x + shift)

    x, y = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long)

    def wrong(problem):  # right for z_0 - z_1, which is the least; 1.05 at the dip for z_0 - z_2, not 1.5
        return torch.tensor([[0.4, 1.5]], dtype=torch.float64).expand(2, -1), None

    certifier = Certifier(Dip(), method(wrong), {}, math.inf, (None, None), torch.float64, None)
    for attack, status in ((None, "certified"), (Passing(), "error")):
        records = certifier.certify(range(2), x, y, [0.1], attack, 0)
        assert [record["levels"][0]["status"] for record in records] == [status] * 2
    assert "z_0 - z_2" in records[0]["levels"][0]["message"]


def test_a_defect_at_one_eps_counts_at_all(method):
    model, data = linear()
    name = method(changed(lambda lower, problem: lower + 1e-3 * (eps_of(problem) > 0.015)))
    assert statuses(run(model, data, [0.01, 0.02], method=name)) == [["error"] * 2] * BATCH
    # The levels are bounded right; the search for the radius, beyond them, meets the defect.
    report = run(model, data, 0.01, method=name, radius=True)
    assert statuses(report) == [["error"]] * BATCH
    assert all(record["radius"] is None for record in report.records)
    assert statuses(run(model, data, 0.01, method=name)) == [["certified"]] * BATCH


@pytest.mark.parametrize("name", ["IBP", "CROWN", "CROWN-IBP"])
def test_certify_finds_wrong_bounds_of_the_engines_methods(monkeypatch, name):
    original = BoundedModule.compute_bounds

    def wrong(self, *args, **options):
        lower, upper = original(self, *args, **options)
        return lower + 1e-3, upper

    model, data = linear()
    assert statuses(run(model, data, 0.001, norm=math.inf, method=name)) == [["certified"]] * BATCH
    monkeypatch.setattr(BoundedModule, "compute_bounds", wrong)
    report = run(model, data, 0.001, norm=math.inf, method=name)
    assert statuses(report) == [["error"]] * BATCH
    says_defect(report.records[0]["levels"][0]["message"], name)


@pytest.mark.parametrize("alone", [True, False])
def test_a_soundness_error_of_a_batch_is_of_whom_it_is(method, alone):
    """Of the sample that raises it alone; of all, if none does: a batch that is wrong together is not tried again."""
    model, data = linear()

    def raising(lower, problem):
        x = problem.module._inputs[0]
        if (x == data[0][2]).all(1).any() if alone else len(x) > 1:
            raise errors.SoundnessError("the clean value is outside")
        return lower

    report = run(model, data, [0.01, 0.02], method=method(changed(raising)))
    wrong = [status == ["error"] * 2 for status in statuses(report)]
    assert wrong == ([False, False, True, False, False] if alone else [True] * BATCH)
    assert "clean value is outside" in report.records[2]["levels"][0]["message"]


@pytest.mark.parametrize("seed", range(5))
def test_accuracies_are_ordered_whatever_a_method_says(method, seed):
    """Bounds drawn at random, NaN and infinities among them, of data that is partly misclassified."""
    model, (x, y) = linear()
    data = x, torch.where(torch.arange(BATCH) == seed, (y + 1) % CLASSES, y)
    source = torch.Generator().manual_seed(seed)

    def drawn(lower, _):
        noise = 0.1 * torch.randn(lower.shape, generator=source, dtype=lower.dtype)
        special = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=lower.dtype)
        kind = torch.randint(0, 40, lower.shape, generator=source)
        return torch.where(kind < 4, special[kind.clamp(max=3)], lower + noise * (kind > 20))

    report = run(model, data, [0.0, 0.05, 0.2, 0.8], method=method(changed(drawn)), attack=APGD(3, 2), radius=True)
    for row in report.summary():
        assert row["verified"] <= row["pgd"] <= row["clean"]
        assert row["certified"] + row["unknown"] + row["attacked"] + row["error"] == BATCH
    for record in report.records:
        for level in record["levels"]:
            if level["status"] == "certified":
                assert level["attack_margin"] > 0 and level["verified_margin"] <= level["attack_margin"] + 1e-9


# --- certify: nothing swallowed ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
)], ids=["python", "cuda", "cpu"])  # fmt: skip
def test_out_of_memory_halves_the_batch_and_says_so(method, error):
    model, data = linear()
    sizes = []

    def tight(most):
        def change(lower, problem):
            sizes.append(len(lower))
            if len(lower) > most:
                raise error
            return lower

        return method(changed(change))

    expected = run(model, data, [0.01, 0.1])
    report = run(model, data, [0.01, 0.1], method=tight(2))
    assert statuses(report) == statuses(expected)
    assert all("out of memory" in record["message"] and "at most 2" in record["message"] for record in report.records)
    assert sizes[0] == BATCH and set(sizes[1:]) == {1, 2}
    with pytest.raises(errors.OutOfMemoryError, match="one sample alone"):
        run(model, data, 0.01, method=tight(0))


def test_out_of_memory_is_seen_through_other_errors():
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise errors.UnsupportedNodeError("node 3") from cause
    except errors.UnsupportedNodeError as error:
        assert is_out_of_memory(error)
    assert not is_out_of_memory(errors.UnsupportedNodeError("node 3")) and not is_out_of_memory(None)


@pytest.mark.parametrize("error", [errors.InvalidInputError, errors.OptionError, errors.EstimateError])
def test_wrong_arguments_are_not_tried_sample_by_sample(method, error):
    model, data = linear()
    calls = []

    def refuse(problem):
        calls.append(1)
        if len(calls) == 2:  # also after a batch that worked
            raise error("no such thing")
        return METHODS["bcp"](problem)

    with pytest.raises(error, match="no such thing"):
        run(model, data, [0.01, 0.02], method=method(refuse))
    assert len(calls) == 2
    with pytest.raises(errors.OptionError, match="nonsense"):
        run(model, data, 0.01, method="CROWN", options={"nonsense": 1})


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OutOfTime])
def test_what_ends_a_program_or_its_time_ends_certify(method, error):
    model, data = linear()

    def stop(problem):
        raise error

    with pytest.raises(error):
        run(model, data, 0.01, method=method(stop))


def test_an_attack_that_raises_is_an_error_of_its_samples():
    class Raising(Attack):
        def run(self, target):
            if (target.x == data[0][1]).flatten(1).all(1).any():
                raise ZeroDivisionError("in the attack")

    model, data = linear()
    certifier = Certifier(model, "bcp", {}, 2, (None, None), torch.float64, None)
    records = certifier.certify(range(BATCH), *data, [0.01], Raising(), 0)
    found = [record["levels"][0]["status"] for record in records]
    assert found == ["certified", "error", *["certified"] * 3]
    assert "in the attack" in records[1]["levels"][0]["message"]


# --- verify: wrong bounds ------------------------------------------------------------------------------------


def text(boxes, *assertions):
    """A property of a network with two inputs and two outputs, over boxes (low, high) of both inputs."""
    names = ("X_0", "X_1", "Y_0", "Y_1")
    some = " ".join(f"(and (<= {low} X_0 {high}) (<= {low} X_1 {high}))" for low, high in boxes)
    head = " ".join(f"(declare-const {name} Real)" for name in names)
    return f"{head} (assert (or {some})) " + " ".join(f"(assert {assertion})" for assertion in assertions)


def planar():
    """y = (x_0 - x_1, 2 x_0): bounds of every method are exact."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    return model


@pytest.fixture
def wrong(monkeypatch):
    """Move the lower bounds of a method up: `wrong(method, by)`."""
    original = BoundedModule.compute_bounds

    def plant(name, by):
        def compute_bounds(self, *args, **options):
            lower, upper = original(self, *args, **options)
            return (lower + by, upper) if options["method"] == name else (lower, upper)

        monkeypatch.setattr(BoundedModule, "compute_bounds", compute_bounds)

    return plant


@pytest.mark.parametrize("attack", [0, 10])
@pytest.mark.parametrize("name", ["IBP", "CROWN-IBP", "CROWN", "bcp"])
def test_verify_drops_a_method_that_a_corner_refutes(wrong, name, attack):
    """max(x_0 - x_1) = 1 on the box."""
    specification = load_vnnlib(text([(0, 1)], "(>= Y_0 1.0005)"))
    assert verify(planar(), specification, methods=[name], attack=attack).status == "verified"
    wrong(name, 1e-3)
    verdict = verify(planar(), specification, methods=[name], attack=attack)
    assert verdict.status == "unknown" and verdict.margin == -math.inf and verdict.method == ""
    says_defect(verdict.reasons[0], name)
    assert "case 0" in verdict.reasons[0] and "-Y_0" in verdict.reasons[0]
    verdict = verify(planar(), specification, methods=[name, "IBP" if name != "IBP" else "CROWN"], attack=attack)
    assert verdict.status == "verified" and verdict.method != name


def test_verify_takes_back_what_a_wrong_method_settled_before(wrong):
    """Case 0 is far from unsafe, and only case 1 shows the defect: both are left to the next method."""
    specification = load_vnnlib(text([(0, 0.1), (0, 1)], "(>= Y_0 1.0005)"))
    wrong("IBP", 1e-3)
    verdict = verify(planar(), specification, methods=["IBP"], attack=0)
    assert [case.status for case in verdict.cases] == ["unknown"] * 2
    verdict = verify(planar(), specification, methods=["IBP", "CROWN"], attack=5)
    assert [(case.status, case.method) for case in verdict.cases] == [("verified", "CROWN")] * 2
    assert verdict.margin < 0.00051


def test_verify_holds_every_row_not_only_the_one_that_settles(monkeypatch):
    """The bound of -2 x_0 is wrong; that of x_1 - x_0 is right, and would do."""
    original = BoundedModule.compute_bounds

    def wrong_in_one_row(self, *args, **options):
        lower, upper = original(self, *args, **options)
        return lower + torch.tensor([0.0, 1e-3], dtype=lower.dtype), upper

    specification = load_vnnlib(text([(0, 1)], "(>= Y_0 1.5)", "(>= Y_1 0)"))
    assert verify(planar(), specification, methods=["IBP"], attack=0).status == "verified"
    monkeypatch.setattr(BoundedModule, "compute_bounds", wrong_in_one_row)
    verdict = verify(planar(), specification, methods=["IBP"], attack=0)
    assert verdict.status == "unknown" and "bounds row -Y_1 of case 0 below by -1.999" in verdict.reasons[0]


@pytest.mark.parametrize("by", [1e-3, 0.3])
def test_a_wrong_method_is_found_while_boxes_are_halved(wrong, by):
    """|x_0| + |x_1| <= 2 needs halves; CROWN is wrong on all of them."""

    class Absolute(nn.Module):
        def forward(self, x):
            total = (torch.relu(x) + torch.relu(-x)).sum(1, keepdim=True)
            return torch.cat([total - 3 * torch.relu(x.sum(1, keepdim=True) - 1.5), x[:, :1]], 1)

    specification = load_vnnlib(text([(-1, 1)], "(>= Y_0 2.0005)"))
    verdict = verify(Absolute(), specification, methods=["IBP", "split"], attack=0)
    assert (verdict.status, verdict.method) == ("verified", "split")
    wrong("CROWN", by)
    verdict = verify(Absolute(), specification, methods=["IBP", "split"], attack=0)
    assert verdict.status == "unknown" and not verdict.margin > 0
    assert any("split of case 0" in reason and "defect of the method" in reason for reason in verdict.reasons)


def test_an_unsafe_corner_is_a_counterexample(wrong):
    wrong("IBP", 0.5)
    verdict = verify(planar(), load_vnnlib(text([(0, 1)], "(>= Y_0 0.75)")), methods=["IBP"], attack=0)
    assert (verdict.status, verdict.method) == ("violated", "corner")
    assert verdict.witness.output[0] >= 0.75
    says_defect(verify(planar(), load_vnnlib(text([(0, 1)], "(>= Y_0 1.25)")), methods=["IBP"]).reasons[0], "IBP")


def test_a_point_that_only_float64_calls_unsafe_leaves_it_open(monkeypatch):
    model = planar()
    model.reference = lambda x: np.zeros((1, 2), dtype=np.float32)
    specification = load_vnnlib(text([(0, 1)], "(>= Y_0 1)"))
    within_rounding = np.array([[-1 + 1e-14]])
    monkeypatch.setattr(Bounder, "lower", lambda self, method, lower, upper, rows: within_rounding)
    verdict = verify(model, specification, methods=["IBP"], attack=0)
    assert verdict.status == "unknown" and not verdict.margin > 0
    assert "case 0 is unsafe in float64, but not as the network runs" in verdict.reasons[0]


def test_a_network_that_is_not_finite_somewhere_is_not_verified(monkeypatch):
    class Pole(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :1], torch.log(x[:, 1:])], 1)

    lowest = np.array([[-5.0]])
    monkeypatch.setattr(Bounder, "lower", lambda self, method, lower, upper, rows: lowest)
    specification = load_vnnlib(text([(-1, 4)], "(>= Y_0 6)"))
    verdict = verify(Pole(), specification, methods=["IBP"], attack=0)
    assert verdict.status == "unknown" and "not finite at a point of the box of case 0" in verdict.reasons[-1]


# --- verify: nothing swallowed -------------------------------------------------------------------------------


class Stubborn(nn.Module):
    """Catches every Exception of its layers and goes on, in two layers of them."""

    def __init__(self):
        super().__init__()
        self.layer = planar()

    def forward(self, x):
        for _ in range(2000):
            try:
                try:
                    y = self.layer(x)
                except Exception:
                    y = self.layer(x)
            except Exception:
                y = x * 0
        return y


def test_a_deadline_passes_through_whatever_takes_exceptions():
    assert not issubclass(OutOfTime, Exception)
    start = time.monotonic()
    with pytest.raises(OutOfTime), Deadline(time.monotonic() + 0.02), torch.no_grad():
        Stubborn()(torch.rand(1, 2))
    assert time.monotonic() - start < 1
    start = time.monotonic()
    verdict = verify(Stubborn(), load_vnnlib(text([(0, 1)], "(>= Y_0 0.9)")), timeout=0.5, methods=["CROWN"])
    assert time.monotonic() - start < 20
    assert verdict.status in ("unknown", "violated")
    assert verdict.status == "violated" or any("time" in reason for reason in verdict.reasons)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_ends_verify(monkeypatch, error):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(BoundedModule, "compute_bounds", stop)
    for methods in (["IBP"], ["split"]):
        with pytest.raises(error):
            verify(planar(), load_vnnlib(text([(0, 1)], "(>= Y_0 1.5)")), methods=methods, attack=0)


def test_wrong_arguments_of_verify_are_raised():
    specification = load_vnnlib(text([(0, 1)], "(>= (* 16777217 Y_0) 3e8)"))
    assert verify(planar(), specification, methods=["IBP"]).status == "verified"
    with pytest.raises(errors.InvalidInputError, match="use float64"):
        verify(planar(), specification, methods=["IBP", "CROWN"], dtype=torch.float32)


def test_an_attack_that_raises_is_a_reason_and_the_others_go_on(monkeypatch):
    original = verifier.falsify

    def falsify(judge, index, *rest):
        if index == 0:
            raise ZeroDivisionError("in the attack")
        return original(judge, index, *rest)

    monkeypatch.setattr(verifier, "falsify", falsify)
    verdict = verify(planar(), load_vnnlib(text([(0, 1), (0, 2)], "(>= Y_0 0.75)")), methods=["IBP"])
    assert verdict.reasons[0] == "the attack on case 0 stopped: ZeroDivisionError: in the attack"
    assert [case.status for case in verdict.cases] == ["unknown", "violated"]


def test_the_callers_inference_mode_changes_nothing():
    """Gradients are off in it, which attacks and the engine need; tensors made in it refuse them for ever."""
    with torch.inference_mode():
        model, data = linear()
        report = run(model, data, 0.01, attack=APGD(3, 2))
        verdict = verify(planar(), load_vnnlib(text([(0, 1)], "(>= Y_0 0.75)")), methods=["IBP"])
    assert statuses(report) == [["certified"]] * BATCH
    assert (verdict.status, verdict.method) == ("violated", "PGD")


class Magnitude(nn.Module):
    def forward(self, x):
        return x.abs()


def test_rounding_is_that_of_the_set():
    """A bound in float32 that adds numbers of 1e9 is off by 100, though the clean values are below 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 1, bias=False), Magnitude(), nn.Linear(1, 1), nn.Linear(1, 4))
    x = torch.zeros(2, 5)
    graph = BoundedModule(model, x)
    for scale, size in ((1.0, 1e-6), (1e6, 1.0), (1e6, 1e6)):
        with torch.no_grad():
            model[0].weight.fill_(scale)
        eps = 1000.0 if size == 1.0 else size
        ball = BoundedTensor(x, PerturbationLpNorm(norm=3.0, eps=eps, x_U=x + 0.2))
        lower, upper = graph.compute_bounds(x=(ball,), method="IBP")
        width, found = (upper - lower).max(), rounding(graph, model(x)).max()
        assert 1e-8 * width < found < 1e-5 * (1 + width)
