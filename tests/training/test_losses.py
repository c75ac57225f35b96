"""Worst-translated logits against margins computed otherwise, and the certified loss."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, certified_loss, worst_case_logits
from lirpa_ext.errors import InvalidInputError, LirpaExtError
from lirpa_ext.methods import BoundResult


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Y = torch.tensor([0, 3, 1, 2, 3])


def test_of_a_linear_model_is_the_exact_worst_case() -> None:
    """min of (w_y - w_m).x' over the ball is that of the center minus eps ||w_y - w_m||_2."""
    torch.manual_seed(0)
    linear, x, y, eps = nn.Linear(3, 4).double(), torch.rand(2, 3, dtype=torch.float64), torch.tensor([2, 0]), 0.3
    worst = worst_case_logits(BoundedModule(linear, x), x, y, eps)
    for sample, label in enumerate(y):
        lengths = torch.linalg.vector_norm(linear.weight[label] - linear.weight, dim=1)
        torch.testing.assert_close(worst[sample], linear(x)[sample] + eps * lengths)


@pytest.mark.parametrize("method", ["lipschitz", "bcp", "bcp-crown", "CROWN-IBP"])
def test_its_entries_are_label_minus_worst_margin(model: nn.Module, x: Tensor, method: str) -> None:
    bounded, eps = BoundedModule(model, x), 0.1
    worst = worst_case_logits(bounded, x, Y, eps, method=method)
    logits = model(x)
    ball = BoundedTensor(x, PerturbationLpNorm(eps, 2))
    for other in range(4):
        C = torch.stack([functional.one_hot(y, 4) - functional.one_hot(torch.tensor(other), 4) for y in Y]).double()
        lower, _ = bounded.compute_bounds(x=(ball,), C=C.unsqueeze(1), method=method, bound_upper=False)
        expected = logits.gather(1, Y.unsqueeze(1)) - lower
        torch.testing.assert_close(worst[other != Y, other], expected[other != Y, 0])
    torch.testing.assert_close(worst.gather(1, Y.unsqueeze(1)), logits.gather(1, Y.unsqueeze(1)))


def test_radius_zero_gives_the_logits(model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(worst_case_logits(BoundedModule(model, x), x, Y, 0.0), model(x))


def test_its_cross_entropy_is_never_below_that_of_a_sample(model: nn.Module, x: Tensor) -> None:
    """Proposition 3.1.1, with one eps for each sample and a data range."""
    eps = torch.linspace(0.0, 0.8, 5, dtype=torch.float64)
    worst = worst_case_logits(BoundedModule(model, x), x, Y, eps, x_L=0.0, x_U=1.0)
    bound = functional.cross_entropy(worst, Y, reduction="none")
    directions = functional.normalize(torch.randn(500, 5, 6, generator=torch.Generator().manual_seed(2)), dim=-1)
    for direction in directions.double():
        loss = functional.cross_entropy(model((x + eps.unsqueeze(1) * direction).clamp(0, 1)), Y, reduction="none")
        assert (loss <= bound + 1e-9).all()


def test_given_logits_spare_a_pass_and_change_nothing(model: nn.Module, x: Tensor) -> None:
    bounded = BoundedModule(model, x)
    expected = worst_case_logits(bounded, x, Y, 0.2)
    torch.testing.assert_close(worst_case_logits(bounded, x, Y, 0.2, logits=model(x)), expected)


def test_gradients_are_those_of_finite_differences(model: nn.Module, x: Tensor) -> None:
    bounded = BoundedModule(model, x)
    weight = model[0].weight

    def loss() -> Tensor:
        return certified_loss(model(x), worst_case_logits(bounded, x, Y, 0.2), Y, 0.7)

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction, step = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
        weight += step * direction
    assert float((above - below) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_training_with_estimates_lowers_the_loss(model: nn.Module, x: Tensor) -> None:
    bounded = BoundedModule(model.train(), x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        worst = worst_case_logits(bounded, x, Y, 0.1, norms="estimate")
        loss = certified_loss(model(x), worst, Y, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_weight_is_of_the_robust_part() -> None:
    """Erratum 5 of the source: lambda weighs the robust loss."""
    clean, worst, y = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    torch.testing.assert_close(certified_loss(clean, worst, y, 0.0), functional.cross_entropy(clean, y))
    torch.testing.assert_close(certified_loss(clean, worst, y, 1.0), functional.cross_entropy(worst, y))
    mixed = 0.75 * functional.cross_entropy(clean, y) + 0.25 * functional.cross_entropy(worst, y)
    torch.testing.assert_close(certified_loss(clean, worst, y, 0.25), mixed)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_of_the_unit_interval_is_refused(weight: float) -> None:
    with pytest.raises(InvalidInputError, match="weight"):
        certified_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), weight)


@pytest.mark.parametrize(
    ("y", "eps", "options"),
    [
        (torch.tensor([0, 1, 2, 3, 4]), 0.1, {}),
        (torch.tensor([0, 1]), 0.1, {}),
        (Y, -0.1, {}),
        (Y, float("nan"), {}),
        (Y, 0.1, {"x_U": 0.1}),
        (Y, 0.1, {"method": "no such method"}),
        (Y, 0.1, {"no_such_option": 1}),
        (Y, 0.1, {"logits": torch.zeros(2, 4)}),
    ],
    ids=["label", "labels", "eps", "nan", "range", "method", "option", "logits"],
)
def test_bad_arguments_are_refused(model: nn.Module, x: Tensor, y: Tensor, eps: float, options: dict) -> None:
    with pytest.raises(LirpaExtError):
        worst_case_logits(BoundedModule(model, x), x, y, eps, **options)


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "slope:ibp", "slope:crown", "sparse-slope", "cap"])
def test_a_bound_that_the_clean_value_refutes_is_no_loss(
    model: nn.Module, x: Tensor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training too, where nothing is asked of the device: NaN for that sample and class, nothing for the others."""
    drawn: dict[str, Any] = {"seed": 0} if method == "sparse-slope" else {}
    expected = worst_case_logits(BoundedModule(model, x), x, Y, 0.05, method, math.inf, **drawn)
    assert expected.requires_grad and not expected.isnan().any()
    original = BoundedModule.bound

    def wrong(self: BoundedModule, *args: Any, **options: Any) -> BoundResult:
        result = original(self, *args, **options)
        assert result.lower is not None
        return replace(result, lower=result.lower + torch.eye(5, 3, dtype=result.lower.dtype) * 100)

    monkeypatch.setattr(BoundedModule, "bound", wrong)
    found = worst_case_logits(BoundedModule(model, x), x, Y, 0.05, method, math.inf, **drawn)
    assert found.isnan().any(1).tolist() == [True, True, True, False, False]
    torch.testing.assert_close(found[~found.isnan()], expected[~found.isnan()])
