"""Expectation over transformation (EOT): attacks on the average of a randomized model, not on a single draw."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..domain.perturbation import PerturbationLpNorm
from ..errors import InvalidInputError
from ..randomized.sampling import sample
from .base import Attack, Target

AVERAGES = ("gradients", "outputs")
KEPT = ("best", "final")
_MOST_ROWS = 1024  # samples times draws that are evaluated together


class EOT(Attack):
    """Wrapper of an attack that averages its gradients over draws of a randomized model (Lee, 2021, 2.2.8).

    A. Athalye et al., Synthesizing robust adversarial examples, ICML 2018. Each gradient takes new draws. Points are
    scored by the mean class probabilities over the same draws; their effect on other draws is measured by
    `lirpa_ext.certification.robust_accuracy.evaluate`. A deterministic model has one draw, and its attack is the one
    that is wrapped.

    Args:
        attack: The attack, such as ``PGD(20, step_size=0.25)`` (EOT-PGD) or ``FGSM()`` (EOT-FGSM).
        draws: Networks drawn for each gradient, default 20.
        average: "gradients" (default): the mean over draws of the loss's gradient, as in Lee (2021); "outputs": the
            gradient of the loss of the mean class probabilities.
        keep: "best": keep each sample's best point of all that were evaluated; "final": only of the ends of the
            attack's runs, as in Lee (2021). Default "best" for deterministic models and "final" for randomized ones:
            the best of many scores belongs to a lucky draw, which weakens the attack, most with few draws.

    Raises:
        InvalidInputError: `draws` is below 1, `average` or `keep` is unknown, or the attack is an `EOT` itself.

    Example:
        >>> from lirpa_ext import PerturbationLpNorm
        >>> from lirpa_ext.attacks import EOT, FGSM
        >>> model, x, y = torch.nn.Linear(2, 2, bias=False), torch.tensor([[0.5, 0.5]]), torch.tensor([0])
        >>> model.weight.data = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> EOT(FGSM(), draws=5)(model, x, y, PerturbationLpNorm(0.25)).inputs
        tensor([[0.2500, 0.7500]])
    """

    def __init__(self, attack: Attack, draws: int = 20, average: str = "gradients", keep: str | None = None) -> None:
        if not isinstance(attack, Attack) or isinstance(attack, EOT):
            raise InvalidInputError(f"EOT wraps an attack such as PGD(), got {type(attack).__name__}")
        if draws < 1:
            raise InvalidInputError(f"EOT needs at least one draw, got {draws}")
        for name, value, known in (("average", average, AVERAGES), ("keep", keep, (None, *KEPT))):
            if value not in known:
                raise InvalidInputError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
        self.attack, self.draws, self.average, self.keep = attack, draws, average, keep

    def run(self, target: Target) -> None:
        """Run the wrapped attack on the average."""
        self.attack.run(target)

    def target(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationLpNorm,
        generator: torch.Generator,
        targets: Tensor | None,
    ) -> ExpectedTarget:
        """Make the batch under attack whose gradients are averages; the arguments are those of the call."""
        return ExpectedTarget(self, model, x, y, perturbation, generator, targets)


class ExpectedTarget(Target):
    """A batch under attack whose gradients and logits are averages over draws of the model.

    Args:
        eot: The attack, which says over how many draws and what is averaged.
        model: Classifier, (B, ...) -> (B, classes).
        x: Clean inputs, (B, ...).
        y: Labels, (B,).
        perturbation: The set around each sample.
        generator: Source of every random number.
        targets: Classes that a targeted attack aims at, (B,), or None.
    """

    def __init__(
        self,
        eot: EOT,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        perturbation: PerturbationLpNorm,
        generator: torch.Generator,
        targets: Tensor | None = None,
    ) -> None:
        self.eot = eot
        super().__init__(model, x, y, perturbation, generator, targets, eot.keep)

    @property
    def draws(self) -> int:
        """Number of draws in an average; 1 for a deterministic model."""
        return self.eot.draws if self.randomized else 1

    def outputs(self, points: Tensor) -> Iterator[Tensor]:
        """Logits of new draws, in parts of (some draws, B, classes); (1, B, classes) for a deterministic model."""
        if not self.randomized:
            yield self.model(points).unsqueeze(0)
            return
        together = max(1, _MOST_ROWS // max(1, len(points)))
        for start in range(0, self.draws, together):
            yield sample(self.model, self.generator, min(together, self.draws - start)).each(points)

    def logits(self, points: Tensor) -> Tensor:
        """Logarithm of the mean class probabilities over new draws, (B, ...) -> (B, classes)."""
        return mean_output(torch.cat(list(self.outputs(points))))

    def value_and_gradient(self, points: Tensor, loss: str) -> tuple[Tensor, Tensor]:
        """As `Target.value_and_gradient`, averaged over new draws."""
        points = points.detach().requires_grad_()
        value, gradient, outputs = torch.zeros_like(self.best.margins), torch.zeros_like(points), []
        with torch.enable_grad():
            for logits in self.outputs(points):
                if self.eot.average == "gradients":
                    losses = torch.stack([self.loss(loss, some) for some in logits]).sum(0)
                    gradient += self.differentiate(losses, points) / self.draws
                    value += losses.detach() / self.draws
                    logits = logits.detach()  # frees the graph
                outputs.append(logits)
            mean = mean_output(torch.cat(outputs))
            if self.eot.average == "outputs":
                losses = self.loss(loss, mean)
                value, gradient = losses.detach(), self.differentiate(losses, points)
        if self.keep == "best":
            self.remember(points.detach(), mean.detach())
        self.note(gradient)
        return value, gradient


def mean_output(logits: Tensor) -> Tensor:
    """Logits of an ensemble: the logarithm of the mean over draws of the class probabilities.

    Args:
        logits: Logits of each draw, (draws, B, classes).

    Returns:
        (B, classes); for a single draw its logits, which give the same probabilities.
    """
    if len(logits) == 1:
        return logits[0]
    return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))
