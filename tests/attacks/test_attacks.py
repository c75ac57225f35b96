"""Attacks stay inside of their set, never do worse than the clean input, and find what a linear model has."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from lirpa_ext import PerturbationLpNorm, certify
from lirpa_ext.attacks import (
    APGD,
    EOT,
    FGM,
    FGSM,
    LOSSES,
    PGD,
    TARGETED_LOSSES,
    Attack,
    AutoAttack,
    RandomSearch,
    Target,
)
from lirpa_ext.certification.robust_accuracy import evaluate
from lirpa_ext.domain.specifications import check_labels, margin_rows, margins
from lirpa_ext.errors import ConfigError, InvalidInputError, TrainModeError

NORMS = [2.0, math.inf, 3.0]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).double().eval()


def assert_inside(points, x, perturbation):
    length = torch.linalg.vector_norm((points - x).flatten(1), ord=perturbation.norm, dim=1)
    assert (length <= perturbation.eps_of(x) * (1 + 1e-9)).all()
    if perturbation.range_lower is not None:
        assert points.min() >= perturbation.range_lower
        assert points.max() <= perturbation.range_upper


# Every attack there is: a new one is added here.
ATTACKS = {
    "fgsm": FGSM,
    "fgm": FGM,
    "pgd": lambda: PGD(8),
    "pgd-momentum": lambda: PGD(8, momentum=1.0),
    "pgd-restarts": lambda: PGD(5, restarts=3, step_size=0.7, loss="dlr"),
    "eot-fgsm": lambda: EOT(FGSM(), 4),
    "eot-pgd": lambda: EOT(PGD(5), 3, keep="final"),
    "autoattack-rand": lambda: AutoAttack("rand"),
    "autoattack": AutoAttack,
}


def make(name):
    if name.startswith("autoattack"):
        pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    return ATTACKS[name]()


def combinations():
    """Every attack in every norm and type. AutoAttack takes no l3, and seconds: once for each version is enough."""
    for name in ATTACKS:
        for norm in NORMS:
            for dtype in (torch.float32, torch.float64):
                if not name.startswith("autoattack") or (norm, dtype) == (math.inf, torch.float32):
                    yield pytest.param(name, norm, dtype, id=f"{name}-l{norm:g}-{str(dtype)[6:]}")
    yield pytest.param("autoattack-rand", 2.0, torch.float64, id="autoattack-rand-l2-float64")


@pytest.mark.parametrize(("name", "norm", "dtype"), combinations())
def test_every_attack_stays_in_ball_and_range(name, norm, dtype):
    """To 1e-6, for each sample's own eps, and no point is worse than the clean one."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, 5)).to(dtype).eval()
    x = 2 * torch.rand(4, 1, 5, 5, dtype=dtype) - 1
    y = model(x).argmax(1)
    eps = torch.tensor([0.0, 0.05, 0.5, 0.5], dtype=dtype)
    found = make(name)(model, x, y, PerturbationLpNorm(eps, norm, -1.0, 1.0))
    length = torch.linalg.vector_norm((found.inputs - x).double().flatten(1), ord=norm, dim=1)
    assert (length <= eps + 1e-6).all()
    assert found.inputs.min() >= -1 and found.inputs.max() <= 1
    assert found.inputs.dtype == dtype
    torch.testing.assert_close(found.margins, margins(model(found.inputs), y))
    if "final" not in repr(make(name)):
        assert (found.margins <= margins(model(x), y)).all()
    assert (found.margins[2:] < margins(model(x), y)[2:]).any()


@pytest.mark.parametrize("norm", NORMS, ids="l{:g}".format)
def test_fgsm_is_one_step_of_length_eps(batch, network, norm):
    """(2.1.3): x + eps times the unit vector of largest inner product with the gradient."""
    x, y = batch
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(network(at), y, reduction="sum"), at)
    found = EOT(FGSM(), 1, keep="final")(network, x, y, PerturbationLpNorm(0.2, norm)).inputs
    if norm == math.inf:
        torch.testing.assert_close(found, x + 0.2 * gradient.sign(), rtol=0, atol=1e-12)
    if norm == 2:
        unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        torch.testing.assert_close(found, x + 0.2 * unit, rtol=0, atol=1e-12)
    dual = 1.0 if norm == math.inf else norm / (norm - 1)
    product = ((found - x) * gradient).flatten(1).sum(1)
    torch.testing.assert_close(product, 0.2 * torch.linalg.vector_norm(gradient.flatten(1), ord=dual, dim=1))


