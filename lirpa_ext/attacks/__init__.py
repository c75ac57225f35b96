"""Attacks: points of a perturbation set that a classifier gets wrong, as an upper bound on its robustness.

`Attack` checks, projects, scores and remembers the best point of each sample; an attack writes `run`. On a randomized
model (`lirpa_ext.randomized`) each evaluation draws a network, and `EOT` around any attack averages over draws.
"""

from __future__ import annotations

from .apgd import APGD
from .autoattack import AutoAttack
from .base import Attack, Attacked, Target
from .eot import EOT, mean_output
from .gradient import FGM, FGSM, PGD
from .losses import LOSSES, TARGETED_LOSSES
from .search import RandomSearch

__all__ = [
    "APGD",
    "EOT",
    "FGM",
    "FGSM",
    "LOSSES",
    "PGD",
    "TARGETED_LOSSES",
    "Attack",
    "Attacked",
    "AutoAttack",
    "RandomSearch",
    "Target",
    "mean_output",
]
