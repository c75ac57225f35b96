"""Guards at run time: bounds are held against the network at points of the set, before anything rests on them.

No number of points proves a bound, but one can refute it. A bound that a point refutes by more than rounding is a
defect of its method (`SoundnessError`), never a result. What counts as rounding is measured on the network (`noise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..domain.lengths import flat
from ..domain.perturbation import PerturbationLpNorm
from ..engine.limits import is_out_of_memory

Function = Callable[[Tensor], Tensor]

MOST_ROWS = 10  # that a gradient is followed for: those whose bounds are the closest to the value at the center
_RANDOM_POINTS = 3
_ULPS = 64  # a rounding error is at most that many units in the last place of what `noise` gives


def noise(function: Function, other: Function, points: Tensor) -> Tensor:
    """What the rounding errors of the outputs scale with, (B,), by sample: in float64 they are 1e-16 times it.

    The largest output alone would not do: a network that cancels large numbers has small outputs and large errors. So
    float32's error is measured, as the difference between both precisions, and put in units of float32's last place.

    Args:
        function: The network, (B, ...) -> (B, outputs).
        other: The same one in the other precision: takes the same points, casts them itself.
        points: (B, ...).
    """
    with torch.no_grad():
        outputs = function(points).double()
        size = outputs.abs().flatten(1).amax(1)
        try:
            difference = (other(points).double() - outputs).abs().flatten(1).amax(1)
        except Exception as error:  # a network that makes tensors of one dtype itself
            if is_out_of_memory(error):
                raise
            difference = torch.full_like(size, math.nan)
    measured = size + difference / torch.finfo(torch.float32).eps
    unknown = (1 + size) / (_ULPS * torch.finfo(points.dtype).eps ** 0.5)  # half of the digits, where one overflows
    return torch.where(measured.isfinite(), measured, unknown)


def slack(noise: Tensor, weight: Tensor | float, bounds: Tensor) -> Tensor:
    """How far rounding alone may put bounds beyond the values that they bound.

    Args:
        noise: As above, shaped to broadcast with `bounds`.
        weight: Sum of the absolute coefficients of each row, likewise.
        bounds: In the dtype that they were computed in.
    """
    return _ULPS * torch.finfo(bounds.dtype).eps * (noise * weight + bounds.abs())


def closest(values: Tensor, bounds: Tensor) -> Tensor:
    """Indices (B, K) of rows, `MOST_ROWS` at most: those whose bounds (B, S) are the closest to the center's values."""
    gap = (values - bounds).nan_to_num(math.inf)
    return gap.topk(min(MOST_ROWS, gap.shape[1]), dim=1, largest=False).indices


def extremes(
    values: Function, x: Tensor, perturbation: PerturbationLpNorm, rows: Tensor, seed: int
) -> Iterator[Tensor]:
    """Points of each sample's set that are likely to refute a bound, (B, ...) each.

    For each chosen row the one that the gradient at `x` takes for the least: a corner of a box, the end of a radius of
    a ball. And a few such ends at random.

    Args:
        values: Inputs -> values of all rows, (B, S).
        x: Centers, (B, ...).
        perturbation: The sets.
        rows: Chosen rows, (B, K).
        seed: Of the random ones.
    """
    center = x.detach().requires_grad_()
    with torch.enable_grad():
        found = values(center)
    for row in rows.unbind(1) if found.requires_grad else ():  # a network of steps has no gradient
        with torch.enable_grad():
            chosen = found.gather(1, row.unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(chosen, center, retain_graph=True, allow_unused=True)
        if gradient is not None:
            yield least_point(gradient, x.detach(), perturbation)
    generator = torch.Generator().manual_seed(seed % 2**63)
    for _ in range(_RANDOM_POINTS):
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        yield least_point(direction, x.detach(), perturbation)


def least_point(gradient: Tensor, x: Tensor, perturbation: PerturbationLpNorm) -> Tensor:
    """The point of each set where gradient . x' is least, (B, ...); of a ball cut to a range, a point close to that."""
    lower, upper = perturbation.box(x)
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    if perturbation.radius is None or perturbation.norm == math.inf:
        return torch.where(gradient > 0, lower, upper)
    rows = flat(gradient)
    if perturbation.norm == 1:
        top = rows.abs().argmax(1, keepdim=True)
        direction = torch.zeros_like(rows).scatter(1, top, rows.gather(1, top).sign())
    else:
        tiny = torch.finfo(x.dtype).tiny
        share = rows.abs() / rows.abs().amax(1, keepdim=True).clamp(min=tiny)
        direction = rows.sign() * share ** (1 / (perturbation.norm - 1))
        length = torch.linalg.vector_norm(direction, ord=perturbation.norm, dim=1, keepdim=True)
        direction = direction / length.clamp(min=tiny)
    points = x - (perturbation.eps_of(x).unsqueeze(1) * direction).view_as(x)
    # Each entry moves towards x, which lies in the box: the point stays in the ball.
    return torch.minimum(torch.maximum(points, lower), upper)


def refuted(method: str, row: str, where: str, bound: float, value: float) -> str:
    """What is said of a bound that a point refutes."""
    return (
        f"unsound: method {method!r} bounds {row} of {where} below by {bound:.9g}, but it is {value:.9g} at a point of "
        "the set. This is a defect of the method, not a result; please report it"
    )
