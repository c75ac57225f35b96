"""Robust accuracy of a randomized model: adversarial examples, judged by networks that are drawn after the attack."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks import EOT, PGD, Attack
from ..data import gather
from ..domain.lp_ball import check_eps
from ..domain.perturbation import PerturbationLpNorm
from ..domain.specifications import margins
from ..errors import InvalidInputError
from ..module.tracing import check_mode
from ..randomized.sampling import is_randomized, predict, sample
from ..reporting.results import Result, Row

__all__ = ["Accuracy", "Level", "RobustAccuracy", "correct", "drawn_networks", "evaluate", "source_attack", "wilson"]


class Accuracy(NamedTuple):
    """An accuracy as a fraction, and the ends of its confidence interval."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Level:
    """Accuracies at one eps.

    Attributes:
        eps: Radius of the ball.
        single: Accuracy of one drawn network, the mean over samples and draws. The interval accounts for the choice of
            the samples, not of the draws.
        spread: Standard deviation over draws of a single network's accuracy on the same samples.
        ensemble: Accuracy of the ensemble of all draws.
        masked: Number of samples that the ensemble classifies correctly and of which the attack had no gradient
            (gradient masking), so that its failure there is no evidence of robustness.
    """

    eps: float
    single: Accuracy
    spread: float
    ensemble: Accuracy
    masked: int = 0


@dataclass(frozen=True)
class RobustAccuracy(Result):
    """Result of `evaluate`.

    Attributes:
        levels: Accuracies, one `Level` for each eps.
        attack: The attack, as text.
        norm: p of the ball.
        samples: Number of samples.
        draws: Number of networks that judge each sample.
        confidence: Confidence level of the intervals, in (0, 1).
    """

    levels: tuple[Level, ...]
    attack: str
    norm: float
    samples: int
    draws: int
    confidence: float

    def rows(self) -> list[Row]:
        """One row for each eps."""
        rows = []
        for level in self.levels:
            row: Row = {"eps": level.eps}
            for name in ("single", "ensemble"):
                accuracy: Accuracy = getattr(level, name)
                row |= {name: accuracy.value, f"{name}_lower": accuracy.lower, f"{name}_upper": accuracy.upper}
            rows.append(
                row | {"spread": level.spread, "masked": level.masked, "samples": self.samples, "draws": self.draws}
            )
        return rows

    def summary(self) -> str:
        """How the accuracies were measured, and how many samples masked their gradient."""
        masked = "".join(
            f"; at eps {level.eps:g} {level.masked} of the right ones gave the attack no gradient: no evidence"
            for level in self.levels
            if level.masked
        )
        return (
            f"{self.attack} in l{self.norm:g} balls, {self.samples} samples, judged by {self.draws} fresh draws; "
            f"intervals of {100 * self.confidence:g}% (Wilson){masked}"
        )


