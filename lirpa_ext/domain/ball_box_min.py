"""Minima over the intersection of a ball and a box: of a linear function, and of a linear function of v and relu(v).

Every bound here is a Lagrangian dual value: the ball gets one multiplier mu for each row, and the box separates by
coordinate. By weak duality every mu >= 0 gives a sound bound, so the search for the best mu may be inexact and needs
no gradient. By the envelope theorem, the gradient of the value at the best mu is that of the minimum itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InvalidInputError
from .lengths import length

__all__ = ["ball_box_min", "merged_min", "relu_ball_box_min", "relu_ball_box_value"]

# Rows of a network need 4 to 8 steps. Geometric breakpoints can take one step each: after this many, they are sorted.
_NEWTON_STEPS = 30
_LOG_SPAN = 30.0  # log mu is sought within this distance of its estimated scale

_Multipliers = tuple[Tensor, Tensor]  # mu, and the mu whose active set is in force


class _Region(NamedTuple):
    """A ball intersected with a box, in units of a per-sample `length` so that no square over- or underflows."""

    center: Tensor  # (B, n)
    length: Tensor  # (B, 1), detached: min(radius, farthest side of the box)
    radius: Tensor  # (B, 1, 1), at least 1, or 0
    down: Tensor  # (B, 1, n), room below the center, in [0, 3]
    up: Tensor  # (B, 1, n), room above the center
    unbounded: Tensor  # (B, 1), where the set is unbounded; the other fields then describe a bounded part of the set


def ball_box_min(
    c: Tensor,
    center: Tensor,
    radius: Tensor,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    solver: str = "exact",
    max_steps: int | None = None,
    chunk: int = 2**24,
) -> Tensor:
    r"""Lower bound of c.v over ||v - z||_2 <= rho, l <= v <= u: the minimum, unless stopped early.

    With room b_i in direction -sign(c_i), for any mu >= 0 and e_i = min(|c_i|, mu b_i) the value is
    ``c.z - sum_i (|c_i| - e_i) b_i - rho ||e||``. Proof: split c = p + (c - p), |p| = e with the signs of c;
    bound p on the ball and c - p on the box. Where ||e|| = mu rho, one point attains both.

    "exact": as a function of s = 1/mu^2, sum_i min(s c_i^2, b_i^2) is concave, increasing and piecewise linear, so
    Newton's method reaches the s at which the sum is rho^2 in finitely many steps. "iterative", Algorithm 1 of Lee
    (2021), takes the same steps but returns c.p for the active set I before the last one. This p minimizes over the
    ball and the sides in I alone, a larger set: the result is a lower bound too, looser after equally many steps and
    equal at convergence. (Clipping p to the box, which Algorithm 1 does not do, would give an upper bound.)

    Args:
        c: Rows, (B, S, n), or (1, S, n) or (S, n) for rows shared by the batch.
        center: z, (B, n). Where z lies outside of the box by rounding, the box is enlarged to contain z.
        radius: rho, (B,), non-negative; infinite for the box alone.
        lower: l, (B, n); None for no lower side. Sides may be infinite where rho is finite.
        upper: u, (B, n); None for no upper side.
        solver: "exact" (default) or "iterative".
        max_steps: Stop after this many steps (opt_iter in Algorithm 1); None (default) runs to convergence.
        chunk: Largest number of elements B * rows * n of a temporary tensor, default 2^24. The rows are processed in
            parts to keep this limit, down to one row a part; with gradients, the backward pass recomputes the parts.

    Returns:
        (B, S), differentiable in c, center, radius, lower and upper. -inf where a sample's set is unbounded and the
        row not 0; NaN where its input is NaN or its radius negative.

    Raises:
        InvalidInputError: Shapes do not fit, the solver is unknown, `max_steps` is negative, or `chunk` is below 1.

    >>> z, one = torch.zeros(1, 2), torch.ones(1, 2)
    >>> c, rho = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
    >>> ball_box_min(c, z, rho), ball_box_min(c, z, rho, -torch.tensor([[1.0, 0.6]]), one)
    (tensor([[-5.]]), tensor([[-4.8000]]))
    """
    return _minimum(c, None, _region(center, radius, lower, upper), solver, max_steps, chunk)


def merged_min(
    C: Tensor,
    weight: Tensor,
    center: Tensor,
    radius: Tensor,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    solver: str = "exact",
    max_steps: int | None = None,
    chunk: int = 2**24,
) -> Tensor:
    """`ball_box_min` of the rows c = C @ weight, formed in parts so that all (B, S, n) never exist at once.

    Args:
        C: Specification rows on the outputs of a linear layer, (B, S, m) or (1, S, m) or (S, m).
        weight: The layer's weight, (m, n). The caller adds C @ bias for a layer with a bias.
        center, radius, lower, upper, solver, max_steps, chunk: As in `ball_box_min`.

    Returns:
        (B, S), differentiable in C and weight too.

    Raises:
        InvalidInputError: As in `ball_box_min`.

    >>> weight = torch.tensor([[4.0, 1.0], [1.0, -3.0]])
    >>> merged_min(torch.tensor([[1.0, -1.0]]), weight, torch.zeros(1, 2), torch.tensor([1.0]))
    tensor([[-5.]])
    """
    if weight.dim() != 2 or C.shape[-1] != weight.shape[0]:
        raise InvalidInputError(f"C {tuple(C.shape)} @ weight {tuple(weight.shape)}: expected (B, S, m) and (m, n).")
    return _minimum(C, weight, _region(center, radius, lower, upper), solver, max_steps, chunk)


def relu_ball_box_value(
    a: Tensor, lam: Tensor, center: Tensor, radius: Tensor, lower: Tensor, upper: Tensor, mu: Tensor
) -> Tensor:
    r"""Lower bound of a.relu(v) - lam.v over ||v - z||_2 <= rho, l <= v <= u, for the given mu >= 0.

    ``sum_i min over l_i <= v_i <= u_i of [a_i relu(v_i) - lam_i v_i + mu/2 (v_i - z_i)^2] - mu/2 rho^2``: per
    coordinate, the smaller of the minima of two clipped parabolas (of corners and kink for mu = 0). Proof: the terms
    with mu sum to at most 0 on the ball. A box that reaches farther than 3 rho from z is first cut there, which
    does not change the set.

    Args:
        a: Coefficients of relu(v), (B, S, n).
        lam: Coefficients of v that a backward pass carries on to the ReLU's input, (B, S, n).
        center: z, (B, n).
        radius: rho, (B,), non-negative; infinite only with mu = 0.
        lower: l, (B, n).
        upper: u, (B, n).
        mu: Multipliers, (B, S).

    Returns:
        (B, S), differentiable in every argument; the value at z where rho is 0; -inf where the set is unbounded; NaN
        as in `ball_box_min`.

    Raises:
        InvalidInputError: Shapes do not fit.

    >>> v = torch.tensor([[0.5]])
    >>> args = torch.tensor([[[-1.0]]]), torch.tensor([[[0.0]]]), v, torch.tensor([0.5]), v - 1, v + 1
    >>> [relu_ball_box_value(*args, torch.tensor([[mu]])).item() for mu in (0.0, 1.0, 2.0, 8.0)]
    [-1.5, -1.125, -1.0, -1.5625]
    """
    region = _region(center, radius, lower, upper)
    _check_rows(a, lam, center, mu)
    return _relu_value(a, lam, region, mu.unsqueeze(-1) * region.length.unsqueeze(-1))


def relu_ball_box_min(
    a: Tensor,
    lam: Tensor,
    center: Tensor,
    radius: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_mu: Tensor | None = None,
    steps: int = 12,
) -> tuple[Tensor, Tensor]:
    r"""Best `relu_ball_box_value` over mu = 0 and `steps` values of mu > 0, never looser than the box alone.

    The value is concave in mu, with slope (||v - z||^2 - rho^2) / 2 at the minimizing v. The root of this slope is
    sought in log mu by regula falsi (the Illinois method). Sound, since every candidate is a bound.

    Args:
        a: Coefficients of relu(v), (B, S, n).
        lam: Coefficients of v, (B, S, n).
        center, radius, lower, upper: As in `relu_ball_box_value`; an infinite radius means the box alone.
        log_mu: Start of the search, (B, S), from an earlier call on nearby arguments; None (default) starts afresh.
        steps: Number of mu > 0 to try, default 12. These come within 1e-3 mu rho^2 of the best; with `log_mu`, 5 do.

    Returns:
        The bounds (B, S), differentiable with mu held fixed, and log of the best mu > 0, (B, S), for the next call.

    Raises:
        InvalidInputError: Shapes do not fit, or `steps` is below 1.

    >>> v = torch.tensor([[0.5]])
    >>> args = torch.tensor([[[-1.0]]]), torch.tensor([[[0.0]]]), v, torch.tensor([0.5]), v - 1, v + 1
    >>> round(relu_ball_box_min(*args)[0].item(), 4)
    -1.0
    """
    region = _region(center, radius, lower, upper)
    _check_rows(a, lam, center, log_mu)
    if steps < 1:
        raise InvalidInputError(f"steps is {steps}; give at least 1.")
    with torch.no_grad():
        log_length = region.length.log()
        start = None if log_mu is None else log_mu.detach() + log_length
        mu, best = _search(a, lam, region, start, steps)
    return _relu_value(a, lam, region, mu), best - log_length


def _region(center: Tensor, radius: Tensor, lower: Tensor | None, upper: Tensor | None) -> _Region:
    """Scale the set to unit length; a set with NaN or a negative radius becomes NaN."""
    shapes = [tuple(x.shape) for x in (center, lower, upper) if x is not None]
    if center.dim() != 2 or 0 in center.shape or len(set(shapes)) > 1 or radius.shape != center.shape[:1]:
        raise InvalidInputError(f"Center and sides {shapes}: expected (B, n); radius {tuple(radius.shape)}: (B,).")
    endless = torch.full_like(center, math.inf)
    down = endless if lower is None else (center - lower).clamp(min=0)
    up = endless if upper is None else (upper - center).clamp(min=0)
    radius = radius.where(radius >= 0, math.nan)
    with torch.no_grad():  # a NaN in any of the three makes the length NaN, and with it the whole sample
        unit = torch.minimum(radius, torch.maximum(down, up).amax(-1)).unsqueeze(-1)
        unbounded = unit == math.inf
        unit = unit.masked_fill((unit == 0) | unbounded, 1)
    # If the unit is a side of the box, no room exceeds 1; if it is the radius, the ball binds before the cut at 3.
    down, up = ((room / unit).clamp(max=3).unsqueeze(1) for room in (down, up))
    return _Region(center, unit, (radius.unsqueeze(-1) / unit).unsqueeze(-1), down, up, unbounded)


def _minimum(
    rows: Tensor, weight: Tensor | None, region: _Region, solver: str, max_steps: int | None, chunk: int
) -> Tensor:
    batch, n = region.center.shape
    width = (rows if weight is None else weight).shape[-1]
    rows = rows.unsqueeze(0) if rows.dim() == 2 else rows
    if rows.dim() != 3 or rows.shape[0] not in (1, batch) or width != n:
        raise InvalidInputError(f"Rows {tuple(rows.shape)} of width {width} do not fit a center {batch, n}.")
    if solver not in ("exact", "iterative") or chunk < 1 or (max_steps or 0) < 0:
        raise InvalidInputError(f"{solver=}, {chunk=}, {max_steps=}: give 'exact' or 'iterative', >= 1, >= 0.")

    def bound(part: Tensor, multipliers: _Multipliers | None = None) -> tuple[Tensor, _Multipliers]:
        c = part if weight is None else part @ weight
        return _linear_value(c, region, solver == "iterative", max_steps, multipliers)

    parts = torch.split(rows, max(1, chunk // (batch * n)), dim=1)
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([bound(part)[0] for part in parts], dim=1)
    values = []
    for part in parts:
        with torch.no_grad():  # solve once, so that only the value is recomputed in the backward pass
            multipliers = bound(part)[1]
        values.append(checkpoint(bound, part, multipliers, use_reentrant=False, preserve_rng_state=False)[0])
    return torch.cat(values, dim=1)


def _linear_value(
    c: Tensor, region: _Region, iterative: bool, max_steps: int | None, multipliers: _Multipliers | None
) -> tuple[Tensor, _Multipliers]:
    """The bound (B, S), and the multipliers (B, S, 1) at which the bound is the dual value."""
    scale = c.detach().abs().amax(-1, keepdim=True)
    size = c.abs() / scale.masked_fill(scale == 0, 1)
    room = region.down * _indicator(torch.gt, c, 0) + region.up * _indicator(torch.lt, c, 0)
    fixed = room.detach()
    if multipliers is None:
        with torch.no_grad():
            multipliers = _newton(size, fixed, region.radius, iterative, max_steps)
    mu, active = multipliers
    # The part e of |c| that is bounded on the ball: all of |c| where the box does not bind.
    share = mu * fixed
    share = torch.where(size >= active * fixed, share, size) if iterative else torch.minimum(size, share)
    reach = _norm(share)
    # Where e = 0, the ball's term is 0 for an infinite radius too.
    ball = region.radius.where(reach.detach() > 0, 0) * reach
    gain = ((size - share) * room).sum(-1, keepdim=True) + ball
    value = torch.matmul(c, region.center.unsqueeze(-1)) - scale * gain * region.length.unsqueeze(-1)
    nothing = region.unbounded & (scale > 0).squeeze(-1)
    return value.squeeze(-1).masked_fill(nothing, -math.inf), multipliers


def _norm(x: Tensor) -> Tensor:
    return length(x, keepdim=True)


def _indicator(compare: Callable[..., Tensor], x: Tensor, y: Tensor | float) -> Tensor:
    """1 where the comparison holds, else 0, in the dtype of x; on a CPU far faster than masks and torch.where."""
    with torch.no_grad():
        return compare(x, y, out=torch.empty_like(x))


def _newton(size: Tensor, room: Tensor, radius: Tensor, iterative: bool, max_steps: int | None) -> _Multipliers:
    """mu = s^(-1/2) at the root of sum_i min(s size_i^2, room_i^2) = radius^2 (0 if none), and mu one step earlier."""
    slope, cap, limit = size.square(), room.square(), radius.square()

    def step(s: Tensor) -> Tensor:
        reach = s * slope
        left = limit - torch.linalg.vecdot(cap, _indicator(torch.ge, reach, cap)).unsqueeze(-1)
        free = torch.linalg.vecdot(slope, _indicator(torch.lt, reach, cap)).unsqueeze(-1)
        return torch.where(free == 0, math.inf, left / free)

    total = slope.sum(-1, keepdim=True)
    s = torch.where(total == 0, math.inf, limit / total)
    if not iterative:  # Algorithm 1 has no such test: its steps reach the corner of the box by themselves
        s = s.masked_fill(cap.sum(-1, keepdim=True) <= limit, math.inf)
    previous = torch.zeros_like(s)
    patience = room.shape[-1] if iterative else _NEWTON_STEPS
    for _ in range(patience if max_steps is None else max_steps):
        candidate = step(s)
        moved = candidate > s
        previous, s = s, torch.where(moved, candidate, s)
        if not moved.any():
            break
    else:
        if max_steps is None and not iterative:
            s = torch.maximum(s, step(_sorted_root(slope, cap, limit)))
    return s.rsqrt().clamp(max=torch.finfo(s.dtype).max), previous.rsqrt()


def _sorted_root(slope: Tensor, cap: Tensor, limit: Tensor) -> Tensor:
    """The root from all breakpoints: the function is the minimum of its linear pieces, so its root is their last."""
    order = torch.where(slope > 0, cap / slope, math.inf).argsort(-1)
    slope, cap = slope.gather(-1, order), cap.gather(-1, order)
    free = slope.flip(-1).cumsum(-1).flip(-1)
    root = (limit - (cap.cumsum(-1) - cap)) / free
    return torch.where(free > 0, root, 0).amax(-1, keepdim=True)


def _relu_value(a: Tensor, lam: Tensor, region: _Region, mu: Tensor) -> Tensor:
    """The dual value (B, S) at the scaled mu (B, S, 1): the function at the detached minimizer."""
    length, center = region.length.unsqueeze(-1), region.center.unsqueeze(1)
    mu = torch.where(region.radius == 0, torch.finfo(mu.dtype).max ** 0.5, mu)
    with torch.no_grad():
        move, _ = _relu_minimizer(lam - a, lam, a * _kink(region), region, mu)
    if region.down.requires_grad or region.up.requires_grad:  # free v_i are held fixed, clipped ones are sides
        free = move + (center.detach() - center) / length
        move = torch.where(move < region.up, free, region.up).where(move > -region.down, -region.down)
    v = torch.addcmul(center, length, move)
    excess = mu * torch.linalg.vecdot(move, move).unsqueeze(-1) - _ball_term(mu, region)
    value: Tensor = torch.linalg.vecdot(a, v.relu()) - torch.linalg.vecdot(lam, v)
    return (value + region.length / 2 * excess.squeeze(-1)).masked_fill(region.unbounded, -math.inf)


def _ball_term(mu: Tensor, region: _Region) -> Tensor:
    """mu rho^2, which is 0 at mu = 0 for an infinite radius too."""
    radius = torch.where((mu == 0) & region.radius.isinf(), 0, region.radius)
    return mu * radius * radius


def _kink(region: _Region) -> Tensor:
    """The move from the center to v = 0, the kink of the ReLU, clipped to the box: (B, 1, n)."""
    origin = (-region.center / region.length).unsqueeze(1)
    return torch.maximum(torch.minimum(origin, region.up), -region.down)


def _relu_minimizer(
    slope_on: Tensor, slope_off: Tensor, kinked: Tensor, region: _Region, mu: Tensor
) -> tuple[Tensor, Tensor]:
    """The minimizing move (B, S, n), minus the minima of a relu(v) - lam v + mu/2 move^2, less constants.

    Each branch is clipped to its side of the kink, and the kink to the box: an empty branch shrinks to a point of the
    other one, so that no mask is needed. The slopes are those of minus the function.
    """
    kink, half = _kink(region), mu / 2
    reach = (1 / mu).clamp(max=torch.finfo(mu.dtype).max)
    off = (slope_off * reach).clamp_(-region.down, kink)
    on = (slope_on * reach).clamp_(kink, region.up)
    gain_off = torch.addcmul(slope_off, off, half, value=-1).mul_(off)
    gain_on = torch.addcmul(slope_on, on, half, value=-1).mul_(on).add_(kinked)
    chosen = _indicator(torch.gt, gain_on, gain_off)
    return on.mul_(chosen).add_(off.mul_(1 - chosen)), torch.maximum(gain_on, gain_off, out=gain_on)


def _search(a: Tensor, lam: Tensor, region: _Region, start: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
    """The best scaled mu (B, S, 1), 0 included, and the log of the best mu > 0 (B, S)."""
    slope_on, kinked = lam - a, a * _kink(region)
    limit, tiny = region.radius.square(), torch.finfo(a.dtype).tiny

    def evaluate(mu: Tensor) -> tuple[Tensor, Tensor]:
        move, gain = _relu_minimizer(slope_on, lam, kinked, region, mu)
        square = torch.linalg.vecdot(move, move).unsqueeze(-1)
        return -gain.sum(-1, keepdim=True) - _ball_term(mu, region) / 2, square

    # ||v - z|| <= (||a|| + ||lam||) / mu, so that the root lies to the left of this x.
    x = torch.log(_norm(a) + _norm(lam) + tiny) - region.radius.clamp(min=tiny, max=1 / tiny).log()
    if start is not None:
        x = torch.minimum(torch.maximum(start.unsqueeze(-1), x - _LOG_SPAN / 3), x)
    # Values at the ends are at first those of a line of slope -1 through x: x is tried first, and hitting the same side
    # twice doubles the step.
    left, right, at_left = x - _LOG_SPAN, x + _LOG_SPAN, torch.full_like(x, _LOG_SPAN)
    at_right, side = -at_left, torch.zeros_like(x)
    best, best_x = torch.full_like(x, -math.inf), x
    for _ in range(steps):
        x = left + (right - left) * (at_left / (at_left - at_right))
        value, square = evaluate(x.exp())
        better = value > best
        best, best_x = torch.where(better, value, best), torch.where(better, x, best_x)
        f = torch.log((square + tiny) / (limit + tiny)).clamp(-2, 2)
        outside, fade = f > 0, torch.where(f.sign() == side, 0.5, 1.0)
        left, at_left = torch.where(outside, x, left), torch.where(outside, f, at_left * fade)
        right, at_right = torch.where(outside, right, x), torch.where(outside, at_right * fade, f)
        side = f.sign()
    box_only = evaluate(torch.zeros_like(x))[0]
    return torch.where(best > box_only, best_x.exp(), 0), best_x.squeeze(-1)


def _check_rows(a: Tensor, lam: Tensor, center: Tensor, mu: Tensor | None) -> None:
    fits = a.dim() == 3 and a.shape == lam.shape and (a.shape[0], a.shape[2]) == tuple(center.shape)
    if not fits or (mu is not None and mu.shape != a.shape[:2]):
        shapes = [tuple(x.shape) for x in (a, lam, center, mu) if x is not None]
        raise InvalidInputError(f"Shapes {shapes}: expected a, lam (B, S, n), center (B, n), mu (B, S).")
