"""Checks of bounds at run time: bounds are compared with the network's values at points of the perturbation set.

No number of points proves a bound, but a single one can refute it. A bound that a point refutes by more than rounding
is a defect of the method (`SoundnessError`), not a result. The size of rounding errors is measured on the network
(`noise`).
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

MOST_ROWS = 10  # rows for which a gradient is followed: those with bounds closest to the value at the center
_RANDOM_POINTS = 3
_ULPS = 64  # a rounding error is taken to be at most this many units in the last place of `noise`


def noise(function: Function, other: Function, points: Tensor) -> Tensor:
    """Scale of the rounding errors of a network's outputs: in float64, the errors are about 1e-16 times the scale.

    The largest output alone does not suffice: a network that cancels large numbers has small outputs and large errors.
    So the error in float32 is measured as the difference of outputs in both precisions, in units of float32's epsilon.

    Args:
        function: The network, (B, ...) -> (B, outputs).
        other: The same network in the other precision, which takes the same points and casts them itself.
        points: Inputs, (B, ...).

    Returns:
        (B,), in units of the outputs.
    """
    with torch.no_grad():
        outputs = function(points).double()
        size = outputs.abs().flatten(1).amax(1)
        try:
            difference = (other(points).double() - outputs).abs().flatten(1).amax(1)
        except Exception as error:  # e.g. the network creates tensors of a fixed dtype
            if is_out_of_memory(error):
                raise
            difference = torch.full_like(size, math.nan)
    measured = size + difference / torch.finfo(torch.float32).eps
    unknown = (1 + size) / (_ULPS * torch.finfo(points.dtype).eps ** 0.5)  # half of the digits
    return torch.where(measured.isfinite(), measured, unknown)


def slack(noise: Tensor, weight: Tensor | float, bounds: Tensor) -> Tensor:
    """Largest distance by which rounding errors alone may place bounds beyond the values that they bound.

    Args:
        noise: Scale of rounding errors by `noise`, shaped to broadcast with `bounds`.
        weight: Sum of the absolute coefficients of each row, shaped to broadcast with `bounds`.
        bounds: The bounds, (B, S), in the dtype that they were computed in.

    Returns:
        Of the shape of `bounds`.
    """
    return _ULPS * torch.finfo(bounds.dtype).eps * (noise * weight + bounds.abs())


def closest(values: Tensor, bounds: Tensor) -> Tensor:
    """The rows whose lower bounds are closest to their values at the center, at most `MOST_ROWS` for each sample.

    Args:
        values: Values of the rows at the center, (B, S).
        bounds: Lower bounds of the rows, (B, S).

    Returns:
        Indices of rows, (B, K).
    """
    gap = (values - bounds).nan_to_num(math.inf)
    return gap.topk(min(MOST_ROWS, gap.shape[1]), dim=1, largest=False).indices


def extremes(
    values: Function, x: Tensor, perturbation: PerturbationLpNorm, rows: Tensor, seed: int
) -> Iterator[Tensor]:
    """Points of each sample's perturbation set that are likely to refute a lower bound.

    For each chosen row, the minimizer of the row's linearization at `x`: a corner of a box, or a point on the border
    of a ball. Then a few minimizers for random gradients.

    Args:
        values: Inputs -> values of all rows, (B, S).
        x: Centers of the sets, (B, ...).
        perturbation: The perturbation sets.
        rows: Indices of the chosen rows, (B, K).
        seed: Seed of the random gradients.

    Yields:
        Points, (B, ...) each.
    """
    center = x.detach().requires_grad_()
    with torch.enable_grad():
        found = values(center)
    for row in rows.unbind(1) if found.requires_grad else ():  # e.g. a network of step functions has no gradient
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
    """The point of each sample's set that minimizes gradient . x'; approximately so for a ball cut to a data range.

    Args:
        gradient: Gradients, (B, ...).
        x: Centers of the sets, (B, ...).
        perturbation: The perturbation sets.

    Returns:
        (B, ...).
    """
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
    # Clipping moves each entry towards x, which lies in the box, so that the point stays in the ball.
    return torch.minimum(torch.maximum(points, lower), upper)


def refuted(method: str, row: str, where: str, bound: float, value: float) -> str:
    """Message about a lower bound that a point of the set refutes.

    Args:
        method: Name of the method.
        row: Description of the row.
        where: Description of the sample.
        bound: The lower bound.
        value: The smaller value at the point.
    """
    return (
        f"unsound: method {method!r} bounds {row} of {where} below by {bound:.9g}, but it is {value:.9g} at a point of "
        "the set. This is a defect of the method, not a result; please report it"
    )
