"""Random projections of CAP: they estimate the boxes of Fast-Lin, converge to them, and certify nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, certify, worst_case_logits
from lirpa_ext.errors import EstimateError, OptionError

PAIRS = [(math.inf, 0.05), (2, 0.3)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LeakyReLU(0.1), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((self.second(x) + x).relu())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().double()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def widths(bounds: tuple[Tensor, Tensor]) -> Tensor:
    lower, upper = bounds
    return upper - lower


@pytest.mark.parametrize(("norm", "eps"), PAIRS, ids=["linf", "l2"])
def test_many_projections_give_the_boxes_of_fast_lin(model, x, norm, eps):
    bounded = BoundedModule(model, x)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps))
    exact = widths(bounded.compute_bounds(x=(ball,), method="cap"))
    errors = []
    for count in (10, 4000):
        found = widths(bounded.compute_bounds(x=(ball,), method="cap", projections=count, seed=0))
        errors.append((found / exact - 1).abs().mean())
    assert errors[1] < math.pi / 2 / math.sqrt(4000)  # the standard error of one neuron's median
    assert errors[1] < errors[0]
    first = widths(bounded.compute_bounds(x=(ball,), method="slope:cap"))
    assert (exact / first).mean() < 0.97  # the boxes of IBP would not have passed


def test_a_network_without_hidden_boxes_needs_no_estimate(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    bounded = BoundedModule(model, x)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.1))
    exact = bounded.compute_bounds(x=(ball,), method="cap", outward=False)
    torch.testing.assert_close(bounded.compute_bounds(x=(ball,), method="cap", projections=3), exact)


@pytest.mark.parametrize(("norm", "eps"), PAIRS, ids=["linf", "l2"])
def test_gradients_are_finite_and_seeds_decide(model, x, norm, eps):
    bounded, y = BoundedModule(model, x), torch.tensor([0, 1, 2, 0])
    results = []
    for seed in (0, 0, 1):
        worst = worst_case_logits(bounded, x, y, eps, "cap", norm, projections=20, seed=seed)
        loss = nn.functional.cross_entropy(worst, y)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        assert all(torch.isfinite(value).all() for value in results[-1])
    assert all(torch.equal(*pair) for pair in zip(results[0], results[1], strict=True))
    assert results[0][0] != results[2][0]


def test_estimates_certify_nothing(model, x):
    with pytest.raises(EstimateError, match="projections"):
        certify(model, (x, torch.zeros(4, dtype=torch.long)), eps=0.1, method="cap", options={"projections": 50})
    ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1))
    with pytest.raises(OptionError, match="from 1"):
        BoundedModule(model, x).compute_bounds(x=(ball,), method="cap", projections=0)