@pytest.mark.parametrize("loss", TARGETED_LOSSES)
def test_a_targeted_attack_makes_the_model_say_its_target(batch, loss):
    torch.manual_seed(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    x = batch[0]
    y = network(x).argmax(1)
    targets = (y + torch.arange(1, 7) % 4 + 1) % 5
    found = PGD(60, restarts=5, loss=loss)(network, x, y, PerturbationLpNorm(20.0, 2), targets=targets)
    assert (network(found.inputs).argmax(1) == targets).all()
    torch.testing.assert_close(found.margins, -margins(network(found.inputs), targets))
    assert (found.margins < 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_grow_with_success_and_have_gradients(loss):
    y, targets = torch.tensor([0, 1]), torch.tensor([2, 0])
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0], [0.0, 2.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: LOSSES[loss](z, y), logits)
    assert torch.autograd.gradcheck(lambda z: TARGETED_LOSSES[loss](z, y, targets), logits)
    wrong = torch.tensor([[0.0, 1.0, 2.0, 0.5], [2.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    assert (LOSSES[loss](wrong, y) > LOSSES[loss](logits, y)).all()
    assert (TARGETED_LOSSES[loss](wrong, y, targets) > TARGETED_LOSSES[loss](logits, y, targets)).all()


def test_dlr_by_hand_and_without_scale():
    logits, y = torch.tensor([[4.0, 3.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    torch.testing.assert_close(LOSSES["dlr"](logits, y).item(), -(4 - 3) / (4 - 1))
    torch.testing.assert_close(TARGETED_LOSSES["dlr"](logits, y, torch.tensor([2])).item(), -(4 - 1) / (4 - 0.5))
    torch.testing.assert_close(LOSSES["dlr"](1000 * logits, y), LOSSES["dlr"](logits, y))
    assert LOSSES["dlr"](torch.zeros(1, 4), y).item() == 0  # not NaN
    for table, others in ((LOSSES, ()), (TARGETED_LOSSES, (torch.tensor([1]),))):
        with pytest.raises(InvalidInputError, match="classes"):
            table["dlr"](logits[:, :2], y, *others)


def test_what_autoattack_returns_is_checked(batch, monkeypatch, caplog):
    """A point outside of ball and range is brought back inside, and said so."""
    import lirpa_ext.attacks.autoattack as ours

    class Careless:
        def __init__(self, model, **options):
            self.apgd_targeted = self.fab = type("", (), {})()

        def run_standard_evaluation(self, unit, y, batch_size):
            return unit + 0.5, y

    monkeypatch.setattr(ours, "_pyautoattack", lambda: type("", (), {"AutoAttack": Careless}))
    torch.manual_seed(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()
    for norm in (2, math.inf):
        perturbation = PerturbationLpNorm(0.1, norm, 0.0, 1.0)
        found = AutoAttack("rand")(network, batch[0], batch[1], perturbation)
        assert_inside(found.inputs, batch[0], perturbation)
        assert "left the set of 6 samples" in caplog.text


def test_without_pyautoattack_the_error_has_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
    with pytest.raises(ConfigError, match="pip install pyautoattack"):
        AutoAttack()


def test_autoattack_refuses_what_it_cannot_attack(batch, network):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    x, y = batch
    torch.manual_seed(5)
    five = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()
    ball = PerturbationLpNorm(0.1, 2, 0.0, 1.0)
    for version, model, perturbation, message in (
        ("rand", five, PerturbationLpNorm(0.1, 3, 0.0, 1.0), "norm 2 and inf"),
        ("rand", five, PerturbationLpNorm(0.1, 2), "data range"),
        ("standard", five, ball, "5 pixels"),
        ("rand", nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double(), ball, "3 classes"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            AutoAttack(version)(model, x, y.clamp(max=1), perturbation)
    with pytest.raises(InvalidInputError, match="untargeted"):
        AutoAttack("rand")(five, x, y, ball, targets=y + 1)
    for options in ({"version": "plus"}, {"batch_size": 0}):
        with pytest.raises(InvalidInputError):
            AutoAttack(**options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS, ids="l{:g}".format)
def test_pgd_stays_in_ball_and_range_and_gains(batch, network, norm, loss):
    x, y = batch
    eps = torch.tensor([0.0, 0.01, 0.1, 0.5, 2.0, 50.0], dtype=torch.float64)
    perturbation = PerturbationLpNorm(eps, norm, 0.0, 1.0)
    found = PGD(steps=10, restarts=2, loss=loss)(network, x, y, perturbation)
    assert_inside(found.inputs, x, perturbation)
    clean = margins(network(x), y)
    assert torch.equal(found.inputs[0], x[0])
    assert (found.margins[1:] < clean[1:]).all()
    torch.testing.assert_close(found.margins, margins(network(found.inputs), y))


@pytest.mark.parametrize("norm", NORMS, ids="l{:g}".format)
def test_pgd_finds_the_minimum_of_a_linear_model(batch, norm):
    """min over the ball of (w_y - w_j).x' is the clean margin less eps times the dual norm of the row."""
    x, y = batch[0].flatten(1), batch[1].clamp(max=1)
    torch.manual_seed(2)
    model = nn.Linear(16, 2).double()
    perturbation = PerturbationLpNorm(0.3, norm)
    row = model.weight[y] - model.weight[1 - y]
    dual = 1.0 if norm == math.inf else norm / (norm - 1)
    expected = margins(model(x), y) - 0.3 * torch.linalg.vector_norm(row, ord=dual, dim=1)
    found = PGD(steps=2, step_size=1.0, random_start=False)(model, x, y, perturbation)
    torch.testing.assert_close(found.margins, expected, rtol=1e-9, atol=1e-9)
    if norm != 3:  # whose projection, by scaling, is slow to converge from elsewhere
        found = PGD(steps=60, step_size=1.0)(model, x, y, perturbation)
        torch.testing.assert_close(found.margins, expected, rtol=1e-7, atol=1e-7)


def directions_of(monkeypatch, momentum, gradients):
    """What PGD follows where the gradients of its steps are these."""
    target = Target(nn.Linear(2, 2), torch.zeros(1, 2), torch.tensor([0]), PerturbationLpNorm(1.0), torch.Generator())
    rows, followed = iter(gradients), []
    monkeypatch.setattr(target, "gradient", lambda points, loss: torch.tensor([next(rows)]))
    monkeypatch.setattr(target, "steepest", lambda gradient: followed.append(gradient[0].tolist()) or gradient.sign())
    PGD(len(gradients), step_size=0.25, random_start=False, momentum=momentum).run(target)
    return followed


@pytest.mark.parametrize(("momentum", "second"), [(0.0, [-6.0, 2.0]), (0.5, [-0.625, -0.125]), (2.0, [-0.25, -1.25])])
def test_momentum_sums_gradients_of_length_1(monkeypatch, momentum, second):
    """Y. Dong et al.'s rule by hand: gradients (1, -3), of l1 length 4, and then (-6, 2), of l1 length 8."""
    followed = directions_of(monkeypatch, momentum, [[1.0, -3.0], [-6.0, 2.0]])
    assert followed == [[0.25, -0.75] if momentum else [1.0, -3.0], second]


def test_momentum_keeps_a_gradient_of_0(monkeypatch):
    """And one that is very small has a direction as any other."""
    assert directions_of(monkeypatch, 1.0, [[0.0, 0.0], [1.0, -3.0]]) == [[0.0, 0.0], [0.25, -0.75]]
    small = directions_of(monkeypatch, 1.0, [[1e-30, -3e-30]])[0]
    assert small == pytest.approx([0.25, -0.75])
    flat = nn.Linear(3, 2)
    nn.init.zeros_(flat.weight)
    x = torch.rand(2, 3)
    still = PGD(3, momentum=1.0, random_start=False)(flat, x, torch.tensor([0, 1]), PerturbationLpNorm(0.1))
    assert torch.equal(still.inputs, x)


@pytest.mark.parametrize("norm", NORMS, ids="l{:g}".format)
def test_projection_and_random_points_lie_inside(batch, network, norm):
    x, y = batch
    perturbation = PerturbationLpNorm(0.7, norm, 0.0, 1.0)
    target = Target(network, x, y, perturbation, torch.Generator().manual_seed(0))
    for _ in range(20):
        assert_inside(target.random_points(), x, perturbation)
        points = target.project(x + torch.randn_like(x))
        assert_inside(points, x, perturbation)
        torch.testing.assert_close(target.project(points), points)


def test_same_generator_same_result(batch, network):
    x, y = batch
    runs = [PGD(5)(network, x, y, PerturbationLpNorm(0.3, 2), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(runs[0].inputs, runs[1].inputs)


def test_labels_of_any_whole_number_type(batch, network):
    x, y = batch
    ball = PerturbationLpNorm(0.3, 2)
    targets = (y + 1) % 3
    for given in (None, targets):
        expected = PGD(3)(network, x, y, ball, targets=given)
        short = None if given is None else given.to(torch.uint8)
        assert torch.equal(PGD(3)(network, x, y.int(), ball, targets=short).inputs, expected.inputs)


def test_parameters_get_no_gradient(batch, network):
    x, y = batch
    PGD(2)(network, x, y, PerturbationLpNorm(0.3, 2))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_nan_of_the_model_is_no_success(batch):
    class Breaks(nn.Module):
        def forward(self, x):
            return torch.stack([1 / (x.sum(1) > 0) * x.sum(1), -x.sum(1) * math.nan], dim=1)

    x = batch[0].flatten(1)
    found = PGD(3)(Breaks(), x, torch.zeros(6, dtype=torch.long), PerturbationLpNorm(0.1, 2))
    assert found.margins.isnan().all()
    assert not (found.margins <= 0).any()


def test_an_attack_only_writes_run(batch, network):
    class OneRandomPoint(Attack):
        def run(self, target):
            target.score(target.random_points())

    x, y = batch
    perturbation = PerturbationLpNorm(1.0, 2, 0.0, 1.0)
    found = OneRandomPoint()(network, x, y, perturbation)
    assert_inside(found.inputs, x, perturbation)
    assert (found.margins <= margins(network(x), y)).all()


def test_bad_input(batch, network):
    x, y = batch
    ball = PerturbationLpNorm(0.1, 2, 0.0, 1.0)
    with pytest.raises(InvalidInputError, match="p > 1"):
        PGD()(network, x, y, PerturbationLpNorm(0.1, 1))
    with pytest.raises(InvalidInputError, match="data range"):
        PGD()(network, x + 1, y, ball)
    with pytest.raises(InvalidInputError, match="NaN"):
        PGD()(network, x * math.nan, y, ball)
    with pytest.raises(InvalidInputError, match=r"labels.*0\.\.2.*is 5, of sample 0"):
        PGD()(network, x, y + 5, ball)
    with pytest.raises(InvalidInputError, match="classifier"):
        PGD()(nn.Identity(), x, y, ball)
    for targets in (y, y + 5, y[:2]):
        with pytest.raises(InvalidInputError):
            PGD()(network, x, y, ball, targets=targets)
    with pytest.raises(InvalidInputError, match="unknown loss"):
        FGSM("hinge")
    for options in (
        {"steps": 0}, {"restarts": 0}, {"step_size": -1.0}, {"step_size": math.nan}, {"loss": "hinge"},
        {"momentum": -1.0}, {"momentum": math.inf},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            PGD(**options)


def test_margin_rows_and_margins():
    rows = margin_rows(torch.tensor([2, 0]), 3, torch.float32)
    assert rows.tolist() == [[[-1, 0, 1], [0, -1, 1]], [[1, -1, 0], [1, 0, -1]]]
    logits = torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.0, 1.0], [math.nan, 0.0, 1.0], [math.inf, math.inf, 0.0]])
    found = margins(logits, torch.tensor([1, 0, 1, 0]))
    assert found[:2].tolist() == [1.0, 0.0]
    assert found[2:].isnan().all()
    for y in (torch.tensor([-1]), torch.tensor([3]), torch.tensor([0.5]), torch.tensor([[1]]), torch.tensor([True])):
        with pytest.raises(InvalidInputError):
            check_labels(y, 3)
    with pytest.raises(InvalidInputError, match="2 classes"):
        check_labels(torch.tensor([0]), 1)


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


@pytest.mark.parametrize(
    ("model", "samples", "labels", "message"),
    [
        (nn.Flatten(), 4, 3, r"labels are one number a sample, \(4,\), got \(3,\)"),
        (nn.Flatten(), 0, 0, "no sample to attack"),
        (Pair(), 4, 4, "returns a tuple"),
        (nn.Flatten(0, 1), 4, 4, r"returns \(12,\) for 4 samples"),
        (nn.Linear(5, 2), 4, 4, "the model fails on inputs of shape"),
    ],
    ids=["labels", "empty", "tuple", "merged", "shape"],
)
@pytest.mark.parametrize("attack", [PGD(2), PGD(2, restarts=2)], ids=["once", "restarts"])
def test_what_cannot_be_attacked_is_said(model, samples, labels, message, attack):
    x, y = torch.rand(samples, 3), torch.zeros(labels, dtype=torch.long)
    with pytest.raises(InvalidInputError, match=message):
        attack(model, x, y, PerturbationLpNorm(0.1, 2))


def test_a_batch_norm_in_train_mode_is_refused_and_stays_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3)).train()
    before = net[1].running_mean.clone()
    x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(TrainModeError, match="batch norm '1' is in train mode"):
        APGD(2)(net, x, y, PerturbationLpNorm(0.1, 2))
    with pytest.raises(TrainModeError, match="batch norm '1' is in train mode"):
        evaluate(net, (x, y), [0.0, 0.1])
    assert torch.equal(net[1].running_mean, before)


# --- models that hide their gradients ---


class Hidden(nn.Module):
    """The decisions of a network, with gradients that say nothing."""

    def __init__(self, net, how):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x):
        return self.how(self.net(x))


HIDDEN = {
    "detached": lambda z: z.detach(),
    "saturated": lambda z: torch.softmax(1e5 * z, 1),
    "NaN": lambda z: z + 0.0 * (z - z).sqrt(),
    "steps": lambda z: z.round(decimals=1) + 0.0 * z.detach(),
    "one hot": lambda z: nn.functional.one_hot(z.argmax(1), z.shape[1]).float(),
}


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("attack", [PGD(10), APGD(10), FGSM()], ids=["PGD", "APGD", "FGSM"])
@pytest.mark.parametrize("how", HIDDEN)
def test_a_hidden_gradient_is_said_and_searched_without(how, attack, norm, caplog):
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    x = torch.rand(40, 6)
    y = net(x).argmax(1)
    hidden = Hidden(net, HIDDEN[how])
    ball = PerturbationLpNorm({2: 1.0, math.inf: 0.5}[norm], norm, 0.0, 1.0)
    found = attack(hidden, x, y, ball)
    assert found.masked.float().mean() > 0.8
    assert "gradient masking" in caplog.text
    open_ = APGD(20)(net, x, y, ball)
    assert not open_.masked.any()
    assert (found.margins <= 0).sum() >= 0.8 * (open_.margins <= 0).sum() > 0
    with torch.no_grad():
        assert torch.equal(margins(hidden(found.inputs), y) <= 0, found.margins <= 0)


def test_reports_count_samples_without_a_gradient(caplog):
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    x = torch.rand(40, 6)
    y = net(x).argmax(1)
    options = {"eps": [0.05], "method": "bcp", "radius": False, "progress": False, "x_L": 0.0, "x_U": 1.0}
    plain = certify(net, (x, y), **options)
    assert plain.summary()[0]["masked"] == 0 and "no evidence" not in plain.table()
    steep = certify(nn.Sequential(net, Scaled(1e6), nn.Softmax(1)), (x, y), **options | {"method": "IBP"})
    row = steep.summary()[0]
    assert row["masked"] == row["unknown"] > 0
    assert f"{row['masked']} unknown samples at eps 0.05 gave the attack no gradient" in steep.table()
    judged = evaluate(Hidden(net, HIDDEN["detached"]), (x, y), [0.0, 0.05])
    assert [row["masked"] for row in judged.rows()] == [0, round(40 * judged.levels[1].ensemble.value)]
    assert "the right ones gave the attack no gradient: no evidence" in judged.summary()
    assert "no evidence" not in evaluate(net, (x, y), [0.0, 0.05]).summary()


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


# --- points lie in their sets to the last bit ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-4, 0.1, 3e-7, 2.0])
@pytest.mark.parametrize("norm", [1.5, 2, 3, math.inf])
@pytest.mark.parametrize("attack", [PGD(5), APGD(5), FGSM(), RandomSearch(20)], ids=lambda a: type(a).__name__)
def test_points_lie_in_their_sets_to_the_last_bit(attack, norm, eps, dtype):
    """In exact arithmetic, against the radius as it was given."""
    torch.manual_seed(0)
    net, x = nn.Linear(50, 3).to(dtype), (0.1 + 0.8 * torch.rand(20, 50)).to(dtype)
    y = net(x).argmax(1)
    ends = (0.05, 0.95) if eps > 1 else (None, None)
    found = attack(net, x, y, PerturbationLpNorm(eps, norm, *ends))
    if eps > 1:
        assert (found.inputs >= 0.05).all() and (found.inputs <= 0.95).all()
    for point, center in zip(found.inputs.tolist(), x.tolist(), strict=True):
        shifts = [abs(Fraction(a) - Fraction(b)) for a, b in zip(point, center, strict=True)]
        if norm == math.inf:
            assert max(shifts) <= Fraction(eps)
        elif norm in (2, 3):
            assert sum(shift**norm for shift in shifts) <= Fraction(eps) ** norm
        else:
            assert sum(float(shift) ** norm for shift in shifts) <= eps**norm * (1 + 1e-13)
    assert (found.inputs != x).any()
