"""The search for points that leave a bound, in float64, and what rounding may excuse.

The search: the clean point, corners, borders, axes and inner points of the set (`soundness.samples`), projected
gradient descent for every row in both directions, and searches on the lines between the best points.

What rounding may excuse is derived, not chosen by eye. To first order, an error e of an intermediate number v_i moves a
row by |d row / d v_i| e. The sum over all numbers of all steps, with e relative to the size of what is added up in that
step, is how far a correct computation in that precision may be off. A violation is what exceeds it at the very point
that was found, and at the clean point. A large number somewhere therefore excuses nothing elsewhere: it counts as much
as it acts on the row in question.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from soundness import _steepest, box_of, generator, project, radii, samples
from torch import Tensor, nn

from .case import Region
from .program import Network, evaluate

# Relative error of the sums in a step, of the size of their terms; and of the arguments of a function.
SUMS = {torch.float64: 1e-9, torch.float32: 1e-4}
OUTWARD = 1e-12  # in float64 of methods that widen their bounds by what they may have lost: the search's own error
ARGUMENTS = {torch.float64: 4e-15, torch.float32: 2e-6}


class Found(NamedTuple):
    """The extremes that were found, and where.

    Attributes:
        smallest: Of each row, (B, S).
        largest: Likewise.
        at_smallest: Points, (B, S, ...).
        at_largest: Likewise.
    """

    smallest: Tensor
    largest: Tensor
    at_smallest: Tensor
    at_largest: Tensor


class Attack:
    """The model's rows over a set.

    Args:
        model: In float64.
        x: Clean inputs, (B, ...), float64.
        region: The set.
        rows: Coefficients of the outputs, (B, S, outputs), float64.
        mixes: Whether samples read each other; points are then evaluated one batch at a time.
        labels: Classes, (B,); the cross entropy is then a last row.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, region: Region, rows: Tensor, mixes: bool, labels: Tensor | None = None
    ) -> None:
        self.model, self.x, self.region, self.rows, self.mixes = model, x, region, rows, mixes
        self.labels = labels
        self.lower, self.upper = box_of(x, region)

    def values(self, points: Tensor) -> Tensor:
        """Rows at points (N, B, ...): (N, B, S), or S + 1 with labels."""
        together = [points.flatten(0, 1)] if not self.mixes else points
        outputs = torch.cat([self.model(some) for some in together])
        outputs = outputs.reshape(*points.shape[:2], -1)
        rows = torch.einsum("bso,nbo->nbs", self.rows, outputs)
        if self.labels is None:
            return rows
        entropy = F.cross_entropy(outputs.flatten(0, 1), self.labels.repeat(len(points)), reduction="none")
        return torch.cat([rows, entropy.view(*rows.shape[:2], 1)], 2)

    def projected(self, points: Tensor) -> Tensor:
        """Points (N, B, ...) moved into the set."""
        count, region = len(points), self.region
        many = Region(
            region.norm,
            None if region.radius is None else radii(self.x, region).flatten().repeat(count),
            _tiled(self.lower, count),
            _tiled(self.upper, count),
        )
        return project(points.flatten(0, 1), _tiled(self.x, count), many).view(points.shape)

    def search(self, seed: int = 0, count: int = 60, steps: int = 8) -> Found:
        """The extremes of every row; gradient steps for the first rows only where there are many."""
        source = generator(seed)
        points = samples(self.x, self.region, count, source)
        with torch.no_grad():
            values = self.values(points)
        batch, rows = values.shape[1:]
        best, where = [], []
        for sign in (1, -1):
            index = _comparable(sign * values).argmin(0)  # (B, S)
            best.append(_comparable(sign * values).gather(0, index[None])[0])
            where.append(points[index, torch.arange(batch)[:, None]])  # (B, S, ...)
        stepped = list(range(rows)) if rows <= 10 else torch.randperm(rows, generator=source)[:10].tolist()
        signs = torch.cat([torch.ones(len(stepped)), -torch.ones(len(stepped))]).double()
        at = torch.cat([where[0][:, stepped], where[1][:, stepped]], 1).transpose(0, 1)  # (2S, B, ...)
        low = torch.cat([best[0][:, stepped], best[1][:, stepped]], 1).T  # (2S, B)
        picked = torch.tensor(stepped + stepped)

        def improve(some: Tensor, low: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            found = self.values(some)[torch.arange(len(picked)), :, picked]
            found = _comparable(signs[:, None] * found.detach())
            better = found < low
            shape = better.view(*better.shape, *[1] * (self.x.dim() - 1))
            return torch.where(better, found, low), torch.where(shape, some.detach(), at)

        for start in (at, self.x.expand_as(at)):
            walker = start
            for step in range(steps):
                walker = walker.detach().requires_grad_()
                with torch.enable_grad():
                    found = self.values(walker)[torch.arange(len(picked)), :, picked] * signs[:, None]
                    gradient = torch.autograd.grad(found.sum(), walker, allow_unused=True)[0]
                if gradient is None:
                    break
                walker = self.projected(walker.detach() - self._move(gradient.nan_to_num(0.0, 0.0, 0.0), step))
                with torch.no_grad():
                    low, at = improve(walker, low, at)
        with torch.no_grad():
            for turn in range(6):  # lines from the best point to the clean one, to others, and beyond
                toward = self.x if turn % 2 else points[torch.randint(len(points), (1,), generator=source)[0]]
                part = torch.rand(1, generator=source).item() * 1.3 - 0.3
                low, at = improve(self.projected(at + (toward - at) * part * 0.3 ** (turn // 2)), low, at)
        for half, sign in enumerate((1, -1)):
            chosen = slice(half * len(stepped), (half + 1) * len(stepped))
            best[half][:, stepped], where[half][:, stepped] = low[chosen].T, at[chosen].transpose(0, 1)
            best[half] = sign * best[half]
        return Found(best[0], best[1], where[0], where[1])

    def _move(self, gradient: Tensor, step: int) -> Tensor:
        region, size = self.region, 2 / (1 + step)
        if region.radius is None or region.norm == float("inf"):
            return size * (self.upper - self.lower).nan_to_num(posinf=1e3) / 2 * gradient.sign()
        flat = gradient.flatten(0, 1)
        return (size * _steepest(flat, region.norm) * _tiled(radii(self.x, region), len(gradient))).view_as(gradient)


def _tiled(x: Tensor, count: int) -> Tensor:
    return x.repeat(count, *[1] * (x.dim() - 1))


def _comparable(values: Tensor) -> Tensor:
    """NaN and infinities never are the smallest."""
    return torch.where(torch.isfinite(values), values, torch.inf)


def rounding(
    network: Network, model: nn.Module, row: Tensor | int, point: Tensor, dtype: torch.dtype, sums: float
) -> float:
    """How far a computation in `dtype` of that row at that point may be off, to first order (see above).

    Args:
        network: The network.
        model: Its module in float64.
        row: Coefficients of the outputs, (outputs,); or a label, for the cross entropy.
        point: One sample, (1, ...), float64.
        dtype: Of the computation.
        sums: Relative error of the sums in a step, of the size of their terms.
    """
    with torch.enable_grad():
        values = network.values(model, point.clone().requires_grad_())
        outputs = values[network.output].flatten()
        if isinstance(row, int):
            total, size = outputs.logsumexp(0) - outputs[row], outputs.abs().max() + 1
        else:
            total, size = outputs @ row, outputs.abs() @ row.abs()
        gradients = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    absolute = copy.deepcopy(model)
    for tensor in [*absolute.parameters(), *absolute.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.abs()
    allowed = float(size) * sums
    for (value, tensor), gradient in zip(values.items(), gradients, strict=True):
        if gradient is None:
            continue
        size, argument = tensor.detach().abs(), torch.zeros(())
        if value:
            line = network.lines[value - 1]
            inputs = {number: values[number].detach().abs() for number in line.inputs}
            argument = torch.stack([tensor.max() for tensor in inputs.values()]).max()
            if line.linear:
                with torch.no_grad():
                    size = torch.maximum(size, evaluate(network.code(value), absolute, inputs).abs())
        error = sums * size + ARGUMENTS[dtype] * argument + torch.finfo(dtype).tiny
        allowed += float((gradient.abs() * error).nan_to_num(0.0, 0.0).sum())
    return allowed
