"""The perturbation set: what is refused, its box, ball and exact minimum, and the engine's own class."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from soundness import assert_contains, extremes, generator, samples
from torch import nn

from lirpa_ext import BoundedModule, BoundedTensor, PerturbationLpNorm, engine
from lirpa_ext.errors import InvalidInputError

NORMS = [1, 1.5, 2, 3, math.inf]


@pytest.fixture
def x():
    return torch.rand(3, 2, 4, dtype=torch.float64)


# --- bad arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [-0.1, -1e-30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [float, lambda e: torch.tensor(e), lambda e: torch.tensor([0.1, e]), np.float64])
def test_radius_that_is_no_length(eps, wrap):
    with pytest.raises(InvalidInputError, match="eps must be finite and not negative"):
        PerturbationLpNorm(wrap(eps), 2)


@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (3, 2, 4)], ids=str)
def test_radius_of_a_wrong_shape(shape):
    with pytest.raises(InvalidInputError, match=r"must be a number or have shape \(B,\)"):
        PerturbationLpNorm(torch.ones(shape), 2)


@pytest.mark.parametrize("norm", [0, 0.5, -1, math.nan, -math.inf])
def test_norm_below_one(norm):
    with pytest.raises(InvalidInputError, match="norm must be at least 1"):
        PerturbationLpNorm(0.1, norm)


@pytest.mark.parametrize("arguments", [{}, {"norm": 2}, {"x_L": 0.0}, {"x_L": 0.0, "x_U": 1.0, "norm": 2}], ids=str)
def test_no_radius(arguments):
    with pytest.raises(InvalidInputError, match="give eps, or"):
        PerturbationLpNorm(**arguments)


@pytest.mark.parametrize("ends", [(1.0, 0.0), (torch.tensor([0.0, 2.0]), 1.0)], ids=["numbers", "tensor"])
def test_empty_range(ends):
    with pytest.raises(InvalidInputError, match="data range is empty"):
        PerturbationLpNorm(0.1, 2, *ends)


@pytest.mark.parametrize("name", ["x_L", "x_U"])
def test_range_with_nan(name):
    with pytest.raises(InvalidInputError, match=f"{name} has NaN"):
        PerturbationLpNorm(0.1, 2, **{name: torch.tensor([0.0, math.nan])})


# --- the set -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "eps",
    [0.25, torch.tensor(0.25), torch.ones(1) / 4, np.float32(0.25), torch.ones(3) / 4, torch.tensor(0.25).half()],
    ids=["float", "0-dim", "one", "numpy", "each", "half"],
)  # fmt: skip
def test_forms_of_one_radius(x, eps):
    perturbation = PerturbationLpNorm(eps, 2)
    assert torch.equal(perturbation.eps_of(x), torch.full((3,), 0.25, dtype=torch.float64))
    lower, upper = perturbation.box(x)
    assert torch.equal(lower, x - 0.25)
    assert torch.equal(upper, x + 0.25)


@pytest.mark.parametrize("eps", [1, np.array([0.25, 0.25, 0.25])], ids=["int", "array"])
def test_more_forms_of_a_radius(x, eps):
    """Through the whole class: what is accepted also bounds."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2)).double()
    lower, upper = BoundedModule(model, x).compute_bounds(
        x=(BoundedTensor(x, PerturbationLpNorm(eps, 2)),), method="bcp"
    )
    reach = model[1].weight.norm(dim=1) * (eps if isinstance(eps, int) else 0.25)
    torch.testing.assert_close(upper - lower, (2 * reach).expand(3, 2))


def test_range_cuts_the_box_for_every_norm(x):
    for norm in NORMS:
        lower, upper = PerturbationLpNorm(0.5, norm, x_L=0.0, x_U=torch.ones(2, 4)).box(x)
        assert torch.equal(lower, (x - 0.5).clamp(min=0))
        assert torch.equal(upper, (x + 0.5).clamp(max=1))


