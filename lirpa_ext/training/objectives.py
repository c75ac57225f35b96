"""The losses of certified training by name: the bound that each takes, and its combination with the natural loss.

`OBJECTIVES` is the table, name -> `Objective`. The losses are computed by the functions of `lirpa_ext.training.losses`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import engine
from ..attacks import make_attack
from ..domain.perturbation import PerturbationLpNorm
from ..errors import ConfigError
from ..extensions import add, load_extensions
from ..methods import check_options, find_method
from ..module.bounded_module import BoundedModule
from ..randomized import REGULARIZERS
from .losses import certified_loss, clean_and_worst_logits, fused_cross_entropy, mixed_loss, relu_stability_loss
from .schedules import Values

__all__ = ["OBJECTIVES", "Loss", "Objective", "Step", "register_loss", "register_objective", "step_loss"]


@dataclass(frozen=True)
class Objective:
    """Definition of a loss, an entry of `OBJECTIVES`.

    Attributes:
        method: Bound method of the worst-case logits, of `BoundedModule.compute_bounds`; "" for none.
        verify: Method that verifies the trained network. "" for "sparse-slope" in l-infinity balls, and for "bcp-crown"
            in all others.
        estimate: Whether training uses estimated spectral norms.
        mixes: Whether beta mixes the bound with that of IBP.
        attack: Whether training uses the points of a PGD attack in place of a bound.
        randomized: Kind of randomized network that the loss trains, a name of `RANDOMIZED`; "" for a deterministic one.
        function: For a registered loss, the loss itself: `Step` and options -> mean over the batch. The other fields
            except `verify` are then not read.
    """

    method: str = ""
    verify: str = ""
    estimate: bool = False
    mixes: bool = False
    attack: bool = False
    randomized: str = ""
    function: Callable[..., Tensor] | None = None

    def verifier(self, norm: float) -> str:
        """Bound method that verifies the trained network in balls of this norm."""
        return self.verify or ("sparse-slope" if norm == math.inf else "bcp-crown")


OBJECTIVES: dict[str, Objective] = {
    "natural": Objective(),
    "pgd": Objective(attack=True),
    "lipschitz": Objective("lipschitz", "lipschitz", estimate=True),  # LMT
    "bcp": Objective("bcp", "bcp", estimate=True),
    "ibp": Objective("slope:ibp", "slope:ibp"),
    "crown-ibp": Objective("slope:crown", "slope:crown", mixes=True),
    "cap-ibp": Objective("slope:cap", "slope:cap", mixes=True),
    "cap": Objective("cap"),
    "sparse-slope": Objective("sparse-slope", "sparse-slope", mixes=True),
    "adv-bnn": Objective(attack=True, randomized="adv-bnn"),
    "rse": Objective(attack=True, randomized="rse"),
}


def register_loss(name: str, function: Callable[..., Tensor], verify: str = "", overwrite: bool = False) -> None:
    """Add a loss to `OBJECTIVES`, so that a configuration can name it.

    Args:
        name: Name of the loss.
        function: ``function(step, **options)`` of a `Step` -> mean over the batch, 0-dim. Its further arguments are the
            options of the loss. It is not called at eps 0, where the loss is the clean cross entropy.
        verify: Method that verifies the trained network; default "sparse-slope" in l-infinity balls, else "bcp-crown".
        overwrite: Whether to replace a loss of this name, default False.

    Raises:
        RegistrationError: The name is taken.
        UnknownMethodError: There is no method `verify`.
    """
    if verify and verify.lower() not in engine.ENGINE_METHODS:
        find_method(verify)
    add(OBJECTIVES, "loss", name, Objective(verify=verify, function=function), overwrite)


def register_objective(name: str, objective: Objective, overwrite: bool = False) -> None:
    """Deprecated: `register_loss`."""
    warnings.warn("register_objective is register_loss now", DeprecationWarning, stacklevel=2)
    add(OBJECTIVES, "loss", name, objective, overwrite)


@dataclass
class Loss:
    """A loss by name, with its options.

    Args:
        name: One of `OBJECTIVES`.
        options: Options of the bound method, such as ``{steps: 7, alpha: 0.1, eta: 0.1}`` of "sparse-slope".
        fused: Whether to bound the cross entropy as one function (`lirpa_ext.fused_cross_entropy`), which is several
            times cheaper than one bound per class, and looser; default False.
        stability: Weight of the ReLU stability regularizer (Lee, 2021, C.13), default 0.
        attack_steps: Steps of PGD in the losses "pgd", "adv-bnn" and "rse", default 7.
        step_size: Step size of the attack on a randomized network as a fraction of eps, default 1/4, as in Lee (2021).
        attack_draws: Networks over which the attack on a randomized network averages gradients, default 1.
        random_start: Whether the attack on a randomized network starts at a random point of the ball, default False.
        momentum: Momentum of the attack on a randomized network (`lirpa_ext.attacks.PGD`), default 0.
        kl_factor: Weight of the KL divergence in "adv-bnn", default 0.02.
        graddiv: Regularizer of a randomized network, one of `lirpa_ext.randomized.REGULARIZERS`, default none. Its
            weight is ``schedule.graddiv``.
        graddiv_draws: Gradients that the regularizer takes, default 3.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    fused: bool = False
    stability: float = 0.0
    attack_steps: int = 7
    step_size: float = 0.25
    attack_draws: int = 1
    random_start: bool = False
    momentum: float = 0.0
    kl_factor: float = 0.02
    graddiv: str | None = None
    graddiv_draws: int = 3

    @property
    def objective(self) -> Objective:
        """The definition of the loss, of `OBJECTIVES`."""
        return OBJECTIVES[self.name]

    def check(self) -> None:
        """Raise ConfigError for an unknown name, options that the method does not have, or numbers out of range."""
        load_extensions()
        if self.name not in OBJECTIVES:
            raise ConfigError(f"unknown loss {self.name!r}: known are {', '.join(OBJECTIVES)}")
        method, function = self.objective.method, self.objective.function
        if function is not None:
            _check_options(self.name, function, self.options)
        elif self.options and not method:
            raise ConfigError(f"loss {self.name!r} takes no options, got {', '.join(self.options)}")
        try:
            if method:
                check_options(method, find_method(method), self.options)
        except TypeError as error:
            raise ConfigError(f"loss.options: {error}") from error
        if self.fused and not self.objective.mixes:
            raise ConfigError(f"loss {self.name!r} cannot be fused: only crown-ibp, cap-ibp and sparse-slope can")
        if not 0 <= self.stability < math.inf or self.attack_steps < 1:
            raise ConfigError("loss.stability must be 0 or more, and loss.attack_steps 1 or more")
        if not 0 <= self.kl_factor < math.inf or not 0 <= self.momentum < math.inf:
            raise ConfigError("loss.kl_factor and loss.momentum must be 0 or more")
        if not 0 < self.step_size < math.inf or self.attack_draws < 1:
            raise ConfigError("loss.step_size must be positive, and loss.attack_draws 1 or more")
        if self.graddiv is not None:
            if not self.objective.randomized:
                raise ConfigError(f"loss {self.name!r} trains one network, and GradDiv is of draws: use adv-bnn or rse")
            if self.graddiv not in REGULARIZERS:
                raise ConfigError(f"unknown loss.graddiv {self.graddiv!r}: known are {', '.join(REGULARIZERS)}")
            if self.graddiv_draws < 2:
                raise ConfigError(
                    f"loss.graddiv_draws must be 2 or more: diversity is of pairs; got {self.graddiv_draws}"
                )


