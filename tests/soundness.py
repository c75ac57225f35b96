"""What every soundness test needs: points of a perturbation set, the worst of them, and the one-sided check.

Independent of the package: only the public attributes of a perturbation (norm, radius, range) are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Slack for rounding, relative to the largest output seen. Nothing else may leave a bound.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Model = Callable[[Tensor], Tensor]
Bounds = tuple[Tensor | None, Tensor | None]


def generator(seed: int = 0) -> torch.Generator:
    """A new source of random numbers."""
    return torch.Generator().manual_seed(seed)


def box_of(x: Tensor, perturbation: Any) -> tuple[Tensor, Tensor]:
    """The box around the perturbation set, inside of the data range."""
    lower, upper = torch.full_like(x, -math.inf), torch.full_like(x, math.inf)
    if perturbation.radius is not None:
        eps = radii(x, perturbation)
        lower, upper = x - eps, x + eps
    if perturbation.range_lower is not None:
        lower = torch.maximum(lower, torch.as_tensor(perturbation.range_lower, dtype=x.dtype))
    if perturbation.range_upper is not None:
        upper = torch.minimum(upper, torch.as_tensor(perturbation.range_upper, dtype=x.dtype))
    return lower, upper


def radii(x: Tensor, perturbation: Any) -> Tensor:
    """eps of each sample, shaped to broadcast with x."""
    return torch.as_tensor(perturbation.radius, dtype=x.dtype).reshape(-1).expand(len(x)).view(-1, *[1] * (x.dim() - 1))


def length(shift: Tensor, norm: float) -> Tensor:
    """lp norm of each sample, shaped to broadcast."""
    norms = torch.linalg.vector_norm(shift.flatten(1), ord=norm, dim=1)
    return norms.view(-1, *[1] * (shift.dim() - 1))


def project(points: Tensor, x: Tensor, perturbation: Any) -> Tensor:
    """Points (B, ...) moved into the set: drawn towards x into the ball, then clipped to the range.

    Clipping moves every coordinate towards x, which lies in the range, so it does not leave the ball again.
    """
    lower, upper = box_of(x, perturbation)
    if perturbation.radius is not None and perturbation.norm != math.inf:
        eps, shift = radii(x, perturbation), points - x
        size = length(shift, perturbation.norm)
        points = x + shift * torch.where(size > eps, eps / size, torch.ones_like(size))
    return torch.minimum(torch.maximum(points, lower), upper)


def samples(x: Tensor, perturbation: Any, count: int, generator: torch.Generator) -> Tensor:
    """Points of the perturbation set around each sample of x.

    By turns: the surface of the ball, its inside, corners of the box drawn into the ball, points on few axes
    (the vertices of an l1 ball), and corners of the data range drawn into the ball. The first point is x.

    Args:
        x: Clean inputs, (B, ...), inside of the data range.
        perturbation: The set.
        count: Points for each sample.
        generator: Source of every random number.

    Returns:
        (count, B, ...).
    """
    lower, upper = box_of(x, perturbation)
    half = (upper - lower) / 2
    points = [x.clone()]
    for turn in range(count - 1):
        gauss = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        signs = gauss.sign()
        flat_box = lower + (upper - lower) * torch.rand(x.shape, generator=generator, dtype=x.dtype)
        if perturbation.radius is None:
            points.append([torch.where(signs > 0, upper, lower), flat_box][turn % 2])
            continue
        eps = radii(x, perturbation)
        kind = turn % 5
        if kind == 0:
            shift = 2 * eps * gauss / length(gauss, perturbation.norm).clamp(min=1e-30)
        elif kind == 1:
            depth = torch.rand(len(x), generator=generator, dtype=x.dtype).view_as(eps)
            shift = eps * depth * gauss / length(gauss, perturbation.norm).clamp(min=1e-30)
        elif kind == 2:
            shift = 2 * eps * signs
        elif kind == 3:
            rank = torch.rand(x[0].numel(), generator=generator).argsort()
            few = (rank < 1 + turn // 5 % 3).to(x).view(1, *x.shape[1:])
            shift = 4 * eps * signs * few
        else:
            shift = torch.where(signs > 0, x + half, x - half) - x + (flat_box - x)
        points.append(project(x + shift, x, perturbation))
    return torch.stack(points)


def values(model: Model, points: Tensor, batched: bool = True) -> Tensor:
    """Outputs of the model at points (count, B, ...), flattened: (count, B, outputs).

    Args:
        model: The torch model.
        points: Inputs.
        batched: All in one call; False for a model that knows one batch size only.
    """
    if batched:
        outputs = model(points.flatten(0, 1))
        return outputs.reshape(*points.shape[:2], -1)
    return torch.stack([model(some).reshape(points.shape[1], -1) for some in points])


def worst_by_gradient(
    model: Model, x: Tensor, perturbation: Any, C: Tensor | None = None, steps: int = 10, batched: bool = True
) -> Tensor:
    """Smallest value of each row of C f found by projected gradient descent, from x, inside of the set.

    Args:
        model: The torch model.
        x: Clean inputs, (B, ...).
        perturbation: The set.
        C: Rows, (B, S, outputs); default the identity.
        steps: Descent steps, of falling size.
        batched: As in `values`.

    Returns:
        (B, S).
    """
    if C is None:
        outputs = values(model, x.unsqueeze(0), batched).shape[2]
        C = torch.eye(outputs, dtype=x.dtype).expand(len(x), -1, -1)
    rows = C.shape[1]
    repeated = x.repeat_interleave(rows, 0)
    sets = _Repeated(perturbation, len(x), rows)
    lower, upper = box_of(repeated, sets)
    best = torch.full((len(x) * rows,), math.inf, dtype=x.dtype)
    points = repeated
    for step in range(steps + 1):
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            grouped = points.view(len(x), rows, *x.shape[1:]).transpose(0, 1)
            outputs = values(model, grouped, batched).transpose(0, 1)  # (B, S, outputs)
            found = (C * outputs).sum(2).flatten()
            gradient = torch.autograd.grad(found.sum(), points, allow_unused=True)[0]
        best = torch.minimum(best, found.detach())
        if gradient is None:
            break
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        if perturbation.radius is None or perturbation.norm == math.inf:
            move = (upper - lower) / 2 * gradient.sign()
        else:
            move = radii(repeated, sets) * _steepest(gradient, perturbation.norm)
        points = project(points.detach() - 2 * move / (1 + step), repeated, sets)
    return best.view(len(x), rows)


class Extremes(NamedTuple):
    """The smallest and largest values of C f found on a set, (B, S), and the size of the outputs."""

    smallest: Tensor
    largest: Tensor
    scale: float


def extremes(
    model: Model,
    x: Tensor,
    perturbation: Any,
    C: Tensor | None = None,
    count: int = 60,
    steps: int = 8,
    seed: int = 0,
    batched: bool = True,
) -> Extremes:
    """What sampling and gradient steps find: no sound bound lies inside of it.

    Args:
        model: The torch model.
        x: Clean inputs, (B, ...).
        perturbation: The set.
        C: Rows, (B, S, outputs), or None for the outputs.
        count: Sampled points.
        steps: Steps of the gradient descent; 0 for none.
        seed: Of the sampling.
        batched: As in `values`.
    """
    clean = x.as_subclass(torch.Tensor).detach()
    with torch.no_grad():
        outputs = values(model, samples(clean, perturbation, count, generator(seed)), batched)
    assert torch.isfinite(outputs).all(), "the model is not finite on the set: nothing to check"
    found = outputs if C is None else torch.einsum("bso,nbo->nbs", C, outputs)
    smallest, largest = found.amin(0), found.amax(0)
    if steps:
        rows = torch.eye(outputs.shape[2], dtype=x.dtype).expand(len(x), -1, -1) if C is None else C
        smallest = torch.minimum(smallest, worst_by_gradient(model, clean, perturbation, rows, steps, batched))
        largest = torch.maximum(largest, -worst_by_gradient(model, clean, perturbation, -rows, steps, batched))
    return Extremes(smallest, largest, max(float(found.abs().max()), 0.1))


def assert_contains(bounds: Bounds, found: Extremes, what: str = "") -> None:
    """Assert that bounds contain what was found, elementwise and up to rounding; NaN is no bound.

    Args:
        bounds: (lower, upper); None for a side that was not computed.
        found: What was found.
        what: Said in the message.
    """
    slack = TOLERANCE[found.smallest.dtype] * found.scale
    for name, bound, sign, extreme in (
        ("lower", bounds[0], 1, found.smallest),
        ("upper", bounds[1], -1, found.largest),
    ):
        if bound is None:
            continue
        bound = bound.detach().reshape(len(bound), -1)
        assert bound.shape == extreme.shape, f"{name} bound has shape {tuple(bound.shape)} {what}"
        assert not bound.isnan().any(), f"{name} bound has NaN entries {what}"
        excess = sign * (bound - extreme)
        worst = int(excess.argmax())
        assert (excess <= slack).all(), (
            f"{name} bound is violated by {float(excess.max()):.3g} in {int((excess > slack).sum())} of "
            f"{excess.numel()} entries {what}; worst: sample {worst // bound.shape[1]}, entry "
            f"{worst % bound.shape[1]}, bound {float(bound.flatten()[worst]):.9g}"
        )


def assert_sound(
    model: Model, x: Tensor, perturbation: Any, bounds: Bounds, C: Tensor | None = None, **search: Any
) -> None:
    """Assert that no point found by sampling or by gradient leaves a bound of C f (of f without C).

    Args:
        model: The torch model that was bounded.
        x: Clean inputs, (B, ...).
        perturbation: The set.
        bounds: (lower, upper); None for a side that was not computed.
        C: Rows, (B, S, outputs), or None.
        **search: `count`, `steps`, `seed` and `batched` of `extremes`.
    """
    assert_contains(bounds, extremes(model, x, perturbation, C, **search), f"({perturbation})")


class _Repeated:
    """The same perturbation with every sample repeated, for one point a row."""

    def __init__(self, perturbation: Any, batch: int, times: int) -> None:
        self.norm = perturbation.norm
        for name in ("radius", "range_lower", "range_upper"):
            value = getattr(perturbation, name)
            own = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch > 1
            setattr(self, name, value.repeat_interleave(times, 0) if own else value)


def _steepest(gradient: Tensor, norm: float) -> Tensor:
    """Direction of unit lp norm that climbs fastest."""
    if norm == 1:
        flat = gradient.flatten(1)
        top = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).view_as(gradient)
    peak = gradient.flatten(1).abs().amax(1).view(-1, *[1] * (gradient.dim() - 1)).clamp(min=1e-30)
    direction = gradient.sign() * (gradient.abs() / peak) ** (1 / (norm - 1))
    return direction / length(direction, norm).clamp(min=1e-30)
