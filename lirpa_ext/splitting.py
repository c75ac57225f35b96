"""Branch and bound on the input: boxes that a method leaves open are halved, the weakest first."""

from __future__ import annotations

import heapq
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from .falsify import Function, Judge, Witness
from .goals import Bounder, Goal
from .limits import OutOfTime
from .vnnlib import Case

MOST_INPUTS = 12  # that vary; the number of boxes grows exponentially with it
_MOST_BOXES = 2**18
_BATCH = 128  # boxes halved at once


class Split(NamedTuple):
    """What halving boxes gave.

    Attributes:
        margin: The least margin of all boxes that were made: a lower bound of the case's.
        witness: A counterexample, if one was met.
        boxes: How many were bounded.
        cause: Why it stopped before all were settled, or "".
    """

    margin: float
    witness: Witness | None
    boxes: int
    cause: str


def split(bounder: Bounder, judge: Judge, index: int, case: Case, goal: Goal, lower: np.ndarray, method: str) -> Split:
    """Halve boxes until each is settled: its margin is positive, hence that of the box that they cover.

    Args:
        bounder: Gives the bounds.
        judge: Judges the boxes' centers.
        index: Index of the case.
        case: The box to start with.
        goal: What is to be shown.
        lower: Bounds (U,) on it of the goal's rows.
        method: Of the bounder.
    """
    settled, boxes, order = np.inf, 0, count()
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
            sensitivity, reached = _probe(judge.function, middle, goal, known)
            for i in reached:
                found = judge.witness(index, case, middle[i])
                if found is not None:
                    return Split(weakest, found, boxes, "")
            axis = ((sensitivity + 0.1 * sensitivity.mean(1, keepdims=True) + 1e-12) * width).argmax(1)
            half = np.arange(len(batch)), axis
            left, right = high.copy(), low.copy()
            left[half] = right[half] = middle[half]
            low, high = np.concatenate([low, right]), np.concatenate([left, high])
            # What holds on a box holds on its halves.
            bounds = np.maximum(bounder.lower(method, low, high, goal.rows), np.concatenate([known, known]))
        except OutOfTime:
            return Split(weakest, None, boxes, f"out of time after {boxes} boxes, with {len(heap) + len(batch)} open")
        boxes += len(low)
        for i, margin in enumerate(goal.margins(bounds).min(-1).tolist()):
            if margin > 0:
                settled = min(settled, margin)
            else:
                heapq.heappush(heap, (margin, next(order), low[i], high[i], bounds[i]))
    return Split(float(settled), None, boxes, "")


def _probe(function: Function, points: np.ndarray, goal: Goal, lower: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """How much each input moves the box's weakest row at the center, (B, inputs), and which centers are unsafe."""
    x = torch.from_numpy(points).requires_grad_()
    with torch.enable_grad():
        values = function(x) @ torch.from_numpy(goal.rows).T
        chosen = values.gather(1, torch.from_numpy(goal.weakest(lower))[:, None])
        (gradient,) = torch.autograd.grad(chosen.sum(), x)
    unsafe = (goal.margins(values.detach().numpy()) <= 0).any(-1)
    return gradient.nan_to_num().abs().numpy(), np.flatnonzero(unsafe).tolist()[:3]
