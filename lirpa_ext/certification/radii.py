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
    """Write the largest certified eps into each record, by bisection on all samples at once.

    A reported radius was certified itself, so the search does not assume that bounds are monotone in eps. The radius is
    0 for a sample that is misclassified or certified at no eps, and None if no eps was certified due to an error.

    Args:
        certifier: Computes the bounds.
        records: Records of the batch, changed in place.
        x: Inputs, (B, ...).
        y: Labels, (B,).
        seen: Least value of each margin at the clean point, and at points of the set of each eps, (1 + L, B, S).
        noise: Scale of the rounding errors (`guard.noise`), (B,).
        tolerance: Width at which the bisection stops, in units of eps (times the largest eps if that is below 1).
    """
    margins = [record["clean_margin"] for record in records]
    some = [i for i, margin in enumerate(margins) if margin is not None and not (margin > 0 and distrusted(records[i]))]
    if some:
        _Search(certifier, [records[i] for i in some], x[some], y[some], seen[:, some], noise[some]).run(tolerance)


class _Search:
    """One bisection over a batch.

    Attributes:
        certified: Largest eps at which each sample was certified, (B,).
        failed: Smallest eps at which each sample was not certified, (B,); infinite if there is none yet.
        stopped: Whether an error ended the search of a sample, (B,).
        before: `certified` before the search, (B,).
        proof: Lower bounds of the margins at `certified`, (B, S); -inf where `certified` is still `before`.
    """

    def __init__(
        self, certifier: Certifier, records: list[Record], x: Tensor, y: Tensor, seen: Tensor, noise: Tensor
    ) -> None:
        self.certifier, self.records, self.x, self.y, self.seen, self.noise = certifier, records, x, y, seen, noise
        self.levels = [level["eps"] for level in records[0]["levels"]]
        self.certified, self.failed = x.new_zeros(len(x)), x.new_zeros(len(x))
        self.stopped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
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
        """Run the search, and write the radii into the records."""
        largest = max(self.levels)
        width, limit = tolerance * min(1.0, largest or 1.0), _LARGEST_GROWTH * (largest or 1.0)
        while True:
            grown = torch.where(self.certified > 0, 2 * self.certified, largest or tolerance)
            trial = torch.where(self.failed < math.inf, (self.certified + self.failed) / 2, grown)
            between = (self.certified < trial) & (trial < self.failed)  # False if no float lies between the two
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
        # Points found in the ball of the largest level below eps are in the ball of eps too.
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
        """Compare the bounds that certified the final radii with the network at corners of the sets.

        The bounds of the levels were compared in `Certifier.certify` already. A sample that fails goes back to
        `before`, its certified eps before the search.
        """
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
            elif problem or not found[j].amin() > 0:  # no positive margin: within rounding errors of the bound
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