def evaluate(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Iterable[Any],
    eps: float | Sequence[float],
    attack: Attack | None = None,
    norm: float = math.inf,
    x_L: float | Tensor | None = 0.0,
    x_U: float | Tensor | None = 1.0,
    *,
    draws: int = 20,
    by: str = "probability",
    confidence: float = 0.95,
    batch_size: int = 100,
    seed: int = 0,
) -> RobustAccuracy:
    """Accuracy on adversarial examples, judged by networks drawn after the attack.

    An attack adapts to the networks that it draws, so their accuracy on its examples is not that of other draws. Here
    each batch is attacked, and then `draws` networks, drawn anew, classify the examples, singly and as an ensemble. A
    tie or a NaN counts as wrong. The same seeds are used at all eps, which makes differences between eps less noisy.

    Args:
        model: Classifier, (B, ...) -> (B, classes), randomized or not, with batch norms in eval mode. A layer that
            draws in its current mode, such as a dropout in train mode, makes the model randomized.
        data: Pair (x, y), or an iterable of batches (x, y).
        eps: Radius or radii in units of the input; 0 gives the clean accuracy.
        attack: The attack. Default EOT-PGD as in Lee (2021): 20 steps of eps / 4 on the cross entropy from the clean
            input, 20 draws.
        norm: p of the ball, default inf.
        x_L: Lower end of the data range, default 0; None for none.
        x_U: Upper end of the data range, default 1; None for none.
        draws: Number of networks drawn to judge the examples, default 20; 1 for a deterministic model.
        by: How the ensemble decides, "probability" (default) or "vote".
        confidence: Confidence level of the intervals, default 0.95.
        batch_size: Samples at a time, default 100.
        seed: Seed of all draws, default 0.

    Returns:
        Single and ensemble accuracy at each eps.

    Raises:
        InvalidInputError: Numbers out of range, inputs outside of the data range, labels that are no class.
        DataError: There are no data.
        TrainModeError: A batch norm is in train mode.

    Example:
        >>> from lirpa_ext.attacks import PGD
        >>> model, x, y = nn.Linear(2, 2, bias=False), torch.tensor([[0.9, 0.1], [0.3, 0.5]]), torch.tensor([0, 1])
        >>> model.weight.data = torch.eye(2)
        >>> print(evaluate(model, (x, y), [0.0, 0.2], PGD(5)).levels[1].ensemble.value)
        0.5
    """
    levels = [float(level) for level in torch.as_tensor(eps, dtype=torch.float64).reshape(-1)]
    check_eps(torch.tensor(levels))
    check_mode(model)
    if not levels or draws < 1 or batch_size < 1 or not 0 < confidence < 1:
        raise InvalidInputError("give at least one eps, draws and batch_size of 1 or more, and a confidence in (0, 1)")
    attack = EOT(source_attack(), draws=20) if attack is None else attack
    draws = draws if is_randomized(model) else 1
    like = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
    x, y = gather(data)
    x, y = x.to(like), y.to(like.device, torch.long)
    found = []
    for level in levels:
        right, ensemble, masked = torch.zeros(draws, dtype=torch.float64), 0, 0
        for start in range(0, len(x), batch_size):
            some, labels = x[start : start + batch_size], y[start : start + batch_size]
            generator = torch.Generator().manual_seed((seed * 2**32 + start) % 2**63)
            hidden = torch.zeros_like(labels, dtype=torch.bool)
            if level > 0:
                ball = PerturbationLpNorm(level, norm, x_L, x_U)
                some, _, hidden = attack(model, some, labels, ball, generator)
            right += correct(drawn_networks(model, draws, generator), some, labels)
            won = margins(predict(model, some, draws, generator, by), labels) > 0
            ensemble, masked = ensemble + int(won.sum()), masked + int((won & hidden).sum())
        rates = right / len(x)
        found.append(
            Level(
                level,
                wilson(float(rates.mean()) * len(x), len(x), confidence),
                float(rates.std()) if draws > 1 else 0.0,
                wilson(ensemble, len(x), confidence),
                masked,
            )
        )
    return RobustAccuracy(tuple(found), repr(attack), float(norm), len(x), draws, confidence)


def source_attack(steps: int = 20) -> PGD:
    """The PGD attack with which Lee (2021, 2.2.4) evaluates: steps of eps / 4 on the cross entropy, no random start.

    Args:
        steps: Number of steps, m in Lee (2021), default 20.
    """
    return PGD(steps, step_size=0.25, loss="cross-entropy", random_start=False)


def drawn_networks(model: nn.Module, draws: int, generator: torch.Generator) -> list[nn.Module]:
    """Draw networks from a randomized model.

    Args:
        model: The model; a deterministic one is returned as the only network.
        draws: Number of networks.
        generator: Source of the draws.

    Returns:
        Deterministic networks, each with its draws held fixed.
    """
    return [sample(model, generator) for _ in range(draws)] if is_randomized(model) else [model]


@torch.no_grad()
def correct(networks: Sequence[nn.Module], x: Tensor, y: Tensor) -> Tensor:
    """Number of samples that each network classifies correctly; a tie or a NaN counts as wrong.

    Args:
        networks: Classifiers, (B, ...) -> (B, classes).
        x: Inputs, (B, ...).
        y: Labels, (B,).

    Returns:
        Counts, (networks,), float64, on the CPU.
    """
    return torch.stack([(margins(network(x), y) > 0).sum() for network in networks]).double().cpu()


def wilson(successes: float, trials: int, confidence: float = 0.95) -> Accuracy:
    """Wilson's confidence interval of a success probability.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927. For trials whose
    results are fractions in [0, 1], such as the share of draws that are right, the interval is too wide rather than too
    narrow, because a result of 0 or 1 has the largest variance for a given mean.

    Args:
        successes: Number of successes, or sum of fractions.
        trials: Number of trials.
        confidence: Confidence level, in (0, 1), default 0.95.

    Returns:
        The observed share, and the ends of the interval.

    Raises:
        InvalidInputError: No trial, more successes than trials, or a confidence out of range.

    >>> wilson(8, 10)
    Accuracy(value=0.8, lower=0.490..., upper=0.943...)
    """
    if trials < 1 or not -1e-9 <= successes <= trials * (1 + 1e-12) or not 0 < confidence < 1:
        raise InvalidInputError(f"no interval for {successes} successes in {trials} trials at {confidence}")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(max(share * (1 - share), 0) / trials + (z / (2 * trials)) ** 2) / (1 + z * z / trials)
    # The share lies in the interval; rounding may move an end past a share of 0 or 1.
    return Accuracy(share, min(max(center - half, 0.0), share), max(min(center + half, 1.0), share))
