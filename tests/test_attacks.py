"""Attacks stay inside of their set, never do worse than the clean input, and find what a linear model has."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lirpa_ext import PerturbationLpNorm
from lirpa_ext.attacks import LOSSES, PGD, Attack, Target
from lirpa_ext.errors import InvalidInputError
from lirpa_ext.specifications import check_labels, margin_rows, margins

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
    for options in ({"steps": 0}, {"restarts": 0}, {"step_size": -1.0}, {"step_size": math.nan}, {"loss": "hinge"}):
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
