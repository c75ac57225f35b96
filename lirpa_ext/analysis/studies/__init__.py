"""Studies of randomized models (S. Lee, 2021, chapter 2): functions that return numbers, and functions that plot them.

Each compares several models, given by name. ``lirpa-ext study`` runs them on the folders of ``lirpa-ext fit``.
"""

from __future__ import annotations

from ...training import of_lightning
from .gradients import (
    Concentrations,
    CosineMatrix,
    GradientScatter,
    concentrations,
    cosine_matrix,
    gradient_scatter,
    plot_concentrations,
    plot_cosines,
    plot_scatter,
)
from .robustness import (
    AccuracyStudy,
    LossIncrease,
    TransferMatrix,
    accuracy_study,
    loss_increase,
    plot_accuracy,
    plot_loss_increase,
    plot_transfer,
    transfer_matrix,
)
from .training import ConcentrationTrace, concentration_record

_OF_LIGHTNING = {"GradientConcentration": "callbacks"}

__all__ = [
    "AccuracyStudy",
    "ConcentrationTrace",
    "Concentrations",
    "CosineMatrix",
    "GradientConcentration",
    "GradientScatter",
    "LossIncrease",
    "TransferMatrix",
    "accuracy_study",
    "concentration_record",
    "concentrations",
    "cosine_matrix",
    "gradient_scatter",
    "loss_increase",
    "plot_accuracy",
    "plot_concentrations",
    "plot_cosines",
    "plot_loss_increase",
    "plot_scatter",
    "plot_transfer",
    "transfer_matrix",
]

__getattr__ = of_lightning(__name__, _OF_LIGHTNING)
