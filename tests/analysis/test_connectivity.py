"""Mode connectivity: exact ends, exactly flat paths, a barrier that cannot be avoided and one that can."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from lirpa_ext.analysis import CertifiedObjective, Connectivity, bezier, connect, plot_connectivity
from lirpa_ext.cli import main
from lirpa_ext.data import load_data
from lirpa_ext.errors import ConfigError, InvalidInputError
from lirpa_ext.models.loading import load_model, save_model
from lirpa_ext.reporting.plots import alt_text
from lirpa_ext.training import Loss, Network, build
from lirpa_ext.training.losses import worst_case_logits


class Point(nn.Module):
    """Weights in the plane, and nothing else."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return self.place + 0 * x.sum()


DATA = torch.zeros(4, 1), torch.zeros(4)


def ring(model, x, y):
    """Zero on the unit circle, 1 in its middle."""
    return (model(x).square().sum() - 1).square()


def test_a_curve_has_its_ends_exactly():
    start, middle, end = torch.randn(3, 50).unbind()
    assert torch.equal(bezier(start, middle, end, 0.0), start)
    assert torch.equal(bezier(start, middle, end, 1.0), end)
    torch.testing.assert_close(bezier(start, (start + end) / 2, end, 0.3), torch.lerp(start, end, 0.3))