def test_range_alone_is_the_box(x):
    perturbation = PerturbationLpNorm(x_L=x - 0.1, x_U=x + 0.3)
    assert torch.equal(perturbation.box(x)[1], x + 0.3)
    torch.testing.assert_close(perturbation.l2_radius(x), torch.full((3,), 0.3 * 8**0.5, dtype=x.dtype))
    torch.testing.assert_close(perturbation.eps_of(x), torch.full((3,), 0.3, dtype=x.dtype))


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("data_range", [{}, {"x_L": 0.0, "x_U": 1.0}], ids=["ball", "range"])
def test_l2_radius_and_box_contain_every_point(x, norm, data_range):
    perturbation = PerturbationLpNorm(torch.tensor([0.1, 0.5, 2.0], dtype=x.dtype), norm, **data_range)
    points = samples(x, perturbation, 400, generator())
    reach = (points - x).flatten(2).norm(dim=2).amax(0)
    radius = perturbation.l2_radius(x)
    assert (reach <= radius * (1 + 1e-12)).all()
    lower, upper = perturbation.box(x)
    assert (points >= lower - 1e-12).all()
    assert (points <= upper + 1e-12).all()
    if not data_range:
        expected = {1: 1.0, 1.5: 1.0, 2: 1.0, 3: 8 ** (1 / 6), math.inf: 8**0.5}[norm]
        torch.testing.assert_close(radius, perturbation.eps_of(x) * expected)


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("data_range", [{}, {"x_L": 0.0, "x_U": 1.0}], ids=["ball", "range"])
def test_minimum_is_below_every_point_and_attained(x, norm, data_range):
    """Attained without a range, and with one for p = 2 and inf: by a solver's point (SLSQP)."""
    perturbation = PerturbationLpNorm(0.4, norm, **data_range)
    a = torch.randn(3, 5, 8, dtype=torch.float64)
    bound = perturbation.minimum(a, x)
    points = samples(x, perturbation, 500, generator()).flatten(2)
    values = torch.einsum("bsn,kbn->kbs", a, points)
    assert (values.amin(0) >= bound - 1e-12).all()
    loose = perturbation.minimum(a, x, exact=False)
    assert (loose <= bound + 1e-12).all()
    if data_range and norm not in (2, math.inf):
        return
    row, center = a[0, 0].numpy(), x[0].flatten().numpy()
    low, high = (end[0].flatten().numpy() for end in perturbation.box(x))
    size = 1.0 if norm == math.inf else norm
    limit = [] if norm == math.inf else [
        {"type": "ineq", "fun": lambda v: 0.4**size - (np.abs(v - center) ** size).sum()}
    ]  # fmt: skip
    if norm == 1:
        best = (row * center).sum() - 0.4 * np.abs(row).max()
    else:
        start = center - 1e-3 * row
        options = {"ftol": 1e-14, "maxiter": 1000}
        solved = minimize(
            lambda v: row @ v, start, jac=lambda v: row, bounds=list(zip(low, high, strict=True)), constraints=limit,
            options=options,
        )  # fmt: skip
        best = solved.fun
    assert abs(best - float(bound[0, 0])) <= 1e-6


def test_l2_range_is_used_jointly(x):
    """The exact minimum over ball and range is above that of the ball and that of the box."""
    perturbation = PerturbationLpNorm(0.8, 2, x_L=0.0, x_U=1.0)
    a = torch.randn(3, 50, 8, dtype=torch.float64)
    assert (perturbation.minimum(a, x) > perturbation.minimum(a, x, exact=False) + 1e-3).any()


def test_outside_of_the_range_is_refused(x):
    perturbation = PerturbationLpNorm(0.1, 2, x_L=0.0, x_U=1.0)
    perturbation.check(x)
    for bad in (x - 1, x + 1):
        with pytest.raises(InvalidInputError, match="leaves the data range"):
            perturbation.check(bad)
    with pytest.raises(InvalidInputError, match="NaN"):
        perturbation.check(torch.full_like(x, math.nan))


def _small_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["inside", "outside"])
@pytest.mark.parametrize("method", ["bcp", "lipschitz", "bcp-crown", "IBP", "CROWN-IBP", "CROWN"])
def test_bare_box_is_bounded_wherever_the_center_lies(x, method, shift):
    """As in the engine the set is [x_L, x_U] alone: the example input may be anything."""
    torch.manual_seed(0)
    model = _small_net()
    perturbation = PerturbationLpNorm(x_L=x - 0.1, x_U=x + torch.rand_like(x) * 0.3)
    graph = BoundedModule(model, x)
    bounds = graph.compute_bounds(x=(BoundedTensor(x + shift, perturbation),), method=method)
    assert_contains(bounds, extremes(model, x, perturbation), method)


