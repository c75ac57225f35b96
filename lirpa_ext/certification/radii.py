"""Certified radii: the largest eps that a method certifies for each sample, by bisection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .outcomes import NOT_FINITE, Problem, distrust, distrusted, refuted, say
from .results_file import Record

if TYPE_CHECKING:
    from .certifier import Certifier

# The search gives up here, in units of the largest eps asked for (a constant classifier).
_LARGEST_GROWTH = 2.0**20


def add_radii(
    certifier: Certifier, records: list[Record], x: Tensor, y: Tensor, seen: Tensor, noise: Tensor, tolerance: float
) -> None:
    """Put the largest eps that is certified into each record, by bisection on all samples at once.

    Only an eps that was certified itself is reported, so nothing is assumed of the method. 0 for a sample
    that is misclassified or certified nowhere, None for one that is certified nowhere due to an error.

    Args:
        certifier: Bounds and evaluates.
        records: Of the batch.
        x: Inputs, (B, ...).
        y: Labels, (B,).
        seen: Least value of each row at the clean point, and at points of the set of each level, (1 + L, B, S).
        noise: As in `guard`, (B,).
        tolerance: Width at which the bisection stops.
    """
    margins = [record["clean_margin"] for record in records]
    some = [i for i, margin in enumerate(margins) if margin is not None and not (margin > 0 and distrusted(records[i]))]
    if some:
        _Search(certifier, [records[i] for i in some], x[some], y[some], seen[:, some], noise[some]).run(tolerance)


class _Search:
    """One bisection. Of each sample: `certified`, the largest eps that was; `failed`, the least that was not."""

    def __init__(
        self, certifier: Certifier, records: list[Record], x: Tensor, y: Tensor, seen: Tensor, noise: Tensor
    ) -> None:
        self.certifier, self.records, self.x, self.y, self.seen, self.noise = certifier, records, x, y, seen, noise
        self.levels = [level["eps"] for level in records[0]["levels"]]
        self.certified, self.failed = x.new_zeros(len(x)), x.new_zeros(len(x))
        self.stopped = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # by an error
        for i, record in enumerate(records):
            status = {level["eps"]: level["status"] for level in record["levels"]}
            self.stopped[i] = set(status.values()) == {"error"}
            self.certified[i] = max((eps for eps in self.levels if status[eps] == "certified"), default=0.0)
            open_ = (eps for eps in self.levels if status[eps] in ("attacked", "unknown"))
            self.failed[i] = min(open_, default=math.inf)
            if record["clean_margin"] <= 0:
                self.failed[i], self.stopped[i] = 0.0, False
        self.before, self.proof = self.certified.clone(), torch.full_like(seen[0], -math.inf)

    def run(self, tolerance: float) -> None:
        """Search, and write the radii into the records."""
        largest = max(self.levels)
        width, limit = tolerance * min(1.0, largest or 1.0), _LARGEST_GROWTH * (largest or 1.0)
        while True:
            grown = torch.where(self.certified > 0, 2 * self.certified, largest or tolerance)
            trial = torch.where(self.failed < math.inf, (self.certified + self.failed) / 2, grown)
            between = (self.certified < trial) & (trial < self.failed)  # fails where rounding leaves no number between
            wide = (self.failed - self.certified > width) & (self.certified < limit)
            active = ~self.stopped & between & wide
            if not active.any():
                break
            self._try(torch.where(active, trial, self.certified), active.nonzero().flatten().tolist())
        self._hold_against_corners()
        for i, record in enumerate(self.records):
            record["radius"] = None if self.stopped[i] and self.certified[i] == 0 else float(self.certified[i])

    def _try(self, eps: Tensor, active: list[int]) -> None:
        lower, problems = self.certifier.lower(self.x, self.y, eps)
        # The points that were seen in the largest level below eps are points of this set too.
        inside = (eps.new_tensor(self.levels) <= eps.unsqueeze(1)).sum(1)
        known = self.seen[inside, torch.arange(len(eps), device=eps.device)]
        wrong = refuted(lower, known, self.noise)
        for i in active:
            problem = problems[i]
            if wrong[i].any() and not problem:
                problem = self._defect(i, wrong[i], eps[i], lower[i], known[i])
            if problem and problem.defect:
                self._distrust(i, problem)
            elif problem:
                self.stopped[i] = True
                say(self.records[i], f"radius search stopped at eps {float(eps[i]):.6g}: {problem.text}")
            elif lower[i].amin() > 0:
                self.certified[i], self.proof[i] = eps[i], lower[i]
            else:
                self.failed[i] = eps[i]

    def _hold_against_corners(self) -> None:
        """Hold the bounds of what was certified last against corners, those of the levels were."""
        grown = (self.certified > self.before).nonzero().flatten()
        if not len(grown):
            return
        eps, lower = self.certified[grown], self.proof[grown]
        found, problems = self.certifier.by_sample(self.certifier.at_corners, self.x[grown], self.y[grown], eps, lower)
        wrong = refuted(lower, found, self.noise[grown])
        for j, i in enumerate(grown.tolist()):
            problem = problems[j]
            if not problem and not found[j].isfinite().all():
                problem = Problem(NOT_FINITE)
            if wrong[j].any() and not problem:
                problem = self._defect(i, wrong[j], eps[j], lower[j], found[j])
            if problem and problem.defect:
                self._distrust(i, problem)
            elif problem or not found[j].amin() > 0:  # or a tie, which rounding hid from the bound
                self.certified[i] = self.before[i]
                if problem:
                    say(self.records[i], f"radius search: at eps {float(eps[j]):.6g}: {problem.text}")

    def _defect(self, i: int, wrong: Tensor, eps: Tensor, lower: Tensor, found: Tensor) -> Problem:
        row = int(wrong.int().argmax())
        index, label = self.records[i]["index"], int(self.y[i])
        return self.certifier.defect(index, label, row, float(eps), float(lower[row]), float(found[row]))

    def _distrust(self, i: int, problem: Problem) -> None:
        self.stopped[i], self.certified[i] = True, 0.0
        distrust(self.records[i], problem)