def test_the_ends_have_the_losses_of_the_models():
    first, second = build(Network("2C2F", [1, 8, 8])).eval(), build(Network("2C2F", [1, 8, 8])).eval()
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)

    def loss(model, x, y):
        return nn.functional.cross_entropy(model(x), y)

    before = copy.deepcopy(first.state_dict())
    found = connect(first, second, loss, (x, y), steps=3, batch_size=6, points=3)
    assert found.curve[0] == found.line[0] == loss(first, x, y).item()
    assert found.curve[-1] == found.line[-1] == loss(second, x, y).item()
    assert found.t == (0.0, 0.5, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert all(weight.grad is None for model in (first, second) for weight in model.parameters())


def test_a_flat_path_has_no_barrier_exactly():
    """A loss that reads only the weight in which the models agree."""

    def loss(model, x, y):
        return model(x)[1].square()

    found = connect(Point(-1.0, 0.0), Point(1.0, 0.0), loss, DATA, batch_size=4, steps=20)
    assert set(found.curve) == {0.0} and found.barrier == found.line_barrier == 0 and found.connected
    same = connect(Point(0.3, 0.7), Point(0.3, 0.7), ring, DATA, batch_size=4, steps=0)
    assert same.connected and max(same.curve) - min(same.curve) < 1e-6


def test_a_straight_line_through_a_quadratic_has_its_closed_form():
    """The loss (theta^2 - 1)^2 on the line from -1 to 1, theta = 2 t - 1."""
    found = connect(Point(-1.0), Point(1.0), ring, DATA, batch_size=4, steps=0, points=11)
    assert found.curve == pytest.approx([((2 * t - 1) ** 2 - 1) ** 2 for t in found.t], abs=1e-6)
    assert found.barrier == pytest.approx(1.0) and not found.connected
    assert found.curve == found.line


def test_training_goes_around_a_barrier_where_there_is_a_way():
    """From one side of the unit circle to another place on it: the line crosses the inside, the curve goes around."""
    angle = 2.0
    first, second = Point(1.0, 0.0), Point(math.cos(angle), math.sin(angle))
    found = connect(first, second, ring, DATA, batch_size=4, steps=600, lr=0.02)
    assert found.line_barrier == pytest.approx((1 - math.cos(angle / 2) ** 2) ** 2, abs=1e-5)
    assert found.barrier < found.line_barrier / 20  # a parabola is no circle
    # the best middle point lies on the bisector, beyond the circle
    middle = found.middle["place"]
    assert math.atan2(float(middle[1]), float(middle[0])) == pytest.approx(angle / 2, abs=0.05)
    assert float(middle.norm()) > 1.2


def test_where_there_is_no_way_a_barrier_is_found():
    found = connect(Point(-1.0), Point(1.0), ring, DATA, batch_size=4, steps=200)
    assert not found.connected and found.barrier > 0.9
    assert "a barrier of height" in found.summary()


def test_a_loss_that_is_nan_is_not_connected():
    def loss(model, x, y):
        value = model(x)[0]
        return torch.where(value.abs() < 0.1, torch.full_like(value, math.nan), value.square())

    found = connect(Point(-1.0), Point(1.0), loss, DATA, batch_size=4, steps=0)
    assert math.isnan(found.barrier) and not found.connected


def test_rounding_is_no_barrier_and_a_rise_is_one():
    assert Connectivity((0.0, 0.5, 1.0), (1.0, 1.0 + 1e-7, 1.0), (1.0, 1.0, 1.0)).connected
    assert not Connectivity((0.0, 0.5, 1.0), (1.0, 1.001, 1.0), (1.0, 1.0, 1.0)).connected
    assert Connectivity((0.0, 0.5, 1.0), (1.0, 1.9, 2.0), (1.0, 1.0, 2.0)).barrier == 0


def test_a_certified_loss_is_the_one_of_training():
    model = build(Network("2C2F", [1, 8, 8])).eval()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    for name, method, norm in (
        ("crown-ibp", "slope:crown", math.inf),
        ("ibp", "slope:ibp", math.inf),
        ("bcp", "bcp", 2),
    ):
        objective = CertifiedObjective(Loss(name), 0.1, norm, 0.0, 1.0)
        worst = worst_case_logits(model, x, y, 0.1, method, norm, 0.0, 1.0)
        torch.testing.assert_close(objective(model, x, y), nn.functional.cross_entropy(worst, y))
    drawn = CertifiedObjective(Loss("sparse-slope"), 0.1, math.inf, 0.0, 1.0)
    assert drawn(model, x, y) == drawn(model, x, y)  # the same draws each time


def test_models_that_no_curve_connects_are_refused():
    small, large = Point(0.0), Point(0.0, 0.0)
    with pytest.raises(InvalidInputError, match="same parameters"):
        connect(small, large, ring, DATA, batch_size=4)
    norms = [nn.Sequential(nn.BatchNorm1d(1)) for _ in range(2)]
    norms[1][0].running_mean += 1
    with pytest.raises(InvalidInputError, match="running_mean"):
        connect(*norms, ring, DATA, batch_size=4)
    with pytest.raises(InvalidInputError, match="at least one batch"):
        connect(small, small, ring, DATA, batch_size=5)
    with pytest.raises(ConfigError, match="unknown loss"):
        CertifiedObjective(Loss("none"), 0.1)


def test_the_command_connects_two_files(tmp_path, capsys):
    network = Network("2C2F", [1, 8, 8])
    files = [str(tmp_path / f"{name}.pt") for name in ("a", "b")]
    for file in files:
        save_model(build(network), file, "lirpa_ext.models.architectures:named_network", **vars(network))
    asked = ["--data", "digits", "--limit", "20", "--norm", "inf", "--eps", "0.02", "--steps", "2", "--points", "3"]
    assert main(["analyze", "connectivity", *files, *asked, "--loss", "crown-ibp", "--out", str(tmp_path)]) == 0
    assert "crown-ibp loss at eps 0.02 from a (" in capsys.readouterr().out
    rows = json.loads((tmp_path / "connectivity.json").read_text())["rows"]
    x, y = load_data("digits", "train", 20)
    objective = CertifiedObjective(Loss("crown-ibp"), 0.02, math.inf, 0.0, 1.0)
    assert rows[0]["curve"] == pytest.approx(float(objective(load_model(files[0]), x, y)), rel=1e-5)
    assert (tmp_path / "connectivity.png").is_file()
    assert main(["analyze", "connectivity", *files, *asked]) == 2 and "pass --loss" in capsys.readouterr().err
    assert main(["analyze", "connectivity", files[0], *asked, "--loss", "ibp"]) == 2


def test_two_networks_on_the_digits(tmp_path):
    """Two that were trained from different weights: the straight line rises, a trained curve rises less."""
    x, y = load_data("digits", "train", 300)
    models = []
    for number in range(2):
        torch.manual_seed(number)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
        objective = CertifiedObjective(Loss("ibp"), 0.02, math.inf, 0.0, 1.0)
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for step in range(120):
            chosen = torch.arange(step * 50, step * 50 + 50) % 300
            optimizer.zero_grad()
            objective(model, x[chosen], y[chosen]).backward()
            optimizer.step()
        models.append(model)
    objective = CertifiedObjective(Loss("ibp"), 0.02, math.inf, 0.0, 1.0)
    found = connect(
        *models, objective, (x, y), steps=120, batch_size=50, points=9, name="ibp", ends=("seed 0", "seed 1")
    )
    assert max(found.curve[0], found.curve[-1]) < 0.7
    assert found.line_barrier > 0.3
    assert found.barrier < found.line_barrier / 3
    found.save(tmp_path / "connectivity")
    assert (tmp_path / "connectivity.csv").read_text().splitlines()[0] == "t,curve,line"
    drawn = plot_connectivity([found])
    assert found.summary() in alt_text(drawn)
    assert list(drawn.axes[0].lines[0].get_ydata()) == list(found.curve)
