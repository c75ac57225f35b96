"""Search for counterexamples to a property by projected gradient descent, and the exact check of a candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .vnnlib import Case, Polytope

Function = Callable[[Tensor], Tensor]  # (B, inputs) -> (B, outputs), float64

_MOST_POINTS = 128  # points that are moved together
_MOST_ELEMENTS = 2**20  # numbers of their inputs


@dataclass(frozen=True, eq=False)
class Witness:
    """A counterexample: an input of a case's box with an unsafe output.

    Attributes:
        input: The input, in the shape of one sample, float64.
        output: Output of the network as it runs (`Judge`), (outputs,), float64.
        case: Index of the case.
    """

    input: np.ndarray
    output: np.ndarray
    case: int


class Judge:
    """Decides whether a point is a counterexample: exactly in the box, and unsafe in float64 and as the network runs.

    Args:
        function: The network in float64, (B, inputs) -> (B, outputs).
        original: The network as it runs, of one sample: the file in onnxruntime, or the module in float32.
        input_shape: Shape of one sample.
    """

    def __init__(
        self, function: Function, original: Callable[[np.ndarray], np.ndarray], input_shape: tuple[int, ...]
    ) -> None:
        self.function, self.original, self.input_shape = function, original, input_shape

    def witness(self, index: int, case: Case, point: np.ndarray) -> Witness | None:
        """Round a point to float32 within the box, and check whether it is a counterexample.

        Where an input's interval contains no float32 (an input fixed to 0.1), the input is a float64 of the interval,
        and the network runs on the float32 nearest to it.

        Args:
            index: Index of the case.
            case: The case.
            point: The point, (inputs,).

        Returns:
            The counterexample, or None.
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
    """The float32 nearest to a point (inputs,) in the inner box; a float64 where an interval contains no float32."""
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
    """Search the box of a case for a counterexample by PGD.

    Each run minimizes the largest a.y - b over the rows of one polytope, by steps in the direction of the gradient's
    sign. A. Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018.

    Args:
        judge: Decides whether a point is a counterexample.
        index: Index of the case.
        case: The case, whose inner box is searched.
        unsafe: Polytopes of unsafe outputs to reach.
        steps: Steps of a run.
        restarts: Runs for each polytope: the first from the center, the others from random points.
        seed: Seed of the random points.
        function: The network whose gradient is followed, (B, inputs) -> (B, outputs); default that of the judge.

    Returns:
        The first counterexample, or None.
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
            # The first steps cross the box, the last ones are short.
            points = points - width * (0.5 * (1 - step / (steps + 1)) ** 2) * gradient.nan_to_num().sign()
    return None


def _padded(polytopes: Sequence[Polytope]) -> tuple[Tensor, Tensor]:
    """Rows (P, R, outputs) and limits (P, R) of P polytopes; fewer rows than R are padded with the first row."""
    most = max(len(polytope.limits) for polytope in polytopes)
    index = [[i if i < len(polytope.limits) else 0 for i in range(most)] for polytope in polytopes]
    rows = np.stack([polytope.rows[chosen] for polytope, chosen in zip(polytopes, index, strict=True)])
    limits = [[float(polytope.limits[i]) for i in chosen] for polytope, chosen in zip(polytopes, index, strict=True)]
    return torch.from_numpy(rows), torch.tensor(limits, dtype=torch.float64)