def test_take_picks_and_repeats_samples(x):
    index = torch.tensor([2, 0, 0])
    eps, low = torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype), x - 0.15
    taken = PerturbationLpNorm(eps, 2, x_L=low, x_U=2.0).take(index, x)
    assert torch.equal(taken.eps_of(x[index]), eps[index])
    whole, some = PerturbationLpNorm(eps, 2, x_L=low, x_U=2.0).box(x), taken.box(x[index])
    assert torch.equal(some[0], whole[0][index])
    assert torch.equal(some[1], whole[1][index])
    shared = PerturbationLpNorm(0.1, 2, x_L=torch.zeros(2, 4), x_U=torch.ones(2, 4)).take(index, x)
    assert torch.equal(shared.box(x[index])[0], (x[index] - 0.1).clamp(min=0))


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 3)], ids=str)
def test_per_sample_range_is_taken_whatever_the_rank(shape):
    """A batch axis is told from the sample's own by the rank of the input, which differs between models."""
    torch.manual_seed(0)
    x = torch.rand(shape, dtype=torch.float64)
    low, high = x - torch.rand_like(x) * 0.1, x + torch.rand_like(x) * 0.1
    perturbation, index = PerturbationLpNorm(1.0, 2, x_L=low, x_U=high), torch.tensor([2, 1, 0, 0])
    assert torch.equal(perturbation.take(index, x).box(x[index])[0], perturbation.box(x)[0][index])


def test_per_sample_range_of_vectors_is_sound_in_the_ascent():
    """End to end: as many pending rows as samples, so that a range of other samples would go unnoticed."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    x = torch.rand(2, 4, dtype=torch.float64)
    low, high = x.clone(), x.clone()
    low[1], high[1] = x[1] - 1, x[1] + 1  # sample 0 cannot move, sample 1 can
    perturbation = PerturbationLpNorm(1.0, 2, x_L=low, x_U=high)
    row = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64).expand(2, 2, 2).clone()
    row = row * (2 * (model(x)[:, :1, None] > 0) - 1)
    graph = BoundedModule(model, x)
    bounded = BoundedTensor(x, perturbation)
    bounds = graph.compute_bounds(x=(bounded,), C=row, method="bcp-alpha-crown", early_stop=False)
    assert_contains(bounds, extremes(model, x, perturbation, row))


# --- ranges that leave next to nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("width", [0.0, 1e-6], ids=["a point", "hardly more"])
@pytest.mark.parametrize("eps", [0.5, torch.tensor([0.5, 0.0, 2.0])], ids=["one", "each"])
def test_a_range_that_is_the_input_is_refused(x, norm, width, eps):
    """As the engine's examples write it for l2, where the engine ignores it."""
    perturbation = PerturbationLpNorm(eps, norm, x_L=x - width, x_U=x + width)
    with pytest.raises(InvalidInputError, match=r"next to nothing of the ball.*leave eps out"):
        perturbation.check(x)
    model = _small_net()
    for method in ("bcp", "IBP", "CROWN"):
        with pytest.raises(InvalidInputError, match="next to nothing"):
            BoundedModule(model, x).compute_bounds(x=(BoundedTensor(x, perturbation),), method=method)


@pytest.mark.parametrize("eps", [0.5, torch.tensor([0.0, 0.5]), np.float64(0.1)], ids=["float", "tensor", "numpy"])
def test_a_range_of_one_number_is_refused(eps):
    with pytest.raises(InvalidInputError, match=r"single point 0\.25, .*leave eps out"):
        PerturbationLpNorm(eps, 2, x_L=0.25, x_U=0.25)


def test_ranges_that_people_have_pass(x):
    """Numbers whatever eps is, borders, constant pixels, a patch, some samples that are fixed, and eps = 0."""
    patch = x.clone()
    patch[:, 0, 0] = 0.0
    fixed = x.clone()
    fixed[1:] = -1.0
    for norm in NORMS:
        for lower, upper, eps, center in (
            (0.0, 1.0, 1e6, x),
            (torch.tensor(0.0), torch.tensor(1.0), 1e6, x),
            (torch.zeros(2, 4), torch.ones(2, 4), 5.0, x.round()),
            (patch, patch.clone().index_fill_(2, torch.tensor([0]), 1.0).maximum(x), 0.5, x),
            (fixed, fixed + 2 * (fixed < 0), 0.5, fixed),
            (x, x, 0.0, x),
            (None, x, 0.5, x),
            (x, None, 0.5, x),
        ):
            PerturbationLpNorm(eps, norm, x_L=lower, x_U=upper).check(center)
    PerturbationLpNorm(x_L=x, x_U=x).check(x)
    PerturbationLpNorm(0.0, 2, x_L=0.25, x_U=0.25)


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("data_range", [{}, {"x_L": 0.0, "x_U": 1.0}], ids=["ball", "range"])
def test_towards_a_direction_is_on_the_border(x, norm, data_range):
    perturbation = PerturbationLpNorm(torch.tensor([0.1, 0.5, 2.0], dtype=x.dtype), norm, **data_range)
    point = perturbation.towards(x, torch.randn_like(x))
    reach = torch.linalg.vector_norm((point - x).flatten(1), ord=norm, dim=1)
    assert (reach <= perturbation.eps_of(x) * (1 + 1e-12)).all()
    if data_range:
        assert ((point >= 0) & (point <= 1)).all()
    else:
        torch.testing.assert_close(reach, perturbation.eps_of(x))
    box = PerturbationLpNorm(x_L=x - 1, x_U=x + 3)
    torch.testing.assert_close(box.towards(x, torch.ones_like(x)), x + 3)
    torch.testing.assert_close(box.towards(x, -torch.ones_like(x)), x - 1)


