"""Randomized networks: layers that draw random numbers at every call, fixed draws, ensembles, and GradDiv.

`make_rse` and `make_adv_bnn` turn a torch network into a randomized one. `sample` draws networks from a randomized one
and fixes the draws; `predict` averages many draws. `lirpa_ext.randomized.graddiv` measures and penalizes how similar
the gradients of draws are. `lirpa_ext.certification.evaluate` tests adversarial examples on fresh draws.
"""

from __future__ import annotations

import importlib
from typing import Any

from .bayesian import BayesianLayer, elbo_loss, kl_divergence, make_adv_bnn
from .graddiv import REGULARIZERS, gradients, mean_resultant_length, von_mises_fisher
from .rse import Noise, make_rse
from .sampling import ADAPTERS, Adapter, RandomLayer, Sampled, is_randomized, predict, require_randomized, sample

__all__ = [
    "ADAPTERS",
    "REGULARIZERS",
    "Adapter",
    "BayesianLayer",
    "Noise",
    "RandomLayer",
    "Sampled",
    "elbo_loss",
    "gradients",
    "is_randomized",
    "kl_divergence",
    "make_adv_bnn",
    "make_rse",
    "mean_resultant_length",
    "predict",
    "require_randomized",
    "sample",
    "von_mises_fisher",
]


def __getattr__(name: str) -> Any:
    if name not in ("RobustAccuracy", "evaluate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".evaluation", __name__), name)  # the old name of the module, which warns
