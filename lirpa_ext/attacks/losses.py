"""Losses that attacks maximize, by name: one number for each sample, from its logits and its label.

"dlr" is the difference of logits ratio of F. Croce and M. Hein, Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks, ICML 2020: the negative margin divided by a spread of the logits, so that
scaling the logits does not mask the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from ..domain.specifications import margins
from ..errors import InvalidInputError

# Added to the spread, so that the loss is 0 and not NaN where all logits agree; as in the authors' code.
_LEAST_SPREAD = 1e-12


def _dlr(logits: Tensor, y: Tensor) -> Tensor:
    """-(z_y - max of the others) / (z_(1) - z_(3)), with z_(k) the k-th largest."""
    ordered = _ordered(logits, 3)
    return -margins(logits, y) / (ordered[:, 0] - ordered[:, 2] + _LEAST_SPREAD)


def _targeted_dlr(logits: Tensor, y: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)."""
    ordered = _ordered(logits, 4)
    own, wanted = (logits.gather(1, label.unsqueeze(1)).squeeze(1) for label in (y, targets))
    return (wanted - own) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + _LEAST_SPREAD)


def _ordered(logits: Tensor, least: int) -> Tensor:
    if logits.shape[1] < least:
        raise InvalidInputError(
            f"loss 'dlr' needs at least {least} classes, the model has {logits.shape[1]}; use 'margin'"
        )
    return logits.sort(dim=1, descending=True).values


# (logits (B, classes), y (B,)) -> (B,): large where the model is far from predicting y.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "margin": lambda logits, y: -margins(logits, y),
    "cross-entropy": lambda logits, y: functional.cross_entropy(logits, y, reduction="none"),
    "dlr": _dlr,
}

# (logits, y, targets (B,)) -> (B,): large where the model predicts the target.
TARGETED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "margin": lambda logits, y, targets: margins(logits, targets),
    "cross-entropy": lambda logits, y, targets: -functional.cross_entropy(logits, targets, reduction="none"),
    "dlr": _targeted_dlr,
}


def in_turn(loss: str | None, runs: int) -> list[str]:
    """The loss that each run of an attack maximizes.

    Args:
        loss: Name of the loss; None for cross-entropy and margin in turn.
        runs: Number of runs.

    Returns:
        A name of `LOSSES` for each run.

    Raises:
        InvalidInputError: The loss is unknown.
    """
    if loss is not None and loss not in LOSSES:
        raise InvalidInputError(f"unknown loss {loss!r}; known are {', '.join(LOSSES)}")
    return [loss or ("cross-entropy", "margin")[run % 2] for run in range(runs)]
