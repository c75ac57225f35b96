"""Adversarial training of randomized networks with GradDiv, and their evaluation by an ensemble.

The loss is L(X) + lambda R(X), equation (2.2.20) of S. Lee (2021): L is the loss at the points of an attack on the
randomized network (for Adv-BNN the negative evidence lower bound, for RSE the cross entropy), R the regularizer.
Nothing is verified of a randomized network; validation gives the accuracy of an ensemble, clean and under EOT-PGD,
judged by networks drawn after the attack.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..attacks import EOT, PGD
from ..certification.robust_accuracy import RobustAccuracy, evaluate
from ..data import Pair
from ..domain.perturbation import PerturbationLpNorm
from ..errors import ConfigError
from ..models.architectures import Network
from ..randomized import REGULARIZERS, elbo_loss, gradients
from ..reporting.files import write_whole
from .batchnorm import differs_in_training, fixed_statistics, recorded_statistics
from .objectives import Loss
from .schedules import Schedule, Values

if TYPE_CHECKING:
    from .module import CertifiedClassifier, Evaluation

__all__ = ["EnsembleReport", "check_randomized", "ensemble_report", "randomized_loss"]


def check_randomized(network: Network, loss: Loss, schedule: Schedule, evaluation: Evaluation) -> None:
    """Raise ConfigError unless the settings of a training go together, as far as randomized networks are concerned.

    The loss must be for the kind of network, GradDiv needs both a name and a weight, and the evaluation of a randomized
    network needs an attack and no bound.

    Args:
        network: The network.
        loss: The loss.
        schedule: The schedule, which has the weight of GradDiv.
        evaluation: Settings of the evaluation.
    """
    wanted = loss.objective.randomized
    if network.randomized != wanted:
        raise ConfigError(
            f"loss {loss.name!r} trains "
            + (f"networks with network.randomized: {wanted}" if wanted else "deterministic networks")
            + f", and network.randomized is {network.randomized!r}"
        )
    weighted = max(schedule.graddiv) > 0
    if weighted and loss.graddiv is None:
        raise ConfigError(f"schedule.graddiv weighs a regularizer: name it in loss.graddiv ({', '.join(REGULARIZERS)})")
    if loss.graddiv is not None and not weighted:
        raise ConfigError(f"loss.graddiv {loss.graddiv!r} has weight 0: set schedule.graddiv, such as [0, 1]")
    steps = (evaluation.attack_steps, evaluation.final_attack_steps)
    draws = (evaluation.draws, evaluation.attack_draws, evaluation.final_attack_draws)
    if wanted and (min(*steps, *draws) < 1 or not 0 < evaluation.step_size < math.inf):
        raise ConfigError(
            "a randomized network is judged by an attack: steps, draws and step_size in evaluation must be positive"
        )
    if wanted and (evaluation.method or evaluation.options):
        raise ConfigError("no bound verifies a randomized network: leave evaluation.method and evaluation.options out")
    if wanted and loss.stability:
        raise ConfigError("loss.stability is of activation bounds, which a randomized network has not")


def randomized_loss(
    loss: Loss, model: nn.Module, x: Tensor, y: Tensor, ball: PerturbationLpNorm, values: Values, samples: int
) -> Tensor:
    """kappa L(X) + (1 - kappa) L(X') + lambda R(X), with X' the end of an attack on X; (2.2.20) of Lee (2021).

    Terms of weight 0 are not computed. In the attack and in R, batch norms use the statistics of the clean batch.

    Args:
        loss: The loss, with attack and regularizer.
        model: Randomized network, in train mode.
        x: Inputs, (B, ...).
        y: Labels, (B,).
        ball: The set around each sample.
        values: eps (at 0, X' is X), kappa and lambda (``graddiv``).
        samples: Size of the training set, by which Adv-BNN divides the KL divergence.

    Returns:
        Mean over the batch, 0-dim.
    """

    def of(inputs: Tensor) -> Tensor:
        logits = model(inputs)
        if loss.objective.randomized == "adv-bnn":
            return elbo_loss(model, logits, y, samples, loss.kl_factor)
        return functional.cross_entropy(logits, y)

    with recorded_statistics(model) as statistics:
        parts = [values.kappa * of(x)] if values.kappa > 0 or differs_in_training(model) else []
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))  # the trainer seeds torch's at every step
    attacked = x
    if values.eps > 0 and values.kappa < 1:
        with fixed_statistics(statistics):
            attack = _attack(
                loss.attack_steps, loss.attack_draws, loss.step_size,
                random_start=loss.random_start, momentum=loss.momentum,
            )  # fmt: skip
            attacked = attack(model, x, y, ball, generator).inputs
    if values.kappa < 1:
        parts.append((1 - values.kappa) * of(attacked))
    if loss.graddiv is not None and values.graddiv > 0:
        with fixed_statistics(statistics):
            found = gradients(model, x, y, loss.graddiv_draws, generator)
        parts.append(values.graddiv * REGULARIZERS[loss.graddiv](found).mean())
    return torch.stack(parts).sum()


def _attack(steps: int, draws: int, step_size: float, random_start: bool = False, momentum: float = 0.0) -> EOT:
    """EOT-PGD as in Lee (2021): the last point counts, not the best one, whose score may be that of a lucky draw."""
    attack = PGD(steps, step_size=step_size, loss="cross-entropy", random_start=random_start, momentum=momentum)
    return EOT(attack, draws, keep="final")


@dataclass(frozen=True)
class EnsembleReport:
    """Evaluation of a randomized network by ``lirpa-ext validate`` and ``test``, in the form of a certification report.

    Attributes:
        accuracy: Accuracies at eps 0 and at the eps of the evaluation.
    """

    accuracy: RobustAccuracy

    @property
    def summary(self) -> list[dict[str, Any]]:
        """One row: eps, and clean and PGD accuracy as fractions; ``verified`` is None."""
        clean, attacked = (level.ensemble.value for level in self.accuracy.levels)
        return [{"eps": self.accuracy.levels[1].eps, "clean": clean, "pgd": attacked, "verified": None}]

    def table(self) -> str:
        """Accuracies with their confidence intervals, as text."""
        return f"{self.accuracy.table()}\n{self.accuracy.summary()}"

    def to_json(self, path: Path) -> None:
        """Write a JSON file with meta data, summary, and the accuracies with their confidence intervals.

        Raises:
            ResultsError: The file cannot be written.
        """
        meta = {
            "samples": self.accuracy.samples,
            "method": f"none: ensemble of {self.accuracy.draws} draws, {self.accuracy.attack}",
            "dtype": "float32",
        }
        content = {"meta": meta, "summary": self.summary, "accuracies": self.accuracy.rows()}
        write_whole(path, json.dumps(content, indent=1) + "\n")


def ensemble_report(module: CertifiedClassifier, data: Pair, final: bool, seed: int = 0) -> EnsembleReport:
    """Accuracy of an ensemble, clean and under EOT-PGD at the evaluation's eps, judged by networks drawn afterwards.

    Args:
        module: Trained module; its network is put in eval mode.
        data: Inputs, (N, ...), and labels, (N,).
        final: Whether to attack with the final steps and draws; else with those of the validation after each epoch.
        seed: Seed of all draws, default 0.
    """
    chosen = module.evaluation
    steps, draws = (
        (chosen.final_attack_steps, chosen.final_attack_draws) if final else (chosen.attack_steps, chosen.attack_draws)
    )
    return EnsembleReport(
        evaluate(
            module.model.eval(), data, [0.0, module.evaluation_eps], _attack(steps, draws, chosen.step_size),
            module.norm, *module.data_range, draws=chosen.draws, seed=seed,
        )
    )  # fmt: skip
