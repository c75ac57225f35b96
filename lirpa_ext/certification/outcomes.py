"""Outcomes of the samples of a batch: margins at points of the set, bounds that they refute, and the records."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..module import guard
from .results_file import Record

NOT_FINITE = "the model's output is NaN or infinite at a point of the set"


class Problem(NamedTuple):
    """An error of one sample.

    Attributes:
        text: The message.
        defect: Whether a point refuted a bound; then no bound of that method on the sample counts.
    """

    text: str
    defect: bool = False


class Watched(nn.Module):
    """A model that records the least margins over all points on which it is evaluated.

    Args:
        model: Classifier, (B, ...) -> (B, classes).
        y: Labels of the samples, (B,).

    Attributes:
        least: Least value of each z_y - z_j so far, (B, classes - 1); NaN once a logit was not finite.
    """

    least: Tensor

    def __init__(self, model: nn.Module, y: Tensor) -> None:
        super().__init__()
        self.model, self.y = model, y
        self.least = torch.tensor(math.inf, device=y.device)

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, (B, classes)."""
        logits = self.model(x)
        rows = margins_to(logits.detach(), self.y)
        self.least = torch.minimum(self.least.to(rows), rows)  # NaN stays
        return logits


def margins_to(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - z_j for every other class j, (B, classes - 1); NaN for a sample with a logit that is not finite."""
    others = torch.arange(logits.shape[1], device=logits.device) != y.unsqueeze(1)
    rows = (logits.gather(1, y.unsqueeze(1)) - logits)[others].view(len(logits), -1)
    return torch.where(logits.isfinite().all(1, keepdim=True), rows, math.nan)


def note(messages: list[Problem | None], samples: Tensor, failed: list[Problem | None]) -> None:
    """Add the problems of some samples to those of the batch, keeping the first problem of each sample.

    Args:
        messages: Problems of all samples of the batch, changed in place.
        samples: Positions in the batch, (K,).
        failed: Problem of each of these samples, or None.
    """
    for i, problem in zip(samples.tolist(), failed, strict=True):
        messages[i] = messages[i] or problem


def see(
    seen: Tensor, messages: list[Problem | None], samples: Tensor, found: Tensor, failed: list[Problem | None]
) -> None:
    """Add margins found at points of some samples' sets, except for samples that failed.

    Args:
        seen: Least margins of all samples of the batch, (B, S), changed in place.
        messages: Problems of all samples of the batch, changed in place.
        samples: Positions in the batch, (K,).
        found: Least margins of these samples, (K, S).
        failed: Problem of each of these samples, or None.
    """
    note(messages, samples, failed)
    worked = torch.tensor([problem is None for problem in failed], device=seen.device)
    seen[samples[worked]] = torch.minimum(seen[samples[worked]], found[worked])


def refuted(lower: Tensor, seen: Tensor, noise: Tensor) -> Tensor:
    """Which lower bounds are above a value found in the set by more than rounding errors.

    Args:
        lower: Lower bounds of the margins, (..., B, S); NaN stands for no bound, and is not refuted.
        seen: Least values of the margins at points of the set, (..., B, S).
        noise: Scale of the rounding errors (`guard.noise`), (B,).

    Returns:
        Bool, (..., B, S).
    """
    most = seen + guard.slack(noise.unsqueeze(1), 2.0, lower)  # a row has the coefficients 1 and -1
    return (lower == math.inf) | ~(lower.isnan() | (lower <= most))


def judge(
    levels: list[float],
    found: list[float],
    lower: list[float],
    problems: list[Problem | None],
    masked: list[bool],
) -> list[dict[str, Any]]:
    """Outcome of one sample at each eps; a certificate at one eps counts at every smaller eps too.

    Args:
        levels: Every eps, ascending.
        found: Least margin found by the attack or at other points, for each eps.
        lower: Lower bound of the margin, for each eps.
        problems: Problem at each eps, or None.
        masked: Whether the attack at this eps never had a gradient.

    Returns:
        One dict for each eps, see `lirpa_ext.certification.results_file`.
    """
    outcomes = []
    held = -math.inf
    for eps, attack, own, problem, hidden in reversed(list(zip(levels, found, lower, problems, masked, strict=True))):
        message = problem.text if problem else "" if math.isfinite(attack) else NOT_FINITE
        bound = own if message else max(own, held)
        if not message:
            held = bound
        # The attack comes first: a bound may be above the attack's margin by a rounding error.
        status = "error" if message else "attacked" if attack <= 0 else "certified" if bound > 0 else "unknown"
        outcomes.append(
            {
                "eps": eps,
                "status": status,
                "attack_margin": finite(attack),
                "masked": hidden,
                "verified_margin": finite(bound),
                "message": message,
            }
        )
    return outcomes[::-1]


def distrust(record: Record, defect: Problem) -> None:
    """Discard all bounds of a sample, at every eps, because one of them was refuted.

    Args:
        record: Record of the sample, changed in place.
        defect: The refuted bound.
    """
    where = f"sample {record['index']}"
    text = defect.text if f"{where} " in defect.text else f"{where}: {defect.text}"
    for level in record["levels"]:
        level |= {"status": "error", "verified_margin": None, "message": text}
    record["radius"] = None


def distrusted(record: Record) -> bool:
    """Whether all bounds of a sample were discarded, by `distrust` or because of an error at every eps."""
    return all(level["status"] == "error" and level["verified_margin"] is None for level in record["levels"])


def say(record: Record, text: str) -> None:
    """Append a text to the message of a record."""
    record["message"] = "; ".join(part for part in (record["message"], text) if part)


def finite(value: float | Tensor) -> float | None:
    """The value as a float, or None if it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None
