"""Counterexamples to a property: projected gradient descent on the unsafe polytopes, and the check of what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .vnnlib import Case, Polytope

Function = Callable[[Tensor], Tensor]  # (B, inputs) -> (B, outputs), float64

_MOST_POINTS = 128  # at once
_MOST_ELEMENTS = 2**20  # of their inputs


@dataclass(frozen=True, eq=False)
class Witness:
    """An input of a case's box with an unsafe output.

    Attributes:
        input: Shape of one sample, float64.
        output: What the network as it runs gives for it, (outputs,).
        case: Index of the case.
    """

    input: np.ndarray
    output: np.ndarray
    case: int


class Judge:
    """Says whether a point is a counterexample: in the box exactly, and unsafe in float64 and as the network runs.

    Args:
        function: The network in float64.
        original: The network as it runs, on one sample: the file in onnxruntime, or the module in float32.
        input_shape: Shape of one sample.
    """

    def __init__(
        self, function: Function, original: Callable[[np.ndarray], np.ndarray], input_shape: tuple[int, ...]
    ) -> None:
        self.function, self.original, self.input_shape = function, original, input_shape

    def witness(self, index: int, case: Case, point: np.ndarray) -> Witness | None:
        """The float32 point of the box next to `point`, (inputs,), if it is a counterexample.

        Where the box holds no float32 (an input fixed to 0.1), that input is the box's float64, and the network
        runs on the float32 nearest to it.
        """
        x = _single(case, point)
        if not ((case.inner_lower <= x) & (x <= case.inner_upper)).all():
            return None
        sample = x.reshape(self.input_shape)
        output = np.asarray(self.original(sample), dtype=np.float64).reshape(-1)
        with torch.no_grad():
            exact = self.function(torch.from_numpy(x)[None])[0].numpy()
        if any(unsafe.contains(output) and unsafe.contains(exact) for unsafe in case.unsafe):
            return Witness(sample, output, index)
        return None


def _single(case: Case, point: np.ndarray) -> np.ndarray:
    """The float32 nearest to a point, in the inner box wherever that has one."""
    with np.errstate(over="ignore"):
        low, high = (end.astype(np.float32) for end in (case.inner_lower, case.inner_upper))
        low = np.where(low < case.inner_lower, np.nextafter(low, np.float32(np.inf)), low).astype(np.float64)
        high = np.where(high > case.inner_upper, np.nextafter(high, np.float32(-np.inf)), high).astype(np.float64)
        x = np.clip(point.astype(np.float32).astype(np.float64), low, high)
    return np.where(low <= high, x, np.clip(point, case.inner_lower, case.inner_upper))


def falsify(
    judge: Judge,
    index: int,
    case: Case,
    unsafe: Sequence[Polytope],
    steps: int,
    restarts: int,
    seed: int,
    function: Function | None = None,
) -> Witness | None:
    """Search the box for a counterexample: PGD on the largest a.y - b of each polytope, by the gradient's sign.

    A. Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018.

    Args:
        judge: Has the network, and the last word.
        index: Index of the case.
        case: The box.
        unsafe: The polytopes to reach.
        steps: Steps of a run.
        restarts: Runs for each polytope: the first from the center, the others from random points.
        seed: Of the random points.
        function: The network that is followed, default the judge's: one may look at what the points give.
    """
    function = function or judge.function
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.from_numpy(case.inner_lower), torch.from_numpy(case.inner_upper)
    width = high - low
    chunk = max(1, min(_MOST_POINTS, _MOST_ELEMENTS // len(low)))
    targets = [polytope for _ in range(restarts) for polytope in unsafe]
    for start in range(0, len(targets), chunk):
        some = targets[start : start + chunk]
        rows, limits = _padded(some)
        points = low + width * torch.rand(len(some), len(low), generator=generator, dtype=low.dtype)
        centered = torch.arange(start, start + len(some)) < len(unsafe)
        points = torch.where(centered[:, None], low + width / 2, points)
        for step in range(steps + 1):
            points = points.clamp(low, high).requires_grad_()
            with torch.enable_grad():
                distance = (torch.einsum("prm,pm->pr", rows, function(points)) - limits).amax(1)
                (gradient,) = torch.autograd.grad(distance.sum(), points)
            points = points.detach()
            for reached in (distance <= 0).nonzero().flatten().tolist()[:3]:
                found = judge.witness(index, case, points[reached].numpy())
                if found is not None:
                    return found
            # Long steps first, to cross the box; short ones at the end.
            points = points - width * (0.5 * (1 - step / (steps + 1)) ** 2) * gradient.nan_to_num().sign()
    return None


def _padded(polytopes: Sequence[Polytope]) -> tuple[Tensor, Tensor]:
    """Rows (P, R, outputs) and limits (P, R) of polytopes, the first row of each repeated to fill up."""
    most = max(len(polytope.limits) for polytope in polytopes)
    index = [[i if i < len(polytope.limits) else 0 for i in range(most)] for polytope in polytopes]
    rows = np.stack([polytope.rows[chosen] for polytope, chosen in zip(polytopes, index, strict=True)])
    limits = [[float(polytope.limits[i]) for i in chosen] for polytope, chosen in zip(polytopes, index, strict=True)]
    return torch.from_numpy(rows), torch.tensor(limits, dtype=torch.float64)