@dataclass(frozen=True)
class Step:
    """Input of a loss: one batch, the graph of the model, the perturbation set, and the weights in the loss.

    Attributes:
        bounded: Graph of the model.
        x: Inputs, (B, ...).
        y: Labels, (B,).
        logits: Clean logits, (B, classes). If None, they are taken from the bound, or else computed by the model.
        values: eps, kappa and beta of the step.
        norm: p of the lp ball.
        x_L: Lower end of the data range, or None.
        x_U: Upper end of the data range, or None.
    """

    bounded: BoundedModule
    x: Tensor
    y: Tensor
    logits: Tensor | None
    values: Values
    norm: float
    x_L: float | None
    x_U: float | None

    def clean(self) -> Tensor:
        """Clean logits, (B, classes)."""
        return self.bounded.source(self.x) if self.logits is None else self.logits

    def worst(self, method: str, **options: Any) -> Tensor:
        """Worst-case logits by a bound method with options (`lirpa_ext.worst_case_logits`), (B, classes)."""
        return self.clean_and_worst(method, self.logits, **options)[1]

    def clean_and_worst(self, method: str, logits: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        """Clean and worst-case logits by a bound method, (B, classes) each; `logits` are the clean ones if known."""
        return clean_and_worst_logits(
            self.bounded, self.x, self.y, self.values.eps, method, self.norm, self.x_L, self.x_U,
            logits=logits, **options,
        )  # fmt: skip

    def attacked(self, attack: str = "pgd", eps: float | None = None, **options: Any) -> Tensor:
        """Logits at the points found by an attack, for adversarial training; they are no bound.

        Args:
            attack: One of `lirpa_ext.attacks.ATTACKS`, default "pgd".
            eps: Radius, default that of the step.
            **options: Options of the attack.

        Returns:
            Logits, (B, classes), differentiable in the model's parameters.
        """
        model = self.bounded.source
        seed = int(torch.randint(2**62, ()))  # from torch's generator, which the trainer seeds at every step
        ball = PerturbationLpNorm(self.values.eps if eps is None else eps, self.norm, self.x_L, self.x_U)
        found = make_attack(attack, **options)(model, self.x, self.y, ball, torch.Generator().manual_seed(seed))
        return model(found.inputs)


def _check_options(name: str, function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    known = list(inspect.signature(function).parameters)[1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigError(f"loss {name!r} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}")


def step_loss(loss: Loss, step: Step) -> Tensor:
    """Loss of a training step, kappa CE(clean) + (1 - kappa) CE((1 - beta) IBP + beta method) + stability RS.

    Equations (3.2.13), (C.1.1) and (C.13) of Lee (2021). Terms of weight 0 are not computed. At eps 0, where the set is
    a single point, the loss is the clean cross entropy.

    Args:
        loss: The loss, by name.
        step: Batch, graph, set and weights.

    Returns:
        Mean over the batch, 0-dim, differentiable in the model's parameters. With estimated norms it is no upper bound
        on the worst-case loss.
    """
    values, objective = step.values, loss.objective
    total = _robust_loss(loss, objective, step)
    if loss.stability and values.eps > 0:
        total = total + loss.stability * relu_stability_loss(
            step.bounded, step.x, values.eps, step.norm, step.x_L, step.x_U
        )
    return total


def _robust_loss(loss: Loss, objective: Objective, step: Step) -> Tensor:
    values, y = step.values, step.y
    if objective.function is not None and values.eps > 0:
        return objective.function(step, **loss.options)
    if values.eps == 0 or values.kappa == 1 or (not objective.method and not objective.attack):
        return functional.cross_entropy(step.clean(), y)
    if objective.attack:
        attacked = step.attacked("pgd", steps=loss.attack_steps, loss="cross-entropy")
        return certified_loss(step.clean(), attacked, y, 1 - values.kappa)
    if loss.fused:
        bound = fused_cross_entropy(
            step.bounded, step.x, y, values.eps, objective.method, step.norm, step.x_L, step.x_U, **loss.options
        )
        return values.kappa * functional.cross_entropy(step.clean(), y) + (1 - values.kappa) * bound.mean()
    options = ({"norms": "estimate"} if objective.estimate else {}) | loss.options
    if not objective.mixes or values.beta == 1:
        logits, worst = step.clean_and_worst(objective.method, step.logits, **options)
        return certified_loss(logits, worst, y, 1 - values.kappa)
    logits, interval = step.clean_and_worst("slope:ibp", step.logits)
    if values.beta == 0:
        return certified_loss(logits, interval, y, 1 - values.kappa)
    _, tight = step.clean_and_worst(objective.method, logits, **options)
    return mixed_loss(logits, interval, tight, y, values.kappa, values.beta)
