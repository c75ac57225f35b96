"""Adversarial training of randomized networks, with GradDiv, and what takes the place of certificates for them.

S. Lee (2021), 2.2: L(X) + lambda R(X), (2.2.20), with L the loss at the points of an attack on the randomized network:
Adv-BNN's evidence lower bound, or RSE's cross entropy. Nothing is verified of a randomized network; validation gives
the accuracy of an ensemble, clean and under EOT-PGD, judged by draws that the attack has not seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..analysis.results import Result
from ..attacks import EOT, PGD
from ..errors import ConfigError
from ..perturbation import PerturbationLpNorm
from ..randomized import REGULARIZERS, elbo_loss, gradients
from ..randomized.evaluation import RobustAccuracy, evaluate
from .architectures import Network
from .batchnorm import fixed_statistics, recorded_statistics
from .objectives import Loss
from .schedules import Schedule, Values

if TYPE_CHECKING:
    from .module import CertifiedClassifier

__all__ = ["check_randomized", "ensemble_accuracy", "randomized_loss"]


def check_randomized(network: Network, loss: Loss, schedule: Schedule) -> None:
    """Raise ConfigError unless the loss is one of this network, and GradDiv has both a name and a weight."""
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
    if wanted and loss.stability:
        raise ConfigError("loss.stability is of activation bounds, which a randomized network has not")


def source_attack(steps: int, draws: int, step_size: float = 0.25) -> EOT:
    """EOT-PGD of the source (2.2.4): steps of eps / 4 on the cross entropy, from the clean input.

    Args:
        steps: m in the source.
        draws: n in the source.
        step_size: Fraction of eps.
    """
    return EOT(PGD(steps, step_size=step_size, loss="cross-entropy", random_start=False), draws, keep="final")


def randomized_loss(
    loss: Loss, model: nn.Module, x: Tensor, y: Tensor, ball: PerturbationLpNorm, values: Values, samples: int
) -> Tensor:
    """kappa L(X) + (1 - kappa) L(X') + lambda R(X'), X' the end of an attack on X, (2.2.20).

    What has weight 0 is not computed. Batch norm takes the clean batch's statistics in the attack and in R.

    Args:
        loss: Which.
        model: Randomized network, in train mode.
        x: Inputs, (B, ...).
        y: Labels, (B,).
        ball: The set around each sample; where its eps is 0, X' is X.
        values: kappa and lambda.
        samples: Size of the training set.

    Returns:
        Mean over the batch, 0-dim.
    """

    def of(inputs: Tensor) -> Tensor:
        logits = model(inputs)
        if loss.objective.randomized == "adv-bnn":
            return elbo_loss(model, logits, y, samples, loss.kl_factor)
        return functional.cross_entropy(logits, y)

    with recorded_statistics(model) as statistics:
        parts = [values.kappa * of(x)] if values.kappa > 0 or _normalizes(model) else []
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))  # the trainer seeds torch's at every step
    attacked = x
    if values.eps > 0 and (values.kappa < 1 or values.graddiv > 0):
        with fixed_statistics(statistics), _constant(model):
            attacked = source_attack(loss.attack_steps, loss.attack_draws, loss.step_size)(
                model, x, y, ball, generator
            ).inputs
    if values.kappa < 1:
        parts.append((1 - values.kappa) * of(attacked))
    if loss.graddiv is not None and values.graddiv > 0:
        with fixed_statistics(statistics):
            found = gradients(model, attacked, y, loss.graddiv_draws, generator)
        parts.append(values.graddiv * REGULARIZERS[loss.graddiv](found).mean())
    return torch.stack(parts).sum()
