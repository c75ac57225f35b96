"""What became of the samples of a batch: the values that were seen, the bounds that they refute, and the records."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..module import guard
from .results_file import Record

NOT_FINITE = "the model's output is NaN or infinite at a point of the set"


class Problem(NamedTuple):
    """What went wrong with a sample.

    Attributes:
        text: The message.
        defect: Whether a bound was refuted, after which no bound of that method on the sample counts.
    """

    text: str
    defect: bool = False


class Watched(nn.Module):
    """A model that keeps the least value of each row z_y - z_j over all points that it was given, (B, S) as `least`."""

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
    """Enter the problems of some samples of a batch, the first of each sample."""
    for i, problem in zip(samples.tolist(), failed, strict=True):
        messages[i] = messages[i] or problem


def see(
    seen: Tensor, messages: list[Problem | None], samples: Tensor, found: Tensor, failed: list[Problem | None]
) -> None:
    """Enter what was found at points of some samples' sets, where that did not fail."""
    note(messages, samples, failed)
    worked = torch.tensor([problem is None for problem in failed], device=seen.device)
    seen[samples[worked]] = torch.minimum(seen[samples[worked]], found[worked])


def refuted(lower: Tensor, seen: Tensor, noise: Tensor) -> Tensor:
    """Which bounds (..., B, S) are above values that were seen in the set, by more than rounding; NaN is no bound."""
    most = seen + guard.slack(noise.unsqueeze(1), 2.0, lower)  # a row has the coefficients 1 and -1
    return (lower == math.inf) | ~(lower.isnan() | (lower <= most))


def judge(
    levels: list[float],
    found: list[float],
    lower: list[float],
    problems: list[Problem | None],
    masked: list[bool],
) -> list[dict[str, Any]]:
    """Outcome of one sample at each eps, from the largest down: a certificate holds at smaller eps too."""
    outcomes = []
    held = -math.inf
    for eps, attack, own, problem, hidden in reversed(list(zip(levels, found, lower, problems, masked, strict=True))):
        message = problem.text if problem else "" if math.isfinite(attack) else NOT_FINITE
        bound = own if message else max(own, held)
        if not message:
            held = bound
        # An attack comes first: a bound may be above it by its rounding.
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
    """No bound of a sample counts once the method was caught with a wrong one, whatever the eps."""
    where = f"sample {record['index']}"
    text = defect.text if f"{where} " in defect.text else f"{where}: {defect.text}"
    for level in record["levels"]:
        level |= {"status": "error", "verified_margin": None, "message": text}
    record["radius"] = None


def distrusted(record: Record) -> bool:
    return all(level["status"] == "error" and level["verified_margin"] is None for level in record["levels"])


def say(record: Record, text: str) -> None:
    record["message"] = "; ".join(part for part in (record["message"], text) if part)


def finite(value: float | Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None
