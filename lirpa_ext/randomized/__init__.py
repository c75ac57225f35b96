"""Randomized networks: layers that draw at every call, one drawn network to hold on to, ensembles, GradDiv.

`make_rse` and `make_adv_bnn` turn any torch network into a randomized one; `sample` draws a network from it and holds
it, `predict` asks many. `lirpa_ext.randomized.graddiv` measures and penalizes how alike the gradients of draws are.
"""

from __future__ import annotations

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
