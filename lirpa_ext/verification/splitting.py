"""Branch and bound on the input: boxes that are not verified are halved, the one of least margin first."""

from __future__ import annotations

import heapq
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.limits import OutOfTime
from ..errors import SoundnessError
from ..module import guard
from .evidence import Evidence
from .falsify import Judge, Witness
from .goals import Bounder
from .vnnlib import Case

MOST_INPUTS = 12  # varying inputs; the number of boxes grows exponentially with them
_MOST_BOXES = 2**18
_BATCH = 128  # boxes halved at once


_Seen = list[tuple[np.ndarray, np.ndarray]]  # points (B, inputs), one of each box, and values of the rows there (B, U)


class Split(NamedTuple):
    """Result of a branch and bound.

    Attributes:
        margin: Least margin over the boxes that cover the case's box: a lower bound of the case's margin.
        witness: A counterexample, or None.
        boxes: Number of boxes that were bounded.
        cause: Why the search stopped before all boxes were verified, or "".
    """

    margin: float
    witness: Witness | None
    boxes: int
    cause: str


def split(bounder: Bounder, judge: Judge, index: int, case: Case, evidence: Evidence, method: str) -> Split:
    """Halve the box of a case until the margin of every part is positive, or a counterexample or a limit is met.

    Before a box counts as verified, its bounds are compared with the network at the box's center, at the corner where
    the gradient predicts the least value of the decisive row (`Goal.weakest`), at a random corner, and at such points
    of the box of which it is a half.

    Args:
        bounder: Computes the bounds.
        judge: Decides whether a point is a counterexample.
        index: Index of the case.
        case: The case.
        evidence: The goal, and the bounds to start with; values at points are added.
        method: Bound method for the boxes.

    Returns:
        Margin, counterexample, number of boxes, and why the search stopped early.

    Raises:
        SoundnessError: A point refutes a bound.
    """
    goal, settled, boxes, order = evidence.goal, np.inf, 0, count()
    points = _Points(judge, index, case, evidence, method)
    lower = evidence.lower
    heap = [(float(goal.margins(lower).min()), next(order), case.lower, case.upper, lower)]
    while heap:
        weakest = min(settled, heap[0][0])
        if boxes >= _MOST_BOXES:
            return Split(weakest, None, boxes, f"{boxes} boxes were bounded, and {len(heap)} are open")
        batch = [heapq.heappop(heap) for _ in range(min(_BATCH, len(heap)))]
        low, high, known = (np.stack(parts) for parts in list(zip(*batch, strict=True))[2:])
        try:
            middle = low + (high - low) / 2
            width = np.where((low < middle) & (middle < high), high - low, 0)
            if not width.any(axis=1).all():
                return Split(weakest, None, boxes, "a box is too small to be halved")
            sensitivity, seen = points.of(low, high, known)
            if points.witness is not None:
                return Split(weakest, points.witness, boxes, "")
            axis = ((sensitivity + 0.1 * sensitivity.mean(1, keepdims=True) + 1e-12) * width).argmax(1)
            half = np.arange(len(batch)), axis
            left, right = high.copy(), low.copy()
            left[half] = right[half] = middle[half]
            low, high = np.concatenate([low, right]), np.concatenate([left, high])
            bounds = bounder.lower(method, low, high, goal.rows)
            points.hold(bounds, low, high, seen)
            bounds = np.maximum(bounds, np.concatenate([known, known]))  # what holds on a box holds on its halves
            margins = goal.margins(bounds).min(-1)
            done = margins > 0
            if done.any():  # the points of the other boxes are evaluated when they are halved
                points.of(low[done], high[done], bounds[done])
                if points.witness is not None:
                    return Split(weakest, points.witness, boxes, "")
        except OutOfTime:
            return Split(weakest, None, boxes, f"out of time after {boxes} boxes, with {len(heap) + len(batch)} open")
        boxes += len(low)
        for i, margin in enumerate(margins.tolist()):
            if margin > 0:
                settled = min(settled, margin)
            else:
                heapq.heappush(heap, (margin, next(order), low[i], high[i], bounds[i]))
    return Split(float(settled), None, boxes, "")


class _Points:
    """Evaluates the network at points of boxes, compares bounds with the values, and checks unsafe points.

    Attributes:
        witness: The first counterexample, or None.
    """

    def __init__(self, judge: Judge, index: int, case: Case, evidence: Evidence, method: str) -> None:
        self.judge, self.index, self.case, self.evidence, self.method = judge, index, case, evidence, method
        self.witness: Witness | None = None
        self.random = np.random.default_rng(0)

    def of(self, low: np.ndarray, high: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, _Seen]:
        """Compare bounds of boxes with the network at some of their points.

        Args:
            low: Lower ends of the boxes, (B, inputs).
            high: Upper ends of the boxes, (B, inputs).
            bounds: Lower bounds of the rows, (B, U).

        Returns:
            Absolute gradient of the decisive row at the center of each box, (B, inputs); and the points with the values
            of the rows there.

        Raises:
            SoundnessError: A point refutes a bound.
        """
        # The case's ends are rounded outward; the points must lie in the exact box of the file.
        low, high = (np.clip(end, self.case.inner_lower, self.case.inner_upper) for end in (low, high))
        center = np.clip(low + (high - low) / 2, low, high)
        values, gradient = self._values_and_gradient(center, bounds)
        seen = [(center, values)]
        for corner in (gradient > 0, self.random.random(low.shape) < 0.5):
            point = np.where(corner, low, high)
            with torch.no_grad():
                seen.append((point, self._look(point, self.judge.function(torch.from_numpy(point)))))
        for _, values in seen:
            self._hold(bounds, values)
        return np.abs(gradient), seen

    def hold(self, bounds: np.ndarray, low: np.ndarray, high: np.ndarray, seen: _Seen) -> None:
        """Compare bounds (2 B, U) of all left, then all right halves with the points `seen` in the whole boxes."""
        for point, values in seen:
            point, values = np.concatenate([point, point]), np.concatenate([values, values])
            inside = ((low <= point) & (point <= high)).all(1)
            self._hold(bounds[inside], values[inside])

    def _hold(self, bounds: np.ndarray, values: np.ndarray) -> None:
        wrong = np.argwhere(self.evidence.refuted(bounds, values) & ~np.isnan(values))
        if len(wrong):
            box, row = wrong[0]
            where = f"a box inside of case {self.index}"
            raise SoundnessError(
                guard.refuted(
                    self.method, f"row {self.evidence.goal.name(row)}", where, bounds[box, row], values[box, row]
                )
            )

    def _look(self, points: np.ndarray, outputs: Tensor) -> np.ndarray:
        margins = self.evidence.see(outputs)
        for i in np.flatnonzero(margins <= 0)[:3]:
            self.witness = self.witness or self.judge.witness(self.index, self.case, points[i])
        return self.evidence.goal.values(outputs)

    def _values_and_gradient(self, points: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of the rows, (B, U), and gradient of the decisive row of each box, (B, inputs), at points."""
        goal = self.evidence.goal
        x = torch.from_numpy(points).requires_grad_()
        with torch.enable_grad():
            outputs = self.judge.function(x)
            rows = torch.from_numpy(goal.rows[goal.weakest(bounds)])
            weakest = (outputs * rows).sum()
            (gradient,) = torch.autograd.grad(weakest, x) if weakest.requires_grad else (torch.zeros_like(x),)
        return self._look(points, outputs.detach()), gradient.nan_to_num().detach().numpy()