# --- the engine's own class --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1, 2, 3])
def test_the_engines_own_class_has_no_range_but_for_boxes(x, norm):
    """Its ball is not cut, nor is it refused where x_L = x_U = x."""
    theirs = engine.EnginePerturbationLpNorm(norm=norm, eps=0.3, x_L=x, x_U=x)
    ours = PerturbationLpNorm.of(theirs)
    assert (ours.range_lower, ours.range_upper) == (None, None)
    ball, model = PerturbationLpNorm(0.3, norm), _small_net()
    graph = BoundedModule(model, x)
    for method in ("bcp", "IBP", "CROWN"):
        bounds = graph.compute_bounds(x=(engine.BoundedTensor(x, theirs),), method=method)
        torch.testing.assert_close(bounds, graph.compute_bounds(x=(BoundedTensor(x, ball),), method=method))
        assert_contains(bounds, extremes(model, x, ball), method)


@pytest.mark.parametrize("given", ["x_L", "x_U"])
def test_one_end_of_the_engines_own_box(x, given):
    """It takes the place of x - eps or x + eps, and may lie farther out."""
    ends = {"x_L": x - 2, "x_U": x + 2}
    theirs = engine.EnginePerturbationLpNorm(norm=math.inf, eps=0.3, **{given: ends[given]})
    lower, upper = PerturbationLpNorm.of(theirs, x).box(x)
    assert torch.equal(lower, ends["x_L"] if given == "x_L" else x - 0.3)
    assert torch.equal(upper, ends["x_U"] if given == "x_U" else x + 0.3)
    model = _small_net()
    bounds = BoundedModule(model, x).compute_bounds(x=(engine.BoundedTensor(x, theirs),), method="bcp")
    assert_contains(bounds, extremes(model, x, PerturbationLpNorm(x_L=lower, x_U=upper)))


def test_of_the_engines_own_class(x):
    theirs = engine.EnginePerturbationLpNorm(norm=2, eps=0.3)
    ours = PerturbationLpNorm.of(theirs)
    assert (ours.norm, ours.radius) == (2.0, 0.3)
    assert PerturbationLpNorm.of(ours) is ours
    box = engine.EnginePerturbationLpNorm(norm=math.inf, eps=0.3, x_L=x - 0.1, x_U=x + 0.2)
    assert torch.equal(PerturbationLpNorm.of(box).box(x)[1], x + 0.2)
    plain = PerturbationLpNorm.of(engine.EnginePerturbationLpNorm(norm=math.inf, eps=0.3))
    assert torch.equal(plain.box(x)[0], x - 0.3)


def test_the_engines_own_class_bounds_like_ours(x):
    torch.manual_seed(0)
    graph = BoundedModule(_small_net(), x)
    theirs = engine.BoundedTensor(x, engine.EnginePerturbationLpNorm(norm=2, eps=0.3))
    for method in ("bcp", "CROWN", "IBP"):
        expected = graph.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(0.3, 2)),), method=method)
        torch.testing.assert_close(graph.compute_bounds(x=(theirs,), method=method), expected)
    assert type(theirs.ptb) is engine.EnginePerturbationLpNorm, "the user's own perturbation was changed"


def test_positional_arguments_are_the_engines():
    """norm=..., eps=... by name as in the engine; by position, (eps, norm) as in the engine."""
    assert PerturbationLpNorm(0.3, 2).norm == engine.EnginePerturbationLpNorm(0.3, 2).norm
    assert "eps=0.3" in repr(PerturbationLpNorm(norm=2, eps=0.3))
