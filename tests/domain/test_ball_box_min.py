"""Minima over ball INTERSECT box: against a sorted longdouble oracle, SLSQP, grids, and sampled feasible points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lirpa_ext.domain import ball_box_min as support
from lirpa_ext.domain.ball_box_min import ball_box_min, merged_min, relu_ball_box_min, relu_ball_box_value
from lirpa_ext.errors import InvalidInputError

F64 = torch.float64


def oracle(c, center, radius, lower, upper):
    """The minimum of c.v in longdouble: walk over the sorted breakpoints of ||d(t)||, d_i = min(t |c_i|, room_i)."""
    c, center, lower, upper = (np.asarray(x, np.longdouble) for x in (c, center, lower, upper))
    room = np.where(c > 0, center - lower, upper - center)
    size, radius, base = np.abs(c), np.longdouble(radius), (c * center).sum()
    size, room = size[(c != 0) & (room > 0)], room[(c != 0) & (room > 0)]
    if np.isfinite(room).all() and (room**2).sum() <= radius**2:
        return float(base - (size * room).sum())
    order = np.argsort(room / size)
    size, room = size[order], room[order]
    pinned = np.concatenate([[0], np.cumsum(room**2)[:-1]])
    free = np.cumsum((size**2)[::-1])[::-1]
    index = np.argmax(pinned + (room / size) ** 2 * free >= radius**2)  # the first breakpoint outside of the ball
    t = np.sqrt((radius**2 - pinned[index]) / free[index])
    return float(base - (size * np.minimum(t * size, room)).sum())


def problem(batch, rows, n, radius, seed=0, dtype=F64, width=1.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(batch, rows, n, generator=g, dtype=F64) * scale
    z = torch.randn(batch, n, generator=g, dtype=F64)
    low, high = (torch.rand(2, batch, n, generator=g, dtype=F64) * width).unbind()
    rho = torch.full((batch,), radius, dtype=F64)
    return tuple(x.to(dtype) for x in (c, z, rho, z - low, z + high))


def expected(c, z, rho, lower, upper):
    rows = [[oracle(row, z[b], rho[b], lower[b], upper[b]) for row in c[b]] for b in range(len(z))]
    return torch.tensor(rows, dtype=F64)


def feasible(z, rho, lower, upper, count=200, seed=0):
    """Points of the set, many on its boundary: convex in v and around z, so a step from z may be scaled back."""
    g = torch.Generator().manual_seed(seed)
    step = torch.randn(count, *z.shape, generator=g, dtype=z.dtype) * rho.unsqueeze(-1) * 3
    step = torch.maximum(torch.minimum(z + step, upper), lower) - z
    norm = step.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    return z + step * (rho.unsqueeze(-1) / norm).clamp(max=1)


def assert_finite_gradients(value, *inputs):
    assert value.isfinite().all()
    for gradient in torch.autograd.grad(value.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 100_000])
@pytest.mark.parametrize("radius", [0.0, 1e-30, 1.0, 30.0, 1e20])
def test_exact_is_the_minimum(n, radius):
    args = problem(2, 3 if n <= 1000 else 1, n, radius)
    # Relative to the moved part: without the center, no large c.z hides an error.
    c, z, rho, lower, upper = args
    shifted = (c, torch.zeros_like(z), rho, lower - z, upper - z)
    want = expected(*shifted)
    assert torch.allclose(ball_box_min(*shifted), want, rtol=1e-9, atol=0)
    assert torch.allclose(ball_box_min(*args), want + (c @ z.unsqueeze(-1)).squeeze(-1), rtol=1e-9, atol=1e-9)
    assert torch.allclose(ball_box_min(*shifted, solver="iterative"), want, rtol=1e-9, atol=0)
    single = tuple(x.float() for x in shifted)
    want = expected(*(x.double() for x in single))
    assert torch.allclose(ball_box_min(*single).double(), want, rtol=2e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e10])
@pytest.mark.parametrize("radius", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_scales_neither_overflow_nor_lose_precision(scale, radius, dtype):
    c, z, rho, lower, upper = problem(2, 3, 40, radius / 2, dtype=dtype, scale=scale, width=radius)
    z, lower, upper = z * 0, (lower - z) * 0 - radius / 8, (upper - z) * 0 + radius / 16
    want = expected(*(x.double() for x in (c, z, rho, lower, upper)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert torch.allclose(ball_box_min(c, z, rho, lower, upper).double(), want, rtol=tolerance, atol=0)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_a_general_solver_agrees(n):
    c, z, rho, lower, upper = problem(1, 1, n, 0.7, seed=n)
    ball = {"type": "ineq", "fun": lambda v: float(rho**2 - ((v - z[0].numpy()) ** 2).sum())}
    found = minimize(
        lambda v: float(c[0, 0].numpy() @ v),
        z[0].numpy(),
        method="SLSQP",
        bounds=list(zip(lower[0].tolist(), upper[0].tolist(), strict=True)),
        constraints=[ball],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.success
    assert ball_box_min(c, z, rho, lower, upper).item() == pytest.approx(found.fun, abs=1e-6)


def test_breakpoints_one_per_newton_step_are_sorted(monkeypatch):
    # room_i / |c_i| grows geometrically, so Newton binds about one coordinate per step; small n first.
    for n, ratio in ((200, 2.0), (100_000, 1.001)):
        i = torch.arange(n, dtype=F64)
        c = (ratio ** -(i % 900)).view(1, 1, n)
        room = (1 + 0.01 * (i % 7)).view(1, n)
        z, rho = torch.zeros(1, n, dtype=F64), torch.tensor([0.999 * room.norm()], dtype=F64)
        used = []
        original = support._sorted_root
        monkeypatch.setattr(support, "_sorted_root", lambda *x, f=original, u=used: u.append(1) or f(*x))
        got = ball_box_min(c, z, rho, -room, room)
        monkeypatch.setattr(support, "_sorted_root", original)
        assert torch.allclose(got, expected(c, z, rho, -room, room), rtol=1e-9, atol=0)
        if n == 200:
            assert used  # else this test says nothing
            early = [ball_box_min(c, z, rho, -room, room, max_steps=k).item() for k in (0, 1, 5, 20, 200)]
            assert early == sorted(early) and early[-1] == pytest.approx(got.item(), rel=1e-9)
            assert ball_box_min(c, z, rho, -room, room, solver="iterative").item() == pytest.approx(
                got.item(), rel=1e-9
            )


@pytest.mark.parametrize("seed", range(5))
def test_sorted_root_is_the_root(seed):
    slope, cap = torch.rand(2, 3, 4, 50, generator=torch.Generator().manual_seed(seed), dtype=F64).unbind()
    limit = cap.sum(-1, keepdim=True) * 0.6
    s = support._sorted_root(slope, cap, limit)
    assert torch.allclose(torch.minimum(s * slope, cap).sum(-1, keepdim=True), limit, rtol=1e-12)


def test_ties_are_solved():
    n = 12
    c = torch.tensor([[[1.0] * 6 + [-2.0] * 6, [1.0] * n]], dtype=F64)
    z = torch.zeros(1, n, dtype=F64)
    for radius in (0.1, 0.5 * 12**0.5, 1.0, 2.0):
        rho = torch.tensor([radius], dtype=F64)
        args = c, z, rho, z - 0.5, z + 0.5
        assert torch.allclose(ball_box_min(*args), expected(*args), rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([0.01, 0.3, 1.0, 5.0]), st.booleans())
def test_lower_bound_of_sampled_points_also_when_stopped_early(seed, n, radius, iterative):
    args = problem(2, 3, n, radius, seed=seed)
    c, z, rho, lower, upper = args
    points = feasible(z, rho, lower, upper, seed=seed)
    sampled = torch.einsum("bsn,kbn->kbs", c, points).amin(0)
    previous = torch.full_like(sampled, -torch.inf)
    for steps in (0, 1, 2, 10, None):
        value = ball_box_min(*args, solver="iterative" if iterative else "exact", max_steps=steps)
        assert (value <= sampled + 1e-9).all()
        assert (value >= previous - 1e-9).all()
        previous = value
    assert torch.allclose(previous, expected(*args), rtol=1e-9, atol=1e-9)


def test_iterative_is_algorithm_1_step_by_step():
    c, z, rho, lower, upper = problem(1, 1, 30, 1.5, seed=3, width=0.5)
    p = -rho * c[0, 0] / c[0, 0].norm()
    low, high = (lower - z)[0], (upper - z)[0]
    for steps in range(5):
        want = c[0, 0] @ (z[0] + p)
        assert ball_box_min(c, z, rho, lower, upper, "iterative", max_steps=steps).item() == pytest.approx(want.item())
        bound = (p <= low) | (p >= high)
        kept = p.clamp(low, high)[bound]
        eta = ((rho**2 - kept.square().sum()) / p[~bound].square().sum()).sqrt()  # (3.2.12)
        p = torch.where(bound, p.clamp(low, high), eta * p)


def test_ball_only_box_only_and_one_side():
    c, z, rho, lower, upper = problem(3, 4, 6, 0.8)
    linear = (c @ z.unsqueeze(-1)).squeeze(-1)
    infinite = torch.full_like(rho, torch.inf)
    corner = linear + torch.minimum(c * (lower - z).unsqueeze(1), c * (upper - z).unsqueeze(1)).sum(-1)
    assert torch.allclose(ball_box_min(c, z, rho), linear - 0.8 * c.norm(dim=-1), rtol=1e-12)
    assert torch.allclose(ball_box_min(c, z, infinite, lower, upper), corner, rtol=1e-12)
    assert torch.allclose(ball_box_min(c, z, rho * 1e9, lower, upper), corner, rtol=1e-12)
    far = torch.full_like(z, torch.inf)
    want = ball_box_min(c, z, rho, lower, z + 10)
    assert torch.allclose(ball_box_min(c, z, rho, lower), want, rtol=1e-12)
    assert torch.allclose(ball_box_min(c, z, rho, lower, far), want, rtol=1e-12)
    assert (ball_box_min(c, z, infinite) == -torch.inf).all()  # unbounded


@pytest.mark.parametrize("solver", ["exact", "iterative"])
@pytest.mark.parametrize("radius", [0.4, 1.2, 50.0])
def test_gradient_is_that_of_the_minimum(solver, radius):
    args = tuple(x.requires_grad_() for x in problem(2, 2, 5, radius, seed=1))
    assert torch.autograd.gradcheck(lambda *x: ball_box_min(*x, solver=solver), args, atol=1e-6)
    stopped = args if solver == "iterative" else ()
    if stopped:
        assert torch.autograd.gradcheck(lambda *x: ball_box_min(*x, solver=solver, max_steps=1), stopped, atol=1e-6)


@pytest.mark.parametrize("solver", ["exact", "iterative"])
@pytest.mark.parametrize("steps", [0, 1, None])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("radius", [0.0, 1e-30, 1.0, 1e20])
@pytest.mark.parametrize("case", ["plain", "zero rows", "zero width", "corner", "one", "zeros in row", "dead"])
def test_degenerate_sets_have_finite_values_and_gradients(case, radius, dtype, steps, solver):
    c, z, rho, lower, upper = problem(2, 3, 1 if case == "one" else 7, radius, dtype=dtype)
    if case == "zero rows":
        c = c * 0
    elif case == "zero width":
        lower = upper = z.clone()
    elif case == "corner":
        lower, upper = z - radius / 100, z + radius / 100
    elif case == "zeros in row":
        c[..., ::2] = 0
    elif case == "dead":
        lower, upper = torch.where(z > 0, lower, z), torch.where(z > 0, upper, z)
    inputs = tuple(x.clone().requires_grad_() for x in (c, z, rho, lower, upper))
    value = ball_box_min(*inputs, solver=solver, max_steps=steps)
    assert_finite_gradients(value, *inputs)
    started = steps != 0 or solver == "exact"  # Algorithm 1 starts from the ball alone
    if case == "zero rows" or radius == 0 or (case == "zero width" and started):
        assert torch.allclose(value, (c @ z.unsqueeze(-1)).squeeze(-1), atol=1e-6)


def test_gradient_in_the_radius_at_radius_zero_is_the_norm_over_free_coordinates():
    c, z, rho, lower, upper = problem(1, 1, 6, 0.0)
    lower[0, :2] = upper[0, :2] = z[0, :2]
    rho.requires_grad_()
    (slope,) = torch.autograd.grad(ball_box_min(c, z, rho, lower, upper).sum(), rho)
    assert slope.item() == pytest.approx(-c[0, 0, 2:].norm().item())


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_nan_in_gives_nan_out(place, solver):
    args = list(problem(2, 3, 4, 1.0))
    for index in range(4 if place != 2 else 1):
        broken = [x.clone() for x in args]
        broken[place].view(2, -1)[0, index] = torch.nan
        value = ball_box_min(*broken, solver=solver)
        if place == 0:  # only that row
            assert value[0, 0].isnan() and value.isfinite().sum() == 5
        else:
            assert value[0].isnan().all() and value[1].isfinite().all()
    negative = args[2].clone()
    negative[0] = -1
    assert ball_box_min(args[0], args[1], negative, *args[3:])[0].isnan().all()


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_merged_chunked_and_shared_rows_agree(solver):
    _, z, rho, lower, upper = (x.requires_grad_() for x in problem(3, 1, 8, 0.9))
    g = torch.Generator().manual_seed(5)
    C = torch.randn(3, 7, 4, generator=g, dtype=F64, requires_grad=True)
    weight = torch.randn(4, 8, generator=g, dtype=F64, requires_grad=True)
    inputs = C, weight, z, rho, lower, upper
    want = ball_box_min(C @ weight, z, rho, lower, upper, solver=solver)
    gradients = torch.autograd.grad(want.square().sum(), inputs)
    for chunk in (2**24, 3 * 8 * 2, 1):
        got = merged_min(*inputs, solver=solver, chunk=chunk)
        assert torch.allclose(got, want, rtol=1e-12)
        for a, b in zip(torch.autograd.grad(got.square().sum(), inputs), gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            assert torch.allclose(ball_box_min(C @ weight, *inputs[2:], chunk=chunk, solver=solver), want)
    shared = ball_box_min((C @ weight)[:1].expand(3, -1, -1), z, rho, lower, upper)
    assert torch.allclose(ball_box_min((C @ weight)[0], z, rho, lower, upper), shared)
    assert torch.allclose(merged_min(C[:1], weight, z, rho, lower, upper), shared)


def test_wrong_arguments_are_named():
    c, z, rho, lower, upper = problem(2, 3, 4, 1.0)
    for call in (
        lambda: ball_box_min(c[..., :3], z, rho, lower, upper),
        lambda: ball_box_min(c, z, rho[:1], lower, upper),
        lambda: ball_box_min(c, z, rho, lower[:, :2], upper),
        lambda: ball_box_min(c, z, rho, lower, upper, solver="simplex"),
        lambda: ball_box_min(c, z, rho, lower, upper, chunk=0),
        lambda: ball_box_min(c, z, rho, lower, upper, max_steps=-1),
        lambda: merged_min(c, z, z, rho),
        lambda: relu_ball_box_min(c, c[:1], z, rho, lower, upper),
        lambda: relu_ball_box_min(c, c, z, rho, lower, upper, steps=0),
        lambda: relu_ball_box_value(c, c, z, rho, lower, upper, rho),
    ):
        with pytest.raises(InvalidInputError, match=r"\d"):
            call()


# The ReLU version


def relu_problem(batch, rows, n, radius, seed=0, dtype=F64):
    a, z, rho, lower, upper = problem(batch, rows, n, radius, seed=seed, dtype=dtype)
    lam = a * torch.rand(a.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return a, lam, z, rho, lower, upper


def relu_function(a, lam, v):
    return torch.einsum("bsn,kbn->kbs", a, v.relu()) - torch.einsum("bsn,kbn->kbs", lam, v)


def reference_value(a, lam, z, rho, lower, upper, mu):
    """The dual value by brute force: the best of corners, kink and stationary points, each where it is in the box."""
    mu, z, lower, upper = mu.unsqueeze(-1), z.unsqueeze(1), lower.unsqueeze(1), upper.unsqueeze(1)
    ones = torch.ones_like(a)
    candidates = [lower * ones, upper * ones, 0 * ones]
    if (mu > 0).all():
        candidates += [z - (a - lam) / mu, z + lam / mu]
    best = torch.full_like(a, torch.inf)
    for v in candidates:
        value = a * v.relu() - lam * v + mu / 2 * (v - z) ** 2
        best = torch.where((v >= lower) & (v <= upper), torch.minimum(best, value), best)
    return best.sum(-1) - mu.squeeze(-1) / 2 * rho.unsqueeze(-1) ** 2


@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("mu", [0.0, 1e-3, 0.5, 4.0, 1e6])
def test_relu_value_is_the_dual_function(n, mu):
    args = relu_problem(3, 4, n, 0.9, seed=n)  # rho > width / 3: the box is not cut
    mu = torch.full((3, 4), mu, dtype=F64)
    assert torch.allclose(relu_ball_box_value(*args, mu), reference_value(*args, mu), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50), st.sampled_from([0.05, 0.5, 2.0, 20.0]), st.floats(-12, 12))
def test_relu_bounds_hold_on_sampled_points_for_any_mu(seed, n, radius, log_mu):
    args = relu_problem(2, 3, n, radius, seed=seed)
    sampled = relu_function(*args[:2], feasible(*args[2:], seed=seed)).amin(0)
    mu = torch.full((2, 3), log_mu, dtype=F64).exp()
    best, start = relu_ball_box_min(*args)
    for value in (
        relu_ball_box_value(*args, mu),
        best,
        relu_ball_box_min(*args, steps=1)[0],
        relu_ball_box_min(*args, log_mu=start, steps=2)[0],
        relu_ball_box_min(*args, log_mu=mu.log(), steps=3)[0],
    ):
        assert (value <= sampled + 1e-9 * (1 + sampled.abs())).all()
    assert start.isfinite().all()
    assert (best >= relu_ball_box_value(*args, 0 * mu) - 1e-9).all()
    assert (relu_ball_box_min(*args, steps=1)[0] >= relu_ball_box_value(*args, 0 * mu) - 1e-9).all()


@pytest.mark.parametrize("seed", range(4))
def test_relu_min_is_the_best_of_a_dense_grid_of_mu(seed):
    args = relu_problem(2, 5, 20, 0.8, seed=seed)
    grid = torch.linspace(-8, 6, 4001, dtype=F64).exp()
    best = torch.stack([relu_ball_box_value(*args, mu.expand(2, 5)) for mu in grid]).amax(0)
    value, log_mu = relu_ball_box_min(*args, steps=40)
    assert (value >= best - 1e-9).all() and (value <= best + 1e-3).all()
    warm, _ = relu_ball_box_min(*args, log_mu=log_mu, steps=1)
    assert torch.allclose(warm, value, rtol=0, atol=1e-9)
    assert (relu_ball_box_min(*args)[0] >= value - 1e-3).all()


def test_relu_min_is_the_minimum_where_it_is_convex_in_two_dimensions():
    # a >= 0 makes the function convex: no duality gap, so a dense grid over the set meets the bound.
    a, lam, z, rho, lower, upper = relu_problem(3, 4, 2, 0.6, seed=2)
    a = a.abs()
    axes = [torch.linspace(0, 1, 1201, dtype=F64)] * 2
    unit = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 1, 2)
    points = lower + unit * (upper - lower)
    inside = ((points - z).norm(dim=-1) <= rho).unsqueeze(-1)
    grid = torch.where(inside, relu_function(a, lam, points), torch.inf).amin(0)
    value = relu_ball_box_min(a, lam, z, rho, lower, upper, steps=40)[0]
    assert (value <= grid + 1e-12).all() and (value >= grid - 5e-3).all()


def test_relu_min_with_the_box_active_is_linear():
    # All neurons on: a.relu(v) - lam.v = (a - lam).v; all off: -lam.v. Then it is the linear minimum.
    a, lam, z, rho, lower, upper = relu_problem(2, 3, 10, 0.7)
    for shift, c in ((5.0, a - lam), (-5.0, -lam)):
        moved = z + shift, rho, lower + shift, upper + shift
        value = relu_ball_box_min(a, lam, *moved, steps=40)[0]
        assert torch.allclose(value, ball_box_min(c, *moved), rtol=1e-9, atol=1e-9)


def test_relu_value_without_multiplier_is_the_bias_of_crown():
    a, _, z, rho, lower, upper = relu_problem(3, 4, 30, 1e3)
    low, high = lower.clamp(max=0).unsqueeze(1), upper.clamp(min=0).unsqueeze(1)
    line = (high / (high - low)).nan_to_num(0)
    slope = torch.where(a < 0, line, ((upper + lower) > 0).to(F64).unsqueeze(1))
    slope = torch.where((lower > 0).unsqueeze(1), 1.0, torch.where((upper < 0).unsqueeze(1), 0.0, slope))
    bias = (a.clamp(max=0) * torch.where((lower < 0).unsqueeze(1), -line * low, 0.0)).sum(-1)
    value = relu_ball_box_value(a, slope * a, z, rho, lower, upper, torch.zeros(3, 4, dtype=F64))
    assert torch.allclose(value, bias, rtol=1e-9, atol=1e-9)
    assert torch.allclose(relu_ball_box_min(a, slope * a, z, rho, lower, upper)[0], bias, rtol=1e-9, atol=1e-9)
    assert (relu_ball_box_min(a, slope * a, z, rho * 1e-4, lower, upper)[0] > bias).all()


def test_relu_gradients():
    args = tuple(x.requires_grad_() for x in relu_problem(2, 2, 4, 0.6, seed=4))
    mu = torch.rand(2, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * 3
    assert torch.autograd.gradcheck(relu_ball_box_value, (*args, mu.requires_grad_()), atol=1e-6)
    shifted = tuple(x.detach() for x in args)
    convex = (shifted[0].abs(), *shifted[1:])
    convex = tuple(x.clone().requires_grad_() for x in convex)
    assert torch.autograd.gradcheck(lambda *x: relu_ball_box_min(*x, steps=60)[0], convex, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("radius", [0.0, 1e-30, 1.0, 1e20, torch.inf])
@pytest.mark.parametrize("case", ["plain", "zero rows", "zero width", "at the kink", "dead", "one"])
def test_relu_degenerate_sets(case, radius, dtype):
    a, lam, z, rho, lower, upper = relu_problem(2, 3, 1 if case == "one" else 7, radius, dtype=dtype)
    if case == "zero rows":
        a, lam = a * 0, lam * 0
    elif case == "zero width":
        lower = upper = z.clone()
    elif case == "at the kink":
        z = z * 0
        lower, upper = z, z + 1
    elif case == "dead":
        lower, upper, z = lower - 9, upper - 9, z - 9
    inputs = tuple(x.clone().requires_grad_() for x in (a, lam, z, rho, lower, upper))
    value, log_mu = relu_ball_box_min(*inputs)
    assert log_mu.isfinite().all()
    assert_finite_gradients(value, *inputs)
    mu = torch.full((2, 3), 0.0 if radius == torch.inf else 2.0, dtype=dtype, requires_grad=True)
    if radius < 1e20:
        assert_finite_gradients(relu_ball_box_value(*inputs, mu), *inputs, mu)
    direct = relu_function(a, lam, z.unsqueeze(0))[0]
    if radius == 0 or case == "zero width":
        assert torch.allclose(value, direct, atol=1e-5 if dtype == torch.float32 else 1e-9)
    if radius == 0:
        assert torch.allclose(relu_ball_box_value(*inputs, mu), direct, atol=1e-5)
    again, _ = relu_ball_box_min(*inputs, log_mu=log_mu, steps=2)
    assert again.isfinite().all()


@pytest.mark.parametrize("place", range(7))
def test_relu_nan_in_gives_nan_out(place):
    args = [*relu_problem(2, 3, 4, 1.0), torch.ones(2, 3, dtype=F64)]
    for index in range(1 if place == 3 else 3):
        broken = [x.clone() for x in args]
        broken[place].view(2, -1)[0, index] = torch.nan
        values = [relu_ball_box_value(*broken)]
        if place < 6:
            values.append(relu_ball_box_min(*broken[:6])[0])
        for value in values:
            row = value[0] if 2 <= place < 6 else value[0, index if place == 6 else 0]
            assert row.isnan().all() and value[1].isfinite().all()
